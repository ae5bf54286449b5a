//! Address ranges of policies, read as generously as the API server once did.

use std::collections::BTreeSet;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use ipnet::{IpNet, Ipv4Net, Ipv6Net};

/// A range without some ranges in it.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct IpBlock {
    /// The range.
    pub net: IpNet,
    /// What is not meant. Only ranges within `net`.
    pub except: BTreeSet<IpNet>,
}

/// Why a text is no range.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum CidrFault {
    /// No `/`.
    #[error("no prefix length")]
    NoLength,
    /// What stands before the `/` is no address.
    #[error("no address")]
    Address,
    /// What stands after the `/` is no number, or too long for the family.
    #[error("no prefix length of this family")]
    Length,
}

/// Reads a range: host bits are cleared, leading zeros are decimal, as the API server's sloppy parser has it; an
/// IPv4-mapped range is one of IPv4.
pub fn cidr(text: &str) -> Result<IpNet, CidrFault> {
    let (address, length) = text.split_once('/').ok_or(CidrFault::NoLength)?;
    if length.is_empty() || !length.bytes().all(|b| b.is_ascii_digit()) {
        return Err(CidrFault::Length);
    }
    let length: u8 = length.parse().map_err(|_| CidrFault::Length)?;
    let net = match parse_address(address).ok_or(CidrFault::Address)? {
        IpAddr::V4(v4) => Ipv4Net::new(v4, length).map(IpNet::V4),
        IpAddr::V6(v6) => match (v6.to_ipv4_mapped(), length.checked_sub(96)) {
            (Some(v4), Some(length)) => Ipv4Net::new(v4, length).map(IpNet::V4),
            _ => Ipv6Net::new(v6, length).map(IpNet::V6),
        },
    };
    net.map(|net| net.trunc()).map_err(|_| CidrFault::Length)
}

fn parse_address(text: &str) -> Option<IpAddr> {
    if text.contains(':') {
        return text.parse::<Ipv6Addr>().ok().map(IpAddr::V6);
    }
    let mut octets = [0_u8; 4];
    let mut parts = text.split('.');
    for octet in &mut octets {
        let part = parts.next().filter(|part| !part.is_empty() && part.bytes().all(|b| b.is_ascii_digit()))?;
        *octet = part.parse().ok()?;
    }
    parts.next().is_none().then_some(IpAddr::V4(Ipv4Addr::from(octets)))
}

impl IpBlock {
    /// Is the address meant?
    pub fn contains(&self, ip: IpAddr) -> bool {
        self.net.contains(&ip) && !self.except.iter().any(|net| net.contains(&ip))
    }

    /// Is the whole range meant, as far as no smaller range of this block says otherwise?
    pub fn covers(&self, range: IpNet) -> bool {
        self.net.contains(&range) && !self.except.iter().any(|net| net.contains(&range))
    }

    /// The ranges at whose borders it changes.
    pub fn borders(&self) -> impl Iterator<Item = IpNet> + '_ {
        std::iter::once(self.net).chain(self.except.iter().copied())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges_are_read_as_generously_as_the_api_server_does() {
        let net = |text: &str| Ok(text.parse().expect("a literal"));
        let cases = [
            ("10.1.2.3/8", net("10.0.0.0/8")),
            ("010.001.0.0/16", net("10.1.0.0/16")),
            ("0.0.0.0/0", net("0.0.0.0/0")),
            ("10.0.0.1/32", net("10.0.0.1/32")),
            ("::/0", net("::/0")),
            ("fd00::ffff/64", net("fd00::/64")),
            ("::ffff:10.1.2.3/104", net("10.0.0.0/8")),
            ("10.0.0.0", Err(CidrFault::NoLength)),
            ("10.0.0.0/33", Err(CidrFault::Length)),
            ("10.0.0.0/-1", Err(CidrFault::Length)),
            ("10.0.0.0/+8", Err(CidrFault::Length)),
            ("10.0.0/8", Err(CidrFault::Address)),
            ("10.0.0.0.0/8", Err(CidrFault::Address)),
            ("10.0.0.256/8", Err(CidrFault::Address)),
            ("fd00::/129", Err(CidrFault::Length)),
            ("web/8", Err(CidrFault::Address)),
            ("", Err(CidrFault::NoLength)),
        ];
        for (text, expected) in cases {
            assert_eq!(cidr(text), expected, "{text:?}");
        }
    }
}
