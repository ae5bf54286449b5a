//! What a host says on its link: ARP and neighbour discovery.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use super::{Arp, Body, Frame, Icmp, L4, Mac};

/// ICMPv6 types (RFC 4861 §4).
pub mod kind {
    /// Router advertisement.
    pub const ROUTER_ADVERTISEMENT: u8 = 134;
    /// Neighbour solicitation.
    pub const SOLICITATION: u8 = 135;
    /// Neighbour advertisement.
    pub const ADVERTISEMENT: u8 = 136;
}

/// MAC of the group of all hosts.
const ALL_HOSTS: Mac = Mac([0x33, 0x33, 0, 0, 0, 1]);

/// The link-local address that a host makes of its MAC (RFC 4291 appendix A).
pub fn link_local(mac: Mac) -> Ipv6Addr {
    let m = mac.0;
    let word = |high: u8, low: u8| u16::from_be_bytes([high, low]);
    Ipv6Addr::new(0xfe80, 0, 0, 0, word(m[0] ^ 2, m[1]), word(m[2], 0xff), word(0xfe, m[3]), word(m[4], m[5]))
}

/// ARP to everybody: who sends the frame, 1 for a request or 2 for a reply, what it says of its sender, and whom it
/// asks for.
pub fn arp(from: Mac, operation: u16, sender: (Mac, Ipv4Addr), target_ip: Ipv4Addr) -> Frame {
    let body =
        Body::Arp(Arp { operation, sender_mac: sender.0, sender_ip: sender.1, target_mac: Mac([0; 6]), target_ip });
    Frame { dst: Mac::BROADCAST, src: from, vlans: Vec::new(), body }
}

/// An ICMPv6 message to all hosts of the link, with a target and an option (its type) that names a MAC.
pub fn link_message(from: (Mac, Ipv6Addr), kind: u8, target: Option<Ipv6Addr>, option: Option<(u8, Mac)>) -> Frame {
    let mut payload = target.map_or(Vec::new(), |ip| ip.octets().to_vec());
    if let Some((name, mac)) = option {
        payload.extend([name, 1]);
        payload.extend(mac.0);
    }
    let group = IpAddr::V6(Ipv6Addr::new(0xff02, 0, 0, 0, 0, 0, 0, 1));
    let icmp = L4::Icmp(Icmp { kind, payload, ..Icmp::default() });
    let mut frame = Frame::ip((from.0, IpAddr::V6(from.1)), (ALL_HOSTS, group), icmp);
    if let Some(ip) = frame.as_ip_mut() {
        ip.ttl = 255;
    }
    frame
}
