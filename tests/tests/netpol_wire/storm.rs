//! New pods, one batch after the other, under a sender that never pauses: what is forbidden does not arrive, from the
//! first instant of their interfaces on.

use std::env;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use proxy_tests::cluster::PodSpec;
use proxy_tests::netns::Inside;
use proxy_tests::packet::{Frame, L4, Mac, Udp};
use proxy_tests::policy_manifest::PodObject;
use proxy_tests::rawsock::{Flooded, RawSocket};
use proxy_tests::traffic::{Steady, SteadyOptions};
use proxy_tests::{Deadline, Family, Netns, Pod};
use serde_json::json;

use crate::stage::Stage;

/// Makes 1,000 pods instead of 30.
const LONG: &str = "PROXY_TESTS_LONG";
/// Pods at a time. Each batch takes the addresses of the one before the last.
const BATCH: u16 = 10;
/// Packets a second that each new pod sends.
const OUTWARD: u32 = 500;
/// Packets to each batch below which nothing is proved.
const LEAST: u64 = 50_000;

/// Sends to these addresses until it is stopped.
struct Storm {
    stop: Arc<AtomicBool>,
    sent: Arc<AtomicU64>,
    sender: Inside<Flooded>,
}

impl Storm {
    fn start(from: &Pod, targets: &[IpAddr]) -> Self {
        let frame = |&ip: &IpAddr| {
            let mac = match targets.iter().find(|other| other.is_ipv4() && host(**other) == host(ip)) {
                Some(IpAddr::V4(ip)) => Mac::of_ipv4(*ip),
                _ => Mac::BROADCAST,
            };
            let l4 = L4::Udp(Udp { src: 4_000, dst: 80, checksum: true, payload: vec![1; 18] });
            Frame::ip((from.mac(), from.ip(Family::of(ip))), (mac, ip), l4).build()
        };
        let frames: Vec<_> = targets.iter().map(frame).collect();
        let socket = RawSocket::open(from.netns(), "eth0").expect("socket");
        let (stop, sent) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicU64::new(0)));
        let (stopped, count) = (Arc::clone(&stop), Arc::clone(&sent));
        let go_on = move |sent| {
            count.store(sent, Ordering::Relaxed);
            !stopped.load(Ordering::Relaxed)
        };
        let send = move || socket.flood(&frames, None, go_on).expect("sent");
        Self { stop, sent, sender: from.netns().spawn("storm", send).expect("sender") }
    }

    /// Waits until it has sent so many.
    fn wait_sent(&self, least: u64) {
        let enough = || self.sent.load(Ordering::Relaxed) >= least;
        Deadline::secs(60).until("a storm", enough).unwrap_or_else(|error| panic!("{error}: {:?}", self.sent));
    }

    fn stop(self) -> Flooded {
        self.stop.store(true, Ordering::Relaxed);
        self.sender.join()
    }
}

/// Number of an address in its range: the same in both families.
fn host(ip: IpAddr) -> u16 {
    match ip {
        IpAddr::V4(ip) => u16::from(ip.octets()[3]),
        IpAddr::V6(ip) => ip.segments()[7],
    }
}

/// Datagrams that have come to a namespace since it is there, wanted or not, by the kernel's own count.
fn datagrams(netns: &Netns) -> u64 {
    let read = |name: &str| std::fs::read_to_string(format!("/proc/thread-self/net/{name}")).expect("counters");
    let (v4, v6) = netns.run(|| (read("snmp"), read("snmp6"))).expect("namespace");
    // Two lines that begin with `Udp:`, of names and of numbers.
    let mut udp = v4.lines().filter_map(|line| line.strip_prefix("Udp: "));
    let (names, numbers) = (udp.next().expect("names"), udp.next().expect("numbers"));
    let v4 = names.split(' ').zip(numbers.split(' ')).map(|(name, number)| (name.to_owned(), number.to_owned()));
    let v6 = v6.lines().filter_map(|line| line.strip_prefix("Udp6")?.split_once(char::is_whitespace));
    let v6 = v6.map(|(name, number)| (name.to_owned(), number.trim().to_owned()));
    let counted = |name: &str| matches!(name, "InDatagrams" | "NoPorts" | "InErrors");
    v4.chain(v6).filter(|(name, _)| counted(name)).map(|(_, number)| number.parse::<u64>().expect("a number")).sum()
}

/// Waits until every one of these pods is isolated.
fn wait_isolated(stage: &Stage, pods: &[Pod]) {
    let isolated = || {
        let rows = stage.endpoints(0);
        let is = |pod: &Pod| {
            let name = pod.host_veth().name.as_str();
            rows.iter().any(|row| row["interface"] == name && row["policy"] == "ingress, egress")
        };
        pods.iter().all(is)
    };
    Deadline::secs(60)
        .until("isolated", isolated)
        .unwrap_or_else(|error| panic!("{error}: {:?}\n{}", stage.endpoints(0), stage.scenario.agent(0).log_text()));
}

#[test]
fn new_pods_are_isolated_under_a_storm() {
    let pods: u16 = if env::var_os(LONG).is_some() { 1_000 } else { 30 };
    // The guard holds an interface until it has its programs.
    let mut stage = Stage::with(&["--bridge-guard"]);
    let deny = json!({ "podSelector": { "matchLabels": { "isolated": "yes" } }, "policyTypes": ["Ingress", "Egress"] });
    stage.apply("x", "deny", &deny);
    stage.settle();
    let from = stage.scenario.cluster().pod("z-b").expect("pod");
    let cidrs = Family::BOTH.map(|family| stage.scenario.node(0).pod_cidr(family));
    let sink = stage.answered("z-b", 80);
    let (mut inward, mut outward) = (Flooded::default(), 0_u64);
    let mut leaked = Vec::new();
    for batch in 0..pods / BATCH {
        let hosts = 200 + batch % 2 * BATCH..200 + (batch % 2 + 1) * BATCH;
        let targets: Vec<IpAddr> =
            hosts.clone().flat_map(|host| cidrs.each_ref().map(|cidr| cidr.host(host))).collect();
        let storm = Storm::start(&from, &targets);
        let (mut new, mut senders) = (Vec::new(), Vec::new());
        for host in hosts {
            let spec = PodSpec::new(format!("x-s{batch}-{host}")).namespace("x").label("isolated", "yes").host(host);
            let pod = stage.scenario.cluster().add_pod("node1", spec).expect("pod");
            let family = Family::BOTH[usize::from(host % 2)];
            let target = SocketAddr::new(stage.ip("z-b", family), 80);
            let options = SteadyOptions { rate: OUTWARD, ..SteadyOptions::default() };
            senders.push(Steady::start(pod.netns(), target, options).expect("sender"));
            stage.scenario.manifests().write(&PodObject::of(&pod)).expect("written");
            new.push(pod);
        }
        wait_isolated(&stage, &new);
        storm.wait_sent(LEAST);
        outward += senders.into_iter().map(|sender| sender.stop_unanswered().sent() as u64).sum::<u64>();
        let sent = storm.stop();
        inward = Flooded { frames: inward.frames + sent.frames, took: inward.took + sent.took };
        for pod in &new {
            let got = datagrams(pod.netns());
            if got > 0 {
                leaked.push((pod.name().to_owned(), got));
            }
            stage.scenario.manifests().remove(&PodObject::of(pod)).expect("removed");
            stage.scenario.node(0).remove_pod(pod.name()).expect("removed");
        }
    }
    println!("{pods} pods: {} packets to them, {} a second; {outward} from them", inward.frames, inward.rate());
    assert_eq!((leaked, stage.answered("z-b", 80) - sink), (Vec::new(), 0));
    assert!(outward > 0, "nothing was sent from them");

    // One that no policy is for gets the same packets: so there was something to count.
    let spec = PodSpec::new("x-free").namespace("x").host(230);
    let targets = cidrs.map(|cidr| cidr.host(230));
    let pod = stage.scenario.cluster().add_pod("node1", spec).expect("pod");
    stage.scenario.manifests().write(&PodObject::of(&pod)).expect("written");
    let storm = Storm::start(&from, &targets);
    let arrives = Deadline::secs(30).until("arrives", || datagrams(pod.netns()) > 0);
    storm.stop();
    arrives.expect("a pod without a policy is reached");
}
