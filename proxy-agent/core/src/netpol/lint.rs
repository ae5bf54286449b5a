//! Policies that can be read and yet do not do what somebody meant, as far as the cluster tells.
//!
//! ```text
//!   objects of the whole cluster ─▶ who is selected, which peers and ports there are ─┐
//!                                                                                     ├─▶ findings, by policy
//!   sets in force on this node, and their cells ─▶ rules that add nothing ────────────┘
//! ```
//!
//! Findings are about this moment: pods that will come may make them void. A rule that adds nothing is told of when that is
//! so for every pod of this node that it is for. A block of length 0 means everybody on purpose, pods too.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::sync::Arc;

use ipnet::IpNet;
use proxy_abi::Proto;
use proxy_abi::policy::Direction;

use super::block::IpBlock;
use super::engine::{Engine, Limits};
use super::partition::Kind;
use super::policy::{Namespaces, Peer, Peers, Policy, Port, PortName, PortRange, Ports, Rule};
use super::predicate::{Predicate, Question, exposed};
use super::rules::{Line, Origin, PeerTest, RuleSet};
use super::spec::{Change, Labels, Pod, PolicySpec};
use super::tables::PolicyTables;
use super::world::World;
use crate::name::ObjectName;

/// One finding.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Finding {
    /// Policy.
    pub policy: ObjectName,
    /// Which of its rules; `None` = the policy as a whole.
    pub rule: Option<(Direction, usize)>,
    /// What is the matter.
    pub flaw: Flaw,
}

/// What is the matter with a policy or rule. Peers and blocks are in words.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, thiserror::Error)]
pub enum Flaw {
    /// A part of it cannot be read.
    #[error("{field}: {problem}")]
    Unreadable {
        /// Path.
        field: String,
        /// What is wrong.
        problem: String,
        /// What becomes of it.
        effect: String,
    },
    /// It is for nobody.
    #[error("it is for {subject}, and the namespace has none")]
    SelectsNobody {
        /// The selector, in words.
        subject: String,
    },
    /// Pods in the node's network have no policy.
    #[error("it is for {count} hostNetwork pods too, such as {example}, and has no effect on them")]
    HostNetwork {
        /// How many.
        count: usize,
        /// One of them.
        example: ObjectName,
    },
    /// The rule allows nothing.
    #[error("it allows nothing: {peers} are no pods of the cluster")]
    NoPeer {
        /// The peers, in words.
        peers: String,
    },
    /// A peer that adds nothing to the rule.
    #[error("its peer \"{peer}\" is no pod of the cluster")]
    PeerMatchesNobody {
        /// The peer, in words.
        peer: String,
    },
    /// No pod that the rule leads to gives the name to a port.
    #[error("no pod that it leads to calls a {} port {:?}{}", .name.proto, .name.name, Elsewhere(.elsewhere))]
    PortName {
        /// The name.
        name: PortName,
        /// Protocols under which such pods have a port of this name.
        elsewhere: Vec<Proto>,
    },
    /// Pods come and go in a range of addresses.
    #[error("its range {net} holds addresses of pods, such as {ip} of {pod}")]
    BlockOfPods {
        /// The range.
        net: IpNet,
        /// An address in it.
        ip: IpAddr,
        /// Whose it is.
        pod: ObjectName,
    },
    /// All of a range is excepted.
    #[error("nothing is left of its range {net}: `except` takes all of it")]
    EmptyBlock {
        /// The range.
        net: IpNet,
    },
    /// Another rule of the pods that it is for allows all that it allows.
    #[error("it allows nothing that {} {} does not allow", .by.policy, rule_name(*.direction, .by.rule))]
    Shadowed {
        /// Direction of both.
        direction: Direction,
        /// The other rule.
        by: Origin,
    },
}

/// Protocols that have the name instead.
struct Elsewhere<'a>(&'a [Proto]);

impl std::fmt::Display for Elsewhere<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        if self.0.is_empty() {
            return Ok(());
        }
        let protocols: Vec<_> = self.0.iter().map(ToString::to_string).collect();
        write!(f, "; there is one of {}", protocols.join(" and "))
    }
}

/// `ingress[0]`.
pub fn rule_name(direction: Direction, index: usize) -> String {
    match direction {
        Direction::Ingress => format!("ingress[{index}]"),
        Direction::Egress => format!("egress[{index}]"),
    }
}

impl Flaw {
    /// Its name, for programs.
    pub const fn name(&self) -> &'static str {
        match self {
            Self::Unreadable { .. } => "unreadable",
            Self::SelectsNobody { .. } => "selects-nobody",
            Self::HostNetwork { .. } => "host-network",
            Self::NoPeer { .. } => "no-peer",
            Self::PeerMatchesNobody { .. } => "peer-matches-nobody",
            Self::PortName { .. } => "port-name",
            Self::BlockOfPods { .. } => "block-of-pods",
            Self::EmptyBlock { .. } => "empty-block",
            Self::Shadowed { .. } => "shadowed",
        }
    }

    /// What to do about it.
    pub fn fix(&self) -> String {
        match self {
            Self::Unreadable { effect, .. } => format!("mend it: {effect}"),
            Self::SelectsNobody { .. } => "compare podSelector with the pods' labels, or remove the policy".to_owned(),
            Self::HostNetwork { .. } => "they are the node: keep traffic from them by its own firewall".to_owned(),
            Self::NoPeer { .. } | Self::PeerMatchesNobody { .. } => {
                "compare the selectors with the labels of pods and namespaces; hostNetwork pods are their node, which \
                 an ipBlock names"
                    .to_owned()
            }
            Self::PortName { elsewhere, .. } if elsewhere.is_empty() => {
                "give the number, or the name that the containers have for the port".to_owned()
            }
            Self::PortName { .. } => "give the protocol that the containers have for the port".to_owned(),
            Self::BlockOfPods { .. } => {
                "pods' addresses change hands: name pods by podSelector and namespaceSelector, and except their range"
                    .to_owned()
            }
            Self::EmptyBlock { .. } => "except less than the range, or remove the peer".to_owned(),
            Self::Shadowed { .. } => "remove it, or make the other one narrower".to_owned(),
        }
    }
}

/// Findings about all policies, or one of them; by policy, the policy as a whole first. Which rules add nothing is as of
/// the last [`Engine::commit`].
pub fn findings(engine: &Engine, only: Option<&ObjectName>) -> Vec<Finding> {
    let world = engine.world();
    let cluster = Pods::of(world);
    let mut found = Vec::new();
    let names: Vec<ObjectName> = match only {
        Some(name) => vec![name.clone()],
        None => world.policy_names().collect(),
    };
    for policy in names.iter().filter_map(|name| world.policy(name)) {
        let mut lint = Lint { world, cluster: &cluster, policy, found: &mut found };
        lint.unreadable();
        lint.subjects();
    }
    for (origin, direction, by) in shadowed(engine, only) {
        let rule = Some((direction, origin.rule));
        found.push(Finding { policy: origin.policy, rule, flaw: Flaw::Shadowed { direction, by } });
    }
    found.sort();
    found.dedup();
    found
}

/// Findings for which no pod need be known: each policy by itself.
pub fn without_cluster(policies: &[PolicySpec]) -> Vec<Finding> {
    const NODE: &str = "none";
    let mut found = Vec::new();
    for spec in policies {
        // For one pod that it is for, whatever its selector. No peer is a pod then: rules that name pods cover one another
        // only where they name the same ones.
        let pod = Pod {
            name: ObjectName::new(Arc::clone(&spec.name.namespace), "any"),
            uid: "any".into(),
            labels: Labels::new(),
            node: Some(NODE.into()),
            host_network: false,
            finished: false,
            deleting: false,
            socket_lb: true,
            created: 0,
            ips: Vec::new(),
            ports: Vec::new(),
        };
        let mut engine = Engine::new(NODE, Limits::default(), PolicyTables::default());
        engine.apply(Change::Pod(pod));
        engine.apply(Change::Policy(PolicySpec { pod_selector: None, ..spec.clone() }));
        engine.commit();
        let known = findings(&engine, Some(&spec.name));
        found.extend(known.into_iter().filter(|finding| {
            matches!(finding.flaw, Flaw::Unreadable { .. } | Flaw::EmptyBlock { .. } | Flaw::Shadowed { .. })
        }));
        let subject = super::parse::policy(spec).1.into_iter().filter(|finding| finding.field == "spec.podSelector");
        found.extend(subject.map(|finding| Finding {
            policy: spec.name.clone(),
            rule: None,
            flaw: Flaw::Unreadable { field: finding.field, problem: finding.problem, effect: finding.fix },
        }));
    }
    found.sort();
    found
}

/// Pods that policies can be about, those with equal labels together.
struct Pods<'a> {
    by_labels: BTreeMap<&'a str, BTreeMap<&'a Labels, Vec<&'a Pod>>>,
}

impl<'a> Pods<'a> {
    fn of(world: &'a World) -> Self {
        let mut by_labels: BTreeMap<&str, BTreeMap<&Labels, Vec<&Pod>>> = BTreeMap::new();
        for (name, member) in world.members() {
            let of_namespace = by_labels.entry(&name.namespace).or_default();
            of_namespace.entry(&member.pod.labels).or_default().push(&member.pod);
        }
        Self { by_labels }
    }

    /// Pods of a namespace that a policy is for.
    fn subjects(&self, policy: &Policy) -> impl Iterator<Item = &'a Pod> {
        let of_namespace = self.by_labels.get(&*policy.name.namespace).into_iter().flatten();
        of_namespace.filter(|(labels, _)| policy.subject.matches(labels)).flat_map(|(_, pods)| pods).copied()
    }

    /// Pods that a peer means by their labels.
    fn matching<'b>(&'b self, world: &'b World, peer: &'b Peer) -> impl Iterator<Item = &'a Pod> + 'b {
        let by_labels = match peer {
            Peer::Pods { namespaces, pods } => Some((namespaces, pods)),
            Peer::Block(_) => None,
        };
        by_labels.into_iter().flat_map(move |(namespaces, pods)| {
            let is_meant = move |name: &str| match namespaces {
                Namespaces::Named(named) => **named == *name,
                Namespaces::Matching(selector) => {
                    world.namespace(name).map_or(selector.is_empty(), |object| selector.matches(&object.labels))
                }
            };
            let groups = self.by_labels.iter().filter(move |(name, _)| is_meant(name)).flat_map(|(_, groups)| groups);
            groups.filter(move |(labels, _)| pods.matches(labels)).flat_map(|(_, pods)| pods.iter().copied())
        })
    }
}

/// One policy and what is found of it.
struct Lint<'a> {
    world: &'a World,
    cluster: &'a Pods<'a>,
    policy: &'a Policy,
    found: &'a mut Vec<Finding>,
}

impl Lint<'_> {
    fn report(&mut self, rule: Option<(Direction, usize)>, flaw: Flaw) {
        self.found.push(Finding { policy: self.policy.name.clone(), rule, flaw });
    }

    /// What reading it has found.
    fn unreadable(&mut self) {
        for finding in self.world.findings_of(&self.policy.name) {
            let (field, problem, effect) = (finding.field.clone(), finding.problem.clone(), finding.fix.clone());
            self.report(rule_of(&field), Flaw::Unreadable { field, problem, effect });
        }
    }

    fn subjects(&mut self) {
        let policy = self.policy;
        let subjects: Vec<&Pod> = self.cluster.subjects(policy).collect();
        let host: Vec<ObjectName> = self.world.host_pods(&policy.name.namespace, &policy.subject).collect();
        if let Some(example) = host.first() {
            self.report(None, Flaw::HostNetwork { count: host.len(), example: example.clone() });
        } else if subjects.is_empty() {
            let subject =
                if policy.subject.is_empty() { "all pods".into() } else { format!("pods with {}", policy.subject) };
            self.report(None, Flaw::SelectsNobody { subject });
        }
        for (direction, rules) in [(Direction::Ingress, &policy.ingress), (Direction::Egress, &policy.egress)] {
            for (index, rule) in rules.iter().flatten().enumerate() {
                self.peers((direction, index), rule);
                self.ports((direction, index), rule, &subjects);
            }
        }
    }

    fn peers(&mut self, at: (Direction, usize), rule: &Rule) {
        let Peers::Some(peers) = &rule.peers else { return };
        let mut nobody = Vec::new();
        for peer in peers {
            match peer {
                Peer::Block(block) => self.block(at, block),
                Peer::Pods { .. } if self.cluster.matching(self.world, peer).next().is_none() => nobody.push(peer),
                Peer::Pods { .. } => {}
            }
        }
        if !nobody.is_empty() && nobody.len() == peers.len() {
            let peers = rule.peers.to_string();
            self.report(Some(at), Flaw::NoPeer { peers });
        } else {
            for peer in nobody {
                self.report(Some(at), Flaw::PeerMatchesNobody { peer: peer.to_string() });
            }
        }
    }

    fn block(&mut self, at: (Direction, usize), block: &IpBlock) {
        let net = block.net;
        if IpNet::aggregate(&block.except.iter().copied().collect()) == [net] {
            self.report(Some(at), Flaw::EmptyBlock { net });
            return;
        }
        if net.prefix_len() == 0 {
            return;
        }
        let mut held = self.world.ips_in(net).filter(|ip| block.contains(*ip));
        if let Some((ip, pod)) = held.find_map(|ip| Some((ip, self.world.owner(ip)?.pod.name.clone()))) {
            self.report(Some(at), Flaw::BlockOfPods { net, ip, pod });
        }
    }

    fn ports(&mut self, at: (Direction, usize), rule: &Rule, subjects: &[&Pod]) {
        let Ports::Some(ports) = &rule.ports else { return };
        let names: BTreeSet<&PortName> = ports
            .iter()
            .filter_map(|port| match port {
                Port::Named(name) => Some(name),
                Port::Range(_) => None,
            })
            .collect();
        if names.is_empty() {
            return;
        }
        let peers = match (at.0, &rule.peers) {
            (Direction::Ingress, _) => None,
            (Direction::Egress, Peers::Any) => return self.names(at, names, self.world.numbers().keys().cloned()),
            (Direction::Egress, Peers::Some(peers)) => Some(peers),
        };
        let destinations: Vec<&Pod> = match peers {
            None => subjects.to_vec(),
            Some(peers) => {
                let by_labels = peers.iter().flat_map(|peer| self.cluster.matching(self.world, peer));
                let by_address = peers.iter().filter_map(|peer| match peer {
                    Peer::Block(block) => Some(block),
                    Peer::Pods { .. } => None,
                });
                let held = by_address.flat_map(|block| {
                    let ips = self.world.ips_in(block.net).filter(|ip| block.contains(*ip));
                    ips.filter_map(|ip| Some(&*self.world.owner(ip)?.pod))
                });
                by_labels.chain(held).collect()
            }
        };
        // Where there are none, that is told already.
        if !destinations.is_empty() {
            self.names(at, names, destinations.iter().flat_map(|pod| exposed(pod)).map(|(name, _)| name));
        }
    }

    /// Names that are not among those of the ports that the rule leads to.
    fn names(&mut self, at: (Direction, usize), names: BTreeSet<&PortName>, given: impl Iterator<Item = PortName>) {
        let given: BTreeSet<PortName> = given.collect();
        for name in names.into_iter().filter(|name| !given.contains(*name)) {
            let elsewhere = given.iter().filter(|other| other.name == name.name).map(|other| other.proto).collect();
            self.report(Some(at), Flaw::PortName { name: name.clone(), elsewhere });
        }
    }
}

/// The rule that a field is in: `spec.ingress[0].from[1]`.
fn rule_of(field: &str) -> Option<(Direction, usize)> {
    let (list, rest) = field.strip_prefix("spec.")?.split_once('[')?;
    let direction = match list {
        "ingress" => Direction::Ingress,
        "egress" => Direction::Egress,
        _ => return None,
    };
    Some((direction, rest.split_once(']')?.0.parse().ok()?))
}

/// Rules that add nothing for any pod of this node that they are for, with one that makes them superfluous.
fn shadowed(engine: &Engine, only: Option<&ObjectName>) -> Vec<(Origin, Direction, Origin)> {
    let mut found: BTreeMap<(Direction, Origin), Option<Origin>> = BTreeMap::new();
    for set in engine.rule_sets() {
        if only.is_some_and(|name| !set.policies.contains(name)) {
            continue;
        }
        let reaches = Reaches::of(engine, set);
        for origin in reaches.0.keys().filter(|origin| only.is_none_or(|name| origin.policy == *name)) {
            let by = reaches.covering(origin).cloned();
            let known = found.entry((set.direction, (*origin).clone())).or_insert_with(|| by.clone());
            if by.is_none() {
                *known = None;
            }
        }
    }
    found.into_iter().filter_map(|((direction, origin), by)| Some((origin, direction, by?))).collect()
}

/// What each rule of a set allows.
struct Reaches<'a>(BTreeMap<&'a Origin, Vec<Reach<'a>>>);

/// A part of a rule: one pair of peers and ports.
struct Reach<'a> {
    peers: &'a PeerTest,
    ports: Option<&'a BTreeSet<PortRange>>,
    /// Cells of each question about the peers.
    cells: Vec<(&'a Predicate, BTreeSet<u32>)>,
}

impl<'a> Reaches<'a> {
    fn of(engine: &Engine, set: &'a RuleSet) -> Self {
        let mut reaches: BTreeMap<&Origin, Vec<Reach<'_>>> = BTreeMap::new();
        for Line { ports, entries } in &set.rules {
            for entry in entries {
                let cells = entry
                    .peers
                    .predicates
                    .iter()
                    .map(|predicate| (predicate, engine.cells(&Question::Peer(predicate.clone())).collect()));
                let reach = Reach { peers: &entry.peers, ports: ports.as_ref(), cells: cells.collect() };
                reaches.entry(&entry.origin).or_default().push(reach);
            }
        }
        Self(reaches)
    }

    /// A rule that allows all that this one does; of two that are equal the first one is the one to keep.
    fn covering(&self, origin: &Origin) -> Option<&'a Origin> {
        let own = self.0.get(origin)?;
        let covers = |wide: &[Reach<'_>], narrow: &[Reach<'_>]| {
            narrow.iter().filter(|part| !part.is_moot()).all(|part| wide.iter().any(|other| other.covers(part)))
        };
        if own.iter().all(Reach::is_moot) {
            return None;
        }
        let others = self.0.iter().filter(|(other, _)| **other != origin);
        let mut covering = others.filter(|(_, wide)| covers(wide, own));
        covering.find(|(other, wide)| **other < origin || !covers(own, wide)).map(|(other, _)| *other)
    }
}

impl Reach<'_> {
    /// Is it about a number that some pods give to a name, and none of those that the rule means?
    fn is_moot(&self) -> bool {
        let is_nobody =
            |(predicate, cells): &(&Predicate, BTreeSet<u32>)| predicate.exposes.is_some() && cells.is_empty();
        !self.peers.any_address && !self.peers.any_pod && self.cells.iter().all(is_nobody)
    }

    fn covers(&self, narrow: &Self) -> bool {
        self.covers_ports(narrow) && self.covers_peers(narrow)
    }

    fn covers_ports(&self, narrow: &Self) -> bool {
        let Some(wide) = self.ports else { return true };
        let within = |range: &PortRange| {
            wide.iter().any(|w| w.proto == range.proto && w.first <= range.first && range.last <= w.last)
        };
        narrow.ports.is_some_and(|ranges| ranges.iter().all(within))
    }

    fn covers_peers(&self, narrow: &Self) -> bool {
        let (wide, test) = (self.peers, narrow.peers);
        if wide.any_address {
            return true;
        }
        let is_held = |cell: &u32| {
            (wide.any_pod && Kind::of(*cell) == Kind::Pod) || self.cells.iter().any(|(_, cells)| cells.contains(cell))
        };
        let is_covered = |(predicate, cells): &(&Predicate, BTreeSet<u32>)| {
            let same = wide.predicates.contains(*predicate);
            same || (wide.any_pod && predicate.asks_pod()) || (!cells.is_empty() && cells.iter().all(is_held))
        };
        !test.any_address && (wide.any_pod || !test.any_pod) && narrow.cells.iter().all(is_covered)
    }
}
