//! Events on Services and on this node, written to the API server.
//!
//! An Event is a convenience: one that cannot be written is dropped, and the log has it.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

use k8s_openapi::api::core::v1::{Node, ObjectReference, Service};
use k8s_openapi::api::events::v1::Event;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{MicroTime, ObjectMeta};
use k8s_openapi::jiff::Timestamp;
use kube::api::PostParams;
use kube::{Api, Client};
use tokio::sync::mpsc;
use tokio::task::JoinSet;

use super::access;
use super::metrics::SourceMetrics;
use super::transport::Transport;
use super::{KubeConfig, SourceError};
use crate::serve::notice::{About, Filter, Notice};

/// `reportingController` of the Events.
pub const CONTROLLER: &str = "proxy-agent";
/// The API server refuses longer notes.
const NOTE: usize = 1_024;
/// Events about objects without a namespace go there.
const DEFAULT_NAMESPACE: &str = "default";

/// Writes notices as Events until `notices` ends or the handle is dropped. `qps` and `burst` bound them all together.
pub async fn spawn(
    config: KubeConfig,
    node_name: &str,
    notices: mpsc::Receiver<Notice>,
    (qps, burst): (f32, u32),
) -> Result<JoinSet<()>, SourceError> {
    if rustls::crypto::ring::default_provider().install_default().is_err() {
        tracing::trace!("TLS provider was installed already");
    }
    let fingerprint = access::fingerprint(&config);
    let servers = access::login(&config).await?;
    let transport = Transport::new(servers, config.timing, Arc::<SourceMetrics>::default());
    let recorder = Recorder { client: transport.client(), node: node_name.to_owned(), written: AtomicU64::default() };
    let mut tasks = JoinSet::new();
    tasks.spawn(transport.keep_logged_in(config, fingerprint));
    tasks.spawn(recorder.run(notices, Filter::new(qps, burst)));
    Ok(tasks)
}

struct Recorder {
    client: Client,
    node: String,
    written: AtomicU64,
}

impl Recorder {
    async fn run(self, mut notices: mpsc::Receiver<Notice>, mut filter: Filter) {
        let start = Instant::now();
        while let Some(notice) = notices.recv().await {
            if !filter.admit(&notice, start.elapsed()) {
                continue;
            }
            if let Err(error) = self.write(&notice).await {
                tracing::warn!(%error, about = ?notice.about, reason = notice.reason, "an Event cannot be written");
            }
        }
    }

    async fn write(&self, notice: &Notice) -> Result<(), kube::Error> {
        let Some(regarding) = self.regarding(&notice.about).await? else { return Ok(()) };
        let namespace = regarding.namespace.clone().unwrap_or_else(|| DEFAULT_NAMESPACE.to_owned());
        let event = event(notice, regarding, &namespace, &self.node, self.written.fetch_add(1, Ordering::Relaxed));
        Api::<Event>::namespaced(self.client.clone(), &namespace).create(&PostParams::default(), &event).await?;
        Ok(())
    }

    /// The object, with the uid by which `kubectl describe` finds its Events; `None` when it is gone.
    async fn regarding(&self, about: &About) -> Result<Option<ObjectReference>, kube::Error> {
        let reference = |kind: &str, meta: ObjectMeta| ObjectReference {
            api_version: Some("v1".to_owned()),
            kind: Some(kind.to_owned()),
            name: meta.name,
            namespace: meta.namespace,
            uid: meta.uid,
            ..ObjectReference::default()
        };
        Ok(match about {
            About::Service(name) => {
                let api = Api::<Service>::namespaced(self.client.clone(), &name.namespace);
                api.get_metadata_opt(&name.name).await?.map(|found| reference("Service", found.metadata))
            }
            About::Node(name) => {
                let api = Api::<Node>::all(self.client.clone());
                api.get_metadata_opt(name).await?.map(|found| reference("Node", found.metadata))
            }
        })
    }
}

fn event(notice: &Notice, regarding: ObjectReference, namespace: &str, node: &str, number: u64) -> Event {
    let now = Timestamp::now();
    let name = regarding.name.clone().unwrap_or_default();
    let mut note = notice.text.clone();
    if note.len() > NOTE {
        let cut = (0..=NOTE - 3).rev().find(|at| note.is_char_boundary(*at)).unwrap_or_default();
        note.truncate(cut);
        note.push('…');
    }
    // Names of two nodes never meet: each has its own host name, and its own time.
    let unique = format!("{:x}.{number:x}", now.as_nanosecond());
    Event {
        metadata: ObjectMeta {
            name: Some(format!("{}.{unique}", name.chars().take(190).collect::<String>())),
            namespace: Some(namespace.to_owned()),
            labels: Some(BTreeMap::from([("app.kubernetes.io/name".to_owned(), CONTROLLER.to_owned())])),
            ..ObjectMeta::default()
        },
        event_time: Some(MicroTime(now)),
        reporting_controller: Some(CONTROLLER.to_owned()),
        reporting_instance: Some(node.to_owned()),
        action: Some("ServeService".to_owned()),
        reason: Some(notice.reason.to_owned()),
        regarding: Some(regarding),
        note: Some(note),
        type_: Some("Warning".to_owned()),
        ..Event::default()
    }
}

#[cfg(test)]
mod tests {
    use proxy_core::name::ObjectName;

    use super::*;

    #[test]
    fn events_are_whole_and_within_the_limits() {
        let text = "é".repeat(2_000);
        let notice = Notice::service(&ObjectName::new("ns", "web"), "NotServed", text);
        let regarding = ObjectReference { name: Some("web".to_owned()), ..ObjectReference::default() };
        let event = event(&notice, regarding.clone(), "ns", "node1", 7);
        let note = event.note.clone().expect("a note");
        assert!(note.len() <= NOTE && note.ends_with('…'), "{} bytes", note.len());
        let name = event.metadata.name.clone().expect("a name");
        assert!(name.starts_with("web.") && name.ends_with(".7"), "{name}");
        let text = |value: &Option<String>| value.clone().unwrap_or_default();
        assert_eq!(
            [
                text(&event.metadata.namespace),
                text(&event.reporting_controller),
                text(&event.reporting_instance),
                text(&event.reason),
                text(&event.type_),
            ],
            ["ns", "proxy-agent", "node1", "NotServed", "Warning"].map(str::to_owned)
        );
        assert_eq!(event.regarding, Some(regarding));
        assert!(event.event_time.is_some(), "the API server asks for it");
    }
}
