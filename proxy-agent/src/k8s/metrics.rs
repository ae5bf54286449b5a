//! Counters of the watches on an API server.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{SystemTime, UNIX_EPOCH};

use super::requests::Requests;
use super::trouble::Trouble;

/// Counters of a source.
#[derive(Debug, Default)]
pub struct SourceMetrics {
    /// The watch on Services.
    pub services: WatchMetrics,
    /// The watch on EndpointSlices.
    pub slices: WatchMetrics,
    /// The watch on this node's Node.
    pub node: WatchMetrics,
    /// The watch on ServiceCIDRs.
    pub service_cidrs: WatchMetrics,
    /// The watch on NetworkPolicies.
    pub policies: WatchMetrics,
    /// The watch on Namespaces, which begins with the first NetworkPolicy.
    pub namespaces: WatchMetrics,
    /// The watch on Pods, which begins with the first NetworkPolicy.
    pub pods: WatchMetrics,
    /// Requests of all watches, to all servers.
    pub requests: Requests,
    /// New logins: clients built anew because credentials changed or were refused.
    pub logins: AtomicU64,
    /// Switches from one API server to another.
    pub failovers: AtomicU64,
}

/// Counters of one watch.
#[derive(Debug, Default)]
pub struct WatchMetrics {
    /// Listings begun; the first one included.
    pub listings: AtomicU64,
    /// Events received: objects listed, changed or deleted.
    pub events: AtomicU64,
    /// When the last event or complete listing came, in milliseconds since 1970; 0 before the first.
    pub last_event_ms: AtomicU64,
    errors: [AtomicU64; Trouble::ALL.len()],
}

impl SourceMetrics {
    /// Every watch with the name of what it watches, as the API has it in its paths.
    pub fn watches(&self) -> [(&'static str, &WatchMetrics); 7] {
        [
            ("services", &self.services),
            ("endpointslices", &self.slices),
            ("nodes", &self.node),
            ("servicecidrs", &self.service_cidrs),
            ("networkpolicies", &self.policies),
            ("namespaces", &self.namespaces),
            ("pods", &self.pods),
        ]
    }
}

impl WatchMetrics {
    /// Failures of one kind so far.
    pub fn errors(&self, trouble: Trouble) -> u64 {
        self.errors[trouble.index()].load(Ordering::Relaxed)
    }

    /// Failures so far; each made the watch start again from where it was, or from a new listing.
    pub fn restarts(&self) -> u64 {
        self.errors.iter().map(|count| count.load(Ordering::Relaxed)).sum()
    }

    pub(super) fn count_error(&self, trouble: Trouble) {
        self.errors[trouble.index()].fetch_add(1, Ordering::Relaxed);
    }

    pub(super) fn count_event(&self) {
        self.events.fetch_add(1, Ordering::Relaxed);
        self.touch();
    }

    pub(super) fn count_listing(&self) {
        self.listings.fetch_add(1, Ordering::Relaxed);
    }

    pub(super) fn touch(&self) {
        let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        self.last_event_ms.store(u64::try_from(since.as_millis()).unwrap_or(u64::MAX), Ordering::Relaxed);
    }
}
