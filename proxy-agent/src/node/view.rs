//! The node as netlink shows it at this moment: its own namespace, the far ends of its veths, and whose programs are on
//! them.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::time::Duration;

use proxy_abi::MacBytes;

use super::binding::Time;
use super::classify::{Host, PodNetwork};
use super::netlink::{Hints, NetlinkError, Requests};
use super::path::{ForeignTcx, is_foreign};
use super::wire::Link;

/// Waits between two looks at an interface that has no address yet, in milliseconds; then the last one again and
/// again. A CNI adds the address a few milliseconds after it has made the interface, longer when its IPAM is slow.
const QUICK: [u64; 7] = [1, 2, 5, 10, 20, 50, 100];
/// Wait between two looks when one family has its address and another might follow.
const FAMILY: Duration = Duration::from_millis(100);
/// Wait between two looks at an interface that has had no address for long.
const SLOW: Duration = Duration::from_secs(1);
/// With more interfaces than this to look at, one listing of all is cheaper.
const MANY: usize = 64;

/// The node, and how to look at it.
pub(super) struct View {
    requests: Requests,
    foreign_tcx: Box<dyn ForeignTcx>,
    /// The own namespace.
    pub(super) host: Host,
    /// Which bridges are the pods'.
    pub(super) network: PodNetwork,
    /// Far ends of the veths that lead to other namespaces, by index of the near end.
    pub(super) peers: BTreeMap<u32, Peer>,
}

/// The far end of a veth.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Peer {
    /// When the near end was first seen.
    since: Time,
    /// How often it was due.
    looks: usize,
    /// It has been read at least once.
    seen: bool,
    /// The last attempt to read it failed.
    failed: bool,
    /// When to look next; `None` leaves it to the regular sweep.
    next: Option<Time>,
    /// Its MAC, when last seen.
    pub(super) mac: MacBytes,
    /// Its global addresses, the one first added first. `None` when they could not be read at the last look.
    pub(super) addresses: Option<Vec<IpAddr>>,
    /// Programs of somebody else are on the near end.
    pub(super) foreign: bool,
}

// === impl View ===

impl View {
    /// Knows nothing yet: [`list`](Self::list) comes first.
    pub(super) fn new(requests: Requests, foreign_tcx: Box<dyn ForeignTcx>, network: PodNetwork) -> Self {
        Self { requests, foreign_tcx, host: Host::default(), network, peers: BTreeMap::new() }
    }

    /// Looks at everything. On an error the view is as before, or partly newer.
    pub(super) fn list(&mut self, now: Time) -> Result<(), NetlinkError> {
        let links = self.requests.links()?;
        let mut addresses: BTreeMap<u32, Vec<_>> = BTreeMap::new();
        for address in self.requests.addresses(0, None)?.unwrap_or_default() {
            addresses.entry(address.index).or_default().push(address);
        }
        (self.host.links, self.host.addresses) = (links, addresses);
        self.track_peers(now);
        let filtered = self.requests.filtered_links()?;
        let indices: Vec<u32> = self.peers.keys().copied().collect();
        for index in indices {
            self.look_at_programs(index, filtered.contains(&index))?;
            self.look(index);
        }
        Ok(())
    }

    /// Looks at what notifications point to.
    pub(super) fn follow(&mut self, hints: &Hints, now: Time) -> Result<(), NetlinkError> {
        if hints.lost || hints.links.len() + hints.addresses.len() > MANY {
            return self.list(now);
        }
        for index in &hints.links {
            match self.requests.link(*index, None)? {
                Some(link) => self.host.links.insert(*index, link),
                None => self.host.links.remove(index),
            };
        }
        for index in &hints.addresses {
            let addresses = self.requests.addresses(*index, None)?.unwrap_or_default();
            self.host.addresses.insert(*index, addresses);
        }
        let fresh = self.track_peers(now);
        for index in &hints.links {
            // It may lead elsewhere now.
            if let Some(peer) = self.peers.get_mut(index) {
                peer.next = Some(now);
            }
        }
        for index in hints.filters.union(&fresh) {
            self.look_at_programs(*index, true)?;
        }
        Ok(())
    }

    /// Makes those far ends due that notifications from other namespaces point to.
    pub(super) fn follow_peers(&mut self, hints: &Hints, now: Time) {
        for (index, peer) in &mut self.peers {
            let place = self.host.links.get(index).and_then(|link| Some((link.peer_nsid?, link.peer?)));
            if hints.lost || place.is_some_and(|place| hints.peers.contains(&place)) {
                peer.next = Some(now);
            }
        }
    }

    /// Looks at the far ends that are due.
    pub(super) fn poll(&mut self, now: Time) {
        // One that was never read may have become a pod's by its bridge's first address.
        let is_new = |index: &u32, peer: &Peer| !peer.seen && self.is_pod(*index);
        let due = |index: &u32, peer: &Peer| peer.next.is_some_and(|next| next <= now) || is_new(index, peer);
        let indices: Vec<u32> = self.peers.iter().filter(|(index, peer)| due(index, peer)).map(|(i, _)| *i).collect();
        for index in indices {
            self.look(index);
        }
    }

    /// Sets when each far end that was just looked at is looked at next. `settled`: no further address is awaited.
    pub(super) fn plan(&mut self, now: Time, window: Duration, settled: impl Fn(u32) -> bool) {
        for (index, peer) in &mut self.peers {
            if peer.next.is_none_or(|next| next <= now) {
                peer.next = peer.wait(now, window, settled(*index)).map(|wait| now + wait);
            }
        }
    }

    /// When the next far end is due.
    pub(super) fn next_look(&self) -> Option<Time> {
        self.peers.values().filter_map(|peer| peer.next).min()
    }

    /// Forgets what is gone; returns the veths to other namespaces that are new.
    fn track_peers(&mut self, now: Time) -> BTreeSet<u32> {
        let links = &self.host.links;
        self.host.addresses.retain(|index, _| links.contains_key(index));
        self.host.routes.retain(|index, _| links.contains_key(index));
        let lead_out = |index: &u32| links.get(index).is_some_and(Link::is_veth_to_another_namespace);
        self.peers.retain(|index, _| lead_out(index));
        let fresh: BTreeSet<u32> =
            links.keys().filter(|index| lead_out(index) && !self.peers.contains_key(index)).copied().collect();
        self.peers.extend(fresh.iter().map(|index| (*index, Peer { since: now, next: Some(now), ..Peer::default() })));
        fresh
    }

    fn is_pod(&self, index: u32) -> bool {
        self.host.links.get(&index).is_some_and(|link| self.host.pod_ranges(&self.network, link).is_some())
    }

    /// Looks at one veth: the routes out of it, and its far end when it is a pod's. A failure concerns this one alone,
    /// and is said once.
    fn look(&mut self, index: u32) {
        let result = self.look_at_routes(index).and_then(|()| self.look_at_peer(index));
        let Some(peer) = self.peers.get_mut(&index) else { return };
        peer.looks = peer.looks.saturating_add(1);
        if let Err(error) = &result {
            peer.addresses = None;
            if !peer.failed {
                tracing::warn!(
                    ifindex = index,
                    error = error as &dyn std::error::Error,
                    "cannot read a pod's addresses"
                );
            }
        }
        peer.failed = result.is_err();
    }

    /// Routes matter only for veths that belong to no bridge.
    fn look_at_routes(&mut self, index: u32) -> Result<(), NetlinkError> {
        if self.host.links.get(&index).is_some_and(|link| link.master.is_none()) {
            let routes = self.requests.routes(index)?;
            self.host.routes.insert(index, routes);
        } else {
            self.host.routes.remove(&index);
        }
        Ok(())
    }

    /// Other interfaces than veths to other namespaces do not matter.
    fn look_at_programs(&mut self, index: u32, has_filters: bool) -> Result<(), NetlinkError> {
        let Some(peer) = self.peers.get_mut(&index) else { return Ok(()) };
        let filters = if has_filters { self.requests.filters(index)? } else { Vec::new() };
        peer.foreign = filters.iter().any(is_foreign) || self.foreign_tcx.is_present(index);
        Ok(())
    }

    /// Reads MAC and addresses of a pod's end. They count only if they are those of the far end of *this* veth: ids of
    /// namespaces are reused at once, and `eth0` has the same index in most pods. So the far end must name ours as its
    /// peer, and ours must still lead to the same place when all has been read.
    fn look_at_peer(&mut self, index: u32) -> Result<(), NetlinkError> {
        let (Some(link), Some(peer)) = (self.host.links.get(&index), self.peers.get_mut(&index)) else { return Ok(()) };
        let (Some(far), nsid @ Some(_)) = (link.peer, link.peer_nsid) else { return Ok(()) };
        if self.host.pod_ranges(&self.network, link).is_none() {
            return Ok(());
        }
        peer.seen = true;
        let mut read = || {
            let end = self.requests.link(far, nsid)?.filter(|end| &*end.kind == "veth" && end.peer == Some(index));
            let Some(end) = end else { return Ok(None) };
            let Some(mut addresses) = self.requests.addresses(far, nsid)? else { return Ok(None) };
            let same =
                self.requests.link(index, None)?.is_some_and(|now| now.peer == link.peer && now.peer_nsid == nsid);
            addresses.retain(|address| address.global);
            // Stable: the kernel lists IPv4 in the order of addition, but IPv6 in the opposite one.
            addresses.sort_by_key(|address| address.created);
            Ok(same.then(|| (end.mac, addresses.into_iter().map(|address| address.net.addr()).collect())))
        };
        match read()? {
            Some((mac, addresses)) => (peer.mac, peer.addresses) = (mac, Some(addresses)),
            None => peer.addresses = None,
        }
        Ok(())
    }
}

// === impl Peer ===

impl Peer {
    fn wait(&self, now: Time, window: Duration, settled: bool) -> Option<Duration> {
        if self.addresses.as_ref().is_some_and(|addresses| !addresses.is_empty()) {
            return (!settled).then_some(FAMILY);
        }
        if now.saturating_sub(self.since) >= window {
            return Some(SLOW);
        }
        QUICK.get(self.looks).or(QUICK.last()).map(|wait| Duration::from_millis(*wait))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn waits_between_looks() {
        let window = Duration::from_secs(5);
        let wait = |looks, at, addresses: Option<&[&str]>, settled| {
            let addresses = addresses.map(|all| all.iter().map(|ip| ip.parse().unwrap()).collect());
            let peer = Peer { looks, addresses, ..Peer::default() };
            peer.wait(Duration::from_millis(at), window, settled).map(|wait| wait.as_millis())
        };
        let cases = [
            (wait(0, 0, None, false), Some(1)),
            (wait(1, 1, Some(&[]), false), Some(2)),
            (wait(6, 90, Some(&[]), false), Some(100)),
            (wait(40, 4_999, Some(&[]), false), Some(100)),
            (wait(50, 5_000, Some(&[]), false), Some(1_000)),
            (wait(9, 30, Some(&["10.0.0.2"]), false), Some(100)),
            (wait(9, 30, Some(&["10.0.0.2"]), true), None),
            (wait(99, 60_000, Some(&["10.0.0.2"]), true), None),
        ];
        for (n, (found, expected)) in cases.into_iter().enumerate() {
            assert_eq!(found, expected, "case {n}");
        }
    }
}
