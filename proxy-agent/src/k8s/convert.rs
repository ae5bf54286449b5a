//! Kubernetes objects as the proxy understands them. Pure: no I/O, the same answer for the API and for a file.
//!
//! ```text
//!   Service, EndpointSlice, Node, ServiceCIDR ──┬─▶ Converted { outcome: the core type, or none of ours; diagnostics }
//!   NetworkPolicy, Pod, Namespace ──────────────┘
//! ```
//!
//! An invalid part is left out and named in a diagnostic (error); a value that is not understood is named too (warning).
//! Either way the rest of the object stands.

use std::num::NonZeroU16;
use std::sync::Arc;

use ipnet::IpNet;
use k8s_openapi::api::core::v1 as core_v1;
use k8s_openapi::api::discovery::v1 as discovery_v1;
use k8s_openapi::api::networking::v1 as networking_v1;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use proxy_core::diagnostic::Diagnostic;
use proxy_core::event::Node;
use proxy_core::name::ObjectName;
use proxy_core::netpol::spec::{Namespace, Pod, PolicySpec};
use proxy_core::service::{EndpointSlice, Protocol, Service};

use super::address::{parse_cidr, parse_ip};

mod pod;
mod policy;
mod report;
mod service;
mod slice;

pub use policy::unreadable_policy;

use pod::{namespace_outcome, pod_outcome};
use policy::policy_outcome;
use report::Report;
use service::service_outcome;
use slice::slice_outcome;

/// Label that gives a Service and its slices to another proxy, whatever its value.
pub const LABEL_PROXY_NAME: &str = "service.kubernetes.io/service-proxy-name";
/// Label that makes a Service and its slices headless, whatever its value.
pub const LABEL_HEADLESS: &str = "service.kubernetes.io/headless";
/// Label of a Node that names its zone.
const LABEL_ZONE: &str = "topology.kubernetes.io/zone";
/// Taint of a Node that the cluster autoscaler is about to remove.
const TAINT_LEAVING: &str = "ToBeDeletedByClusterAutoscaler";

/// What became of one object.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Converted<T> {
    /// The object; `None` when it is none of ours (headless, another proxy's) or nothing of it is valid.
    pub outcome: Option<T>,
    /// Findings; empty when all is well.
    pub diagnostics: Vec<Diagnostic>,
}

/// A Service. `origin` is the file and line it came from, if it did not come from an API server.
pub fn convert_service(service: &core_v1::Service, origin: Option<&str>) -> Converted<Service> {
    let Some(name) = object_name(&service.metadata) else { return nameless("Service", origin) };
    let mut report = Report::new(&subject("Service", &name), origin);
    let outcome = service_outcome(service, name, &mut report);
    Converted { outcome, diagnostics: report.done() }
}

/// An EndpointSlice. `origin` as in [`convert_service`].
pub fn convert_slice(slice: &discovery_v1::EndpointSlice, origin: Option<&str>) -> Converted<EndpointSlice> {
    let Some(name) = object_name(&slice.metadata) else { return nameless("EndpointSlice", origin) };
    let mut report = Report::new(&subject("EndpointSlice", &name), origin);
    let outcome = slice_outcome(slice, name, &mut report);
    Converted { outcome, diagnostics: report.done() }
}

/// A Node. `origin` as in [`convert_service`].
pub fn convert_node(node: &core_v1::Node, origin: Option<&str>) -> Converted<Node> {
    let Some(name) = node.metadata.name.as_deref().filter(|name| !name.is_empty()) else {
        return nameless("Node", origin);
    };
    let mut report = Report::new(&format!("Node {name}"), origin);
    let spec = node.spec.as_ref();
    let cidrs = match spec.and_then(|spec| spec.pod_cidrs.as_deref()).filter(|cidrs| !cidrs.is_empty()) {
        Some(cidrs) => cidrs.iter().map(String::as_str).collect(),
        None => spec.and_then(|spec| spec.pod_cidr.as_deref()).filter(|cidr| !cidr.is_empty()).into_iter().collect(),
    };
    let cidrs: Vec<&str> = cidrs;
    let pod_cidrs = cidrs
        .into_iter()
        .enumerate()
        .filter_map(|(at, text)| {
            let net = parse_cidr(text);
            if net.is_none() {
                let problem = format!("{text:?} is no network in CIDR notation, and is left out");
                report.error(format!("spec.podCIDRs[{at}]"), problem, "write it like 10.244.1.0/24");
            }
            net
        })
        .collect();
    let listed = node.status.as_ref().and_then(|status| status.addresses.as_deref()).unwrap_or_default();
    let addresses = listed
        .iter()
        .enumerate()
        .filter(|(_, address)| address.type_ == "InternalIP")
        .filter_map(|(at, address)| {
            let ip = parse_ip(&address.address);
            if ip.is_none() {
                let problem = format!("{:?} is no IP address, and is left out", address.address);
                report.error(format!("status.addresses[{at}].address"), problem, "write an IPv4 or IPv6 address");
            }
            ip
        })
        .collect();
    let taints = spec.and_then(|spec| spec.taints.as_deref()).unwrap_or_default();
    let outcome = Node {
        name: name.into(),
        zone: label(&node.metadata, LABEL_ZONE).filter(|zone| !zone.is_empty()).map(Arc::from),
        pod_cidrs,
        addresses,
        leaving: node.metadata.deletion_timestamp.is_some() || taints.iter().any(|taint| taint.key == TAINT_LEAVING),
    };
    Converted { outcome: Some(outcome), diagnostics: report.done() }
}

/// A ServiceCIDR: its name and ranges. `origin` as in [`convert_service`].
pub fn convert_service_cidr(
    cidr: &networking_v1::ServiceCIDR,
    origin: Option<&str>,
) -> Converted<(Arc<str>, Vec<IpNet>)> {
    let Some(name) = cidr.metadata.name.as_deref().filter(|name| !name.is_empty()) else {
        return nameless("ServiceCIDR", origin);
    };
    let mut report = Report::new(&format!("ServiceCIDR {name}"), origin);
    let texts = cidr.spec.as_ref().and_then(|spec| spec.cidrs.as_deref()).unwrap_or_default();
    let mut ranges = Vec::with_capacity(texts.len());
    for (at, text) in texts.iter().enumerate() {
        let field = format!("spec.cidrs[{at}]");
        match parse_cidr(text) {
            // What no Service has of it would be dropped: all traffic.
            Some(range) if range.prefix_len() == 0 => {
                let problem = format!("{range} is every address there is, and is left out");
                report.error(field, problem, "write the range that cluster addresses are taken from");
            }
            Some(range) => ranges.push(range),
            None => {
                let problem = format!("{text:?} is no network in CIDR notation, and is left out");
                report.error(field, problem, "write it like 10.96.0.0/16");
            }
        }
    }
    Converted { outcome: Some((name.into(), ranges)), diagnostics: report.done() }
}

/// A NetworkPolicy, as written. `origin` as in [`convert_service`].
pub fn convert_policy(policy: &networking_v1::NetworkPolicy, origin: Option<&str>) -> Converted<PolicySpec> {
    let Some(name) = object_name(&policy.metadata) else { return nameless("NetworkPolicy", origin) };
    let mut report = Report::new(&subject("NetworkPolicy", &name), origin);
    let outcome = policy_outcome(policy, name, &mut report);
    Converted { outcome: Some(outcome), diagnostics: report.done() }
}

/// A Pod, stripped to what policy asks of it. `origin` as in [`convert_service`].
pub fn convert_pod(pod: &core_v1::Pod, origin: Option<&str>) -> Converted<Pod> {
    let Some(name) = object_name(&pod.metadata) else { return nameless("Pod", origin) };
    let mut report = Report::new(&subject("Pod", &name), origin);
    let outcome = pod_outcome(pod, name, &mut report);
    Converted { outcome: Some(outcome), diagnostics: report.done() }
}

/// A Namespace. `origin` as in [`convert_service`]; to one from a file the label with its name is added, which an API
/// server sets.
pub fn convert_namespace(namespace: &core_v1::Namespace, origin: Option<&str>) -> Converted<Namespace> {
    let Some(name) = namespace.metadata.name.as_deref().filter(|name| !name.is_empty()) else {
        return nameless("Namespace", origin);
    };
    Converted { outcome: Some(namespace_outcome(namespace, name, origin.is_some())), diagnostics: Vec::new() }
}

/// Name of a namespaced object; the namespace is `default` where none is given. `None` without a name.
pub fn object_name(meta: &ObjectMeta) -> Option<ObjectName> {
    let name = meta.name.as_deref().filter(|name| !name.is_empty())?;
    let namespace = meta.namespace.as_deref().filter(|namespace| !namespace.is_empty()).unwrap_or("default");
    Some(ObjectName::new(namespace, name))
}

/// `Kind namespace/name`: the key of an object's diagnostics.
pub fn subject(kind: &str, name: &ObjectName) -> String {
    format!("{kind} {name}")
}

// === Parts of both ===

fn not_ours(meta: &ObjectMeta) -> bool {
    label(meta, LABEL_PROXY_NAME).is_some() || label(meta, LABEL_HEADLESS).is_some()
}

fn label<'a>(meta: &'a ObjectMeta, key: &str) -> Option<&'a str> {
    meta.labels.as_ref()?.get(key).map(String::as_str)
}

fn protocol(text: Option<&str>, field: impl Fn() -> String, report: &mut Report) -> Option<Protocol> {
    match text {
        None | Some("" | "TCP") => Some(Protocol::Tcp),
        Some("UDP") => Some(Protocol::Udp),
        Some("SCTP") => Some(Protocol::Sctp),
        Some(other) => {
            let problem = format!("{other:?} is unknown, and this port is left out");
            report.error(field(), problem, "use TCP, UDP or SCTP");
            None
        }
    }
}

fn port(number: i32, field: impl Fn() -> String, report: &mut Report) -> Option<NonZeroU16> {
    let port = u16::try_from(number).ok().and_then(NonZeroU16::new);
    if port.is_none() {
        let problem = format!("{number} is no port number, and this port is left out");
        report.error(field(), problem, "use 1 to 65535");
    }
    port
}

fn nameless<T>(kind: &str, origin: Option<&str>) -> Converted<T> {
    let mut report = Report::new(kind, origin);
    report.error("metadata.name", "is missing, so the object is ignored", "give it a name");
    Converted { outcome: None, diagnostics: report.done() }
}
