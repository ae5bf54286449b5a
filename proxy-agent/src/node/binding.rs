//! Which address belongs to which pod interface.
//!
//! The addresses inside a pod's namespace are written by whoever holds `CAP_NET_ADMIN` there, and that may be the pod.
//! So an address that is seen is a *claim*, and a claim is bound only if
//!
//! 1. the CNI's records name it for this interface (`trusted`), or, where there are no records for the interface,
//! 2. it is of global scope, within the pod ranges and none of the node's own, **and**
//!    it is the first of its family on this interface: a Kubernetes pod has one address of a family, and the CNI adds
//!    it before anything of the pod runs, so whatever comes after it is not the CNI's; **and**
//!    it came within a short time (`window`) after the first address of the interface at all; **and**
//! 3. no other live interface has it. The first keeps it; the second waits until the first is gone or has given it up
//!    (a CNI may hand out an address while the interface of the pod that had it is still being removed).
//!
//! What an interface once took of a family stays its choice: removing the address unbinds it, and adding another one
//! does not bind that.
//!
//! After a restart of the agent the bindings that stand in the pinned maps come first, then the older interface. An
//! interface without a binding there counts as new: a pod that has taken down its own address before can then take a
//! free one. It cannot take one that is bound; and `trusted` closes this, too.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;

use ipnet::IpNet;
use proxy_abi::MacBytes;

/// Monotonic time since any fixed moment.
pub type Time = Duration;

/// Addresses that the CNI's records name, by interface index.
pub type Trusted = BTreeMap<u32, BTreeSet<IpAddr>>;

/// Who had an address before the agent was restarted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Previous {
    /// The interface.
    pub ifindex: u32,
    /// MAC of the pod's end then: an index alone says nothing after a reboot.
    pub mac: MacBytes,
}

/// What a pod interface shows.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Claim {
    /// Interface name, for messages.
    pub name: Arc<str>,
    /// MAC of the pod's end.
    pub mac: MacBytes,
    /// Its global addresses, the one first added first. `None` when they could not be read: then nothing changes.
    pub addresses: Option<Vec<IpAddr>>,
    /// Where a pod's address may lie.
    pub ranges: Vec<IpNet>,
}

/// Why a claim is not bound.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Refusal {
    /// Another interface has it: its name.
    Taken(Arc<str>),
    /// It is an address of the node.
    Node,
    /// It is outside the pod ranges, or no unicast address.
    OutOfRange,
    /// The interface has, or had, another address of this family.
    Second,
    /// It came too long after the interface's first address.
    Late,
    /// The CNI's records name other addresses for this interface, or another interface for this address.
    NotOfCni,
}

/// The bindings of all pod interfaces.
#[derive(Clone, Debug, Default)]
pub struct Bindings {
    window: Duration,
    previous: BTreeMap<IpAddr, Previous>,
    links: BTreeMap<u32, LinkState>,
    owners: BTreeMap<IpAddr, u32>,
}

#[derive(Clone, Debug, Default)]
struct LinkState {
    /// When an acceptable address was first seen.
    first: Option<Time>,
    /// Addresses taken for the pod's own, and since when; bound unless another interface has them.
    chosen: BTreeMap<IpAddr, Time>,
    refused: BTreeMap<IpAddr, Refusal>,
}

// === impl Bindings ===

impl Bindings {
    /// No interface yet. `previous` decides the first [`update`](Self::update), and is then forgotten.
    pub fn new(window: Duration, previous: BTreeMap<IpAddr, Previous>) -> Self {
        Self { window, previous, ..Self::default() }
    }

    /// Takes in the claims of all pod interfaces that now exist; an interface that is not named is gone. `own` are the
    /// node's addresses.
    pub fn update(&mut self, now: Time, own: &BTreeSet<IpAddr>, trusted: &Trusted, claims: &BTreeMap<u32, Claim>) {
        self.links.retain(|index, _| claims.contains_key(index));
        self.restore(now, claims);
        for (index, claim) in claims {
            let state = self.links.entry(*index).or_default();
            state.refused.clear();
            state.choose(now, self.window, own, trusted, (*index, claim));
        }
        self.release(own, trusted, claims);
        self.bind(own, trusted, claims);
    }

    /// Addresses bound to an interface, in order.
    pub fn bound(&self, ifindex: u32) -> Vec<IpAddr> {
        let chosen = self.links.get(&ifindex).into_iter().flat_map(|state| state.chosen.keys());
        chosen.filter(|ip| self.owners.get(ip) == Some(&ifindex)).copied().collect()
    }

    /// Claims of an interface that are not bound, each with the reason.
    pub fn refused(&self, ifindex: u32) -> impl Iterator<Item = (IpAddr, &Refusal)> {
        self.links.get(&ifindex).into_iter().flat_map(|state| &state.refused).map(|(ip, why)| (*ip, why))
    }

    /// No further address is awaited: every family of the ranges has its address, or the window is over.
    pub fn settled(&self, now: Time, ifindex: u32, ranges: &[IpNet]) -> bool {
        let Some(state) = self.links.get(&ifindex) else { return false };
        let late = state.first.is_some_and(|first| now > first + self.window);
        let has = |v4: bool| state.chosen.keys().any(|ip| ip.is_ipv4() == v4);
        late || (!ranges.is_empty() && ranges.iter().all(|net| has(net.addr().is_ipv4())))
    }

    fn restore(&mut self, now: Time, claims: &BTreeMap<u32, Claim>) {
        for (ip, previous) in std::mem::take(&mut self.previous) {
            // What cannot be read just now shows no MAC either.
            let is_same = |claim: &Claim| claim.addresses.is_none() || claim.mac == previous.mac;
            if claims.get(&previous.ifindex).is_some_and(is_same) {
                let state = self.links.entry(previous.ifindex).or_default();
                // An agent that died between a pod's two addresses must still find the second: the window opens anew
                // for the family that is missing.
                state.first = Some(now);
                state.chosen.insert(ip, Duration::ZERO);
                self.owners.insert(ip, previous.ifindex);
            }
        }
    }

    /// Unbinds what is not claimed any more, or not acceptable any more.
    fn release(&mut self, own: &BTreeSet<IpAddr>, trusted: &Trusted, claims: &BTreeMap<u32, Claim>) {
        self.owners.retain(|ip, owner| {
            let Some(claim) = claims.get(owner) else { return false };
            let claimed = claim.addresses.as_ref().is_none_or(|addresses| addresses.contains(ip));
            claimed && refusal(own, trusted, *owner, claim, *ip).is_none()
        });
    }

    fn bind(&mut self, own: &BTreeSet<IpAddr>, trusted: &Trusted, claims: &BTreeMap<u32, Claim>) {
        // Waiting longest first, then the older interface.
        let mut waiting: Vec<(Time, u32, IpAddr)> = Vec::new();
        for (index, state) in &self.links {
            let Some(claim) = claims.get(index) else { continue };
            for ip in claim.addresses.iter().flatten() {
                if let Some(since) = state.chosen.get(ip)
                    && refusal(own, trusted, *index, claim, *ip).is_none()
                {
                    waiting.push((*since, *index, *ip));
                }
            }
        }
        waiting.sort_unstable();
        for (_, index, ip) in waiting {
            let owner = *self.owners.entry(ip).or_insert(index);
            if owner != index
                && let Some(state) = self.links.get_mut(&index)
            {
                let name = claims.get(&owner).map(|claim| Arc::clone(&claim.name)).unwrap_or_default();
                state.refused.insert(ip, Refusal::Taken(name));
            }
        }
    }
}

// === impl LinkState ===

impl LinkState {
    /// Decides which claims are the pod's own. Whether they are free is decided later.
    fn choose(
        &mut self,
        now: Time,
        window: Duration,
        own: &BTreeSet<IpAddr>,
        trusted: &Trusted,
        (index, claim): (u32, &Claim),
    ) {
        let recorded = trusted.get(&index);
        if let Some(recorded) = recorded {
            self.chosen.retain(|ip, _| recorded.contains(ip));
        }
        for ip in claim.addresses.iter().flatten() {
            let why = refusal(own, trusted, index, claim, *ip).or_else(|| {
                if recorded.is_some() || self.chosen.contains_key(ip) {
                    return None;
                }
                // A choice that the ranges have left since (they came to be known, or changed) does not count.
                let valid = |other: &IpAddr| refusal(own, trusted, index, claim, *other).is_none();
                if self.chosen.keys().any(|other| other.is_ipv4() == ip.is_ipv4() && valid(other)) {
                    return Some(Refusal::Second);
                }
                self.first.is_some_and(|first| now > first + window).then_some(Refusal::Late)
            });
            if let Some(why) = why {
                self.refused.insert(*ip, why);
            } else {
                self.first.get_or_insert(now);
                self.chosen.entry(*ip).or_insert(now);
            }
        }
    }
}

/// Why an address can never be this interface's as things are; time and other claims apart.
fn refusal(own: &BTreeSet<IpAddr>, trusted: &Trusted, index: u32, claim: &Claim, ip: IpAddr) -> Option<Refusal> {
    if own.contains(&ip) {
        return Some(Refusal::Node);
    }
    if !is_unicast(ip) || !claim.ranges.iter().any(|net| net.contains(&ip)) {
        return Some(Refusal::OutOfRange);
    }
    let other = trusted.iter().any(|(other, addresses)| *other != index && addresses.contains(&ip));
    let named = trusted.get(&index).map(|addresses| addresses.contains(&ip));
    match (named, other) {
        (Some(true), _) | (None, false) => None,
        (Some(false), _) | (None, true) => Some(Refusal::NotOfCni),
    }
}

fn is_unicast(ip: IpAddr) -> bool {
    !match ip {
        IpAddr::V4(v4) => {
            v4.is_unspecified() || v4.is_loopback() || v4.is_link_local() || v4.is_multicast() || v4.is_broadcast()
        }
        IpAddr::V6(v6) => {
            v6.is_unspecified()
                || v6.is_loopback()
                || v6.is_unicast_link_local()
                || v6.is_multicast()
                || v6.to_ipv4_mapped().is_some()
        }
    }
}

#[cfg(test)]
#[path = "binding_tests.rs"]
mod tests;
