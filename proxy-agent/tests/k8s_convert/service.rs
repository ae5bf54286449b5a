//! Services.

use std::fmt::Write as _;

use k8s_openapi::api::core::v1 as core_v1;
use proxy_agent::k8s::convert::{Converted, convert_service};
use proxy_core::diagnostic::{Diagnostic, Severity};
use proxy_core::service::Service;
use serde_json::{Value, json};

use crate::{Want, check, findings};

fn show_service(service: &Service) -> String {
    let ips: Vec<String> = service.cluster_ips.iter().map(ToString::to_string).collect();
    let ports = service.ports.iter().map(|port| {
        let node = port.node_port.map_or(String::new(), |port| format!("+{port}"));
        format!("{}={:?}/{}{node}", port.name, port.protocol, port.port)
    });
    let mut text = format!("{} [{}] {}", service.name, ips.join(" "), ports.collect::<Vec<_>>().join(" "));
    if let Some(seconds) = service.affinity_seconds {
        write!(text, " affinity {seconds}").unwrap();
    }
    for (what, list) in [(" external", &service.external_ips), (" balancer", &service.load_balancer_ips)] {
        if !list.is_empty() {
            write!(text, "{what} {list:?}").unwrap();
        }
    }
    if !service.source_ranges.is_empty() {
        write!(text, " from {:?}", service.source_ranges).unwrap();
    }
    for (set, mark) in [(service.internal_local, " internal local"), (service.external_local, " external local")] {
        if set {
            text += mark;
        }
    }
    if let Some(port) = service.health_check_node_port {
        write!(text, " health {port}").unwrap();
    }
    text
}

fn service(metadata: &Value, spec: Value) -> core_v1::Service {
    let mut object = json!({"apiVersion": "v1", "kind": "Service", "metadata": {"name": "web", "namespace": "shop"}});
    object["metadata"].as_object_mut().unwrap().extend(metadata.as_object().unwrap().clone());
    object["spec"] = spec;
    serde_json::from_value(object).unwrap()
}

#[test]
fn services() {
    let http = json!([{"name": "http", "port": 80}]);
    let spec = |more: Value| {
        let mut spec = json!({"clusterIP": "10.96.0.10", "clusterIPs": ["10.96.0.10"], "ports": http});
        spec.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        spec
    };
    let plain = "shop/web [10.96.0.10] http=Tcp/80";
    let rows: &[(&str, Value, Want)] = &[
        ("plain", spec(json!({})), (plain, &[])),
        ("type given", spec(json!({"type": "ClusterIP"})), (plain, &[])),
        (
            "dual stack",
            spec(json!({"clusterIPs": ["10.96.0.10", "fd00::a"], "ipFamilies": ["IPv4", "IPv6"]})),
            ("shop/web [10.96.0.10 fd00::a] http=Tcp/80", &[]),
        ),
        (
            "IPv6 first",
            spec(json!({"clusterIP": "fd00::a", "clusterIPs": ["fd00::a", "10.96.0.10"]})),
            ("shop/web [fd00::a 10.96.0.10] http=Tcp/80", &[]),
        ),
        ("no clusterIPs", json!({"clusterIP": "10.96.0.10", "ports": http}), (plain, &[])),
        ("funny address", json!({"clusterIP": "010.096.000.010", "ports": http}), (plain, &[])),
        ("mapped address", json!({"clusterIP": "::ffff:10.96.0.10", "ports": http}), (plain, &[])),
        ("headless", spec(json!({"clusterIP": "None", "clusterIPs": ["None"]})), ("-", &[])),
        ("headless by list", json!({"clusterIPs": ["None"], "ports": http}), ("-", &[])),
        ("headless without ports", json!({"clusterIP": "None"}), ("-", &[])),
        ("no address yet", json!({"clusterIP": "", "ports": http}), ("-", &[])),
        ("address absent", json!({"ports": http}), ("-", &[])),
        ("ExternalName", json!({"type": "ExternalName", "externalName": "example.org"}), ("-", &[])),
        (
            "ExternalName with an old address",
            spec(json!({"type": "ExternalName", "externalName": "example.org"})),
            ("-", &[]),
        ),
        (
            "address differs from the list",
            spec(json!({"clusterIP": "10.96.0.11"})),
            (plain, &["warning spec.clusterIP: \"10.96.0.11\" is not the first of spec.clusterIPs, and is ignored"]),
        ),
        (
            "bad address beside a good one",
            spec(json!({"clusterIPs": ["10.96.0.10", "fd00::zz"]})),
            (plain, &["error spec.clusterIPs[1]: \"fd00::zz\" is no IP address, and is left out"]),
        ),
        (
            "bad address alone",
            json!({"clusterIP": "10.96.0.256", "ports": http}),
            (
                "-",
                &[
                    "error spec.clusterIP: \"10.96.0.256\" is no IP address, and is left out",
                    "error spec.clusterIPs: names no valid address, so the Service is not served",
                ],
            ),
        ),
        (
            "two of a family",
            spec(json!({"clusterIPs": ["10.96.0.10", "10.96.0.11"]})),
            (plain, &["error spec.clusterIPs[1]: 10.96.0.11 is a second address of its family, and is left out"]),
        ),
        (
            "loopback",
            json!({"clusterIPs": ["127.0.0.1", "fd00::a"], "ports": http}),
            (
                "shop/web [fd00::a] http=Tcp/80",
                &["error spec.clusterIPs[0]: 127.0.0.1 is a loopback address, and is left out"],
            ),
        ),
        (
            "no ports",
            spec(json!({"ports": []})),
            ("-", &["error spec.ports: names no valid port, so the Service is not served"]),
        ),
        (
            "wrong ports",
            spec(
                json!({"ports": [{"name": "a", "port": 0}, {"name": "b", "port": 70000}, {"name": "c", "port": -1}, {"name": "d", "port": 65535}]}),
            ),
            (
                "shop/web [10.96.0.10] d=Tcp/65535",
                &[
                    "error spec.ports[0].port: 0 is no port number, and this port is left out",
                    "error spec.ports[1].port: 70000 is no port number, and this port is left out",
                    "error spec.ports[2].port: -1 is no port number, and this port is left out",
                ],
            ),
        ),
        (
            "wrong protocol",
            spec(json!({"ports": [{"name": "a", "port": 1, "protocol": "tcp"}, {"name": "b", "port": 2}]})),
            (
                "shop/web [10.96.0.10] b=Tcp/2",
                &["error spec.ports[0].protocol: \"tcp\" is unknown, and this port is left out"],
            ),
        ),
        (
            "one number, three protocols",
            spec(json!({"ports": [
                {"name": "a", "port": 53, "protocol": "UDP"},
                {"name": "b", "port": 53, "protocol": "TCP"},
                {"name": "c", "port": 53, "protocol": "SCTP"},
            ]})),
            ("shop/web [10.96.0.10] a=Udp/53 b=Tcp/53 c=Sctp/53", &[]),
        ),
        ("unnamed port", spec(json!({"ports": [{"port": 80}]})), ("shop/web [10.96.0.10] =Tcp/80", &[])),
        (
            "duplicate name and number",
            spec(
                json!({"ports": [{"name": "a", "port": 1}, {"name": "a", "port": 2}, {"name": "b", "port": 1}, {"name": "c", "port": 3}]}),
            ),
            (
                "shop/web [10.96.0.10] a=Tcp/1 c=Tcp/3",
                &[
                    "error spec.ports[1].name: \"a\" is taken by spec.ports[0]; this port is left out",
                    "error spec.ports[2].port: 1 is taken by spec.ports[0]; this port is left out",
                ],
            ),
        ),
        (
            "two unnamed",
            spec(json!({"ports": [{"port": 1}, {"port": 2}]})),
            (
                "shop/web [10.96.0.10] =Tcp/1",
                &["error spec.ports[1].name: is missing, as in spec.ports[0]; this port is left out"],
            ),
        ),
        (
            "affinity",
            spec(json!({"sessionAffinity": "ClientIP", "sessionAffinityConfig": {"clientIP": {"timeoutSeconds": 90}}})),
            ("shop/web [10.96.0.10] http=Tcp/80 affinity 90", &[]),
        ),
        (
            "affinity by default",
            spec(json!({"sessionAffinity": "ClientIP"})),
            ("shop/web [10.96.0.10] http=Tcp/80 affinity 10800", &[]),
        ),
        ("no affinity", spec(json!({"sessionAffinity": "None"})), (plain, &[])),
        (
            "affinity out of range",
            spec(
                json!({"sessionAffinity": "ClientIP", "sessionAffinityConfig": {"clientIP": {"timeoutSeconds": 86401}}}),
            ),
            (
                "shop/web [10.96.0.10] http=Tcp/80 affinity 10800",
                &[
                    "error spec.sessionAffinityConfig.clientIP.timeoutSeconds: 86401 is out of range, and 10800 is used instead",
                ],
            ),
        ),
        (
            "affinity of another kind",
            spec(json!({"sessionAffinity": "Cookie"})),
            (plain, &["error spec.sessionAffinity: \"Cookie\" is unknown, and is treated as None"]),
        ),
        (
            "NodePort",
            spec(json!({"type": "NodePort", "ports": [{"name": "http", "port": 80, "nodePort": 30080}]})),
            ("shop/web [10.96.0.10] http=Tcp/80+30080", &[]),
        ),
        (
            "node port of a type that has none",
            spec(json!({"type": "ClusterIP", "ports": [{"name": "http", "port": 80, "nodePort": 30080}]})),
            (plain, &[]),
        ),
        (
            "node ports that are none",
            spec(json!({"type": "NodePort", "ports": [
                {"name": "a", "port": 1, "nodePort": 0},
                {"name": "b", "port": 2, "nodePort": 70000},
                {"name": "c", "port": 3, "nodePort": -1},
            ]})),
            (
                "shop/web [10.96.0.10] a=Tcp/1 b=Tcp/2 c=Tcp/3",
                &[
                    "error spec.ports[1].nodePort: 70000 is no port number, and is left out",
                    "error spec.ports[2].nodePort: -1 is no port number, and is left out",
                ],
            ),
        ),
        (
            "external addresses",
            spec(json!({"externalIPs": ["203.0.113.1", "011.022.033.044", "2001:db8::1", "host", ""]})),
            (
                "shop/web [10.96.0.10] http=Tcp/80 external [203.0.113.1, 11.22.33.44, 2001:db8::1]",
                &[
                    "error spec.externalIPs[3]: \"host\" is no IP address, and is left out",
                    "error spec.externalIPs[4]: \"\" is no IP address, and is left out",
                ],
            ),
        ),
        (
            "external policy without anything external",
            spec(json!({"externalTrafficPolicy": "Local", "healthCheckNodePort": 32000})),
            (plain, &[]),
        ),
        (
            "external policy of external addresses",
            spec(json!({"externalTrafficPolicy": "Local", "externalIPs": ["203.0.113.1"]})),
            ("shop/web [10.96.0.10] http=Tcp/80 external [203.0.113.1] external local", &[]),
        ),
        (
            "external policy of a NodePort, which has no health check",
            spec(json!({"type": "NodePort", "externalTrafficPolicy": "Local", "healthCheckNodePort": 32000})),
            ("shop/web [10.96.0.10] http=Tcp/80 external local", &[]),
        ),
        (
            "LoadBalancer without node ports and address yet",
            spec(json!({"type": "LoadBalancer", "allocateLoadBalancerNodePorts": false})),
            (plain, &[]),
        ),
        (
            "LoadBalancer with everything",
            spec(json!({
                "type": "LoadBalancer",
                "loadBalancerIP": "203.0.113.99",
                "externalTrafficPolicy": "Local",
                "healthCheckNodePort": 32000,
                "loadBalancerSourceRanges": [" 192.0.2.0/24", "fd00::/8 "],
                "ports": [{"name": "http", "port": 80, "nodePort": 30080}],
            })),
            ("shop/web [10.96.0.10] http=Tcp/80+30080 from [192.0.2.0/24, fd00::/8] external local health 32000", &[]),
        ),
        (
            "health check that is none",
            spec(json!({"type": "LoadBalancer", "externalTrafficPolicy": "Local", "healthCheckNodePort": 70000})),
            (
                "shop/web [10.96.0.10] http=Tcp/80 external local",
                &["error spec.healthCheckNodePort: 70000 is no port number, and is left out"],
            ),
        ),
        (
            "health check without policy Local",
            spec(json!({"type": "LoadBalancer", "healthCheckNodePort": 32000})),
            (plain, &[]),
        ),
        (
            "sources of what is no load balancer",
            spec(json!({"type": "NodePort", "loadBalancerSourceRanges": ["192.0.2.0/24"]})),
            (plain, &[]),
        ),
        (
            "unknown policies",
            spec(json!({"type": "NodePort", "internalTrafficPolicy": "local", "externalTrafficPolicy": "Global"})),
            (
                plain,
                &[
                    "warning spec.internalTrafficPolicy: \"local\" is unknown, and is treated as Cluster",
                    "warning spec.externalTrafficPolicy: \"Global\" is unknown, and is treated as Cluster",
                ],
            ),
        ),
        (
            "unknown type",
            spec(json!({"type": "Clusterip"})),
            (plain, &["warning spec.type: \"Clusterip\" is unknown, and is treated as ClusterIP"]),
        ),
        (
            "internal traffic stays local",
            spec(json!({"internalTrafficPolicy": "Local"})),
            ("shop/web [10.96.0.10] http=Tcp/80 internal local", &[]),
        ),
        ("internal traffic", spec(json!({"internalTrafficPolicy": "Cluster"})), (plain, &[])),
        (
            "what only controllers read",
            spec(
                json!({"trafficDistribution": "PreferClose", "publishNotReadyAddresses": true, "selector": {"a": "b"}}),
            ),
            (plain, &[]),
        ),
    ];
    for (row, spec, want) in rows {
        check(row, &convert_service(&service(&json!({}), spec.clone()), None), show_service, *want);
    }
}

#[test]
fn addresses_and_sources_of_load_balancers() {
    let row = |ingress: Value, ranges: Value| {
        let spec = json!({
            "type": "LoadBalancer",
            "clusterIPs": ["10.96.0.10", "fd00::a"],
            "ports": [{"port": 80}],
            "loadBalancerSourceRanges": ranges,
        });
        let mut object = serde_json::to_value(service(&json!({}), spec)).unwrap();
        object["status"] = json!({"loadBalancer": {"ingress": ingress}});
        serde_json::from_value::<core_v1::Service>(object).unwrap()
    };
    let both = json!([{"ip": "203.0.113.1"}, {"ip": "2001:db8::1"}]);
    let closed = "error spec.loadBalancerSourceRanges: have no valid entry of a family, so the load balancer's addresses \
                  of that family are not served";
    let rows: &[(&str, Value, Value, Want)] = &[
        ("both families", both.clone(), json!([]), ("balancer [203.0.113.1, 2001:db8::1]", &[])),
        (
            "modes",
            json!([
                {"ip": "203.0.113.1", "ipMode": "VIP"},
                {"ip": "203.0.113.2", "ipMode": "Proxy"},
                {"ip": "203.0.113.3", "ipMode": "Tunnel"},
                {"ip": "203.0.113.4", "ipMode": ""},
            ]),
            json!([]),
            (
                "balancer [203.0.113.1, 203.0.113.4]",
                &[
                    "warning status.loadBalancer.ingress[2].ipMode: \"Tunnel\" is unknown, so 203.0.113.3 is left to the network",
                ],
            ),
        ),
        (
            "host names and nonsense",
            json!([{"hostname": "lb.example"}, {"ip": "", "hostname": "x"}, {"ip": "lb"}, {"ip": "203.000.113.01"}]),
            json!([]),
            (
                "balancer [203.0.113.1]",
                &["error status.loadBalancer.ingress[2].ip: \"lb\" is no IP address, and is left out"],
            ),
        ),
        (
            "sources, with spaces, zeros and host bits",
            both.clone(),
            json!([" 192.0.2.7/24\t", "010.0.0.0/8", "2001:db8::/32"]),
            ("balancer [203.0.113.1, 2001:db8::1] from [192.0.2.0/24, 10.0.0.0/8, 2001:db8::/32]", &[]),
        ),
        (
            "a wrong source beside a good one",
            both.clone(),
            json!(["192.0.2.0", "10.0.0.0/8"]),
            (
                "balancer [203.0.113.1, 2001:db8::1] from [10.0.0.0/8]",
                &[
                    "error spec.loadBalancerSourceRanges[0]: \"192.0.2.0\" is no network in CIDR notation, and is left out",
                ],
            ),
        ),
        (
            "a family with wrong sources only lets nobody in rather than everybody",
            both,
            json!(["192.0.2.0", "2001:db8::/32"]),
            (
                "balancer [2001:db8::1] from [2001:db8::/32]",
                &[
                    "error spec.loadBalancerSourceRanges[0]: \"192.0.2.0\" is no network in CIDR notation, and is left out",
                    closed,
                ],
            ),
        ),
    ];
    for (row_name, ingress, ranges, (want, findings)) in rows {
        let want = format!("shop/web [10.96.0.10 fd00::a] =Tcp/80 {want}");
        let got = convert_service(&row(ingress.clone(), ranges.clone()), None);
        check(row_name, &got, show_service, (&want, findings));
    }
}

#[test]
fn labels_decide_whose_a_service_is() {
    let spec = json!({"clusterIP": "10.96.0.10", "ports": [{"port": 80}]});
    let plain = "shop/web [10.96.0.10] =Tcp/80";
    let rows: &[(Value, &str)] = &[
        (json!({}), plain),
        (json!({"labels": {"service.kubernetes.io/service-proxy-name": "other"}}), "-"),
        (json!({"labels": {"service.kubernetes.io/service-proxy-name": ""}}), "-"),
        (json!({"labels": {"service.kubernetes.io/headless": ""}}), "-"),
        (json!({"labels": {"service.kubernetes.io/headless": "false"}}), "-"),
        (json!({"labels": {"app": "web"}}), plain),
        (json!({"namespace": ""}), "default/web [10.96.0.10] =Tcp/80"),
    ];
    for (metadata, want) in rows {
        let got = convert_service(&service(metadata, spec.clone()), None);
        check(&metadata.to_string(), &got, show_service, (want, &[]));
    }
}

#[test]
fn a_file_has_no_one_to_assign_addresses() {
    let got = convert_service(&service(&json!({}), json!({"ports": [{"port": 80}]})), Some("a.yaml:3"));
    let want = Diagnostic {
        severity: Severity::Warning,
        object: "a.yaml:3 Service shop/web".to_owned(),
        field: "spec.clusterIP".to_owned(),
        problem: "is not set and there is no API server to assign one, so the Service is not served".to_owned(),
        fix: "write an unused address of the service network, or None for a headless Service".to_owned(),
    };
    assert_eq!(got, Converted { outcome: None, diagnostics: vec![want] });
}

#[test]
fn a_hundred_ports() {
    let ports: Vec<Value> = (1..=100).map(|port| json!({"name": format!("p{port}"), "port": port})).collect();
    let got = convert_service(&service(&json!({}), json!({"clusterIP": "10.96.0.10", "ports": ports})), None);
    let want: Vec<String> = (1..=100).map(|port| format!("p{port}=Tcp/{port}")).collect();
    check("100 ports", &got, show_service, (&format!("shop/web [10.96.0.10] {}", want.join(" ")), &[]));

    let wrong: Vec<Value> = (0..100).map(|_| json!({"port": 0})).collect();
    let got = convert_service(&service(&json!({}), json!({"clusterIP": "10.96.0.10", "ports": wrong})), None);
    let found = findings(&got.diagnostics);
    assert_eq!((got.outcome, found.len()), (None, 21));
    assert_eq!(found[20], "error : has 81 more findings like these");
}
