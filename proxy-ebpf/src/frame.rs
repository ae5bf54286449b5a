//! What an enforced pod may say of itself on its link: its own MAC and addresses, and nothing about anybody else's.
//!
//! ```text
//!   EtherType     IPv4, IPv6, ARP; no VLAN tag
//!   MAC           the pod's
//!   source        the pod's address; of IPv6 also the link-local one that is made of its MAC, and :: to probe for it
//!   ARP           (RFC 826, RFC 5227) sender the pod, or 0.0.0.0 in a request
//!   ND            (RFC 4861) hop limit 255; MAC options name the pod; what is advertised is the pod's
//!   not a pod's   router advertisements, redirects, queries for group members, answers of DHCP servers
//! ```
//!
//! What comes to a pod has passed here at another pod's veth, or comes from a link that is not ours to police.

use proxy_abi::{DeviceEntry, IpBytes, MacBytes, Reason};

use crate::packet::{ETH_LEN, Packet};

/// ICMPv6 types (RFC 4861 §4, RFC 2710 §3, RFC 3810 §5).
pub mod kind {
    /// Multicast listener query: a router's.
    pub const LISTENER_QUERY: u8 = 130;
    /// Router solicitation.
    pub const ROUTER_SOLICITATION: u8 = 133;
    /// Router advertisement.
    pub const ROUTER_ADVERTISEMENT: u8 = 134;
    /// Neighbour solicitation.
    pub const NEIGHBOUR_SOLICITATION: u8 = 135;
    /// Neighbour advertisement.
    pub const NEIGHBOUR_ADVERTISEMENT: u8 = 136;
    /// Redirect.
    pub const REDIRECT: u8 = 137;

    /// Does the link itself live by it: neighbour discovery?
    #[inline(always)]
    pub const fn is_neighbour(kind: u8) -> bool {
        matches!(kind, ROUTER_SOLICITATION..=REDIRECT)
    }

    /// Membership of multicast groups: queries, reports and farewells.
    #[inline(always)]
    pub const fn is_listener(kind: u8) -> bool {
        matches!(kind, LISTENER_QUERY..=132 | 143)
    }
}

/// EtherType of ARP, in memory order.
pub const ARP: u16 = 0x0806_u16.to_be();

/// Options of a neighbour message that are read; one with more is nobody's.
const OPTIONS: usize = 4;
/// Options that name a MAC: of the source, of the target.
const SOURCE_MAC: u8 = 1;
const TARGET_MAC: u8 = 2;

/// The link-local address that a host makes of its MAC (RFC 4291 appendix A).
#[inline(always)]
pub const fn link_local(mac: &MacBytes) -> IpBytes {
    let m = mac.0;
    IpBytes([
        u32::from_ne_bytes([0xfe, 0x80, 0, 0]),
        0,
        u32::from_ne_bytes([m[0] ^ 2, m[1], m[2], 0xff]),
        u32::from_ne_bytes([0xfe, m[3], m[4], m[5]]),
    ])
}

/// Is the address the pod's own?
#[inline(always)]
pub const fn is_own(device: &DeviceEntry, ip: &IpBytes) -> bool {
    let wanted = ip.halves();
    if wanted.0 | wanted.1 == 0 {
        return false;
    }
    let own = if ip.is_v4() { device.ip4.halves() } else { device.ip6.halves() };
    let link = link_local(&device.pod_mac).halves();
    wanted.0 == own.0 && wanted.1 == own.1 || wanted.0 == link.0 && wanted.1 == link.1
}

/// Does a server of DHCP send from and to these ports (RFC 2131 §4.1, RFC 8415 §7.2)?
#[inline(always)]
pub const fn is_dhcp_server(src_port: u16, dst_port: u16) -> bool {
    src_port == 67 && dst_port == 68 || src_port == 547 && dst_port == 546
}

/// The MAC at an offset.
#[inline(always)]
fn mac_at<P: Packet + ?Sized>(packet: &P, at: usize) -> Option<(u16, u32)> {
    Some((packet.half(at)?, packet.word(at + 2)?))
}

#[inline(always)]
const fn mac_parts(mac: &MacBytes) -> (u16, u32) {
    let m = mac.0;
    (u16::from_ne_bytes([m[0], m[1]]), u32::from_ne_bytes([m[2], m[3], m[4], m[5]]))
}

/// Does the frame come from the pod's own MAC?
#[inline(always)]
pub fn is_from<P: Packet + ?Sized>(packet: &P, device: &DeviceEntry) -> bool {
    mac_at(packet, 6) == Some(mac_parts(&device.pod_mac))
}

/// An ARP packet that a pod sends: `None` when it may.
#[inline(always)]
pub fn arp<P: Packet + ?Sized>(packet: &P, device: &DeviceEntry) -> Option<Reason> {
    // RFC 826: hardware 1 = Ethernet, protocol IPv4, lengths 6 and 4; operation; sender's MAC and address.
    let header = (packet.word(ETH_LEN), packet.half(ETH_LEN + 4), packet.half(ETH_LEN + 6));
    let (Some(kinds), Some(lengths), Some(operation)) = header else { return Some(Reason::FrameNeighbour) };
    let (Some(mac), Some(sender)) = (mac_at(packet, ETH_LEN + 8), packet.word(ETH_LEN + 14)) else {
        return Some(Reason::FrameNeighbour);
    };
    // The whole of it has to be there: the target's address ends at 28.
    if packet.half(ETH_LEN + 26).is_none()
        || kinds != 0x0001_0800_u32.to_be()
        || lengths != 0x0604_u16.to_be()
        || mac != mac_parts(&device.pod_mac)
    {
        return Some(Reason::FrameNeighbour);
    }
    let asks = operation == 1_u16.to_be();
    let own = !is_none(&device.ip4) && sender == device.ip4.v4_word();
    if (asks || operation == 2_u16.to_be()) && (own || asks && sender == 0) {
        None
    } else {
        Some(Reason::FrameNeighbour)
    }
}

#[inline(always)]
const fn is_none(ip: &IpBytes) -> bool {
    let (a, b) = ip.halves();
    a | b == 0
}

/// What of an ICMPv6 message of the link is asked here.
#[derive(Clone, Copy, Debug)]
pub struct Message {
    /// Source of the packet.
    pub src: IpBytes,
    /// Offset of the ICMPv6 header.
    pub at: u32,
    /// Type.
    pub kind: u8,
    /// Is it a piece of a larger packet?
    pub fragmented: bool,
}

/// A message of [`kind::is_neighbour`] or [`kind::is_listener`] that a pod sends: `None` when it may.
#[inline(always)]
pub fn link_message<P: Packet + ?Sized>(packet: &P, device: &DeviceEntry, message: &Message) -> Option<Reason> {
    if matches!(message.kind, kind::ROUTER_ADVERTISEMENT | kind::REDIRECT | kind::LISTENER_QUERY) {
        return Some(Reason::FrameRouter);
    }
    let probes = is_none(&message.src);
    if !probes && !is_own(device, &message.src) {
        return Some(Reason::FrameSource);
    }
    if kind::is_listener(message.kind) {
        return None;
    }
    if message.fragmented || !has_full_hops(packet) {
        return Some(Reason::FrameNeighbour);
    }
    // RFC 4861 §4: 4 bytes, 4 more, and the target's address in all but the router solicitation; then options.
    let at = message.at as usize;
    let mut option = at + 8;
    if message.kind != kind::ROUTER_SOLICITATION {
        option = at + 24;
        let Some(target) = ip_at(packet, at + 8) else { return Some(Reason::FrameNeighbour) };
        let advertises = message.kind == kind::NEIGHBOUR_ADVERTISEMENT;
        if advertises && (probes || !is_own(device, &target)) {
            return Some(Reason::FrameNeighbour);
        }
    }
    let end = ETH_LEN + 40 + usize::from(u16::from_be(packet.half(ETH_LEN + 4).unwrap_or(0)));
    let own = mac_parts(&device.pod_mac);
    let mut read = 0;
    while read < OPTIONS {
        if option >= end {
            return None;
        }
        let Some([name, length]) = packet.half(option).map(u16::to_ne_bytes) else {
            return Some(Reason::FrameNeighbour);
        };
        let names_mac = matches!(name, SOURCE_MAC | TARGET_MAC);
        if length == 0 || names_mac && (length != 1 || mac_at(packet, option + 2) != Some(own)) {
            return Some(Reason::FrameNeighbour);
        }
        option = packet.forget((option + usize::from(length) * 8) as u32) as usize & crate::packet::OFFSET_MASK;
        read += 1;
    }
    if option >= end { None } else { Some(Reason::FrameNeighbour) }
}

/// Hop limit 255: no router has forwarded it.
#[inline(always)]
pub fn has_full_hops<P: Packet + ?Sized>(packet: &P) -> bool {
    packet.byte(ETH_LEN + 7) == Some(255)
}

#[inline(always)]
fn ip_at<P: Packet + ?Sized>(packet: &P, at: usize) -> Option<IpBytes> {
    Some(IpBytes([packet.word(at)?, packet.word(at + 4)?, packet.word(at + 8)?, packet.word(at + 12)?]))
}

#[cfg(test)]
#[path = "frame_tests.rs"]
mod tests;
