//! The kinds of objects that are watched, and the event that each gives.

use std::collections::BTreeSet;
use std::fmt::Debug;
use std::sync::Arc;

use k8s_openapi::api::core::v1 as core_v1;
use k8s_openapi::api::discovery::v1 as discovery_v1;
use k8s_openapi::api::networking::v1 as networking_v1;
use kube::Resource;
use proxy_core::event::{Event, Listing, Node, Source};
use proxy_core::name::ObjectName;
use proxy_core::netpol::reconcile::PolicyListing;
use proxy_core::netpol::spec::Change;
use serde::de::DeserializeOwned;

use super::super::convert::{
    Converted, convert_namespace, convert_node, convert_pod, convert_policy, convert_service, convert_service_cidr,
    convert_slice, subject, unreadable_policy,
};
use super::super::metrics::{SourceMetrics, WatchMetrics};

/// A kind of object that is watched.
pub(super) trait Watched:
    Resource<DynamicType = ()> + Clone + Debug + DeserializeOwned + Send + Sync + 'static
{
    const KIND: &'static str;
    /// Answers to a list that say that the server does not have the kind: then there is no such object.
    const ABSENT: &'static [u16] = &[];
    /// What it means, beside the log, that the kind may not be watched.
    const FORBIDDEN: Option<&'static str> = None;

    /// Counters of its watch.
    fn metrics(all: &SourceMetrics) -> &WatchMetrics;

    /// The event that tells of it.
    fn convert(&self) -> Converted<Event>;

    /// The event that tells of its end; `None` where the last state stays.
    fn gone(name: ObjectName) -> Option<Event>;

    /// The event that ends a listing.
    fn listed(names: BTreeSet<ObjectName>) -> Event;

    /// What there is when a listing is empty, of a kind of which there is one object.
    fn only(_node: &Arc<str>) -> Option<Event> {
        None
    }

    /// What stands in for an object that cannot be read and never could be, where its absence would open something.
    fn unreadable(_name: &ObjectName) -> Option<Event> {
        None
    }

    /// Key of its diagnostics.
    fn subject(name: &ObjectName) -> String {
        subject(Self::KIND, name)
    }
}

impl Watched for core_v1::Service {
    const KIND: &'static str = "Service";

    fn metrics(all: &SourceMetrics) -> &WatchMetrics {
        &all.services
    }

    fn convert(&self) -> Converted<Event> {
        event(convert_service(self, None), Event::Service)
    }

    fn gone(name: ObjectName) -> Option<Event> {
        Some(Event::ServiceGone(name))
    }

    fn listed(names: BTreeSet<ObjectName>) -> Event {
        Event::Listed(Source::Services, Listing::Objects(names))
    }
}

impl Watched for discovery_v1::EndpointSlice {
    const KIND: &'static str = "EndpointSlice";

    fn metrics(all: &SourceMetrics) -> &WatchMetrics {
        &all.slices
    }

    fn convert(&self) -> Converted<Event> {
        event(convert_slice(self, None), Event::Slice)
    }

    fn gone(name: ObjectName) -> Option<Event> {
        Some(Event::SliceGone(name))
    }

    fn listed(names: BTreeSet<ObjectName>) -> Event {
        Event::Listed(Source::EndpointSlices, Listing::Objects(names))
    }
}

impl Watched for core_v1::Node {
    const KIND: &'static str = "Node";

    fn metrics(all: &SourceMetrics) -> &WatchMetrics {
        &all.node
    }

    fn convert(&self) -> Converted<Event> {
        event(convert_node(self, None), Event::Node)
    }

    fn gone(name: ObjectName) -> Option<Event> {
        tracing::warn!(node = %name.name, "this node's Node object was deleted; its last state stays in effect");
        None
    }

    fn listed(_: BTreeSet<ObjectName>) -> Event {
        Event::Listed(Source::Node, Listing::Node)
    }

    fn only(node: &Arc<str>) -> Option<Event> {
        Some(Event::Node(Node { name: Arc::clone(node), ..Node::default() }))
    }

    fn subject(name: &ObjectName) -> String {
        format!("Node {}", name.name)
    }
}

impl Watched for networking_v1::ServiceCIDR {
    const KIND: &'static str = "ServiceCIDR";
    // A server that has not been told of a kind may also forbid it (a role from before).
    const ABSENT: &'static [u16] = &[403, 404];

    fn metrics(all: &SourceMetrics) -> &WatchMetrics {
        &all.service_cidrs
    }

    fn convert(&self) -> Converted<Event> {
        event(convert_service_cidr(self, None), |(name, ranges)| Event::ServiceCidr(name, ranges))
    }

    fn gone(name: ObjectName) -> Option<Event> {
        Some(Event::ServiceCidrGone(name.name))
    }

    fn listed(names: BTreeSet<ObjectName>) -> Event {
        let names = names.into_iter().map(|name| name.name).collect();
        Event::Listed(Source::ServiceCidrs, Listing::ServiceCidrs(names))
    }

    fn subject(name: &ObjectName) -> String {
        format!("ServiceCIDR {}", name.name)
    }
}

impl Watched for networking_v1::NetworkPolicy {
    const KIND: &'static str = "NetworkPolicy";
    // Forbidden is not absent: the policies that the maps hold from before stay then.
    const ABSENT: &'static [u16] = &[404];
    const FORBIDDEN: Option<&'static str> =
        Some("the agent may not watch NetworkPolicies: those that it knew before stay in force, others have no effect");

    fn metrics(all: &SourceMetrics) -> &WatchMetrics {
        &all.policies
    }

    fn convert(&self) -> Converted<Event> {
        event(convert_policy(self, None), |policy| Event::NetworkPolicy(Change::Policy(policy)))
    }

    fn gone(name: ObjectName) -> Option<Event> {
        Some(Event::NetworkPolicy(Change::PolicyGone(name)))
    }

    fn listed(names: BTreeSet<ObjectName>) -> Event {
        Event::NetworkPolicyListed(PolicyListing::Policies(names))
    }

    fn unreadable(name: &ObjectName) -> Option<Event> {
        Some(Event::NetworkPolicy(Change::Policy(unreadable_policy(name.clone()))))
    }
}

impl Watched for core_v1::Pod {
    const KIND: &'static str = "Pod";
    const FORBIDDEN: Option<&'static str> =
        Some("the agent may not watch Pods: NetworkPolicies that it did not know before have no effect");

    fn metrics(all: &SourceMetrics) -> &WatchMetrics {
        &all.pods
    }

    fn convert(&self) -> Converted<Event> {
        event(convert_pod(self, None), |pod| Event::NetworkPolicy(Change::Pod(pod)))
    }

    fn gone(name: ObjectName) -> Option<Event> {
        Some(Event::NetworkPolicy(Change::PodGone(name)))
    }

    fn listed(names: BTreeSet<ObjectName>) -> Event {
        Event::NetworkPolicyListed(PolicyListing::Pods(names))
    }
}

impl Watched for core_v1::Namespace {
    const KIND: &'static str = "Namespace";
    const FORBIDDEN: Option<&'static str> =
        Some("the agent may not watch Namespaces: NetworkPolicies that it did not know before have no effect");

    fn metrics(all: &SourceMetrics) -> &WatchMetrics {
        &all.namespaces
    }

    fn convert(&self) -> Converted<Event> {
        event(convert_namespace(self, None), |namespace| Event::NetworkPolicy(Change::Namespace(namespace)))
    }

    fn gone(name: ObjectName) -> Option<Event> {
        Some(Event::NetworkPolicy(Change::NamespaceGone(name.name)))
    }

    fn listed(names: BTreeSet<ObjectName>) -> Event {
        let names = names.into_iter().map(|name| name.name).collect();
        Event::NetworkPolicyListed(PolicyListing::Namespaces(names))
    }

    fn subject(name: &ObjectName) -> String {
        format!("Namespace {}", name.name)
    }
}

fn event<T>(converted: Converted<T>, wrap: impl FnOnce(T) -> Event) -> Converted<Event> {
    Converted { outcome: converted.outcome.map(wrap), diagnostics: converted.diagnostics }
}
