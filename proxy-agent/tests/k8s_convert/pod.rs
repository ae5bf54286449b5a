//! Pods and Namespaces, as far as policy asks of them.

use k8s_openapi::api::core::v1 as core_v1;
use proxy_agent::k8s::convert::{convert_namespace, convert_pod};
use proxy_core::name::ObjectName;
use proxy_core::netpol::spec::{Container, ContainerPort, Labels, Namespace, Pod};
use serde_json::{Value, json};

use crate::findings;

fn plain() -> Pod {
    Pod {
        name: ObjectName::new("shop", "web"),
        uid: "u-1".into(),
        labels: Labels::new(),
        node: None,
        host_network: false,
        finished: false,
        deleting: false,
        socket_lb: true,
        created: 0,
        ips: vec![],
        ports: vec![],
    }
}

fn labels(labels: &[(&str, &str)]) -> Labels {
    labels.iter().map(|(key, value)| ((*key).into(), (*value).into())).collect()
}

#[test]
fn pods() {
    let meta = |more: Value| {
        let mut meta = json!({"name": "web", "namespace": "shop", "uid": "u-1"});
        meta.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        json!({ "metadata": meta })
    };
    let spec = |spec: Value| {
        let mut pod = meta(json!({}));
        pod["spec"] = json!({"containers": []});
        pod["spec"].as_object_mut().unwrap().extend(spec.as_object().unwrap().clone());
        pod
    };
    let status = |status: Value| {
        let mut pod = meta(json!({}));
        pod["status"] = status;
        pod
    };
    let port = |name: &str, protocol: Option<&str>, port, container| ContainerPort {
        name: name.into(),
        protocol: protocol.map(Into::into),
        port,
        container,
    };
    let ips = |ips: &[&str]| Pod { ips: ips.iter().map(|ip| ip.parse().unwrap()).collect(), ..plain() };
    let rows: Vec<(Value, Pod, &[&str])> = vec![
        (meta(json!({})), plain(), &[]),
        (
            meta(json!({"labels": {"app": "web", "": "?"}, "creationTimestamp": "2026-01-01T00:00:10Z",
                        "deletionTimestamp": "2026-01-01T00:01:00Z", "annotations": {"a": "b"}})),
            Pod { labels: labels(&[("", "?"), ("app", "web")]), created: 1_767_225_610, deleting: true, ..plain() },
            &[],
        ),
        (meta(json!({"annotations": {"proxy-agent.io/socket-lb": "enabled"}})), plain(), &[]),
        (
            meta(json!({"annotations": {"proxy-agent.io/socket-lb": "disabled"}})),
            Pod { socket_lb: false, ..plain() },
            &[],
        ),
        (
            meta(json!({"annotations": {"proxy-agent.io/socket-lb": "false"}})),
            plain(),
            &["warning metadata.annotations[proxy-agent.io/socket-lb]: \"false\" is neither \"enabled\" nor \
               \"disabled\", and counts as \"enabled\""],
        ),
        (meta(json!({"creationTimestamp": "1960-01-01T00:00:00Z"})), plain(), &[]),
        (
            meta(json!({"uid": ""})),
            Pod { uid: "".into(), ..plain() },
            &["warning metadata.uid: is missing, so no interface is known to be this pod's"],
        ),
        (spec(json!({"nodeName": "n1"})), Pod { node: Some("n1".into()), ..plain() }, &[]),
        (spec(json!({"nodeName": "", "hostNetwork": false})), plain(), &[]),
        (spec(json!({"hostNetwork": true})), Pod { host_network: true, ..plain() }, &[]),
        (
            spec(json!({
                "containers": [
                    {"name": "a", "ports": [{"containerPort": 80, "name": "http"}, {"containerPort": 81}]},
                    {"name": "b", "ports": [{"containerPort": 53, "name": "dns", "protocol": "UDP"},
                                            {"containerPort": 0, "name": "zero"},
                                            {"containerPort": 65536, "name": "far"}]},
                ],
                "initContainers": [
                    {"name": "c", "restartPolicy": "Always", "ports": [{"containerPort": 90, "name": "mesh", "protocol": ""}]},
                    {"name": "d", "ports": [{"containerPort": 91, "name": "once"}]},
                    {"name": "e", "restartPolicy": "Never", "ports": [{"containerPort": 92, "name": "never"}]},
                ],
                "ephemeralContainers": [{"name": "f", "ports": [{"containerPort": 93, "name": "debug"}]}],
            })),
            Pod {
                ports: vec![
                    port("http", None, 80, Container::Main),
                    port("dns", Some("UDP"), 53, Container::Main),
                    port("mesh", None, 90, Container::Sidecar),
                    port("once", None, 91, Container::Init),
                    port("never", None, 92, Container::Init),
                ],
                ..plain()
            },
            &[
                "error spec.containers[1].ports[1].containerPort: 0 is no port number, and this port is left out",
                "error spec.containers[1].ports[2].containerPort: 65536 is no port number, and this port is left out",
            ],
        ),
        (status(json!({"phase": "Pending"})), plain(), &[]),
        (status(json!({"phase": "Running", "podIP": "10.0.0.1"})), ips(&["10.0.0.1"]), &[]),
        (
            status(json!({"podIP": "10.0.0.1", "podIPs": [{"ip": "10.0.0.1"}, {"ip": "fd00::1"}]})),
            ips(&["10.0.0.1", "fd00::1"]),
            &[],
        ),
        (status(json!({"podIP": "010.0.0.1", "podIPs": []})), ips(&["10.0.0.1"]), &[]),
        (status(json!({"podIP": ""})), plain(), &[]),
        (
            status(json!({"podIPs": [{"ip": "10.0.0"}, {"ip": "::ffff:10.0.0.2"}]})),
            ips(&["10.0.0.2"]),
            &["error status.podIPs[0].ip: \"10.0.0\" is no IP address, and is left out"],
        ),
        (status(json!({"phase": "Succeeded", "podIP": "10.0.0.1"})), Pod { finished: true, ..ips(&["10.0.0.1"]) }, &[]),
        (status(json!({"phase": "Failed"})), Pod { finished: true, ..plain() }, &[]),
        (status(json!({"phase": "Unknown"})), plain(), &[]),
    ];
    for (value, want, found) in rows {
        let pod: core_v1::Pod = serde_json::from_value(value.clone()).unwrap();
        let got = convert_pod(&pod, None);
        assert_eq!(
            (got.outcome, findings(&got.diagnostics)),
            (Some(want), found.iter().map(|f| (*f).to_owned()).collect()),
            "{value}"
        );
    }
    let nameless = convert_pod(&core_v1::Pod::default(), None);
    assert_eq!((nameless.outcome, nameless.diagnostics.len()), (None, 1));
}

#[test]
fn namespaces() {
    let read = |value: Value| -> core_v1::Namespace { serde_json::from_value(value).unwrap() };
    let own = ("kubernetes.io/metadata.name", "shop");
    let namespace =
        |of: &[(&str, &str)], terminating| Namespace { name: "shop".into(), labels: labels(of), terminating };
    let rows = [
        (json!({"metadata": {"name": "shop"}}), None, namespace(&[], false)),
        // What the API server adds is missing in a file.
        (json!({"metadata": {"name": "shop"}}), Some("f.yaml:1"), namespace(&[own], false)),
        (
            json!({"metadata": {"name": "shop", "labels": {"a": "b"}}}),
            Some("f.yaml:1"),
            namespace(&[own, ("a", "b")], false),
        ),
        (
            json!({"metadata": {"name": "shop", "deletionTimestamp": "2026-01-01T00:00:00Z"}, "status": {"phase": "Terminating"}}),
            None,
            namespace(&[], true),
        ),
    ];
    for (value, origin, want) in rows {
        let got = convert_namespace(&read(value.clone()), origin);
        assert_eq!((got.outcome, got.diagnostics), (Some(want), vec![]), "{value}");
    }
    assert_eq!(convert_namespace(&read(json!({"metadata": {}})), None).outcome, None);
}
