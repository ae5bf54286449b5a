//! NetworkPolicies, and the Pods and Namespaces that are watched for their sake: from an API server and from a folder.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use proxy_agent::check;
use proxy_agent::k8s::{self, KubeConfig, PodWatch, SourceConfig, SourceHandle, Timing};
use proxy_agent::node::check::Finding;
use proxy_core::event::{Event, Listing, Source};
use proxy_core::netpol::reconcile::PolicyListing;
use proxy_core::netpol::spec::Change;
use serde_json::{Value, json};
use tempfile::TempDir;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::broadcast;
use tokio::sync::mpsc::{Receiver, channel};
use tokio::task::JoinSet;
use tokio::time::timeout;

/// Longest wait for an event that must come, on a busy machine and without optimisation.
const DEADLINE: Duration = Duration::from_mins(2);

const TIMING: Timing = Timing {
    retry_min: Duration::from_millis(5),
    retry_max: Duration::from_millis(20),
    answer: Duration::from_secs(5),
    silence: Duration::from_secs(5),
    credentials: Duration::from_secs(5),
    login_gap: Duration::from_millis(5),
};

// === A server ===

/// An API server with these objects, by the plural of their kind.
struct Server {
    url: String,
    shared: Shared,
    _tasks: JoinSet<()>,
}

#[derive(Clone)]
struct Shared {
    objects: Arc<Mutex<BTreeMap<&'static str, Vec<Value>>>>,
    /// Status that answers a request for a kind, by its plural.
    refused: Arc<Mutex<BTreeMap<&'static str, u16>>>,
    /// Paths asked for, without those of Services.
    asked: Arc<Mutex<Vec<String>>>,
    /// Lines for the watches on a kind.
    news: broadcast::Sender<(&'static str, String)>,
}

/// What there may be of, with the path that it is found at.
const KINDS: [(&str, &str); 3] = [
    ("networkpolicies", "/apis/networking.k8s.io/v1/networkpolicies?"),
    ("namespaces", "/api/v1/namespaces?"),
    ("pods", "/api/v1/pods?"),
];

impl Server {
    async fn start(objects: &[(&'static str, Value)]) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let url = format!("http://{}", listener.local_addr().unwrap());
        let mut all: BTreeMap<&str, Vec<Value>> = BTreeMap::new();
        for (kind, object) in objects {
            all.entry(kind).or_default().push(object.clone());
        }
        let shared = Shared {
            objects: Arc::new(Mutex::new(all)),
            refused: Arc::default(),
            asked: Arc::default(),
            news: broadcast::channel(64).0,
        };
        let (mut tasks, serving) = (JoinSet::new(), shared.clone());
        tasks.spawn(async move {
            let mut connections = JoinSet::new();
            while let Ok((stream, _)) = listener.accept().await {
                connections.spawn(serve(stream, serving.clone()));
            }
        });
        Self { url, shared, _tasks: tasks }
    }

    fn refuse(&self, kind: &'static str, code: Option<u16>) {
        let mut refused = self.shared.refused.lock().unwrap();
        match code {
            Some(code) => refused.insert(kind, code),
            None => refused.remove(kind),
        };
    }

    /// Tells the watches on a kind.
    fn tell(&self, kind: &'static str, change: &str, object: &Value) {
        self.shared.news.send((kind, format!("{}\n", json!({"type": change, "object": object})))).unwrap();
    }

    fn asked(&self) -> Vec<String> {
        self.shared.asked.lock().unwrap().clone()
    }

    async fn until_asked(&self, all: &[&str]) {
        let asked = async {
            while !all.iter().all(|one| self.asked().contains(&(*one).to_owned())) {
                tokio::task::yield_now().await;
            }
        };
        timeout(DEADLINE, asked).await.expect("asked");
    }
}

async fn serve(mut stream: TcpStream, shared: Shared) {
    let mut head = Vec::new();
    while !head.ends_with(b"\r\n\r\n") {
        let Ok(byte) = stream.read_u8().await else { return };
        head.push(byte);
    }
    let head = String::from_utf8(head).unwrap();
    let path = head.split(' ').nth(1).unwrap();
    let kind = KINDS.iter().find(|(_, begin)| path.starts_with(begin)).map(|(kind, _)| *kind);
    let watch = path.contains("watch=true");
    let mut news = shared.news.subscribe();
    if let Some(kind) = kind {
        shared.asked.lock().unwrap().push(format!("{} {kind}", if watch { "watch" } else { "list" }));
    }
    let fields = "Content-Type: application/json\r\nConnection: close\r\n";
    let refused = kind.and_then(|kind| shared.refused.lock().unwrap().get(kind).copied());
    if let Some(code) = refused {
        let status = json!({"kind": "Status", "apiVersion": "v1", "status": "Failure", "message": "no", "reason": "No", "code": code});
        let body = status.to_string();
        let text = format!("HTTP/1.1 {code} X\r\n{fields}Content-Length: {}\r\n\r\n{body}", body.len());
        // The client may be gone already.
        stream.write_all(text.as_bytes()).await.ok();
    } else if watch {
        let text = format!("HTTP/1.1 200 OK\r\n{fields}Transfer-Encoding: chunked\r\n\r\n");
        stream.write_all(text.as_bytes()).await.ok();
        while let Ok((of, line)) = news.recv().await {
            if Some(of) == kind && stream.write_all(format!("{:x}\r\n{line}\r\n", line.len()).as_bytes()).await.is_err()
            {
                return;
            }
        }
    } else {
        let items = kind.and_then(|kind| shared.objects.lock().unwrap().get(kind).cloned()).unwrap_or_default();
        let list = json!({"kind": "List", "apiVersion": "v1", "metadata": {"resourceVersion": "5"}, "items": items});
        let body = list.to_string();
        let text = format!("HTTP/1.1 200 OK\r\n{fields}Content-Length: {}\r\n\r\n{body}", body.len());
        stream.write_all(text.as_bytes()).await.ok();
    }
}

// === The agent's side ===

struct Agent {
    events: Receiver<Event>,
    _source: SourceHandle,
    _folder: Option<TempDir>,
}

async fn spawn(config: SourceConfig, pods: PodWatch, folder: Option<TempDir>) -> Agent {
    let (tx, events) = channel(64);
    let source = k8s::spawn_with(config, "n1", pods, tx).await.unwrap();
    Agent { events, _source: source, _folder: folder }
}

async fn of_server(server: &Server) -> Agent {
    of_server_with(server, PodWatch::ForPolicies).await
}

async fn of_server_with(server: &Server, pods: PodWatch) -> Agent {
    let account = tempfile::tempdir().unwrap();
    fs::write(account.path().join("token"), "secret").unwrap();
    let config = KubeConfig {
        apiservers: vec![server.url.clone()],
        service_account: account.path().to_owned(),
        timing: TIMING,
        ..KubeConfig::default()
    };
    spawn(SourceConfig::Kube(config), pods, Some(account)).await
}

impl Agent {
    /// The next event that is of policies.
    async fn next(&mut self) -> String {
        loop {
            let event = timeout(DEADLINE, self.events.recv()).await.expect("an event").expect("a source");
            if let Some(shown) = show(&event) {
                return shown;
            }
        }
    }

    /// The next events of policies are these, in whatever order kinds come in.
    async fn expect(&mut self, want: &[&str]) {
        let mut got = Vec::new();
        for _ in want {
            got.push(self.next().await);
        }
        got.sort();
        let mut want = want.to_vec();
        want.sort_unstable();
        assert_eq!(got, want);
    }
}

fn show(event: &Event) -> Option<String> {
    let names = |names: &mut dyn Iterator<Item = String>| names.collect::<Vec<_>>().join(" ");
    Some(match event {
        Event::NetworkPolicy(Change::Policy(spec)) => {
            let types = spec.policy_types.as_deref().map(|types| types.join("+")).unwrap_or_default();
            format!("policy {} {types}", spec.name)
        }
        Event::NetworkPolicy(Change::PolicyGone(name)) => format!("gone policy {name}"),
        Event::NetworkPolicy(Change::Pod(pod)) => format!("pod {} {:?}", pod.name, pod.ips),
        Event::NetworkPolicy(Change::PodGone(name)) => format!("gone pod {name}"),
        Event::NetworkPolicy(Change::Namespace(namespace)) => {
            format!("namespace {} {:?}", namespace.name, namespace.labels.len())
        }
        Event::NetworkPolicy(Change::NamespaceGone(name)) => format!("gone namespace {name}"),
        Event::NetworkPolicyListed(PolicyListing::Policies(all)) => {
            format!("listed policies {}", names(&mut all.iter().map(ToString::to_string)))
        }
        Event::NetworkPolicyListed(PolicyListing::Pods(all)) => {
            format!("listed pods {}", names(&mut all.iter().map(ToString::to_string)))
        }
        Event::NetworkPolicyListed(PolicyListing::Namespaces(all)) => {
            format!("listed namespaces {}", names(&mut all.iter().map(ToString::to_string)))
        }
        Event::Diagnostics { object, findings } if findings.is_empty() => format!("well {object}"),
        Event::Diagnostics { findings, .. } => format!("ill {}", findings[0]),
        _ => return None,
    })
}

fn policy(name: &str, spec: &Value) -> Value {
    json!({
        "apiVersion": "networking.k8s.io/v1", "kind": "NetworkPolicy",
        "metadata": {"name": name, "namespace": "shop", "resourceVersion": "7"}, "spec": spec,
    })
}

fn pod(name: &str, ip: &str) -> Value {
    json!({
        "apiVersion": "v1", "kind": "Pod",
        "metadata": {"name": name, "namespace": "shop", "uid": name, "resourceVersion": "7"},
        "spec": {"containers": []}, "status": {"phase": "Running", "podIP": ip},
    })
}

fn namespace(name: &str) -> Value {
    json!({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name, "resourceVersion": "7"}})
}

fn deny() -> Value {
    policy("deny", &json!({"policyTypes": ["Ingress"]}))
}

#[tokio::test]
async fn pods_and_namespaces_are_watched_once_there_is_a_policy() {
    let server =
        Server::start(&[("pods", pod("a", "10.0.0.1")), ("pods", pod("b", "")), ("namespaces", namespace("shop"))])
            .await;
    let mut agent = of_server(&server).await;
    agent.expect(&["listed policies "]).await;
    server.until_asked(&["watch networkpolicies"]).await;
    assert_eq!(server.asked(), ["list networkpolicies", "watch networkpolicies"]);

    server.tell("networkpolicies", "ADDED", &deny());
    agent.expect(&["policy shop/deny Ingress"]).await;
    let there = [
        "namespace shop 0",
        "listed namespaces shop",
        "pod shop/a [10.0.0.1]",
        "pod shop/b []",
        "listed pods shop/a shop/b",
    ];
    agent.expect(&there).await;
    // And they go on when it has gone.
    server.tell("networkpolicies", "DELETED", &deny());
    agent.expect(&["gone policy shop/deny"]).await;
    server.until_asked(&["watch pods", "watch namespaces"]).await;
    server.tell("pods", "MODIFIED", &pod("b", "10.0.0.2"));
    agent.expect(&["pod shop/b [10.0.0.2]"]).await;
    server.tell("pods", "DELETED", &pod("a", "10.0.0.1"));
    agent.expect(&["gone pod shop/a"]).await;
    server.tell("namespaces", "DELETED", &namespace("shop"));
    agent.expect(&["gone namespace shop"]).await;
}

#[tokio::test]
async fn pods_are_watched_without_a_policy_where_that_is_asked_for() {
    let server = Server::start(&[("pods", pod("a", "10.0.0.1")), ("namespaces", namespace("shop"))]).await;
    let mut agent = of_server_with(&server, PodWatch::Always).await;
    agent.expect(&["listed policies ", "pod shop/a [10.0.0.1]", "listed pods shop/a"]).await;
    server.until_asked(&["watch networkpolicies"]).await;
    server.tell("networkpolicies", "ADDED", &deny());
    agent.expect(&["policy shop/deny Ingress", "namespace shop 0", "listed namespaces shop"]).await;
}

#[tokio::test]
async fn policies_of_the_first_listing_count_too() {
    let server = Server::start(&[("networkpolicies", deny())]).await;
    let mut agent = of_server(&server).await;
    agent
        .expect(&["policy shop/deny Ingress", "listed policies shop/deny", "listed namespaces ", "listed pods "])
        .await;
}

#[tokio::test]
async fn a_server_without_the_kind_has_no_policies() {
    let server = Server::start(&[]).await;
    server.refuse("networkpolicies", Some(404));
    let mut agent = of_server(&server).await;
    agent.expect(&["listed policies "]).await;
}

#[tokio::test]
async fn a_missing_right_is_told_and_is_no_empty_list() {
    let fix = "give the agent's user get, list and watch on this kind: see the ClusterRole in deploy/";
    let rows = [
        (
            "networkpolicies",
            "NetworkPolicy: the agent may not watch NetworkPolicies: those that it knew before stay in force, others have \
             no effect",
        ),
        ("pods", "Pod: the agent may not watch Pods: NetworkPolicies that it did not know before have no effect"),
        (
            "namespaces",
            "Namespace: the agent may not watch Namespaces: NetworkPolicies that it did not know before have no effect",
        ),
    ];
    for (kind, problem) in rows {
        let server = Server::start(&[("networkpolicies", deny())]).await;
        server.refuse(kind, Some(403));
        let mut agent = of_server(&server).await;
        let ill = format!("ill {problem}; {fix}");
        let object = problem.split(':').next().unwrap();
        let rest = ["policy shop/deny Ingress", "listed policies shop/deny", "listed namespaces ", "listed pods "];
        let (later, before): (Vec<&str>, Vec<&str>) = rest.iter().partition(|line| match kind {
            "networkpolicies" => true,
            _ => line.contains(&format!("listed {kind}")),
        });
        let mut first = before.clone();
        first.push(&ill);
        agent.expect(&first).await;
        // Services go on: their lists have come, or come now.
        server.refuse(kind, None);
        let well = format!("well {object}");
        let mut later = later.clone();
        later.push(&well);
        agent.expect(&later).await;
    }
}

#[tokio::test]
async fn a_policy_that_cannot_be_read_isolates_or_stays() {
    let wrong = |name: &str| policy(name, &json!({"policyTypes": "Ingress"}));
    let server = Server::start(&[("networkpolicies", wrong("bad")), ("networkpolicies", deny())]).await;
    let mut agent = of_server(&server).await;
    let isolates = "mend the object; until then it isolates every pod of its namespace";
    let mut said = Vec::new();
    for _ in 0..6 {
        said.push(agent.next().await);
    }
    let (ill, rest): (Vec<_>, Vec<_>) = said.into_iter().partition(|line| line.starts_with("ill "));
    assert!(
        ill[0].starts_with("ill NetworkPolicy shop/bad: cannot be read: ") && ill[0].ends_with(isolates),
        "{ill:?}"
    );
    let mut rest = rest;
    rest.sort();
    let want = [
        "listed namespaces ",
        "listed pods ",
        "listed policies shop/bad shop/deny",
        "policy shop/bad Ingress+Egress",
        "policy shop/deny Ingress",
    ];
    assert_eq!(rest, want);
    server.until_asked(&["watch networkpolicies"]).await;
    // One that was good once stays as it was.
    server.tell("networkpolicies", "MODIFIED", &wrong("deny"));
    let ill = agent.next().await;
    assert!(ill.ends_with("mend the object; its last good version stays in effect"), "{ill}");
    server.tell("networkpolicies", "MODIFIED", &policy("bad", &json!({"policyTypes": ["Egress"]})));
    agent.expect(&["policy shop/bad Egress", "well NetworkPolicy shop/bad"]).await;
    server.tell("networkpolicies", "DELETED", &wrong("deny"));
    agent.expect(&["well NetworkPolicy shop/deny", "gone policy shop/deny"]).await;
}

// === A folder ===

fn write(folder: &Path, name: &str, objects: &[Value]) {
    let text: Vec<String> = objects.iter().map(ToString::to_string).collect();
    fs::write(folder.join(name), text.join("\n")).unwrap();
}

async fn of_folder(folder: &Path) -> Agent {
    spawn(SourceConfig::Dir(folder.to_owned()), PodWatch::ForPolicies, None).await
}

#[tokio::test]
async fn a_folder_tells_of_pods_once_there_is_a_policy() {
    let folder = tempfile::tempdir().unwrap();
    let at = folder.path();
    write(at, "pods.json", &[pod("a", "10.0.0.1"), namespace("shop")]);
    let mut agent = of_folder(at).await;
    agent.expect(&["listed policies "]).await;
    write(at, "policy.json", &[deny()]);
    let there = [
        "policy shop/deny Ingress",
        "namespace shop 1",
        "listed namespaces shop",
        "pod shop/a [10.0.0.1]",
        "listed pods shop/a",
    ];
    agent.expect(&there).await;
    fs::remove_file(at.join("policy.json")).unwrap();
    agent.expect(&["gone policy shop/deny"]).await;
    write(at, "pods.json", &[pod("a", "10.0.0.2")]);
    agent.expect(&["gone namespace shop", "pod shop/a [10.0.0.2]"]).await;
    fs::remove_file(at.join("pods.json")).unwrap();
    agent.expect(&["gone pod shop/a"]).await;
}

#[tokio::test]
async fn a_folder_tells_of_pods_without_a_policy_where_that_is_asked_for() {
    let folder = tempfile::tempdir().unwrap();
    let at = folder.path();
    write(at, "pods.json", &[pod("a", "10.0.0.1"), namespace("shop")]);
    let mut agent = spawn(SourceConfig::Dir(at.to_owned()), PodWatch::Always, None).await;
    agent.expect(&["pod shop/a [10.0.0.1]", "listed policies ", "listed pods shop/a"]).await;
    write(at, "pods.json", &[pod("a", "10.0.0.2"), namespace("shop")]);
    agent.expect(&["pod shop/a [10.0.0.2]"]).await;
    write(at, "policy.json", &[deny()]);
    let there = ["policy shop/deny Ingress", "namespace shop 1", "listed namespaces shop", "listed pods shop/a"];
    agent.expect(&there).await;
}

#[tokio::test]
async fn a_folder_that_has_all_at_once() {
    let folder = tempfile::tempdir().unwrap();
    write(folder.path(), "all.json", &[pod("a", ""), namespace("shop"), deny()]);
    let mut agent = of_folder(folder.path()).await;
    let all = [
        "policy shop/deny Ingress",
        "pod shop/a []",
        "namespace shop 1",
        "listed policies shop/deny",
        "listed pods shop/a",
        "listed namespaces shop",
    ];
    agent.expect(&all).await;
}

#[tokio::test]
async fn a_policy_of_a_folder_that_cannot_be_read_isolates_or_stays() {
    let folder = tempfile::tempdir().unwrap();
    let at = folder.path();
    let wrong = |name: &str| policy(name, &json!({"policyTypes": "Ingress"}));
    write(at, "bad.json", &[wrong("bad")]);
    write(at, "deny.json", &[deny()]);
    let mut agent = of_folder(at).await;
    // It is none of Services' business, so these are not held back: no `Unreadable` comes before the first listing.
    let mut said = Vec::new();
    loop {
        let event = timeout(DEADLINE, agent.events.recv()).await.expect("an event").expect("a source");
        assert!(!matches!(event, Event::Unreadable(_)), "{event:?}");
        said.extend(show(&event));
        if event == Event::Listed(Source::Node, Listing::Node) {
            break;
        }
    }
    let policies: Vec<_> = said.iter().filter(|line| line.contains("polic") && !line.starts_with("ill")).collect();
    assert_eq!(
        policies,
        ["policy shop/bad Ingress+Egress", "policy shop/deny Ingress", "listed policies shop/bad shop/deny"]
    );
    write(at, "deny.json", &[wrong("deny")]);
    let ill = agent.next().await;
    assert!(ill.starts_with("ill deny.json:1 NetworkPolicy shop/deny spec.policyTypes: "), "{ill}");
    write(at, "bad.json", &[policy("bad", &json!({"policyTypes": ["Egress"]}))]);
    agent.expect(&["policy shop/bad Egress", "well NetworkPolicy shop/bad"]).await;
    fs::remove_file(at.join("deny.json")).unwrap();
    agent.expect(&["gone policy shop/deny", "well NetworkPolicy shop/deny"]).await;
}

#[test]
fn policies_of_a_folder_are_checked_without_a_cluster() {
    let folder = tempfile::tempdir().unwrap();
    let at = folder.path();
    let lines = |at: &Path| -> Vec<String> {
        let line = |found: Finding| format!("{:?} {}: {}", found.level, found.subject, found.state);
        check::policies(at).into_iter().map(line).collect()
    };
    write(at, "deny.json", &[deny()]);
    assert_eq!(lines(at), ["Good NetworkPolicies: 1: nothing is the matter with them"]);
    let from = |cidr: &str, except: &[&str]| json!({"ipBlock": {"cidr": cidr, "except": except}});
    let spec = json!({"ingress": [
        {"from": [from("10.1.0.0/16", &[])]},
        {"from": [from("10.0.0.0/8", &[])]},
        {"from": [from("192.0.2.0/24", &["192.0.2.0/24"])]},
    ]});
    write(at, "web.json", &[policy("web", &spec)]);
    assert_eq!(
        lines(at),
        [
            "Warning NetworkPolicy shop/web ingress[0]: it allows nothing that shop/web ingress[1] does not allow",
            "Warning NetworkPolicy shop/web ingress[2]: nothing is left of its range 192.0.2.0/24: `except` takes all of it",
        ]
    );
    write(at, "web.json", &[policy("web", &json!({"policyTypes": "Ingress"}))]);
    let told = lines(at);
    assert!(
        told.len() == 1 && told[0].starts_with("Warning web.json:1 NetworkPolicy shop/web spec.policyTypes: "),
        "{told:?}"
    );
    assert!(lines(&at.join("none"))[0].starts_with("Warning "), "a folder that is not there");
}
