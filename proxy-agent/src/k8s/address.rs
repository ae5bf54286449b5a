//! Addresses as the Kubernetes API holds them, old objects included.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use ipnet::IpNet;

/// An IP address in the reading that Kubernetes itself uses.
///
/// Two things differ from [`std::net`]: numbers of an IPv4 address may have leading zeros and are decimal all the same
/// (objects from before that was refused still exist: CVE-2021-29923), and an IPv4-mapped IPv6 address is IPv4.
pub fn parse_ip(text: &str) -> Option<IpAddr> {
    if !text.contains(':') {
        return parse_ipv4(text).map(IpAddr::V4);
    }
    let address = match text.rsplit_once(':') {
        Some((head, tail)) if tail.contains('.') => format!("{head}:{}", parse_ipv4(tail)?).parse::<Ipv6Addr>().ok()?,
        _ => text.parse::<Ipv6Addr>().ok()?,
    };
    Some(address.to_ipv4_mapped().map_or(IpAddr::V6(address), IpAddr::V4))
}

fn parse_ipv4(text: &str) -> Option<Ipv4Addr> {
    let mut octets = [0_u8; 4];
    let mut parts = text.split('.');
    for octet in &mut octets {
        let part = parts.next()?;
        if part.is_empty() {
            return None;
        }
        *octet = part.bytes().try_fold(0_u8, |value, byte| {
            let digit = byte.is_ascii_digit().then(|| byte - b'0')?;
            value.checked_mul(10)?.checked_add(digit)
        })?;
    }
    parts.next().is_none().then(|| Ipv4Addr::from(octets))
}

/// A network in CIDR notation; host bits are cleared.
pub fn parse_cidr(text: &str) -> Option<IpNet> {
    let (address, length) = text.split_once('/')?;
    if length.is_empty() || !length.bytes().all(|byte| byte.is_ascii_digit()) {
        return None;
    }
    let address = parse_ip(address)?;
    if address.is_ipv4() && text.contains(':') {
        return None;
    }
    IpNet::new(address, length.parse().ok()?).ok().map(|net| net.trunc())
}

/// Why an address can be neither a cluster address nor a backend, if so. A packet for it never leaves the pod's own
/// network namespace or link, or has no single receiver; serving it would only give a way around that.
pub(super) fn unusable(address: IpAddr) -> Option<&'static str> {
    let link_local = match address {
        IpAddr::V4(v4) => v4.is_link_local(),
        IpAddr::V6(v6) => v6.is_unicast_link_local(),
    };
    if address.is_unspecified() {
        Some("is the unspecified address")
    } else if address.is_loopback() {
        Some("is a loopback address")
    } else if link_local {
        Some("is a link-local address")
    } else if address.is_multicast() {
        Some("is a multicast address")
    } else if address == IpAddr::V4(Ipv4Addr::BROADCAST) {
        Some("is the broadcast address")
    } else {
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses() {
        let rows: &[(&str, Option<&str>)] = &[
            ("10.0.0.1", Some("10.0.0.1")),
            ("011.022.033.044", Some("11.22.33.44")),
            ("011.22.33.044", Some("11.22.33.44")),
            ("0000010.0.0.00", Some("10.0.0.0")),
            ("255.255.255.255", Some("255.255.255.255")),
            ("256.0.0.1", None),
            ("0x0a.0.0.1", None),
            ("10.0.0", None),
            ("10.0.0.1.1", None),
            ("10.0..1", None),
            ("10.0.0.1 ", None),
            ("+1.0.0.1", None),
            ("", None),
            ("None", None),
            ("fd00::1", Some("fd00::1")),
            ("FD00:0:0::01", Some("fd00::1")),
            ("::ffff:10.0.0.1", Some("10.0.0.1")),
            ("::ffff:010.0.0.01", Some("10.0.0.1")),
            ("64:ff9b::10.0.0.09", Some("64:ff9b::a00:9")),
            ("fe80::1%eth0", None),
            ("fd00::12345", None),
            ("[fd00::1]", None),
        ];
        for (text, want) in rows {
            assert_eq!(parse_ip(text).map(|ip| ip.to_string()).as_deref(), *want, "{text}");
        }
    }

    #[test]
    fn networks() {
        let rows: &[(&str, Option<&str>)] = &[
            ("10.244.1.0/24", Some("10.244.1.0/24")),
            ("010.244.01.7/24", Some("10.244.1.0/24")),
            ("fd00:1::/64", Some("fd00:1::/64")),
            ("10.0.0.0/33", None),
            ("10.0.0.0/", None),
            ("10.0.0.0/+8", None),
            ("10.0.0.0", None),
            ("::ffff:10.0.0.0/104", None),
        ];
        for (text, want) in rows {
            assert_eq!(parse_cidr(text).map(|net| net.to_string()).as_deref(), *want, "{text}");
        }
    }
}
