//! The objects, and the indexes by which a change finds what it touches.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::sync::Arc;

use super::parse;
use super::policy::{Policy, PortName};
use super::predicate::{Element, exposed};
use super::selector::Selector;
use super::spec::{Change, Labels, Namespace, Pod};
use crate::diagnostic::Diagnostic;
use crate::name::ObjectName;

/// A pod and what is known of it.
#[derive(Clone, Debug)]
pub struct Member {
    /// The object.
    pub pod: Arc<Pod>,
    /// Questions that it satisfies, ascending: of those asked of pods.
    pub elements: Vec<Element>,
}

/// A namespace, its policies and pods.
#[derive(Clone, Debug, Default)]
struct Space {
    object: Option<Namespace>,
    policies: BTreeMap<Arc<str>, Arc<Policy>>,
    /// Policies that were deleted while the namespace is going: they hold until its pods are gone.
    deleted: BTreeSet<Arc<str>>,
    /// Pods whose addresses count.
    pods: BTreeSet<Arc<str>>,
    /// Labels of hostNetwork pods that have not ended.
    host_pods: BTreeMap<Arc<str>, Labels>,
}

/// What a change touched.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Touched {
    /// Pods of this node whose rules may be others now.
    pub subjects: BTreeSet<ObjectName>,
    /// Pods that may satisfy other questions now.
    pub members: BTreeSet<ObjectName>,
    /// Addresses that may belong to other pods now.
    pub ips: BTreeSet<IpAddr>,
    /// Names of ports that stand for other numbers now.
    pub names: BTreeSet<PortName>,
}

impl Touched {
    /// Nothing?
    pub fn is_empty(&self) -> bool {
        *self == Self::default()
    }
}

/// All objects.
#[derive(Clone, Debug)]
pub struct World {
    node: Arc<str>,
    spaces: BTreeMap<Arc<str>, Space>,
    members: BTreeMap<ObjectName, Member>,
    /// Address → pods that have it. Nearly always one.
    claims: BTreeMap<IpAddr, Vec<ObjectName>>,
    numbers: BTreeMap<PortName, BTreeMap<u16, usize>>,
    findings: BTreeMap<ObjectName, Vec<Diagnostic>>,
}

/// Does the pod have an address of its own, and containers that may use it?
pub fn counts(pod: &Pod) -> bool {
    !pod.host_network && !pod.finished
}

impl World {
    /// Empty, on a node.
    pub fn new(node: impl Into<Arc<str>>) -> Self {
        Self {
            node: node.into(),
            spaces: BTreeMap::new(),
            members: BTreeMap::new(),
            claims: BTreeMap::new(),
            numbers: BTreeMap::new(),
            findings: BTreeMap::new(),
        }
    }

    /// Takes a change, and notes what it touched.
    pub fn apply(&mut self, change: Change, touched: &mut Touched) {
        match change {
            Change::Namespace(object) => {
                let name = Arc::clone(&object.name);
                self.set_namespace(&name, Some(object), touched);
            }
            Change::NamespaceGone(name) => self.set_namespace(&name, None, touched),
            Change::Pod(pod) => self.set_pod(pod, touched),
            Change::PodGone(name) => self.remove_pod(&name, touched),
            Change::Policy(spec) => {
                let (policy, findings) = parse::policy(&spec);
                self.set_findings(&policy.name, findings);
                let name = policy.name.clone();
                if let Some(space) = self.spaces.get_mut(&name.namespace) {
                    space.deleted.remove(&name.name);
                }
                self.set_policy(&name, Some(policy), touched);
            }
            Change::PolicyGone(name) => {
                let Some(space) = self.spaces.get_mut(&name.namespace) else { return };
                if space.policies.contains_key(&name.name) {
                    space.deleted.insert(Arc::clone(&name.name));
                    self.bury(&name.namespace, touched);
                }
            }
        }
    }

    fn set_namespace(&mut self, name: &Arc<str>, object: Option<Namespace>, touched: &mut Touched) {
        let space = self.spaces.entry(Arc::clone(name)).or_default();
        let labels = |object: &Option<Namespace>| object.as_ref().map(|o| o.labels.clone());
        if labels(&space.object) != labels(&object) {
            touched.members.extend(space.pods.iter().map(|pod| ObjectName::new(Arc::clone(name), Arc::clone(pod))));
        }
        space.object = object;
        self.bury(name, touched);
    }

    /// Removes deleted policies of a namespace that is not going, or whose pods are gone; then the namespace, when
    /// nothing is left of it.
    fn bury(&mut self, name: &Arc<str>, touched: &mut Touched) {
        let Some(space) = self.spaces.get_mut(name) else { return };
        let going = space.object.as_ref().is_none_or(|object| object.terminating);
        if !going || space.pods.is_empty() {
            for policy in std::mem::take(&mut space.deleted) {
                let policy = ObjectName::new(Arc::clone(name), policy);
                self.set_findings(&policy, Vec::new());
                self.set_policy(&policy, None, touched);
            }
        }
        self.forget_space(name);
    }

    fn forget_space(&mut self, name: &str) {
        let empty =
            |s: &Space| s.object.is_none() && s.policies.is_empty() && s.pods.is_empty() && s.host_pods.is_empty();
        if self.spaces.get(name).is_some_and(empty) {
            self.spaces.remove(name);
        }
    }

    fn forget_host_pod(&mut self, name: &ObjectName) {
        let space = self.spaces.get_mut(&name.namespace);
        if space.is_some_and(|space| space.host_pods.remove(&name.name).is_some()) {
            self.forget_space(&name.namespace);
        }
    }

    fn set_policy(&mut self, name: &ObjectName, policy: Option<Policy>, touched: &mut Touched) {
        let space = self.spaces.entry(Arc::clone(&name.namespace)).or_default();
        let new = policy.map(Arc::new);
        let old = match &new {
            Some(policy) => space.policies.insert(Arc::clone(&name.name), Arc::clone(policy)),
            None => space.policies.remove(&name.name),
        };
        if old == new {
            return;
        }
        let pods: Vec<_> =
            space.pods.iter().map(|pod| ObjectName::new(Arc::clone(&name.namespace), Arc::clone(pod))).collect();
        for pod in pods {
            let Some(member) = self.members.get(&pod).filter(|member| self.is_local(&member.pod)) else { continue };
            if [&old, &new].into_iter().flatten().any(|policy| policy.subject.matches(&member.pod.labels)) {
                touched.subjects.insert(pod);
            }
        }
    }

    fn set_findings(&mut self, name: &ObjectName, findings: Vec<Diagnostic>) {
        if findings.is_empty() {
            self.findings.remove(name);
        } else {
            self.findings.insert(name.clone(), findings);
        }
    }

    fn set_pod(&mut self, mut pod: Pod, touched: &mut Touched) {
        let name = pod.name.clone();
        pod.ips.sort_unstable();
        pod.ips.dedup();
        let old = self.members.get(&name).map(|member| Arc::clone(&member.pod));
        if old.as_deref() == Some(&pod) {
            return;
        }
        if !counts(&pod) {
            self.remove_pod(&name, touched);
            if !pod.finished {
                let space = self.spaces.entry(Arc::clone(&name.namespace)).or_default();
                space.host_pods.insert(Arc::clone(&name.name), pod.labels);
            }
            return;
        }
        self.forget_host_pod(&name);
        let new = Arc::new(pod);
        let same = |f: fn(&Pod) -> bool| old.as_ref().is_some_and(|old| f(old) == f(&new));
        let relabelled = old.as_ref().is_none_or(|old| old.labels != new.labels);
        let ports = old.as_ref().is_none_or(|old| old.ports != new.ports);
        if let Some(old) = &old {
            self.unclaim(old, touched);
        }
        for ip in &new.ips {
            self.claims.entry(*ip).or_default().push(name.clone());
            touched.ips.insert(*ip);
        }
        for port in exposed(&new) {
            self.count(port, true, touched);
        }
        let replaced = old.as_ref().is_none_or(|old| old.uid != new.uid || old.node != new.node);
        if relabelled || ports || replaced {
            touched.members.insert(name.clone());
            touched.subjects.insert(name.clone());
        }
        if !same(|pod| pod.deleting) {
            touched.ips.extend(&new.ips);
        }
        let elements = self.members.get(&name).map(|member| member.elements.clone()).unwrap_or_default();
        self.members.insert(name.clone(), Member { pod: new, elements });
        self.spaces.entry(Arc::clone(&name.namespace)).or_default().pods.insert(Arc::clone(&name.name));
    }

    fn remove_pod(&mut self, name: &ObjectName, touched: &mut Touched) {
        self.forget_host_pod(name);
        let Some(member) = self.members.remove(name) else { return };
        self.unclaim(&member.pod, touched);
        touched.subjects.insert(name.clone());
        if let Some(space) = self.spaces.get_mut(&name.namespace) {
            space.pods.remove(&name.name);
        }
        self.bury(&name.namespace, touched);
    }

    fn unclaim(&mut self, pod: &Pod, touched: &mut Touched) {
        for ip in &pod.ips {
            if let Some(claims) = self.claims.get_mut(ip) {
                claims.retain(|name| *name != pod.name);
                if claims.is_empty() {
                    self.claims.remove(ip);
                }
            }
            touched.ips.insert(*ip);
        }
        for port in exposed(pod) {
            self.count(port, false, touched);
        }
    }

    fn count(&mut self, (name, number): (PortName, u16), up: bool, touched: &mut Touched) {
        let numbers = self.numbers.entry(name.clone()).or_default();
        let count = numbers.entry(number).or_default();
        *count = if up { *count + 1 } else { count.saturating_sub(1) };
        // Counted down and up again by one change, it is touched for nothing, which does no harm.
        if *count == 0 || (up && *count == 1) {
            touched.names.insert(name.clone());
        }
        if *count == 0 {
            numbers.remove(&number);
        }
        if numbers.is_empty() {
            self.numbers.remove(&name);
        }
    }

    /// A pod that counts.
    pub fn member(&self, name: &ObjectName) -> Option<&Member> {
        self.members.get(name)
    }

    /// Says which questions a pod satisfies.
    pub fn set_elements(&mut self, name: &ObjectName, elements: Vec<Element>) -> bool {
        let Some(member) = self.members.get_mut(name) else { return false };
        let changed = member.elements != elements;
        member.elements = elements;
        changed
    }

    /// All pods that count.
    pub fn members(&self) -> impl Iterator<Item = (&ObjectName, &Member)> {
        self.members.iter()
    }

    /// Pods of one namespace that count.
    pub fn members_of(&self, namespace: &str) -> impl Iterator<Item = ObjectName> + '_ {
        self.spaces
            .get_key_value(namespace)
            .into_iter()
            .flat_map(|(name, space)| space.pods.iter().map(|pod| ObjectName::new(Arc::clone(name), Arc::clone(pod))))
    }

    /// Namespaces that are known, and those that only a pod or policy speaks of.
    pub fn namespaces(&self) -> impl Iterator<Item = (&Arc<str>, Option<&Namespace>)> {
        self.spaces.iter().map(|(name, space)| (name, space.object.as_ref()))
    }

    /// A namespace, when it is known.
    pub fn namespace(&self, name: &str) -> Option<&Namespace> {
        self.spaces.get(name)?.object.as_ref()
    }

    /// Is the pod on this node?
    pub fn is_local(&self, pod: &Pod) -> bool {
        pod.node.as_ref() == Some(&self.node)
    }

    /// Policies that select a pod of a namespace with these labels, by name.
    pub fn policies(&self, namespace: &str, labels: &Labels) -> Vec<Arc<Policy>> {
        let policies = self.spaces.get(namespace).into_iter().flat_map(|space| space.policies.values());
        policies.filter(|policy| policy.subject.matches(labels)).cloned().collect()
    }

    /// All policies, by name; those among them that were deleted from a namespace that is going and still hold.
    pub fn policy_names(&self) -> impl Iterator<Item = ObjectName> + '_ {
        self.spaces.iter().flat_map(|(namespace, space)| {
            space.policies.keys().map(|name| ObjectName::new(Arc::clone(namespace), Arc::clone(name)))
        })
    }

    /// A policy.
    pub fn policy(&self, name: &ObjectName) -> Option<&Arc<Policy>> {
        self.spaces.get(&name.namespace)?.policies.get(&name.name)
    }

    /// Is there a policy?
    pub fn has_policies(&self) -> bool {
        self.spaces.values().any(|space| !space.policies.is_empty())
    }

    /// Is there a policy that is not only audited?
    pub fn enforces(&self) -> bool {
        self.spaces.values().flat_map(|space| space.policies.values()).any(|policy| !policy.audited)
    }

    /// The pod that an address belongs to.
    pub fn owner(&self, ip: IpAddr) -> Option<&Member> {
        let claims = self.claims.get(&ip)?.iter().filter_map(|name| self.members.get(name));
        claims.max_by(|a, b| {
            let rank = |m: &Member| (!m.pod.deleting, m.pod.created);
            rank(a).cmp(&rank(b)).then_with(|| a.pod.uid.cmp(&b.pod.uid))
        })
    }

    /// Addresses of pods.
    pub fn ips(&self) -> impl Iterator<Item = IpAddr> + '_ {
        self.claims.keys().copied()
    }

    /// Addresses of pods in a range.
    pub fn ips_in(&self, net: ipnet::IpNet) -> impl Iterator<Item = IpAddr> + '_ {
        self.claims.range(net.network()..=net.broadcast()).map(|(ip, _)| *ip)
    }

    /// Numbers that pods give to names, and how many of them.
    pub const fn numbers(&self) -> &BTreeMap<PortName, BTreeMap<u16, usize>> {
        &self.numbers
    }

    /// hostNetwork pods of a namespace that a selector matches. No policy has an effect on them.
    pub fn host_pods<'a>(&'a self, namespace: &str, selector: &'a Selector) -> impl Iterator<Item = ObjectName> + 'a {
        self.spaces.get_key_value(namespace).into_iter().flat_map(move |(namespace, space)| {
            let matching = space.host_pods.iter().filter(|(_, labels)| selector.matches(labels));
            matching.map(|(name, _)| ObjectName::new(Arc::clone(namespace), Arc::clone(name)))
        })
    }

    /// Pods that are known, those in the node's network too.
    pub fn pod_names(&self) -> impl Iterator<Item = ObjectName> + '_ {
        let host = self.spaces.iter().flat_map(|(namespace, space)| {
            let names = space.host_pods.keys();
            names.map(|name| ObjectName::new(Arc::clone(namespace), Arc::clone(name)))
        });
        self.members.keys().cloned().chain(host)
    }

    /// What is wrong with one policy.
    pub fn findings_of(&self, name: &ObjectName) -> &[Diagnostic] {
        self.findings.get(name).map_or(&[], Vec::as_slice)
    }

    /// What is wrong with policies.
    pub fn findings(&self) -> impl Iterator<Item = &Diagnostic> {
        self.findings.values().flatten()
    }
}
