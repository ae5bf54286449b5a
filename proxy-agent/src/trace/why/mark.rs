//! How one packet is known among all others, and what answers it: by ends, numbers and identifiers, never by a mark or a
//! field that somebody else uses.

use std::net::{IpAddr, SocketAddr};

use proxy_abi::Proto;

use super::super::journey::{Journey, Sight};
use super::super::packet::{Packet, flag};

/// What nobody on the way changes of a packet that was sent, or what translation brings back.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Mark {
    /// Where it comes from. Of an echo the port is its identifier.
    pub from: SocketAddr,
    /// Protocol.
    pub proto: Proto,
    /// Sequence number of a SYN; `None`: the kernel chose it.
    pub sequence: Option<u32>,
}

/// Echo requests and replies.
const ECHOES: [(u8, u8); 4] = [(8, 0), (0, 0), (128, 0), (129, 0)];

/// What stands behind the IP header.
fn transport(bytes: &[u8]) -> &[u8] {
    let at = match bytes.first().map(|first| first >> 4) {
        Some(4) => usize::from(bytes.first().map_or(0, |first| first & 15)) * 4,
        _ => 40,
    };
    bytes.get(at..).unwrap_or_default()
}

fn half(bytes: &[u8], at: usize) -> Option<u16> {
    Some(u16::from_be_bytes(bytes.get(at..at + 2)?.try_into().ok()?))
}

fn word(bytes: &[u8], at: usize) -> Option<u32> {
    Some(u32::from_be_bytes(bytes.get(at..at + 4)?.try_into().ok()?))
}

impl Mark {
    /// Of a packet that was seen.
    pub fn of(journey: &Journey) -> Option<Self> {
        let (packet, bytes) = journey.sights().find_map(|sight| Some((sight.packet.as_ref()?, &sight.bytes)))?;
        let mut mark = Self { from: packet.source(), proto: packet.proto, sequence: None };
        if mark.is_echo() {
            mark.from.set_port(half(transport(bytes), 4)?);
        }
        mark.sequence = word(transport(bytes), 4).filter(|_| packet.opens());
        Some(mark)
    }

    const fn is_echo(&self) -> bool {
        matches!(self.proto, Proto::ICMP | Proto::ICMPV6)
    }

    fn has_source(&self, packet: &Packet, bytes: &[u8]) -> bool {
        if packet.proto != self.proto || packet.src != self.from.ip() {
            return false;
        }
        if self.is_echo() {
            return packet.icmp.is_some_and(|kind| ECHOES.contains(&kind))
                && half(transport(bytes), 4) == Some(self.from.port());
        }
        packet.src_port == self.from.port()
    }

    fn is_request(&self, packet: &Packet, bytes: &[u8]) -> bool {
        let opens = packet.opens() && self.sequence.is_none_or(|number| word(transport(bytes), 4) == Some(number));
        self.has_source(packet, bytes) && (self.proto != Proto::TCP || opens)
    }

    fn is_answer(&self, packet: &Packet, bytes: &[u8]) -> bool {
        if packet.dst != self.from.ip() {
            return false;
        }
        let rest = transport(bytes);
        if self.is_error(packet) {
            // It quotes what it is about, as the one who gets it has sent it.
            let quoted = rest.get(8..).unwrap_or_default();
            return Packet::parse(quoted).is_some_and(|packet| self.has_source(&packet, quoted));
        }
        if packet.proto != self.proto {
            return false;
        }
        if self.is_echo() {
            return matches!(packet.icmp, Some((0 | 129, 0))) && half(rest, 4) == Some(self.from.port());
        }
        packet.dst_port == self.from.port()
            && (self.proto != Proto::TCP
                || self.sequence.is_none_or(|number| word(rest, 8) == Some(number.wrapping_add(1))))
    }

    fn is_error(&self, packet: &Packet) -> bool {
        let v4 = self.from.is_ipv4();
        match packet.icmp {
            Some((kind, _)) if v4 => packet.proto == Proto::ICMP && matches!(kind, 3 | 11 | 12),
            Some((kind, _)) => packet.proto == Proto::ICMPV6 && (1..=4).contains(&kind),
            None => false,
        }
    }

    /// Is this journey the packet's?
    pub fn is_sent(&self, journey: &Journey) -> bool {
        let first = journey.sights().find(|sight| sight.packet.is_some());
        first.is_some_and(|sight| sight.packet.as_ref().is_some_and(|packet| self.is_request(packet, &sight.bytes)))
    }

    /// Is it its answer's? As anywhere on its way: it may not be translated back at the beginning, or never.
    pub fn is_answered_by(&self, journey: &Journey) -> bool {
        let is = |sight: &Sight| sight.packet.as_ref().is_some_and(|packet| self.is_answer(packet, &sight.bytes));
        journey.sights().any(is)
    }

    /// Is it the reset of the sender's own kernel, which knows of no such connection?
    pub fn is_reset(&self, journey: &Journey) -> bool {
        self.proto == Proto::TCP
            && journey.first().is_some_and(|packet| packet.source() == self.from && packet.flags & flag::RST != 0)
    }

    /// Does an answer say no?
    pub fn refuses(&self, journey: &Journey) -> bool {
        journey.first().is_some_and(|packet| packet.flags & flag::RST != 0 || self.is_error(packet))
    }

    /// All of it, answers included, as an expression for the probes.
    pub fn expression(proto: Proto, from: Option<IpAddr>, port: u16, v4: bool) -> String {
        let (family, icmp) = if v4 { ("ip", "icmp") } else { ("ip6", "icmp6") };
        let (sends, gets) = match from {
            Some(ip) => (format!(" and src host {ip}"), format!(" and dst host {ip}")),
            None => (String::new(), String::new()),
        };
        let name = match proto {
            Proto::TCP => "tcp",
            Proto::UDP => "udp",
            _ => return format!("({icmp}{sends}) or ({icmp}{gets})"),
        };
        let ports =
            format!("({family} and {name} src port {port}{sends}) or ({family} and {name} dst port {port}{gets})");
        // Errors about it.
        if from.is_some() { format!("{ports} or ({icmp}{gets})") } else { ports }
    }
}

#[cfg(test)]
mod tests {
    use super::super::super::expression::Expression;
    use super::super::super::journey::{Place, Point, Step};
    use super::super::frame::{Frame, Part};
    use super::*;

    fn end(text: &str) -> SocketAddr {
        text.parse().expect("an end")
    }

    fn journey(proto: Proto, ends: (&str, &str), part: Part, number: u32) -> Journey {
        let ends = (end(ends.0), end(ends.1));
        let bytes = Frame { macs: Default::default(), ends, proto, size: 0, part, number }.bytes()[14..].to_vec();
        seen(bytes)
    }

    fn seen(bytes: Vec<u8>) -> Journey {
        let sight = Sight {
            at: 1,
            point: Point::Receive,
            place: Place::Host("veth7".to_owned()),
            ifindex: 7,
            netns: 1,
            cpu: 0,
            skb: 8,
            len: 40,
            mark: 0,
            reason: 0,
            location: 0,
            nfct: 0,
            cookie: 0,
            hooks: 0,
            bridge_nf: false,
            packet: Packet::parse(&bytes),
            bytes,
            stack: Vec::new(),
        };
        Journey { id: 1, steps: vec![Step::Sight(sight)] }
    }

    #[test]
    fn one_packet_and_what_answers_it_are_known() {
        let (web, api) = ("10.1.0.2:59000", "10.1.0.3:80");
        let tcp = Mark { from: end(web), proto: Proto::TCP, sequence: Some(70) };
        let all = |mark: &Mark, journey: &Journey| {
            (mark.is_sent(journey), mark.is_answered_by(journey), mark.is_reset(journey))
        };
        let segment = |ends, part, number| journey(Proto::TCP, ends, part, number);
        let rows = [
            (segment((web, api), Part::Opens, 70), (true, false, false)),
            (segment((web, api), Part::Opens, 71), (false, false, false)),
            (segment((web, api), Part::GoesOn, 70), (false, false, false)),
            (segment((web, api), Part::Resets, 70), (false, false, true)),
            (segment((api, web), Part::Answers, 70), (false, true, false)),
            (segment((api, web), Part::Answers, 71), (false, false, false)),
            (segment((api, "10.1.0.2:59001"), Part::Answers, 70), (false, false, false)),
            (segment(("10.1.0.4:59000", api), Part::Opens, 70), (false, false, false)),
        ];
        for (n, (journey, expected)) in rows.iter().enumerate() {
            assert_eq!(all(&tcp, journey), *expected, "row {n}");
        }
        assert_eq!(Mark::of(&rows[0].0), Some(tcp));
        let any = Mark { sequence: None, ..tcp };
        assert!(any.is_sent(&rows[1].0) && any.is_answered_by(&rows[5].0));
        assert!(!tcp.refuses(&rows[4].0) && tcp.refuses(&rows[3].0));

        for (proto, web, api) in
            [(Proto::ICMP, "10.1.0.2:9", "10.1.0.3:0"), (Proto::ICMPV6, "[fd01::2]:9", "[fd01::3]:0")]
        {
            let echo = Mark { from: end(web), proto, sequence: None };
            let (request, reply) =
                (journey(proto, (web, api), Part::Opens, 1), journey(proto, (api, web), Part::Answers, 1));
            assert_eq!(
                (all(&echo, &request), all(&echo, &reply)),
                ((true, false, false), (false, true, false)),
                "{proto}"
            );
            let other = Mark { from: SocketAddr::new(echo.from.ip(), 10), ..echo };
            assert_eq!((all(&other, &request), all(&other, &reply)), ((false, false, false), (false, false, false)));
        }
    }

    #[test]
    fn an_error_answers_what_it_quotes() {
        let (web, api) = (end("10.1.0.2:59000"), end("10.1.0.3:53"));
        let quoted = Frame {
            macs: Default::default(),
            ends: (web, api),
            proto: Proto::UDP,
            size: 0,
            part: Part::Opens,
            number: 1,
        };
        let carrier = Frame { ends: (api, web), proto: Proto::ICMP, ..quoted };
        let mut error = carrier.bytes()[14..42].to_vec();
        // Port unreachable.
        (error[20], error[21]) = (3, 3);
        error.extend(&quoted.bytes()[14..]);
        let mark = Mark { from: web, proto: Proto::UDP, sequence: None };
        let journey = seen(error);
        assert!(mark.is_answered_by(&journey) && mark.refuses(&journey));
        let other = Mark { from: end("10.1.0.2:59001"), ..mark };
        assert!(!other.is_answered_by(&journey));
    }

    #[test]
    fn the_probes_are_asked_for_no_more() {
        let from: IpAddr = [10, 1, 0, 2].into();
        let text = Mark::expression(Proto::TCP, Some(from), 59_000, true);
        let expression: Expression = text.parse().expect("an expression");
        let packet = |proto, ends: (&str, &str), part| {
            let ends = (end(ends.0), end(ends.1));
            let bytes = Frame { macs: Default::default(), ends, proto, size: 0, part, number: 1 }.bytes();
            Packet::parse(&bytes[14..]).expect("headers")
        };
        let (web, api) = ("10.1.0.2:59000", "10.1.0.3:80");
        assert!(expression.holds(&packet(Proto::TCP, (web, api), Part::Opens)));
        assert!(expression.holds(&packet(Proto::TCP, (api, web), Part::Answers)));
        assert!(expression.holds(&packet(Proto::ICMP, ("10.1.0.3:0", "10.1.0.2:0"), Part::Opens)));
        assert!(!expression.holds(&packet(Proto::TCP, ("10.1.0.2:1", api), Part::Opens)));
        assert!(!expression.holds(&packet(Proto::UDP, (web, api), Part::Opens)));
        for proto in [Proto::TCP, Proto::UDP, Proto::ICMP, Proto::ICMPV6] {
            for v4 in [true, false] {
                for from in [Some(from), None] {
                    let text = Mark::expression(proto, from, 1, v4);
                    let parsed: Expression = text.parse().expect("an expression");
                    assert!(!parsed.rows().is_empty(), "{text}");
                }
            }
        }
    }
}
