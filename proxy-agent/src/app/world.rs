//! Whom the reconciler tells what.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use proxy_abi::map;
use proxy_core::diagnostic::Diagnostic;
use proxy_core::event::{Event, Listing, NetDevice, Node};
use proxy_core::facts::Facts;
use proxy_core::reconcile::{Reconciler, SyncReport};
use tokio::sync::watch;

use crate::dataplane;
use crate::dataplane::pins::Maps;
use crate::dataplane::sweep::{monotonic, sweep};
use crate::kubeproxy::Settings;
use crate::serve::metrics::{Round, Sweep, Usage};
use crate::serve::service::Addresses;
use crate::serve::{Health, Metrics, Notice, Notices};

/// Whom the reconciler tells what.
pub(super) struct World {
    /// Interface discovery.
    pub(super) node: watch::Sender<Node>,
    /// Health check servers.
    pub(super) facts: watch::Sender<Facts>,
    /// Where those listen.
    pub(super) addresses: watch::Sender<Addresses>,
    /// Interfaces that are not pods', for their addresses.
    pub(super) devices: BTreeMap<u32, NetDevice>,
    pub(super) health: Arc<Health>,
    pub(super) metrics: Arc<Metrics>,
    pub(super) notices: Notices,
}

impl World {
    /// Passes on what an event means outside of the maps.
    pub(super) fn tell(&mut self, event: &Event, settings: &Settings) {
        self.metrics.event(event);
        match event {
            Event::Node(is) => {
                self.health.node(is.leaving);
                self.node.send_if_modified(|was| {
                    let changed = was != is;
                    was.clone_from(is);
                    changed
                });
            }
            Event::Device(device) => {
                self.devices.insert(device.ifindex, device.clone());
            }
            Event::DeviceGone(ifindex) => {
                self.devices.remove(ifindex);
            }
            Event::Listed(_, Listing::Links(all)) => self.devices.retain(|ifindex, _| all.contains(ifindex)),
            _ => return,
        }
        let served = &settings.policy.node_port_addresses;
        let is = Addresses::of(served, &self.node.borrow(), &self.devices.values().collect::<Vec<_>>());
        self.addresses.send_if_modified(|was| {
            let changed = *was != is;
            *was = is;
            changed
        });
    }

    /// Tells what Services ask for beside the maps.
    pub(super) fn publish(&self, facts: &Facts) {
        self.metrics.facts(facts);
        self.facts.send_if_modified(|was| {
            let changed = was != facts;
            was.clone_from(facts);
            changed
        });
    }

    /// Says what is wrong with objects, each finding once. `said` is what was said and still holds.
    pub(super) fn findings<'a>(
        &self,
        findings: impl Iterator<Item = &'a Diagnostic>,
        said: &mut BTreeMap<String, Option<Notice>>,
    ) {
        let are: BTreeMap<String, Option<Notice>> =
            findings.map(|finding| (finding.to_string(), Notice::of(finding))).collect();
        for (text, notice) in are.iter().filter(|(text, _)| !said.contains_key(*text)) {
            tracing::warn!("{text}");
            if let Some(notice) = notice {
                self.notices.send(notice.clone());
            }
        }
        for gone in said.keys().filter(|text| !are.contains_key(*text)) {
            tracing::info!("no more: {gone}");
        }
        *said = are;
    }

    /// Counts what a round did.
    pub(super) fn count(
        &self,
        reconciler: &Reconciler,
        maps: &Maps,
        report: &SyncReport<dataplane::Error>,
        took: Duration,
        full: bool,
    ) {
        let settled = reconciler.synced() && report.pending == 0 && report.load_error.is_none();
        let (applied, failed) = (report.applied, report.failed.len());
        self.metrics.round(Round { took, applied, failed, settled, full });
        for (name, rows) in reconciler.row_counts() {
            let capacity = match name {
                map::SERVICE => maps.service.capacity(),
                map::BACKEND => maps.backend.capacity(),
                map::BACKEND_SLOT => maps.slot.capacity(),
                map::FRONTEND => maps.frontend.capacity(),
                map::DEVICE => maps.device.capacity(),
                _ => maps.local_pod.capacity(),
            };
            self.metrics.map(name, usage(rows, capacity));
        }
    }

    /// Removes idle flows.
    pub(super) fn sweep(&self, maps: &Maps, settings: &Settings) {
        let start = Instant::now();
        let removed = match sweep(maps, &settings.timeouts, monotonic()) {
            Ok((all, removed)) => {
                tracing::debug!(all, removed, "looked through the established flows");
                self.metrics.map(map::FLOW_LIVE, usage(all.saturating_sub(removed), maps.flow_live.capacity()));
                Some(removed)
            }
            Err(error) => {
                tracing::warn!(error = &error as &dyn std::error::Error, "established flows");
                None
            }
        };
        self.metrics.sweep(Sweep { took: start.elapsed(), removed });
        match maps.flow_brief.read() {
            Ok(all) => self.metrics.map(map::FLOW_BRIEF, usage(all.len(), maps.flow_brief.capacity())),
            Err(error) => tracing::debug!(error = &error as &dyn std::error::Error, "brief flows"),
        }
    }
}

fn usage(entries: usize, capacity: u32) -> Usage {
    Usage { entries: u64::try_from(entries).unwrap_or(u64::MAX), capacity: capacity.into() }
}
