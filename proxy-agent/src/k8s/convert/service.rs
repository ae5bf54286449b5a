//! Services.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::num::NonZeroU16;

use ipnet::IpNet;
use k8s_openapi::api::core::v1 as core_v1;
use proxy_core::name::ObjectName;
use proxy_core::service::{Service, ServicePort};

use super::super::address::{parse_cidr, parse_ip, unusable};
use super::report::Report;
use super::{not_ours, port, protocol};

/// `sessionAffinityConfig.clientIP.timeoutSeconds` when it is not set: three hours.
const AFFINITY_DEFAULT: u32 = 10_800;
/// Longest affinity that the API accepts: one day.
const AFFINITY_MAX: i32 = 86_400;

/// `spec.type` of a Service that is served.
#[derive(Clone, Copy, PartialEq, Eq)]
enum ServiceType {
    ClusterIp,
    NodePort,
    LoadBalancer,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum TrafficPolicy {
    Cluster,
    Local,
}

impl ServiceType {
    fn of(text: &str, report: &mut Report) -> Self {
        match text {
            "ClusterIP" => Self::ClusterIp,
            "NodePort" => Self::NodePort,
            "LoadBalancer" => Self::LoadBalancer,
            other => {
                let problem = format!("{other:?} is unknown, and is treated as ClusterIP");
                report.warning("spec.type", problem, "use ClusterIP, NodePort, LoadBalancer or ExternalName");
                Self::ClusterIp
            }
        }
    }
}

pub(super) fn service_outcome(service: &core_v1::Service, name: ObjectName, report: &mut Report) -> Option<Service> {
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
    let kind = ServiceType::of(kind, report);
    let ports = service_ports(spec.ports.as_deref().unwrap_or_default(), kind, report);
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
    let external_ips = external_ips(spec, report);
    let accessible = kind != ServiceType::ClusterIp || !external_ips.is_empty();
    let internal = policy(spec.internal_traffic_policy.as_deref(), "spec.internalTrafficPolicy", report);
    let external = policy(spec.external_traffic_policy.as_deref(), "spec.externalTrafficPolicy", report);
    let external_local = accessible && external == TrafficPolicy::Local;
    let balanced = kind == ServiceType::LoadBalancer;
    let (load_balancer_ips, source_ranges) =
        if balanced { load_balancer(service, spec, report) } else { (Vec::new(), Vec::new()) };
    let health_check = spec.health_check_node_port.filter(|port| *port != 0 && balanced && external_local);
    Some(Service {
        name,
        cluster_ips,
        ports,
        affinity_seconds: affinity_seconds(spec, report),
        external_ips,
        load_balancer_ips,
        source_ranges,
        internal_local: internal == TrafficPolicy::Local,
        external_local,
        health_check_node_port: health_check
            .and_then(|number| node_port(number, || "spec.healthCheckNodePort".to_owned(), report)),
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

/// `spec.externalIPs`. Whether one may be served is for the compiler to say: that depends on the node and its Services.
fn external_ips(spec: &core_v1::ServiceSpec, report: &mut Report) -> Vec<IpAddr> {
    let texts = spec.external_ips.as_deref().unwrap_or_default().iter().enumerate();
    let parse = |(at, text): (usize, &String)| {
        let ip = parse_ip(text);
        if ip.is_none() {
            let problem = format!("{text:?} is no IP address, and is left out");
            report.error(format!("spec.externalIPs[{at}]"), problem, "write an IPv4 or IPv6 address");
        }
        ip
    };
    texts.filter_map(parse).collect()
}

/// Addresses of the load balancer that are to be served, and the clients that may use them.
fn load_balancer(
    service: &core_v1::Service,
    spec: &core_v1::ServiceSpec,
    report: &mut Report,
) -> (Vec<IpAddr>, Vec<IpNet>) {
    let status = service.status.as_ref().and_then(|status| status.load_balancer.as_ref());
    let ingress = status.and_then(|balancer| balancer.ingress.as_deref()).unwrap_or_default();
    let mut addresses = Vec::new();
    for (at, ingress) in ingress.iter().enumerate() {
        // One with a host name alone is for DNS.
        let Some(text) = ingress.ip.as_deref().filter(|ip| !ip.is_empty()) else { continue };
        let field = |tail: &str| format!("status.loadBalancer.ingress[{at}].{tail}");
        match ingress.ip_mode.as_deref() {
            None | Some("" | "VIP") => {}
            // What is sent to it must pass through the load balancer.
            Some("Proxy") => continue,
            Some(other) => {
                let problem = format!("{other:?} is unknown, so {text} is left to the network");
                report.warning(field("ipMode"), problem, "use VIP or Proxy");
                continue;
            }
        }
        if let Some(ip) = parse_ip(text) {
            addresses.push(ip);
        } else {
            let problem = format!("{text:?} is no IP address, and is left out");
            report.error(field("ip"), problem, "write an IPv4 or IPv6 address");
        }
    }
    let mut ranges = Vec::new();
    let mut wrong = Vec::new();
    for (at, text) in spec.load_balancer_source_ranges.as_deref().unwrap_or_default().iter().enumerate() {
        let text = text.trim();
        if let Some(range) = parse_cidr(text) {
            ranges.push(range);
        } else {
            let problem = format!("{text:?} is no network in CIDR notation, and is left out");
            report.error(format!("spec.loadBalancerSourceRanges[{at}]"), problem, "write it like 192.0.2.0/24");
            wrong.push(!text.contains(':'));
        }
    }
    // No range at all would let everybody in, which is the opposite of what was asked for.
    let unreadable =
        |is_v4: bool| wrong.contains(&is_v4) && !ranges.iter().any(|range| range.addr().is_ipv4() == is_v4);
    let closed = addresses.iter().any(|ip| unreadable(ip.is_ipv4()));
    if closed {
        let problem = "have no valid entry of a family, so the load balancer's addresses of that family are not served";
        report.error("spec.loadBalancerSourceRanges", problem, "mend the entries, or remove them to let everybody in");
        addresses.retain(|ip| !unreadable(ip.is_ipv4()));
    }
    (addresses, ranges)
}

fn policy(text: Option<&str>, field: &str, report: &mut Report) -> TrafficPolicy {
    match text {
        None | Some("" | "Cluster") => TrafficPolicy::Cluster,
        Some("Local") => TrafficPolicy::Local,
        Some(other) => {
            let problem = format!("{other:?} is unknown, and is treated as Cluster");
            report.warning(field, problem, "use Cluster or Local");
            TrafficPolicy::Cluster
        }
    }
}

/// A port of the node.
fn node_port(number: i32, field: impl Fn() -> String, report: &mut Report) -> Option<NonZeroU16> {
    let port = u16::try_from(number).ok().and_then(NonZeroU16::new);
    if port.is_none() {
        let problem = format!("{number} is no port number, and is left out");
        report.error(field(), problem, "use 1 to 65535");
    }
    port
}

fn service_ports(listed: &[core_v1::ServicePort], kind: ServiceType, report: &mut Report) -> Vec<ServicePort> {
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
        let asked = listed.node_port.filter(|port| *port != 0 && kind != ServiceType::ClusterIp);
        let node_port = asked.and_then(|number| node_port(number, || field("nodePort"), report));
        ports.push(ServicePort { name: name.into(), protocol, port, node_port });
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
