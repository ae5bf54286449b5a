//! Endpoint slices.

use std::fmt::Write as _;

use k8s_openapi::api::discovery::v1 as discovery_v1;
use proxy_agent::k8s::convert::convert_slice;
use proxy_core::service::{Endpoint, EndpointSlice};
use serde_json::{Value, json};

use crate::{Want, check};

fn show_endpoint(endpoint: &Endpoint) -> String {
    let mut text = endpoint.address.to_string();
    for (set, mark) in
        [(endpoint.ready, " ready"), (endpoint.serving, " serving"), (endpoint.terminating, " terminating")]
    {
        if set {
            text += mark;
        }
    }
    if let Some(node) = &endpoint.node {
        write!(text, " on {node}").unwrap();
    }
    if !endpoint.for_zones.is_empty() {
        write!(text, " zones {:?}", endpoint.for_zones).unwrap();
    }
    if !endpoint.for_nodes.is_empty() {
        write!(text, " nodes {:?}", endpoint.for_nodes).unwrap();
    }
    text
}

fn show_slice(slice: &EndpointSlice) -> String {
    let ports = slice.ports.iter().map(|port| format!("{}={:?}/{}", port.name, port.protocol, port.port));
    let endpoints = slice.endpoints.iter().map(show_endpoint);
    let (ports, endpoints) = (ports.collect::<Vec<_>>().join(" "), endpoints.collect::<Vec<_>>().join(", "));
    let at = slice.triggered.map_or(String::new(), |at| format!(" at {at}"));
    format!("{} of {}: {ports}: {endpoints}{at}", slice.name, slice.service)
}

fn slice(value: &Value) -> discovery_v1::EndpointSlice {
    let mut object = json!({
        "apiVersion": "discovery.k8s.io/v1",
        "kind": "EndpointSlice",
        "metadata": {"name": "web-1", "namespace": "shop", "labels": {"kubernetes.io/service-name": "web"}},
        "addressType": "IPv4",
        "ports": [{"name": "http", "port": 8080}],
        "endpoints": [{"addresses": ["10.244.0.5"]}],
    });
    object.as_object_mut().unwrap().extend(value.as_object().unwrap().clone());
    serde_json::from_value(object).unwrap()
}

#[test]
fn slices() {
    let plain = "shop/web-1 of shop/web: http=Tcp/8080: 10.244.0.5 ready serving";
    let labels = |labels: Value| json!({"metadata": {"name": "web-1", "namespace": "shop", "labels": labels}});
    let one = |endpoint: Value| json!({"endpoints": [endpoint]});
    let annotated = |time: &str| {
        json!({"metadata": {
            "name": "web-1",
            "namespace": "shop",
            "labels": {"kubernetes.io/service-name": "web"},
            "annotations": {"endpoints.kubernetes.io/last-change-trigger-time": time},
        }})
    };
    let empty = "shop/web-1 of shop/web: http=Tcp/8080: ";
    let rows: &[(&str, Value, Want)] = &[
        ("plain", json!({}), (plain, &[])),
        ("no service", labels(json!({})), ("-", &[])),
        ("empty service", labels(json!({"kubernetes.io/service-name": ""})), ("-", &[])),
        (
            "another proxy's",
            labels(json!({"kubernetes.io/service-name": "web", "service.kubernetes.io/service-proxy-name": "x"})),
            ("-", &[]),
        ),
        (
            "headless",
            labels(json!({"kubernetes.io/service-name": "web", "service.kubernetes.io/headless": ""})),
            ("-", &[]),
        ),
        (
            "FQDN",
            json!({"addressType": "FQDN", "endpoints": [{"addresses": ["example.org"]}]}),
            ("-", &["warning addressType: \"FQDN\" cannot be forwarded to, so the slice is ignored"]),
        ),
        ("no endpoints", json!({"endpoints": []}), (empty, &[])),
        (
            "time of the change",
            annotated("2026-01-02T03:04:05.678901234Z"),
            ("shop/web-1 of shop/web: http=Tcp/8080: 10.244.0.5 ready serving at 1767323045678", &[]),
        ),
        (
            "time in another zone",
            annotated("2026-01-02T04:04:05+01:00"),
            ("shop/web-1 of shop/web: http=Tcp/8080: 10.244.0.5 ready serving at 1767323045000", &[]),
        ),
        (
            "time that is none",
            annotated("yesterday"),
            (
                plain,
                &[
                    "warning metadata.annotations[endpoints.kubernetes.io/last-change-trigger-time]: \"yesterday\" is no time, so the delay of this change is not measured",
                ],
            ),
        ),
        (
            "time before times",
            annotated("1969-12-31T23:59:59Z"),
            (
                plain,
                &[
                    "warning metadata.annotations[endpoints.kubernetes.io/last-change-trigger-time]: \"1969-12-31T23:59:59Z\" is no time, so the delay of this change is not measured",
                ],
            ),
        ),
        (
            "IPv6",
            json!({"addressType": "IPv6", "endpoints": [{"addresses": ["fd00::5"]}]}),
            ("shop/web-1 of shop/web: http=Tcp/8080: fd00::5 ready serving", &[]),
        ),
        ("first address alone", one(json!({"addresses": ["10.244.0.5", "10.244.0.6"]})), (plain, &[])),
        ("funny address", one(json!({"addresses": ["010.244.0.05"]})), (plain, &[])),
        (
            "not ready",
            one(json!({"addresses": ["10.244.0.5"], "conditions": {"ready": false}})),
            ("shop/web-1 of shop/web: http=Tcp/8080: 10.244.0.5", &[]),
        ),
        (
            "terminating",
            one(
                json!({"addresses": ["10.244.0.5"], "conditions": {"ready": false, "serving": true, "terminating": true}}),
            ),
            ("shop/web-1 of shop/web: http=Tcp/8080: 10.244.0.5 serving terminating", &[]),
        ),
        (
            "ready and not serving",
            one(json!({"addresses": ["10.244.0.5"], "conditions": {"serving": false}})),
            ("shop/web-1 of shop/web: http=Tcp/8080: 10.244.0.5 ready", &[]),
        ),
        (
            "node and hints",
            one(json!({
                "addresses": ["10.244.0.5"],
                "nodeName": "n1",
                "zone": "z9",
                "hints": {"forZones": [{"name": "z1"}, {"name": "z2"}], "forNodes": [{"name": "n1"}]},
            })),
            (
                "shop/web-1 of shop/web: http=Tcp/8080: 10.244.0.5 ready serving on n1 zones [\"z1\", \"z2\"] nodes [\"n1\"]",
                &[],
            ),
        ),
        (
            "ports",
            json!({"ports": [
                {"name": "a", "port": 1, "protocol": "UDP"},
                {"name": "b"},
                {"name": "c", "port": 0},
                {"port": 2, "protocol": "SCTP"},
                {"name": "d", "port": 3, "protocol": "ICMP"},
            ]}),
            (
                "shop/web-1 of shop/web: a=Udp/1 =Sctp/2: 10.244.0.5 ready serving",
                &[
                    "warning ports[1].port: is missing, which means all ports; this port is left out",
                    "error ports[2].port: 0 is no port number, and this port is left out",
                    "error ports[4].protocol: \"ICMP\" is unknown, and this port is left out",
                ],
            ),
        ),
        (
            "bad endpoints beside a good one",
            json!({"endpoints": [
                {"addresses": ["127.0.0.1"]},
                {"addresses": ["169.254.1.1"]},
                {"addresses": ["224.0.0.1"]},
                {"addresses": ["0.0.0.0"]},
                {"addresses": ["255.255.255.255"]},
                {"addresses": ["fd00::5"]},
                {"addresses": ["web.example"]},
                {"addresses": []},
                {"addresses": ["10.244.0.5"]},
            ]}),
            (
                plain,
                &[
                    "error endpoints[0].addresses[0]: 127.0.0.1 is a loopback address, so the endpoint is left out",
                    "error endpoints[1].addresses[0]: 169.254.1.1 is a link-local address, so the endpoint is left out",
                    "error endpoints[2].addresses[0]: 224.0.0.1 is a multicast address, so the endpoint is left out",
                    "error endpoints[3].addresses[0]: 0.0.0.0 is the unspecified address, so the endpoint is left out",
                    "error endpoints[4].addresses[0]: 255.255.255.255 is the broadcast address, so the endpoint is left out",
                    "error endpoints[5].addresses[0]: fd00::5 is not of the slice's addressType, so the endpoint is left out",
                    "error endpoints[6].addresses[0]: \"web.example\" is no IP address, so the endpoint is left out",
                    "error endpoints[7].addresses[0]: is missing, so the endpoint is left out",
                ],
            ),
        ),
        (
            "bad IPv6 endpoints",
            json!({"addressType": "IPv6", "endpoints": [
                {"addresses": ["::1"]}, {"addresses": ["fe80::1"]}, {"addresses": ["ff02::1"]}, {"addresses": ["::"]},
            ]}),
            (
                empty,
                &[
                    "error endpoints[0].addresses[0]: ::1 is a loopback address, so the endpoint is left out",
                    "error endpoints[1].addresses[0]: fe80::1 is a link-local address, so the endpoint is left out",
                    "error endpoints[2].addresses[0]: ff02::1 is a multicast address, so the endpoint is left out",
                    "error endpoints[3].addresses[0]: :: is the unspecified address, so the endpoint is left out",
                ],
            ),
        ),
    ];
    for (row, value, want) in rows {
        check(row, &convert_slice(&slice(value), None), show_slice, *want);
    }
}

#[test]
fn a_thousand_endpoints_and_a_hundred_ports() {
    let address = |at: usize| format!("10.{}.{}.{}", 1 + at / 65536, at / 256 % 256, at % 256);
    let endpoints: Vec<Value> =
        (0..1000).map(|at| json!({"addresses": [address(at)], "hints": {"forZones": [{"name": "z"}]}})).collect();
    let ports: Vec<Value> = (1..=100).map(|port| json!({"name": format!("p{port}"), "port": port})).collect();
    let got = convert_slice(&slice(&json!({"endpoints": endpoints, "ports": ports})), None);
    let slice = got.outcome.unwrap();
    assert_eq!(got.diagnostics, []);
    assert_eq!(slice.ports.len(), 100);
    let addresses: Vec<String> = slice.endpoints.iter().map(|endpoint| endpoint.address.to_string()).collect();
    assert_eq!(addresses, (0..1000).map(address).collect::<Vec<_>>());
    let zone = &slice.endpoints[0].for_zones[0];
    assert!(slice.endpoints.iter().all(|endpoint| std::sync::Arc::ptr_eq(&endpoint.for_zones[0], zone)));
}
