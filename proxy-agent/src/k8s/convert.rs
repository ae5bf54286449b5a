//! Kubernetes objects as the proxy understands them. Pure: no I/O, the same answer for the API and for a file.
//!
//! ```text
//!   Service, EndpointSlice, Node ──▶ Converted { outcome: the core type, or none of ours; diagnostics }
//! ```
//!
//! An invalid part is left out and named in a diagnostic (error); a feature that is not honoured is named too (warning).
//! Either way the rest of the object stands.

use std::collections::{BTreeMap, HashSet};
use std::net::IpAddr;
use std::num::NonZeroU16;
use std::sync::Arc;

use k8s_openapi::api::core::v1 as core_v1;
use k8s_openapi::api::discovery::v1 as discovery_v1;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use proxy_core::diagnostic::{Diagnostic, Severity};
use proxy_core::event::Node;
use proxy_core::name::ObjectName;
use proxy_core::service::{Endpoint, EndpointPort, EndpointSlice, Protocol, Service, ServicePort};

use super::address::{parse_cidr, parse_ip, unusable};

/// Label that gives a Service and its slices to another proxy, whatever its value.
pub const LABEL_PROXY_NAME: &str = "service.kubernetes.io/service-proxy-name";
/// Label that makes a Service and its slices headless, whatever its value.
pub const LABEL_HEADLESS: &str = "service.kubernetes.io/headless";
/// Label of a slice that names its Service.
const LABEL_SERVICE_NAME: &str = "kubernetes.io/service-name";
/// Label of a Node that names its zone.
const LABEL_ZONE: &str = "topology.kubernetes.io/zone";
/// Taint of a Node that the cluster autoscaler is about to remove.
const TAINT_LEAVING: &str = "ToBeDeletedByClusterAutoscaler";
/// `sessionAffinityConfig.clientIP.timeoutSeconds` when it is not set: three hours.
const AFFINITY_DEFAULT: u32 = 10_800;
/// Longest affinity that the API accepts: one day.
const AFFINITY_MAX: i32 = 86_400;
/// Findings about one object beyond this many are only counted: a slice has up to 1,000 endpoints.
const FINDINGS_MAX: usize = 20;

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

// === Service ===

fn service_outcome(service: &core_v1::Service, name: ObjectName, report: &mut Report) -> Option<Service> {
    if not_ours(&service.metadata) {
        return None;
    }
    let Some(spec) = &service.spec else {
        report.error("spec", "is missing, so the Service is not served", "describe the Service in it");
        return None;
    };
    let kind = spec.type_.as_deref().filter(|kind| !kind.is_empty()).unwrap_or("ClusterIP");
    if kind == "ExternalName" {
        return None;
    }
    let cluster_ips = cluster_ips(spec, report)?;
    if spec.internal_traffic_policy.as_deref() == Some("Local") {
        report.error(
            "spec.internalTrafficPolicy",
            "Local is not supported yet; the Service is not served at all, rather than by pods of other nodes",
            "set it to Cluster, or keep another proxy for this Service",
        );
        return None;
    }
    unsupported(spec, kind, report);
    let ports = service_ports(spec.ports.as_deref().unwrap_or_default(), report);
    if ports.is_empty() {
        let problem = "names no valid port, so the Service is not served";
        report.error("spec.ports", problem, "add at least one port between 1 and 65535");
        return None;
    }
    if cluster_ips.is_empty() {
        let problem = "names no valid address, so the Service is not served";
        report.error("spec.clusterIPs", problem, "write one IPv4 address, one IPv6 address, or one of each");
        return None;
    }
    Some(Service {
        name,
        cluster_ips,
        ports,
        affinity_seconds: affinity_seconds(spec, report),
        external_ips: Vec::new(),
        load_balancer_ips: Vec::new(),
        source_ranges: Vec::new(),
        internal_local: false,
        external_local: false,
        health_check_node_port: None,
    })
}

/// Cluster addresses, at most one of each family. `None` when the Service is headless or has no address yet.
fn cluster_ips(spec: &core_v1::ServiceSpec, report: &mut Report) -> Option<Vec<IpAddr>> {
    let single = spec.cluster_ip.as_deref().unwrap_or_default();
    let several = spec.cluster_ips.as_deref().unwrap_or_default();
    if single == "None" || several.first().is_some_and(|first| first == "None") {
        return None;
    }
    let texts: Vec<(String, &str)> = if several.is_empty() {
        vec![("spec.clusterIP".to_owned(), single)]
    } else {
        let fields = several.iter().enumerate();
        fields.map(|(at, text)| (format!("spec.clusterIPs[{at}]"), text.as_str())).collect()
    };
    if texts.iter().all(|(_, text)| text.is_empty()) {
        if report.from_file {
            report.warning(
                "spec.clusterIP",
                "is not set and there is no API server to assign one, so the Service is not served",
                "write an unused address of the service network, or None for a headless Service",
            );
        }
        return None;
    }
    if !several.is_empty() && !single.is_empty() && parse_ip(single) != parse_ip(&several[0]) {
        let problem = format!("{single:?} is not the first of spec.clusterIPs, and is ignored");
        report.warning("spec.clusterIP", problem, "make both the same, or leave one out");
    }
    let mut addresses = Vec::with_capacity(texts.len());
    for (field, text) in texts {
        match parse_ip(text) {
            None => {
                let problem = format!("{text:?} is no IP address, and is left out");
                report.error(field, problem, "write an IPv4 or IPv6 address");
            }
            Some(address) => {
                let same_family = |other: &IpAddr| other.is_ipv4() == address.is_ipv4();
                if let Some(reason) = unusable(address) {
                    let problem = format!("{address} {reason}, and is left out");
                    report.error(field, problem, "use an address of the service network");
                } else if addresses.iter().any(same_family) {
                    let problem = format!("{address} is a second address of its family, and is left out");
                    report.error(field, problem, "keep one address of each family");
                } else {
                    addresses.push(address);
                }
            }
        }
    }
    Some(addresses)
}

/// Says which fields are not honoured, and what happens instead.
fn unsupported(spec: &core_v1::ServiceSpec, kind: &str, report: &mut Report) {
    let external = spec.external_ips.as_deref().is_some_and(|ips| !ips.is_empty());
    let outside = match kind {
        "ClusterIP" => false,
        "NodePort" => {
            let problem = "NodePort is not supported yet: the cluster address is served, the node ports are not";
            report.warning("spec.type", problem, "reach it by its cluster address");
            true
        }
        "LoadBalancer" => {
            let problem = "LoadBalancer is not supported yet: the cluster address is served, node ports and the load \
                           balancer's address are not";
            report.warning("spec.type", problem, "reach it by its cluster address");
            true
        }
        other => {
            let problem = format!("{other:?} is unknown, and is treated as ClusterIP");
            report.warning("spec.type", problem, "use ClusterIP, NodePort, LoadBalancer or ExternalName");
            false
        }
    };
    if external {
        let problem = "are not supported yet: traffic to them is left to the network";
        report.warning("spec.externalIPs", problem, "reach it by its cluster address");
    }
    if (outside || external) && spec.external_traffic_policy.as_deref() == Some("Local") {
        let problem = "Local has no effect: nothing that it governs is served yet";
        report.warning("spec.externalTrafficPolicy", problem, "nothing to do for traffic inside the cluster");
    }
    if spec.load_balancer_source_ranges.as_deref().is_some_and(|ranges| !ranges.is_empty()) {
        report.warning(
            "spec.loadBalancerSourceRanges",
            "have no effect: the load balancer's address is not served, the cluster address is open to all",
            "do not rely on them to keep clients out",
        );
    }
    if let Some(policy) = spec.internal_traffic_policy.as_deref().filter(|policy| !["", "Cluster"].contains(policy)) {
        let problem = format!("{policy:?} is unknown, and is treated as Cluster");
        report.warning("spec.internalTrafficPolicy", problem, "use Cluster");
    }
}

fn service_ports(listed: &[core_v1::ServicePort], report: &mut Report) -> Vec<ServicePort> {
    let mut ports = Vec::with_capacity(listed.len());
    let mut names = BTreeMap::new();
    let mut numbers = BTreeMap::new();
    for (at, listed) in listed.iter().enumerate() {
        let field = |tail: &str| format!("spec.ports[{at}].{tail}");
        let (Some(protocol), Some(port)) = (
            protocol(listed.protocol.as_deref(), || field("protocol"), report),
            port(listed.port, || field("port"), report),
        ) else {
            continue;
        };
        let name = listed.name.as_deref().unwrap_or_default();
        if let Some(first) = names.get(name) {
            let problem = if name.is_empty() {
                format!("is missing, as in spec.ports[{first}]; this port is left out")
            } else {
                format!("{name:?} is taken by spec.ports[{first}]; this port is left out")
            };
            report.error(field("name"), problem, "give each port its own name");
            continue;
        }
        if let Some(first) = numbers.get(&(protocol, port)) {
            let problem = format!("{port} is taken by spec.ports[{first}]; this port is left out");
            report.error(field("port"), problem, "use another number or protocol");
            continue;
        }
        names.insert(name, at);
        numbers.insert((protocol, port), at);
        ports.push(ServicePort { name: name.into(), protocol, port, node_port: None });
    }
    ports
}

fn affinity_seconds(spec: &core_v1::ServiceSpec, report: &mut Report) -> Option<u32> {
    match spec.session_affinity.as_deref() {
        None | Some("" | "None") => None,
        Some("ClientIP") => {
            let config = spec.session_affinity_config.as_ref().and_then(|config| config.client_ip.as_ref());
            let Some(seconds) = config.and_then(|config| config.timeout_seconds) else { return Some(AFFINITY_DEFAULT) };
            if (1..=AFFINITY_MAX).contains(&seconds) {
                return u32::try_from(seconds).ok();
            }
            let problem = format!("{seconds} is out of range, and {AFFINITY_DEFAULT} is used instead");
            report.error(
                "spec.sessionAffinityConfig.clientIP.timeoutSeconds",
                problem,
                "use 1 to 86400, or leave it out",
            );
            Some(AFFINITY_DEFAULT)
        }
        Some(other) => {
            let problem = format!("{other:?} is unknown, and is treated as None");
            report.error("spec.sessionAffinity", problem, "use ClientIP or None");
            None
        }
    }
}

// === EndpointSlice ===

fn slice_outcome(slice: &discovery_v1::EndpointSlice, name: ObjectName, report: &mut Report) -> Option<EndpointSlice> {
    if not_ours(&slice.metadata) {
        return None;
    }
    let Some(service) = label(&slice.metadata, LABEL_SERVICE_NAME).filter(|service| !service.is_empty()) else {
        if report.from_file {
            let problem = format!("has no label {LABEL_SERVICE_NAME}, so the slice belongs to no Service");
            report.warning("metadata.labels", problem, "add the label with the Service's name");
        }
        return None;
    };
    let ipv4 = match slice.address_type.as_str() {
        "IPv4" => true,
        "IPv6" => false,
        other => {
            let problem = format!("{other:?} cannot be forwarded to, so the slice is ignored");
            report.warning("addressType", problem, "use slices of type IPv4 or IPv6");
            return None;
        }
    };
    let mut strings = Strings::default();
    let mut ports = Vec::new();
    for (at, listed) in slice.ports.as_deref().unwrap_or_default().iter().enumerate() {
        let Some(number) = listed.port else {
            let problem = "is missing, which means all ports; this port is left out";
            report.warning(format!("ports[{at}].port"), problem, "write the target port's number");
            continue;
        };
        let protocol = protocol(listed.protocol.as_deref(), || format!("ports[{at}].protocol"), report);
        let port = port(number, || format!("ports[{at}].port"), report);
        if let (Some(protocol), Some(port)) = (protocol, port) {
            ports.push(EndpointPort { name: listed.name.as_deref().unwrap_or_default().into(), protocol, port });
        }
    }
    let endpoints = slice.endpoints.as_deref().unwrap_or_default().iter().enumerate();
    let endpoints = endpoints.filter_map(|(at, listed)| endpoint(at, listed, ipv4, &mut strings, report)).collect();
    let service = ObjectName { namespace: Arc::clone(&name.namespace), name: service.into() };
    Some(EndpointSlice { name, service, ports, endpoints })
}

fn endpoint(
    at: usize,
    listed: &discovery_v1::Endpoint,
    ipv4: bool,
    strings: &mut Strings,
    report: &mut Report,
) -> Option<Endpoint> {
    let field = || format!("endpoints[{at}].addresses[0]");
    let Some(text) = listed.addresses.first() else {
        report.error(field(), "is missing, so the endpoint is left out", "write the endpoint's address");
        return None;
    };
    let Some(address) = parse_ip(text) else {
        let problem = format!("{text:?} is no IP address, so the endpoint is left out");
        report.error(field(), problem, "write an address of the slice's addressType");
        return None;
    };
    if address.is_ipv4() != ipv4 {
        let problem = format!("{address} is not of the slice's addressType, so the endpoint is left out");
        report.error(field(), problem, "keep IPv4 and IPv6 endpoints in slices of their own");
        return None;
    }
    if let Some(reason) = unusable(address) {
        let problem = format!("{address} {reason}, so the endpoint is left out");
        report.error(field(), problem, "use an address that other nodes can reach");
        return None;
    }
    let conditions = listed.conditions.as_ref();
    let ready = conditions.and_then(|conditions| conditions.ready).unwrap_or(true);
    let hints = listed.hints.as_ref();
    let zones = hints.and_then(|hints| hints.for_zones.as_deref()).unwrap_or_default();
    let nodes = hints.and_then(|hints| hints.for_nodes.as_deref()).unwrap_or_default();
    Some(Endpoint {
        address,
        ready,
        serving: conditions.and_then(|conditions| conditions.serving).unwrap_or(ready),
        terminating: conditions.and_then(|conditions| conditions.terminating).unwrap_or(false),
        node: listed.node_name.as_deref().filter(|node| !node.is_empty()).map(|node| strings.shared(node)),
        for_zones: zones.iter().map(|zone| strings.shared(&zone.name)).collect(),
        for_nodes: nodes.iter().map(|node| strings.shared(&node.name)).collect(),
    })
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

/// Names that endpoints of one slice share: a thousand endpoints lie in a handful of zones.
#[derive(Default)]
struct Strings(HashSet<Arc<str>>);

impl Strings {
    fn shared(&mut self, text: &str) -> Arc<str> {
        if let Some(known) = self.0.get(text) {
            return Arc::clone(known);
        }
        let new: Arc<str> = text.into();
        self.0.insert(Arc::clone(&new));
        new
    }
}

/// Findings about one object, as they are made.
struct Report {
    object: String,
    from_file: bool,
    found: Vec<Diagnostic>,
    more: usize,
}

impl Report {
    fn new(subject: &str, origin: Option<&str>) -> Self {
        let object = origin.map_or_else(|| subject.to_owned(), |origin| format!("{origin} {subject}"));
        Self { object, from_file: origin.is_some(), found: Vec::new(), more: 0 }
    }

    fn warning(&mut self, field: impl Into<String>, problem: impl Into<String>, fix: &str) {
        self.add(Severity::Warning, field.into(), problem.into(), fix);
    }

    fn error(&mut self, field: impl Into<String>, problem: impl Into<String>, fix: &str) {
        self.add(Severity::Error, field.into(), problem.into(), fix);
    }

    fn add(&mut self, severity: Severity, field: String, problem: String, fix: &str) {
        if self.found.len() == FINDINGS_MAX {
            self.more += 1;
            return;
        }
        self.found.push(Diagnostic { severity, object: self.object.clone(), field, problem, fix: fix.to_owned() });
    }

    fn done(mut self) -> Vec<Diagnostic> {
        if self.more > 0 {
            let problem = format!("has {} more findings like these", self.more);
            self.found.push(Diagnostic {
                severity: Severity::Error,
                object: self.object,
                field: String::new(),
                problem,
                fix: "mend those named first".to_owned(),
            });
        }
        self.found
    }
}
