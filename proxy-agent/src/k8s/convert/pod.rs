//! Pods and Namespaces, stripped to what policy asks of them, and socket load balancing.

use std::sync::Arc;

use k8s_openapi::api::core::v1 as core_v1;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use proxy_core::name::ObjectName;
use proxy_core::netpol::spec::{Container, ContainerPort, Labels, Namespace, Pod, SOCKET_LB};

use super::super::address::parse_ip;
use super::report::Report;

/// Label of every Namespace with its own name, which the API server sets.
const LABEL_NAME: &str = "kubernetes.io/metadata.name";

pub(super) fn pod_outcome(pod: &core_v1::Pod, name: ObjectName, report: &mut Report) -> Pod {
    let meta = &pod.metadata;
    let (spec, status) = (pod.spec.as_ref(), pod.status.as_ref());
    let uid = meta.uid.as_deref().unwrap_or_default();
    if uid.is_empty() {
        let problem = "is missing, so no interface is known to be this pod's";
        report.warning("metadata.uid", problem, "write the UID that the container runtime gave to the CNI");
    }
    let phase = status.and_then(|status| status.phase.as_deref());
    let created = meta.creation_timestamp.as_ref().map_or(0, |time| time.0.as_second());
    Pod {
        name,
        uid: uid.into(),
        labels: labels(meta),
        node: spec.and_then(|spec| spec.node_name.as_deref()).filter(|node| !node.is_empty()).map(Arc::from),
        host_network: spec.and_then(|spec| spec.host_network).unwrap_or_default(),
        finished: matches!(phase, Some("Succeeded" | "Failed")),
        deleting: meta.deletion_timestamp.is_some(),
        created: u64::try_from(created).unwrap_or_default(),
        ips: status.map(|status| ips(status, report)).unwrap_or_default(),
        ports: spec.map(|spec| ports(spec, report)).unwrap_or_default(),
        socket_lb: socket_lb(meta, report),
    }
}

/// May its sockets be translated? What cannot be read is as if it were not there.
fn socket_lb(meta: &ObjectMeta, report: &mut Report) -> bool {
    match meta.annotations.as_ref().and_then(|all| all.get(SOCKET_LB)).map(String::as_str) {
        None | Some("enabled") => true,
        Some("disabled") => false,
        Some(other) => {
            let problem = format!("{other:?} is neither \"enabled\" nor \"disabled\", and counts as \"enabled\"");
            let fix = "write \"disabled\" to leave the pod's sockets alone, or remove the annotation";
            report.warning(format!("metadata.annotations[{SOCKET_LB}]"), problem, fix);
            true
        }
    }
}

pub(super) fn namespace_outcome(namespace: &core_v1::Namespace, name: &str, from_file: bool) -> Namespace {
    let name: Arc<str> = name.into();
    let mut labels = labels(&namespace.metadata);
    if from_file {
        labels.insert(LABEL_NAME.into(), Arc::clone(&name));
    }
    Namespace { name, labels, terminating: namespace.metadata.deletion_timestamp.is_some() }
}

fn labels(meta: &ObjectMeta) -> Labels {
    let labels = meta.labels.iter().flatten();
    labels.map(|(key, value)| (key.as_str().into(), value.as_str().into())).collect()
}

/// `status.podIPs`, or `status.podIP` of those who know no other.
fn ips(status: &core_v1::PodStatus, report: &mut Report) -> Vec<std::net::IpAddr> {
    let several: Vec<(String, &str)> = match status.pod_ips.as_deref() {
        Some(all) if !all.is_empty() => {
            all.iter().enumerate().map(|(at, pod)| (format!("status.podIPs[{at}].ip"), pod.ip.as_str())).collect()
        }
        _ => status.pod_ip.iter().map(|ip| ("status.podIP".to_owned(), ip.as_str())).collect(),
    };
    let mut parsed = Vec::with_capacity(several.len());
    for (field, text) in several.into_iter().filter(|(_, text)| !text.is_empty()) {
        if let Some(ip) = parse_ip(text) {
            parsed.push(ip);
        } else {
            let problem = format!("{text:?} is no IP address, and is left out");
            report.error(field, problem, "write an IPv4 or IPv6 address");
        }
    }
    parsed
}

/// Ports that have a name: nothing asks for others.
fn ports(spec: &core_v1::PodSpec, report: &mut Report) -> Vec<ContainerPort> {
    let main = spec.containers.iter().enumerate().map(|(at, one)| (format!("spec.containers[{at}]"), one, false));
    let init = spec.init_containers.iter().flatten().enumerate();
    let init = init.map(|(at, one)| (format!("spec.initContainers[{at}]"), one, true));
    let mut named = Vec::new();
    for (path, one, is_init) in main.chain(init) {
        let container = match (is_init, one.restart_policy.as_deref()) {
            (false, _) => Container::Main,
            (true, Some("Always")) => Container::Sidecar,
            (true, _) => Container::Init,
        };
        for (at, listed) in one.ports.iter().flatten().enumerate() {
            let Some(name) = listed.name.as_deref().filter(|name| !name.is_empty()) else { continue };
            let Some(port) = u16::try_from(listed.container_port).ok().filter(|port| *port != 0) else {
                let problem = format!("{} is no port number, and this port is left out", listed.container_port);
                report.error(format!("{path}.ports[{at}].containerPort"), problem, "use 1 to 65535");
                continue;
            };
            let protocol = listed.protocol.as_deref().filter(|protocol| !protocol.is_empty()).map(Arc::from);
            named.push(ContainerPort { name: name.into(), protocol, port, container });
        }
    }
    named
}
