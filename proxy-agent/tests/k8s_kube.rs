//! `--source kube` against a scripted API server: faults that a healthy one never shows, and what is sent all the same.

use std::collections::VecDeque;
use std::fs;
use std::path::PathBuf;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use proxy_agent::k8s::{self, KubeConfig, SourceConfig, SourceError, SourceHandle, Timing, Trouble};
use proxy_core::event::{Event, Listing, Source};
use proxy_core::netpol::reconcile::PolicyListing;
use serde_json::{Value, json};
use tempfile::TempDir;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::mpsc::{Receiver, channel};
use tokio::task::JoinSet;
use tokio::time::timeout;

/// Longest wait for an event that must come, on a busy machine and without optimisation.
const DEADLINE: Duration = Duration::from_mins(2);

const TIMING: Timing = Timing {
    retry_min: Duration::from_millis(5),
    retry_max: Duration::from_millis(20),
    answer: Duration::from_secs(5),
    silence: Duration::from_millis(200),
    credentials: Duration::from_millis(20),
    login_gap: Duration::from_millis(5),
};

/// One answer of the server.
#[derive(Clone)]
enum Answer {
    /// A whole answer.
    Json(u16, Value),
    /// The head of a list and half of its body, then nothing.
    Stall,
    /// Another token is right from now on; then an answer.
    Rotate(&'static str, Box<Answer>),
    /// Lines of a watch, then its end.
    Watch(Vec<String>, End),
}

#[derive(Clone, Copy)]
enum End {
    /// Open for ever.
    Open,
    /// Ended as HTTP has it.
    Clean,
    /// The connection is lost.
    Cut,
}

/// What the server does about Services; of the other kinds there is nothing, and nothing ever happens to them.
struct Server {
    url: String,
    script: Arc<Mutex<VecDeque<Answer>>>,
    requests: Arc<Mutex<Vec<String>>>,
    tasks: JoinSet<()>,
}

/// What the connections share.
#[derive(Clone)]
struct Shared {
    script: Arc<Mutex<VecDeque<Answer>>>,
    requests: Arc<Mutex<Vec<String>>>,
    token: Arc<Mutex<&'static str>>,
    /// Answer to a listing of ServiceCIDRs; `None`: an empty one.
    cidrs: Option<Answer>,
}

impl Server {
    /// Accepts requests that carry `token` only; all when it is empty.
    async fn start(script: impl IntoIterator<Item = Answer>, token: &'static str) -> Self {
        Self::start_with(script, token, None).await
    }

    async fn start_with(script: impl IntoIterator<Item = Answer>, token: &'static str, cidrs: Option<Answer>) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let url = format!("http://{}", listener.local_addr().unwrap());
        let script = Arc::new(Mutex::new(script.into_iter().collect::<VecDeque<_>>()));
        let requests = Arc::new(Mutex::new(Vec::new()));
        let mut tasks = JoinSet::new();
        let shared = Shared {
            script: Arc::clone(&script),
            requests: Arc::clone(&requests),
            token: Arc::new(Mutex::new(token)),
            cidrs,
        };
        tasks.spawn(async move {
            let mut connections = JoinSet::new();
            while let Ok((stream, _)) = listener.accept().await {
                connections.spawn(serve(stream, shared.clone()));
            }
        });
        Self { url, script, requests, tasks }
    }

    fn requests(&self) -> Vec<String> {
        self.requests.lock().unwrap().clone()
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
    let watch = path.contains("watch=true");
    let empty = || if watch { Answer::Watch(Vec::new(), End::Open) } else { list("1", "", &[]) };
    let token = *shared.token.lock().unwrap();
    let answer =
        if !token.is_empty() && !head.to_ascii_lowercase().contains(&format!("authorization: bearer {token}\r\n")) {
            status(401, "Unauthorized")
        } else if path.starts_with("/api/v1/services?") {
            let pair = |key: &str| {
                let query = path.split_once('?').unwrap().1;
                query.split('&').find_map(|pair| pair.strip_prefix(key)).unwrap_or("").to_owned()
            };
            let asked = match (watch, pair("continue=").as_str()) {
                (true, _) => format!("watch {}", pair("resourceVersion=")),
                (false, "") => "list".to_owned(),
                (false, page) => format!("list {page}"),
            };
            shared.requests.lock().unwrap().push(asked);
            shared.script.lock().unwrap().pop_front().unwrap_or_else(empty)
        } else if path.starts_with("/apis/networking.k8s.io/v1/servicecidrs?") && !watch {
            shared.cidrs.clone().unwrap_or_else(empty)
        } else {
            empty()
        };
    let answer = match answer {
        Answer::Rotate(token, answer) => {
            *shared.token.lock().unwrap() = token;
            *answer
        }
        answer => answer,
    };
    // The client may be gone already, as it should be after some of the faults.
    send(&mut stream, answer).await.ok();
}

async fn send(stream: &mut TcpStream, answer: Answer) -> std::io::Result<()> {
    let head = "Content-Type: application/json\r\nConnection: close\r\n";
    match answer {
        Answer::Json(code, body) => {
            let body = body.to_string();
            let text = format!("HTTP/1.1 {code} X\r\n{head}Content-Length: {}\r\n\r\n{body}", body.len());
            stream.write_all(text.as_bytes()).await?;
            stream.shutdown().await
        }
        Answer::Rotate(..) => unreachable!("unwrapped by serve"),
        Answer::Stall => {
            let text = format!("HTTP/1.1 200 OK\r\n{head}Content-Length: 5000\r\n\r\n{{\"kind\": \"ServiceList\", ");
            stream.write_all(text.as_bytes()).await?;
            std::future::pending().await
        }
        Answer::Watch(lines, end) => {
            stream.write_all(format!("HTTP/1.1 200 OK\r\n{head}Transfer-Encoding: chunked\r\n\r\n").as_bytes()).await?;
            for line in lines {
                stream.write_all(format!("{:x}\r\n{line}\r\n", line.len()).as_bytes()).await?;
            }
            match end {
                End::Open => std::future::pending().await,
                End::Clean => stream.write_all(b"0\r\n\r\n").await,
                End::Cut => Ok(()),
            }
        }
    }
}

fn service(name: &str, version: &str) -> Value {
    json!({
        "metadata": {"name": name, "namespace": "default", "resourceVersion": version, "managedFields": [{"manager": "x"}]},
        "spec": {"clusterIP": "10.0.0.1", "ports": [{"port": 80}]},
    })
}

fn list(version: &str, next: &str, names: &[&str]) -> Answer {
    let items: Vec<Value> = names.iter().map(|name| service(name, "1")).collect();
    let metadata = json!({"resourceVersion": version, "continue": next});
    Answer::Json(200, json!({"kind": "ServiceList", "apiVersion": "v1", "metadata": metadata, "items": items}))
}

fn status_body(code: u16, reason: &str) -> Value {
    json!({"kind": "Status", "apiVersion": "v1", "status": "Failure", "message": "scripted", "reason": reason, "code": code})
}

fn status(code: u16, reason: &str) -> Answer {
    Answer::Json(code, status_body(code, reason))
}

fn event(kind: &str, object: &Value) -> String {
    format!("{}\n", json!({"type": kind, "object": object}))
}

fn typed(kind: &str, name: &str, version: &str) -> String {
    let mut object = service(name, version);
    object["kind"] = "Service".into();
    object["apiVersion"] = "v1".into();
    event(kind, &object)
}

fn bookmark(version: &str) -> String {
    event("BOOKMARK", &json!({"kind": "Service", "apiVersion": "v1", "metadata": {"resourceVersion": version}}))
}

// === The agent's side ===

struct Agent {
    events: Receiver<Event>,
    source: SourceHandle,
    _account: TempDir,
}

fn account() -> TempDir {
    let folder = tempfile::tempdir().unwrap();
    fs::write(folder.path().join("token"), "secret").unwrap();
    folder
}

async fn agent(servers: &[&str]) -> Agent {
    let account = account();
    let config = KubeConfig {
        apiservers: servers.iter().map(|&url| url.to_owned()).collect(),
        service_account: account.path().to_owned(),
        timing: TIMING,
        ..KubeConfig::default()
    };
    let (tx, events) = channel(16);
    let source = k8s::spawn(SourceConfig::Kube(config), "n1", tx).await.unwrap();
    Agent { events, source, _account: account }
}

impl Agent {
    /// What is told of Services, up to the Service `end`.
    async fn until_end(&mut self) -> Vec<String> {
        let mut shown = Vec::new();
        loop {
            let event = timeout(DEADLINE, self.events.recv()).await.unwrap_or_else(|_| panic!("stuck after {shown:?}"));
            match event.expect("a source") {
                Event::Service(service) if &*service.name.name == "end" => return shown,
                Event::Service(service) => shown.push(format!("service {}", service.name.name)),
                Event::ServiceGone(name) => shown.push(format!("gone {}", name.name)),
                Event::Listed(Source::Services, Listing::Objects(names)) => {
                    shown.push(format!("listed {:?}", names.iter().map(|name| &*name.name).collect::<Vec<_>>()));
                }
                Event::Diagnostics { object, findings } => {
                    let fields: Vec<&str> = findings.iter().map(|finding| finding.field.as_str()).collect();
                    shown.push(format!("findings {object} {fields:?}"));
                }
                Event::Listed(Source::EndpointSlices, Listing::Objects(names))
                | Event::NetworkPolicyListed(PolicyListing::Policies(names)) => assert!(names.is_empty()),
                Event::Node(node) => assert_eq!(&*node.name, "n1"),
                Event::Listed(Source::Node, Listing::Node) => {}
                Event::Listed(Source::ServiceCidrs, Listing::ServiceCidrs(names)) => assert!(names.is_empty()),
                other => panic!("unexpected {other:?}"),
            }
        }
    }

    /// Waits until the watch on Services was refused so many times.
    async fn refused(&self, times: u64) {
        let refused = async {
            while self.source.metrics().services.errors(Trouble::Unauthorized) < times {
                tokio::task::yield_now().await;
            }
        };
        timeout(DEADLINE, refused).await.unwrap();
    }

    fn errors(&self) -> Vec<(Trouble, u64)> {
        let metrics = &self.source.metrics().services;
        let counts = Trouble::ALL.into_iter().map(|trouble| (trouble, metrics.errors(trouble)));
        counts.filter(|(_, count)| *count > 0).collect()
    }
}

fn end() -> Answer {
    Answer::Watch(vec![typed("ADDED", "end", "99")], End::Open)
}

async fn check(script: Vec<Answer>, want: &[&str], requests: &[&str], errors: &[(Trouble, u64)]) {
    let server = Server::start(script, "").await;
    let mut agent = agent(&[&server.url]).await;
    assert_eq!(agent.until_end().await, want);
    assert_eq!(server.requests(), requests);
    assert_eq!(agent.errors(), errors);
    assert!(server.script.lock().unwrap().is_empty());
}

#[tokio::test]
async fn ranges_of_services_are_none_where_the_server_has_not_the_kind() {
    let empty: Vec<Arc<str>> = Vec::new();
    let some = json!({
        "kind": "ServiceCIDRList",
        "apiVersion": "networking.k8s.io/v1",
        "metadata": {"resourceVersion": "1"},
        "items": [{"metadata": {"name": "kubernetes"}, "spec": {"cidrs": ["10.96.0.0/16"]}}],
    });
    let rows = [
        ("a server of Kubernetes 1.32", Answer::Json(404, json!("404 page not found")), empty.clone()),
        ("the same, with a status", status(404, "NotFound"), empty.clone()),
        ("a role from before", status(403, "Forbidden"), empty),
        ("a server of today", Answer::Json(200, some), vec!["kubernetes".into()]),
    ];
    for (row, answer, want) in rows {
        let server = Server::start_with([], "", Some(answer)).await;
        let mut agent = agent(&[&server.url]).await;
        let mut found = Vec::new();
        loop {
            match timeout(DEADLINE, agent.events.recv()).await.expect(row).expect("a source") {
                Event::ServiceCidr(name, ranges) => {
                    assert_eq!(ranges, ["10.96.0.0/16".parse().unwrap()], "{row}");
                    found.push(name);
                }
                Event::Listed(Source::ServiceCidrs, Listing::ServiceCidrs(names)) => {
                    assert_eq!((names.into_iter().collect(), found), (want.clone(), want), "{row}");
                    break;
                }
                _ => {}
            }
        }
    }
}

#[tokio::test]
async fn listing_and_changes() {
    let script = vec![
        list("5", "p2", &["a", "b"]),
        list("5", "", &["c"]),
        Answer::Watch(
            vec![
                bookmark("6"),
                bookmark("6"),
                typed("MODIFIED", "a", "7"),
                typed("DELETED", "b", "8"),
                bookmark("8"),
                bookmark("9"),
                bookmark("9"),
            ],
            End::Clean,
        ),
        end(),
    ];
    let want = ["service a", "service b", "service c", "listed [\"a\", \"b\", \"c\"]", "service a", "gone b"];
    check(script, &want, &["list", "list p2", "watch 5", "watch 9"], &[]).await;
}

#[tokio::test]
async fn a_first_list_that_never_finishes_lists_nothing() {
    let mut script = vec![list("5", "p2", &["a", "b"]), Answer::Stall, Answer::Stall, list("5", "p2", &["a"])];
    script.extend((0..6).map(|_| status(429, "TooManyRequests")));
    script.extend([list("6", "p2", &["a", "b"]), status(410, "Expired")]);
    script.extend([list("7", "p2", &["a", "b"]), list("7", "", &["c"]), end()]);
    let want = [
        "service a",
        "service b", // and silence
        "service a", // and refusals
        "service a",
        "service b", // and an expired page
        "service a",
        "service b",
        "service c",
        "listed [\"a\", \"b\", \"c\"]",
    ];
    let requests = [
        "list", "list p2", "list", "list", "list p2", "list p2", "list p2", "list p2", "list p2", "list p2", "list",
        "list p2", "list", "list p2", "watch 7",
    ];
    let errors = [(Trouble::Expired, 1), (Trouble::TooManyRequests, 1), (Trouble::Silent, 2)];
    check(script, &want, &requests, &errors).await;
}

#[tokio::test]
async fn a_disconnect_inside_an_event_goes_on_from_the_last_whole_one() {
    let half = |line: String| line[..line.len() / 2].to_owned();
    let script = vec![
        list("5", "", &["a"]),
        Answer::Watch(vec![typed("ADDED", "b", "6"), half(typed("DELETED", "a", "7"))], End::Cut),
        Answer::Watch(vec![half(typed("ADDED", "c", "7"))], End::Clean),
        Answer::Watch(vec![typed("ADDED", "c", "7")], End::Cut),
        end(),
    ];
    let want = ["service a", "listed [\"a\"]", "service b", "service c"];
    check(script, &want, &["list", "watch 5", "watch 6", "watch 6", "watch 7"], &[]).await;
}

#[tokio::test]
async fn what_is_not_understood_is_listed_anew() {
    let script = vec![
        list("5", "", &["a", "b"]),
        Answer::Watch(vec!["{\"type\": \"DELETED\", \"object\": }\n".into(), typed("ADDED", "lost", "9")], End::Open),
        Answer::Json(200, json!({"kind": "ServiceList", "metadata": 7, "items": []})),
        Answer::Json(200, json!({"kind": "ServiceList", "apiVersion": "v1", "metadata": {}, "items": []})),
        list("9", "", &["a", "b", "c"]),
        end(),
    ];
    let want = [
        "service a",
        "service b",
        "listed [\"a\", \"b\"]", // garbage
        "service a",
        "service b",
        "service c",
        "listed [\"a\", \"b\", \"c\"]",
    ];
    check(script, &want, &["list", "watch 5", "list", "list", "list", "watch 9"], &[(Trouble::Garbled, 3)]).await;
}

#[tokio::test]
async fn storms_of_410_list_and_delete_nothing() {
    let gone = || event("ERROR", &status_body(410, "Expired"));
    let mut script = Vec::new();
    let (mut want, mut requests) = (Vec::new(), Vec::new());
    for round in 0..6 {
        script.push(list("5", "", &["a", "b"]));
        script.push(if round % 2 == 0 { status(410, "Expired") } else { Answer::Watch(vec![gone()], End::Clean) });
        want.extend(["service a", "service b", "listed [\"a\", \"b\"]"]);
        requests.extend(["list", "watch 5"]);
    }
    script.extend([list("9", "", &["a", "b"]), end()]);
    want.extend(["service a", "service b", "listed [\"a\", \"b\"]"]);
    requests.extend(["list", "watch 9"]);
    check(script, &want, &requests, &[(Trouble::Expired, 6)]).await;
}

#[tokio::test]
async fn storms_of_refusals_change_nothing() {
    let mut script = Vec::new();
    script.extend((0..8).map(|_| status(429, "TooManyRequests")));
    script.extend([status(403, "Forbidden"), status(503, "ServiceUnavailable"), list("5", "", &["a"])]);
    script.extend((0..8).map(|_| status(429, "TooManyRequests")));
    script.extend([status(403, "Forbidden"), status(503, "ServiceUnavailable"), end()]);
    let requests = [vec!["list"; 11], vec!["watch 5"; 11]].concat();
    let errors = [(Trouble::Forbidden, 2), (Trouble::TooManyRequests, 16), (Trouble::Server, 2)];
    check(script, &["service a", "listed [\"a\"]"], &requests, &errors).await;
}

#[tokio::test]
async fn a_version_the_server_never_reached_is_given_up() {
    let mut script = vec![list("500", "", &["a"])];
    script.extend((0..5).map(|_| status(504, "Timeout")));
    script.extend([list("3", "", &["a"]), end()]);
    let requests = [vec!["list"], vec!["watch 500"; 5], vec!["list", "watch 3"]].concat();
    let want = ["service a", "listed [\"a\"]", "service a", "listed [\"a\"]"];
    check(script, &want, &requests, &[(Trouble::Server, 5)]).await;
}

#[tokio::test]
async fn one_object_that_cannot_be_read_keeps_its_last_version() {
    let mut broken = service("a", "6");
    broken["spec"]["ports"] = "http".into();
    let mut portless = service("b", "7");
    portless["spec"]["ports"] = json!([]);
    let script = vec![
        list("5", "", &["a", "b"]),
        Answer::Watch(vec![event("MODIFIED", &broken), event("MODIFIED", &portless)], End::Clean),
        status(410, "Expired"),
        Answer::Json(
            200,
            json!({"metadata": {"resourceVersion": "8"}, "items": [broken, portless, service("c", "8")]}),
        ),
        Answer::Watch(vec![typed("MODIFIED", "a", "9"), typed("DELETED", "b", "10")], End::Clean),
        end(),
    ];
    let want = [
        "service a",
        "service b",
        "listed [\"a\", \"b\"]",
        "findings Service default/a [\"\"]",
        "gone b",
        "findings Service default/b [\"spec.ports\"]",
        "service c",
        "listed [\"a\", \"c\"]",
        "service a",
        "findings Service default/a []",
        "findings Service default/b []",
        "gone b",
    ];
    check(script, &want, &["list", "watch 5", "watch 7", "list", "watch 8", "watch 10"], &[(Trouble::Expired, 1)])
        .await;
}

#[tokio::test]
async fn a_new_token_is_found_without_a_new_listing() {
    let added = Answer::Watch(vec![typed("ADDED", "b", "6")], End::Clean);
    let script = [list("5", "", &["a"]), Answer::Rotate("third", Box::new(added)), end()];
    let server = Server::start(script, "second").await;
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("kubeconfig");
    let write = |token: &str| {
        let text = json!({
            "apiVersion": "v1", "kind": "Config", "current-context": "c",
            "clusters": [{"name": "k", "cluster": {"server": server.url}}],
            "users": [{"name": "u", "user": {"token": token}}],
            "contexts": [{"name": "c", "context": {"cluster": "k", "user": "u"}}],
        });
        fs::write(&path, text.to_string()).unwrap();
    };
    write("first");
    let config = KubeConfig { kubeconfig: Some(path.clone()), timing: TIMING, ..KubeConfig::default() };
    let (tx, events) = channel(16);
    let source = k8s::spawn(SourceConfig::Kube(config), "n1", tx).await.unwrap();
    let mut agent = Agent { events, source, _account: tempfile::tempdir().unwrap() };

    // Refused before the first listing, and nothing told of it.
    agent.refused(3).await;
    assert!(agent.events.try_recv().is_err());
    assert_eq!(server.requests(), [""; 0]);
    write("second");
    // Refused between two requests of a watch.
    let watching = async {
        while server.requests().len() < 2 {
            tokio::task::yield_now().await;
        }
    };
    timeout(DEADLINE, watching).await.unwrap();
    let already = agent.source.metrics().services.errors(Trouble::Unauthorized);
    agent.refused(already + 3).await;
    assert_eq!(server.requests(), ["list", "watch 5"]);
    write("third");
    assert_eq!(agent.until_end().await, ["service a", "listed [\"a\"]", "service b"]);
    assert_eq!(server.requests(), ["list", "watch 5", "watch 6"]);
    assert!(agent.errors().iter().all(|(trouble, _)| *trouble == Trouble::Unauthorized), "{:?}", agent.errors());
}

#[tokio::test]
async fn another_server_takes_over_without_a_new_listing() {
    // Nobody listens on the first one. The second one dies in mid-watch, the third one goes on from there.
    let nobody = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let first = format!("http://{}", nobody.local_addr().unwrap());
    drop(nobody);
    let second =
        Server::start([list("5", "", &["a"]), Answer::Watch(vec![typed("ADDED", "b", "6")], End::Open)], "").await;
    let third =
        Server::start([Answer::Watch(vec![typed("ADDED", "c", "7"), typed("ADDED", "end", "8")], End::Open)], "").await;
    let mut agent = agent(&[&first, &second.url, &third.url]).await;
    let told_of_b = async {
        let mut shown = Vec::new();
        while shown.last().is_none_or(|event| event != "b") {
            if let Some(Event::Service(service)) = agent.events.recv().await {
                shown.push(service.name.name.to_string());
            }
        }
        shown
    };
    assert_eq!(timeout(DEADLINE, told_of_b).await.unwrap(), ["a", "b"]);
    let Server { requests, tasks, .. } = second;
    drop(tasks);
    assert_eq!(agent.until_end().await, ["service c"]);
    assert_eq!(*requests.lock().unwrap(), ["list", "watch 5"]);
    assert_eq!(third.requests(), ["watch 6"]);
}

/// Whether an error is the right one.
type Right = fn(&SourceError) -> bool;

#[tokio::test]
async fn what_cannot_be_verified_is_refused() {
    let folder = account();
    let kubeconfig = |name: &str, cluster: Value| -> PathBuf {
        let path = folder.path().join(name);
        let text = json!({
            "apiVersion": "v1", "kind": "Config", "current-context": "c",
            "clusters": [{"name": "k", "cluster": cluster}],
            "contexts": [{"name": "c", "context": {"cluster": "k", "user": "u"}}],
        });
        fs::write(&path, text.to_string()).unwrap();
        path
    };
    let server = "https://127.0.0.1:1";
    let plain = KubeConfig { service_account: folder.path().to_owned(), ..KubeConfig::default() };
    let file = |path: PathBuf| KubeConfig { kubeconfig: Some(path), ..plain.clone() };
    let servers =
        |urls: &[&str]| KubeConfig { apiservers: urls.iter().map(|&url| url.to_owned()).collect(), ..plain.clone() };
    let insecure = kubeconfig("insecure", json!({"server": server, "insecure-skip-tls-verify": true}));
    let proxied = kubeconfig("proxied", json!({"server": server, "proxy-url": "http://10.0.0.1:3128"}));
    let open = kubeconfig("open", json!({"server": "http://10.0.0.1:8080"}));
    let no_authority = kubeconfig("no-authority", json!({"server": server, "certificate-authority": "absent.crt"}));
    let rows: [(KubeConfig, Right); 9] = [
        (file(insecure), |error| matches!(error, SourceError::Unverified { .. })),
        (file(proxied), |error| matches!(error, SourceError::HttpProxy { .. })),
        (file(open), |error| matches!(error, SourceError::PlainText { .. })),
        (file(no_authority), |error| matches!(error, SourceError::Kubeconfig { .. })),
        (file(folder.path().join("absent")), |error| matches!(error, SourceError::Kubeconfig { .. })),
        (servers(&["http://10.0.0.1:8080"]), |error| matches!(error, SourceError::PlainText { .. })),
        (servers(&["http://127.0.0.1:1", "http://10.0.0.1:1"]), |error| matches!(error, SourceError::PlainText { .. })),
        (servers(&["10.0.0.1:6443"]), |error| matches!(error, SourceError::ServerUrl { .. })),
        // No ca.crt beside the token.
        (servers(&[server]), |error| matches!(error, SourceError::ServiceAccount { .. })),
    ];
    for (config, right) in rows {
        let shown = format!("{config:?}");
        let error = k8s::spawn(SourceConfig::Kube(config), "n1", channel(1).0).await.expect_err(&shown);
        assert!(right(&error), "{shown}: {error:?}");
    }
    fs::write(folder.path().join("ca.crt"), "no certificate").unwrap();
    let error = k8s::spawn(SourceConfig::Kube(servers(&[server])), "n1", channel(1).0).await.unwrap_err();
    assert!(matches!(error, SourceError::CertificateAuthority { .. }), "{error:?}");
}
