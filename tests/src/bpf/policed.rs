//! Network policy on the bench: objects in, the real maps written by the real loop, interfaces told of their slots.

use std::collections::BTreeSet;
use std::net::IpAddr;
use std::sync::Arc;

use anyhow::{Context as _, Result, ensure};
use proxy_abi::{DeviceEntry, Hook};
use proxy_agent::dataplane::Error;
use proxy_agent::dataplane::policy::PolicyMaps;
use proxy_core::name::ObjectName;
use proxy_core::netpol::dataplane::PolicyDataplane;
use proxy_core::netpol::engine::Limits;
use proxy_core::netpol::reconcile::{PolicyListing, PolicyReconciler, PolicySettings};
use proxy_core::netpol::spec::{Change, Labels, Namespace, Pod};
use proxy_core::netpol::tables::{Op, PolicyTables};

use super::{Bench, Outcome};
use crate::packet::named::Host;

/// This node in the objects.
pub const NODE: &str = "node-1";

/// The pinned maps alone, as what the loop writes to.
#[derive(Debug)]
pub struct Pinned<'a>(pub &'a PolicyMaps);

impl PolicyDataplane for Pinned<'_> {
    type Error = Error;

    fn load_policy(&mut self) -> Result<PolicyTables, Error> {
        self.0.tables()
    }

    fn enforced(&mut self) -> Result<bool, Error> {
        // Here interfaces are written by the tests themselves.
        Ok(false)
    }

    fn apply_policy(&mut self, op: &Op) -> Result<(), Error> {
        self.0.apply(op)
    }
}

/// A bench with policies.
#[derive(Debug)]
pub struct Policed<'a> {
    bench: &'a Bench,
    reconciler: PolicyReconciler,
    now: u64,
}

impl<'a> Policed<'a> {
    /// Starts the loop with these objects: all that there are.
    ///
    /// # Errors
    /// When the maps cannot be read or written.
    pub fn start(bench: &'a Bench, limits: Limits, changes: Vec<Change>) -> Result<Self> {
        let settings = PolicySettings { limits, ..PolicySettings::new(NODE) };
        let mut policed = Self { bench, reconciler: PolicyReconciler::new(settings), now: 0 };
        let mut names: (BTreeSet<ObjectName>, BTreeSet<ObjectName>, BTreeSet<Arc<str>>) = Default::default();
        for change in changes {
            match &change {
                Change::Policy(policy) => drop(names.0.insert(policy.name.clone())),
                Change::Pod(pod) => drop(names.1.insert(pod.name.clone())),
                Change::Namespace(namespace) => drop(names.2.insert(Arc::clone(&namespace.name))),
                _ => {}
            }
            policed.reconciler.handle(change);
        }
        policed.reconciler.listed(PolicyListing::Policies(names.0));
        policed.reconciler.listed(PolicyListing::Pods(names.1));
        policed.reconciler.listed(PolicyListing::Namespaces(names.2));
        policed.sync()?;
        Ok(policed)
    }

    /// Changes objects, and the maps with them.
    ///
    /// # Errors
    /// When the maps cannot be written.
    pub fn change(&mut self, changes: impl IntoIterator<Item = Change>) -> Result<()> {
        changes.into_iter().for_each(|change| self.reconciler.handle(change));
        self.sync()
    }

    fn sync(&mut self) -> Result<()> {
        self.now += 1_000;
        let report = self.reconciler.sync(&mut Pinned(&self.bench.bpf().maps().policy), self.now);
        if let Some((op, error)) = report.failed {
            return Err(error).with_context(|| format!("{op:?}"));
        }
        ensure!(report.load_error.is_none() && report.pending == 0, "{report:?}");
        Ok(())
    }

    /// The loop.
    pub const fn reconciler(&self) -> &PolicyReconciler {
        &self.reconciler
    }

    /// Tells the interface of a pod its slot.
    ///
    /// # Errors
    /// When the row cannot be written.
    pub fn place(&self, host: &Host, slot: u16) -> Result<()> {
        let maps = self.bench.bpf().maps();
        let ifindex = self.bench.ifindex(host);
        let row = maps.device.get(&ifindex)?.context("no such interface")?;
        Ok(maps.device.set(&ifindex, &DeviceEntry { slot, ..row })?)
    }

    /// Tells the interface of a pod whether its slot is there only to audit.
    ///
    /// # Errors
    /// When the row cannot be written.
    pub fn audit(&self, host: &Host, only: bool) -> Result<()> {
        let maps = self.bench.bpf().maps();
        let ifindex = self.bench.ifindex(host);
        let row = maps.device.get(&ifindex)?.context("no such interface")?;
        let flags = if only { row.flags | DeviceEntry::AUDITED } else { row.flags & !DeviceEntry::AUDITED };
        Ok(maps.device.set(&ifindex, &DeviceEntry { flags, ..row })?)
    }

    /// Tells the interface of a pod the slot of the object of this name.
    ///
    /// # Errors
    /// When the pod has no slot, or the row cannot be written.
    pub fn place_pod(&self, host: &Host, pod: &str) -> Result<u16> {
        let slot = self.reconciler.slot(&format!("uid-{pod}")).with_context(|| format!("{pod} has no slot"))?;
        self.place(host, slot)?;
        Ok(slot)
    }

    /// A packet that came into this node by the uplink.
    ///
    /// # Errors
    /// When the program cannot be run.
    pub fn feed(&self, hook: Hook, at: &Host, packet: &[u8]) -> Result<Outcome> {
        self.bench.feed_from(hook, at, self.bench.ifindex(&crate::packet::named::NODE_ONE), packet)
    }
}

/// A namespace with its usual label.
pub fn namespace(name: &str) -> Change {
    let labels = Labels::from([("kubernetes.io/metadata.name".into(), name.into())]);
    Change::Namespace(Namespace { name: name.into(), labels, terminating: false })
}

/// A pod in the namespace `default` with the label `app` and a UID made of its name.
pub fn pod(name: &str, host: &Host, node: &str) -> Pod {
    Pod {
        name: ObjectName::new("default", name),
        uid: format!("uid-{name}").into(),
        labels: Labels::from([("app".into(), name.into())]),
        node: Some(node.into()),
        host_network: false,
        finished: false,
        deleting: false,
        socket_lb: true,
        created: 0,
        ips: vec![IpAddr::V4(host.ip4), IpAddr::V6(host.ip6)],
        ports: Vec::new(),
    }
}
