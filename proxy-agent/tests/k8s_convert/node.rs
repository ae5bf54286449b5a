//! Nodes, and the ranges of cluster addresses.

use k8s_openapi::api::core::v1 as core_v1;
use k8s_openapi::api::networking::v1 as networking_v1;
use proxy_agent::k8s::convert::{convert_node, convert_service_cidr};
use proxy_core::event::Node;
use serde_json::{Value, json};

use crate::{Want, check, findings};

#[test]
fn ranges_of_services() {
    let range = |value: Value| -> networking_v1::ServiceCIDR { serde_json::from_value(value).unwrap() };
    let rows: &[(Value, Want)] = &[
        (
            json!({"metadata": {"name": "kubernetes"}, "spec": {"cidrs": ["10.96.0.0/16", "fd00:96::/112"]}}),
            ("kubernetes [10.96.0.0/16, fd00:96::/112]", &[]),
        ),
        (json!({"metadata": {"name": "x"}}), ("x []", &[])),
        (
            json!({"metadata": {"name": "x"}, "spec": {"cidrs": ["10.96.0.0", "0.0.0.0/0", "010.97.0.9/16"]}}),
            (
                "x [10.97.0.0/16]",
                &[
                    "error spec.cidrs[0]: \"10.96.0.0\" is no network in CIDR notation, and is left out",
                    "error spec.cidrs[1]: 0.0.0.0/0 is every address there is, and is left out",
                ],
            ),
        ),
        (json!({"metadata": {}}), ("-", &["error metadata.name: is missing, so the object is ignored"])),
    ];
    for (value, want) in rows {
        let got = convert_service_cidr(&range(value.clone()), None);
        check(&value.to_string(), &got, |(name, ranges)| format!("{name} {ranges:?}"), *want);
    }
}

#[test]
fn nodes() {
    let node = |value: Value| -> core_v1::Node { serde_json::from_value(value).unwrap() };
    let full = node(json!({
        "metadata": {"name": "n1", "labels": {"topology.kubernetes.io/zone": "z1"}},
        "spec": {"podCIDR": "10.244.1.0/24", "podCIDRs": ["10.244.1.0/24", "fd00:1::/64", "10.244.1/24"]},
        "status": {"addresses": [
            {"type": "InternalIP", "address": "192.168.0.1"},
            {"type": "Hostname", "address": "n1"},
            {"type": "ExternalIP", "address": "203.0.113.9"},
            {"type": "InternalIP", "address": "fd00:c::1"},
            {"type": "InternalIP", "address": "n1.example"},
        ]},
    }));
    let got = convert_node(&full, None);
    let want = Node {
        name: "n1".into(),
        zone: Some("z1".into()),
        pod_cidrs: vec!["10.244.1.0/24".parse().unwrap(), "fd00:1::/64".parse().unwrap()],
        addresses: vec!["192.168.0.1".parse().unwrap(), "fd00:c::1".parse().unwrap()],
        leaving: false,
    };
    assert_eq!(got.outcome, Some(want));
    assert_eq!(
        findings(&got.diagnostics),
        [
            "error spec.podCIDRs[2]: \"10.244.1/24\" is no network in CIDR notation, and is left out",
            "error status.addresses[4].address: \"n1.example\" is no IP address, and is left out",
        ]
    );

    let plain = Node { name: "n1".into(), ..Node::default() };
    let old = Node { pod_cidrs: vec!["10.244.1.0/24".parse().unwrap()], ..plain.clone() };
    let leaving = Node { leaving: true, ..plain.clone() };
    let rows = [
        (json!({"metadata": {"name": "n1"}}), Some(plain.clone())),
        (json!({"metadata": {"name": "n1"}, "spec": {"podCIDR": "10.244.1.0/24"}}), Some(old)),
        (
            json!({"metadata": {"name": "n1"}, "spec": {"taints": [{"key": "node.kubernetes.io/not-ready", "effect": "NoExecute"}]}}),
            Some(plain),
        ),
        (
            json!({"metadata": {"name": "n1"}, "spec": {"taints": [{"key": "ToBeDeletedByClusterAutoscaler", "effect": "NoSchedule"}]}}),
            Some(leaving.clone()),
        ),
        (json!({"metadata": {"name": "n1", "deletionTimestamp": "2026-01-01T00:00:00Z"}}), Some(leaving)),
        (json!({"metadata": {}}), None),
    ];
    for (value, want) in rows {
        assert_eq!(convert_node(&node(value.clone()), None).outcome, want, "{value}");
    }
}
