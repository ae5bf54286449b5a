//! From rules to cells: who satisfies the questions that are asked, and which ports lie between the borders of ranges.

use std::collections::{BTreeMap, BTreeSet};

use ipnet::IpNet;
use proxy_abi::policy::{PORT_PROTOCOLS, cell};

use super::super::partition::Kind;
use super::super::policy::{Namespaces, Peer};
use super::super::predicate::{Element, Predicate, Question};
use super::Engine;
use crate::name::ObjectName;

impl Engine {
    /// Who satisfies the questions that are new, and forgets those that nobody asks any more.
    pub(super) fn derive_questions(&mut self, members: BTreeSet<ObjectName>) {
        let changed = self.questions.take_changed();
        let mut nets = BTreeSet::new();
        for (element, ..) in changed.iter().filter(|(_, _, asked)| !asked) {
            let questions = &self.questions;
            self.partition.forget(*element, |elements| questions.digest(elements));
        }
        for name in members {
            let Some(member) = self.world.member(&name) else { continue };
            let elements = self.questions.of_pod(member, self.world.namespace(&name.namespace));
            self.set_elements(&name, elements);
        }
        for (element, question, asked) in changed {
            match question {
                Question::Ports(_) => self.work.ports = true,
                Question::Peer(predicate) if predicate.asks_pod() => self.poll(element, &predicate, asked),
                Question::Peer(Predicate { peer: Peer::Block(block), .. }) => {
                    self.work.ips.extend(self.world.ips_in(block.net));
                    self.work.ranges = true;
                    for net in block.borders() {
                        self.count_border(net, asked);
                    }
                    nets.extend(
                        self.ranges.range(block.net..).map(|(net, _)| *net).take_while(|net| block.net.contains(net)),
                    );
                }
                Question::Peer(_) => {}
            }
        }
        for net in nets {
            let covering = self.questions.blocks().filter(|(_, block)| block.covers(net)).map(|(element, _)| element);
            let vector = covering.collect();
            let cell = self.acquire(Kind::Address, vector, cell::NONE);
            if let Some((_, old)) = self.ranges.get_mut(&net) {
                let old = std::mem::replace(old, cell);
                self.partition.release(old);
            }
        }
    }

    /// A block that changes at a border is new, or gone.
    fn count_border(&mut self, net: IpNet, more: bool) {
        let (count, cell) = self.ranges.entry(net).or_insert((0, cell::NONE));
        *count = if more { *count + 1 } else { count.saturating_sub(1) };
        if *count == 0 {
            let cell = *cell;
            self.ranges.remove(&net);
            self.partition.release(cell);
        }
    }

    /// The cell that answers yes to these questions, or `otherwise` when there is no number left: a cell for which no
    /// rule matches that does not match everybody, so that nothing passes which should not.
    fn acquire(&mut self, kind: Kind, vector: Vec<Element>, otherwise: u32) -> u32 {
        let questions = &self.questions;
        self.partition.acquire(kind, vector, |elements| questions.digest(elements)).unwrap_or(otherwise)
    }

    /// The cells of the pods' addresses.
    pub(super) fn derive_ips(&mut self) {
        for ip in self.work.ips.clone() {
            let vector = self.world.owner(ip).map(|member| {
                let of_pod = member.elements.iter().copied();
                let fitting = of_pod.filter(|e| self.questions.predicate(*e).is_some_and(|p| p.matches_ip(ip)));
                let of_ip = self.questions.blocks().filter(|(_, block)| block.contains(ip)).map(|(element, _)| element);
                let mut vector: Vec<_> = fitting.chain(of_ip).collect();
                vector.sort_unstable();
                vector
            });
            let cell = match (vector, self.unplaced.get(&ip).copied()) {
                (None, _) => {
                    self.unplaced.remove(&ip);
                    None
                }
                (Some(_), Some(cell::NONE)) => None,
                (Some(_), Some(fallback)) => Some(fallback),
                (Some(vector), None) => Some(self.acquire(Kind::Pod, vector, cell::ANY_POD)),
            };
            let old = match cell {
                Some(cell) => self.ips.insert(ip, cell),
                None => self.ips.remove(&ip),
            };
            if let Some(old) = old {
                self.partition.release(old);
            }
        }
    }

    /// The cells of ports: between two neighbouring borders of ranges no rule tells ports apart.
    pub(super) fn derive_ports(&mut self) {
        let mut ports = BTreeMap::new();
        for proto in PORT_PROTOCOLS {
            let ranges: Vec<_> = self.questions.ranges().filter(|(_, range)| range.proto == proto).collect();
            let firsts = ranges.iter().map(|(_, range)| range.first);
            let ends = ranges.iter().filter_map(|(_, range)| range.last.checked_add(1));
            let borders: BTreeSet<u16> = firsts.chain(ends).collect();
            let mut steps = BTreeMap::new();
            for port in borders {
                let holding = ranges.iter().filter(|(_, range)| range.first <= port && port <= range.last);
                let mut vector: Vec<_> = holding.map(|(element, _)| *element).collect();
                vector.sort_unstable();
                steps.insert(port, self.acquire(Kind::Port(proto), vector, cell::NONE));
            }
            ports.insert(proto, steps);
        }
        let old = std::mem::replace(&mut self.ports, ports);
        for cell in old.into_values().flat_map(BTreeMap::into_values) {
            self.partition.release(cell);
        }
    }

    /// Asks every pod that may satisfy a question about pods.
    fn poll(&mut self, element: Element, predicate: &Predicate, asked: bool) {
        let mut names: Vec<ObjectName> = Vec::new();
        match &predicate.peer {
            Peer::Pods { namespaces: Namespaces::Named(name), .. } => names.extend(self.world.members_of(name)),
            Peer::Pods { namespaces: Namespaces::Matching(selector), .. } => {
                for (name, object) in self.world.namespaces() {
                    if object.map_or(selector.is_empty(), |object| selector.matches(&object.labels)) {
                        names.extend(self.world.members_of(name));
                    }
                }
            }
            // The address is asked later: it may change hands.
            Peer::Block(_) => names.extend(self.world.members().map(|(name, _)| name.clone())),
        }
        for name in names {
            let Some(member) = self.world.member(&name) else { continue };
            if !predicate.matches_pod(&member.pod, self.world.namespace(&name.namespace)) {
                continue;
            }
            let mut elements = member.elements.clone();
            match (elements.binary_search(&element), asked) {
                (Err(place), true) => elements.insert(place, element),
                (Ok(place), false) => drop(elements.remove(place)),
                (Ok(_), true) | (Err(_), false) => continue,
            }
            self.set_elements(&name, elements);
        }
    }

    fn set_elements(&mut self, name: &ObjectName, elements: Vec<Element>) {
        if self.world.set_elements(name, elements)
            && let Some(member) = self.world.member(name)
        {
            self.work.ips.extend(&member.pod.ips);
        }
    }
}
