//! `--source kube`: watches on an API server.
//!
//! ```text
//!   list, page by page ──▶ watch ──▶ watch ... ──▶ 410 or an answer not understood ──▶ list anew
//!        │                    │
//!     objects, then        changes as events
//!     Listed(names)
//! ```
//!
//! Only a whole listing says what is gone (`Listed`), only the server's own DELETED says so otherwise. No failure ends a
//! watch: it waits, longer each time, and goes on from the version it had.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::error::Error;
use std::fmt::{Debug, Write as _};
use std::hash::{BuildHasher, RandomState};
use std::marker::PhantomData;
use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;

use futures::StreamExt;
use k8s_openapi::api::core::v1 as core_v1;
use k8s_openapi::api::discovery::v1 as discovery_v1;
use k8s_openapi::api::networking::v1 as networking_v1;
use kube::core::DeserializeGuard;
use kube::runtime::watcher;
use kube::{Api, Client, Resource};
use proxy_core::diagnostic::{Diagnostic, Severity};
use proxy_core::event::{Event, Listing, Node, Source};
use proxy_core::name::ObjectName;
use serde::de::DeserializeOwned;
use tokio::sync::mpsc::Sender;
use tokio::sync::watch;
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep, timeout};

use super::access::{self, Server};
use super::convert::{
    Converted, LABEL_HEADLESS, LABEL_PROXY_NAME, convert_node, convert_service, convert_service_cidr, convert_slice,
    object_name, subject,
};
use super::metrics::{SourceMetrics, WatchMetrics};
use super::transport::Transport;
use super::trouble::Trouble;
use super::{KubeConfig, SourceError, Timing};

/// Objects in one page of a listing: bounds the memory that decoding takes.
const PAGE: u32 = 500;
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
    let watch = Watch { tx: tx.clone(), node_name: node_name.into(), timing, metrics: Arc::clone(metrics) };
    let selected = watcher::Config::default().page_size(PAGE).labels(&ours);
    let own = watcher::Config::default().page_size(PAGE).fields(&format!("metadata.name={node_name}"));
    let (client, logins) = (|| transport.client(), || transport.logins());
    tasks.spawn(watch.clone().run::<core_v1::Service>(client(), selected.clone(), logins()));
    tasks.spawn(watch.clone().run::<discovery_v1::EndpointSlice>(client(), selected, logins()));
    let all = watcher::Config::default().page_size(PAGE);
    tasks.spawn(watch.clone().run::<networking_v1::ServiceCIDR>(client(), all, logins()));
    tasks.spawn(watch.run::<core_v1::Node>(client(), own, logins()));
    Ok(())
}

/// A kind of object that is watched.
trait Watched: Resource<DynamicType = ()> + Clone + Debug + DeserializeOwned + Send + Sync + 'static {
    const SOURCE: Source;
    const KIND: &'static str;
    /// Old servers do not have the kind: then there is no such object.
    const OPTIONAL: bool = false;

    /// The event that tells of it.
    fn convert(&self) -> Converted<Event>;

    /// The event that tells of its end; `None` where the last state stays.
    fn gone(name: ObjectName) -> Option<Event>;

    /// Key of its diagnostics.
    fn subject(name: &ObjectName) -> String {
        subject(Self::KIND, name)
    }
}

impl Watched for core_v1::Service {
    const SOURCE: Source = Source::Services;
    const KIND: &'static str = "Service";

    fn convert(&self) -> Converted<Event> {
        let Converted { outcome, diagnostics } = convert_service(self, None);
        Converted { outcome: outcome.map(Event::Service), diagnostics }
    }

    fn gone(name: ObjectName) -> Option<Event> {
        Some(Event::ServiceGone(name))
    }
}

impl Watched for discovery_v1::EndpointSlice {
    const SOURCE: Source = Source::EndpointSlices;
    const KIND: &'static str = "EndpointSlice";

    fn convert(&self) -> Converted<Event> {
        let Converted { outcome, diagnostics } = convert_slice(self, None);
        Converted { outcome: outcome.map(Event::Slice), diagnostics }
    }

    fn gone(name: ObjectName) -> Option<Event> {
        Some(Event::SliceGone(name))
    }
}

impl Watched for core_v1::Node {
    const SOURCE: Source = Source::Node;
    const KIND: &'static str = "Node";

    fn convert(&self) -> Converted<Event> {
        let Converted { outcome, diagnostics } = convert_node(self, None);
        Converted { outcome: outcome.map(Event::Node), diagnostics }
    }

    fn gone(name: ObjectName) -> Option<Event> {
        tracing::warn!(node = %name.name, "this node's Node object was deleted; its last state stays in effect");
        None
    }

    fn subject(name: &ObjectName) -> String {
        format!("Node {}", name.name)
    }
}

impl Watched for networking_v1::ServiceCIDR {
    const SOURCE: Source = Source::ServiceCidrs;
    const KIND: &'static str = "ServiceCIDR";
    const OPTIONAL: bool = true;

    fn convert(&self) -> Converted<Event> {
        let Converted { outcome, diagnostics } = convert_service_cidr(self, None);
        Converted { outcome: outcome.map(|(name, ranges)| Event::ServiceCidr(name, ranges)), diagnostics }
    }

    fn gone(name: ObjectName) -> Option<Event> {
        Some(Event::ServiceCidrGone(name.name))
    }

    fn subject(name: &ObjectName) -> String {
        format!("ServiceCIDR {}", name.name)
    }
}

// === Watch ===

/// What each watch needs.
#[derive(Clone)]
struct Watch {
    tx: Sender<Event>,
    node_name: Arc<str>,
    timing: Timing,
    metrics: Arc<SourceMetrics>,
}

impl Watch {
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
        let Some(metrics) = self.metrics.watch(K::SOURCE) else { return };
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
                        for event in translator.translate(event) {
                            if self.tx.send(event).await.is_err() {
                                return;
                            }
                        }
                        continue;
                    }
                    Err(error) => error,
                };
                if K::OPTIONAL && is_absent(&error, translator.listed) {
                    if !translator.absent {
                        tracing::info!(kind = K::KIND, %error, "the API server does not give this kind; going on without");
                    }
                    for event in translator.none() {
                        if self.tx.send(event).await.is_err() {
                            return;
                        }
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

/// Does the server not have the kind? One that has not been told of a kind may also forbid it (a role from before): as
/// long as it was never listed, that is the same.
fn is_absent(error: &watcher::Error, listed: bool) -> bool {
    match error {
        watcher::Error::InitialListFailed(kube::Error::Api(status)) => {
            status.code == 404 || status.code == 403 && !listed
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

// === Translator ===

/// Turns what a watch says into events.
struct Translator<K> {
    node_name: Arc<str>,
    /// Names in the listing that is under way.
    listing: Option<Names>,
    /// Findings that the receiver was told.
    findings: BTreeMap<ObjectName, Vec<Diagnostic>>,
    /// This node as the receiver was told: the kubelet updates its Node often, and seldom in what matters here.
    node: Option<Event>,
    /// The server has given a full listing.
    listed: bool,
    /// The receiver was told that the server does not have the kind.
    absent: bool,
    kind: PhantomData<K>,
}

#[derive(Default)]
struct Names {
    ours: BTreeSet<ObjectName>,
    with_findings: BTreeSet<ObjectName>,
}

impl<K: Watched> Translator<K> {
    fn new(node_name: Arc<str>) -> Self {
        Self {
            node_name,
            listing: None,
            findings: BTreeMap::new(),
            node: None,
            listed: false,
            absent: false,
            kind: PhantomData,
        }
    }

    fn translate(&mut self, event: watcher::Event<DeserializeGuard<K>>) -> Vec<Event> {
        let mut events = Vec::new();
        match event {
            watcher::Event::Init => self.listing = Some(Names::default()),
            watcher::Event::InitApply(object) | watcher::Event::Apply(object) => self.apply(&object, &mut events),
            watcher::Event::Delete(object) => {
                if let Some(name) = object_name(object.meta()) {
                    self.note(&name, Vec::new(), &mut events);
                    events.extend(K::gone(name));
                }
            }
            watcher::Event::InitDone => self.finish(&mut events),
        }
        events
    }

    fn apply(&mut self, object: &DeserializeGuard<K>, events: &mut Vec<Event>) {
        let Some(name) = object_name(object.meta()) else { return };
        let (outcome, diagnostics, keep) = match &object.0 {
            Ok(object) => {
                let converted = object.convert();
                let keep = converted.outcome.is_some();
                (converted.outcome, converted.diagnostics, keep)
            }
            Err(invalid) => {
                let finding = Diagnostic {
                    severity: Severity::Error,
                    object: K::subject(&name),
                    field: String::new(),
                    problem: format!("cannot be read: {}", invalid.error),
                    fix: "mend the object; its last good version stays in effect".to_owned(),
                };
                (None, vec![finding], true)
            }
        };
        if let Some(listing) = &mut self.listing {
            if keep {
                listing.ours.insert(name.clone());
            }
            if !diagnostics.is_empty() {
                listing.with_findings.insert(name.clone());
            }
        }
        match outcome {
            Some(event) if self.node.as_ref() == Some(&event) => {}
            Some(event) => {
                if K::SOURCE == Source::Node {
                    self.node = Some(event.clone());
                }
                events.push(event);
            }
            // In a listing, its end says so.
            None if !keep && self.listing.is_none() => events.extend(K::gone(name.clone())),
            None => {}
        }
        self.note(&name, diagnostics, events);
    }

    /// The server does not have the kind: as after an empty listing. Told once.
    fn none(&mut self) -> Vec<Event> {
        let mut events = Vec::new();
        if !std::mem::replace(&mut self.absent, true) {
            self.listing = None;
            self.finish(&mut events);
            self.listed = false;
            self.absent = true;
        }
        events
    }

    fn finish(&mut self, events: &mut Vec<Event>) {
        (self.listed, self.absent) = (true, false);
        let Names { ours, with_findings } = self.listing.take().unwrap_or_default();
        let mended: Vec<ObjectName> =
            self.findings.keys().filter(|name| !with_findings.contains(*name)).cloned().collect();
        for name in mended {
            self.note(&name, Vec::new(), events);
        }
        let listing = match K::SOURCE {
            Source::Node => {
                if self.node.is_none() {
                    let node = Event::Node(Node { name: Arc::clone(&self.node_name), ..Node::default() });
                    self.node = Some(node.clone());
                    events.push(node);
                }
                Listing::Node
            }
            Source::ServiceCidrs => Listing::ServiceCidrs(ours.into_iter().map(|name| name.name).collect()),
            Source::Services | Source::EndpointSlices | Source::Links => Listing::Objects(ours),
        };
        events.push(Event::Listed(K::SOURCE, listing));
    }

    /// Tells the findings about an object, if they are news.
    fn note(&mut self, name: &ObjectName, findings: Vec<Diagnostic>, events: &mut Vec<Event>) {
        if self.findings.get(name).map_or(&[][..], Vec::as_slice) == findings {
            return;
        }
        events.push(Event::Diagnostics { object: K::subject(name), findings: findings.clone() });
        if findings.is_empty() {
            self.findings.remove(name);
        } else {
            self.findings.insert(name.clone(), findings);
        }
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
