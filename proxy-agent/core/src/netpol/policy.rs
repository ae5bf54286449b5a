//! Policies as they are meant: everything defaulted and checked.

use std::collections::BTreeSet;
use std::sync::Arc;

use proxy_abi::Proto;

use super::block::IpBlock;
use super::selector::Selector;
use crate::name::ObjectName;

/// A NetworkPolicy.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Policy {
    /// Name.
    pub name: ObjectName,
    /// It is not enforced: what it would refuse passes, and is counted.
    pub audited: bool,
    /// The pods it is for, within its namespace.
    pub subject: Selector,
    /// What may reach them; `None` = says nothing about ingress. Without a rule nothing may.
    pub ingress: Option<Vec<Rule>>,
    /// What they may reach.
    pub egress: Option<Vec<Rule>>,
}

/// A rule: one of the peers and one of the ports.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Rule {
    /// Peers.
    pub peers: Peers,
    /// Ports.
    pub ports: Ports,
}

/// Who is meant.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Peers {
    /// Every address.
    Any,
    /// One of these. Of an empty list nobody.
    Some(Vec<Peer>),
}

/// One peer.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Peer {
    /// Pods.
    Pods {
        /// Where.
        namespaces: Namespaces,
        /// Which.
        pods: Selector,
    },
    /// Addresses, pods' or not.
    Block(IpBlock),
}

/// Namespaces of a peer.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Namespaces {
    /// This one.
    Named(Arc<str>),
    /// Those that match.
    Matching(Selector),
}

/// Which destination ports are meant.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Ports {
    /// Every protocol and port.
    Any,
    /// One of these. Of an empty list none.
    Some(Vec<Port>),
}

/// One item of a list of ports.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Port {
    /// Numbers.
    Range(PortRange),
    /// A name, which each destination pod gives its own numbers.
    Named(PortName),
}

/// Ports of a protocol.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct PortRange {
    /// Protocol.
    pub proto: Proto,
    /// First.
    pub first: u16,
    /// Last.
    pub last: u16,
}

/// The name of a container's port.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct PortName {
    /// Name.
    pub name: Arc<str>,
    /// Protocol: the same name under another protocol is another port.
    pub proto: Proto,
}

impl PortRange {
    /// All ports of a protocol.
    pub const fn all(proto: Proto) -> Self {
        Self { proto, first: 0, last: u16::MAX }
    }

    /// One port.
    pub const fn one(proto: Proto, port: u16) -> Self {
        Self { proto, first: port, last: port }
    }

    /// The smallest list of ranges that holds the same ports.
    pub fn merged(ranges: impl IntoIterator<Item = Self>) -> BTreeSet<Self> {
        let sorted: BTreeSet<Self> = ranges.into_iter().collect();
        let mut merged: Vec<Self> = Vec::new();
        for range in sorted {
            match merged.last_mut() {
                Some(last) if last.proto == range.proto && u32::from(range.first) <= u32::from(last.last) + 1 => {
                    last.last = last.last.max(range.last);
                }
                _ => merged.push(range),
            }
        }
        merged.into_iter().collect()
    }
}
