//! Which address is whose: fixed by index, so that two runs look alike.

use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

/// IPv4 or IPv6.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Family {
    /// IPv4.
    V4,
    /// IPv6.
    V6,
}

impl Family {
    /// Both.
    pub const BOTH: [Self; 2] = [Self::V4, Self::V6];

    /// Family of an address.
    pub const fn of(ip: IpAddr) -> Self {
        if ip.is_ipv4() { Self::V4 } else { Self::V6 }
    }
}

impl fmt::Display for Family {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::V4 => "IPv4",
            Self::V6 => "IPv6",
        })
    }
}

/// An address range: network address and prefix length.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Network {
    /// Network address.
    pub ip: IpAddr,
    /// Prefix length in bits.
    pub len: u8,
}

impl fmt::Display for Network {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.ip, self.len)
    }
}

impl Network {
    const fn v4(a: u8, b: u8, c: u8, d: u8, len: u8) -> Self {
        Self { ip: IpAddr::V4(Ipv4Addr::new(a, b, c, d)), len }
    }

    const fn v6(segments: [u16; 8], len: u8) -> Self {
        Self { ip: IpAddr::V6(Ipv6Addr::from_segments(segments)), len }
    }

    /// The `n`-th address of the range (0 is the network address itself).
    #[must_use]
    pub fn host(&self, n: u16) -> IpAddr {
        match self.ip {
            IpAddr::V4(ip) => Ipv4Addr::from_bits(ip.to_bits() + u32::from(n)).into(),
            IpAddr::V6(ip) => Ipv6Addr::from_bits(ip.to_bits() + u128::from(n)).into(),
        }
    }
}

/// The range of all pods.
pub const fn cluster_cidr(family: Family) -> Network {
    match family {
        Family::V4 => Network::v4(10, 244, 0, 0, 16),
        Family::V6 => Network::v6([0xfd00, 0x10, 0x244, 0, 0, 0, 0, 0], 56),
    }
}

/// The range of ClusterIPs. No host has a route to it.
pub const fn service_cidr(family: Family) -> Network {
    match family {
        Family::V4 => Network::v4(10, 96, 0, 0, 16),
        Family::V6 => Network::v6([0xfd00, 0x10, 0x96, 0, 0, 0, 0, 0], 112),
    }
}

/// The underlay that joins nodes and outside: host 1 is the switch, 10 + index a node, 100 the outside.
pub const fn underlay(family: Family) -> Network {
    match family {
        Family::V4 => Network::v4(172, 18, 0, 0, 24),
        Family::V6 => Network::v6([0xfc00, 0xf853, 0xccd, 0, 0, 0, 0, 0], 64),
    }
}

/// The range of the pods of the node with this index. Host 1 is the node's bridge, host 0 its tunnel's address.
pub const fn pod_cidr(family: Family, node: u8) -> Network {
    match family {
        Family::V4 => Network::v4(10, 244, node, 0, 24),
        Family::V6 => Network::v6([0xfd00, 0x10, 0x244, node as u16, 0, 0, 0, 0], 64),
    }
}

/// Underlay host number of the switch.
pub const SWITCH_HOST: u16 = 1;
/// Underlay host number of the outside.
pub const OUTSIDE_HOST: u16 = 100;

/// Underlay host number of the node with this index.
pub const fn node_host(node: u8) -> u16 {
    10 + node as u16
}

/// A MAC address as `ip` writes it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Mac(pub [u8; 6]);

impl Mac {
    /// `ff:ff:ff:ff:ff:ff`.
    pub const BROADCAST: Self = Self([0xff; 6]);

    /// A locally administered address derived from an IPv4 address, as bridge CNIs do.
    pub const fn of_ipv4(ip: Ipv4Addr) -> Self {
        let [a, b, c, d] = ip.octets();
        Self([0x0a, 0x58, a, b, c, d])
    }

    /// Reads `aa:bb:cc:dd:ee:ff`.
    pub fn parse(text: &str) -> Option<Self> {
        let mut bytes = [0; 6];
        let mut parts = text.split(':');
        for byte in &mut bytes {
            *byte = u8::from_str_radix(parts.next()?, 16).ok()?;
        }
        parts.next().is_none().then_some(Self(bytes))
    }
}

impl fmt::Display for Mac {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [first, rest @ ..] = self.0;
        write!(f, "{first:02x}")?;
        rest.iter().try_for_each(|byte| write!(f, ":{byte:02x}"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_follow_the_index() {
        let shown: Vec<String> = Family::BOTH
            .iter()
            .flat_map(|&f| {
                [
                    underlay(f).host(node_host(2)).to_string(),
                    pod_cidr(f, 2).to_string(),
                    pod_cidr(f, 2).host(5).to_string(),
                ]
            })
            .collect();
        assert_eq!(
            shown,
            [
                "172.18.0.12",
                "10.244.2.0/24",
                "10.244.2.5",
                "fc00:f853:ccd::c",
                "fd00:10:244:2::/64",
                "fd00:10:244:2::5"
            ]
        );
    }

    #[test]
    fn mac_text_both_ways() {
        let mac = Mac::of_ipv4(Ipv4Addr::new(10, 244, 1, 2));
        assert_eq!(mac.to_string(), "0a:58:0a:f4:01:02");
        assert_eq!(Mac::parse("0a:58:0a:f4:01:02"), Some(mac));
        assert_eq!(Mac::parse("0a:58:0a:f4:01"), None);
        assert_eq!(Mac::parse("0a:58:0a:f4:01:02:03"), None);
    }
}
