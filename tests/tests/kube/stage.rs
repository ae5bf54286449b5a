//! What every test of the API needs.

use std::collections::BTreeSet;
use std::net::SocketAddr;
use std::sync::mpsc::{self, RecvTimeoutError, Sender};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use proxy_tests::address::service_cidr;
use proxy_tests::agent::find_binary;
use proxy_tests::cluster::{Cluster, ClusterSpec};
use proxy_tests::kube_manifest::{documents, of_kind};
use proxy_tests::kube_server::KubeServer;
use proxy_tests::kube_server::account::{Account, Mounted};
use proxy_tests::manifests::{Endpoint, EndpointSlice, Object, Service, ServicePort};
use proxy_tests::scenario::views::ServiceRow;
use proxy_tests::{Agent, AgentOptions, Deadline, Family, Node};
use serde::Deserialize;
use serde_json::{Value, json};

/// For a change to go from the API into a map, after whatever had to be waited out first.
pub(crate) const ARRIVES: Duration = Duration::from_secs(90);
/// Between two looks of a [`Vigil`].
const VIGIL: Duration = Duration::from_millis(20);
/// Port of every Service, and of the servers behind them.
pub(crate) const PORT: u16 = 80;
pub(crate) const TARGET_PORT: u16 = 8080;

/// A cluster with a control plane that has its Nodes and the objects of `deploy/rbac.yaml`.
pub(crate) struct Stage {
    // Dropped in this order.
    pub(crate) server: KubeServer,
    pub(crate) cluster: Cluster,
}

impl Stage {
    pub(crate) fn build(spec: &ClusterSpec) -> Self {
        let cluster = spec.build().expect("cluster");
        let server = KubeServer::start(&cluster).expect("control plane");
        let stage = Self { server, cluster };
        for node in stage.cluster.nodes() {
            stage.create(&node.to_json());
        }
        stage.wait_system_objects();
        for object in documents("rbac.yaml").expect("deploy/rbac.yaml") {
            stage.create(&object);
        }
        stage.wait_granted(&deployed_account(), "watch", "services");
        stage
    }

    /// The API server judges by copies of roles and bindings, which come a moment after it has taken the objects. A role has all
    /// of its rights at once, so one tells of them all.
    fn wait_granted(&self, account: &Account, verb: &str, resource: &str) {
        let asked = json!({ "user": account.user(), "resourceAttributes": { "verb": verb, "resource": resource } });
        let review = json!({
            "apiVersion": "authorization.k8s.io/v1", "kind": "SubjectAccessReview", "metadata": {}, "spec": asked,
        });
        let granted = || self.create(&review)["status"]["allowed"] == true;
        Deadline::after(ARRIVES).until("the rights of the account", granted).expect("granted");
    }

    /// The API server makes namespaces and its own Service a moment after it is ready.
    fn wait_system_objects(&self) {
        let paths = ["/api/v1/namespaces/kube-system", "/api/v1/namespaces/default/services/kubernetes"];
        let there = || paths.iter().all(|path| self.server.client().get(path).is_ok());
        Deadline::secs(30).until("namespaces and the Service `kubernetes`", there).expect("made by the API server");
    }

    pub(crate) fn node(&self, index: usize) -> &Node {
        &self.cluster.nodes()[index]
    }

    pub(crate) fn create(&self, object: &Value) -> Value {
        self.server.client().create(object).expect("created")
    }

    pub(crate) fn apply(&self, object: &impl Object) -> Value {
        self.server.client().apply(&object.to_json()).expect("applied")
    }

    pub(crate) fn delete(&self, object: &impl Object) {
        self.server.client().delete(&object.to_json()).expect("deleted");
    }

    /// A Service with one endpoint in each of its families.
    pub(crate) fn publish(&self, service: &Service) {
        self.apply(service);
        for ip in &service.cluster_ips {
            self.apply(&slice(service, Family::of(*ip), "", &[20]));
        }
    }

    /// Starts the agent of a node with the ServiceAccount of `deploy/`, its token mounted, and waits until it is
    /// healthy.
    pub(crate) fn start(&self, node: usize) -> Agent {
        let account = deployed_account();
        let token = account.token(&self.server, None).expect("token");
        let name = format!("account-{}", self.node(node).name());
        let mounted = Mounted::new(&self.server, &name, &token).expect("folder of the account");
        Agent::start(self.node(node), quiet(mounted.options(&self.server.url()))).expect("healthy")
    }

    /// `service list` of a node.
    pub(crate) fn services(agent: &Agent) -> BTreeSet<ServiceRow> {
        parse(&agent.cli(&["service", "list", "-o", "json"]).expect("service list"))
    }

    /// Waits until `service list` has these rows for Services whose name begins with `prefix`.
    pub(crate) fn wait_rows(agent: &Agent, prefix: &str, rows: &[ServiceRow]) {
        let expected: BTreeSet<ServiceRow> = rows.iter().cloned().collect();
        let mut seen = BTreeSet::new();
        let arrived = Deadline::after(ARRIVES).until("rows of `service list`", || {
            seen = named(Self::services(agent), prefix);
            seen == expected
        });
        assert!(arrived.is_ok(), "`service list` has {seen:#?}, not {expected:#?}; log:\n{}", agent.log_text());
    }

    /// Waits until a line of the agent's log after the first `skip` lines has all of these words, and returns it.
    pub(crate) fn wait_logged(agent: &Agent, skip: usize, words: &[&str]) -> String {
        let found = Deadline::after(ARRIVES).poll("line of the log", || {
            let log = agent.log_text();
            let line = log.lines().skip(skip).find(|line| words.iter().all(|word| line.contains(word)));
            Ok(line.map(str::to_owned))
        });
        found.unwrap_or_else(|_| panic!("no line with {words:?} in\n{}", agent.log_text()))
    }

    /// A Service comes, with its endpoint: shows that the agent follows the API.
    pub(crate) fn check_follows(&self, agent: &Agent, name: &str, host: u16) {
        let service = dual(name, host);
        self.publish(&service);
        Self::wait_rows(agent, &format!("default/{name}:"), &rows(&service, &[20]));
    }
}

/// Agents that do not touch the machine's own sockets.
pub(crate) fn quiet(options: AgentOptions) -> AgentOptions {
    AgentOptions { ready_within: ARRIVES, ..options }.args(["--cgroup", "none"])
}

/// The ServiceAccount of `deploy/rbac.yaml`.
pub(crate) fn deployed_account() -> Account {
    let documents = documents("rbac.yaml").expect("deploy/rbac.yaml");
    let metadata = &of_kind(&documents, "ServiceAccount").expect("one")["metadata"];
    let text = |field: &str| metadata[field].as_str().expect("a text").to_owned();
    Account { namespace: text("namespace"), name: text("name") }
}

/// A dual-stack Service on TCP and UDP with the addresses of this number.
pub(crate) fn dual(name: &str, host: u16) -> Service {
    let ips = Family::BOTH.map(|family| service_cidr(family).host(host));
    Service::new(
        name,
        &ips,
        vec![ServicePort::tcp("tcp", PORT, TARGET_PORT), ServicePort::udp("udp", PORT, TARGET_PORT)],
    )
}

/// A slice of a Service with these hosts of a network in which nobody is.
pub(crate) fn slice(service: &Service, family: Family, suffix: &str, hosts: &[u16]) -> EndpointSlice {
    let mut slice = service.slice(family, &[]);
    slice.name += suffix;
    slice.endpoints = hosts.iter().map(|&host| Endpoint::at(backend(family, host).ip())).collect();
    slice
}

/// The endpoint of this number.
fn backend(family: Family, host: u16) -> SocketAddr {
    SocketAddr::new(proxy_tests::address::pod_cidr(family, 77).host(host), TARGET_PORT)
}

/// What `service list` says about a Service with these endpoints in each family.
pub(crate) fn rows(service: &Service, hosts: &[u16]) -> Vec<ServiceRow> {
    let of_ip = service.cluster_ips.iter().flat_map(|&ip| {
        service.ports.iter().map(move |port| ServiceRow {
            service: Some(format!("{}/{}:{}", service.namespace, service.name, port.name)),
            address: SocketAddr::new(ip, port.port),
            protocol: port.protocol.clone(),
            selected: hosts.len() as u64,
            backends: hosts.iter().map(|&host| backend(Family::of(ip), host)).collect(),
        })
    });
    of_ip.collect()
}

/// Rows of Services whose name begins so.
fn named(rows: BTreeSet<ServiceRow>, prefix: &str) -> BTreeSet<ServiceRow> {
    rows.into_iter().filter(|row| is_of(row, prefix)).collect()
}

/// Whether a row is of a Service whose name begins so.
pub(crate) fn is_of(row: &ServiceRow, prefix: &str) -> bool {
    row.service.as_deref().is_some_and(|name| name.starts_with(prefix))
}

fn parse(text: &str) -> BTreeSet<ServiceRow> {
    #[derive(Deserialize)]
    struct Listing {
        items: BTreeSet<ServiceRow>,
    }
    serde_json::from_str::<Listing>(text).expect("`service list -o json`").items
}

/// A patch of labels; `null` removes one.
pub(crate) fn label(name: &str, value: &Value) -> Value {
    json!({ "metadata": { "labels": { name: value } } })
}

/// Looks at `service list` all the time: rows that are there at the start must be there at every look, unchanged.
pub(crate) struct Vigil {
    stop: Sender<()>,
    watcher: JoinHandle<Result<u64, String>>,
}

impl Vigil {
    /// Over the rows of Services whose name begins so; there must be some.
    pub(crate) fn start(node: &Node, agent: &Agent, prefix: &str) -> Self {
        let kept = named(Stage::services(agent), prefix);
        assert!(!kept.is_empty(), "nothing to keep an eye on");
        let (netns, pins) = (node.netns().clone(), agent.pin_root().display().to_string());
        let binary = find_binary().expect("the agent").display().to_string();
        let (stop, stopped) = mpsc::channel();
        let watcher = thread::spawn(move || {
            let mut looks = 0;
            loop {
                let text = netns.output(&binary, &["service", "list", "-o", "json", "--pin-root", &pins]);
                let there = parse(&text.map_err(|error| error.to_string())?);
                if let Some(lost) = kept.iter().find(|row| !there.contains(row)) {
                    return Err(format!("look {looks}: {lost:?} is no more; there is {there:#?}"));
                }
                looks += 1;
                if stopped.recv_timeout(VIGIL) != Err(RecvTimeoutError::Timeout) {
                    return Ok(looks);
                }
            }
        });
        Self { stop, watcher }
    }

    /// Ends it; there must have been so many looks at least.
    pub(crate) fn end(self, at_least: u64) {
        // It has ended already when it saw something.
        let _ = self.stop.send(());
        let looks = self.watcher.join().expect("the watcher").unwrap_or_else(|lost| panic!("{lost}"));
        assert!(looks >= at_least, "only {looks} looks");
    }
}
