//! The health server, as kube-proxy has it on port 10256.
//!
//! `/healthz` and `/livez` answer 200 once the maps have been brought in line with the first full lists, and 503 before
//! that or while an operation has been failing for [`TIMEOUT`]. An API server that is away makes neither of them red:
//! the kernel keeps the last state (KEP-3836).

use std::net::SocketAddr;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant, SystemTime};

use axum::Router;
use axum::extract::State;
use axum::http::{StatusCode, header};
use axum::response::IntoResponse;
use axum::routing::get;

/// How long something may wait to be written before the proxy is unhealthy: kube-proxy's default.
pub const TIMEOUT: Duration = Duration::from_mins(1);

/// What the server tells.
#[derive(Debug, Default)]
pub struct Health {
    inner: Mutex<Inner>,
}

#[derive(Debug, Default)]
struct Inner {
    synced: bool,
    updated: Option<SystemTime>,
    /// Since when something has been waiting.
    waiting: Option<Instant>,
}

impl Health {
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

    fn answer(&self) -> (StatusCode, String) {
        let now = SystemTime::now();
        let (healthy, updated) = self.inner.lock().map_or((false, None), |inner| {
            let late = inner.waiting.is_some_and(|since| since.elapsed() > TIMEOUT);
            (inner.synced && !late, inner.updated)
        });
        // While it is healthy there is nothing older to tell of.
        let updated = if healthy { Some(now) } else { updated };
        let seconds = |time: Option<SystemTime>| {
            time.and_then(|t| t.duration_since(SystemTime::UNIX_EPOCH).ok()).map(|d| d.as_secs())
        };
        let body = serde_json::json!({ "lastUpdated": seconds(updated), "currentTime": seconds(Some(now)) });
        (if healthy { StatusCode::OK } else { StatusCode::SERVICE_UNAVAILABLE }, body.to_string())
    }
}

async fn health(State(health): State<Arc<Health>>) -> impl IntoResponse {
    let (status, body) = health.answer();
    let headers = [(header::CONTENT_TYPE, "application/json"), (header::X_CONTENT_TYPE_OPTIONS, "nosniff")];
    (status, headers, body)
}

/// Binds the address and serves from then on.
pub async fn spawn(address: SocketAddr, state: Arc<Health>) -> std::io::Result<()> {
    let listener = tokio::net::TcpListener::bind(address).await?;
    let router = Router::new().route("/healthz", get(health)).route("/livez", get(health)).with_state(state);
    tokio::spawn(async move {
        if let Err(error) = axum::serve(listener, router).await {
            tracing::error!(%error, "health server");
        }
    });
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn healthy_after_the_first_sync_and_while_nothing_waits_long() {
        let health = Health::default();
        assert_eq!(health.answer().0, StatusCode::SERVICE_UNAVAILABLE, "before the lists");
        assert!(!health.sync(false, true));
        assert_eq!(health.answer().0, StatusCode::SERVICE_UNAVAILABLE, "lists not complete");
        assert!(!health.sync(true, false));
        assert_eq!(health.answer().0, StatusCode::SERVICE_UNAVAILABLE, "not written yet");
        assert!(health.sync(true, true), "the first sync is told once");
        assert!(!health.sync(true, true));
        assert_eq!(health.answer().0, StatusCode::OK);
        assert!(!health.sync(true, false));
        assert_eq!(health.answer().0, StatusCode::OK, "a failed write is tried again first");
        health.inner.lock().expect("one thread").waiting = Instant::now().checked_sub(2 * TIMEOUT);
        assert_eq!(health.answer().0, StatusCode::SERVICE_UNAVAILABLE, "it has been failing for too long");
        assert!(!health.sync(true, true));
        assert_eq!(health.answer().0, StatusCode::OK);
    }
}
