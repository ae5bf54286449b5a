//! Values as kube-proxy writes them, in its file and on its command line.

use std::fmt;
use std::net::{IpAddr, SocketAddr};
use std::str::FromStr;
use std::time::Duration;

use ipnet::IpNet;
use proxy_core::policy;
use serde::{Deserialize, Deserializer, Serialize, Serializer, de};

/// Why a text is no such value; a sentence for its writer.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct Invalid(String);

/// A Go duration: `24h0m0s`, `1m30s`, `1.5h`, `300ms`. Never negative.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct Span(pub Duration);

/// `mode`. There is one dataplane; this is the name that `/proxyMode` answers, and the section that counts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mode {
    /// `iptables`.
    Iptables,
    /// `ipvs`.
    Ipvs,
    /// `nftables`: the one whose semantics the agent has.
    Nftables,
}

/// `detectLocalMode`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LocalMode {
    /// `ClusterCIDR`.
    ClusterCidr,
    /// `NodeCIDR`.
    NodeCidr,
    /// `BridgeInterface`.
    BridgeInterface,
    /// `InterfaceNamePrefix`.
    InterfaceNamePrefix,
}

/// Where to listen: `IP:PORT`, `IP` with kube-proxy's port, `none`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Bind {
    /// Nowhere.
    Off,
    /// An address; the port is the server's own.
    Ip(IpAddr),
    /// Both.
    Socket(SocketAddr),
}

/// One of `nodePortAddresses`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct NodePorts(pub policy::NodePortAddresses);

/// `clusterCIDR`: one range, or one of each family with a comma between them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ClusterCidrs(pub Vec<IpNet>);

/// `--external-ips`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ExternalIps(pub policy::ExternalIps);

/// `logging.format`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum)]
pub enum LogFormat {
    /// For people.
    #[default]
    Text,
    /// One JSON object a line.
    Json,
}

impl Bind {
    /// The address to bind; `None` for nowhere.
    pub const fn at(self, port: u16) -> Option<SocketAddr> {
        match self {
            Self::Off => None,
            Self::Ip(ip) => Some(SocketAddr::new(ip, port)),
            Self::Socket(address) => Some(address),
        }
    }
}

// === Text to value ===

/// Nanoseconds of Go's units.
const UNITS: [(&str, f64); 7] =
    [("ns", 1.0), ("us", 1e3), ("µs", 1e3), ("ms", 1e6), ("s", 1e9), ("m", 60e9), ("h", 3_600e9)];

impl FromStr for Span {
    type Err = Invalid;

    fn from_str(text: &str) -> Result<Self, Invalid> {
        let wrong = || Invalid(format!("{text:?} is no duration; write it like 24h, 1m30s or 500ms"));
        if text.starts_with('-') {
            return Err(Invalid(format!("{text:?} is negative; 0s leaves the default")));
        }
        let mut rest = text.strip_prefix('+').unwrap_or(text);
        if rest == "0" {
            return Ok(Self::default());
        }
        let mut total = Duration::ZERO;
        while !rest.is_empty() {
            let digits = rest.find(|c: char| !c.is_ascii_digit() && c != '.').ok_or_else(wrong)?;
            let (number, tail) = rest.split_at(digits);
            let unit = tail.find(|c: char| c.is_ascii_digit() || c == '.').unwrap_or(tail.len());
            let (unit, tail) = tail.split_at(unit);
            let (_, scale) = UNITS.into_iter().find(|(name, _)| *name == unit).ok_or_else(wrong)?;
            let number: f64 = number.parse().map_err(|_| wrong())?;
            let part = Duration::try_from_secs_f64(number * scale / 1e9).map_err(|_| wrong())?;
            total = total.checked_add(part).ok_or_else(wrong)?;
            rest = tail;
        }
        if text.is_empty() { Err(wrong()) } else { Ok(Self(total)) }
    }
}

impl FromStr for Mode {
    type Err = Invalid;

    fn from_str(text: &str) -> Result<Self, Invalid> {
        match text {
            "iptables" => Ok(Self::Iptables),
            "ipvs" => Ok(Self::Ipvs),
            "nftables" => Ok(Self::Nftables),
            _ => Err(Invalid(format!("{text:?} is no mode of kube-proxy on Linux; write iptables, ipvs or nftables"))),
        }
    }
}

impl FromStr for LocalMode {
    type Err = Invalid;

    fn from_str(text: &str) -> Result<Self, Invalid> {
        let modes = [Self::ClusterCidr, Self::NodeCidr, Self::BridgeInterface, Self::InterfaceNamePrefix];
        modes.into_iter().find(|mode| mode.to_string() == text).ok_or_else(|| {
            Invalid(format!("{text:?} is none of ClusterCIDR, NodeCIDR, BridgeInterface, InterfaceNamePrefix"))
        })
    }
}

impl FromStr for Bind {
    type Err = Invalid;

    fn from_str(text: &str) -> Result<Self, Invalid> {
        if text.is_empty() || text == "none" {
            return Ok(Self::Off);
        }
        let ip = || text.trim_start_matches('[').trim_end_matches(']').parse().map(Self::Ip);
        text.parse()
            .map(Self::Socket)
            .or_else(|_| ip())
            .map_err(|_| Invalid(format!("{text:?} is no address; write IP:PORT, IP or none")))
    }
}

impl FromStr for NodePorts {
    type Err = Invalid;

    fn from_str(text: &str) -> Result<Self, Invalid> {
        let parsed = match text {
            "primary" => policy::NodePortAddresses::Primary,
            "localhost" => policy::NodePortAddresses::Localhost,
            "all" => policy::NodePortAddresses::All,
            range => policy::NodePortAddresses::Range(cidr(range).map_err(|_| {
                Invalid(format!("{text:?} is no range of addresses; write a CIDR, primary, localhost or all"))
            })?),
        };
        Ok(Self(parsed))
    }
}

impl FromStr for ClusterCidrs {
    type Err = Invalid;

    fn from_str(text: &str) -> Result<Self, Invalid> {
        let all = text.split(',').map(|range| cidr(range.trim())).collect::<Result<Vec<_>, _>>()?;
        let twice = |v4: bool| all.iter().filter(|range| matches!(range, IpNet::V4(_)) == v4).count() > 1;
        if twice(true) || twice(false) {
            return Err(Invalid(format!("{text:?} has two ranges of one family; write one of each at most")));
        }
        Ok(Self(all))
    }
}

impl FromStr for ExternalIps {
    type Err = Invalid;

    fn from_str(text: &str) -> Result<Self, Invalid> {
        Ok(Self(match text {
            "all" => policy::ExternalIps::All,
            "none" => policy::ExternalIps::None,
            ranges => {
                let ranges = ranges.split(',').map(|range| cidr(range.trim())).collect::<Result<Vec<_>, _>>();
                policy::ExternalIps::Within(ranges.map_err(|error| Invalid(format!("{error}, all or none")))?)
            }
        }))
    }
}

impl FromStr for LogFormat {
    type Err = Invalid;

    fn from_str(text: &str) -> Result<Self, Invalid> {
        match text {
            "text" => Ok(Self::Text),
            "json" => Ok(Self::Json),
            _ => Err(Invalid(format!("{text:?} is no log format; write text or json"))),
        }
    }
}

fn cidr(text: &str) -> Result<IpNet, Invalid> {
    let net: IpNet = text.parse().map_err(|_| Invalid(format!("{text:?} is no CIDR; write it like 10.0.0.0/8")))?;
    Ok(net.trunc())
}

// === Value to text ===

impl fmt::Display for Span {
    /// As Go writes it.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let seconds = self.0.as_secs();
        let (hours, minutes, rest) = (seconds / 3_600, seconds / 60 % 60, seconds % 60);
        let nanos = self.0.subsec_nanos();
        if seconds == 0 && nanos != 0 {
            let (value, unit) = match nanos {
                1_000_000.. => (f64::from(nanos) / 1e6, "ms"),
                1_000.. => (f64::from(nanos) / 1e3, "µs"),
                _ => (f64::from(nanos), "ns"),
            };
            return write!(f, "{value}{unit}");
        }
        if hours > 0 {
            write!(f, "{hours}h{minutes}m")?;
        } else if minutes > 0 {
            write!(f, "{minutes}m")?;
        }
        if nanos == 0 {
            write!(f, "{rest}s")
        } else {
            write!(f, "{rest}.{}s", format!("{nanos:09}").trim_end_matches('0'))
        }
    }
}

impl fmt::Display for Mode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Iptables => "iptables",
            Self::Ipvs => "ipvs",
            Self::Nftables => "nftables",
        })
    }
}

impl fmt::Display for LocalMode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::ClusterCidr => "ClusterCIDR",
            Self::NodeCidr => "NodeCIDR",
            Self::BridgeInterface => "BridgeInterface",
            Self::InterfaceNamePrefix => "InterfaceNamePrefix",
        })
    }
}

impl fmt::Display for Bind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Off => f.write_str("none"),
            Self::Ip(ip) => ip.fmt(f),
            Self::Socket(address) => address.fmt(f),
        }
    }
}

impl fmt::Display for NodePorts {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0 {
            policy::NodePortAddresses::Primary => f.write_str("primary"),
            policy::NodePortAddresses::Localhost => f.write_str("localhost"),
            policy::NodePortAddresses::All => f.write_str("all"),
            policy::NodePortAddresses::Range(range) => range.fmt(f),
        }
    }
}

impl fmt::Display for ClusterCidrs {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0.iter().map(ToString::to_string).collect::<Vec<_>>().join(","))
    }
}

impl fmt::Display for LogFormat {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Text => "text",
            Self::Json => "json",
        })
    }
}

/// In files these are their text.
macro_rules! as_text {
    ($($type:ty),+) => { $(
        impl<'de> Deserialize<'de> for $type {
            fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
                String::deserialize(deserializer)?.parse().map_err(de::Error::custom)
            }
        }

        impl Serialize for $type {
            fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
                serializer.collect_str(self)
            }
        }
    )+ };
}

as_text!(Span, Mode, LocalMode, Bind, NodePorts, ClusterCidrs, LogFormat);

/// A value that is not given as `null` and as the empty text, too.
pub(super) fn optional<'de, D: Deserializer<'de>, T: FromStr<Err = Invalid>>(
    deserializer: D,
) -> Result<Option<T>, D::Error> {
    match Option::<String>::deserialize(deserializer)? {
        Some(text) if !text.is_empty() => text.parse().map(Some).map_err(de::Error::custom),
        _ => Ok(None),
    }
}

/// A section that may be `null`.
pub(super) fn section<'de, D: Deserializer<'de>, T: Deserialize<'de> + Default>(
    deserializer: D,
) -> Result<T, D::Error> {
    Ok(Option::deserialize(deserializer)?.unwrap_or_default())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn durations_as_go_has_them() {
        let rows = [
            ("24h0m0s", Some((86_400_000_000_000_u128, "24h0m0s"))),
            ("24h", Some((86_400_000_000_000, "24h0m0s"))),
            ("1m30s", Some((90_000_000_000, "1m30s"))),
            ("1.5h", Some((5_400_000_000_000, "1h30m0s"))),
            ("300ms", Some((300_000_000, "300ms"))),
            ("1s500ms", Some((1_500_000_000, "1.5s"))),
            ("15µs", Some((15_000, "15µs"))),
            ("0", Some((0, "0s"))),
            ("0s", Some((0, "0s"))),
            ("", None),
            ("10", None),
            ("ten", None),
            ("1d", None),
            ("-1s", None),
            ("1..5s", None),
        ];
        for (text, want) in rows {
            let got = text.parse::<Span>().ok().map(|span| (span.0.as_nanos(), span.to_string()));
            assert_eq!(got, want.map(|(nanos, shown)| (nanos, shown.to_owned())), "{text:?}");
        }
    }

    #[test]
    fn addresses_to_listen_at() {
        let rows = [
            ("0.0.0.0:10256", "0.0.0.0:10256"),
            ("0.0.0.0", "0.0.0.0:7"),
            ("::1", "[::1]:7"),
            ("[::1]", "[::1]:7"),
            ("[fd00::1]:80", "[fd00::1]:80"),
            ("none", "none"),
            ("", "none"),
            ("localhost:80", "\"localhost:80\" is no address; write IP:PORT, IP or none"),
            ("10.0.0.1:99999", "\"10.0.0.1:99999\" is no address; write IP:PORT, IP or none"),
        ];
        for (text, want) in rows {
            let got = match text.parse::<Bind>() {
                Ok(bind) => bind.at(7).map_or("none".to_owned(), |address| address.to_string()),
                Err(error) => error.to_string(),
            };
            assert_eq!(got, want, "{text:?}");
        }
    }
}
