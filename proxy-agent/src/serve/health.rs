//! Is the proxy well? Answered on port 10256, as by kube-proxy (KEP-3836).
//!
//! | path | 200 when |
//! | --- | --- |
//! | `/livez` | the maps have been brought in line with the first full lists, and nothing has waited to be written for too long since |
//! | `/healthz` | the same, and the Node is not about to be deleted: load balancers move on then |
//! | `/readyz` | as `/livez`; ours, and told apart from kube-proxy by its body |
//!
//! kube-proxy calls itself healthy from its start on. Here it is 503 until the first sync: a node whose Services do not
//! work yet must get no traffic. An API server that is away makes nothing red: the kernel keeps the last state.

use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant, SystemTime};

use axum::Router;
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};
use axum::routing::any;

use super::clock::go_time;
use super::metrics::Metrics;

/// How long something may wait to be written before the proxy is unhealthy: kube-proxy's default.
pub const TIMEOUT: Duration = Duration::from_mins(1);

/// What the health answers are made of.
#[derive(Debug)]
pub struct Health {
    timeout: Duration,
    inner: Mutex<Inner>,
}

#[derive(Debug, Default)]
struct Inner {
    synced: bool,
    updated: Option<SystemTime>,
    /// Since when something has been waiting.
    waiting: Option<Instant>,
    /// The Node is about to be deleted.
    leaving: bool,
}

/// One look at it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct State {
    /// The proxy does its work.
    pub healthy: bool,
    /// The Node stays.
    pub eligible: bool,
    /// When the maps were last known to be right.
    pub updated: Option<SystemTime>,
}

impl Default for Health {
    fn default() -> Self {
        Self::new(TIMEOUT)
    }
}

impl Health {
    /// Unhealthy until the first sync, and when something has waited longer than `timeout`.
    pub fn new(timeout: Duration) -> Self {
        Self { timeout, inner: Mutex::default() }
    }

    /// After each round of the reconciler: have all sources been listed, is nothing left to write? True when the first
    /// sync has just been finished.
    pub fn sync(&self, listed: bool, settled: bool) -> bool {
        let Ok(mut inner) = self.inner.lock() else { return false };
        if listed && settled {
            inner.waiting = None;
            inner.updated = Some(SystemTime::now());
            return !std::mem::replace(&mut inner.synced, true);
        }
        if listed && inner.waiting.is_none() {
            inner.waiting = Some(Instant::now());
        }
        false
    }

    /// Tells whether the Node is about to be deleted.
    pub fn node(&self, leaving: bool) {
        if let Ok(mut inner) = self.inner.lock() {
            inner.leaving = leaving;
        }
    }

    /// How it is now.
    pub fn state(&self) -> State {
        let unwell = State { healthy: false, eligible: true, updated: None };
        self.inner.lock().map_or(unwell, |inner| {
            let late = inner.waiting.is_some_and(|since| since.elapsed() > self.timeout);
            State { healthy: inner.synced && !late, eligible: !inner.leaving, updated: inner.updated }
        })
    }

    /// Does the proxy do its work? The Node's end is another matter.
    pub fn is_healthy(&self) -> bool {
        self.state().healthy
    }
}

impl State {
    /// Body and status of `/healthz`. While it is healthy there is nothing older than `now` to tell of.
    pub fn healthz(self, now: SystemTime) -> (StatusCode, String) {
        let good = self.healthy && self.eligible;
        let updated = go_time(if good { Some(now) } else { self.updated });
        let eligible = self.eligible;
        let now = go_time(Some(now));
        let body = format!(r#"{{"lastUpdated": "{updated}","currentTime": "{now}", "nodeEligible": {eligible}}}"#);
        (status(good), body)
    }

    /// Body and status of `/livez`.
    pub fn livez(self, now: SystemTime) -> (StatusCode, String) {
        let updated = go_time(if self.healthy { Some(now) } else { self.updated });
        let now = go_time(Some(now));
        (status(self.healthy), format!(r#"{{"lastUpdated": "{updated}","currentTime": "{now}"}}"#))
    }

    /// Body and status of `/readyz`.
    pub fn readyz(self) -> (StatusCode, String) {
        (status(self.healthy), format!(r#"{{"agent": "proxy-agent","ready": {}}}"#, self.healthy))
    }
}

/// 200 or 503.
pub(super) const fn status(good: bool) -> StatusCode {
    if good { StatusCode::OK } else { StatusCode::SERVICE_UNAVAILABLE }
}

fn answer((status, body): (StatusCode, String)) -> Response {
    let headers = [(header::CONTENT_TYPE, "application/json"), (header::X_CONTENT_TYPE_OPTIONS, "nosniff")];
    (status, headers, body).into_response()
}

/// The three paths. Any method will do, as with kube-proxy.
pub fn router(health: &Arc<Health>, metrics: &Arc<Metrics>) -> Router {
    let with = |get: fn(State, &Metrics) -> (StatusCode, String)| {
        let (health, metrics) = (Arc::clone(health), Arc::clone(metrics));
        any(move || std::future::ready(answer(get(health.state(), &metrics))))
    };
    Router::new()
        .route(
            "/healthz",
            with(|state, metrics| {
                let answer = state.healthz(SystemTime::now());
                metrics.healthz(answer.0.as_u16());
                answer
            }),
        )
        .route(
            "/livez",
            with(|state, metrics| {
                let answer = state.livez(SystemTime::now());
                metrics.livez(answer.0.as_u16());
                answer
            }),
        )
        .route("/readyz", with(|state, _| state.readyz()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn healthy_after_the_first_sync_and_while_nothing_waits_long() {
        let health = Health::default();
        assert!(!health.is_healthy(), "before the lists");
        assert!(!health.sync(false, true));
        assert!(!health.is_healthy(), "lists not complete");
        assert!(!health.sync(true, false));
        assert!(!health.is_healthy(), "not written yet");
        assert!(health.sync(true, true), "the first sync is told once");
        assert!(!health.sync(true, true));
        assert!(health.is_healthy());
        assert!(!health.sync(true, false));
        assert!(health.is_healthy(), "a failed write is tried again first");
        health.inner.lock().expect("one thread").waiting = Instant::now().checked_sub(2 * TIMEOUT);
        assert!(!health.is_healthy(), "it has been failing for too long");
        assert!(!health.sync(true, true));
        assert!(health.is_healthy());
    }

    #[test]
    fn answers_by_state() {
        let at = |seconds| SystemTime::UNIX_EPOCH + Duration::from_secs(seconds);
        let now = at(1_700_000_100);
        let (then, this) = ("2023-11-14 22:13:20 +0000 UTC", "2023-11-14 22:15:00 +0000 UTC");
        // healthy, eligible, updated; healthz; livez; readyz
        let rows = [
            ((true, true), (200, this), (200, this), 200),
            ((true, false), (503, then), (200, this), 200),
            ((false, true), (503, then), (503, then), 503),
            ((false, false), (503, then), (503, then), 503),
        ];
        for ((healthy, eligible), (healthz, updated), (livez, alive), readyz) in rows {
            let state = State { healthy, eligible, updated: Some(at(1_700_000_000)) };
            let code = |(status, body): (StatusCode, String)| (status.as_u16(), body);
            let body = format!(r#"{{"lastUpdated": "{updated}","currentTime": "{this}", "nodeEligible": {eligible}}}"#);
            assert_eq!(code(state.healthz(now)), (healthz, body));
            let body = format!(r#"{{"lastUpdated": "{alive}","currentTime": "{this}"}}"#);
            assert_eq!(code(state.livez(now)), (livez, body));
            let body = format!(r#"{{"agent": "proxy-agent","ready": {healthy}}}"#);
            assert_eq!(code(state.readyz()), (readyz, body));
        }
    }
}
