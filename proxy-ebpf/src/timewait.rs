//! The port of a connection that has ended, taken over by another one.
//!
//! The end that closes first holds the connection in TIME_WAIT for a minute (RFC 9293 §3.6.1). Where that is the backend of a
//! masqueraded connection, it takes a SYN from the same address and port only when the SYN is clearly later than what it
//! heard last: by its timestamp, or where one of them has none, by its sequence number (RFC 6191; Linux,
//! `tcp_timewait_state_process` in net/ipv4/tcp_minisocks.c). Any other SYN gets an ACK of the old connection, and the
//! client begins anew after a second. Clients count from places that have nothing to do with each other, so the SYN is
//! asked first, and where it comes too early another port is taken.
//!
//! ```text
//!   client            proxy                       backend
//!     │ ◀──────────────────────────── FIN ───────── │   closes first
//!     │ ── FIN, seq, TSval ── recorded ───────────▶ │   TIME_WAIT, until a later SYN
//!   another client
//!     │ ── SYN, seq, TSval ── later? this port ───▶ │
//!     │                       else another port     │
//! ```

use proxy_abi::flow::TcpMoment;

use crate::packet::{OFFSET_MASK, Packet};

/// Bytes that the old connection may have sent after its recorded segment began.
const BYTES: u32 = 1 << 17;
/// Ticks for which it may have sent its last segment again; Linux counts milliseconds.
const TICKS: u32 = 1 << 12;

/// May a backend that heard `last` be asked for a new connection by a SYN of this moment?
#[inline(always)]
pub const fn is_later(last: TcpMoment, asked: TcpMoment) -> bool {
    if last.timestamp != 0 && asked.timestamp != 0 {
        return asked.timestamp.wrapping_sub(last.timestamp).wrapping_sub(TICKS).cast_signed() > 0;
    }
    asked.sequence.wrapping_sub(last.sequence).wrapping_sub(BYTES).cast_signed() > 0
}

/// Nothing was recorded: the backend is not in TIME_WAIT.
pub const NONE: TcpMoment = TcpMoment { sequence: 0, timestamp: 0 };

/// Options that are looked at in search of the timestamp: Linux has four before it at most.
const OPTIONS: usize = 10;

/// The moment of the segment whose TCP header begins at `l4`.
///
/// ```text
///   4 sequence   12 data offset (4 bits, in words)   20 options: kind, length, data; kinds 0 (end) and 1 stand alone
///                                                       kind 8, length 10: TSval 4, TSecr 4
/// ```
#[inline(always)]
pub fn moment<P: Packet + ?Sized>(packet: &P, l4: usize) -> TcpMoment {
    const END: u8 = 0;
    const NOTHING: u8 = 1;
    const TIMESTAMP: u8 = 8;
    let mut moment = NONE;
    let Some(sequence) = packet.word(l4 + 4) else { return moment };
    moment.sequence = u32::from_be(sequence);
    let Some(offset) = packet.byte(l4 + 12) else { return moment };
    let end = l4 + usize::from(offset >> 4) * 4;
    let mut at = l4 + 20;
    let mut option = 0;
    while option < OPTIONS && at + 10 <= end {
        let Some(kind) = packet.byte(at) else { break };
        if kind == END {
            break;
        }
        if kind == TIMESTAMP {
            if let Some(value) = packet.word(at + 2) {
                moment.timestamp = u32::from_be(value);
            }
            break;
        }
        let mut length = 1;
        if kind != NOTHING {
            match packet.byte(at + 1) {
                Some(stated) if stated >= 2 => length = usize::from(stated),
                _ => break,
            }
        }
        at = packet.forget((at + length) as u32) as usize & OFFSET_MASK;
        option += 1;
    }
    moment
}

#[cfg(test)]
mod tests {
    extern crate std;
    use std::vec::Vec;

    use super::*;

    const fn of(sequence: u32, timestamp: u32) -> TcpMoment {
        TcpMoment { sequence, timestamp }
    }

    #[test]
    fn later_by_timestamp_else_by_sequence() {
        let table = [
            ("a later timestamp, an earlier sequence", of(9_000_000, 10_000), of(1, 20_000), true),
            ("an earlier timestamp, a later sequence", of(1, 20_000), of(9_000_000, 10_000), false),
            ("the same moment", of(7, 20_000), of(7, 20_000), false),
            ("not late enough to be sure", of(7, 20_000), of(9_000_000, 21_000), false),
            ("timestamps that wrap", of(7, u32::MAX - 5), of(7, 10_000), true),
            ("no timestamps, later", of(7, 0), of(7 + BYTES + 1, 0), true),
            ("no timestamps, within what may still be sent", of(7, 0), of(7 + BYTES, 0), false),
            ("no timestamps, earlier", of(7 + BYTES, 0), of(7, 0), false),
            ("sequences that wrap", of(u32::MAX, 0), of(BYTES + 1, 0), true),
            ("only the old one has a timestamp", of(7, 9), of(7 + 2 * BYTES, 0), true),
            ("only the new one has a timestamp", of(7 + BYTES, 0), of(7, 99_999), false),
        ];
        for (name, last, asked, expected) in table {
            assert_eq!(is_later(last, asked), expected, "{name}");
        }
    }

    #[test]
    fn the_timestamp_among_the_options() {
        const STAMP: [u8; 10] = [8, 10, 0, 0, 3, 9, 0, 0, 0, 1];
        let segment = |options: &[u8]| {
            let mut bytes = std::vec![0_u8; 20];
            bytes[4..8].copy_from_slice(&0x0102_0304_u32.to_be_bytes());
            bytes.extend(options);
            bytes.resize(bytes.len().next_multiple_of(4), 0);
            bytes[12] = (bytes.len() / 4) as u8 * 16;
            bytes.extend([0xff; 24]);
            bytes
        };
        let syn: Vec<u8> = [&[2, 4, 5, 180, 4, 2], &STAMP[..], &[1, 3, 3, 7]].concat();
        let data: Vec<u8> = [&[1, 1], &STAMP[..]].concat();
        let last: Vec<u8> = [&[2, 4, 5, 180, 1, 3, 3, 7, 4, 2], &STAMP[..]].concat();
        let table: [(&str, &[u8], u32); 7] = [
            ("a SYN of Linux", &syn, 777),
            ("a segment of Linux", &data, 777),
            ("behind the others", &last, 777),
            ("no options", &[], 0),
            ("options without it", &[2, 4, 5, 180], 0),
            ("after the end of the options", &[&[0, 0], &STAMP[..]].concat(), 0),
            ("an option of length 0", &[&[2, 0], &STAMP[..]].concat(), 0),
        ];
        for (name, options, timestamp) in table {
            let bytes = segment(options);
            assert_eq!(moment(bytes.as_slice(), 0), of(0x0102_0304, timestamp), "{name}");
        }
        // One that claims more than there is.
        let short = &segment(&data)[..24];
        assert_eq!(moment(short, 0), of(0x0102_0304, 0));
    }
}
