//! How long policies take to compile, and what they take of the maps: 5,000 policies, 50,000 pods, 1,000 namespaces, of
//! which 110 pods are on this node.
//!
//! `cargo run --release -p proxy-core --example netpol_scale`

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::time::{Duration, Instant};

use proxy_core::name::ObjectName;
use proxy_core::netpol::engine::{Engine, Limits, Transition};
use proxy_core::netpol::spec::{
    BlockSpec, Change, Container, ContainerPort, Labels, Namespace, PeerSpec, Pod, PolicySpec, PortNumber, PortSpec,
    RuleSpec, SelectorSpec,
};
use proxy_core::netpol::tables::PolicyTables;

const NAMESPACES: u32 = 1_000;
const PODS: u32 = 50;
const POLICIES: u32 = 5;
/// Pods on this node; each in a namespace of its own, as far as there are namespaces.
const LOCAL: u32 = 110;

fn main() {
    let changes: Vec<Change> = (0..NAMESPACES)
        .flat_map(|ns| {
            let pods = (0..PODS).map(move |n| Change::Pod(pod(ns, n, n)));
            let policies = (0..POLICIES).map(move |n| Change::Policy(policy(ns, n, 0)));
            std::iter::once(Change::Namespace(namespace(ns))).chain(pods).chain(policies)
        })
        .collect();
    let mut engine = Engine::new("node-0", Limits::default(), PolicyTables::default());
    let start = Instant::now();
    for change in &changes {
        engine.apply(change.clone());
    }
    println!("objects         {:>10.3?}", start.elapsed());
    let start = Instant::now();
    let transition = engine.commit();
    println!("first compile   {:>10.3?}  {} operations", start.elapsed(), transition.ops().count());
    entries(engine.tables());

    measure("one pod", &mut engine, |n| {
        let (ns, pod_n) = (n * 7 % NAMESPACES, 1 + n % (PODS - 1));
        Change::Pod(pod(ns, pod_n, pod_n + 1 + n % 7))
    });
    measure("one policy", &mut engine, |n| Change::Policy(policy(n % LOCAL, n % POLICIES, 1 + n)));
    measure("other policy", &mut engine, |n| {
        Change::Policy(policy(LOCAL + n % (NAMESPACES - LOCAL), n % POLICIES, 1 + n))
    });
    measure("one namespace", &mut engine, |n| {
        let mut object = namespace(n % NAMESPACES);
        object.labels.insert("group".into(), format!("g{}", (n + 1) % 20).into());
        Change::Namespace(object)
    });
    entries(engine.tables());

    let mut second = Engine::new("node-0", Limits::default(), PolicyTables::default());
    for change in &changes {
        second.apply(change.clone());
    }
    second.commit();
    let mut third = Engine::new("node-0", Limits::default(), second.tables().clone());
    for change in &changes {
        third.apply(change.clone());
    }
    let start = Instant::now();
    let rest = third.commit();
    println!("restart         {:>10.3?}  {} operations", start.elapsed(), rest.ops().count());
}

fn measure(what: &str, engine: &mut Engine, change: impl Fn(u32) -> Change) {
    let mut times: Vec<Duration> = Vec::new();
    let (mut most, mut sum) = (0, 0);
    for n in 0..500_u32 {
        let change = change(n);
        let start = Instant::now();
        engine.apply(change);
        let transition = engine.commit();
        times.push(start.elapsed());
        let count = Transition::ops(&transition).count();
        most = most.max(count);
        sum += count;
    }
    times.sort();
    let at = |share: usize| times.get(times.len() * share / 100).copied().unwrap_or_default();
    let mean = sum / times.len();
    println!("{what:<15} {:>10.3?}  p50, {:.3?} p99; {mean} operations, at most {most}", at(50), at(99));
}

/// Entries and their bytes in the kernel: an element of a hash or trie takes its key and value rounded up to 8 bytes,
/// and 48 bytes of its own.
fn entries(tables: &PolicyTables) {
    let hash =
        |count: usize, key: usize, value: usize| count * (48 + key.next_multiple_of(8) + value.next_multiple_of(8));
    let rows = [
        ("ip", tables.ips.len(), hash(tables.ips.len(), 16, 8)),
        ("prefix", tables.prefixes.len(), hash(tables.prefixes.len(), 24, 8)),
        ("cell", tables.cells.len(), hash(tables.cells.len(), 4, 16)),
        ("bits", tables.bits.len(), hash(tables.bits.len(), 8, 32)),
        ("set", tables.sets.len(), tables.sets.len() * 184),
        ("block", tables.blocks.len(), tables.blocks.len() * 32),
        ("page", tables.pages.len(), tables.pages.len() * 512),
        ("slot", tables.slots.len(), tables.slots.len() * 8),
    ];
    for (name, count, bytes) in rows {
        println!("  policy_{name:<8} {count:>7} entries {bytes:>9} bytes");
    }
    println!(
        "  all             {:>7} entries {:>9} bytes",
        rows.map(|r| r.1).iter().sum::<usize>(),
        rows.map(|r| r.2).iter().sum::<usize>()
    );
}

fn labels(pairs: [(&str, String); 2]) -> Labels {
    pairs.into_iter().map(|(key, value)| (key.into(), value.into())).collect()
}

fn namespace(ns: u32) -> Namespace {
    let pairs = [("kubernetes.io/metadata.name", format!("ns-{ns}")), ("group", format!("g{}", ns % 20))];
    Namespace { name: format!("ns-{ns}").into(), labels: labels(pairs), terminating: false }
}

fn pod(ns: u32, n: u32, app: u32) -> Pod {
    let index = ns * PODS + n;
    let local = n == 0 && ns < LOCAL;
    Pod {
        name: ObjectName::new(format!("ns-{ns}"), format!("pod-{n}")),
        uid: format!("uid-{ns}-{n}").into(),
        labels: labels([("app", format!("a{}", app % 10)), ("tier", format!("t{}", app % 3))]),
        node: Some(if local { "node-0".into() } else { format!("node-{}", 1 + index % 500).into() }),
        host_network: false,
        finished: false,
        deleting: false,
        socket_lb: true,
        created: 1,
        ips: vec![
            IpAddr::V4(Ipv4Addr::from_bits(0x0a00_0000 + index)),
            IpAddr::V6(Ipv6Addr::from_bits(0xfd00_u128 << 112 | u128::from(index))),
        ],
        ports: vec![ContainerPort { name: "http".into(), protocol: None, port: 8080, container: Container::Main }],
    }
}

/// Every pod of the namespace may be reached by some apps of it, some namespaces, and a range.
fn policy(ns: u32, n: u32, variant: u32) -> PolicySpec {
    let select =
        |key: &str, value: String| SelectorSpec { labels: [(key.into(), value.into())].into(), expressions: vec![] };
    let range = BlockSpec {
        cidr: format!("192.168.{}.0/24", (ns + n) % 256).into(),
        except: vec![format!("192.168.{}.{}/32", (ns + n) % 256, variant % 256).into()],
    };
    let peers = vec![
        PeerSpec { pods: Some(select("app", format!("a{}", (n + variant) % 10))), ..PeerSpec::default() },
        PeerSpec {
            namespaces: Some(select("group", format!("g{}", (ns + n) % 20))),
            pods: Some(select("tier", format!("t{}", n % 3))),
            block: None,
        },
        PeerSpec { block: Some(range), ..PeerSpec::default() },
    ];
    let ports = [8000 + n, 9000 + (ns + variant) % 50].map(|port| PortSpec {
        protocol: None,
        port: Some(PortNumber::Number(i32::try_from(port).unwrap_or(1))),
        end_port: None,
    });
    PolicySpec {
        name: ObjectName::new(format!("ns-{ns}"), format!("policy-{n}")),
        audit: None,
        pod_selector: None,
        policy_types: Some(vec!["Ingress".into()]),
        ingress: Some(vec![RuleSpec { peers: Some(peers), ports: Some(ports.into()) }]),
        egress: None,
    }
}
