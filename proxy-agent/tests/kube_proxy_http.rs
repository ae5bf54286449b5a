//! What the agent's servers answer, to the byte, over real sockets of the loopback address.

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr, SocketAddr, TcpListener as StdListener};
use std::num::NonZeroU16;
use std::path::Path;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use proxy_agent::k8s::{KubeConfig, recorder};
use proxy_agent::kubeproxy::{Flags, Settings};
use proxy_agent::serve::listen::{self, Own};
use proxy_agent::serve::service::{self, Addresses};
use proxy_agent::serve::{Health, Metrics, Notice, Notices, health, status};
use proxy_core::event::{NetDevice, Node};
use proxy_core::facts::{Facts, HealthCheck};
use proxy_core::name::ObjectName;
use proxy_core::policy::NodePortAddresses;
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;
use tokio::sync::watch;

/// Longest wait for something that must come.
const DEADLINE: Duration = Duration::from_mins(1);
const HERE: IpAddr = IpAddr::V4(Ipv4Addr::LOCALHOST);

/// Status line, headers but for the date, and body.
async fn ask(address: SocketAddr, request: &str) -> std::io::Result<(String, BTreeMap<String, String>, String)> {
    let mut stream = TcpStream::connect(address).await?;
    stream.write_all(format!("{request} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n").as_bytes()).await?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer).await?;
    let (head, body) = answer.split_once("\r\n\r\n").expect("a head");
    let mut lines = head.lines();
    let line = lines.next().unwrap_or_default().to_owned();
    let headers = lines.filter_map(|line| line.split_once(": ")).map(|(k, v)| (k.to_owned(), v.to_owned()));
    let headers = headers.filter(|(name, _)| name != "date" && name != "connection").collect();
    Ok((line, headers, body.to_owned()))
}

fn headers(all: &[(&str, &str)], body: &str) -> BTreeMap<String, String> {
    let length = body.len().to_string();
    let all = all.iter().copied().chain([("content-length", length.as_str())]);
    all.map(|(name, value)| (name.to_owned(), value.to_owned())).collect()
}

async fn until<T, F: Future<Output = Option<T>>>(what: &str, mut look: impl FnMut() -> F) -> T {
    let end = Instant::now() + DEADLINE;
    loop {
        if let Some(found) = look().await {
            return found;
        }
        assert!(Instant::now() < end, "{what}");
        tokio::task::yield_now().await;
    }
}

fn free_port() -> u16 {
    StdListener::bind((HERE, 0)).and_then(|socket| socket.local_addr()).expect("a port").port()
}

fn no_event() -> Notices {
    Notices::none()
}

const OWN: Own = Own { what: "test server", flag: "--test", reason: "Taken" };

#[tokio::test]
async fn health_endpoints_by_state_and_their_counters() {
    let (health, metrics) = (Arc::new(Health::default()), Arc::new(Metrics::default()));
    let at = SocketAddr::new(HERE, free_port());
    listen::keep(OWN, at, health::router(&health, &metrics), true, "n", &no_event()).expect("bound");
    let json = [("content-type", "application/json"), ("x-content-type-options", "nosniff")];
    let never = "0001-01-01 00:00:00 +0000 UTC";
    // synced, leaving; status of /healthz, /livez, /readyz
    let rows = [(false, false, [503, 503, 503]), (true, false, [200, 200, 200]), (true, true, [503, 200, 200])];
    for (synced, leaving, want) in rows {
        health.sync(synced, synced);
        health.node(leaving);
        for (path, want) in ["/healthz", "/livez", "/readyz"].into_iter().zip(want) {
            let (line, got, body) = ask(at, &format!("GET {path}")).await.expect("an answer");
            assert_eq!(line.split(' ').nth(1), Some(want.to_string().as_str()), "{path} {synced} {leaving}");
            assert_eq!(got, headers(&json, &body), "{path}");
            let read: Value = serde_json::from_str(&body).expect("JSON");
            if path == "/readyz" {
                assert_eq!(body, format!(r#"{{"agent": "proxy-agent","ready": {synced}}}"#));
                continue;
            }
            let time = |field: &str| read[field].as_str().expect("a time").to_owned();
            let eligible =
                if path == "/healthz" { format!(r#", "nodeEligible": {}"#, !leaving) } else { String::new() };
            let (updated, current) = (time("lastUpdated"), time("currentTime"));
            assert_eq!(body, format!(r#"{{"lastUpdated": "{updated}","currentTime": "{current}"{eligible}}}"#));
            match (synced, want) {
                (false, _) => assert_eq!(updated, never),
                (true, 200) => assert_eq!(updated, current),
                (true, _) => assert!(updated < current && updated != never),
            }
        }
    }
    let (line, ..) = ask(at, "GET /metrics").await.expect("an answer");
    assert_eq!(line, "HTTP/1.1 404 Not Found");
    let text = metrics.scrape();
    let counted: Vec<&str> = text.lines().filter(|line| line.contains("z_total{")).collect();
    assert_eq!(
        counted,
        [
            "kubeproxy_proxy_healthz_total{code=\"200\"} 1",
            "kubeproxy_proxy_healthz_total{code=\"503\"} 2",
            "kubeproxy_proxy_livez_total{code=\"200\"} 2",
            "kubeproxy_proxy_livez_total{code=\"503\"} 1",
        ]
    );
}

#[tokio::test]
async fn status_endpoints() {
    let (settings, _) = Settings::new(None, &Flags::default(), None).expect("defaults");
    let configz = settings.configz().to_string();
    for profiling in [false, true] {
        let about = status::About { mode: settings.mode.to_string(), configz: configz.clone(), profiling };
        let at = SocketAddr::new(HERE, free_port());
        listen::keep(OWN, at, status::router(&Arc::default(), about), true, "n", &no_event()).expect("bound");
        let plain = [("content-type", "text/plain; charset=utf-8")];
        let sniff = [("content-type", "text/plain; charset=utf-8"), ("x-content-type-options", "nosniff")];
        let none =
            if profiling { "enableProfiling is set, but this agent has no profiler\n" } else { "404 page not found\n" };
        let rows = [
            ("GET /proxyMode", "200 OK", sniff.as_slice(), "nftables"),
            ("GET /configz", "200 OK", &[("content-type", "application/json")], configz.as_str()),
            ("GET /debug/pprof", "404 Not Found", &plain, none),
            ("GET /debug/pprof/heap", "404 Not Found", &plain, none),
            ("GET /other", "404 Not Found", &[], ""),
        ];
        for (request, line, with, body) in rows {
            let got = ask(at, request).await.expect("an answer");
            assert_eq!(got, (format!("HTTP/1.1 {line}"), headers(with, body), body.to_owned()), "{request}");
        }
        let (line, got, body) = ask(at, "GET /metrics").await.expect("an answer");
        assert_eq!(line, "HTTP/1.1 200 OK");
        assert_eq!(got, headers(&[("content-type", "text/plain; version=0.0.4; charset=utf-8")], &body));
        assert!(body.contains("\nprocess_resident_memory_bytes "), "{body}");
    }
    let shown: Value = serde_json::from_str(&configz).expect("JSON");
    assert_eq!(shown["kubeproxy.config.k8s.io"]["conntrack"]["tcpEstablishedTimeout"], "24h0m0s");
    assert_eq!(shown["kubeproxy.config.k8s.io"]["kind"], "KubeProxyConfiguration");
}

fn facts(all: &[(&str, u16, u32)]) -> Facts {
    let checks = all.iter().map(|(name, port, local_endpoints)| {
        let check = HealthCheck { port: NonZeroU16::new(*port).expect("a port"), local_endpoints: *local_endpoints };
        (ObjectName::new("ns", *name), check)
    });
    Facts { health_checks: checks.collect(), ..Facts::default() }
}

#[tokio::test]
async fn health_checks_follow_the_services() {
    let health = Arc::new(Health::default());
    let (port, other, taken) = (free_port(), free_port(), StdListener::bind((HERE, 0)).expect("a port"));
    let blocked = taken.local_addr().expect("its address").port();
    let (tx, rx) = watch::channel(facts(&[("a", port, 2), ("b", blocked, 1)]));
    let (addresses, addresses_rx) = watch::channel(Addresses::Only(vec![HERE]));
    let (notices, mut told) = Notices::channel();
    let task = tokio::spawn(service::run(rx, addresses_rx, Arc::clone(&health), "node1".to_owned(), notices));
    let at = |port| SocketAddr::new(HERE, port);
    let open = |port| async move { ask(at(port), "GET /").await.ok() };
    let shut = |port| async move { TcpStream::connect(at(port)).await.is_err().then_some(()) };
    until("the server of a", || open(port)).await;

    // The one whose port is taken: an Event, and the other is not held up.
    let notice = tokio::time::timeout(DEADLINE, told.recv()).await.expect("in time").expect("a notice");
    let text = format!(
        "node node1 failed to start healthcheck \"ns/b\" on port {blocked}: Address already in use (os error 98)"
    );
    assert_eq!(notice, Notice::service(&ObjectName::new("ns", "b"), "FailedToStartServiceHealthcheck", text));
    drop(taken);
    let (line, ..) = until("b, once its port is free", || open(blocked)).await;
    assert_eq!(line, "HTTP/1.1 503 Service Unavailable", "nothing is in sync yet");

    // endpoints, healthy; any method and path
    let rows = [
        (2, false, "503 Service Unavailable"),
        (2, true, "200 OK"),
        (0, true, "503 Service Unavailable"),
        (1, true, "200 OK"),
    ];
    for (endpoints, healthy, want) in rows {
        health.sync(healthy, healthy);
        tx.send_replace(facts(&[("a", port, endpoints), ("b", blocked, 1)]));
        let body = format!(
            "{{\n\t\"service\": {{\n\t\t\"namespace\": \"ns\",\n\t\t\"name\": \"a\"\n\t}},\n\t\"localEndpoints\": {endpoints},\n\t\"serviceProxyHealthy\": {healthy}\n}}"
        );
        let weight = endpoints.to_string();
        let with = headers(
            &[
                ("content-type", "application/json"),
                ("x-content-type-options", "nosniff"),
                ("x-load-balancing-endpoint-weight", &weight),
            ],
            &body,
        );
        for request in ["GET /", "GET /healthz?x=1", "POST /a/b", "DELETE /"] {
            let got = ask(at(port), request).await.expect("an answer");
            assert_eq!(got, (format!("HTTP/1.1 {want}"), with.clone(), body.clone()), "{request}");
        }
    }

    // A load balancer that keeps its connection is not answered for a port that is gone.
    let mut kept = TcpStream::connect(at(port)).await.expect("connected");
    kept.write_all(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n").await.expect("asked");
    let mut first = [0; 15];
    kept.read_exact(&mut first).await.expect("answered");
    assert_eq!(&first, b"HTTP/1.1 200 OK");
    tx.send_replace(facts(&[("a", other, 1)]));
    until("the new port", || open(other)).await;
    until("the old port is closed", || shut(port)).await;
    until("the port of the Service that is gone", || shut(blocked)).await;
    let rest = tokio::time::timeout(DEADLINE, kept.read_to_end(&mut Vec::new())).await;
    assert!(rest.is_ok(), "the connection ends with the port");

    // The addresses on which NodePorts are served change.
    addresses.send_replace(Addresses::Only(vec!["127.0.0.2".parse().expect("an address")]));
    until("the old address", || shut(other)).await;
    let second = SocketAddr::from(([127, 0, 0, 2], other));
    until("the new address", || async { ask(second, "GET /").await.ok() }).await;
    addresses.send_replace(Addresses::All);
    until("all addresses", || open(other)).await;
    drop(tx);
    task.await.expect("ends with the facts");
}

#[tokio::test]
async fn a_taken_port_of_its_own_is_told_and_tried_again() {
    let taken = StdListener::bind((HERE, 0)).expect("a port");
    let at = taken.local_addr().expect("its address");
    let router = || health::router(&Arc::default(), &Arc::default());
    let (notices, mut told) = Notices::channel();
    let hard = listen::keep(OWN, at, router(), true, "node1", &notices).expect_err("bindAddressHardFail");
    assert_eq!(hard.kind(), std::io::ErrorKind::AddrInUse);
    listen::keep(OWN, at, router(), false, "node1", &notices).expect("goes on");
    let text =
        format!("cannot start test server at {at}: Address already in use (os error 98); free the port or set --test");
    assert_eq!(told.recv().await, Some(Notice::node("node1", "Taken", text)));
    drop(taken);
    until("the port is free", || async { ask(at, "GET /livez").await.ok() }).await;
}

#[tokio::test]
async fn an_unspecified_address_is_every_address_of_both_families() {
    for any in ["0.0.0.0:0", "[::]:0"] {
        let listener = listen::bind(any.parse().expect("an address")).expect("bound");
        let port = listener.local_addr().expect("its address").port();
        let _server = listen::serve(listener, health::router(&Arc::default(), &Arc::default()));
        for host in ["127.0.0.1", "::1"] {
            let at = SocketAddr::new(host.parse().expect("an address"), port);
            assert!(ask(at, "GET /livez").await.is_ok(), "{any} at {host}");
        }
    }
}

#[test]
fn addresses_on_which_health_checks_listen() {
    let ip = |text: &str| text.parse::<IpAddr>().expect("an address");
    let range = |text: &str| NodePortAddresses::Range(text.parse().expect("a range"));
    let node = Node { addresses: ["10.0.0.1", "10.0.0.2", "fd00::1"].map(ip).to_vec(), ..Node::default() };
    let device = |ifindex, addresses: &[&str]| NetDevice {
        ifindex,
        name: "eth".into(),
        mac: proxy_abi::MacBytes([0; 6]),
        mtu: 1500,
        addresses: addresses.iter().map(|text| ip(text)).collect(),
        attach: true,
        pod_bridge: false,
    };
    let devices = [device(1, &["127.0.0.1"]), device(2, &["10.0.0.1", "192.0.2.7", "fd00::1"])];
    let only = |all: &[&str]| Addresses::Only(all.iter().map(|text| ip(text)).collect());
    let rows = [
        (vec![NodePortAddresses::Primary], only(&["10.0.0.1", "fd00::1"])),
        (vec![NodePortAddresses::Localhost], only(&["127.0.0.1", "::1"])),
        (vec![range("192.0.2.0/24"), range("10.0.0.0/8")], only(&["10.0.0.1", "192.0.2.7"])),
        (vec![range("172.16.0.0/12")], only(&[])),
        (vec![range("0.0.0.0/0")], Addresses::All),
        (vec![NodePortAddresses::Primary, NodePortAddresses::All], Addresses::All),
    ];
    for (served, want) in rows {
        assert_eq!(Addresses::of(&served, &node, &devices.each_ref()), want, "{served:?}");
    }
}

/// An API server that knows one Service and takes Events.
async fn api(events: Arc<Mutex<Vec<Value>>>) -> SocketAddr {
    let listener = tokio::net::TcpListener::bind((HERE, 0)).await.expect("bound");
    let at = listener.local_addr().expect("its address");
    let service = json!({
        "apiVersion": "meta.k8s.io/v1", "kind": "PartialObjectMetadata",
        "metadata": {"name": "web", "namespace": "ns", "uid": "u-1"}
    });
    let gone = json!({"kind": "Status", "apiVersion": "v1", "status": "Failure", "reason": "NotFound", "code": 404});
    let router = axum::Router::new()
        .route(
            "/api/v1/namespaces/ns/services/web",
            axum::routing::get(move || std::future::ready(service.to_string())),
        )
        .route(
            "/apis/events.k8s.io/v1/namespaces/ns/events",
            axum::routing::post(move |body: String| {
                let event: Value = serde_json::from_str(&body).expect("JSON");
                events.lock().expect("one at a time").push(event.clone());
                std::future::ready((axum::http::StatusCode::CREATED, body))
            }),
        )
        .fallback(move || std::future::ready((axum::http::StatusCode::NOT_FOUND, gone.to_string())));
    tokio::spawn(async move { axum::serve(listener, router).await });
    at
}

#[tokio::test]
async fn notices_become_events_on_the_service_once() {
    let events = Arc::new(Mutex::new(Vec::new()));
    let at = api(Arc::clone(&events)).await;
    let account = tempfile::tempdir().expect("a folder");
    std::fs::write(account.path().join("token"), "t").expect("written");
    let config = KubeConfig {
        apiservers: vec![format!("http://{at}")],
        service_account: Path::new(account.path()).to_owned(),
        ..KubeConfig::default()
    };
    let (notices, queue) = Notices::channel();
    let tasks = recorder::spawn(config, "node1", queue, (1_000.0, 1_000)).await.expect("started");
    let notice = |name: &str, text: &str| Notice::service(&ObjectName::new("ns", name), "NotServed", text.to_owned());
    for notice in [notice("web", "a"), notice("gone", "a"), notice("web", "a"), notice("web", "b")] {
        notices.send(notice);
    }
    until("two events", || async { (events.lock().expect("no panic").len() >= 2).then_some(()) }).await;
    drop(tasks);
    let mut all = events.lock().expect("no panic").clone();
    for event in &mut all {
        assert!(event["metadata"]["name"].as_str().is_some_and(|name| name.starts_with("web.")), "{event}");
        assert!(event["eventTime"].is_string(), "{event}");
        event["metadata"]["name"] = Value::Null;
        event["eventTime"] = Value::Null;
    }
    let event = |note: &str| {
        json!({
            "apiVersion": "events.k8s.io/v1",
            "kind": "Event",
            "metadata": {"name": null, "namespace": "ns", "labels": {"app.kubernetes.io/name": "proxy-agent"}},
            "eventTime": null,
            "reportingController": "proxy-agent",
            "reportingInstance": "node1",
            "action": "ServeService",
            "reason": "NotServed",
            "regarding": {"apiVersion": "v1", "kind": "Service", "name": "web", "namespace": "ns", "uid": "u-1"},
            "note": note,
            "type": "Warning",
        })
    };
    assert_eq!(all, [event("a"), event("b")]);
}
