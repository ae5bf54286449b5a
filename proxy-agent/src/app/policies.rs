//! NetworkPolicy's part of the rounds: objects in, maps written, and what interfaces are to know of it out.
//!
//! ```text
//!   events ─▶ pods joined with their interfaces ─▶ PolicyReconciler ─▶ maps of policy, first
//!                                                        │ slots in force
//!                                                        ▼
//!                                     Event::Enforcement ─▶ Reconciler ─▶ interfaces name their slots, after that
//! ```

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use proxy_abi::DeviceEntry;
use proxy_core::diagnostic::{Diagnostic, Severity};
use proxy_core::event::{Enforcement, Event, PodLink};
use proxy_core::local::LocalPods;
use proxy_core::netpol::engine::{Engine, Limits};
use proxy_core::netpol::reconcile::{PolicyReconciler, PolicyReport, PolicySettings, PolicySource, Regime};
use proxy_core::state::ClusterState;
use tokio::sync::watch;

use crate::dataplane::{self, Bpf};
use crate::node::cni::Records;

/// An interface that is held longer than this is told of: the CNI and the API server take their time with every new pod.
const PATIENCE: Duration = Duration::from_secs(5);

/// NetworkPolicy in the reconciler's task.
pub(super) struct Policies {
    reconciler: PolicyReconciler,
    local: LocalPods,
    records: watch::Receiver<Records>,
    /// The maps of policy have been read: until then nobody knows which slots are in force.
    known: bool,
    held: BTreeMap<u32, Held>,
}

/// An interface of which nobody knows what its pod may do.
struct Held {
    name: Arc<str>,
    since: Instant,
    /// What was told of it.
    told: Option<String>,
}

impl Policies {
    /// Nothing known yet, of maps with so much room.
    pub(super) fn new(node: &str, limits: Limits, records: watch::Receiver<Records>) -> Self {
        Self {
            reconciler: PolicyReconciler::new(PolicySettings { limits, ..PolicySettings::new(node) }),
            local: LocalPods::new(node),
            records,
            known: false,
            held: BTreeMap::new(),
        }
    }

    /// Takes in what concerns policy. True when it may have changed what policy is.
    pub(super) fn handle(&mut self, event: &Event) -> bool {
        let changes = self.local.handle(event);
        let mut concerns = !changes.is_empty();
        for change in changes {
            self.reconciler.handle(change);
        }
        if let Event::NetworkPolicyListed(listing) = event {
            self.reconciler.listed(listing.clone());
            concerns = true;
        }
        concerns
    }

    /// Writes the maps of policy.
    pub(super) fn sync(&mut self, bpf: &mut Bpf, now: u64) -> PolicyReport<dataplane::Error> {
        let report = self.reconciler.sync(bpf, now);
        self.known |= report.load_error.is_none();
        if let Some(error) = &report.load_error {
            tracing::error!(error = error as &dyn std::error::Error, "maps of policy cannot be read; tried again");
        }
        if let Some((op, error)) = &report.failed {
            tracing::error!(?op, error = error as &dyn std::error::Error, "policy cannot be written; tried again");
        }
        report
    }

    /// Is it known which slots are in force? Before, no interface may be told that it has none.
    pub(super) const fn known(&self) -> bool {
        self.known
    }

    /// Are all NetworkPolicies known?
    pub(super) fn listed(&self) -> bool {
        self.reconciler.missing().all(|source| source != PolicySource::Policies)
    }

    /// What interfaces are to know.
    pub(super) fn enforcement(&self, state: &ClusterState) -> Enforcement {
        let uids = state.links().filter_map(|link| link.pod.as_ref());
        let slots = || uids.filter_map(|uid| Some((Arc::clone(uid), self.reconciler.slot(uid)?))).collect();
        match self.reconciler.regime() {
            Regime::Off => Enforcement::Off,
            Regime::Audited => Enforcement::Audited(slots()),
            Regime::Enforced => Enforcement::On(slots()),
        }
    }

    /// Are there policies in force, more than audited?
    pub(super) const fn enforces(&self) -> bool {
        self.reconciler.enforces()
    }

    /// Pods of this node.
    pub(super) const fn local(&self) -> &LocalPods {
        &self.local
    }

    /// The compiler, with all objects.
    pub(super) const fn engine(&self) -> &Engine {
        self.reconciler.engine()
    }

    /// All of it.
    pub(super) const fn reconciler(&self) -> &PolicyReconciler {
        &self.reconciler
    }

    /// What is to be said of interfaces that are held and were to be known by now, as far as that is news.
    pub(super) fn findings(&mut self, state: &ClusterState, now: Instant) -> Vec<Event> {
        let is_held = |link: &&PodLink| state.slot(link) == DeviceEntry::HELD;
        let held: BTreeMap<u32, &PodLink> = state.links().filter(is_held).map(|link| (link.ifindex, link)).collect();
        let mut events = Vec::new();
        self.held.retain(|ifindex, was| {
            let is = held.get(ifindex).is_some_and(|link| link.name == was.name);
            if !is && was.told.is_some() {
                events.push(Event::Diagnostics { object: object(&was.name), findings: Vec::new() });
            }
            is
        });
        for (ifindex, link) in held {
            let name = &link.name;
            let was =
                self.held.entry(ifindex).or_insert_with(|| Held { name: Arc::clone(name), since: now, told: None });
            if now < was.since + PATIENCE {
                continue;
            }
            let problem = match &link.pod {
                None => match &self.records.borrow().problem {
                    Some(problem) => format!("nobody knows which pod's it is: {problem}"),
                    None => "nobody knows which pod's it is: no record of the CNI names it".to_owned(),
                },
                Some(uid) => match self.local.pod(uid) {
                    None => format!("its pod, of UID {uid}, is not known: the API server has told of none such here"),
                    Some(pod) => format!("the policy of its pod {} is not in force", pod.name),
                },
            };
            if was.told.as_ref() != Some(&problem) {
                was.told = Some(problem.clone());
                let finding = Diagnostic {
                    severity: Severity::Error,
                    object: object(name),
                    field: String::new(),
                    problem,
                    fix: "there are NetworkPolicies, so nothing but its own node reaches it, and it reaches nothing"
                        .to_owned(),
                };
                events.push(Event::Diagnostics { object: object(name), findings: vec![finding] });
            }
        }
        events
    }

    /// When [`Self::findings`] may have more to say though nothing comes.
    pub(super) fn next_finding(&self) -> Option<Instant> {
        self.held.values().filter(|held| held.told.is_none()).map(|held| held.since + PATIENCE).min()
    }

    /// How many interfaces are held.
    pub(super) fn held(&self) -> usize {
        self.held.len()
    }
}

fn object(interface: &str) -> String {
    format!("Held interface {interface}")
}
