//! Kubernetes objects as YAML files in the folder that agents watch.

use std::fmt::Write as _;
use std::fs;
use std::net::IpAddr;
use std::path::{Path, PathBuf};

use serde_json::{Map, Value, json};

use crate::address::{Family, service_cidr};
use crate::error::{Context as _, Result};
use crate::lease::remove_tree;
use crate::node::Node;
use crate::pod::Pod;

/// A folder of manifests, one object per file. A file changes in one step: a reader sees the old or the new one.
#[derive(Debug)]
pub struct Manifests {
    dir: PathBuf,
    /// Beside the folder, so that nothing half written is ever in it.
    draft_dir: PathBuf,
}

/// A Kubernetes object.
pub trait Object {
    /// The whole object.
    fn to_json(&self) -> Value;
}

impl Object for Value {
    fn to_json(&self) -> Value {
        self.clone()
    }
}

/// A port of a [`Service`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ServicePort {
    /// Name; empty for the only port.
    pub name: String,
    /// `TCP`, `UDP` or `SCTP`.
    pub protocol: String,
    /// Port of the Service.
    pub port: u16,
    /// Port of the pods.
    pub target_port: u16,
    /// Port of the nodes.
    pub node_port: Option<u16>,
}

/// A Service of type ClusterIP, with anything else in `spec`.
#[derive(Clone, Debug, PartialEq)]
pub struct Service {
    /// Namespace.
    pub namespace: String,
    /// Name.
    pub name: String,
    /// `spec.clusterIPs`; the first is `spec.clusterIP`. Empty is headless.
    pub cluster_ips: Vec<IpAddr>,
    /// Ports.
    pub ports: Vec<ServicePort>,
    /// Further fields of `spec`; they replace those made of the fields above.
    pub spec: Map<String, Value>,
    /// `metadata.labels`.
    pub labels: Map<String, Value>,
    /// `status.loadBalancer.ingress`.
    pub ingress: Vec<Value>,
}

/// One endpoint of an [`EndpointSlice`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Endpoint {
    /// Addresses, of one family.
    pub addresses: Vec<IpAddr>,
    /// `conditions.ready`, `.serving` and `.terminating`.
    pub conditions: Conditions,
    /// `nodeName`.
    pub node: Option<String>,
    /// Namespace, name and UID of the pod.
    pub pod: Option<(String, String, String)>,
    /// `hints.forZones`.
    pub zones: Vec<String>,
    /// `hints.forNodes`.
    pub nodes: Vec<String>,
}

/// Conditions of an endpoint.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Conditions {
    /// Ready for traffic.
    pub ready: bool,
    /// Serving, though it may be terminating.
    pub serving: bool,
    /// Terminating.
    pub terminating: bool,
}

impl Conditions {
    /// A pod that serves.
    pub const READY: Self = Self { ready: true, serving: true, terminating: false };
    /// A pod that is ending and still serves.
    pub const TERMINATING: Self = Self { ready: false, serving: true, terminating: true };
    /// A pod that does not serve.
    pub const NOT_READY: Self = Self { ready: false, serving: false, terminating: false };
}

/// An EndpointSlice of a Service.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct EndpointSlice {
    /// Namespace.
    pub namespace: String,
    /// Name.
    pub name: String,
    /// Its Service.
    pub service: String,
    /// Family of all addresses.
    pub family: Family,
    /// Ports by the names of the Service's: name, protocol, number.
    pub ports: Vec<(String, String, u16)>,
    /// Endpoints.
    pub endpoints: Vec<Endpoint>,
}

impl Service {
    /// A Service in `default`.
    pub fn new(name: &str, cluster_ips: &[IpAddr], ports: Vec<ServicePort>) -> Self {
        let (namespace, name) = ("default".to_owned(), name.to_owned());
        let cluster_ips = cluster_ips.to_vec();
        Self { namespace, name, cluster_ips, ports, spec: Map::new(), labels: Map::new(), ingress: Vec::new() }
    }

    /// Sets a field of `spec`.
    #[must_use]
    pub fn with(mut self, field: &str, value: Value) -> Self {
        self.spec.insert(field.to_owned(), value);
        self
    }

    /// Type NodePort: the same port of the nodes for all its ports, which differ in their protocols.
    #[must_use]
    pub fn node_port(mut self, number: u16) -> Self {
        for port in &mut self.ports {
            port.node_port = Some(number);
        }
        self.with("type", json!("NodePort"))
    }

    /// Type LoadBalancer, with these addresses of the balancer.
    #[must_use]
    pub fn load_balancer(mut self, ips: &[IpAddr]) -> Self {
        self.ingress = ips.iter().map(|ip| json!({ "ip": ip })).collect();
        self.with("type", json!("LoadBalancer"))
    }

    /// `spec.externalIPs`.
    #[must_use]
    pub fn external_ips(self, ips: &[IpAddr]) -> Self {
        self.with("externalIPs", json!(ips))
    }

    /// Traffic policy `Local` for what comes from the cluster.
    #[must_use]
    pub fn internal_local(self) -> Self {
        self.with("internalTrafficPolicy", json!("Local"))
    }

    /// Traffic policy `Local` for what comes from outside.
    #[must_use]
    pub fn external_local(self) -> Self {
        self.with("externalTrafficPolicy", json!("Local"))
    }

    /// Affinity by the client's address, for so many seconds.
    #[must_use]
    pub fn affinity(self, seconds: u32) -> Self {
        self.with("sessionAffinity", json!("ClientIP"))
            .with("sessionAffinityConfig", json!({ "clientIP": { "timeoutSeconds": seconds } }))
    }

    /// A label.
    #[must_use]
    pub fn label(mut self, name: &str, value: &str) -> Self {
        self.labels.insert(name.to_owned(), json!(value));
        self
    }

    /// A slice of this Service with these pods, all ready. Its name ends with the family.
    pub fn slice(&self, family: Family, pods: &[Pod]) -> EndpointSlice {
        let suffix = if family == Family::V4 { "ipv4" } else { "ipv6" };
        EndpointSlice {
            namespace: self.namespace.clone(),
            name: format!("{}-{suffix}", self.name),
            service: self.name.clone(),
            family,
            ports: self.ports.iter().map(|p| (p.name.clone(), p.protocol.clone(), p.target_port)).collect(),
            endpoints: pods.iter().map(|pod| Endpoint::of(pod, family)).collect(),
        }
    }
}

impl ServicePort {
    /// A TCP port.
    pub fn tcp(name: &str, port: u16, target_port: u16) -> Self {
        Self { name: name.to_owned(), protocol: "TCP".to_owned(), port, target_port, node_port: None }
    }

    /// A UDP port.
    pub fn udp(name: &str, port: u16, target_port: u16) -> Self {
        Self { name: name.to_owned(), protocol: "UDP".to_owned(), port, target_port, node_port: None }
    }

    /// An SCTP port.
    pub fn sctp(name: &str, port: u16, target_port: u16) -> Self {
        Self { name: name.to_owned(), protocol: "SCTP".to_owned(), port, target_port, node_port: None }
    }
}

impl Endpoint {
    /// A pod, ready.
    pub fn of(pod: &Pod, family: Family) -> Self {
        Self {
            addresses: vec![pod.ip(family)],
            conditions: Conditions::READY,
            node: Some(pod.node().to_owned()),
            pod: Some((pod.namespace().to_owned(), pod.name().to_owned(), pod.uid().to_owned())),
            zones: Vec::new(),
            nodes: Vec::new(),
        }
    }

    /// An address that is no pod, ready.
    pub fn at(ip: IpAddr) -> Self {
        let (addresses, conditions) = (vec![ip], Conditions::READY);
        Self { addresses, conditions, node: None, pod: None, zones: Vec::new(), nodes: Vec::new() }
    }

    /// A pod with `hostNetwork`, ready.
    pub fn on(node: &Node, family: Family) -> Self {
        Self { node: Some(node.name().to_owned()), ..Self::at(node.ip(family)) }
    }

    /// Sets the conditions.
    #[must_use]
    pub fn conditions(mut self, conditions: Conditions) -> Self {
        self.conditions = conditions;
        self
    }
}

impl Object for Service {
    fn to_json(&self) -> Value {
        let families: Vec<_> = self.cluster_ips.iter().map(|&ip| Family::of(ip).to_string()).collect();
        let ports: Vec<_> = self
            .ports
            .iter()
            .map(|port| {
                let mut json = json!({
                    "protocol": port.protocol, "port": port.port, "targetPort": port.target_port,
                });
                if !port.name.is_empty() {
                    json["name"] = port.name.clone().into();
                }
                if let Some(number) = port.node_port {
                    json["nodePort"] = number.into();
                }
                json
            })
            .collect();
        let mut spec = match self.cluster_ips.first() {
            None => json!({ "type": "ClusterIP", "clusterIP": "None", "clusterIPs": ["None"], "ports": ports }),
            Some(first) => json!({
                "type": "ClusterIP",
                "clusterIP": first,
                "clusterIPs": self.cluster_ips,
                "ipFamilies": families,
                "ipFamilyPolicy": if families.len() > 1 { "RequireDualStack" } else { "SingleStack" },
                "selector": { "app": self.name },
                "ports": ports,
            }),
        };
        for (field, value) in &self.spec {
            spec[field] = value.clone();
        }
        json!({
            "apiVersion": "v1",
            "kind": "Service",
            "metadata": { "namespace": self.namespace, "name": self.name, "labels": self.labels },
            "spec": spec,
            "status": { "loadBalancer": { "ingress": self.ingress } },
        })
    }
}

impl Object for EndpointSlice {
    fn to_json(&self) -> Value {
        let ports: Vec<_> = self
            .ports
            .iter()
            .map(|(name, protocol, port)| json!({ "name": name, "protocol": protocol, "port": port }))
            .collect();
        let endpoints: Vec<_> = self.endpoints.iter().map(endpoint_json).collect();
        json!({
            "apiVersion": "discovery.k8s.io/v1",
            "kind": "EndpointSlice",
            "metadata": {
                "namespace": self.namespace,
                "name": self.name,
                "labels": {
                    "kubernetes.io/service-name": self.service,
                    "endpointslice.kubernetes.io/managed-by": "endpointslice-controller.k8s.io",
                },
            },
            "addressType": self.family.to_string(),
            "ports": ports,
            "endpoints": endpoints,
        })
    }
}

fn endpoint_json(endpoint: &Endpoint) -> Value {
    let Conditions { ready, serving, terminating } = endpoint.conditions;
    let mut json = json!({
        "addresses": endpoint.addresses,
        "conditions": { "ready": ready, "serving": serving, "terminating": terminating },
    });
    if let Some(node) = &endpoint.node {
        json["nodeName"] = node.clone().into();
    }
    let hint = |names: &[String]| names.iter().map(|name| json!({ "name": name })).collect::<Vec<_>>();
    if !endpoint.zones.is_empty() {
        json["hints"]["forZones"] = hint(&endpoint.zones).into();
    }
    if !endpoint.nodes.is_empty() {
        json["hints"]["forNodes"] = hint(&endpoint.nodes).into();
    }
    if let Some((namespace, name, uid)) = &endpoint.pod {
        json["targetRef"] = json!({ "kind": "Pod", "namespace": namespace, "name": name, "uid": uid });
    }
    json
}

impl Object for &Node {
    fn to_json(&self) -> Value {
        let name = self.name();
        let cidrs = Family::BOTH.map(|family| self.pod_cidr(family).to_string());
        let mut addresses = Family::BOTH.map(|f| json!({ "type": "InternalIP", "address": self.ip(f) })).to_vec();
        addresses.push(json!({ "type": "Hostname", "address": name }));
        json!({
            "apiVersion": "v1",
            "kind": "Node",
            "metadata": { "name": name, "labels": { "kubernetes.io/hostname": name, "kubernetes.io/os": "linux" } },
            "spec": { "podCIDR": cidrs[0], "podCIDRs": cidrs },
            "status": { "addresses": addresses },
        })
    }
}

/// A ServiceCIDR with the service ranges of the simulator.
pub fn service_cidr_object() -> Value {
    json!({
        "apiVersion": "networking.k8s.io/v1",
        "kind": "ServiceCIDR",
        "metadata": { "name": "kubernetes" },
        "spec": { "cidrs": Family::BOTH.map(|family| service_cidr(family).to_string()) },
    })
}

impl Manifests {
    /// The folder `dir`, made if absent.
    pub fn open(dir: &Path) -> Result<Self> {
        let mut draft_dir = dir.as_os_str().to_owned();
        draft_dir.push(".draft");
        let draft_dir = PathBuf::from(draft_dir);
        for dir in [dir, &draft_dir] {
            fs::create_dir_all(dir).context(|| format!("create {}", dir.display()))?;
        }
        Ok(Self { dir: dir.to_owned(), draft_dir })
    }

    /// The folder.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// Writes an object into its file, new or in place of its older form.
    pub fn write(&self, object: &impl Object) -> Result<()> {
        let json = object.to_json();
        self.write_text(&file_name(&json), &yaml(&json))
    }

    /// Writes many objects into one file, as documents.
    pub fn write_all(&self, file: &str, objects: &[Value]) -> Result<()> {
        self.write_text(file, &objects.iter().map(yaml).collect::<Vec<_>>().join("---\n"))
    }

    /// Writes any text under a file name, well-formed or not.
    pub fn write_text(&self, file: &str, text: &str) -> Result<()> {
        let (draft, path) = (self.draft_dir.join(file), self.dir.join(file));
        fs::write(&draft, text).context(|| format!("write {}", draft.display()))?;
        fs::rename(&draft, &path).context(|| format!("rename to {}", path.display()))
    }

    /// Deletes an object's file.
    pub fn remove(&self, object: &impl Object) -> Result<()> {
        self.remove_file(&file_name(&object.to_json()))
    }

    /// Deletes a file of the folder.
    pub fn remove_file(&self, file: &str) -> Result<()> {
        let path = self.dir.join(file);
        fs::remove_file(&path).context(|| format!("remove {}", path.display()))
    }
}

impl Drop for Manifests {
    fn drop(&mut self) {
        // Drafts only; the folder itself belongs to its cluster.
        let _ = remove_tree(&self.draft_dir);
    }
}

/// `service.default.web.yaml`.
fn file_name(object: &Value) -> String {
    let field = |value: &Value| value.as_str().unwrap_or_default().to_lowercase();
    let metadata = &object["metadata"];
    let parts = [field(&object["kind"]), field(&metadata["namespace"]), field(&metadata["name"])];
    let parts: Vec<_> = parts.into_iter().filter(|part| !part.is_empty()).collect();
    parts.join(".") + ".yaml"
}

/// A JSON value as block YAML. Texts are always quoted, as JSON does it, which YAML reads alike.
pub fn yaml(value: &Value) -> String {
    let mut text = String::new();
    put(&mut text, value, 0);
    if text.starts_with('\n') { text.split_off(1) } else { text.trim_start().to_owned() }
}

/// Puts ` scalar\n`, or a line break and a block at this depth.
fn put(text: &mut String, value: &Value, depth: usize) {
    match value {
        Value::Object(fields) if !fields.is_empty() => {
            text.push('\n');
            for (name, value) in fields {
                let plain = name.chars().all(|c| c.is_ascii_alphanumeric() || "-./_".contains(c));
                let name = if plain { name.clone() } else { Value::from(name.as_str()).to_string() };
                let _ = write!(text, "{:depth$}{name}:", "");
                put(text, value, depth + 2);
            }
        }
        Value::Array(items) if !items.is_empty() => {
            text.push('\n');
            for item in items {
                let mut block = String::new();
                put(&mut block, item, depth + 2);
                // The first line of an item stands behind its dash.
                let _ = writeln!(text, "{:depth$}- {}", "", block.trim());
            }
        }
        scalar => {
            let _ = writeln!(text, " {scalar}");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn service_and_slice_as_yaml() {
        let ips = ["10.96.0.10".parse().expect("IPv4"), "fd00:10:96::a".parse().expect("IPv6")];
        let service = Service::new("web", &ips, vec![ServicePort::tcp("http", 80, 8080)]);
        let mut slice = service.slice(Family::V4, &[]);
        slice.endpoints.push(Endpoint::at("10.244.0.2".parse().expect("IPv4")));
        assert_eq!(file_name(&service.to_json()), "service.default.web.yaml");
        let json = slice.to_json();
        let text = yaml(&json);
        let expected = [
            "addressType: \"IPv4\"",
            "apiVersion: \"discovery.k8s.io/v1\"",
            "endpoints:",
            "- addresses:",
            "  - \"10.244.0.2\"",
            "  conditions:",
            "    ready: true",
            "    serving: true",
            "    terminating: false",
            "kind: \"EndpointSlice\"",
            "metadata:",
            "  labels:",
            "    endpointslice.kubernetes.io/managed-by: \"endpointslice-controller.k8s.io\"",
            "    kubernetes.io/service-name: \"web\"",
            "  name: \"web-ipv4\"",
            "  namespace: \"default\"",
            "ports:",
            "- name: \"http\"",
            "  port: 8080",
            "  protocol: \"TCP\"",
        ];
        let sorted = |mut lines: Vec<&str>| {
            lines.sort_unstable();
            lines.iter().map(|line| line.trim().trim_start_matches("- ").to_owned()).collect::<Vec<_>>()
        };
        assert_eq!(sorted(text.lines().collect()).len(), expected.len(), "{text}");
        for line in expected.map(|line| line.trim().trim_start_matches("- ")) {
            assert!(text.lines().any(|got| got.trim().trim_start_matches("- ") == line), "{line} in\n{text}");
        }
    }
}
