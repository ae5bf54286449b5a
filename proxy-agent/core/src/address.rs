//! Addresses that may, or may not, stand in a frontend or backend.

use std::fmt;
use std::net::IpAddr;

/// Address family.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Family {
    /// IPv4.
    V4,
    /// IPv6.
    V6,
}

impl Family {
    /// The family of an address.
    pub const fn of(address: IpAddr) -> Self {
        match address {
            IpAddr::V4(_) => Self::V4,
            IpAddr::V6(_) => Self::V6,
        }
    }
}

/// Why an address can be no backend. The API server refuses most of these; a slice made by hand, or read from a file,
/// may still have them, and a backend on the loopback of whoever asks is CVE-2020-8554's relative.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum AddressFault {
    /// `0.0.0.0`, `::`.
    Unspecified,
    /// `127.0.0.0/8`, `::1`.
    Loopback,
    /// `169.254.0.0/16`, `fe80::/10`.
    LinkLocal,
    /// `224.0.0.0/4`, `ff00::/8`.
    Multicast,
    /// `255.255.255.255`.
    Broadcast,
    /// `::ffff:0:0/96`: the maps keep IPv4 in this form, so it would be taken for an IPv4 address.
    Ipv4Mapped,
}

impl AddressFault {
    /// What is wrong with the address; `None` when it may be a backend.
    pub fn of(address: IpAddr) -> Option<Self> {
        let checks = [
            (address.is_unspecified(), Self::Unspecified),
            (address.is_loopback(), Self::Loopback),
            (address.is_multicast(), Self::Multicast),
            match address {
                IpAddr::V4(v4) => (v4.is_link_local(), Self::LinkLocal),
                IpAddr::V6(v6) => (v6.is_unicast_link_local(), Self::LinkLocal),
            },
            match address {
                IpAddr::V4(v4) => (v4.is_broadcast(), Self::Broadcast),
                IpAddr::V6(v6) => (v6.to_ipv4_mapped().is_some(), Self::Ipv4Mapped),
            },
        ];
        checks.into_iter().find_map(|(bad, fault)| bad.then_some(fault))
    }
}

impl fmt::Display for AddressFault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Unspecified => "unspecified",
            Self::Loopback => "loopback",
            Self::LinkLocal => "link-local",
            Self::Multicast => "multicast",
            Self::Broadcast => "broadcast",
            Self::Ipv4Mapped => "IPv4-mapped",
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn faults_by_address() {
        let cases = [
            ("10.0.0.1", None),
            ("fd00::1", None),
            ("2001:db8::1", None),
            ("0.0.0.0", Some(AddressFault::Unspecified)),
            ("::", Some(AddressFault::Unspecified)),
            ("127.0.0.1", Some(AddressFault::Loopback)),
            ("127.255.0.9", Some(AddressFault::Loopback)),
            ("::1", Some(AddressFault::Loopback)),
            ("169.254.169.254", Some(AddressFault::LinkLocal)),
            ("fe80::1", Some(AddressFault::LinkLocal)),
            ("febf::1", Some(AddressFault::LinkLocal)),
            ("224.0.0.1", Some(AddressFault::Multicast)),
            ("ff02::1", Some(AddressFault::Multicast)),
            ("255.255.255.255", Some(AddressFault::Broadcast)),
            ("::ffff:10.0.0.1", Some(AddressFault::Ipv4Mapped)),
        ];
        for (address, expected) in cases {
            let address: IpAddr = address.parse().expect("a literal");
            assert_eq!(AddressFault::of(address), expected, "{address}");
        }
    }
}
