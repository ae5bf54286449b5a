//! What the kernel does with the packet once policy and Services have said their part: sysctls, route, neighbour,
//! FORWARD chains, MTU.

use std::collections::BTreeMap;
use std::net::IpAddr;

use nix::errno::Errno;

use super::check::Check;
use crate::node::way::{BaseChain, Hop, NeighbourState};

/// By which way it goes through the node.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Way {
    /// From veth to veth by our program.
    Redirected,
    /// By the bridge.
    Switched,
    /// Through the IP stack.
    Routed,
    /// By the route, past the stack's hooks: masqueraded.
    Below,
    /// Sent by the node itself.
    FromNode,
    /// To the node itself.
    ToNode,
}

/// What was found of it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Path {
    /// Receiver after translation.
    pub to: IpAddr,
    /// Sender.
    pub from: IpAddr,
    /// How it goes.
    pub way: Way,
    /// Interface at which the stack sees it come in, where there is one.
    pub arrives: Option<u32>,
    /// Is forwarding on, for this family and interface? `None` where it cannot be read.
    pub forwards: Option<bool>,
    /// The sysctl that says so.
    pub forward_name: String,
    /// Reverse path filter at that interface: 0 off, 1 strict, 2 loose.
    pub rp_filter: u8,
    /// Where the way back to the sender leads.
    pub back: Result<Hop, Errno>,
    /// Where the receiver is, for a packet of the node.
    pub route: Result<Hop, Errno>,
    /// The same for a packet that came in there; `None` where none does.
    pub input: Option<Result<Hop, Errno>>,
    /// What is known of the next hop's MAC.
    pub neighbour: Option<NeighbourState>,
    /// The receiver is on a bridge of pods, where every receiver is known.
    pub on_pods_bridge: bool,
    /// The receiver is a pod of this node, or the node.
    pub is_here: bool,
    /// The bridge hands frames to the hooks of IP.
    pub bridge_nf: bool,
    /// Chains of nftables at FORWARD for this family.
    pub chains: Vec<BaseChain>,
    /// Whoever else is at FORWARD; `None` where the kernel does not tell.
    pub others: Option<Vec<String>>,
    /// Bytes of the packet from its IP header on; 0 = few.
    pub size: u32,
    /// MTU of the sender's link; 0 where it is not known.
    pub mtu: u32,
    /// MTU of the link that it leaves by; 0 where it is not known.
    pub next_mtu: u32,
    /// Names of interfaces.
    pub interfaces: BTreeMap<u32, String>,
}

impl Path {
    fn interface(&self, ifindex: u32) -> String {
        self.interfaces.get(&ifindex).cloned().unwrap_or_else(|| format!("interface {ifindex}"))
    }

    /// In the order in which a packet meets them.
    pub fn checks(&self) -> Vec<Check> {
        let mut checks = Vec::new();
        match self.way {
            Way::Redirected => checks.push(Check::good("way", "from veth to veth, past bridge, stack and netfilter")),
            Way::Switched => checks.push(Check::good("way", "by the bridge")),
            Way::Routed => checks.push(Check::good("way", "through the node's IP stack")),
            Way::Below => checks.push(Check::good("way", "masqueraded, by the route and past netfilter")),
            Way::FromNode => checks.push(Check::good("way", "sent by the node")),
            Way::ToNode => checks.push(Check::good("way", "to the node itself")),
        }
        if matches!(self.way, Way::Routed | Way::Below) {
            checks.push(self.forwarding());
            checks.extend(self.reverse());
        }
        if matches!(self.way, Way::Routed | Way::Below | Way::FromNode) {
            checks.push(self.routing());
        }
        if !matches!(self.way, Way::Redirected | Way::ToNode) {
            checks.extend(self.neighbouring());
        }
        if self.way == Way::Routed || self.way == Way::Switched && self.bridge_nf {
            checks.extend(self.netfilter());
        }
        checks.extend(self.size());
        checks
    }

    fn forwarding(&self) -> Check {
        let name = &self.forward_name;
        match self.forwards {
            Some(true) => Check::good("forwarding", format!("{name} is 1")),
            Some(false) => Check::cause(
                "forwarding",
                format!("{name} is 0: the node does not forward packets of pods"),
                format!("sysctl -w {name}=1, and make it last in /etc/sysctl.d"),
            ),
            None => Check::unknown("forwarding", format!("{name} cannot be read"), format!("sysctl {name}")),
        }
    }

    fn reverse(&self) -> Option<Check> {
        let arrives = self.arrives.filter(|_| self.rp_filter == 1 && self.to.is_ipv4())?;
        let device = self.interface(arrives);
        match self.back {
            Ok(hop) if hop.ifindex == arrives => {
                Some(Check::good("rp_filter", format!("strict at {device}; the way back leads there")))
            }
            Ok(hop) => Some(Check::cause(
                "rp_filter",
                format!(
                    "strict at {device}, but the way back to {} leads out of {}",
                    self.from,
                    self.interface(hop.ifindex)
                ),
                format!(
                    "mend the route, or sysctl -w net.ipv4.conf.{device}.rp_filter=2 (the larger of it and `all` counts)"
                ),
            )),
            Err(_) => Some(Check::cause(
                "rp_filter",
                format!("strict at {device}, and there is no way back to {}", self.from),
                format!("add a route to {}", self.from),
            )),
        }
    }

    fn routing(&self) -> Check {
        let Self { to, from, route, input, .. } = self;
        let lookup = format!("ip route get {to}");
        match input.unwrap_or(*route) {
            Ok(hop) if hop.is_refused => {
                Check::cause("route", format!("the route to {to} refuses: blackhole, unreachable or prohibit"), lookup)
            }
            Ok(hop) if hop.is_local => Check::good("route", format!("{to} is this node")),
            Ok(hop) => {
                let by = hop.gateway.map(|gateway| format!("by {gateway}, ")).unwrap_or_default();
                Check::good("route", format!("{by}out of {}", self.interface(hop.ifindex)))
            }
            Err(errno) if input.is_some() && route.is_ok() => {
                let device = self.arrives.map(|ifindex| self.interface(ifindex)).unwrap_or_default();
                Check::cause(
                    "route",
                    format!("a packet from {from} that comes in by {device} is not routed to {to}: {}", errno.desc()),
                    format!("{lookup} from {from} iif {device}"),
                )
            }
            Err(errno) => Check::cause(
                "route",
                format!("no route to {to}: {}", errno.desc()),
                format!("add one; `{lookup}` and `ip rule` show what there is"),
            ),
        }
    }

    fn neighbouring(&self) -> Option<Check> {
        let hop = self.route.ok().filter(|hop| !hop.is_local)?;
        let (next, device) = (hop.gateway.unwrap_or(self.to), self.interface(hop.ifindex));
        let ask =
            format!("is {next} up and on the link of {device}? `ip neigh show {next}`, `arping -I {device} {next}`");
        let silent = |found: String| Some(Check::cause("neighbour", found, ask.clone()));
        match self.neighbour {
            Some(NeighbourState::Failed) => silent(format!("nobody answers for {next} on {device}")),
            Some(NeighbourState::Known) => Some(Check::good("neighbour", format!("{next} is known on {device}"))),
            _ if self.is_here => Some(Check::good("neighbour", format!("{next} is a pod of this node"))),
            _ if self.on_pods_bridge => {
                silent(format!("no pod of this node has {next}, and nobody else on {device} has answered for it"))
            }
            Some(NeighbourState::Asked) => Some(Check::note(
                "neighbour",
                format!("{next} has been asked for on {device} and has not answered yet"),
                ask,
            )),
            None => Some(Check::unknown("neighbour", format!("{next} has not been asked for on {device} lately"), ask)),
        }
    }

    fn netfilter(&self) -> Vec<Check> {
        let mut checks = Vec::new();
        for chain in &self.chains {
            let family = match chain.family {
                2 => "ip",
                10 => "ip6",
                _ => "inet",
            };
            let list = format!("{family} {}", chain.name.replace('/', " "));
            let rules = if chain.rules == 1 { "1 rule".to_owned() } else { format!("{} rules", chain.rules) };
            let what = "netfilter";
            checks.push(match (chain.drops, chain.rules) {
                (true, 0) => Check::cause(
                    what,
                    format!("the chain {} at FORWARD drops everything: policy drop, no rule", chain.name),
                    format!("accept pods' traffic there, or `nft add chain {list} '{{ policy accept; }}'` (iptables -P FORWARD ACCEPT)"),
                ),
                (true, _) => Check::unknown(
                    what,
                    format!("the chain {} at FORWARD drops what none of its {rules} accepts", chain.name),
                    format!("`nft list ruleset` and look at chain {list}: is there a rule that accepts this packet?"),
                ),
                (false, 0) => Check::good(what, format!("the chain {} at FORWARD accepts", chain.name)),
                (false, _) => Check::note(
                    what,
                    format!("{rules} of the chain {} at FORWARD look at it", chain.name),
                    "`nft list ruleset`",
                ),
            });
        }
        match &self.others {
            None => checks.push(Check::unknown(
                "netfilter",
                "the kernel does not tell who is at FORWARD",
                "`trace doctor`, `iptables-save`",
            )),
            Some(others) if !others.is_empty() => checks.push(Check::note(
                "netfilter",
                format!("at FORWARD there is {}", others.join(", ")),
                "`iptables-save -c`",
            )),
            Some(_) if checks.is_empty() => checks.push(Check::good("netfilter", "nothing is at FORWARD")),
            Some(_) => {}
        }
        checks
    }

    fn size(&self) -> Option<Check> {
        let Self { mtu, next_mtu: next, size, .. } = *self;
        if self.way == Way::ToNode || next == 0 {
            return None;
        }
        let fix = "make the MTUs equal, or let ICMP (type 3 code 4; ICMPv6 type 2) reach the sender, which then sends smaller ones";
        let out = self.route.ok().map(|hop| self.interface(hop.ifindex)).unwrap_or_default();
        let bytes = |size: u32| format!("{size} bytes");
        Some(match size {
            _ if size > next => Check::cause(
                "mtu",
                format!("{} do not fit: the next link ({out}) carries {next}, the sender's {mtu}", bytes(size)),
                fix,
            ),
            0 if next < mtu => Check::note(
                "mtu",
                format!(
                    "the next link ({out}) carries {}, the sender's {mtu}: larger packets are refused",
                    bytes(next)
                ),
                fix,
            ),
            0 => Check::good("mtu", format!("{} fit", bytes(next))),
            _ => Check::good("mtu", format!("{} fit into {next}", bytes(size))),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::super::check::State;
    use super::*;

    const ON_LINK: Hop = Hop { ifindex: 2, gateway: None, is_local: false, is_refused: false, mtu: 0 };

    fn path() -> Path {
        Path {
            to: [10, 2, 0, 3].into(),
            from: [10, 1, 0, 2].into(),
            way: Way::Routed,
            arrives: Some(3),
            forwards: Some(true),
            forward_name: "net.ipv4.ip_forward".to_owned(),
            rp_filter: 1,
            back: Ok(Hop { ifindex: 3, ..ON_LINK }),
            route: Ok(ON_LINK),
            input: Some(Ok(ON_LINK)),
            neighbour: Some(NeighbourState::Known),
            on_pods_bridge: false,
            is_here: false,
            bridge_nf: false,
            chains: Vec::new(),
            others: Some(Vec::new()),
            size: 0,
            mtu: 1500,
            next_mtu: 1500,
            interfaces: [(2, "eth0".to_owned()), (3, "cni0".to_owned())].into(),
        }
    }

    fn chain(drops: bool, rules: u32) -> Vec<BaseChain> {
        vec![BaseChain { name: "filter/FORWARD".to_owned(), family: 1, hook: 2, drops, rules }]
    }

    #[test]
    fn each_obstacle_is_found_and_nothing_else() {
        let bad = |path: &Path| -> Vec<(&'static str, State)> {
            let all = path.checks().into_iter().map(|check| (check.what, check.state));
            all.filter(|(_, state)| *state != State::Good).collect()
        };
        let cause = |what| vec![(what, State::Cause)];
        let cases = [
            (path(), vec![]),
            (Path { forwards: Some(false), ..path() }, cause("forwarding")),
            (Path { forwards: Some(false), way: Way::Switched, ..path() }, vec![]),
            (Path { back: Ok(ON_LINK), ..path() }, cause("rp_filter")),
            (Path { back: Ok(ON_LINK), rp_filter: 2, ..path() }, vec![]),
            (Path { back: Err(Errno::ENETUNREACH), ..path() }, cause("rp_filter")),
            (Path { route: Err(Errno::ENETUNREACH), input: Some(Err(Errno::EHOSTUNREACH)), ..path() }, cause("route")),
            (Path { input: Some(Err(Errno::EINVAL)), ..path() }, cause("route")),
            (Path { input: Some(Ok(Hop { is_refused: true, ..ON_LINK })), ..path() }, cause("route")),
            (Path { neighbour: Some(NeighbourState::Failed), ..path() }, cause("neighbour")),
            (Path { neighbour: None, ..path() }, vec![("neighbour", State::Unknown)]),
            (Path { neighbour: None, on_pods_bridge: true, ..path() }, cause("neighbour")),
            (Path { neighbour: None, is_here: true, on_pods_bridge: true, ..path() }, vec![]),
            (Path { chains: chain(true, 0), ..path() }, cause("netfilter")),
            (Path { chains: chain(true, 2), ..path() }, vec![("netfilter", State::Unknown)]),
            (Path { chains: chain(false, 2), ..path() }, vec![("netfilter", State::Note)]),
            (Path { chains: chain(false, 0), ..path() }, vec![]),
            (Path { chains: chain(true, 0), way: Way::Switched, ..path() }, vec![]),
            (Path { chains: chain(true, 0), way: Way::Switched, bridge_nf: true, ..path() }, cause("netfilter")),
            (Path { chains: chain(true, 0), way: Way::Below, ..path() }, vec![]),
            (Path { others: None, ..path() }, vec![("netfilter", State::Unknown)]),
            (Path { next_mtu: 1280, ..path() }, vec![("mtu", State::Note)]),
            (Path { next_mtu: 1280, size: 1280, ..path() }, vec![]),
            (Path { next_mtu: 1280, size: 1281, ..path() }, cause("mtu")),
        ];
        for (n, (path, expected)) in cases.into_iter().enumerate() {
            assert_eq!(bad(&path), expected, "case {n}");
        }
    }
}
