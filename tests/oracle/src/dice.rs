//! Random clusters, small so that their objects meet, and random changes of them.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::sync::Arc;

use fastrand::Rng;
use proxy_core::name::ObjectName;
use proxy_core::netpol::spec::{
    BlockSpec, Change, Container, ContainerPort, ExpressionSpec, Labels, Namespace, PeerSpec, Pod, PolicySpec,
    PortNumber, PortSpec, RuleSpec, SelectorSpec,
};

use crate::verdict::{Cluster, Oracle, Side};

/// How often to throw, or where to begin: a number from the environment, which may have underscores.
pub fn number(name: &str, otherwise: u64) -> u64 {
    std::env::var(name).ok().and_then(|text| text.replace('_', "").parse().ok()).unwrap_or(otherwise)
}

/// This node in every random cluster.
pub const NODE: &str = "node-1";
const NODES: [&str; 2] = [NODE, "node-2"];
const NAMESPACES: [&str; 4] = ["w", "x", "y", "z"];
const PODS: usize = 9;
const POLICIES: usize = 10;
/// Addresses of pods, of each family.
const ADDRESSES: u8 = 9;
const NUMBERS: [u16; 9] = [1, 53, 79, 80, 81, 443, 8079, 8080, 65_535];
const V4: [&str; 14] = [
    "0.0.0.0/0",
    "10.0.0.0/8",
    "10.244.0.0/16",
    "10.244.0.0/29",
    "10.244.0.5/29",
    "10.244.0.4/31",
    "10.244.0.3/32",
    "010.244.0.08/30",
    "10.9.9.9/8",
    "172.18.0.0/24",
    "172.18.0.1/32",
    "8.8.8.0/24",
    "0.0.0.0/1",
    "bogus/8",
];
const V6: [&str; 8] =
    ["::/0", "fd00::/64", "fd00::4/126", "fd00::7/126", "fd00::3/128", "fc00:f853::/32", "2001:db8::/32", "::/1"];

/// Throws.
#[derive(Clone, Debug)]
pub struct Dice {
    rng: Rng,
    uid: u64,
}

impl Dice {
    /// The same throws for the same seed.
    pub fn new(seed: u64) -> Self {
        Self { rng: Rng::with_seed(seed), uid: 0 }
    }

    /// True in so many of a hundred throws.
    pub fn chance(&mut self, percent: u8) -> bool {
        self.rng.u8(..100) < percent
    }

    /// A number below.
    pub fn below(&mut self, end: usize) -> usize {
        self.rng.usize(..end)
    }

    fn pick<'a, T: ?Sized>(&mut self, from: &[&'a T]) -> &'a T {
        from[self.rng.usize(..from.len())]
    }

    /// So many things, or fewer.
    fn some<T>(&mut self, most: usize, mut make: impl FnMut(&mut Self) -> T) -> Vec<T> {
        let count = self.rng.usize(..=most);
        (0..count).map(|_| make(self)).collect()
    }

    /// A cluster, as the changes that make it.
    pub fn cluster(&mut self) -> Vec<Change> {
        let mut changes = Vec::new();
        for name in NAMESPACES {
            if self.chance(90) {
                changes.push(Change::Namespace(self.namespace(name)));
            }
        }
        changes.extend((0..PODS).map(|n| Change::Pod(self.pod(n))));
        for n in 0..POLICIES {
            if self.chance(60) {
                changes.push(Change::Policy(self.policy(n)));
            }
        }
        self.rng.shuffle(&mut changes);
        changes
    }

    /// A change, or a few at once.
    pub fn edit(&mut self, cluster: &Cluster) -> Vec<Change> {
        let count = if self.chance(75) { 1 } else { 2 + self.rng.usize(..3) };
        (0..count).map(|_| self.change(cluster)).collect()
    }

    fn change(&mut self, cluster: &Cluster) -> Change {
        let names: Vec<_> = cluster.pods.keys().collect();
        match self.rng.u8(..20) {
            0..=3 => {
                let n = self.rng.usize(..PODS);
                Change::Pod(self.pod(n))
            }
            4..=7 if !names.is_empty() => {
                let mut pod = cluster.pods[names[self.rng.usize(..names.len())]].clone();
                match self.rng.u8(..6) {
                    0..=2 => pod.labels = self.labels(),
                    3 => pod.finished = !pod.finished,
                    4 => pod.deleting = !pod.deleting,
                    _ => pod.ips = self.ips(),
                }
                Change::Pod(pod)
            }
            8 if !names.is_empty() => Change::PodGone(names[self.rng.usize(..names.len())].clone()),
            9 | 10 => {
                let name = self.pick(&NAMESPACES);
                Change::Namespace(self.namespace(name))
            }
            11 => Change::NamespaceGone(self.pick(&NAMESPACES).into()),
            12..=14 => {
                let live: Vec<_> =
                    cluster.policies.iter().filter(|(_, (_, deleted))| !deleted).map(|(n, _)| n).collect();
                match live.get(self.rng.usize(..POLICIES)) {
                    Some(name) => Change::PolicyGone((*name).clone()),
                    None => Change::PolicyGone(ObjectName::new("w", "none")),
                }
            }
            _ => {
                let n = self.rng.usize(..POLICIES);
                Change::Policy(self.policy(n))
            }
        }
    }

    fn labels(&mut self) -> Labels {
        let mut labels = Labels::new();
        for key in ["app", "tier", "env"] {
            if self.chance(60) {
                labels.insert(key.into(), self.pick(&["a", "b", "c"]).into());
            }
        }
        labels
    }

    fn namespace(&mut self, name: &str) -> Namespace {
        let mut labels = self.labels();
        labels.insert("kubernetes.io/metadata.name".into(), name.into());
        Namespace { name: name.into(), labels, terminating: self.chance(20) }
    }

    fn ips(&mut self) -> Vec<IpAddr> {
        let n = self.rng.u8(1..=ADDRESSES);
        let (v4, v6) = (pod_ip(n, false), pod_ip(n, true));
        match self.rng.u8(..10) {
            0 => vec![],
            1 => vec![v4],
            2 => vec![v6],
            _ => vec![v4, v6],
        }
    }

    fn pod(&mut self, n: usize) -> Pod {
        let host_network = self.chance(8);
        let node = if self.chance(60) { Some(NODE) } else { self.pick(&[&Some(NODES[1]), &None]).as_deref() };
        self.uid += 1;
        let uid = if self.chance(50) { n as u64 } else { 100 + self.uid };
        let ips = if host_network { node_ips(node.unwrap_or(NODE)) } else { self.ips() };
        Pod {
            name: ObjectName::new(NAMESPACES[n % NAMESPACES.len()], format!("pod-{n}")),
            uid: format!("uid-{uid}-{n}").into(),
            labels: self.labels(),
            node: node.map(Into::into),
            host_network,
            finished: self.chance(8),
            deleting: self.chance(10),
            socket_lb: true,
            created: self.rng.u64(..4),
            ips,
            ports: self.some(4, Self::container_port),
        }
    }

    fn protocol(&mut self) -> Option<Arc<str>> {
        let names = [None, Some("TCP"), Some("TCP"), Some("UDP"), Some("SCTP")];
        let name = if self.chance(3) { Some("QUIC") } else { names[self.rng.usize(..names.len())] };
        name.map(Into::into)
    }

    fn container_port(&mut self) -> ContainerPort {
        ContainerPort {
            name: self.pick(&["http", "http", "dns"]).into(),
            protocol: self.protocol(),
            port: NUMBERS[1 + self.rng.usize(..5)],
            container: [Container::Main, Container::Main, Container::Sidecar, Container::Init][self.rng.usize(..4)],
        }
    }

    fn selector(&mut self) -> SelectorSpec {
        let mut selector = SelectorSpec::default();
        if self.chance(30) {
            return selector;
        }
        if self.chance(60) {
            selector.labels.insert(self.pick(&["app", "tier", "env"]).into(), self.pick(&["a", "b", "c"]).into());
        }
        selector.expressions = self.some(2, |dice| {
            let operator = match dice.rng.u8(..40) {
                0 => "Near",
                1..=12 => "In",
                13..=25 => "NotIn",
                26..=32 => "Exists",
                _ => "DoesNotExist",
            };
            let valued = operator == "In" || operator == "NotIn";
            let mut values: Vec<Arc<str>> = if valued { vec![dice.pick(&["a", "b", "c"]).into()] } else { vec![] };
            if valued && dice.chance(40) {
                values.push(dice.pick(&["a", "b", "c"]).into());
            }
            if dice.chance(2) {
                values = if valued { vec![] } else { vec!["a".into()] };
            }
            ExpressionSpec { key: dice.pick(&["app", "tier", "env"]).into(), operator: operator.into(), values }
        });
        selector
    }

    fn audit(&mut self) -> Option<Arc<str>> {
        let text = match self.rng.u8(..20) {
            0..=3 => "true",
            4 => "false",
            5 => "True",
            _ => return None,
        };
        Some(text.into())
    }

    fn policy(&mut self, n: usize) -> PolicySpec {
        let types: Option<&[&str]> = match self.rng.u8(..20) {
            0..=6 => None,
            7 => Some(&[]),
            8..=10 => Some(&["Ingress"]),
            11..=13 => Some(&["Egress"]),
            14 => Some(&["Sideways"]),
            _ => Some(&["Ingress", "Egress"]),
        };
        PolicySpec {
            name: ObjectName::new(NAMESPACES[n * NAMESPACES.len() / POLICIES], format!("policy-{n}")),
            audit: self.audit(),
            pod_selector: if self.chance(10) { None } else { Some(self.selector()) },
            policy_types: types.map(|types| types.iter().map(|t| (*t).into()).collect()),
            ingress: self.rules(),
            egress: self.rules(),
        }
    }

    fn list<T>(&mut self, absent: u8, empty: u8, make: impl FnMut(&mut Self) -> T) -> Option<Vec<T>> {
        match self.rng.u8(..100) {
            throw if throw < absent => None,
            throw if throw < absent + empty => Some(Vec::new()),
            _ => {
                let mut list = self.some(2, make);
                list.truncate(3);
                Some(list)
            }
        }
    }

    fn rules(&mut self) -> Option<Vec<RuleSpec>> {
        self.list(15, 10, |dice| RuleSpec { peers: dice.list(12, 8, Self::peer), ports: dice.list(25, 8, Self::port) })
    }

    fn peer(&mut self) -> PeerSpec {
        let mut peer = PeerSpec::default();
        match self.rng.u8(..40) {
            0..=9 => peer.pods = Some(self.selector()),
            10..=17 => peer.namespaces = Some(self.selector()),
            18..=25 => (peer.pods, peer.namespaces) = (Some(self.selector()), Some(self.selector())),
            26 => {}
            27 => (peer.pods, peer.block) = (Some(self.selector()), Some(self.block())),
            _ => peer.block = Some(self.block()),
        }
        peer
    }

    fn block(&mut self) -> BlockSpec {
        let ranges: &[&str] = if self.chance(60) { &V4 } else { &V6 };
        let cidr = self.pick(ranges).into();
        let except = if self.chance(50) { self.some(2, |dice| dice.pick(ranges).into()) } else { Vec::new() };
        BlockSpec { cidr, except }
    }

    fn port(&mut self) -> PortSpec {
        let number = |dice: &mut Self| match dice.rng.u8(..40) {
            0 => 0,
            1 => 70_000,
            _ => i32::from(NUMBERS[dice.rng.usize(..NUMBERS.len())]),
        };
        let port = match self.rng.u8(..10) {
            0 => None,
            1..=3 => Some(PortNumber::Name(self.pick(&["http", "dns", "none"]).into())),
            _ => Some(PortNumber::Number(number(self))),
        };
        let ranged = match port {
            Some(PortNumber::Number(_)) => self.chance(30),
            _ => self.chance(3),
        };
        PortSpec { protocol: self.protocol(), port, end_port: ranged.then(|| number(self)) }
    }

    /// A few sides of flows of a pod: some peers, each with some protocols and ports.
    pub fn sides(&mut self, pod: &Pod, peers: usize, ports: usize) -> Vec<Side> {
        let mut sides = Vec::new();
        for _ in 0..peers {
            let peer = match self.rng.u8(..10) {
                0..=6 => pod_ip(self.rng.u8(1..=ADDRESSES), self.rng.bool()),
                7 => {
                    let ips = node_ips(self.pick(&NODES));
                    ips[self.rng.usize(..ips.len())]
                }
                _ => {
                    *self.pick(&[&ip("8.8.8.8"), &ip("10.0.0.9"), &ip("2001:db8::9"), &ip("fe80::1"), &ip("192.0.2.1")])
                }
            };
            let from_node = node_ips(NODE).contains(&peer) && self.rng.bool();
            for _ in 0..ports {
                let number = NUMBERS[self.rng.usize(..NUMBERS.len())];
                let (proto, port) = match self.rng.u8(..20) {
                    0..=9 => (6, Some(number)),
                    10..=13 => (17, Some(number)),
                    14..=16 => (132, Some(number)),
                    17 => ([1, 58, 47][self.rng.usize(..3)], Some(0)),
                    _ => ([6, 17, 132][self.rng.usize(..3)], None),
                };
                let hairpin = pod.ips.contains(&peer);
                let side = Side { ingress: true, peer, proto, port, source_port: 443, from_node, hairpin };
                sides.extend([side, Side { ingress: false, ..side }]);
            }
        }
        sides
    }
}

impl Cluster {
    /// Empty, seen from [`NODE`].
    pub fn empty() -> Self {
        let node_ips = NODES.iter().flat_map(|node| node_ips(node)).collect();
        Self { node: NODE.into(), node_ips, ..Self::default() }
    }

    /// Takes a change.
    pub fn apply(&mut self, change: Change) {
        match change {
            Change::Namespace(object) => drop(self.namespaces.insert(Arc::clone(&object.name), object)),
            Change::NamespaceGone(name) => drop(self.namespaces.remove(&name)),
            Change::Pod(pod) => drop(self.pods.insert(pod.name.clone(), pod)),
            Change::PodGone(name) => drop(self.pods.remove(&name)),
            Change::Policy(policy) => drop(self.policies.insert(policy.name.clone(), (policy, false))),
            Change::PolicyGone(name) => {
                if let Some((_, deleted)) = self.policies.get_mut(&name) {
                    *deleted = true;
                }
            }
        }
        let oracle = Oracle { cluster: self, broken: None };
        let over = |(name, (_, deleted)): (&ObjectName, &(PolicySpec, bool))| {
            (*deleted && !oracle.holds(&name.namespace)).then(|| name.clone())
        };
        let over: Vec<_> = self.policies.iter().filter_map(over).collect();
        for name in &over {
            self.policies.remove(name);
        }
    }

    /// Pods of this node that count.
    pub fn subjects(&self) -> impl Iterator<Item = &Pod> {
        self.pods.values().filter(|pod| pod.node.as_ref() == Some(&self.node) && !pod.host_network && !pod.finished)
    }
}

fn ip(text: &str) -> IpAddr {
    text.parse().unwrap_or(IpAddr::V4(Ipv4Addr::UNSPECIFIED))
}

/// The address of a pod by number.
pub fn pod_ip(n: u8, v6: bool) -> IpAddr {
    if v6 {
        IpAddr::V6(Ipv6Addr::new(0xfd00, 0, 0, 0, 0, 0, 0, n.into()))
    } else {
        IpAddr::V4(Ipv4Addr::new(10, 244, 0, n))
    }
}

/// The addresses of a node.
pub fn node_ips(node: &str) -> Vec<IpAddr> {
    if node == NODE { vec![ip("172.18.0.1"), ip("fc00:f853::1")] } else { vec![ip("172.18.0.2"), ip("fc00:f853::2")] }
}
