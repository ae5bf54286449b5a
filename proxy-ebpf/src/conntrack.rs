//! The life of a flow.
//!
//! ```text
//!                 SYN              SYN-ACK               ACK
//!   initiator  ────────▶ SYN_SENT ────────▶ SYN_RECEIVED ────▶ ESTABLISHED ──FIN──▶ FIN_* ──FIN──▶ CLOSED
//!                                                                  ▲        └──────── RST ───────▶ RESET
//!   a segment without SYN ─▶ MIDSTREAM ── answer with ACK ─────────┘
//!
//!   flow_brief (evictable)   SYN_SENT, SYN_RECEIVED, MIDSTREAM, CLOSED, RESET, UDP
//!   flow_live  (never)       ESTABLISHED, FIN_*
//! ```
//!
//! So a flood of SYNs, of UDP or of closed connections evicts nothing that is established, and an agent that is away
//! is not missed: what ends leaves `flow_live` in the kernel.

use proxy_abi::Proto;
use proxy_abi::flow::state;

use crate::packet::tcp_flag;

/// Who sent a packet of a flow.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Sender {
    /// The end that began the flow.
    Initiator,
    /// The other end.
    Responder,
}

/// One second, in nanoseconds.
pub const SECOND: u64 = 1_000_000_000;
/// How often `last_seen` is written.
pub const TOUCH: u64 = SECOND;

/// How long a flow that is not TCP may be idle before its next packet begins another one, in nanoseconds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct UdpIdle {
    /// Without an answer (kernel: `nf_conntrack_udp_timeout`; kube-proxy: `conntrack.udpTimeout`).
    pub unreplied: u64,
    /// With answers (kernel: `nf_conntrack_udp_timeout_stream`; kube-proxy: `conntrack.udpStreamTimeout`).
    pub assured: u64,
}

impl UdpIdle {
    /// The kernel's own.
    pub const DEFAULT: Self = Self { unreplied: 30 * SECOND, assured: 120 * SECOND };
    /// The least that can be told from a flow that is in use, whose time is written every [`TOUCH`].
    pub const LEAST: u64 = 2 * TOUCH;
}

/// State of a flow whose first packet has these flags.
#[inline(always)]
pub const fn first(proto: Proto, tcp_flags: u8) -> u8 {
    if proto.0 != Proto::TCP.0 {
        return state::UNREPLIED;
    }
    match tcp_flags & (tcp_flag::SYN | tcp_flag::ACK | tcp_flag::RST) {
        tcp_flag::SYN => state::SYN_SENT,
        _ if tcp_flags & tcp_flag::RST != 0 => state::RESET,
        _ => state::MIDSTREAM,
    }
}

/// Is this the segment that asks for a new connection?
#[inline(always)]
pub const fn opens(tcp_flags: u8) -> bool {
    tcp_flags & (tcp_flag::SYN | tcp_flag::ACK | tcp_flag::RST | tcp_flag::FIN) == tcp_flag::SYN
}

/// State after one more packet.
#[inline(always)]
pub const fn step(old: u8, sender: Sender, proto: Proto, tcp_flags: u8) -> u8 {
    if proto.0 != Proto::TCP.0 {
        return match (old, sender) {
            (state::UNREPLIED, Sender::Responder) => state::ASSURED,
            _ => old,
        };
    }
    if tcp_flags & tcp_flag::RST != 0 {
        return state::RESET;
    }
    let syn = tcp_flags & tcp_flag::SYN != 0;
    let ack = tcp_flags & tcp_flag::ACK != 0;
    // SYN with FIN is nobody's segment; it opens at most.
    let fin = tcp_flags & tcp_flag::FIN != 0 && !syn;
    match (old, sender) {
        // The answer; or a simultaneous open, RFC 9293 §3.5, which has no ACK yet.
        (state::SYN_SENT, Sender::Responder) if syn => state::SYN_RECEIVED,
        // The handshake is over with the initiator's first segment after the SYN-ACK; it may carry data or FIN already.
        (state::SYN_RECEIVED, Sender::Initiator) if ack && !syn => {
            if fin {
                state::FIN_INITIATOR
            } else {
                state::ESTABLISHED
            }
        }
        (state::MIDSTREAM, Sender::Responder) if ack && !syn => {
            if fin {
                state::FIN_RESPONDER
            } else {
                state::ESTABLISHED
            }
        }
        // A FIN in the middle of nothing says no more than any other segment there: an answer has to come first, or one side
        // alone would fill the table that evicts nothing.
        (state::ESTABLISHED, Sender::Initiator) if fin => state::FIN_INITIATOR,
        (state::ESTABLISHED | state::SYN_RECEIVED, Sender::Responder) if fin => state::FIN_RESPONDER,
        (state::FIN_INITIATOR, Sender::Responder) | (state::FIN_RESPONDER, Sender::Initiator) if fin => state::CLOSED,
        _ => old,
    }
}

/// Does a flow in this state belong into the table that evicts nothing?
#[inline(always)]
pub const fn is_live(state: u8) -> bool {
    matches!(state, state::ESTABLISHED | state::FIN_INITIATOR | state::FIN_RESPONDER)
}

/// Has the connection ended, so that a SYN with the same ports asks for another one?
#[inline(always)]
pub const fn is_over(state: u8) -> bool {
    matches!(state, state::CLOSED | state::RESET)
}

/// Has a flow that is not TCP been idle for so long that its next packet begins another one?
#[inline(always)]
pub const fn is_idle(state: u8, idle: u64, most: UdpIdle) -> bool {
    match state {
        state::UNREPLIED => idle > most.unreplied,
        state::ASSURED => idle > most.assured,
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    extern crate std;
    use std::vec::Vec;

    use proptest::prelude::*;

    use super::Sender::{Initiator as I, Responder as R};
    use super::*;
    use state::*;

    const SYN: u8 = tcp_flag::SYN;
    const ACK: u8 = tcp_flag::ACK;
    const FIN: u8 = tcp_flag::FIN | ACK;
    const RST: u8 = tcp_flag::RST;

    #[test]
    fn tcp_conversations() {
        /// A name, and who sends which flags into which state.
        type Conversation<'a> = (&'a str, &'a [(Sender, u8, u8)]);
        let table: &[Conversation<'_>] = &[
            (
                "open, data, close by initiator",
                &[
                    (I, SYN, SYN_SENT),
                    (R, SYN | ACK, SYN_RECEIVED),
                    (I, ACK, ESTABLISHED),
                    (I, ACK, ESTABLISHED),
                    (R, ACK, ESTABLISHED),
                    (I, FIN, FIN_INITIATOR),
                    (R, ACK, FIN_INITIATOR),
                    (R, FIN, CLOSED),
                    (I, ACK, CLOSED),
                ],
            ),
            (
                "close by responder",
                &[
                    (I, SYN, SYN_SENT),
                    (R, SYN | ACK, SYN_RECEIVED),
                    (I, ACK, ESTABLISHED),
                    (R, FIN, FIN_RESPONDER),
                    (R, FIN, FIN_RESPONDER),
                    (I, ACK, FIN_RESPONDER),
                    (I, FIN, CLOSED),
                ],
            ),
            ("retransmitted SYN, refused", &[(I, SYN, SYN_SENT), (I, SYN, SYN_SENT), (R, RST | ACK, RESET)]),
            (
                "the first ACK is lost, data comes",
                &[
                    (I, SYN, SYN_SENT),
                    (R, SYN | ACK, SYN_RECEIVED),
                    (R, SYN | ACK, SYN_RECEIVED),
                    (I, ACK | 8, ESTABLISHED),
                ],
            ),
            ("simultaneous open", &[(I, SYN, SYN_SENT), (R, SYN, SYN_RECEIVED), (I, ACK, ESTABLISHED)]),
            ("older than the agent", &[(I, ACK, MIDSTREAM), (I, ACK, MIDSTREAM), (R, ACK, ESTABLISHED)]),
            (
                "older than the agent, and about to close",
                &[
                    (I, FIN, MIDSTREAM),
                    (I, FIN, MIDSTREAM),
                    (R, ACK, ESTABLISHED),
                    (R, FIN, FIN_RESPONDER),
                    (I, ACK, FIN_RESPONDER),
                ],
            ),
            ("older than the agent, closed by both", &[(I, ACK, MIDSTREAM), (R, FIN, FIN_RESPONDER), (I, FIN, CLOSED)]),
            ("stray RST", &[(I, RST, RESET)]),
            ("SYN flood", &[(I, SYN, SYN_SENT), (R, SYN | ACK, SYN_RECEIVED), (R, SYN | ACK, SYN_RECEIVED)]),
            (
                "only the responder talks after its SYN-ACK",
                &[(I, SYN, SYN_SENT), (R, SYN | ACK, SYN_RECEIVED), (R, ACK, SYN_RECEIVED)],
            ),
        ];
        for (name, conversation) in table {
            let mut now = None;
            let seen: Vec<u8> = conversation
                .iter()
                .map(|(sender, flags, _)| {
                    let next = now.map_or_else(|| first(Proto::TCP, *flags), |s| step(s, *sender, Proto::TCP, *flags));
                    now = Some(next);
                    next
                })
                .collect();
            let expected: Vec<u8> = conversation.iter().map(|(_, _, state)| *state).collect();
            assert_eq!(seen, expected, "{name}");
        }
    }

    #[test]
    fn udp() {
        assert_eq!(first(Proto::UDP, 0), UNREPLIED);
        assert_eq!(step(UNREPLIED, I, Proto::UDP, 0), UNREPLIED);
        assert_eq!(step(UNREPLIED, R, Proto::UDP, 0), ASSURED);
        assert_eq!(step(ASSURED, I, Proto::UDP, 0), ASSURED);
        let most = UdpIdle { unreplied: 10, assured: 20 };
        for (state, idle, over) in [
            (UNREPLIED, 10, false),
            (UNREPLIED, 11, true),
            (ASSURED, 20, false),
            (ASSURED, 21, true),
            (ESTABLISHED, u64::MAX, false),
        ] {
            assert_eq!(is_idle(state, idle, most), over, "{} after {idle}", state::name(state));
        }
    }

    proptest! {
        /// What the initiator alone sends never makes a flow one that cannot be evicted.
        #[test]
        fn one_side_is_never_live(flags in proptest::collection::vec(any::<u8>(), 1..20)) {
            let mut s = first(Proto::TCP, flags[0]);
            for f in &flags[1..] {
                s = step(s, I, Proto::TCP, *f);
                prop_assert!(!is_live(s));
            }
        }

        /// The same packet seen at two hooks is as good as seen once.
        #[test]
        fn step_is_idempotent(old in prop::sample::select(std::vec![1u8, 2, 3, 4, 5, 6, 7, 8, 16, 17]), flags: u8, i: bool, tcp: bool) {
            let (sender, proto) = (if i { I } else { R }, if tcp { Proto::TCP } else { Proto::UDP });
            let once = step(old, sender, proto, flags);
            prop_assert_eq!(step(once, sender, proto, flags), once);
        }
    }
}
