//! Pods, Namespaces and NetworkPolicies as objects for [`crate::Manifests`].

use serde_json::{Map, Value, json};

use crate::address::Family;
use crate::manifests::Object;
use crate::pod::Pod;

/// A running pod as the API server has it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PodObject {
    /// Labels.
    pub labels: Vec<(String, String)>,
    /// Annotations.
    pub annotations: Vec<(String, String)>,
    /// Named ports: name, number, protocol.
    pub ports: Vec<(String, u16, String)>,
    /// Does `status` have its addresses?
    pub addressed: bool,
    pod: Identity,
}

/// What never changes of a pod.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Identity {
    namespace: String,
    name: String,
    uid: String,
    node: String,
    ips: [String; 2],
}

impl PodObject {
    /// With the labels that it was started with, and no ports.
    pub fn of(pod: &Pod) -> Self {
        Self {
            labels: pod.labels().to_vec(),
            annotations: Vec::new(),
            ports: Vec::new(),
            addressed: true,
            pod: Identity {
                namespace: pod.namespace().to_owned(),
                name: pod.name().to_owned(),
                uid: pod.uid().to_owned(),
                node: pod.node().to_owned(),
                ips: Family::BOTH.map(|family| pod.ip(family).to_string()),
            },
        }
    }

    /// Adds or changes a label.
    #[must_use]
    pub fn label(mut self, name: &str, value: &str) -> Self {
        self.labels.retain(|(other, _)| other != name);
        self.labels.push((name.to_owned(), value.to_owned()));
        self
    }

    /// Adds an annotation.
    #[must_use]
    pub fn annotation(mut self, name: &str, value: &str) -> Self {
        self.annotations.push((name.to_owned(), value.to_owned()));
        self
    }

    /// Adds a named port.
    #[must_use]
    pub fn port(mut self, name: &str, number: u16, protocol: &str) -> Self {
        self.ports.push((name.to_owned(), number, protocol.to_owned()));
        self
    }

    /// As long as its first hooks run: without addresses.
    #[must_use]
    pub fn without_addresses(mut self) -> Self {
        self.addressed = false;
        self
    }
}

impl Object for PodObject {
    fn to_json(&self) -> Value {
        let Identity { namespace, name, uid, node, ips } = &self.pod;
        let port = |(name, number, protocol): &(String, u16, String)| json!({ "name": name, "containerPort": number, "protocol": protocol });
        let ports: Vec<Value> = self.ports.iter().map(port).collect();
        let status = if self.addressed {
            json!({ "phase": "Running", "podIP": ips[0], "podIPs": ips.each_ref().map(|ip| json!({ "ip": ip })) })
        } else {
            json!({ "phase": "Pending" })
        };
        json!({
            "apiVersion": "v1",
            "kind": "Pod",
            "metadata": {
                "namespace": namespace, "name": name, "uid": uid, "labels": map(&self.labels),
                "annotations": map(&self.annotations),
            },
            "spec": { "nodeName": node, "containers": [{ "name": "main", "ports": ports }] },
            "status": status,
        })
    }
}

/// A Namespace.
pub fn namespace(name: &str, labels: &[(&str, &str)]) -> Value {
    let labels: Vec<_> = labels.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect();
    json!({ "apiVersion": "v1", "kind": "Namespace", "metadata": { "name": name, "labels": map(&labels) } })
}

/// A NetworkPolicy with this `spec`.
pub fn network_policy(namespace: &str, name: &str, spec: &Value) -> Value {
    json!({
        "apiVersion": "networking.k8s.io/v1",
        "kind": "NetworkPolicy",
        "metadata": { "namespace": namespace, "name": name },
        "spec": spec,
    })
}

fn map(labels: &[(String, String)]) -> Map<String, Value> {
    labels.iter().map(|(name, value)| (name.clone(), json!(value))).collect()
}
