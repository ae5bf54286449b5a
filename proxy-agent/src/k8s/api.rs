//! `--source kube`: watches on an API server.
//!
//! ```text
//!   list, page by page ──▶ watch ──▶ watch ... ──▶ 410 or an answer not understood ──▶ list anew
//!        │                    │
//!     objects, then        changes as events
//!     Listed(names)
//! ```
//!
//! NetworkPolicies are watched always; Pods and Namespaces, which are many, only from when a NetworkPolicy has been seen:
//! a cluster without policies pays nothing for them. Where sockets of pods are translated, Pods are watched always, for
//! their annotation.
//!
//! Only a whole listing says what is gone (`Listed`), only the server's own DELETED says so otherwise. No failure ends a
//! watch: it waits, longer each time, and goes on from the version it had.

use std::collections::HashMap;
use std::error::Error;
use std::fmt::Write as _;
use std::hash::{BuildHasher, RandomState};
use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;

use futures::StreamExt;
use k8s_openapi::api::core::v1 as core_v1;
use k8s_openapi::api::discovery::v1 as discovery_v1;
use k8s_openapi::api::networking::v1 as networking_v1;
use kube::core::DeserializeGuard;
use kube::runtime::watcher;
use kube::{Api, Client};
use proxy_core::event::Event;
use proxy_core::netpol::spec::Change;
use tokio::sync::mpsc::Sender;
use tokio::sync::watch;
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep, timeout};

use super::access::{self, Server};
use super::convert::{LABEL_HEADLESS, LABEL_PROXY_NAME};
use super::metrics::{SourceMetrics, WatchMetrics};
use super::transport::Transport;
use super::trouble::Trouble;
use super::{KubeConfig, PodWatch, SourceError, Timing};

mod kind;
mod translate;

use kind::Watched;
use translate::Translator;

/// Objects in one page of a listing: bounds the memory that decoding takes.
const PAGE: u32 = 500;
/// The same for Pods, which are ten times as large as other objects.
const PAGE_OF_PODS: u32 = 100;
/// Pods that run or will: those that have ended have no address of their own any more.
const LIVING: &str = "status.phase!=Succeeded,status.phase!=Failed";
/// A failure of one kind is logged once in this time.
const LOG_GAP: Duration = Duration::from_mins(1);
/// After so many refusals in a row, with a server that answers, the version to go on from is given up: it may be from
/// before the server's data was restored from a backup.
const REFUSALS_MAX: u32 = 5;

/// Between two looks for a kind that the server has not: it gets it with an upgrade, if ever.
const ABSENT_GAP: Duration = Duration::from_mins(10);

/// Starts the watches and what keeps them logged in.
pub(super) async fn start(
    config: KubeConfig,
    node_name: &str,
    pods: PodWatch,
    tx: &Sender<Event>,
    metrics: &Arc<SourceMetrics>,
    tasks: &mut JoinSet<()>,
) -> Result<(), SourceError> {
    // Another part of the process may have chosen already, which is as good.
    if rustls::crypto::ring::default_provider().install_default().is_err() {
        tracing::trace!("TLS provider was installed already");
    }
    let fingerprint = access::fingerprint(&config);
    let servers = access::login(&config).await?;
    let transport = Transport::new(servers, config.timing, Arc::clone(metrics));
    let timing = config.timing;
    tasks.spawn(Arc::clone(&transport).keep_logged_in(config, fingerprint));

    let ours = format!("!{LABEL_PROXY_NAME},!{LABEL_HEADLESS}");
    let (policies, _) = watch::channel(false);
    let watch = Watch { tx: tx.clone(), node_name: node_name.into(), timing, metrics: Arc::clone(metrics), policies };
    let selected = watcher::Config::default().page_size(PAGE).labels(&ours);
    let own = watcher::Config::default().page_size(PAGE).fields(&format!("metadata.name={node_name}"));
    let (client, logins) = (|| transport.client(), || transport.logins());
    tasks.spawn(watch.clone().run::<core_v1::Service>(client(), selected.clone(), logins()));
    tasks.spawn(watch.clone().run::<discovery_v1::EndpointSlice>(client(), selected, logins()));
    let all = watcher::Config::default().page_size(PAGE);
    tasks.spawn(watch.clone().run::<networking_v1::ServiceCIDR>(client(), all.clone(), logins()));
    tasks.spawn(watch.clone().run::<networking_v1::NetworkPolicy>(client(), all.clone(), logins()));
    tasks.spawn(watch.clone().run_for_policies::<core_v1::Namespace>(client(), all, logins()));
    let living = watcher::Config::default().page_size(PAGE_OF_PODS).fields(LIVING);
    match pods {
        PodWatch::ForPolicies => {
            tasks.spawn(watch.clone().run_for_policies::<core_v1::Pod>(client(), living, logins()));
        }
        PodWatch::Always => {
            tasks.spawn(watch.clone().run::<core_v1::Pod>(client(), living, logins()));
        }
    }
    tasks.spawn(watch.run::<core_v1::Node>(client(), own, logins()));
    Ok(())
}

// === Watch ===

/// What each watch needs.
#[derive(Clone)]
struct Watch {
    tx: Sender<Event>,
    node_name: Arc<str>,
    timing: Timing,
    metrics: Arc<SourceMetrics>,
    /// A NetworkPolicy has been seen.
    policies: watch::Sender<bool>,
}

impl Watch {
    /// The same, from when a NetworkPolicy has been seen.
    async fn run_for_policies<K: Watched>(
        self,
        client: Client,
        config: watcher::Config,
        logins: watch::Receiver<Arc<[Server]>>,
    ) {
        let mut policies = self.policies.subscribe();
        let seen = async { policies.wait_for(|seen| *seen).await.is_ok() };
        let seen = tokio::select! {
            seen = seen => seen,
            () = self.tx.closed() => false,
        };
        if seen {
            self.run::<K>(client, config, logins).await;
        }
    }

    /// Sends events; false when nobody receives them.
    async fn send(&self, events: impl IntoIterator<Item = Event>) -> bool {
        for event in events {
            if matches!(event, Event::NetworkPolicy(Change::Policy(_))) {
                self.policies.send_if_modified(|seen| !std::mem::replace(seen, true));
            }
            if self.tx.send(event).await.is_err() {
                return false;
            }
        }
        true
    }

    /// Runs until the receiver is gone.
    async fn run<K: Watched>(self, client: Client, config: watcher::Config, logins: watch::Receiver<Arc<[Server]>>) {
        tokio::select! {
            () = self.follow::<K>(client, config, logins) => {}
            () = self.tx.closed() => {}
        }
    }

    async fn follow<K: Watched>(
        &self,
        client: Client,
        config: watcher::Config,
        mut logins: watch::Receiver<Arc<[Server]>>,
    ) {
        let metrics = K::metrics(&self.metrics);
        let mut translator = Translator::<K>::new(Arc::clone(&self.node_name));
        let mut backoff = Backoff::new(self.timing);
        // A server that says 410 is back: the waits that grew while it was away do not hold up the new listing.
        let mut expired = Backoff::new(self.timing);
        let mut log = Log::default();
        let mut refusals = 0;
        loop {
            let api = Api::<DeserializeGuard<K>>::all(client.clone());
            let mut stream = pin!(watcher::watcher(api, config.clone()));
            while let Some(item) = stream.next().await {
                let error = match item {
                    Ok(event) => {
                        refusals = 0;
                        count(metrics, &event);
                        if !self.send(translator.translate(event)).await {
                            return;
                        }
                        continue;
                    }
                    Err(error) => error,
                };
                if is_absent(&error, K::ABSENT, translator.listed) {
                    if !translator.absent {
                        tracing::info!(kind = K::KIND, %error, "the API server does not give this kind; going on without");
                    }
                    if !self.send(translator.none()).await {
                        return;
                    }
                    // The kind may come with an upgrade of the server, or be allowed to another login.
                    let reason = async {
                        tokio::select! {
                            () = self.tx.closed() => {}
                            Ok(()) = logins.changed() => {}
                        }
                    };
                    // Either way it is asked for again.
                    drop(timeout(ABSENT_GAP, reason).await);
                    continue;
                }
                let trouble = Trouble::of(&error);
                metrics.count_error(trouble);
                log.note(K::KIND, trouble, &error);
                if trouble == Trouble::Forbidden && !self.send(translator.forbidden()).await {
                    return;
                }
                refusals = if matches!(trouble, Trouble::Server | Trouble::Refused) { refusals + 1 } else { 0 };
                let wait = if trouble == Trouble::Expired { expired.next() } else { backoff.next() };
                tokio::select! {
                    () = sleep(wait) => {}
                    Ok(()) = logins.changed() => backoff.reset(),
                }
                if needs_listing(&error, trouble) || refusals >= REFUSALS_MAX {
                    refusals = 0;
                    break;
                }
            }
        }
    }
}

fn count<K>(metrics: &WatchMetrics, event: &watcher::Event<K>) {
    match event {
        watcher::Event::Init => metrics.count_listing(),
        watcher::Event::InitDone => metrics.touch(),
        watcher::Event::InitApply(_) | watcher::Event::Apply(_) | watcher::Event::Delete(_) => metrics.count_event(),
    }
}

/// Does the server not have the kind? An answer that may also mean something else counts as long as it was never listed.
fn is_absent(error: &watcher::Error, absent: &[u16], listed: bool) -> bool {
    match error {
        watcher::Error::InitialListFailed(kube::Error::Api(status)) => {
            absent.contains(&status.code) && (status.code == 404 || !listed)
        }
        _ => false,
    }
}

/// Whether going on from the last version would fail again, or would miss something.
fn needs_listing(error: &watcher::Error, trouble: Trouble) -> bool {
    match error {
        // Lists start over by themselves.
        watcher::Error::InitialListFailed(_) | watcher::Error::NoResourceVersion => false,
        watcher::Error::WatchStartFailed(_) | watcher::Error::WatchError(_) => trouble == Trouble::Expired,
        // An event that could not be read is lost, and the next one moves the version past it.
        watcher::Error::WatchFailed(_) => trouble == Trouble::Garbled,
    }
}

// === Waiting and complaining ===

/// Waits that double, with jitter, so that the nodes of a cluster do not come back as one.
struct Backoff {
    timing: Timing,
    current: Duration,
    last: Option<Instant>,
}

impl Backoff {
    fn new(timing: Timing) -> Self {
        Self { timing, current: timing.retry_min, last: None }
    }

    fn reset(&mut self) {
        self.current = self.timing.retry_min;
    }

    /// Begins anew after a time without failures: one good answer between failures is no recovery.
    fn next(&mut self) -> Duration {
        if self.last.is_some_and(|last| last.elapsed() > self.timing.retry_max * 4) {
            self.reset();
        }
        self.last = Some(Instant::now());
        let wait = self.current;
        self.current = (wait * 2).min(self.timing.retry_max);
        // From half to one and a half times.
        let share = u32::try_from(RandomState::new().hash_one(()) % 1024).unwrap_or(512);
        wait / 2 + wait * share / 1024
    }
}

/// Keeps the log readable: each kind of failure once a minute.
#[derive(Default)]
struct Log {
    last: HashMap<Trouble, (Instant, u64)>,
}

impl Log {
    fn note(&mut self, kind: &str, trouble: Trouble, error: &watcher::Error) {
        let more = match self.last.get_mut(&trouble) {
            Some((at, more)) if at.elapsed() < LOG_GAP => {
                *more += 1;
                return;
            }
            Some((_, more)) => *more,
            None => 0,
        };
        self.last.insert(trouble, (Instant::now(), 0));
        let (trouble, fix, error) = (trouble.name(), trouble.fix(), with_causes(error));
        tracing::warn!(kind, trouble, more, fix, %error, "watch failed and goes on; the last state stays in effect");
    }
}

/// The error and what it was caused by: the client says only that it could not connect, its cause why.
fn with_causes(error: &dyn Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        let said = error.to_string();
        // Some errors show their cause themselves.
        if !text.ends_with(&said) {
            // Writing to a String does not fail.
            let _ = write!(text, ": {said}");
        }
        cause = error.source();
    }
    text
}
