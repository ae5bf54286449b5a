//! EndpointSlices.

use std::collections::HashSet;
use std::sync::Arc;

use k8s_openapi::api::discovery::v1 as discovery_v1;
use k8s_openapi::jiff::Timestamp;
use proxy_core::name::ObjectName;
use proxy_core::service::{Endpoint, EndpointPort, EndpointSlice};

use super::super::address::{parse_ip, unusable};
use super::report::Report;
use super::{label, not_ours, port, protocol};

/// Label of a slice that names its Service.
const LABEL_SERVICE_NAME: &str = "kubernetes.io/service-name";
/// Annotation of a slice with the time of the change that it tells of (RFC 3339).
const ANNOTATION_TRIGGERED: &str = "endpoints.kubernetes.io/last-change-trigger-time";

pub(super) fn slice_outcome(
    slice: &discovery_v1::EndpointSlice,
    name: ObjectName,
    report: &mut Report,
) -> Option<EndpointSlice> {
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
    Some(EndpointSlice { name, service, ports, endpoints, triggered: triggered(slice, report) })
}

/// When the change began that the slice tells of, in milliseconds since 1970.
fn triggered(slice: &discovery_v1::EndpointSlice, report: &mut Report) -> Option<u64> {
    let text = slice.metadata.annotations.as_ref()?.get(ANNOTATION_TRIGGERED)?;
    let at = text.parse::<Timestamp>().ok().and_then(|at| u64::try_from(at.as_millisecond()).ok());
    if at.is_none() {
        let problem = format!("{text:?} is no time, so the delay of this change is not measured");
        report.warning(format!("metadata.annotations[{ANNOTATION_TRIGGERED}]"), problem, "leave it to the controller");
    }
    at
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
