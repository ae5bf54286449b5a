//! Discovery in real network namespaces. Needs root; makes namespaces of its own, and removes them.

use std::collections::{BTreeMap, BTreeSet};
use std::ffi::OsStr;
use std::fs::File;
use std::net::IpAddr;
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::time::Duration;

use nix::sched::{CloneFlags, setns};
use proxy_agent::node::binding::Previous;
use proxy_agent::node::classify::Role;
use proxy_agent::node::cni::{Attachment, HostInterface, Records};
use proxy_agent::node::{Config, Handle, Inputs, NodeDevices, spawn};
use proxy_core::diagnostic::Diagnostic;
use proxy_core::event::{Event, LinkPath, Listing, NetDevice, Node, PodLink, Source};
use proxy_core::name::ObjectName;
use tokio::runtime::Runtime;
use tokio::sync::{mpsc, watch};
use tokio::time::{Instant, timeout_at};

const DEADLINE: Duration = Duration::from_secs(30);

/// Numbers the namespaces of this process.
static NEXT: AtomicU32 = AtomicU32::new(0);

fn run(line: &str) {
    run_words(&line.split_whitespace().collect::<Vec<_>>());
}

fn run_words(words: &[&str]) {
    let output = Command::new(words[0]).args(&words[1..]).output().unwrap();
    assert!(output.status.success(), "{words:?}: {}", String::from_utf8_lossy(&output.stderr));
}

/// A network namespace, removed when dropped.
struct Namespace(String);

impl Namespace {
    fn new() -> Self {
        assert!(nix::unistd::geteuid().is_root(), "these tests make network namespaces: run them as root");
        let name = format!("node-{}-{}", std::process::id(), NEXT.fetch_add(1, Ordering::Relaxed));
        run(&format!("ip netns add {name}"));
        Self(name)
    }

    fn ip(&self, line: &str) {
        run(&format!("ip -n {} {line}", self.0));
    }

    fn tc(&self, line: &str) {
        run(&format!("tc -n {} {line}", self.0));
    }
}

impl Drop for Namespace {
    fn drop(&mut self) {
        // Nothing can be done about a failure here, and the next line of the test's output tells of it.
        drop(Command::new("ip").args(["netns", "del", &self.0]).status());
    }
}

/// A node with a pod bridge, before the agent runs on it.
struct Host {
    ns: Namespace,
}

impl Host {
    fn new() -> Self {
        let host = Self { ns: Namespace::new() };
        host.ns.ip("link set lo up");
        host.bridge("cni0", &["10.1.0.1/24", "fd00:1::1/64"]);
        host
    }

    fn bridge(&self, name: &str, addresses: &[&str]) {
        self.ns.ip(&format!("link add {name} type bridge"));
        self.ns.ip(&format!("link set {name} up"));
        for address in addresses {
            self.ns.ip(&format!("addr add {address} dev {name}{}", if address.contains(':') { " nodad" } else { "" }));
        }
    }

    /// As the bridge plugin does: pair, host end up, enslaved, then the addresses.
    fn pod(&self, veth: &str, bridge: &str, addresses: &[&str]) -> Namespace {
        let pod = Namespace::new();
        self.ns.ip(&format!("link add {veth} type veth peer name eth0 netns {}", pod.0));
        self.ns.ip(&format!("link set {veth} up master {bridge}"));
        add(&pod, addresses);
        pod
    }
}

fn add(pod: &Namespace, addresses: &[&str]) {
    for address in addresses {
        pod.ip(&format!("addr add {address} dev eth0{}", if address.contains(':') { " nodad" } else { "" }));
    }
    pod.ip("link set eth0 up");
}

/// What is to be told to discovery, with its defaults.
struct Setup {
    config: Config,
    node: Node,
    previous: BTreeMap<IpAddr, Previous>,
    capacity: usize,
}

impl Default for Setup {
    fn default() -> Self {
        let (config, node) = (Config::default(), Node::default());
        Self { config, node, previous: BTreeMap::new(), capacity: 64 }
    }
}

/// Discovery at work, and what it has told.
struct Agent {
    runtime: Runtime,
    events: mpsc::Receiver<Event>,
    handle: Handle,
    node: watch::Sender<Node>,
    foreign: Arc<AtomicBool>,
    records: watch::Sender<Records>,
    links: BTreeMap<u32, PodLink>,
    devices: BTreeMap<u32, NetDevice>,
    /// Sets that have been told as complete.
    listed: Vec<BTreeSet<u32>>,
    findings: BTreeMap<String, Vec<Diagnostic>>,
    /// Addresses of each interface at each event about it.
    history: Vec<(String, Vec<IpAddr>)>,
}

impl Agent {
    fn start(host: &Host, setup: Setup) -> Self {
        let Setup { config, node, previous, capacity } = setup;
        let (node, node_input) = watch::channel(node);
        let (records, records_input) = watch::channel(Records::default());
        let (sender, events) = mpsc::channel(capacity);
        let foreign = Arc::new(AtomicBool::new(false));
        let present = Arc::clone(&foreign);
        let inputs = Inputs {
            node: node_input,
            records: records_input,
            previous,
            foreign_tcx: Box::new(move |_: u32| present.load(Ordering::Relaxed)),
        };
        let path = format!("/run/netns/{}", host.ns.0);
        let in_namespace = move || {
            setns(File::open(path).unwrap(), CloneFlags::CLONE_NEWNET).unwrap();
            spawn(config, inputs, sender).unwrap()
        };
        Self {
            runtime: tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap(),
            events,
            handle: std::thread::spawn(in_namespace).join().unwrap(),
            node,
            foreign,
            records,
            links: BTreeMap::new(),
            devices: BTreeMap::new(),
            listed: Vec::new(),
            findings: BTreeMap::new(),
            history: Vec::new(),
        }
    }

    fn take(&mut self, event: Event) {
        match event {
            Event::Link(link) => {
                assert_ne!(self.links.get(&link.ifindex), Some(&link), "told twice");
                self.history.push((link.name.to_string(), link.addresses.clone()));
                self.links.insert(link.ifindex, link);
            }
            Event::LinkGone(index) => assert!(self.links.remove(&index).is_some(), "unknown {index} is gone"),
            Event::Diagnostics { object, findings } if findings.is_empty() => {
                assert!(self.findings.remove(&object).is_some(), "{object} was well before");
            }
            Event::Diagnostics { object, findings } => {
                self.findings.insert(object, findings);
            }
            Event::Device(device) => {
                assert_ne!(self.devices.get(&device.ifindex), Some(&device), "told twice");
                self.devices.insert(device.ifindex, device);
            }
            Event::DeviceGone(index) => assert!(self.devices.remove(&index).is_some(), "unknown {index} is gone"),
            Event::Listed(Source::Links, Listing::Links(set)) => {
                let told: BTreeSet<u32> = self.links.keys().chain(self.devices.keys()).copied().collect();
                assert_eq!(set, told, "what is listed is what was told");
                self.listed.push(self.links.keys().copied().collect());
            }
            other => panic!("{other:?}"),
        }
        let all: Vec<_> = self.links.values().flat_map(|link| &link.addresses).collect();
        assert_eq!(all.len(), all.iter().collect::<BTreeSet<_>>().len(), "an address is on two interfaces");
    }

    /// Takes events until something holds.
    fn until(&mut self, what: &str, holds: impl Fn(&Self) -> bool) {
        let deadline = Instant::now() + DEADLINE;
        while !holds(self) {
            let received = self.runtime.block_on(async { timeout_at(deadline, self.events.recv()).await });
            let Ok(event) = received else {
                panic!("not within {DEADLINE:?}: {what}; {:#?} {:#?}", self.links, self.findings);
            };
            match event {
                Some(event) => self.take(event),
                None => panic!("discovery ended: {:?}", self.runtime.block_on(self.handle.ended())),
            }
        }
    }

    fn until_listed(&mut self) {
        self.until("the first listing", |agent| !agent.listed.is_empty());
    }

    fn link(&self, name: &str) -> Option<&PodLink> {
        self.links.values().find(|link| &*link.name == name)
    }

    fn has(&self, name: &str, addresses: &[&str]) -> bool {
        let expected: Vec<IpAddr> = addresses.iter().map(|ip| ip.parse().unwrap()).collect();
        self.link(name).is_some_and(|link| link.addresses == expected)
    }

    fn path(&self, name: &str) -> Option<LinkPath> {
        self.link(name).map(|link| link.path)
    }

    fn problems(&self, name: &str) -> Vec<String> {
        let findings = self.findings.get(&format!("Link {name}"));
        findings.into_iter().flatten().map(|finding| finding.problem.clone()).collect()
    }
}

/// A record of an interface, under a file name of its own.
fn record(veth: &str, uid: &str, addresses: &[&str]) -> (Arc<OsStr>, Arc<Attachment>) {
    let attachment = Attachment {
        pod: ObjectName::new("default", uid),
        uid: uid.into(),
        host: vec![HostInterface { name: "cni0".into(), mac: None }, HostInterface { name: veth.into(), mac: None }],
        addresses: addresses.iter().map(|ip| ip.parse().unwrap()).collect(),
    };
    (OsStr::new(uid).into(), Arc::new(attachment))
}

fn node_with_cidrs(cidrs: &[&str]) -> Node {
    Node { pod_cidrs: cidrs.iter().map(|cidr| cidr.parse().unwrap()).collect(), ..Node::default() }
}

fn devices(devices: &NodeDevices) -> Vec<(&str, Role, Vec<String>)> {
    let line = |d: &'_ proxy_agent::node::NodeDevice| d.addresses.iter().map(ToString::to_string).collect::<Vec<_>>();
    devices.devices.iter().map(|device| (&*device.name, device.role, line(device))).collect()
}

#[test]
fn a_node_that_is_there_already() {
    let host = Host::new();
    let outside = Namespace::new();
    host.ns.ip(&format!("link add eth0 type veth peer name to-node netns {}", outside.0));
    host.ns.ip("addr add 192.168.7.2/24 dev eth0");
    host.ns.ip("link set eth0 up");
    outside.ip("link set to-node up");
    host.ns.ip("route add default via 192.168.7.1");
    host.ns.ip("link add flannel.1 type vxlan id 1 dstport 8472 dev eth0");
    host.ns.ip("addr add 10.1.0.0/32 dev flannel.1");
    host.ns.ip("link set flannel.1 up");
    host.bridge("docker0", &["172.17.0.1/16"]);
    let _container = host.pod("veth-c", "docker0", &["172.17.0.2/16"]);
    let pod = host.pod("veth-a", "cni0", &["10.1.0.10/24", "fd00:1::a/64"]);
    pod.ip("link set eth0 address 02:00:00:00:0a:0a");
    host.ns.ip("link set cni0 address 02:00:00:00:00:01");
    let _routed = {
        let pod = Namespace::new();
        host.ns.ip(&format!("link add veth-r type veth peer name eth0 netns {}", pod.0));
        host.ns.ip("addr add 10.1.0.1/32 dev veth-r");
        host.ns.ip("link set veth-r up");
        add(&pod, &["10.1.0.11/32"]);
        host.ns.ip("route add 10.1.0.11/32 dev veth-r");
        pod
    };

    let node = node_with_cidrs(&["10.1.0.0/24", "fd00:1::/64"]);
    let mut agent = Agent::start(&host, Setup { node, ..Setup::default() });
    agent.until_listed();
    let names: BTreeSet<_> = agent.links.values().map(|link| link.name.to_string()).collect();
    assert_eq!(names, ["veth-a", "veth-r"].map(str::to_owned).into());
    let link = agent.link("veth-a").unwrap();
    let told =
        format!("{} {} {:?} {:?} {:?}", link.pod_mac, link.gateway_mac, link.addresses, link.gateways, link.path);
    assert_eq!(told, "02:00:00:00:0a:0a 02:00:00:00:00:01 [10.1.0.10, fd00:1::a] [10.1.0.1, fd00:1::1] Redirect");
    assert!(agent.has("veth-r", &["10.1.0.11"]), "{:?}", agent.links);
    assert_eq!(agent.link("veth-r").unwrap().bridge, 0);
    assert_eq!(agent.listed.len(), 1);
    assert_eq!(agent.findings, BTreeMap::new());

    let snapshot = agent.handle.devices().borrow().clone();
    let found: BTreeSet<_> = devices(&snapshot).into_iter().collect();
    let expected: BTreeSet<(&str, Role, Vec<String>)> = [
        ("lo", Role::Loopback, vec![]),
        ("cni0", Role::PodBridge, vec!["10.1.0.1/24", "fd00:1::1/64"]),
        ("docker0", Role::Bridge, vec!["172.17.0.1/16"]),
        ("eth0", Role::Uplink, vec!["192.168.7.2/24"]),
        ("flannel.1", Role::Tunnel, vec!["10.1.0.0/32"]),
        ("veth-a", Role::Pod, vec![]),
        ("veth-c", Role::Port, vec![]),
        ("veth-r", Role::Pod, vec!["10.1.0.1/32"]),
    ]
    .into_iter()
    .map(|(name, role, addresses)| (name, role, addresses.into_iter().map(str::to_owned).collect()))
    .collect();
    assert!(found.is_superset(&expected), "{found:#?}");
}

#[test]
fn pod_ranges_that_come_to_be_known_later() {
    let host = Host::new();
    host.bridge("docker0", &["172.17.0.1/16"]);
    let _container = host.pod("veth-c", "docker0", &["172.17.0.2/16"]);
    let _pod = host.pod("veth-a", "cni0", &["10.1.0.10/24"]);
    let mut agent = Agent::start(&host, Setup::default());
    agent.until_listed();
    assert!(agent.has("veth-a", &["10.1.0.10"]) && agent.has("veth-c", &["172.17.0.2"]));
    agent.node.send_replace(node_with_cidrs(&["10.1.0.0/24"]));
    agent.until("the container is none of ours", |agent| agent.link("veth-c").is_none());
    assert!(agent.has("veth-a", &["10.1.0.10"]));
    drop(agent);

    let config = Config { pod_bridges: vec!["dock*".parse().unwrap()], ..Config::default() };
    let node = node_with_cidrs(&["10.1.0.0/24"]);
    let mut agent = Agent::start(&host, Setup { config, node, ..Setup::default() });
    agent.until_listed();
    assert!(agent.has("veth-c", &["172.17.0.2"]) && agent.link("veth-a").is_none());
}

#[test]
fn fifty_pods_are_plugged_and_unplugged() {
    let host = Host::new();
    let mut agent = Agent::start(&host, Setup::default());
    agent.until_listed();
    let name = |n: usize| format!("veth{n}");
    let mut pods = Vec::new();
    for n in 0..50 {
        pods.push(host.pod(&name(n), "cni0", &[&format!("10.1.0.{}/24", 10 + n), &format!("fd00:1::{:x}/64", 16 + n)]));
    }
    agent.until("all have their addresses", |agent| {
        (0..50).all(|n| agent.has(&name(n), &[&format!("10.1.0.{}", 10 + n), &format!("fd00:1::{:x}", 16 + n)]))
    });
    for n in 0..50 {
        host.ns.ip(&format!("link del {}", name(n)));
    }
    agent.until("all are gone", |agent| agent.links.is_empty());
    assert_eq!(agent.findings, BTreeMap::new());
}

#[test]
fn ids_of_namespaces_that_are_used_again() {
    let host = Host::new();
    let mut agent = Agent::start(&host, Setup::default());
    agent.until_listed();
    // Every new pod takes over the namespace id of one that has just gone, and all have `eth0` at one index.
    let mut living = Vec::new();
    for n in 0..60 {
        if living.len() == 3 {
            drop(living.remove(0));
        }
        living.push(host.pod(&format!("veth{n}"), "cni0", &[&format!("10.1.0.{}/24", 10 + n)]));
    }
    agent.until("the last three", |agent| {
        agent.links.len() == 3 && (57..60).all(|n| agent.has(&format!("veth{n}"), &[&format!("10.1.0.{}", 10 + n)]))
    });
    for (name, addresses) in &agent.history {
        let n: u8 = name.trim_start_matches("veth").parse().unwrap();
        assert!(addresses.iter().all(|ip| *ip == IpAddr::from([10, 1, 0, 10 + n])), "{name} had {addresses:?}");
    }
    assert_eq!(agent.findings, BTreeMap::new());
}

fn a_late_address(listen_to_peers: bool) {
    let host = Host::new();
    let config = Config { listen_to_peers, sweep: Duration::from_hours(1), ..Config::default() };
    let mut agent = Agent::start(&host, Setup { config, ..Setup::default() });
    agent.until_listed();
    let pod = host.pod("veth-a", "cni0", &[]);
    agent.until("told before it has an address", |agent| agent.has("veth-a", &[]));
    add(&pod, &["10.1.0.10/24"]);
    agent.until("the first address", |agent| agent.has("veth-a", &["10.1.0.10"]));
    add(&pod, &["fd00:1::a/64"]);
    agent.until("the other family", |agent| agent.has("veth-a", &["10.1.0.10", "fd00:1::a"]));
    if listen_to_peers {
        // Nobody looks at a pod that has all its addresses, were it not for the notification.
        pod.ip("addr del 10.1.0.10/24 dev eth0");
        agent.until("what is removed is unbound", |agent| agent.has("veth-a", &["fd00:1::a"]));
    }
}

#[test]
fn an_address_that_comes_late_is_notified() {
    a_late_address(true);
}

#[test]
fn an_address_that_comes_late_is_asked_for() {
    a_late_address(false);
}

#[test]
fn a_bridge_that_gets_its_address_after_its_first_pod() {
    let host = Host::new();
    let mut agent = Agent::start(&host, Setup::default());
    agent.until_listed();
    host.bridge("cbr1", &[]);
    let _pod = host.pod("veth-b", "cbr1", &["10.2.0.10/24"]);
    host.ns.ip("addr add 10.2.0.1/24 dev cbr1");
    agent.until("its pod", |agent| agent.has("veth-b", &["10.2.0.10"]));
}

#[test]
fn deleted_and_made_anew_under_the_same_name() {
    let host = Host::new();
    let old_pod = host.pod("veth-a", "cni0", &["10.1.0.10/24"]);
    let mut agent = Agent::start(&host, Setup::default());
    agent.until("the old one", |agent| agent.has("veth-a", &["10.1.0.10"]));
    let old = agent.link("veth-a").unwrap().ifindex;
    host.ns.ip("link del veth-a");
    drop(old_pod);
    let _pod = host.pod("veth-a", "cni0", &["10.1.0.11/24"]);
    agent.until("the new one", |agent| agent.has("veth-a", &["10.1.0.11"]));
    assert_eq!(agent.links.len(), 1);
    assert_ne!(agent.link("veth-a").unwrap().ifindex, old);
    host.ns.ip("link set veth-a nomaster");
    agent.until("it left the bridge", |agent| agent.links.is_empty());
    host.ns.ip("link set veth-a master cni0");
    agent.until("it is back", |agent| agent.has("veth-a", &["10.1.0.11"]));
    host.ns.ip("link set veth-a name veth-z");
    agent.until("it has another name", |agent| agent.has("veth-z", &["10.1.0.11"]));
}

#[test]
fn a_pod_that_adds_anothers_address_does_not_get_it() {
    let host = Host::new();
    let thief = host.pod("veth-a", "cni0", &["10.1.0.10/24"]);
    let _victim = host.pod("veth-b", "cni0", &["10.1.0.11/24"]);
    let mut agent = Agent::start(&host, Setup::default());
    agent.until_listed();
    add(&thief, &["10.1.0.11/32", "10.1.0.1/32", "192.0.2.1/32"]);
    agent.until("all are reported", |agent| agent.problems("veth-a").len() == 3);
    assert_eq!(
        agent.problems("veth-a"),
        [
            "10.1.0.1 is an address of the node",
            "10.1.0.11 was added after another address of the same family",
            "192.0.2.1 is not within the pod address ranges of this node",
        ]
    );
    assert!(agent.has("veth-a", &["10.1.0.10"]) && agent.has("veth-b", &["10.1.0.11"]));
    host.ns.ip("link del veth-b");
    agent.until("its owner is gone", |agent| agent.link("veth-b").is_none());
    let _next = host.pod("veth-d", "cni0", &["10.1.0.11/24"]);
    agent.until("the next owner has it", |agent| agent.has("veth-d", &["10.1.0.11"]));
    let stolen = |(name, addresses): &(String, Vec<IpAddr>)| {
        name == "veth-a" && *addresses != ["10.1.0.10".parse::<IpAddr>().unwrap()]
    };
    assert!(!agent.history.iter().any(stolen), "{:?}", agent.history);
    thief.ip("addr del 10.1.0.11/32 dev eth0");
    thief.ip("addr del 10.1.0.1/32 dev eth0");
    thief.ip("addr del 192.0.2.1/32 dev eth0");
    agent.until("all is well again", |agent| agent.findings.is_empty());
}

#[test]
fn of_two_with_one_address_the_one_in_the_maps_has_it() {
    let host = Host::new();
    let _older = host.pod("veth-a", "cni0", &["10.1.0.10/24"]);
    let younger = host.pod("veth-b", "cni0", &["10.1.0.10/24"]);
    younger.ip("link set eth0 address 02:00:00:00:0b:0b");
    let mut agent = Agent::start(&host, Setup::default());
    agent.until("the second is reported", |agent| !agent.problems("veth-b").is_empty());
    assert!(agent.has("veth-a", &["10.1.0.10"]) && agent.has("veth-b", &[]));
    assert_eq!(agent.problems("veth-b"), ["10.1.0.10 is also on veth-a, which had it first and keeps it"]);
    let link = agent.link("veth-b").unwrap();
    let entry = Previous { ifindex: link.ifindex, mac: link.pod_mac };
    drop(agent);

    let previous = BTreeMap::from([("10.1.0.10".parse().unwrap(), entry)]);
    let mut agent = Agent::start(&host, Setup { previous, ..Setup::default() });
    agent.until("the first is reported", |agent| !agent.problems("veth-a").is_empty());
    assert!(agent.has("veth-a", &[]) && agent.has("veth-b", &["10.1.0.10"]));
    host.ns.ip("link del veth-b");
    agent.until("it is handed over", |agent| agent.has("veth-a", &["10.1.0.10"]));
}

#[test]
fn notifications_that_are_lost_lead_to_a_new_listing() {
    let host = Host::new();
    // Nobody takes the events: discovery waits with the first pods, and its socket holds a handful of notifications.
    let config = Config { receive_buffer: 4_096, sweep: Duration::from_hours(1), ..Config::default() };
    let mut agent = Agent::start(&host, Setup { config, capacity: 1, ..Setup::default() });
    let name = |n: usize| format!("veth{n}");
    let pods: Vec<_> = (0..50).map(|n| host.pod(&name(n), "cni0", &[&format!("10.1.0.{}/24", 10 + n)])).collect();
    for n in 0..25 {
        host.ns.ip(&format!("link del {}", name(n)));
    }
    agent.until("two listings", |agent| agent.listed.len() >= 2);
    agent.until("what is there", |agent| {
        agent.links.len() == 25 && (25..50).all(|n| agent.has(&name(n), &[&format!("10.1.0.{}", 10 + n)]))
    });
    drop(pods);
}

#[test]
fn what_keeps_ports_apart_is_respected() {
    let host = Host::new();
    let _a = host.pod("veth-a", "cni0", &["10.1.0.10/24"]);
    let _b = host.pod("veth-b", "cni0", &["10.1.0.11/24"]);
    // Flags of bridge ports and bridges send notifications: no sweep is needed.
    let config = Config { sweep: Duration::from_hours(1), ..Config::default() };
    let mut agent = Agent::start(&host, Setup { config, ..Setup::default() });
    agent.until_listed();
    let paths = |agent: &Agent| [agent.path("veth-a").unwrap(), agent.path("veth-b").unwrap()];
    assert_eq!(paths(&agent), [LinkPath::Redirect, LinkPath::Redirect]);
    host.ns.ip("link set veth-a type bridge_slave isolated on");
    agent.until("isolated", |agent| paths(agent) == [LinkPath::Stack, LinkPath::Redirect]);
    let filtering = ["-n", &host.ns.0, "link", "set", "cni0", "type", "bridge", "vlan_filtering", "1"];
    if Command::new("ip").args(filtering).status().unwrap().success() {
        agent.until("filtering", |agent| paths(agent) == [LinkPath::Stack, LinkPath::Stack]);
        host.ns.ip("link set cni0 type bridge vlan_filtering 0");
    } else {
        eprintln!("left out: this kernel is built without CONFIG_BRIDGE_VLAN_FILTERING");
    }
    host.ns.ip("link set veth-a type bridge_slave isolated off");
    agent.until("as before", |agent| paths(agent) == [LinkPath::Redirect, LinkPath::Redirect]);
}

#[test]
fn programs_of_somebody_else_are_respected() {
    let host = Host::new();
    let _a = host.pod("veth-a", "cni0", &["10.1.0.10/24"]);
    let _b = host.pod("veth-b", "cni0", &["10.1.0.11/24"]);
    let _c = host.pod("veth-c", "cni0", &["10.1.0.12/24"]);
    // As the bandwidth plugin does, before the agent is there.
    host.ns.tc("qdisc add dev veth-b ingress");
    host.ns
        .tc("filter add dev veth-b parent ffff: protocol all u32 match u32 0 0 action mirred egress redirect dev lo");
    // A queueing discipline without filters is no reason.
    host.ns.tc("qdisc add dev veth-c clsact");
    let config = Config { sweep: Duration::from_hours(1), ..Config::default() };
    let mut agent = Agent::start(&host, Setup { config, ..Setup::default() });
    agent.until_listed();
    let paths = |agent: &Agent| ["veth-a", "veth-b", "veth-c"].map(|name| agent.path(name).unwrap());
    assert_eq!(paths(&agent), [LinkPath::Redirect, LinkPath::Switch, LinkPath::Redirect]);
    host.ns.tc("qdisc add dev veth-a clsact");
    for (veth, list) in [("veth-a", "egress"), ("veth-c", "ingress")] {
        let program = ["filter", "add", "dev", veth, list, "bpf", "bytecode", "1,6 0 0 0,"];
        run_words(&[&["tc", "-n", &host.ns.0][..], &program].concat());
    }
    agent.until("three", |agent| paths(agent) == [LinkPath::Switch; 3]);
    host.ns.tc("filter del dev veth-a egress");
    host.ns.tc("qdisc del dev veth-b ingress");
    agent.until("one", |agent| paths(agent) == [LinkPath::Redirect, LinkPath::Redirect, LinkPath::Switch]);
    drop(agent);

    let config = Config { sweep: Duration::from_millis(50), ..Config::default() };
    let mut agent = Agent::start(&host, Setup { config, ..Setup::default() });
    agent.until_listed();
    agent.foreign.store(true, Ordering::Relaxed);
    agent.until("tcx programs", |agent| paths(agent) == [LinkPath::Switch; 3]);
    agent.foreign.store(false, Ordering::Relaxed);
    agent.until("none", |agent| paths(agent) == [LinkPath::Redirect, LinkPath::Redirect, LinkPath::Switch]);
}

#[test]
fn records_say_whose_interface_it_is_and_what_is_its_own() {
    let host = Host::new();
    let mut agent = Agent::start(&host, Setup::default());
    agent.until_listed();
    let pod_of = |agent: &Agent, name: &str| agent.link(name).and_then(|link| link.pod.as_deref().map(str::to_owned));
    let a = host.pod("veth-a", "cni0", &["10.1.0.10/24"]);
    agent.until("an interface without a record", |agent| agent.has("veth-a", &["10.1.0.10"]));
    assert_eq!(pod_of(&agent, "veth-a"), None);

    // The pod has taken another address before its record came: what the record says counts from then on.
    agent.records.send_modify(|records| records.attachments.extend([record("veth-a", "u-a", &["10.1.0.11"])]));
    agent.until("the record", |agent| pod_of(agent, "veth-a").as_deref() == Some("u-a") && agent.has("veth-a", &[]));
    agent.until("why", |agent| agent.problems("veth-a") == ["10.1.0.10 was not given to this pod by the CNI"]);
    add(&a, &["10.1.0.11/24"]);
    agent.until("its own address", |agent| agent.has("veth-a", &["10.1.0.11"]));

    // A record that is there first, whose address another pod shows: it goes to nobody else.
    agent.records.send_modify(|records| records.attachments.extend([record("veth-b", "u-b", &["10.1.0.12"])]));
    let b = host.pod("veth-b", "cni0", &[]);
    agent.until("known at once", |agent| pod_of(agent, "veth-b").as_deref() == Some("u-b"));
    let _c = host.pod("veth-c", "cni0", &["10.1.0.12/24"]);
    agent.until("the thief", |agent| agent.problems("veth-c") == ["10.1.0.12 was not given to this pod by the CNI"]);
    add(&b, &["10.1.0.12/24"]);
    agent.until("the owner", |agent| agent.has("veth-b", &["10.1.0.12"]));

    // What a record has said holds as long as the interface lives, and not for the next one of that name.
    agent.records.send_replace(Records::default());
    agent.records.send_modify(|records| records.attachments.extend([record("veth-b", "u-x", &[])]));
    let _d = host.pod("veth-d", "cni0", &["10.1.0.13/24"]);
    agent.until("the records were looked at again", |agent| agent.has("veth-d", &["10.1.0.13"]));
    assert_eq!((pod_of(&agent, "veth-a").as_deref(), pod_of(&agent, "veth-b").as_deref()), (Some("u-a"), Some("u-b")));
    host.ns.ip("link del veth-a");
    agent.until("it is gone", |agent| agent.link("veth-a").is_none());
    let _again = host.pod("veth-a", "cni0", &["10.1.0.14/24"]);
    agent.until("another one", |agent| agent.has("veth-a", &["10.1.0.14"]));
    assert_eq!(pod_of(&agent, "veth-a"), None);
}
