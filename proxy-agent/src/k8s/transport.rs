//! One client in front of several servers and changing credentials.
//!
//! ```text
//!   watches ──▶ Client ──▶ Transport ──▶ preferred server, else the next ──▶ answer
//!                              ▲
//!                              └─ keep_logged_in: new files, 401 or TLS refusal ──▶ new clients
//! ```
//!
//! The watches hold on to one client for ever, so that neither a switch of servers nor a new login makes them list
//! anew: the next request goes another way, that is all.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use bytes::Bytes;
use http::{Request, Response, StatusCode, header, request};
use http_body_util::BodyExt;
use kube::Client;
use kube::client::Body;
use tokio::sync::{Notify, watch};
use tokio::time::{Instant, sleep, sleep_until, timeout};
use tower::BoxError;

use super::access::{self, Server};
use super::metrics::SourceMetrics;
use super::trouble::Trouble;
use super::{KubeConfig, Timing};

/// A page of a list that is refused with 429 is asked for again so many times before the list starts over.
const PAGE_RETRIES: u32 = 5;
/// The longest `Retry-After` that is honoured.
const RETRY_AFTER_MAX: Duration = Duration::from_secs(10);
/// Between two complaints about files that cannot be used.
const COMPLAINT_GAP: Duration = Duration::from_mins(1);

/// Failures of the transport itself.
#[derive(Debug, thiserror::Error)]
pub(super) enum TransportError {
    /// No answer, or an answer that stopped.
    #[error("API server {server} was silent for {} ms", .waited.as_millis())]
    Silent {
        /// URL.
        server: String,
        /// How long.
        waited: Duration,
    },
    /// There is no server: never the case after a login.
    #[error("no API server is known")]
    NoServer,
}

impl TransportError {
    pub(super) const fn trouble(&self) -> Trouble {
        match self {
            Self::Silent { .. } => Trouble::Silent,
            Self::NoServer => Trouble::Unreachable,
        }
    }
}

/// The way to the API.
pub(super) struct Transport {
    servers: watch::Sender<Arc<[Server]>>,
    /// Index of the server that answered last.
    preferred: AtomicUsize,
    /// Credentials were refused.
    refused: Notify,
    timing: Timing,
    metrics: Arc<SourceMetrics>,
}

impl Transport {
    pub(super) fn new(servers: Vec<Server>, timing: Timing, metrics: Arc<SourceMetrics>) -> Arc<Self> {
        Arc::new(Self {
            servers: watch::Sender::new(servers.into()),
            preferred: AtomicUsize::new(0),
            refused: Notify::new(),
            timing,
            metrics,
        })
    }

    /// The client that lasts.
    pub(super) fn client(self: &Arc<Self>) -> Client {
        let transport = Arc::clone(self);
        let service = tower::service_fn(move |request: Request<Body>| {
            let transport = Arc::clone(&transport);
            async move { transport.send(request).await }
        });
        Client::new(service, "default")
    }

    /// Tells of each new login.
    pub(super) fn logins(&self) -> watch::Receiver<Arc<[Server]>> {
        self.servers.subscribe()
    }

    /// Logs in anew when the credential files change, and when credentials were refused. Never ends.
    pub(super) async fn keep_logged_in(self: Arc<Self>, config: KubeConfig, mut known: u64) {
        let mut last = Instant::now();
        let mut complained: Option<Instant> = None;
        loop {
            let refused = timeout(self.timing.credentials, self.refused.notified()).await.is_ok();
            if refused {
                sleep_until(last + self.timing.login_gap).await;
            }
            let read = config.clone();
            let Ok(now) = tokio::task::spawn_blocking(move || access::fingerprint(&read)).await else { continue };
            // Tokens are held for a minute and client certificates for ever: a refusal needs a login even if no file
            // changed, and an exec plugin has no file.
            if !refused && now == known {
                continue;
            }
            last = Instant::now();
            match access::login(&config).await {
                Ok(servers) => {
                    // The same credentials are no news to watches that wait, and to nobody who reads the log.
                    let news = std::mem::replace(&mut known, now) != now;
                    self.metrics.logins.fetch_add(1, Ordering::Relaxed);
                    if news {
                        tracing::info!(refused, "logged in to the API server with new credentials");
                    } else {
                        tracing::debug!("logged in to the API server again with the same credential files");
                    }
                    self.servers.send_if_modified(|held| {
                        *held = servers.into();
                        news
                    });
                }
                Err(error) => {
                    if complained.is_none_or(|at| at.elapsed() >= COMPLAINT_GAP) {
                        complained = Some(Instant::now());
                        tracing::warn!(%error, "new credentials cannot be used, the last good ones stay");
                    }
                }
            }
        }
    }

    async fn send(&self, request: Request<Body>) -> Result<Response<Body>, BoxError> {
        let (parts, body) = request.into_parts();
        let body = body.collect_bytes().await?;
        let mut refusals = 0;
        loop {
            let response = self.send_once(&parts, &body).await?;
            let page =
                parts.uri.query().is_some_and(|query| query.split('&').any(|pair| pair.starts_with("continue=")));
            if response.status() != StatusCode::TOO_MANY_REQUESTS || !page || refusals == PAGE_RETRIES {
                return Ok(response);
            }
            let asked = response.headers().get(header::RETRY_AFTER).and_then(|value| value.to_str().ok()?.parse().ok());
            let wait = self.timing.retry_min * 2_u32.pow(refusals);
            sleep(asked.map_or(wait, Duration::from_secs).min(RETRY_AFTER_MAX)).await;
            refusals += 1;
        }
    }

    /// Asks the preferred server, then the others, until one gives an answer that is its own fault at most.
    async fn send_once(&self, parts: &request::Parts, body: &Bytes) -> Result<Response<Body>, BoxError> {
        let servers = Arc::clone(&self.servers.borrow());
        let first = self.preferred.load(Ordering::Relaxed);
        let mut result = Err(TransportError::NoServer.into());
        for step in 0..servers.len() {
            let at = (first + step) % servers.len();
            let request = Request::from_parts(parts.clone(), Body::from(body.clone()));
            result = self.ask(&servers[at], request).await;
            match &result {
                Ok(response) if response.status().is_server_error() => {}
                Ok(response) => {
                    if response.status() == StatusCode::UNAUTHORIZED {
                        self.refused.notify_one();
                    }
                    if step > 0
                        && self.preferred.compare_exchange(first, at, Ordering::Relaxed, Ordering::Relaxed).is_ok()
                    {
                        self.metrics.failovers.fetch_add(1, Ordering::Relaxed);
                        tracing::info!(server = servers[at].url, "switched to another API server");
                    }
                    break;
                }
                Err(error) => {
                    let trouble = error.downcast_ref::<kube::Error>().map(Trouble::of_client);
                    if trouble == Some(Trouble::Tls) {
                        self.refused.notify_one();
                    }
                    tracing::debug!(server = servers[at].url, %error, "API server did not answer");
                }
            }
        }
        result
    }

    /// One request to one server. All but a running watch is read to its end in here, where silence is noticed.
    async fn ask(&self, server: &Server, request: Request<Body>) -> Result<Response<Body>, BoxError> {
        let silent = |waited| TransportError::Silent { server: server.url.clone(), waited };
        let watch = request.uri().query().is_some_and(|query| query.split('&').any(|pair| pair == "watch=true"));
        let (method, begin) = (request.method().clone(), Instant::now());
        let answer = timeout(self.timing.answer, server.client.send(request)).await;
        let status = answer.as_ref().ok().and_then(|answer| Some(answer.as_ref().ok()?.status()));
        self.metrics.requests.count(&server.host, &method, status, begin.elapsed());
        let answer = answer.map_err(|_| silent(self.timing.answer))??;
        if watch && answer.status().is_success() {
            return Ok(answer);
        }
        let (parts, mut body) = answer.into_parts();
        let mut bytes = Vec::new();
        while let Some(frame) =
            timeout(self.timing.silence, body.frame()).await.map_err(|_| silent(self.timing.silence))?
        {
            if let Ok(data) = frame?.into_data() {
                bytes.extend_from_slice(&data);
            }
        }
        Ok(Response::from_parts(parts, Body::from(bytes)))
    }
}
