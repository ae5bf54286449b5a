//! Which pods' sockets are translated (`--socket-lb=all`).
//!
//! ```text
//!   interface, with its pod by the CNI's record ──┐
//!   Pod of the API: its annotation ───────────────┼─▶ Event::CgroupPods ─▶ Reconciler ─▶ map `cgroup_pod`
//!   cgroup, by the name that kubelet gave it ─────┘
//! ```
//!
//! A pod of which one of the three is not known is served by its packets, as all pods are with `--socket-lb=node`; so nothing
//! here is urgent, and nothing waits for it.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use proxy_abi::{CgroupPodEntry, IpBytes};
use proxy_core::diagnostic::{Diagnostic, Severity};
use proxy_core::event::{Event, LinkPath, Listing, PodLink, Source};
use proxy_core::local::LocalPods;
use proxy_core::netpol::reconcile::PolicyListing;
use proxy_core::netpol::spec::Change;
use proxy_core::state::ClusterState;

use crate::node::cgroup::Cgroups;

/// Until a cgroup that was not there is looked for again; doubled each time.
const FIRST_PAUSE: Duration = Duration::from_millis(250);
/// The longest pause, and how often those that were found are looked at: kubelet may make a cgroup anew.
const LAST_PAUSE: Duration = Duration::from_mins(1);
/// When no pod at all has been found for this long, it is said: there may be nothing to find.
const PATIENCE: Duration = Duration::from_secs(5);
/// What that finding is about.
const OBJECT: &str = "Sockets of pods";

/// What is known of pods whose sockets may be translated.
pub(super) struct CgroupPods {
    cgroups: Cgroups,
    /// All Pods have been told of.
    listed: bool,
    /// Something may have changed.
    due: bool,
    /// By UID.
    wanted: BTreeMap<Arc<str>, CgroupPodEntry>,
    next: Option<Instant>,
    pause: Duration,
    /// Since when there are pods, and not one has a cgroup.
    none_since: Option<Instant>,
}

impl CgroupPods {
    /// Nothing known yet; cgroups are below `root`.
    pub(super) fn new(root: PathBuf) -> Self {
        Self {
            cgroups: Cgroups::new(root),
            listed: false,
            due: false,
            wanted: BTreeMap::new(),
            next: None,
            pause: FIRST_PAUSE,
            none_since: None,
        }
    }

    /// Takes note of what concerns it.
    pub(super) fn handle(&mut self, event: &Event) {
        match event {
            Event::Link(_)
            | Event::LinkGone(_)
            | Event::Listed(Source::Links, Listing::Links(_))
            | Event::NetworkPolicy(Change::Pod(_) | Change::PodGone(_)) => self.due = true,
            Event::NetworkPolicyListed(PolicyListing::Pods(_)) => (self.listed, self.due) = (true, true),
            _ => {}
        }
    }

    /// When [`Self::update`] may have more to say though nothing comes.
    pub(super) const fn next(&self) -> Option<Instant> {
        self.next
    }

    /// What is to be known of it, where that may be news.
    pub(super) fn update(&mut self, state: &ClusterState, local: &LocalPods, now: Instant) -> Vec<Event> {
        let again = self.next.is_some_and(|at| now >= at);
        // What is not known yet is not absent: the map keeps what it has.
        if !self.listed || !state.synced() || !self.due && !again {
            return Vec::new();
        }
        self.due = false;
        let wanted = wanted(state, local);
        if wanted == self.wanted && !again && self.next.is_some() {
            return Vec::new();
        }
        if wanted != self.wanted {
            self.pause = FIRST_PAUSE;
        }
        self.wanted = wanted;
        let ids = self.cgroups.ids(self.wanted.keys());
        let lacking = self.wanted.len().saturating_sub(ids.len());
        if lacking == 0 {
            self.pause = LAST_PAUSE;
        } else if self.pause == FIRST_PAUSE {
            tracing::debug!(lacking, "pods without a cgroup that bears their UID: their packets are translated");
        }
        let none = !self.wanted.is_empty() && ids.is_empty();
        let since = self.none_since.filter(|_| none).unwrap_or(now);
        self.none_since = none.then_some(since);
        let findings = if none && now >= since + PATIENCE { vec![self.finding()] } else { Vec::new() };
        self.next = Some(now + self.pause);
        self.pause = (self.pause * 2).min(LAST_PAUSE);
        let pods = ids.into_iter().filter_map(|(uid, id)| Some((id, *self.wanted.get(&uid)?)));
        let pods = Event::CgroupPods(pods.collect());
        vec![pods, Event::Diagnostics { object: OBJECT.to_owned(), findings }]
    }

    fn finding(&self) -> Diagnostic {
        Diagnostic {
            severity: Severity::Warning,
            object: OBJECT.to_owned(),
            field: "--socket-lb=all".to_owned(),
            problem: format!(
                "no pod's cgroup is found below {}; packets are translated",
                self.cgroups.root().display()
            ),
            fix: "kubelet and the container runtime must use cgroup v2; give its root with --cgroup PATH".to_owned(),
        }
    }
}

/// Pods whose sockets are to be translated, by UID. Not those that a bridge keeps apart from others: their packets are led
/// around it.
fn wanted(state: &ClusterState, local: &LocalPods) -> BTreeMap<Arc<str>, CgroupPodEntry> {
    let mut wanted = BTreeMap::new();
    for link in state.links().filter(|link| link.path != LinkPath::Stack) {
        let Some(uid) = &link.pod else { continue };
        let may = local.pod(uid).is_some_and(|pod| pod.socket_lb && !pod.host_network && !pod.finished);
        if may && let Some(entry) = entry(state, link) {
            // A pod with several interfaces is known by the one that came first.
            wanted.entry(Arc::clone(uid)).or_insert(entry);
        }
    }
    wanted
}

/// `None` without an address.
fn entry(state: &ClusterState, link: &PodLink) -> Option<CgroupPodEntry> {
    let own = |v4: bool| {
        let of_family = link.addresses.iter().find(|ip| ip.is_ipv4() == v4 && state.holder(**ip) == Some(link.ifindex));
        of_family.map_or(IpBytes::UNSPECIFIED, |ip| IpBytes::from(*ip))
    };
    let (ip4, ip6) = (own(true), own(false));
    let has_one = ip4 != IpBytes::UNSPECIFIED || ip6 != IpBytes::UNSPECIFIED;
    has_one.then_some(CgroupPodEntry { ip4, ip6, ifindex: link.ifindex, reserved: 0 })
}
