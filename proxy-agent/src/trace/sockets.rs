//! What the programs at sockets have decided: they see calls, not packets, so their decision is found again by the socket that
//! a packet belongs to.
//!
//! ```text
//!   connect, sendmsg ─▶ `socket` or `pod_socket`: (cookie, backend) ─▶ Service address       as long as the socket lives
//!   a packet's first sight: (cookie of its socket, destination) ─▶ the same row ─▶ a step before all others
//! ```

use proxy_abi::trace::TraceDecision;
use proxy_abi::{Hook, PortBe, Proto, Reason, SocketEntry, SocketKey};

use super::TraceError;
use super::journey::{Decision, Journey, Step};
use super::names::Names;
use crate::dataplane::pins::Maps;

/// Puts the decision of a socket in front, of the node's or a pod's, where the packet comes from one that was led to a
/// backend: by the pinned maps.
///
/// # Errors
/// When a map cannot be read.
pub fn tell_of(journey: &mut Journey, names: &Names, maps: &Maps) -> Result<(), TraceError> {
    for (place, rows) in [("node", &maps.socket), ("pod", &maps.pod_socket)] {
        if tell(journey, names, place, &|key| Ok(rows.get(key)?))? {
            break;
        }
    }
    Ok(())
}

/// True when there is one. `place`: whose sockets these rows are of, as it stands in stories.
fn tell(
    journey: &mut Journey,
    names: &Names,
    place: &str,
    row: &dyn Fn(&SocketKey) -> Result<Option<SocketEntry>, TraceError>,
) -> Result<bool, TraceError> {
    let Some(sight) = journey.sights().next().filter(|sight| sight.cookie != 0) else { return Ok(false) };
    let Some(packet) = sight.packet.as_ref().filter(|packet| packet.has_ports()) else { return Ok(false) };
    let key = |ip: std::net::IpAddr, port, direction| SocketKey {
        cookie: sight.cookie,
        ip: ip.into(),
        port: PortBe::new(port),
        direction,
        reserved: 0,
    };
    let Some(service) = row(&key(packet.dst, packet.dst_port, SocketKey::REVERSE))? else { return Ok(false) };
    // What one datagram was led by is kept for the next.
    let by_datagram = packet.proto != Proto::TCP
        && row(&key(service.ip.into(), service.port.get(), SocketKey::FORWARD))?
            .is_some_and(|forward| forward.flags & SocketEntry::CONNECTED == 0);
    let told = TraceDecision {
        at: sight.at,
        id: sight.cookie,
        skb: 0,
        head: 0,
        ifindex: 0,
        len: 0,
        hook: if by_datagram { Hook::Sendmsg } else { Hook::Connect } as u32,
        verdict: 0,
        reason: Reason::Socket as u32,
        service: service.service,
        backend: service.backend,
        rule: 0,
        cpu: sight.cpu,
        reserved: [0; 7],
    };
    let mut decision = Decision::new(told, names);
    place.clone_into(&mut decision.device);
    journey.steps.insert(0, Step::Decision(decision));
    Ok(true)
}

#[cfg(test)]
mod tests {
    use std::net::SocketAddr;

    use super::super::journey::{Place, Point, Sight};
    use super::super::names::tests::names;
    use super::super::packet::Packet;
    use super::super::why::frame::{Frame, Part};
    use super::*;

    fn sent(cookie: u64, proto: Proto, to: &str) -> Journey {
        let ends: (SocketAddr, SocketAddr) = ("10.1.0.1:4000".parse().expect("from"), to.parse().expect("to"));
        let frame = Frame { macs: Default::default(), ends, proto, size: 0, part: Part::Opens, number: 7 };
        let bytes = frame.bytes()[14..].to_vec();
        let sight = Sight {
            at: 70,
            point: Point::Queue,
            place: Place::Host("cni0".to_owned()),
            ifindex: 3,
            netns: 1,
            cpu: 2,
            skb: 8,
            len: 60,
            mark: 0,
            reason: 0,
            location: 0,
            nfct: 0,
            cookie,
            hooks: 0,
            bridge_nf: false,
            packet: Packet::parse(&bytes),
            bytes,
            stack: Vec::new(),
        };
        Journey { id: 1, steps: vec![Step::Sight(sight)] }
    }

    #[test]
    fn a_packet_has_the_decision_of_its_socket() {
        let names = names();
        let entry = |ip: [u8; 4], port| SocketEntry {
            ip: std::net::IpAddr::from(ip).into(),
            port: PortBe::new(port),
            flags: 0,
            backend: 1,
            generation: 1,
            service: 7,
        };
        // Socket 5 was led from the Service to the backend; socket 6 too, by a datagram; socket 8 by `connect`, over UDP.
        let row = |key: &SocketKey| {
            let reverse = key.ip == std::net::IpAddr::from([10, 1, 0, 3]).into() && key.port.get() == 8080;
            Ok(match (key.cookie, key.direction) {
                (5 | 6 | 8, SocketKey::REVERSE) if reverse => Some(entry([10, 96, 0, 7], 80)),
                (6, SocketKey::FORWARD) if key.port.get() == 80 => Some(entry([10, 1, 0, 3], 8080)),
                (8, SocketKey::FORWARD) if key.port.get() == 80 => {
                    Some(SocketEntry { flags: SocketEntry::CONNECTED, ..entry([10, 1, 0, 3], 8080) })
                }
                _ => None,
            })
        };
        let (tcp, udp, backend) = (Proto::TCP, Proto::UDP, "10.1.0.3:8080");
        let rows = [
            (5, tcp, backend, Some(Hook::Connect)),
            (5, udp, backend, Some(Hook::Connect)),
            (6, udp, backend, Some(Hook::Sendmsg)),
            (8, udp, backend, Some(Hook::Connect)),
            (5, tcp, "10.1.0.3:8081", None),
            (7, tcp, backend, None),
            (0, tcp, backend, None),
        ];
        for (n, (cookie, proto, to, hook)) in rows.into_iter().enumerate() {
            let mut journey = sent(cookie, proto, to);
            let told = tell(&mut journey, &names, "node", &row).expect("rows");
            assert_eq!(told, hook.is_some(), "row {n}");
            let found = journey.decisions().next().map(|decision| {
                (decision.hook, decision.reason, decision.told.at, decision.device.as_str(), journey.service())
            });
            let expected = hook.map(|hook| (Some(hook), Some(Reason::Socket), 70, "node", (7, 1)));
            assert_eq!(found, expected, "row {n}");
            assert_eq!(journey.steps.len(), 1 + usize::from(hook.is_some()), "row {n}");
        }
    }
}
