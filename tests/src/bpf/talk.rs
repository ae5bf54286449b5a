//! Conversations: packets at hooks, and what must become of them.

use anyhow::Result;
use proxy_abi::{Hook, Proto, Reason};

use super::{Bench, End, verdict};
use crate::address::Family;
use crate::packet::named::Host;
use crate::packet::{Frame, L4, Tcp, tcp_flag};

/// A family and a protocol.
#[derive(Clone, Copy, Debug)]
pub struct Talk {
    /// Family of all addresses.
    pub family: Family,
    /// TCP or UDP.
    pub proto: Proto,
}

/// All of them.
pub const TALKS: [Talk; 4] = [
    Talk { family: Family::V4, proto: Proto::TCP },
    Talk { family: Family::V6, proto: Proto::TCP },
    Talk { family: Family::V4, proto: Proto::UDP },
    Talk { family: Family::V6, proto: Proto::UDP },
];

impl Talk {
    /// A packet; `flags` are those of TCP.
    pub fn frame(self, from: (&Host, u16), to: (&Host, u16), flags: u8) -> Frame {
        match self.proto {
            Proto::TCP => from.0.tcp(from.1, to.0, to.1, self.family, flags),
            _ => from.0.udp(from.1, to.0, to.1, self.family, b"datagram"),
        }
    }

    /// Is it TCP?
    pub fn is_tcp(self) -> bool {
        self.proto == Proto::TCP
    }

    /// Address and port of a host.
    pub fn end(self, host: &Host, port: u16) -> End {
        (host.ip(self.family), port)
    }
}

/// A packet at a hook, and what becomes of it.
#[derive(Clone, Debug)]
pub struct Step {
    /// Where.
    pub hook: Hook,
    /// The pod whose interface it is.
    pub at: Host,
    /// As it comes.
    pub sent: Frame,
    /// One of [`verdict`].
    pub verdict: i32,
    /// As it goes.
    pub after: Frame,
    /// Under what it is counted, and nothing else is.
    pub reason: Reason,
}

/// A packet that is changed.
pub fn changed(hook: Hook, at: Host, sent: Frame, verdict: i32, after: Frame, reason: Reason) -> Step {
    Step { hook, at, sent, verdict, after, reason }
}

/// A packet that passes as it is.
pub fn passes(hook: Hook, at: Host, sent: Frame, reason: Reason) -> Step {
    Step { hook, at, after: sent.clone(), sent, verdict: verdict::PASS, reason }
}

/// A packet that ends.
pub fn drops(hook: Hook, at: Host, sent: Frame, reason: Reason) -> Step {
    Step { hook, at, after: sent.clone(), sent, verdict: verdict::DROP, reason }
}

/// The reset that answers a segment: RFC 9293 §3.5.2.
///
/// # Panics
/// When it is no TCP segment.
pub fn reset_of(sent: &Frame) -> Frame {
    let ip = sent.as_ip().expect("it is IP");
    let L4::Tcp(tcp) = &ip.l4 else { panic!("it is TCP") };
    let length = u32::try_from(tcp.payload.len()).expect("short") + u32::from(tcp.flags & tcp_flag::SYN != 0);
    let acknowledges = tcp.flags & tcp_flag::ACK != 0;
    let answer = Tcp {
        src: tcp.dst,
        dst: tcp.src,
        seq: if acknowledges { tcp.ack } else { 0 },
        ack: if acknowledges { 0 } else { tcp.seq + length },
        flags: if acknowledges { tcp_flag::RST } else { tcp_flag::RST | tcp_flag::ACK },
        ..Tcp::default()
    };
    let mut frame = sent.clone();
    (frame.src, frame.dst) = (sent.dst, sent.src);
    let out = frame.as_ip_mut().expect("it is IP");
    (out.src, out.dst, out.l4) = (ip.dst, ip.src, L4::Tcp(answer));
    frame
}

/// Plays the steps in their order; panics at the first that goes otherwise.
///
/// # Errors
/// When a program cannot be run.
pub fn converse(bench: &Bench, name: &str, steps: &[Step]) -> Result<()> {
    for (number, step) in steps.iter().enumerate() {
        let got = bench.feed(step.hook, &step.at, &step.sent.build())?;
        assert_eq!(Frame::parse(&got.packet), Ok(step.after.clone()), "{name}: packet of step {number}");
        assert_eq!(got.packet, step.after.build(), "{name}: bytes of step {number}");
        assert_eq!(got.verdict, step.verdict, "{name}: verdict of step {number}");
        assert_eq!(got.counts, [((step.hook, step.reason), 1)].into(), "{name}: counters of step {number}");
    }
    Ok(())
}
