//! What is looked up for an answer: maps, netlink, sysctls, hooks. Nothing is changed.

use std::collections::BTreeMap;
use std::fs;
use std::net::{IpAddr, SocketAddr};
use std::path::{Path as FilePath, PathBuf};

use proxy_abi::policy::Direction;
use proxy_abi::{AffinityKey, BackendEntry, DeviceEntry, FrontendEntry, FrontendKey, PortBe, PrefixKey, Proto, Reason};

use super::check::{Check, State};
use super::dry::Expected;
use super::path::{Path, Way};
use super::question::{Kind, Place, Question};
use super::seat::{self, Seat};
use super::service::{self, Frontend};
use super::{model, policy};
use crate::ask::{Answer as Said, AskError, FrontendName, Question as Asking, ask};
use crate::dataplane::dry::DryRun;
use crate::dataplane::pins::{LinkPin, Maps, Pins};
use crate::dataplane::probes::Probes;
use crate::node::netlink::Requests;
use crate::node::way::{BaseChain, Neighbour, chains};
use crate::node::wire::Link;
use crate::trace::hooks::{Family, HookEntry, Inventory, number};
use crate::trace::kernel::Kernel;
use crate::trace::names::Names;
use crate::trace::{TraceError, inventory, monotonic, own_namespace};
use crate::view::explain::{Held, Target, verdicts};

pub mod packet;

/// `NFPROTO_INET`, `NFPROTO_IPV4`, `NFPROTO_IPV6`.
const INET: u8 = 1;
const IPV4: u8 = 2;
const IPV6: u8 = 10;

/// Index of the loopback interface.
const LOOPBACK: u32 = 1;

/// The node as it is now.
#[derive(Debug)]
pub struct Ground<'a> {
    pin_root: &'a FilePath,
    maps: &'a Maps,
    names: &'a Names,
    held: Held,
    links: BTreeMap<u32, Link>,
    pinned: Vec<LinkPin>,
    neighbours: Vec<Neighbour>,
    chains: Vec<BaseChain>,
    /// Functions at FORWARD that are no chains of nftables, for IPv4 and IPv6; `None` where the kernel does not tell.
    forward: Option<[Vec<String>; 2]>,
    devices: BTreeMap<u32, DeviceEntry>,
    requests: Requests,
    /// `None` where the kernel refuses them.
    probes: Option<Probes>,
    /// The programs for a dry run, or why there is none.
    programs: Result<DryRun, String>,
}

/// A number of `/proc/sys/net`.
fn sysctl(name: &str) -> Option<u32> {
    fs::read_to_string(PathBuf::from("/proc/sys/net").join(name)).ok()?.trim().parse().ok()
}

fn functions_at_forward(probes: &mut Probes, kernel: &Kernel) -> Option<[Vec<String>; 2]> {
    // Without the right to load the iterator the rest of the answer stands.
    let all = Inventory::new(&probes.hooks().ok()?, &kernel.symbols);
    let own = all.0.get(&own_namespace())?;
    let of = |family| {
        let entries = own.hooks.get(&(family, number::FWD)).into_iter().flatten();
        let foreign = entries.filter(|entry| {
            !entry.is_passing() && entry.chain.is_none() && !entry.function.starts_with("nft_do_chain")
        });
        foreign.map(HookEntry::name).collect()
    };
    Some([of(Family::Ip), of(Family::Ip6)])
}

impl<'a> Ground<'a> {
    /// Reads what all questions share.
    ///
    /// # Errors
    /// When maps or netlink cannot be read.
    pub fn read(pins: &'a Pins, maps: &'a Maps, names: &'a Names) -> Result<Self, TraceError> {
        let mut requests = Requests::open()?;
        let mut probes = inventory::open().ok();
        let forward = probes.as_mut().and_then(|(probes, kernel)| functions_at_forward(probes, kernel));
        let programs = DryRun::open(pins).map_err(|error| format!("{:#}", anyhow::Error::from(error)));
        Ok(Self {
            pin_root: pins.root(),
            maps,
            names,
            held: Held::read(pins.root(), maps)?,
            links: requests.links()?,
            pinned: pins.list_links()?,
            neighbours: requests.neighbours()?,
            chains: chains()?,
            forward,
            devices: maps.device.read()?.into_iter().collect(),
            requests,
            probes: probes.map(|(probes, _)| probes),
            programs,
        })
    }

    fn device_of(&self, ip: IpAddr) -> Result<Option<(u32, DeviceEntry)>, TraceError> {
        let Some(pod) = self.maps.local_pod.get(&ip.into())? else { return Ok(None) };
        Ok(self.devices.get(&pod.ifindex).map(|device| (pod.ifindex, *device)))
    }

    /// An interface of the node.
    pub fn link(&self, ifindex: u32) -> Option<&Link> {
        self.links.get(&ifindex)
    }

    /// Comes it from outside of the cluster?
    fn is_outside(&self, question: &Question) -> Result<bool, TraceError> {
        let local = PrefixKey::exact(PrefixKey::LOCAL_SOURCE, question.from.ip.into());
        Ok(question.from.kind == Kind::Other && self.maps.prefix.get(&local)?.is_none())
    }

    fn mark(&self, ip: IpAddr) -> Result<u32, TraceError> {
        Ok(self.maps.frontend.get(&FrontendKey::address(ip.into()))?.map_or(0, |entry| entry.flags))
    }

    /// Keys under which the program looks for a Service, in its order.
    fn keys(&self, question: &Question) -> Result<Vec<FrontendKey>, TraceError> {
        let (Some(port), ip) = (question.port, question.to.ip) else { return Ok(Vec::new()) };
        let has_ports = self.mark(ip)? & FrontendEntry::ADDRESS_NODE_PORT != 0;
        let wildcard = has_ports.then(|| FrontendKey::wildcard(ip.is_ipv4()));
        let external = self.is_outside(question)?.then_some(FrontendKey::SCOPE_EXTERNAL);
        let scopes = external.into_iter().chain([FrontendKey::SCOPE_CLUSTER]);
        let key = |ip, scope| FrontendKey { ip, port: PortBe::new(port), proto: question.proto, scope };
        let of_scope = |scope| [Some(ip.into()), wildcard].into_iter().flatten().map(move |ip| key(ip, scope));
        Ok(scopes.flat_map(of_scope).collect())
    }

    /// Does the agent want what the maps have?
    ///
    /// # Errors
    /// When a map cannot be read.
    pub fn model(&self, question: &Question, frontend: Option<&Frontend>) -> Result<Check, TraceError> {
        let name = |key: FrontendKey| {
            let FrontendKey { ip, port, proto, scope } = key;
            FrontendName { ip: ip.into(), port: port.get(), proto: proto.0, scope }
        };
        let keys = self.keys(question)?.into_iter().map(name).collect();
        Ok(match ask(self.pin_root, &Asking::Model(keys)) {
            Ok(Said::Model(told)) => model::check(&told, frontend, self.held.epoch()),
            Ok(_) => model::away("it is of another version"),
            Err(AskError::Away(error)) => model::away(&format!("it does not answer ({error})")),
            Err(error) => model::away(&error.to_string()),
        })
    }

    /// The Service that a question asks for, by the rules of the program; with it what is wrong before that.
    ///
    /// # Errors
    /// When a map cannot be read.
    pub fn frontend(&self, question: &Question) -> Result<(Option<Frontend>, Vec<Check>), TraceError> {
        let Some(port) = question.port else { return Ok((None, Vec::new())) };
        let (maps, ip, outside) = (self.maps, question.to.ip, self.is_outside(question)?);
        let mark = self.mark(ip)?;
        let mut found = None;
        for key in self.keys(question)? {
            found = found.or(maps.frontend.get(&key)?);
        }
        let Some(entry) = found else {
            let unallocated = maps.prefix.get(&PrefixKey::exact(PrefixKey::SERVICE_CIDR, ip.into()))?.is_some();
            let cause = if mark & FrontendEntry::ADDRESS_REJECT != 0 {
                Some(Check::cause(
                    "service",
                    format!("{ip} is a Service's address, which has no port {port} of {}", question.proto),
                    "compare with spec.ports of the Service: `proxy-agent service list`",
                ))
            } else if unallocated {
                Some(Check::cause(
                    "service",
                    format!("{ip} is a cluster address that no Service has"),
                    "an old address in a client's cache? `kubectl get services -A`",
                ))
            } else {
                None
            };
            return Ok((None, cause.into_iter().collect()));
        };
        let mut backends = Vec::new();
        for slot in entry.first..entry.first.saturating_add(entry.count) {
            let backend = maps.slot.get(&slot)?.map(|id| maps.backend.get(&id)).transpose()?.flatten();
            backends.push(backend.filter(|backend| backend.generation != 0));
        }
        let allowed = if outside && entry.flags & FrontendEntry::SOURCE_RANGES != 0 {
            Some(maps.prefix.get(&PrefixKey::exact(entry.service, question.from.ip.into()))?.is_some())
        } else {
            None
        };
        let name = self.names.service(entry.service);
        let address = std::net::SocketAddr::new(ip, port);
        let affinity = self.affinity(&entry, question)?;
        Ok((Some(Frontend { name, address, entry, backends, affinity, allowed }), Vec::new()))
    }

    fn affinity(&self, entry: &FrontendEntry, question: &Question) -> Result<Option<std::net::SocketAddr>, TraceError> {
        if entry.affinity_seconds == 0 || question.from.kind == Kind::Node {
            return Ok(None);
        }
        let key = AffinityKey { service: entry.service, reserved: 0, client: question.from.ip.into() };
        let Some(known) = self.maps.affinity.get(&key)? else { return Ok(None) };
        let age = monotonic().saturating_sub(known.last_used) / 1_000_000_000;
        let set =
            if entry.flags & FrontendEntry::LOCAL_SET != 0 { BackendEntry::IN_LOCAL } else { BackendEntry::IN_CLUSTER };
        let backend = self.maps.backend.get(&known.backend)?;
        let holds = |backend: &BackendEntry| backend.generation == known.generation && backend.flags & set != 0;
        Ok(backend
            .filter(holds)
            .filter(|_| age <= u64::from(entry.affinity_seconds))
            .map(|found| service::address(&found)))
    }

    /// What the policies of both ends say of a flow after translation, each for its direction.
    pub fn policies(&self, question: &Question, to: &Place, port: Option<u16>) -> Vec<(Direction, Check)> {
        let place = |place: &Place| (place.kind != Kind::Node).then_some(place.ip);
        let ends = (place(&question.from), place(to));
        let target = Target::new(port, question.proto);
        let says = match verdicts(self.pin_root, self.maps, &self.held, ends, target) {
            Ok(says) => says,
            Err(error) => {
                return vec![(
                    Direction::Egress,
                    Check::unknown("policy", format!("{error:#}"), "`proxy-agent explain`"),
                )];
            }
        };
        let mut checks = Vec::new();
        for (direction, end, peer) in
            [(Direction::Egress, &question.from, to), (Direction::Ingress, to, &question.from)]
        {
            let check = match (says.iter().find(|say| say.direction == direction), end.kind) {
                (Some(say), _) => policy::check(say, &peer.shown()),
                (None, Kind::Pod) => Check::good(
                    crate::view::explain::word(direction),
                    format!("no policy is in force for {}", end.shown()),
                ),
                (None, Kind::Other) => policy::elsewhere(direction, &end.shown()),
                (None, Kind::Node) => continue,
            };
            checks.push((direction, check));
        }
        checks
    }

    /// May the sender use the source that its packets carry?
    ///
    /// # Errors
    /// When a map cannot be read.
    pub fn source(&self, question: &Question) -> Result<Option<Check>, TraceError> {
        let Some(claims) = question.claims else { return Ok(None) };
        let device = self.device_of(question.from.ip)?.map(|(_, device)| device);
        let slot = device.map_or(0, |device| device.slot);
        Ok(Some(seat::source(&question.from.shown(), claims, device.as_ref(), slot)))
    }

    /// The sender's place.
    ///
    /// # Errors
    /// When a map cannot be read.
    pub fn seat(&self, place: &Place, translated: bool) -> Result<Vec<Check>, TraceError> {
        if place.kind == Kind::Node && translated {
            let name = if place.ip.is_ipv4() { "connect4" } else { "connect6" };
            let attached = self.pinned.contains(&LinkPin::Cgroup(name.to_owned()));
            return Ok(vec![if attached {
                Check::good("programs", format!("{name} is attached to the root cgroup"))
            } else {
                Check::cause("programs", format!("{name} is not attached to the root cgroup"), "is the agent up?")
            }]);
        }
        if place.kind != Kind::Pod {
            return Ok(Vec::new());
        }
        let pod = self.maps.local_pod.get(&place.ip.into())?;
        let ifindex = pod.map_or(0, |pod| pod.ifindex);
        let link = self.links.get(&ifindex);
        let clsact = self.pinned.contains(&LinkPin::Clsact(ifindex));
        let pinned = self.pinned.iter().filter_map(|pin| match pin {
            LinkPin::Tcx(name, on) if *on == ifindex => Some(name.clone()),
            _ => None,
        });
        let programs = if clsact { ["from_pod", "to_pod"].map(str::to_owned).to_vec() } else { pinned.collect() };
        let told = match ask(self.pin_root, &Asking::Pods { names: Vec::new(), ips: vec![place.ip] }) {
            Ok(Said::Pods { found, .. }) => found.first().and_then(|pod| pod.slot),
            // Whether it answers is a check of its own.
            Ok(_) | Err(_) => None,
        };
        let seat = Seat {
            pod: place.shown(),
            ifindex,
            interface: link.map(|link| link.name.to_string()),
            up: link.is_some_and(|link| link.up),
            device: self.devices.get(&ifindex).copied(),
            slot: pod.map(|pod| pod.slot),
            programs,
            told,
        };
        Ok(seat.checks(translated))
    }

    /// The way from the sender to a receiver, which a Service may have chosen.
    ///
    /// # Errors
    /// When the kernel or a map cannot be asked.
    pub fn path(&mut self, question: &Question, to: &Place, frontend: Option<&Frontend>) -> Result<Path, TraceError> {
        let from = &question.from;
        let (sender, receiver) = (self.device_of(from.ip)?, self.device_of(to.ip)?);
        let route = self.requests.way(to.ip, None)?;
        let back = self.requests.way(from.ip, None)?;
        let out = route.ok().filter(|hop| !hop.is_local).map_or(0, |hop| hop.ifindex);
        let on_link = route.is_ok_and(|hop| hop.gateway.is_none());
        let on_pods_bridge = on_link && out != 0 && self.devices.values().any(|device| device.bridge == out);
        let arrives = match (from.kind, sender) {
            (Kind::Pod, Some((_, device))) if device.bridge != 0 => Some(device.bridge),
            (Kind::Pod, Some((ifindex, _))) => Some(ifindex),
            (Kind::Node, _) => None,
            _ => back.ok().map(|hop| hop.ifindex),
        };
        let way = way(from, to, sender, receiver, arrives.filter(|_| on_pods_bridge) == Some(out), frontend);
        let input = match arrives {
            Some(ifindex) if way == Way::Routed => Some(self.requests.way(to.ip, Some((from.ip, ifindex)))?),
            _ => None,
        };
        let next = route.ok().and_then(|hop| hop.gateway).unwrap_or(to.ip);
        let neighbour = self.neighbours.iter().find(|found| found.ip == next && found.ifindex == out);
        let arrives_name = arrives.and_then(|ifindex| self.links.get(&ifindex)).map(|link| link.name.to_string());
        let (forward_name, forwards) = forwarding(to.ip.is_ipv4(), arrives_name.as_deref());
        let filter = |device: &str| sysctl(&format!("ipv4/conf/{device}/rp_filter")).unwrap_or(0);
        let rp_filter = arrives_name.as_deref().map_or(0, |name| filter(name).max(filter("all")));
        let mtu_of = |device: Option<(u32, DeviceEntry)>| {
            device.and_then(|(ifindex, _)| self.links.get(&ifindex)).map_or(0, |link| link.mtu)
        };
        let (v4, own_family, nf) = if to.ip.is_ipv4() {
            (0, IPV4, "bridge/bridge-nf-call-iptables")
        } else {
            (1, IPV6, "bridge/bridge-nf-call-ip6tables")
        };
        let at_forward =
            |chain: &&BaseChain| chain.hook == number::FWD && (chain.family == INET || chain.family == own_family);
        let route_mtu = route.map_or(0, |hop| hop.mtu);
        Ok(Path {
            to: to.ip,
            from: from.ip,
            way,
            arrives,
            forwards,
            forward_name,
            rp_filter: u8::try_from(rp_filter).unwrap_or(u8::MAX),
            back,
            route,
            input,
            neighbour: neighbour.map(|found| found.state),
            on_pods_bridge,
            is_here: receiver.is_some() || to.kind != Kind::Other,
            bridge_nf: sysctl(nf) == Some(1),
            chains: self.chains.iter().filter(at_forward).cloned().collect(),
            others: self.forward.as_ref().and_then(|both| both.get(v4)).cloned(),
            size: question.size.into(),
            mtu: mtu_of(sender),
            next_mtu: match (receiver, route_mtu) {
                (Some(_), _) => mtu_of(receiver),
                (None, 0) => self.links.get(&out).map_or(0, |link| link.mtu),
                (None, mtu) => mtu,
            },
            interfaces: self.links.iter().map(|(ifindex, link)| (*ifindex, link.name.to_string())).collect(),
        })
    }

    /// Where sockets of a place are looked up: the id of its network namespace, and an interface of this one.
    fn namespace(&self, place: &Place) -> Option<(i32, u32)> {
        match place.kind {
            Kind::Node => Some((-1, LOOPBACK)),
            Kind::Pod => {
                let (ifindex, _) = self.device_of(place.ip).ok().flatten()?;
                Some((self.links.get(&ifindex)?.peer_nsid?, ifindex))
            }
            Kind::Other => None,
        }
    }

    /// Is there a socket for the packet?
    pub fn listener(&mut self, question: &Question, to: &Place, port: u16) -> Check {
        let what = "listener";
        let proto = question.proto.to_string().to_lowercase();
        let place = match to.kind {
            Kind::Node => "on the node".to_owned(),
            Kind::Pod => format!("in {}", to.name),
            Kind::Other => format!("at {}", to.ip),
        };
        let by_hand = format!("there: `ss -ln 'sport = :{port}'`");
        let unknown = |why: String| {
            Check::unknown(
                what,
                format!("whether a process listens on {port}/{proto} {place} is not known: {why}"),
                by_hand.clone(),
            )
        };
        if to.kind == Kind::Other {
            return unknown("it is not on this node".to_owned());
        }
        let Some((nsid, ifindex)) = self.namespace(to) else {
            return unknown("its network namespace is not known".to_owned());
        };
        if !matches!(question.proto, Proto::TCP | Proto::UDP) {
            return unknown("the kernel can be asked for TCP and UDP alone".to_owned());
        }
        let Some(probes) = &mut self.probes else { return unknown("the kernel refuses the probes".to_owned()) };
        let from = if question.from_port == 0 { packet::PORTS.start } else { question.from_port };
        let ends = (SocketAddr::new(question.source(), from), SocketAddr::new(to.ip, port));
        match probes.listens(ends, question.proto == Proto::TCP, nsid, ifindex) {
            Ok(true) => Check::good(what, format!("a process listens on {port}/{proto} {place}")),
            Ok(false) => Check::cause(
                what,
                format!("nobody listens on {port}/{proto} {place}, or not on {}", to.ip),
                format!("start the process there, or name the port and address that it has; {by_hand}"),
            ),
            Err(error) => unknown(format!("{:#}", anyhow::Error::from(error))),
        }
    }
}

/// What a check says of a verdict, as a program would give it.
pub fn expected(check: Option<&Check>, reasons: &[Reason], backends: Vec<SocketAddr>) -> Expected {
    match check.map(|check| check.state) {
        Some(State::Cause) => Expected::Drops(reasons.to_vec()),
        Some(State::Unknown) => Expected::Open,
        _ => Expected::Passes(backends),
    }
}

/// The sysctl that decides on forwarding, and what it says.
fn forwarding(v4: bool, arrives: Option<&str>) -> (String, Option<bool>) {
    if !v4 {
        let name = "net.ipv6.conf.all.forwarding".to_owned();
        return (name, sysctl("ipv6/conf/all/forwarding").map(|value| value != 0));
    }
    let whole = sysctl("ipv4/ip_forward").map(|value| value != 0);
    match arrives {
        // It can be switched off for one interface alone.
        Some(device) if whole == Some(true) && sysctl(&format!("ipv4/conf/{device}/forwarding")) == Some(0) => {
            (format!("net.ipv4.conf.{device}.forwarding"), Some(false))
        }
        _ => ("net.ipv4.ip_forward".to_owned(), whole),
    }
}

fn way(
    from: &Place,
    to: &Place,
    sender: Option<(u32, DeviceEntry)>,
    receiver: Option<(u32, DeviceEntry)>,
    same_link: bool,
    frontend: Option<&Frontend>,
) -> Way {
    let (sender, receiver) = (sender.map(|(_, device)| device), receiver.map(|(_, device)| device));
    if to.kind == Kind::Node {
        return Way::ToNode;
    }
    if from.kind == Kind::Node {
        return Way::FromNode;
    }
    let both = |flag| {
        let has = |device: Option<DeviceEntry>| device.is_some_and(|device| device.flags & flag != 0);
        (has(sender) || sender.is_none()) && has(receiver)
    };
    let one_bridge = match (sender, receiver) {
        (Some(a), Some(b)) => a.bridge == b.bridge && a.bridge != 0,
        (Some(_), None) => same_link,
        _ => false,
    };
    match frontend {
        Some(_) if from.ip == to.ip || both(DeviceEntry::REDIRECT) => Way::Redirected,
        Some(_) if one_bridge && both(DeviceEntry::SWITCH) => Way::Switched,
        Some(frontend) if receiver.is_none() => {
            let outside = if from.kind == Kind::Other { FrontendEntry::MASQUERADE_OUTSIDE } else { 0 };
            let masqueraded = frontend.entry.flags & (FrontendEntry::MASQUERADE | outside) != 0;
            if masqueraded { Way::Below } else { Way::Routed }
        }
        None if one_bridge => Way::Switched,
        _ => Way::Routed,
    }
}
