//! Hosts with names, for tests of single packets.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use super::{Frame, L4, Mac, Tcp, Udp};
use crate::address::Family;

/// A host: a MAC and an address of each family.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Host {
    /// MAC.
    pub mac: Mac,
    /// IPv4 address.
    pub ip4: Ipv4Addr,
    /// IPv6 address.
    pub ip6: Ipv6Addr,
}

const fn host(mac: u8, ip4: [u8; 4], ip6: [u16; 8]) -> Host {
    Host { mac: Mac([0x02, 0, 0, 0, 0, mac]), ip4: Ipv4Addr::from_octets(ip4), ip6: Ipv6Addr::from_segments(ip6) }
}

/// A pod of this node.
pub const POD_ONE: Host = host(0x11, [10, 244, 0, 2], [0xfd00, 0x10, 0x244, 0, 0, 0, 0, 2]);
/// Another pod of this node.
pub const POD_TWO: Host = host(0x12, [10, 244, 0, 3], [0xfd00, 0x10, 0x244, 0, 0, 0, 0, 3]);
/// A third pod of this node.
pub const POD_THREE: Host = host(0x13, [10, 244, 0, 4], [0xfd00, 0x10, 0x244, 0, 0, 0, 0, 4]);
/// A pod of another node; its MAC is the gateway's, which frames to it go to.
pub const POD_REMOTE: Host = host(0x01, [10, 244, 1, 2], [0xfd00, 0x10, 0x244, 1, 0, 0, 0, 2]);
/// The bridge.
pub const GATEWAY: Host = host(0x01, [10, 244, 0, 1], [0xfd00, 0x10, 0x244, 0, 0, 0, 0, 1]);
/// This node on its uplink.
pub const NODE_ONE: Host = host(0x21, [172, 18, 0, 10], [0xfc00, 0xf853, 0xccd, 0, 0, 0, 0, 0xa]);
/// A host on the uplink that is no node.
pub const OUTSIDE: Host = host(0x31, [172, 18, 0, 100], [0xfc00, 0xf853, 0xccd, 0, 0, 0, 0, 0x64]);
/// A ClusterIP; its MAC is the gateway's, which frames to it go to.
pub const VIP_ONE: Host = host(0x01, [10, 96, 0, 10], [0xfd00, 0x10, 0x96, 0, 0, 0, 0, 0xa]);
/// Another ClusterIP.
pub const VIP_TWO: Host = host(0x01, [10, 96, 0, 11], [0xfd00, 0x10, 0x96, 0, 0, 0, 0, 0xb]);

impl Host {
    /// Address of a family.
    pub const fn ip(&self, family: Family) -> IpAddr {
        match family {
            Family::V4 => IpAddr::V4(self.ip4),
            Family::V6 => IpAddr::V6(self.ip6),
        }
    }

    /// A frame to another host.
    pub fn send(&self, to: &Self, family: Family, l4: L4) -> Frame {
        Frame::ip((self.mac, self.ip(family)), (to.mac, to.ip(family)), l4)
    }

    /// A TCP segment without payload to another host.
    pub fn tcp(&self, src: u16, to: &Self, dst: u16, family: Family, flags: u8) -> Frame {
        self.send(to, family, L4::Tcp(Tcp { src, dst, seq: 1, flags, window: 64_000, ..Tcp::default() }))
    }

    /// A UDP datagram to another host.
    pub fn udp(&self, src: u16, to: &Self, dst: u16, family: Family, payload: &[u8]) -> Frame {
        self.send(to, family, L4::Udp(Udp { src, dst, checksum: true, payload: payload.to_vec() }))
    }
}
