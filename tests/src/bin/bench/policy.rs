//! NetworkPolicy in a large cluster: what compiling and loading it takes, what one change takes, what it holds in memory,
//! and what a packet that begins a flow costs beside the same with a single policy.
//!
//! ```text
//!   namespaces   one for each 100 pods, with one of 20 teams and one of 3 stages
//!   pods         100 on each node, spread over all namespaces: 10 apps, 4 tiers, a named port
//!   policies     one for each app of a namespace: two ingress rules, two egress rules (peers by labels, ranges with
//!                exceptions, ports by number, by name and by range)
//! ```

use std::cell::Cell;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::sync::Arc;
use std::sync::mpsc;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use proxy_abi::{DeviceEntry, Hook};
use proxy_core::name::ObjectName;
use proxy_core::netpol::dataplane::PolicyDataplane;
use proxy_core::netpol::reconcile::{PolicyListing, PolicyReconciler, PolicySettings};
use proxy_core::netpol::spec::{
    BlockSpec, Change, Container, ContainerPort, Labels, Namespace, PeerSpec, Pod, PolicySpec, PortNumber, PortSpec,
    RuleSpec, SelectorSpec,
};
use proxy_core::netpol::tables::{Op, PolicyTables};
use proxy_tests::Family;
use proxy_tests::bpf::policed::{NODE, Pinned};
use proxy_tests::bpf::{Bench, ROOMY, verdict};
use proxy_tests::packet::named::{Host, NODE_ONE, POD_ONE};
use proxy_tests::packet::tcp_flag;
use serde_json::{Value, json};

use crate::load::{Memory, memory};
use crate::stats::{Budget, Estimate, count, median, quantile};
use crate::traffic::{Comparison, print_comparisons, right_aligned, table};

const PODS_OF_A_NODE: u32 = 100;
const PODS_OF_A_NAMESPACE: u32 = 100;
const APPS: u32 = 10;
const TEAMS: u32 = 20;
const STAGES: [&str; 3] = ["dev", "test", "prod"];
const TIERS: [&str; 4] = ["web", "api", "queue", "store"];
/// New flows of one round for each hook.
const FLOWS: u16 = 5_000;

/// A cluster of so many pods; the first one is [`POD_ONE`], on this node.
#[derive(Clone, Copy)]
struct World {
    pods: u32,
}

impl World {
    const fn namespaces(self) -> u32 {
        self.pods.div_ceil(PODS_OF_A_NAMESPACE)
    }

    fn namespace_name(number: u32) -> Arc<str> {
        format!("ns-{number}").into()
    }

    /// Pods of a node are of as many namespaces as it has pods.
    const fn namespace_of(self, pod: u32) -> u32 {
        pod % self.namespaces()
    }

    const fn app_of(self, pod: u32) -> u32 {
        pod / self.namespaces() % APPS
    }

    fn ip(pod: u32, family: Family) -> IpAddr {
        if pod == 0 {
            return POD_ONE.ip(family);
        }
        let [_, _, high, low] = (pod / PODS_OF_A_NODE).to_be_bytes();
        let [.., host] = (pod % PODS_OF_A_NODE + 20).to_be_bytes();
        match family {
            Family::V4 => Ipv4Addr::new(10, 128 + high, low, host).into(),
            Family::V6 => Ipv6Addr::from([0xfd00, 0x10, u16::from(high), u16::from(low), 0, 0, 0, host.into()]).into(),
        }
    }

    fn namespace(number: u32) -> Change {
        let name = Self::namespace_name(number);
        let labels = [
            ("kubernetes.io/metadata.name", &*name),
            ("team", &*format!("team-{}", number % TEAMS)),
            ("stage", STAGES[number as usize % STAGES.len()]),
        ];
        Change::Namespace(Namespace { name: Arc::clone(&name), labels: labels_of(&labels), terminating: false })
    }

    fn pod(self, number: u32) -> Pod {
        let node = number / PODS_OF_A_NODE;
        let labels =
            [("app", &*format!("app-{}", self.app_of(number))), ("tier", TIERS[number as usize % TIERS.len()])];
        Pod {
            name: ObjectName::new(Self::namespace_name(self.namespace_of(number)), format!("pod-{number}")),
            uid: format!("uid-{number}").into(),
            labels: labels_of(&labels),
            node: Some(if node == 0 { NODE.into() } else { format!("other-{node}").into() }),
            host_network: false,
            finished: false,
            deleting: false,
            socket_lb: true,
            created: u64::from(number),
            ips: Family::BOTH.map(|family| Self::ip(number, family)).to_vec(),
            ports: vec![ContainerPort {
                name: "http".into(),
                protocol: None,
                port: 8_080 + (number % 4) as u16,
                container: Container::Main,
            }],
        }
    }

    /// The policy of an app of a namespace; `turn` is in it, so that it can be changed.
    fn policy(namespace: u32, app: u32, turn: u32) -> PolicySpec {
        let number = namespace * APPS + app;
        let labelled =
            |key: &str, value: &str| Some(SelectorSpec { labels: labels_of(&[(key, value)]), expressions: Vec::new() });
        let app_of = |app: u32| labelled("app", &format!("app-{}", app % APPS));
        let port = |number: u32, end: Option<i32>| PortSpec {
            protocol: None,
            port: Some(PortNumber::Number(number.cast_signed())),
            end_port: end,
        };
        let named = PortSpec { protocol: None, port: Some(PortNumber::Name("http".into())), end_port: None };
        let dns = PortSpec { protocol: Some("UDP".into()), ..port(53, None) };
        let neighbours = PeerSpec { pods: app_of(app + 1), ..PeerSpec::default() };
        let team = PeerSpec {
            pods: app_of(app + 2),
            namespaces: labelled("team", &format!("team-{}", number % TEAMS)),
            block: None,
        };
        let stage = PeerSpec { namespaces: labelled("stage", STAGES[number as usize % 3]), ..PeerSpec::default() };
        let range = |second: u32| PeerSpec {
            block: Some(BlockSpec {
                cidr: format!("10.{}.0.0/16", 128 + second % 2).into(),
                except: vec![format!("10.{}.{}.0/24", 128 + second % 2, number % 200).into()],
            }),
            ..PeerSpec::default()
        };
        let rule = |peers, ports| RuleSpec { peers: Some(peers), ports: Some(ports) };
        PolicySpec {
            audit: None,
            name: ObjectName::new(Self::namespace_name(namespace), format!("of-app-{app}")),
            pod_selector: app_of(app),
            policy_types: Some(vec!["Ingress".into(), "Egress".into()]),
            ingress: Some(vec![
                rule(vec![neighbours.clone(), team], vec![named, port(9_000 + turn, Some(9_100))]),
                rule(vec![range(number)], vec![dns.clone(), port(443, None)]),
            ]),
            egress: Some(vec![
                rule(vec![neighbours, stage], vec![port(8_080, Some(8_083)), port(5_432 + app, None)]),
                rule(vec![range(number + 1)], vec![dns, port(10_000 + number % 500, Some(30_000))]),
            ]),
        }
    }

    /// All objects, and which there are. `policies`: of how many apps, the one of [`POD_ONE`] first.
    fn changes(self, policies: u32) -> (Vec<Change>, [PolicyListing; 3]) {
        let namespaces = (0..self.namespaces()).map(Self::namespace);
        let pods = (0..self.pods).map(|number| Change::Pod(self.pod(number)));
        let policies = (0..policies).map(|number| Change::Policy(Self::policy(number / APPS, number % APPS, 0)));
        let changes: Vec<Change> = namespaces.chain(pods).chain(policies).collect();
        let mut names = (Vec::new(), Vec::new(), Vec::new());
        for change in &changes {
            match change {
                Change::Policy(policy) => names.0.push(policy.name.clone()),
                Change::Pod(pod) => names.1.push(pod.name.clone()),
                Change::Namespace(namespace) => names.2.push(Arc::clone(&namespace.name)),
                _ => {}
            }
        }
        let listings = [
            PolicyListing::Policies(names.0.into_iter().collect()),
            PolicyListing::Pods(names.1.into_iter().collect()),
            PolicyListing::Namespaces(names.2.into_iter().collect()),
        ];
        (changes, listings)
    }
}

fn labels_of(labels: &[(&str, &str)]) -> Labels {
    labels.iter().map(|(key, value)| ((*key).into(), (*value).into())).collect()
}

/// The pinned maps, and how long writing them takes.
struct Timed<'a> {
    maps: Pinned<'a>,
    writing: Cell<Duration>,
}

impl PolicyDataplane for Timed<'_> {
    type Error = proxy_agent::dataplane::Error;

    fn load_policy(&mut self) -> Result<PolicyTables, Self::Error> {
        self.maps.load_policy()
    }

    fn enforced(&mut self) -> Result<bool, Self::Error> {
        self.maps.enforced()
    }

    fn apply_policy(&mut self, op: &Op) -> Result<(), Self::Error> {
        let begin = Instant::now();
        let result = self.maps.apply_policy(op);
        self.writing.set(self.writing.get() + begin.elapsed());
        result
    }
}

/// A node of one world, with its maps.
struct Node<'a> {
    bench: &'a Bench,
    reconciler: PolicyReconciler,
    now: u64,
}

/// What one [`Node::sync`] took.
#[derive(Clone, Copy, Debug)]
struct Took {
    whole: Duration,
    /// The part of it in which maps were written.
    writing: Duration,
    operations: usize,
}

impl<'a> Node<'a> {
    fn start(bench: &'a Bench, world: World, policies: u32) -> Result<(Self, Took)> {
        let (changes, listings) = world.changes(policies);
        let mut node = Self { bench, reconciler: PolicyReconciler::new(PolicySettings::new(NODE)), now: 0 };
        let begin = Instant::now();
        for change in changes {
            node.reconciler.handle(change);
        }
        for listing in listings {
            node.reconciler.listed(listing);
        }
        let took = node.sync()?;
        let took = Took { whole: begin.elapsed(), ..took };
        let maps = bench.bpf().maps();
        let ifindex = bench.ifindex(&POD_ONE);
        let slot = node.reconciler.slot("uid-0").context("the first pod has a slot")?;
        let row = maps.device.get(&ifindex)?.context("no such interface")?;
        maps.device.set(&ifindex, &DeviceEntry { slot, ..row })?;
        Ok((node, took))
    }

    fn change(&mut self, change: Change) -> Result<Took> {
        let begin = Instant::now();
        self.reconciler.handle(change);
        let took = self.sync()?;
        Ok(Took { whole: begin.elapsed(), ..took })
    }

    fn sync(&mut self) -> Result<Took> {
        self.now += 1_000;
        let begin = Instant::now();
        let mut maps = Timed { maps: Pinned(&self.bench.bpf().maps().policy), writing: Cell::default() };
        let report = self.reconciler.sync(&mut maps, self.now);
        if let Some((op, error)) = report.failed {
            return Err(error).with_context(|| format!("{op:?}"));
        }
        ensure!(report.load_error.is_none() && report.pending == 0, "{report:?}");
        Ok(Took { whole: begin.elapsed(), writing: maps.writing.get(), operations: report.applied })
    }

    /// First packets between the pod and random others, at random ports.
    fn flows(&self, world: World) -> Result<[Round; 2]> {
        self.bench.forget_flows()?;
        [Hook::FromPod, Hook::ToPod]
            .map(|hook| {
                let mut round = Round::default();
                for number in 0..FLOWS {
                    let family = if fastrand::bool() { Family::V4 } else { Family::V6 };
                    let peer = fastrand::u32(1..world.pods);
                    let IpAddr::V4(ip4) = World::ip(peer, Family::V4) else { continue };
                    let IpAddr::V6(ip6) = World::ip(peer, Family::V6) else { continue };
                    let peer = Host { ip4, ip6, ..proxy_tests::packet::named::POD_REMOTE };
                    let (here, there) =
                        (20_000 + number, [8_080, 443, 9_050, fastrand::u16(1..)][fastrand::usize(..4)]);
                    let (frame, ingress) = match hook {
                        Hook::FromPod => (POD_ONE.tcp(here, &peer, there, family, tcp_flag::SYN), 0),
                        _ => (peer.tcp(here, &POD_ONE, there, family, tcp_flag::SYN), self.bench.ifindex(&NODE_ONE)),
                    };
                    let run = self.bench.run_from(hook, &POD_ONE, ingress, &frame.build())?;
                    round.nanoseconds += f64::from(run.nanoseconds) / f64::from(FLOWS);
                    round.denied += u32::from(run.verdict.cast_signed() == verdict::DROP);
                }
                Ok(round)
            })
            .into_iter()
            .collect::<Result<Vec<_>>>()
            .map(|rounds| [rounds[0], rounds[1]])
    }
}

/// First packets of one round.
#[derive(Clone, Copy, Debug, Default)]
struct Round {
    /// Mean of one packet.
    nanoseconds: f64,
    denied: u32,
}

/// One policy, on a bench of its own; it measures a round whenever it is asked, until nobody can ask any more.
fn beside(world: World, asked: mpsc::Receiver<()>, told: mpsc::Sender<[Round; 2]>) -> Result<()> {
    Bench::run(ROOMY, move |bench| {
        let (node, _) = Node::start(bench, world, 1)?;
        while asked.recv().is_ok() {
            told.send(node.flows(world)?)?;
        }
        Ok(())
    })?
}

/// Measures with so many pods and policies, prints, and returns everything as JSON.
pub(crate) fn run(pods: u32, policies: u32, changes: usize, rounds: usize) -> Result<Value> {
    println!("\n== {policies} NetworkPolicies × {pods} pods, {PODS_OF_A_NODE} of them on this node");
    let world = World { pods };
    let before = memory(std::process::id())?;
    Bench::run(ROOMY, |bench| {
        let (mut node, load) = Node::start(bench, world, policies)?;
        let after = memory(std::process::id())?;
        let start = show_start(load, &before, &after);
        let latencies = show_changes(&mut node, world, changes)?;
        let flows = thread::scope(|scope| {
            let ((ask, asked), (tell, told)) = (mpsc::channel(), mpsc::channel());
            let other = scope.spawn(move || beside(world, asked, tell));
            let result = show_flows(&node, world, rounds, &ask, &told);
            drop(ask);
            let ended = other.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic));
            ended.and(result)
        })?;
        Ok(json!({ "pods": pods, "policies": policies, "start": start, "changes_ms": latencies, "new_flows": flows }))
    })?
}

fn show_start(load: Took, before: &Memory, after: &Memory) -> Value {
    let compiling = load.whole.saturating_sub(load.writing);
    let maps: f64 = after.maps.iter().filter(|(name, _)| name.starts_with("pol")).map(|(_, mib)| mib).sum();
    println!(
        "start: objects taken in and compiled {:.0} ms, {} operations on maps {:.0} ms; memory {:.1} MiB more than before \
         (peak {:.1} MiB more), objects, compiler and model of the maps together; maps of policy {maps:.1} MiB",
        compiling.as_secs_f64() * 1e3,
        load.operations,
        load.writing.as_secs_f64() * 1e3,
        after.rss - before.rss,
        after.peak - before.rss,
    );
    json!({
        "compiling_ms": compiling.as_secs_f64() * 1e3, "writing_ms": load.writing.as_secs_f64() * 1e3,
        "operations": load.operations, "rss_mib": after.rss - before.rss, "peak_mib": after.peak - before.rss,
        "maps_mib": after.maps,
    })
}

/// One change after the other, and the other way round again.
fn show_changes(node: &mut Node<'_>, world: World, changes: usize) -> Result<Value> {
    let mut table = table();
    table.set_header(["one change, object to maps", "p50 ms", "p99 ms", "worst ms", "operations (median)"]);
    let mut result = Vec::new();
    for what in [
        "a pod elsewhere begins",
        "a pod elsewhere ends",
        "a pod elsewhere gets another label",
        "a policy of a pod here",
    ] {
        let (mut times, mut operations) = (Vec::new(), Vec::new());
        for turn in 0..changes {
            let turn = u32::try_from(turn)?;
            let number = world.pods + turn;
            let known = fastrand::u32(PODS_OF_A_NODE..world.pods);
            let change = match what {
                "a pod elsewhere begins" => Change::Pod(world.pod(number)),
                "a pod elsewhere ends" => Change::PodGone(world.pod(number).name),
                "a policy of a pod here" => {
                    Change::Policy(World::policy(world.namespace_of(0), world.app_of(0), 1 + turn % 90))
                }
                _ => {
                    let tier = format!("other-{turn}");
                    let labels = [("app", &*format!("app-{}", turn % APPS)), ("tier", &*tier)];
                    Change::Pod(Pod { labels: labels_of(&labels), ..world.pod(known) })
                }
            };
            let took = node.change(change)?;
            times.push(took.whole.as_secs_f64() * 1e3);
            operations.push(count(took.operations));
        }
        let [p50, p99, worst] = [0.5, 0.99, 1.0].map(|share| quantile(&times, share));
        let cells = [p50, p99, worst].map(|time| format!("{time:.3}"));
        table.add_row([what.to_owned()].into_iter().chain(cells).chain([format!("{:.0}", median(&operations))]));
        result.push(json!({ "what": what, "p50": p50, "p99": p99, "worst": worst, "operations": operations }));
    }
    right_aligned(&mut table);
    println!("{table}");
    Ok(Value::from(result))
}

/// Rounds in turns: all policies, one policy.
fn show_flows(
    node: &Node<'_>,
    world: World,
    rounds: usize,
    ask: &mpsc::Sender<()>,
    told: &mpsc::Receiver<[Round; 2]>,
) -> Result<Value> {
    let (mut all, mut one) = ([Vec::new(), Vec::new()], [Vec::new(), Vec::new()]);
    for round in 0..=rounds {
        let many = node.flows(world)?;
        ask.send(())?;
        let few = told.recv().context("the bench with one policy has ended")?;
        // The first does not count.
        if round > 0 {
            for hook in 0..2 {
                all[hook].push(many[hook]);
                one[hook].push(few[hook]);
            }
        }
    }
    let mut comparisons = Vec::new();
    let mut result = Vec::new();
    for (hook, name) in ["from_pod", "to_pod"].into_iter().enumerate() {
        let of = |rounds: &[Round]| rounds.iter().map(|round| round.nanoseconds).collect::<Vec<_>>();
        let denied = |rounds: &[Round]| median(&rounds.iter().map(|round| f64::from(round.denied)).collect::<Vec<_>>());
        let (many, few) = (of(&all[hook]), of(&one[hook]));
        println!(
            "{name}: first packet {:.0} ns ({:.0} of {FLOWS} denied); with one policy {:.0} ns ({:.0} denied); both with the call",
            median(&many),
            denied(&all[hook]),
            median(&few),
            denied(&one[hook]),
        );
        comparisons.push(Comparison {
            text: format!("{name}: one policy ÷ all, ns of a first packet"),
            estimate: Estimate::of_ratios(&few, &many),
            budget: Some(Budget::AtLeast(1.0 / 1.5)),
        });
        comparisons.push(Comparison {
            text: format!("{name}: all − one policy, ns of a first packet"),
            estimate: Estimate::of_differences(&many, &few),
            budget: Some(Budget::AtMost(150.0)),
        });
        result.push(json!({ "hook": name, "all_ns": many, "one_ns": few }));
    }
    print_comparisons(&comparisons);
    let comparisons: Vec<Value> = comparisons.iter().map(Comparison::json).collect();
    Ok(json!({ "hooks": result, "comparisons": comparisons }))
}
