//! The naive evaluator.

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr};
use std::sync::Arc;

use ipnet::IpNet;
use proxy_core::name::ObjectName;
use proxy_core::netpol::spec::{
    BlockSpec, Container, ExpressionSpec, Labels, Namespace, PeerSpec, Pod, PolicySpec, PortNumber, PortSpec, RuleSpec,
    SelectorSpec,
};

use crate::row::Row;

/// All objects.
#[derive(Clone, Debug, Default)]
pub struct Cluster {
    /// This node.
    pub node: Arc<str>,
    /// Addresses of nodes.
    pub node_ips: Vec<IpAddr>,
    /// Namespaces.
    pub namespaces: BTreeMap<Arc<str>, Namespace>,
    /// Pods.
    pub pods: BTreeMap<ObjectName, Pod>,
    /// Policies; true = deleted while the namespace was going.
    pub policies: BTreeMap<ObjectName, (PolicySpec, bool)>,
}

/// One side of a flow.
#[derive(Clone, Copy, Debug)]
pub struct Side {
    /// Towards the pod, or from it.
    pub ingress: bool,
    /// The other end.
    pub peer: IpAddr,
    /// Protocol number.
    pub proto: u8,
    /// Destination port; `None` = not known.
    pub port: Option<u16>,
    /// Source port.
    pub source_port: u16,
    /// The pod's own node began it.
    pub from_node: bool,
    /// The pod reaches itself through a Service.
    pub hairpin: bool,
}

/// A rule: its policy, and its place in `ingress` or `egress`.
pub type RuleName = (ObjectName, usize);

/// What holds for one side.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Verdict {
    /// May it pass?
    pub allowed: bool,
    /// Policies that isolate the pod in this direction, by name.
    pub isolating: Vec<ObjectName>,
    /// All rules that allow it, in order.
    pub rules: Vec<RuleName>,
}

/// Judges; with a row broken on purpose, or none.
#[derive(Clone, Copy, Debug)]
pub struct Oracle<'a> {
    /// The objects.
    pub cluster: &'a Cluster,
    /// The row that it gets wrong.
    pub broken: Option<Row>,
}

impl Oracle<'_> {
    fn breaks(&self, row: Row) -> bool {
        self.broken == Some(row)
    }

    /// Ruling: a policy whose annotation says `true` is only audited.
    fn audited(&self, policy: &PolicySpec) -> bool {
        policy.audit.as_deref() == Some("true") && !self.breaks(Row::Audit)
    }

    /// What would hold for a side that [`Self::judge`] allows if audited policies were enforced. Only of directions in which
    /// one isolates the pod; else `None`.
    pub fn shadow(&self, pod: &Pod, side: &Side) -> Option<Verdict> {
        let verdict = self.judge_by(pod, side, |_| true);
        let audited = |name: &ObjectName| self.cluster.policies.get(name).is_some_and(|(p, _)| self.audited(p));
        verdict.isolating.iter().any(audited).then_some(verdict)
    }

    /// What is enforced.
    pub fn judge(&self, pod: &Pod, side: &Side) -> Verdict {
        self.judge_by(pod, side, |policy| !self.audited(policy))
    }

    /// O8, O10 (concepts, "The two sorts of pod isolation"): no order, no deny; isolated iff selected by a policy of
    /// that direction; then what any rule allows may pass. Each side is judged alone.
    fn judge_by(&self, pod: &Pod, side: &Side, counts: impl Fn(&PolicySpec) -> bool) -> Verdict {
        let mut verdict = Verdict { allowed: true, isolating: Vec::new(), rules: Vec::new() };
        if (self.local_node(side) || self.hairpin(side)) || (self.breaks(Row::O10) && !side.ingress) {
            return verdict;
        }
        for (name, (policy, _)) in self.cluster.policies.iter().filter(|(_, (p, deleted))| self.in_force(p, *deleted)) {
            if !counts(policy) || !self.selects(policy, pod) || (self.breaks(Row::O8) && !verdict.isolating.is_empty())
            {
                continue;
            }
            let (ingress, egress) = self.types(policy);
            let rules = if side.ingress { &policy.ingress } else { &policy.egress };
            let skipped = self.breaks(Row::O4) && rules.as_ref().is_none_or(Vec::is_empty);
            if !(if side.ingress { ingress } else { egress }) || skipped {
                continue;
            }
            verdict.isolating.push(name.clone());
            let matching = rules.iter().flatten().enumerate().filter(|(_, rule)| self.rule(policy, rule, pod, side));
            verdict.rules.extend(matching.map(|(index, _)| (name.clone(), index)));
        }
        verdict.allowed = verdict.isolating.is_empty() || !verdict.rules.is_empty();
        verdict
    }

    /// Does the pod have an address of its own? hostNetwork (P11) and finished pods do not.
    pub fn counts(&self, pod: &Pod) -> bool {
        (!pod.host_network || self.breaks(Row::P11)) && (!pod.finished || self.breaks(Row::Finished))
    }

    /// Finished pods keep `status.podIPs` while the address is used again: it belongs to the newest that is not going.
    pub fn owner(&self, ip: IpAddr) -> Option<&Pod> {
        let claiming = self.cluster.pods.values().filter(|pod| pod.ips.contains(&ip) && self.counts(pod));
        if self.breaks(Row::Reuse) {
            return claiming.min_by_key(|pod| (!pod.deleting, pod.created, Arc::clone(&pod.uid)));
        }
        claiming.max_by_key(|pod| (!pod.deleting, pod.created, Arc::clone(&pod.uid)))
    }

    /// Types: "OR if the traffic source is the pod's local node".
    fn local_node(&self, side: &Side) -> bool {
        side.ingress && side.from_node && !self.breaks(Row::LocalNode)
    }

    /// Undefined by the API; ruling: no matter of NetworkPolicy (e2e: `ignoreLoopback`).
    fn hairpin(&self, side: &Side) -> bool {
        side.hairpin && !self.breaks(Row::Hairpin)
    }

    /// CVE-2024-7598: policies of a terminating namespace hold as long as there are pods in it.
    fn in_force(&self, policy: &PolicySpec, deleted: bool) -> bool {
        !deleted || (self.holds(&policy.name.namespace) && !self.breaks(Row::Terminating))
    }

    /// Is a namespace going, or gone, with pods in it?
    pub fn holds(&self, namespace: &str) -> bool {
        let going = self.cluster.namespaces.get(namespace).is_none_or(|object| object.terminating);
        let mut pods = self.cluster.pods.values();
        going && pods.any(|pod| &*pod.name.namespace == namespace && !pod.host_network && !pod.finished)
    }

    /// O1 (types, `podSelector`): absent or empty = every pod of the policy's namespace. O11: unreadable = the same.
    fn selects(&self, policy: &PolicySpec, pod: &Pod) -> bool {
        policy.name.namespace == pod.name.namespace
            && match &policy.pod_selector {
                None => !self.breaks(Row::O1),
                Some(selector) => self.selector(selector, &pod.labels).unwrap_or(!self.breaks(Row::O11Subject)),
            }
    }

    /// O2 (defaults, `SetDefaults_NetworkPolicy`): Ingress, and Egress iff there is an egress rule. O3 (types): only the
    /// named types. Ruling: an unknown type isolates in both directions.
    fn types(&self, policy: &PolicySpec) -> (bool, bool) {
        let types = policy.policy_types.as_deref().unwrap_or_default();
        if types.is_empty() {
            let egress = policy.egress.as_ref().is_some_and(|rules| !rules.is_empty() || self.breaks(Row::O2));
            return (true, egress);
        }
        let unknown = types.iter().any(|t| &**t != "Ingress" && &**t != "Egress");
        let has = |name: &str| unknown || types.iter().any(|t| &**t == name);
        let written = policy.ingress.as_ref().is_some_and(|rules| !rules.is_empty());
        (has("Ingress") || (self.breaks(Row::O3) && written), has("Egress"))
    }

    /// O9 (types): one of the peers and one of the ports. O5: so `{}` allows everything.
    fn rule(&self, policy: &PolicySpec, rule: &RuleSpec, pod: &Pod, side: &Side) -> bool {
        let bare = rule.peers.is_none() && rule.ports.is_none();
        if bare && self.breaks(Row::O5) {
            return false;
        }
        let (peers, ports) = (self.peers(policy, rule, side), self.ports(rule, pod, side));
        if self.breaks(Row::O9) { peers || ports } else { peers && ports }
    }

    /// O6 (types, `from`): absent or empty = everybody, pods or not.
    fn peers(&self, policy: &PolicySpec, rule: &RuleSpec, side: &Side) -> bool {
        let Some(peers) = &rule.peers else { return true };
        if peers.is_empty() {
            return !self.breaks(Row::O6);
        }
        if self.breaks(Row::P7) {
            let excepts = peers.iter().filter_map(|peer| peer.block.as_ref()).flat_map(|block| &block.except);
            if excepts.filter_map(|text| self.range(text)).any(|net| net.contains(&side.peer)) {
                return false;
            }
        }
        peers.iter().any(|peer| self.peer(&policy.name.namespace, peer, side.peer))
    }

    /// P1 to P4 (types, `NetworkPolicyPeer`). O11 (validation): exactly one kind; ruling: otherwise nobody.
    fn peer(&self, namespace: &str, peer: &PeerSpec, ip: IpAddr) -> bool {
        match (&peer.pods, &peer.namespaces, &peer.block) {
            (None, None, Some(block)) => self.block(block, ip),
            (_, _, Some(block)) => self.breaks(Row::O11) && self.block(block, ip),
            (None, None, None) => false,
            (pods, namespaces, None) => {
                let empty = |s: &SelectorSpec| s.labels.is_empty() && s.expressions.is_empty();
                let Some(pod) = self.owner(ip) else {
                    return self.breaks(Row::P4) && pods.is_none() && namespaces.as_ref().is_some_and(empty);
                };
                // P1: a podSelector alone means the policy's namespace.
                let own = *pod.name.namespace == *namespace || self.breaks(Row::P1);
                let place = namespaces.as_ref().map_or(Some(own), |s| self.namespace(s, &pod.name.namespace));
                let labels = pods.as_ref().map_or(Some(true), |selector| self.selector(selector, &pod.labels));
                match (place, labels) {
                    (Some(_), Some(_)) if pods.is_none() && self.breaks(Row::P2) => false,
                    (Some(a), Some(b)) if namespaces.is_some() && pods.is_some() && self.breaks(Row::P3) => a || b,
                    (Some(place), Some(labels)) => place && labels,
                    _ => false,
                }
            }
        }
    }

    /// P2, P6: by the labels of the Namespace object. Ruling: not known = only the empty selector matches.
    fn namespace(&self, selector: &SelectorSpec, name: &str) -> Option<bool> {
        if let Some(object) = self.cluster.namespaces.get(name) {
            return self.selector(selector, &object.labels);
        }
        let empty = selector.labels.is_empty() && selector.expressions.is_empty();
        self.selector(selector, &Labels::new()).map(|_| empty || self.breaks(Row::P6))
    }

    /// P5 (`LabelSelector`): all of them; `None` when it cannot be read.
    fn selector(&self, selector: &SelectorSpec, labels: &Labels) -> Option<bool> {
        let mut matching = selector.labels.iter().all(|(key, value)| labels.get(key) == Some(value));
        for expression in &selector.expressions {
            matching &= self.expression(expression, labels)?;
        }
        Some(matching)
    }

    /// P5: `NotIn` and `DoesNotExist` match objects without the label.
    fn expression(&self, expression: &ExpressionSpec, labels: &Labels) -> Option<bool> {
        let value = labels.get(&expression.key);
        let listed = value.is_some_and(|value| expression.values.contains(value));
        match (&*expression.operator, expression.values.is_empty()) {
            ("In", false) => Some(listed),
            ("NotIn", false) => Some(!listed && (value.is_some() || !self.breaks(Row::P5NotIn))),
            ("Exists", true) => Some(value.is_some()),
            ("DoesNotExist", true) => Some(value.is_none() != self.breaks(Row::P5DoesNotExist)),
            _ => None,
        }
    }

    /// P7 (types, `IPBlock`): in `cidr` and in none of `except`. P8, P9 (e2e): pods and nodes are addresses like any.
    fn block(&self, block: &BlockSpec, ip: IpAddr) -> bool {
        if (self.breaks(Row::P8) && self.owner(ip).is_some())
            || (self.breaks(Row::P9) && self.cluster.node_ips.contains(&ip))
        {
            return false;
        }
        let Some(net) = self.range(&block.cidr) else { return false };
        let excepts: Option<Vec<IpNet>> = block.except.iter().map(|text| self.range(text)).collect();
        // Ruling: an exception that cannot be read may be anything.
        let Some(excepts) = excepts else { return false };
        let excepted = excepts.iter().any(|net| net.contains(&ip)) && !self.breaks(Row::P7Except);
        // P10: a range has one family.
        let everything = self.breaks(Row::P10) && net.prefix_len() == 0;
        (net.contains(&ip) || everything) && !excepted
    }

    /// O12 (validation, `ParseCIDRSloppy`): host bits and leading zeros are tolerated.
    fn range(&self, text: &str) -> Option<IpNet> {
        let (address, length) = text.split_once('/')?;
        let address: IpAddr = if address.contains(':') {
            address.parse().ok()?
        } else {
            let octets: Vec<u8> = address.split('.').map(|o| o.parse().ok()).collect::<Option<_>>()?;
            IpAddr::V4(Ipv4Addr::from(<[u8; 4]>::try_from(octets).ok()?))
        };
        let net = IpNet::new(address, length.parse().ok()?).ok()?;
        (net.trunc() == net || !self.breaks(Row::O12)).then(|| net.trunc())
    }

    /// O7 (types, `ports`): absent or empty = every port of every protocol.
    fn ports(&self, rule: &RuleSpec, pod: &Pod, side: &Side) -> bool {
        let Some(ports) = &rule.ports else { return self.any_protocol(side) };
        if ports.is_empty() {
            return if self.breaks(Row::O7) { side.proto == 6 } else { self.any_protocol(side) };
        }
        let unreadable = |port: &PortSpec| matches!(port.protocol.as_deref(), Some("QUIC"));
        if self.breaks(Row::O11Ports) && ports.iter().all(unreadable) {
            return true;
        }
        ports.iter().any(|port| self.port(port, pod, side))
    }

    /// Concepts: other protocols than TCP, UDP and SCTP are undefined; ruling: a rule without ports is for all of them.
    fn any_protocol(&self, side: &Side) -> bool {
        !self.breaks(Row::Protocols) || [6, 17, 132].contains(&side.proto)
    }

    /// T1 to T4, T10 (types, `NetworkPolicyPort`; KEP-2079): protocol and destination port.
    fn port(&self, item: &PortSpec, pod: &Pod, side: &Side) -> bool {
        // T1: absent = TCP.
        let Some(proto) = self.protocol(item.protocol.as_deref()) else { return false };
        let proto_fits = proto == side.proto || (item.protocol.is_none() && self.breaks(Row::T1));
        if !proto_fits {
            return false;
        }
        let fragment = side.port.is_none();
        // T4: the destination's, in both directions.
        let port = if self.breaks(Row::T4) && !side.ingress { side.source_port } else { side.port.unwrap_or(0) };
        if fragment {
            return self.breaks(Row::Fragment);
        }
        match (&item.port, item.end_port) {
            (None, None) => !self.breaks(Row::T2),
            (Some(PortNumber::Number(0)), None) if self.breaks(Row::T10) => true,
            (Some(PortNumber::Number(first)), last) => {
                let last = if self.breaks(Row::T3) { *first } else { last.unwrap_or(*first) };
                let valid = (1..=65_535).contains(first) && (1..=65_535).contains(&last);
                valid && (*first..=last).contains(&i32::from(port))
            }
            (Some(PortNumber::Name(name)), None) => self.named(name, proto, port, pod, side),
            // T3: endPort needs a number.
            (_, Some(_)) => false,
        }
    }

    /// T9: SCTP is a protocol of its own.
    fn protocol(&self, name: Option<&str>) -> Option<u8> {
        match name {
            None | Some("TCP") => Some(6),
            Some("UDP") => Some(17),
            Some("SCTP") => Some(if self.breaks(Row::T9) { 6 } else { 132 }),
            Some(_) => None,
        }
    }

    /// T5, T6: a name is looked up on the destination pod, so that it never matches an address of no pod. T7: with its
    /// protocol, on every container. T8: sidecars are containers, other init containers are not.
    fn named(&self, name: &str, proto: u8, port: u16, pod: &Pod, side: &Side) -> bool {
        let peer = self.owner(side.peer);
        let swapped = self.breaks(if side.ingress { Row::T5 } else { Row::T6 });
        let Some(destination) = (if side.ingress == swapped { peer } else { Some(pod) }) else { return false };
        destination.ports.iter().any(|p| {
            let counts = match p.container {
                Container::Main => true,
                Container::Sidecar => !self.breaks(Row::T8),
                Container::Init => self.breaks(Row::T8Init),
            };
            let same = self.protocol(p.protocol.as_deref()) == Some(proto) || self.breaks(Row::T7);
            counts && !name.is_empty() && *p.name == *name && same && p.port == port
        })
    }
}
