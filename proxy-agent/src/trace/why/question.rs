//! Who asks for whom: the words of the command line, with all names resolved.

use std::net::{IpAddr, SocketAddr};

use proxy_abi::Proto;

use super::super::names::Names;
use super::super::selection::{End, SelectionError, Who};
use super::frame::Part;

/// Sender or receiver, as far as its place matters.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// A pod of this node.
    Pod,
    /// The node.
    Node,
    /// Any other address.
    Other,
}

/// An address and whose it is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Place {
    /// How it is called.
    pub name: String,
    /// Address.
    pub ip: IpAddr,
    /// Where it is.
    pub kind: Kind,
}

/// One question: of one family.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Question {
    /// Sender.
    pub from: Place,
    /// Receiver, as the sender asks for it.
    pub to: Place,
    /// Port; `None` for protocols without.
    pub port: Option<u16>,
    /// Protocol.
    pub proto: Proto,
    /// The source that its packets carry, where that is another than the sender's address.
    pub claims: Option<IpAddr>,
    /// Bytes of the packet from its IP header on; 0 = no more than its headers.
    pub size: u16,
    /// Port of the sender, or the identifier of its echo; 0 = any that no flow has.
    pub from_port: u16,
    /// What it is in its flow.
    pub part: Part,
    /// Number that it has: see [`Frame`](super::frame::Frame).
    pub number: u32,
}

impl Question {
    /// The source that its packets carry.
    pub fn source(&self) -> IpAddr {
        self.claims.unwrap_or(self.from.ip)
    }
}

fn wrong(word: &str, message: &'static str) -> SelectionError {
    SelectionError::Unreadable { word: word.to_owned(), message }
}

/// `80/tcp`, also `tcp/80`; protocols without ports by their name.
fn target(word: &str) -> Result<(Option<u16>, Proto), SelectionError> {
    if matches!(word, "icmp" | "icmp6") {
        return Ok((None, Proto::ICMP));
    }
    let (one, other) = word.split_once('/').unwrap_or((word, ""));
    [(one, other), (other, one)]
        .into_iter()
        .find_map(|(port, proto)| {
            let end: End = format!("any:{port}/{proto}").parse().ok()?;
            Some((Some(end.port.filter(|port| *port != 0)?), end.proto?))
        })
        .ok_or_else(|| wrong(word, "a port is 80/tcp, 53/udp or 9/sctp; a protocol without ports is icmp"))
}

/// The sides of `FROM to TO [PORT/PROTOCOL]`.
fn sides(words: &[String]) -> Result<(End, End), SelectionError> {
    let usage = "write FROM to TO [PORT/PROTOCOL], as in pod:shop/web-0 to svc:shop/api 80/tcp";
    let (from, to, rest) = match words {
        [from, word, to, rest @ ..] if word == "to" => (from, to, rest),
        [_, word, ..] if word != "to" => return Err(wrong(word, usage)),
        _ => return Err(wrong("", usage)),
    };
    let sender: End = from.parse()?;
    if sender.port.is_some() {
        return Err(wrong(from, "a sender has no port here: any will do"));
    }
    let mut to: End = to.parse()?;
    match rest {
        [] => {}
        [word] => {
            let (port, proto) = target(word)?;
            let named = to.port.is_some() || matches!(to.who, Who::Service(_, Some(_)));
            if named && port.is_some() {
                return Err(wrong(word, "the receiver has a port already: name one"));
            }
            match &mut to.who {
                Who::Service(_, known) => *known = port.map(|port| port.to_string()),
                _ => to.port = port,
            }
            to.proto = Some(proto);
        }
        [_, more, ..] => return Err(wrong(more, "nothing follows PORT/PROTOCOL")),
    }
    Ok((sender, to))
}

impl Place {
    /// Whose an address is.
    pub fn at(ip: IpAddr, names: &Names) -> Self {
        if let Some(pod) = names.pod_at(ip) {
            return Self { name: names.pod_name(pod), ip, kind: Kind::Pod };
        }
        if names.own.contains(&ip) {
            return Self { name: "node".to_owned(), ip, kind: Kind::Node };
        }
        Self { name: String::new(), ip, kind: Kind::Other }
    }

    /// Name and address.
    pub fn shown(&self) -> String {
        if self.name.is_empty() { self.ip.to_string() } else { format!("{} ({})", self.name, self.ip) }
    }
}

/// Where a side may be, one for each of its addresses. `elsewhere`: addresses of a pod that is not of this node.
fn places(
    end: &End,
    word: &str,
    names: &Names,
    elsewhere: &dyn Fn(&str) -> Vec<IpAddr>,
) -> Result<Vec<Place>, SelectionError> {
    match &end.who {
        Who::Pod(name) => {
            if let Some(pod) = names.pods.iter().find(|pod| pod.name.as_ref() == Some(name)) {
                let place = |ip: &IpAddr| Place { name: name.clone(), ip: *ip, kind: Kind::Pod };
                return Ok(pod.addresses.iter().map(place).collect());
            }
            let found = elsewhere(name);
            if found.is_empty() {
                return Err(SelectionError::Unknown {
                    what: format!("pod {name}"),
                    nearest: names.nearest("pod", name),
                });
            }
            Ok(found.into_iter().map(|ip| Place { name: name.clone(), ip, kind: Kind::Other }).collect())
        }
        Who::Node => {
            let global = |ip: &&IpAddr| match ip {
                IpAddr::V4(ip) => !ip.is_loopback() && !ip.is_link_local(),
                IpAddr::V6(ip) => !ip.is_loopback() && !ip.is_unicast_link_local(),
            };
            // What others know it by comes before what its pods alone do.
            let of_family = |v4| {
                let all = names.own.iter().filter(global).filter(|ip| ip.is_ipv4() == v4);
                all.min_by_key(|ip| names.gateways.contains(*ip))
            };
            Ok([true, false].into_iter().filter_map(of_family).map(|ip| Place::at(*ip, names)).collect())
        }
        Who::Net(net) if net.is_host() => Ok(vec![Place::at(net.ip, names)]),
        Who::Net(_) | Who::Labels(_) | Who::Device(_) | Who::External | Who::Any | Who::Service(..) => Err(wrong(
            word,
            "this is no single sender or receiver: name a pod, an address or the node; as receiver also a Service",
        )),
    }
}

/// Addresses and ports of a Service: one for each family.
fn frontends(
    name: &str,
    port: Option<&str>,
    proto: Option<Proto>,
    names: &Names,
) -> Result<Vec<(SocketAddr, Proto, u32)>, SelectionError> {
    let ids = names.service_ports(name, port);
    let unknown = |what| SelectionError::Unknown { what, nearest: ports(name, names) };
    if ids.is_empty() {
        return Err(match port {
            Some(port) if !names.service_ports(name, None).is_empty() => {
                unknown(format!("port {port} of Service {name}"))
            }
            _ => SelectionError::Unknown { what: format!("Service {name}"), nearest: names.nearest("svc", name) },
        });
    }
    let mut all: Vec<_> = names.frontends.iter().filter(|(_, id)| ids.contains(id)).collect();
    // A number may be of several protocols: the one that is named, else TCP.
    let wanted = proto.unwrap_or(Proto::TCP);
    if proto.is_some() || all.iter().any(|((_, _, proto), _)| *proto == wanted.0) {
        all.retain(|((_, _, proto), _)| *proto == wanted.0);
    }
    let Some((_, first)) = all.first() else {
        return Err(unknown(format!("port of {wanted} of Service {name}")));
    };
    if all.iter().any(|(_, id)| id != first) {
        return Err(wrong(&ports(name, names).join(", "), "the Service has several ports: name one"));
    }
    let mut found: Vec<(SocketAddr, Proto, u32)> = Vec::new();
    // Its own address before the node's ports.
    all.sort_by_key(|((ip, ..), _)| ip.is_unspecified());
    for ((ip, port, proto), id) in all {
        let own = || names.own.iter().find(|own| own.is_ipv4() == ip.is_ipv4() && !own.is_loopback()).copied();
        let Some(at) = (if ip.is_unspecified() { own() } else { Some(*ip) }) else { continue };
        if !found.iter().any(|(known, ..)| known.is_ipv4() == at.is_ipv4()) {
            found.push((SocketAddr::new(at, *port), Proto(*proto), *id));
        }
    }
    Ok(found)
}

/// Ports of a Service in words of a selection.
fn ports(name: &str, names: &Names) -> Vec<String> {
    let ids = names.service_ports(name, None);
    let mut all: Vec<String> = Vec::new();
    for ((_, port, proto), id) in &names.frontends {
        let text = format!("svc:{name}:{port}/{}", Proto(*proto).to_string().to_lowercase());
        if ids.contains(id) && !all.contains(&text) {
            all.push(text);
        }
    }
    all
}

/// The questions that the words ask: one for each family that both sides have. `elsewhere` gives the addresses of pods that
/// are not of this node, where somebody knows them.
///
/// # Errors
/// [`SelectionError`]: it cannot be read, or a name is not known.
pub fn read(
    words: &[String],
    names: &Names,
    elsewhere: &dyn Fn(&str) -> Vec<IpAddr>,
) -> Result<Vec<Question>, SelectionError> {
    let (from, to) = sides(words)?;
    let word = |n: usize| words.get(n).map(String::as_str).unwrap_or_default();
    let senders = places(&from, word(0), names, elsewhere)?;
    let receivers: Vec<(Place, Option<u16>, Proto)> = if let Who::Service(name, port) = &to.who {
        let found = frontends(name, port.as_deref(), to.proto, names)?.into_iter();
        found
            .map(|(at, proto, id)| {
                let place = Place { name: names.service(id), ip: at.ip(), kind: Kind::Other };
                (place, Some(at.port()), proto)
            })
            .collect()
    } else {
        let proto = |ip: IpAddr| match (to.port, to.proto) {
            (Some(_), proto) => proto.unwrap_or(Proto::TCP),
            (None, None | Some(Proto::ICMP | Proto::ICMPV6)) if ip.is_ipv4() => Proto::ICMP,
            (None, None | Some(Proto::ICMP | Proto::ICMPV6)) => Proto::ICMPV6,
            (None, Some(proto)) => proto,
        };
        let all = places(&to, word(2), names, elsewhere)?.into_iter();
        all.map(|place| (place.clone(), to.port, proto(place.ip))).collect()
    };
    let mut questions = Vec::new();
    for sender in &senders {
        for (receiver, port, proto) in receivers.iter().filter(|(to, ..)| to.ip.is_ipv4() == sender.ip.is_ipv4()) {
            questions.push(Question {
                from: sender.clone(),
                to: receiver.clone(),
                port: *port,
                proto: *proto,
                claims: None,
                size: 0,
                from_port: 0,
                part: Part::Opens,
                number: 1,
            });
        }
    }
    if questions.is_empty() {
        return Err(wrong(&words.join(" "), "the two have no addresses of one family"));
    }
    Ok(questions)
}

#[cfg(test)]
mod tests {
    use super::super::super::names::tests::names;
    use super::*;

    fn ask(text: &str) -> Result<Vec<String>, SelectionError> {
        let words: Vec<String> = text.split(' ').map(str::to_owned).collect();
        let elsewhere = |name: &str| if name == "far/pod" { vec!["10.3.0.4".parse().expect("ip")] } else { Vec::new() };
        let shown = |question: Question| {
            let Question { from, to, port, proto, .. } = question;
            format!("{} {:?} → {} {:?} {port:?} {proto}", from.shown(), from.kind, to.shown(), to.kind)
        };
        Ok(read(&words, &names(), &elsewhere)?.into_iter().map(shown).collect())
    }

    #[test]
    fn both_families_are_asked_for() {
        let tcp = Proto::TCP;
        assert_eq!(
            ask("pod:shop/web-0 to svc:shop/api:80").expect("known"),
            [
                format!("shop/web-0 (10.1.0.2) Pod → shop/api:http (10.96.0.7) Other Some(80) {tcp}"),
                format!("shop/web-0 (fd01::2) Pod → shop/api:http (fd96::7) Other Some(80) {tcp}"),
            ]
        );
        assert_eq!(ask("pod:shop/web-0 to svc:shop/api 80/tcp"), ask("pod:shop/web-0 to svc:shop/api:http/tcp"));
        assert_eq!(ask("pod:shop/web-0 to svc:shop/api tcp/80"), ask("pod:shop/web-0 to svc:shop/api:http/tcp"));
        let one = format!("node (10.1.0.1) Node → shop/api-0 (10.1.0.3) Pod Some(9) {}", Proto::UDP);
        assert_eq!(ask("10.1.0.1 to pod:shop/api-0:9/udp").expect("known"), std::slice::from_ref(&one));
        assert_eq!(ask("10.1.0.1 to pod:shop/api-0 9/udp").expect("known"), [one]);
        let echo = format!("shop/web-0 (10.1.0.2) Pod → far/pod (10.3.0.4) Other None {}", Proto::ICMP);
        assert_eq!(ask("pod:shop/web-0 to pod:far/pod").expect("known"), [echo]);
    }

    #[test]
    fn what_is_not_known_is_said_with_what_is_near() {
        let unknown = |text: &str| match ask(text) {
            Err(SelectionError::Unknown { what, nearest }) => (what, nearest),
            other => panic!("{text}: {other:?}"),
        };
        assert_eq!(unknown("pod:shop/web-9 to node").0, "pod shop/web-9");
        assert_eq!(unknown("pod:shop/web-9 to node").1.first().map(String::as_str), Some("pod:shop/web-0"));
        assert_eq!(unknown("node to svc:shop/app").1, ["svc:shop/api"]);
        let (what, nearest) = unknown("node to svc:shop/api:81");
        assert_eq!(what, "port 81 of Service shop/api");
        assert!(nearest.contains(&"svc:shop/api:80/tcp".to_owned()), "{nearest:?}");
        assert!(matches!(ask("node to svc:shop/api:80/udp"), Err(SelectionError::Unknown { .. })));
        for (text, wrong) in [
            ("pod:shop/web-0", ""),
            ("node and node", "and"),
            ("any to node", "any"),
            ("node to dev:eth0", "dev:eth0"),
            ("node to 10.0.0.0/8", "10.0.0.0/8"),
            ("node to node 80/quic", "80/quic"),
            ("node to node 0/tcp", "0/tcp"),
            ("node to node 80/tcp now", "now"),
            ("node to node:80 80/tcp", "80/tcp"),
            ("node:80 to node", "node:80"),
        ] {
            let found = ask(text);
            assert!(
                matches!(&found, Err(SelectionError::Unreadable { word, .. }) if word == wrong),
                "{text}: {found:?}"
            );
        }
    }
}
