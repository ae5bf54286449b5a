//! What to follow: `pod:shop/web-0 to svc:shop/api:80/tcp`.
//!
//! ```text
//!   SEL ::= EP ["to" EP]
//!   EP  ::= "pod:" NS "/" NAME [PORT] | "svc:" NS "/" NAME [":" NAME-OR-NUMBER] | "node" [PORT] | "host" [PORT]
//!         | "ext" [PORT] | ADDRESS ["/" LEN] [PORT] | "dev:" NAME | "label:" KEY "=" VALUE {"," KEY "=" VALUE} [PORT] | "any" [PORT]
//!   PORT ::= ":" NUMBER ["/" PROTOCOL]; after an IPv6 address only with brackets around that
//! ```

use std::collections::BTreeSet;
use std::net::{IpAddr, SocketAddr};

use proxy_abi::trace::{TraceEnd, TraceFilter};
use proxy_abi::{IpBytes, PortBe, Proto};

use super::names::{Names, label_text};
use super::packet::{Net, Packet};

/// Whom one side of a selection names.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Who {
    /// `namespace/name`.
    Pod(String),
    /// `namespace/name`, and a port of it by name or number.
    Service(String, Option<String>),
    /// Pods with all of these labels, keys and values, on whatever node.
    Labels(Vec<(String, String)>),
    /// Addresses of the node.
    Node,
    /// Whoever is neither a pod of this node nor the node, nor a Service.
    External,
    /// Addresses.
    Net(Net),
    /// What passes an interface.
    Device(String),
    /// Anybody.
    Any,
}

/// A side as it was written.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct End {
    /// Whom.
    pub who: Who,
    /// Port.
    pub port: Option<u16>,
    /// Protocol.
    pub proto: Option<Proto>,
}

/// What is wrong with a selection.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum SelectionError {
    /// It cannot be read.
    #[error("`{word}`: {message}")]
    Unreadable {
        /// The word.
        word: String,
        /// What could stand there.
        message: &'static str,
    },
    /// Nobody has this name here.
    #[error("no {what} on this node{}", nearest_text(.nearest))]
    Unknown {
        /// Kind and name.
        what: String,
        /// Names like it.
        nearest: Vec<String>,
    },
    /// Nobody is known to have these labels.
    #[error(
        "no pod with the labels {0} is known; the running agent knows labels, and only while there is a NetworkPolicy: \
         without one it does not watch Pods"
    )]
    NoLabels(String),
    /// More addresses than the kernel's table holds.
    #[error("the selection has {0} addresses, more than can be told apart in the kernel; name a pod or a port as well")]
    TooMany(usize),
}

fn nearest_text(nearest: &[String]) -> String {
    if nearest.is_empty() { String::new() } else { format!("; there is {}", nearest.join(", ")) }
}

/// A selection with all names resolved.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Selection {
    /// As it was written.
    pub text: String,
    sides: [Side; 2],
    /// Protocol of either side.
    pub proto: Option<Proto>,
    /// Interface that packets must pass.
    pub ifindex: Option<u32>,
}

#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct Side {
    who: Option<Who>,
    /// Addresses with a port, or any.
    exact: BTreeSet<(IpAddr, u16)>,
    port: Option<u16>,
    /// Service ports.
    services: BTreeSet<u32>,
}

impl std::str::FromStr for End {
    type Err = SelectionError;

    fn from_str(text: &str) -> Result<Self, SelectionError> {
        let wrong = |message| SelectionError::Unreadable { word: text.to_owned(), message };
        let named = |rest: &str| rest.split_once('/').is_some_and(|(a, b)| !a.is_empty() && !b.is_empty());
        if let Some(rest) = text.strip_prefix("pod:") {
            let (name, port, proto) = cut_port(rest).ok_or_else(|| wrong("a port is `:80` or `:80/tcp`"))?;
            let end = Self { who: Who::Pod(name.to_owned()), port, proto };
            return if named(name) { Ok(end) } else { Err(wrong("a pod is `pod:NAMESPACE/NAME`")) };
        }
        if let Some(rest) = text.strip_prefix("svc:") {
            let (name, port) = rest.split_once(':').map_or((rest, None), |(name, port)| (name, Some(port)));
            let (port, proto) = match port.and_then(|port| port.split_once('/')) {
                Some((port, proto)) => {
                    (Some(port), Some(protocol(proto).ok_or_else(|| wrong("protocols are tcp, udp and sctp"))?))
                }
                None => (port, None),
            };
            let who = Who::Service(name.to_owned(), port.map(str::to_owned));
            let end = Self { who, port: None, proto };
            return if named(name) {
                Ok(end)
            } else {
                Err(wrong("a Service is `svc:NAMESPACE/NAME`, with `:PORT` if need be"))
            };
        }
        if let Some(name) = text.strip_prefix("dev:") {
            return Ok(Self { who: Who::Device(name.to_owned()), port: None, proto: None });
        }
        if let Some(rest) = text.strip_prefix("label:") {
            let (labels, port, proto) = cut_port(rest).ok_or_else(|| wrong("a port is `:80` or `:80/tcp`"))?;
            let pair = |label: &str| {
                let (key, value) = label.split_once('=').filter(|(key, _)| !key.is_empty())?;
                Some((key.to_owned(), value.to_owned()))
            };
            let labels = labels.split(',').map(pair).collect::<Option<_>>();
            let labels = labels.ok_or_else(|| wrong("labels are `label:KEY=VALUE`, with `,KEY=VALUE` for more"))?;
            return Ok(Self { who: Who::Labels(labels), port, proto });
        }
        if let Some((name, port, proto)) = cut_port(text) {
            let who = match name {
                "node" | "host" => Some(Who::Node),
                "ext" => Some(Who::External),
                "any" => Some(Who::Any),
                _ => None,
            };
            if let Some(who) = who {
                return Ok(Self { who, port, proto });
            }
        }
        let net = |net: Net, port, proto| Self { who: Who::Net(net), port, proto };
        if let Ok(found) = text.parse::<Net>() {
            return Ok(net(found, None, None));
        }
        let (address, proto) = match text.rsplit_once('/') {
            Some((address, word)) => (address, protocol(word)),
            None => (text, None),
        };
        if let Ok(address) = address.parse::<SocketAddr>() {
            return Ok(net(Net::host(address.ip()), Some(address.port()), proto));
        }
        if let Some((range, port, proto)) = cut_port(text)
            && let Ok(found) = range.parse::<Net>()
        {
            return Ok(net(found, port, proto));
        }
        Err(wrong(
            "expected pod:NS/NAME, svc:NS/NAME, label:KEY=VALUE, node, ext, any, dev:NAME, or an address with `/LEN` or `:PORT`",
        ))
    }
}

fn protocol(word: &str) -> Option<Proto> {
    Some(match word {
        "tcp" => Proto::TCP,
        "udp" => Proto::UDP,
        "sctp" => Proto::SCTP,
        "icmp" => Proto::ICMP,
        "icmp6" => Proto::ICMPV6,
        _ => return None,
    })
}

/// What stands before `:80/tcp`, the port and the protocol.
fn cut_port(text: &str) -> Option<(&str, Option<u16>, Option<Proto>)> {
    let Some((name, rest)) = text.rsplit_once(':') else { return Some((text, None, None)) };
    let (port, proto) = match rest.split_once('/') {
        Some((port, proto)) => (port, Some(protocol(proto)?)),
        None => (rest, None),
    };
    Some((name, Some(port.parse().ok()?), proto))
}

impl Selection {
    /// Everything.
    pub fn all() -> Self {
        Self { text: "all packets".to_owned(), ..Self::default() }
    }

    /// From the words of the command line.
    ///
    /// # Errors
    /// [`SelectionError`].
    pub fn new(words: &[String], names: &Names) -> Result<Self, SelectionError> {
        let mut selection = Self { text: words.join(" "), ..Self::default() };
        let ends: Vec<&String> = words.iter().filter(|word| *word != "to").collect();
        let well_formed = match words {
            [] | [_] => true,
            [_, to, _] => to == "to",
            _ => false,
        };
        if !well_formed {
            let word = words.get(1).cloned().unwrap_or_default();
            return Err(SelectionError::Unreadable {
                word,
                message: "a selection is one side, or two with `to` between them",
            });
        }
        for (side, word) in selection.sides.iter_mut().zip(ends) {
            let end: End = word.parse()?;
            selection.proto = selection.proto.or(end.proto);
            if let Who::Device(name) = &end.who {
                let found = names.interfaces.iter().find(|(_, found)| *found == name);
                let unknown = || SelectionError::Unknown {
                    what: format!("interface {name}"),
                    nearest: names.interfaces.values().cloned().collect(),
                };
                selection.ifindex = Some(*found.ok_or_else(unknown)?.0);
            } else {
                *side = Side::new(end, names)?;
            }
        }
        Ok(selection)
    }

    /// Flags of the kernel's filter, and its table of ends.
    ///
    /// # Errors
    /// [`SelectionError::TooMany`].
    pub fn ends(&self) -> Result<(u32, Vec<(TraceEnd, u32)>), SelectionError> {
        let mut flags = 0;
        let mut table: std::collections::BTreeMap<TraceEnd, u32> = std::collections::BTreeMap::new();
        let bits = [(TraceFilter::ANY_A, TraceEnd::A), (TraceFilter::ANY_B, TraceEnd::B)];
        for (side, (any, bit)) in self.sides.iter().zip(bits) {
            if side.exact.is_empty() {
                flags |= any;
            }
            for (ip, port) in &side.exact {
                let ip = IpBytes::from(*ip);
                let end = |port| TraceEnd { ip, port: PortBe::new(port), reserved: 0, reserved_more: 0 };
                *table.entry(end(*port)).or_default() |= bit;
                if *port != 0 {
                    *table.entry(end(0)).or_default() |= TraceEnd::PORTS;
                }
            }
        }
        if table.len() > proxy_abi::trace::ENDS as usize {
            return Err(SelectionError::TooMany(table.len()));
        }
        Ok((flags, table.into_iter().collect()))
    }

    /// Does a packet, as it was anywhere on its way, join both sides? `service`: the service port that decided, or 0.
    pub fn joins(&self, packet: &Packet, service: u32, names: &Names) -> bool {
        let [a, b] = &self.sides;
        let is = |side: &Side, address: SocketAddr| side.is(address, packet.proto, service, names);
        let (from, to) = (packet.source(), packet.destination());
        is(a, from) && is(b, to) || is(a, to) && is(b, from)
    }

    /// Service ports that a side names.
    pub fn services(&self) -> BTreeSet<u32> {
        self.sides.iter().flat_map(|side| side.services.iter().copied()).collect()
    }

    /// Does it choose nothing?
    pub fn is_all(&self) -> bool {
        let any = |side: &Side| matches!(side.who, None | Some(Who::Any)) && side.port.is_none();
        self.sides.iter().all(any) && self.ifindex.is_none()
    }

    /// Does the packet go from the first side to the second, for all one can tell?
    pub fn is_forward(&self, packet: &Packet, names: &Names) -> bool {
        let [a, b] = &self.sides;
        let anybody = b.port.is_none() && matches!(b.who, None | Some(Who::Any | Who::Device(_)));
        if a.exact.is_empty() && anybody {
            // Of an interface alone both directions are what was asked for.
            return a.is(packet.source(), packet.proto, 0, names);
        }
        let side = if a.exact.is_empty() { b } else { a };
        let forth = side.is(packet.source(), packet.proto, 0, names);
        if a.exact.is_empty() { !forth } else { forth }
    }
}

impl Side {
    fn new(end: End, names: &Names) -> Result<Self, SelectionError> {
        let mut side = Self { port: end.port, ..Self::default() };
        let port = end.port.unwrap_or(0);
        match &end.who {
            Who::Pod(name) => {
                let pod = names.pods.iter().find(|pod| pod.name.as_ref() == Some(name));
                let unknown =
                    || SelectionError::Unknown { what: format!("pod {name}"), nearest: names.nearest("pod", name) };
                side.exact.extend(pod.ok_or_else(unknown)?.addresses.iter().map(|ip| (*ip, port)));
            }
            Who::Service(name, port) => {
                side.services = names.service_ports(name, port.as_deref());
                if side.services.is_empty() {
                    let what = port
                        .as_ref()
                        .map_or_else(|| format!("Service {name}"), |port| format!("Service {name} with a port {port}"));
                    return Err(SelectionError::Unknown { what, nearest: names.nearest("svc", name) });
                }
                for ((ip, port, _), service) in &names.frontends {
                    if !side.services.contains(service) {
                        continue;
                    }
                    if ip.is_unspecified() {
                        let own = names.own.iter().filter(|own| own.is_ipv4() == ip.is_ipv4());
                        side.exact.extend(own.map(|own| (*own, *port)));
                    } else {
                        side.exact.insert((*ip, *port));
                    }
                }
                let backends = names.backends.values().filter(|backend| side.services.contains(&backend.service));
                side.exact.extend(backends.map(|backend| (backend.address.ip(), backend.address.port())));
            }
            Who::Labels(labels) => {
                let text = label_text(labels);
                let found = names.labelled.get(&text).filter(|found| !found.is_empty());
                side.exact.extend(found.ok_or(SelectionError::NoLabels(text))?.iter().map(|ip| (*ip, port)));
            }
            Who::Node => side.exact.extend(names.own.iter().map(|ip| (*ip, port))),
            Who::Net(net) if net.is_host() => {
                side.exact.insert((net.ip, port));
            }
            Who::Net(_) | Who::External | Who::Device(_) | Who::Any => {}
        }
        side.who = Some(end.who);
        Ok(side)
    }

    fn is(&self, address: SocketAddr, proto: Proto, service: u32, names: &Names) -> bool {
        if self.port.is_some_and(|port| port != address.port()) {
            return false;
        }
        match &self.who {
            None | Some(Who::Any | Who::Device(_)) => true,
            Some(Who::Net(net)) => net.contains(address.ip()),
            Some(Who::External) => {
                let own = names.own.contains(&address.ip()) || names.pod_at(address.ip()).is_some();
                !own && names.frontend(address, proto).is_none()
            }
            Some(Who::Service(..)) => {
                let frontend = names.frontend(address, proto).is_some_and(|found| self.services.contains(&found));
                frontend || self.services.contains(&service) && self.exact.contains(&(address.ip(), address.port()))
            }
            Some(Who::Pod(_) | Who::Labels(_) | Who::Node) => {
                self.exact.contains(&(address.ip(), self.port.unwrap_or(0)))
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::names::tests::names;
    use super::*;

    fn select(text: &str) -> Result<Selection, SelectionError> {
        let words: Vec<String> = text.split_whitespace().map(str::to_owned).collect();
        Selection::new(&words, &names())
    }

    fn packet(from: &str, to: &str) -> Packet {
        let (from, to): (SocketAddr, SocketAddr) = (from.parse().expect("from"), to.parse().expect("to"));
        Packet {
            src: from.ip(),
            dst: to.ip(),
            src_port: from.port(),
            dst_port: to.port(),
            proto: Proto::TCP,
            flags: 2,
            ttl: 64,
            ident: 0,
            icmp: None,
            len: 60,
            is_rest: false,
        }
    }

    #[test]
    fn selections_join_their_sides_both_ways() {
        let (web, api) = ("10.1.0.2:4000", "10.1.0.3:8080");
        let (vip, outside) = ("10.96.0.7:80", "1.2.3.4:5");
        // Selection, packet, service port that decided, whether it is meant.
        let cases = [
            ("pod:shop/web-0", web, vip, 0, true),
            ("pod:shop/web-0", vip, web, 0, true),
            ("pod:shop/web-0:4001", vip, web, 0, false),
            ("pod:shop/web-0 to svc:shop/api", web, vip, 0, true),
            ("pod:shop/web-0 to svc:shop/api:http", vip, web, 0, true),
            ("pod:shop/web-0 to svc:shop/api:80/tcp", web, vip, 0, true),
            ("pod:shop/web-0 to svc:shop/api", web, api, 7, true),
            // Directly, not through the Service.
            ("pod:shop/web-0 to svc:shop/api", web, api, 0, false),
            ("pod:shop/web-0 to pod:shop/api-0", api, web, 0, true),
            ("svc:shop/api", outside, "192.168.0.1:30080", 0, true),
            ("node", outside, "192.168.0.1:30080", 0, true),
            ("ext to node:30080", outside, "192.168.0.1:30080", 0, true),
            ("ext", web, api, 0, false),
            ("10.1.0.0/24 to 10.96.0.0/16:80/tcp", web, vip, 0, true),
            ("10.1.0.2 to 10.96.0.7:81", web, vip, 0, false),
            ("[fd01::2]:4000", "[fd01::2]:4000", "[fd96::7]:80", 0, true),
            ("label:app=web", web, vip, 0, true),
            ("label:app=web to label:app=web,tier=back:8080", web, api, 0, true),
            ("label:app=web,tier=back", web, vip, 0, false),
            ("any to any:80", web, vip, 0, true),
            ("dev:eth0", web, vip, 0, true),
        ];
        for (text, from, to, service, expected) in cases {
            let selection = select(text).unwrap_or_else(|error| panic!("{text}: {error}"));
            assert_eq!(selection.joins(&packet(from, to), service, &names()), expected, "{text}: {from} > {to}");
        }
    }

    #[test]
    fn directions_are_told_apart() {
        let (web, outside) = ("10.1.0.2:4000", "1.2.3.4:53");
        for (text, forth, back) in [
            ("pod:shop/web-0", true, false),
            ("pod:shop/web-0 to ext", true, false),
            ("ext to pod:shop/web-0", false, true),
            ("10.1.0.0/24", true, false),
            ("dev:eth0", true, true),
            ("any", true, true),
        ] {
            let selection = select(text).expect("a selection");
            let found =
                [(web, outside), (outside, web)].map(|(from, to)| selection.is_forward(&packet(from, to), &names()));
            assert_eq!(found, [forth, back], "{text}");
        }
    }

    #[test]
    fn the_kernel_is_asked_for_addresses() {
        let selection = select("pod:shop/web-0 to svc:shop/api").expect("a selection");
        let (flags, ends) = selection.ends().expect("ends");
        let end = |ip: &str, port| TraceEnd {
            ip: ip.parse::<IpAddr>().expect("an address").into(),
            port: PortBe::new(port),
            reserved: 0,
            reserved_more: 0,
        };
        let (a, b, ports) = (TraceEnd::A, TraceEnd::B, TraceEnd::PORTS);
        let mut expected = vec![(end("10.1.0.2", 0), a), (end("fd01::2", 0), a)];
        for (ip, port) in [
            ("10.96.0.7", 80),
            ("fd96::7", 80),
            ("10.1.0.3", 8080),
            ("10.2.0.3", 8080),
            ("192.168.0.1", 30080),
            ("10.1.0.1", 30080),
        ] {
            expected.extend([(end(ip, 0), ports), (end(ip, port), b)]);
        }
        expected.sort_unstable();
        assert_eq!((flags, ends), (0, expected));
        let (flags, ends) = select("10.0.0.0/8").and_then(|selection| selection.ends()).expect("ends");
        assert_eq!((flags, ends), (TraceFilter::ANY_A | TraceFilter::ANY_B, vec![]));
    }

    #[test]
    fn mistakes_are_told_with_what_could_be_meant() {
        let cases = [
            ("pod:shop/web-1", "no pod shop/web-1 on this node; there is pod:shop/web-0, pod:shop/api-0"),
            ("svc:shop/app", "no Service shop/app on this node; there is svc:shop/api"),
            ("svc:shop/api:81", "no Service shop/api with a port 81 on this node; there is svc:shop/api"),
            ("dev:eth9", "no interface eth9 on this node; there is lo, eth0, cni0, veth7, veth8"),
            ("pod:web-0", "`pod:web-0`: a pod is `pod:NAMESPACE/NAME`"),
            ("pod:shop/web-0 svc:shop/api", "`svc:shop/api`: a selection is one side, or two with `to` between them"),
            (
                "label:app=db",
                "no pod with the labels app=db is known; the running agent knows labels, and only while there is a \
                 NetworkPolicy: without one it does not watch Pods",
            ),
            ("label:app", "`label:app`: labels are `label:KEY=VALUE`, with `,KEY=VALUE` for more"),
        ];
        for (text, expected) in cases {
            assert_eq!(select(text).map_err(|error| error.to_string()), Err(expected.to_owned()), "{text}");
        }
        for text in ["", "web-0", "10.0.0.300", "10.0.0.1:99999", "any:80/xyz"] {
            let word: Result<End, _> = text.parse();
            assert!(word.is_err(), "{text}: {word:?}");
        }
    }
}
