//! What rules ask of an address or a port: each question once, however many rules ask it.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use super::digest;
use super::policy::{Namespaces, Peer, PortName, PortRange};
use super::spec::{Namespace, Pod};
use super::world::Member;

/// A question about an address.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Predicate {
    /// Is it this peer?
    pub peer: Peer,
    /// And does it belong to a pod that gives this name to this port?
    pub exposes: Option<(PortName, u16)>,
}

impl Predicate {
    /// Can its answer differ between pods of one address range?
    pub fn asks_pod(&self) -> bool {
        matches!(self.peer, Peer::Pods { .. }) || self.exposes.is_some()
    }

    /// Does a pod satisfy it, as far as its address does not matter?
    pub fn matches_pod(&self, pod: &Pod, namespace: Option<&Namespace>) -> bool {
        let peer = match &self.peer {
            Peer::Block(_) => true,
            Peer::Pods { namespaces: Namespaces::Named(name), pods } => {
                *name == pod.name.namespace && pods.matches(&pod.labels)
            }
            Peer::Pods { namespaces: Namespaces::Matching(selector), pods } => {
                let matching = namespace.map_or(selector.is_empty(), |object| selector.matches(&object.labels));
                matching && pods.matches(&pod.labels)
            }
        };
        peer && self
            .exposes
            .as_ref()
            .is_none_or(|(name, number)| exposed(pod).any(|port| port == (name.clone(), *number)))
    }

    /// Does an address satisfy it, given that of its pod?
    pub fn matches_ip(&self, ip: IpAddr) -> bool {
        match &self.peer {
            Peer::Block(block) => block.contains(ip),
            Peer::Pods { .. } => true,
        }
    }
}

/// The ports that a pod gives names to.
pub fn exposed(pod: &Pod) -> impl Iterator<Item = (PortName, u16)> + '_ {
    pod.ports.iter().filter(|port| port.container != super::spec::Container::Init).filter_map(|port| {
        let proto = super::parse::protocol(port.protocol.as_deref())?;
        (!port.name.is_empty()).then(|| (PortName { name: std::sync::Arc::clone(&port.name), proto }, port.port))
    })
}

/// A question, of either kind.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Question {
    /// About an address.
    Peer(Predicate),
    /// Is the port in this range?
    Ports(PortRange),
}

/// Number of a question: in memory alone.
pub type Element = u32;

/// The questions that rules in force ask.
#[derive(Clone, Debug, Default)]
pub struct Questions {
    by_content: BTreeMap<Question, Element>,
    states: BTreeMap<Element, State>,
    next: Element,
    /// Questions about pods, by the one namespace that they are about.
    local: BTreeMap<std::sync::Arc<str>, BTreeSet<Element>>,
    /// Questions about pods of many namespaces.
    global: BTreeSet<Element>,
    /// Questions about addresses that need no pod.
    blocks: BTreeSet<Element>,
    ranges: BTreeSet<Element>,
    /// Asked for the first time, or by nobody any more, since [`Questions::take_changed`].
    changed: BTreeSet<Element>,
}

/// One question.
#[derive(Clone, Debug)]
struct State {
    question: Question,
    digest: [u64; 2],
    /// Sets that ask it.
    sets: BTreeSet<u32>,
}

impl Questions {
    /// Notes that a set asks it.
    pub fn ask(&mut self, question: &Question, set: u32) -> Element {
        if let Some(element) = self.by_content.get(question).copied() {
            if let Some(state) = self.states.get_mut(&element) {
                if state.sets.is_empty() {
                    self.changed.insert(element);
                }
                state.sets.insert(set);
            }
            return element;
        }
        self.next += 1;
        let element = self.next;
        self.by_content.insert(question.clone(), element);
        let state = State { question: question.clone(), digest: digest::of(question), sets: BTreeSet::from([set]) };
        self.states.insert(element, state);
        self.changed.insert(element);
        self.group(question).insert(element);
        element
    }

    /// Notes that a set asks it no more.
    pub fn forget(&mut self, element: Element, set: u32) {
        if let Some(state) = self.states.get_mut(&element) {
            state.sets.remove(&set);
            if state.sets.is_empty() {
                self.changed.insert(element);
            }
        }
    }

    fn group(&mut self, question: &Question) -> &mut BTreeSet<Element> {
        match question {
            Question::Ports(_) => &mut self.ranges,
            Question::Peer(predicate) => match &predicate.peer {
                Peer::Block(_) if predicate.exposes.is_none() => &mut self.blocks,
                Peer::Pods { namespaces: Namespaces::Named(name), .. } => {
                    self.local.entry(std::sync::Arc::clone(name)).or_default()
                }
                _ => &mut self.global,
            },
        }
    }

    /// Questions that are asked since the last call, and those that are not any more; the latter are forgotten.
    pub fn take_changed(&mut self) -> Vec<(Element, Question, bool)> {
        let mut taken = Vec::new();
        for element in std::mem::take(&mut self.changed) {
            let Some(state) = self.states.get(&element) else { continue };
            let (question, asked) = (state.question.clone(), !state.sets.is_empty());
            if !asked {
                self.states.remove(&element);
                self.by_content.remove(&question);
                self.group(&question).remove(&element);
                if let Question::Peer(Predicate {
                    peer: Peer::Pods { namespaces: Namespaces::Named(name), .. }, ..
                }) = &question
                    && self.local.get(name).is_some_and(BTreeSet::is_empty)
                {
                    self.local.remove(name);
                }
            }
            taken.push((element, question, asked));
        }
        taken
    }

    /// Which questions about pods does a pod satisfy? Ascending.
    pub fn of_pod(&self, member: &Member, namespace: Option<&Namespace>) -> Vec<Element> {
        let local = self.local.get(&member.pod.name.namespace).into_iter().flatten();
        let mut found: Vec<_> =
            local.chain(&self.global).copied().filter(|e| self.pod_satisfies(*e, member, namespace)).collect();
        found.sort_unstable();
        found
    }

    /// Does a pod satisfy it, as far as its address does not matter?
    pub fn pod_satisfies(&self, element: Element, member: &Member, namespace: Option<&Namespace>) -> bool {
        self.predicate(element).is_some_and(|predicate| predicate.matches_pod(&member.pod, namespace))
    }

    /// The number of a question that is asked.
    pub fn element(&self, question: &Question) -> Option<Element> {
        self.by_content.get(question).copied()
    }

    /// A question about addresses.
    pub fn predicate(&self, element: Element) -> Option<&Predicate> {
        match &self.states.get(&element)?.question {
            Question::Peer(predicate) => Some(predicate),
            Question::Ports(_) => None,
        }
    }

    /// Questions about addresses that need no pod.
    pub fn blocks(&self) -> impl Iterator<Item = (Element, &super::block::IpBlock)> {
        self.blocks.iter().filter_map(|element| match &self.predicate(*element)?.peer {
            Peer::Block(block) => Some((*element, block)),
            Peer::Pods { .. } => None,
        })
    }

    /// Questions about ports.
    pub fn ranges(&self) -> impl Iterator<Item = (Element, PortRange)> + '_ {
        self.ranges.iter().filter_map(|element| match self.states.get(element)?.question {
            Question::Ports(range) => Some((*element, range)),
            Question::Peer(_) => None,
        })
    }

    /// Digest of several questions.
    pub fn digest(&self, elements: &[Element]) -> [u64; 2] {
        let mut digests: Vec<_> = elements.iter().filter_map(|e| Some(self.states.get(e)?.digest)).collect();
        digests.sort_unstable();
        digest::of(&digests)
    }

    /// Sets that ask it.
    pub fn sets(&self, element: Element) -> impl Iterator<Item = u32> + '_ {
        self.states.get(&element).into_iter().flat_map(|state| &state.sets).copied()
    }

    /// How many there are.
    pub fn len(&self) -> usize {
        self.states.len()
    }

    /// Is nothing asked?
    pub fn is_empty(&self) -> bool {
        self.states.is_empty()
    }
}
