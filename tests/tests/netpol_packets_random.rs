//! Whatever the cluster and whatever changes: the loaded programs do with a packet what the oracle says.
//!
//! Packets of all protocols and of both families go through `from_pod` and `to_pod` of one interface, whose pod changes;
//! flows of earlier changes are still in the table, so most of them are judged again. `NETPOL_PACKET_CASES` sets how many
//! changed clusters are compared (10,000 when it is absent), `NETPOL_SEED` the first seed. A failure names its seed.

use std::net::IpAddr;
use std::time::Instant;

use anyhow::{Context as _, Result, bail, ensure};
use proxy_abi::policy::RuleRef;
use proxy_abi::{DeviceEntry, FlowKey, Hook, IpBytes, MacBytes, PortBe, Proto, Tuple};
use proxy_core::netpol::engine::Limits;
use proxy_core::netpol::explain;
use proxy_core::netpol::spec::Pod;
use proxy_oracle::dice::{Dice, NODE, number};
use proxy_oracle::verdict::{Cluster, Oracle, Side, Verdict};
use proxy_tests::bpf::policed::Policed;
use proxy_tests::bpf::{Bench, ROOMY, verdict};
use proxy_tests::packet::named::{GATEWAY, NODE_ONE, POD_ONE};
use proxy_tests::packet::{Fragment, Frame, Icmp, L4, Tcp, Udp, proto, tcp_flag};

/// Changes of one cluster.
const EDITS: usize = 20;
/// Clusters for each bench, whose flow tables are forgotten then.
const PER_BENCH: u64 = 100;

#[derive(Clone, Copy, Debug, Default)]
struct Reached {
    /// Changed clusters with a flow that a rule allows and one that is denied.
    cases: u64,
    /// Other ones.
    void: u64,
    packets: u64,
    allowed: u64,
    denied: u64,
    /// Stamps whose rule was compared.
    named: u64,
    /// Judgements that audited policies would have refused.
    audited: u64,
}

/// A packet of one side of a flow; none where no packet of ours could be that side's.
fn packet(pod: &Pod, side: &Side, client: u16) -> Option<Frame> {
    let own = *pod.ips.iter().find(|ip| ip.is_ipv4() == side.peer.is_ipv4())?;
    // To itself through a Service: another test's.
    if side.hairpin {
        return None;
    }
    let (me, other) = ((POD_ONE.mac, own), (GATEWAY.mac, side.peer));
    let (from, to) = if side.ingress { (other, me) } else { (me, other) };
    let Some(port) = side.port else {
        // A later fragment. One that overtakes its first is dropped where a pod sends it, whatever the policy.
        let mut frame = Frame::ip(from, to, L4::Other { proto: side.proto, bytes: vec![0x5a; 40] });
        let ip = frame.as_ip_mut()?;
        (ip.fragment, ip.dont_fragment) = (Some(Fragment { offset: 1480, more: false }), false);
        ip.id = 0xabcd;
        return side.ingress.then_some(frame);
    };
    let l4 = match side.proto {
        proto::TCP => L4::Tcp(Tcp { src: client, dst: port, seq: 1, flags: tcp_flag::SYN, ..Tcp::default() }),
        proto::UDP => L4::Udp(Udp { src: client, dst: port, checksum: true, payload: b"datagram".to_vec() }),
        proto::ICMP if own.is_ipv4() => echo(8, client),
        proto::ICMPV6 if own.is_ipv6() => echo(128, client),
        number => {
            let ports = [client.to_be_bytes(), port.to_be_bytes()].concat();
            L4::Other { proto: number, bytes: [ports, vec![0; 36]].concat() }
        }
    };
    Some(Frame::ip(from, to, l4))
}

fn echo(kind: u8, id: u16) -> L4 {
    let [a, b] = id.to_be_bytes();
    L4::Icmp(Icmp { kind, rest: [a, b, 0, 1], ..Icmp::default() })
}

/// Puts a pod behind the interface of pod one.
fn place(bench: &Bench, pod: &Pod, slot: u16) -> Result<()> {
    let ip = |v4: bool| pod.ips.iter().find(|ip| ip.is_ipv4() == v4).map_or(IpBytes::UNSPECIFIED, |ip| (*ip).into());
    let mac = |mac: proxy_tests::packet::Mac| MacBytes(mac.0);
    let row = DeviceEntry {
        ip4: ip(true),
        ip6: ip(false),
        gateway_ip4: IpAddr::from(GATEWAY.ip4).into(),
        gateway_ip6: IpAddr::from(GATEWAY.ip6).into(),
        pod_mac: mac(POD_ONE.mac),
        gateway_mac: mac(GATEWAY.mac),
        bridge: bench.ifindex(&NODE_ONE),
        flags: DeviceEntry::REDIRECT,
        slot,
        reserved: 0,
        since: 0,
        mtu: 0,
    };
    Ok(bench.bpf().maps().device.set(&bench.ifindex(&POD_ONE), &row)?)
}

/// The rule that the flow of an allowed packet remembers, of the pod's side.
fn stamped(bench: &Bench, side: &Side, own: IpAddr, client: u16) -> Result<Option<(RuleRef, u16)>> {
    let Some(port) = side.port.filter(|_| [6, 17, 132].contains(&side.proto)) else { return Ok(None) };
    let (src, dst) = if side.ingress { (side.peer, own) } else { (own, side.peer) };
    let tuple = Tuple { src: src.into(), dst: dst.into(), src_port: PortBe::new(client), dst_port: PortBe::new(port) };
    let key = tuple.key(Proto(side.proto), tuple.dst.family(), FlowKey::SIDE_COMMON);
    let entry = bench.bpf().maps().flow_brief.get(&key)?.context("an allowed packet leaves a flow")?;
    Ok(Some(if side.ingress {
        (RuleRef(entry.responder_stamp.rule), entry.responder_slot)
    } else {
        (RuleRef(entry.initiator_stamp.rule), entry.initiator_slot)
    }))
}

/// Removes the flow of a protocol without ports.
fn forget(bench: &Bench, frame: &Frame, proto: u8) -> Result<()> {
    let ip = frame.as_ip().context("IP")?;
    let none = PortBe::new(0);
    let tuple = Tuple { src: ip.src.into(), dst: ip.dst.into(), src_port: none, dst_port: none };
    let key = tuple.key(Proto(proto), tuple.dst.family(), FlowKey::SIDE_COMMON);
    bench.bpf().maps().flow_brief.delete(&key)?;
    Ok(())
}

/// Is what the flow remembers among what the oracle says?
fn names_it(policed: &Policed<'_>, rule: RuleRef, side: &Side, wanted: &Verdict) -> bool {
    if wanted.isolating.is_empty() {
        return rule == RuleRef::NONE;
    }
    match policed.reconciler().engine().reason(rule, side.peer) {
        Some(explain::Reason::Rule(origin)) => {
            wanted.rules.iter().any(|(policy, place)| *policy == origin.policy && *place == origin.rule)
        }
        _ => false,
    }
}

fn cluster(bench: &Bench, seed: u64, reached: &mut Reached) -> Result<()> {
    let mut dice = Dice::new(seed);
    let mut cluster = Cluster::empty();
    let limits = match seed % 4 {
        0 => Limits { merge_above: 2, rules_per_set: 64, ..Limits::default() },
        1 => Limits { rules_per_set: 3, ..Limits::default() },
        _ => Limits::default(),
    };
    let first = dice.cluster();
    for change in &first {
        cluster.apply(change.clone());
    }
    let mut policed = Policed::start(bench, limits, first)?;
    for edit in 0..EDITS {
        if edit > 0 {
            let changes = dice.edit(&cluster);
            for change in &changes {
                cluster.apply(change.clone());
            }
            policed.change(changes)?;
        }
        let (mut allowed, mut denied) = (0, 0);
        let pods: Vec<Pod> = cluster.subjects().cloned().collect();
        for pod in &pods {
            let Some(subject) = policed.reconciler().engine().subjects().get(&pod.name) else { continue };
            if subject.locked.is_some() || policed.reconciler().slot(&pod.uid) != Some(subject.slot) {
                ensure!(!policed.reconciler().enforces() || subject.locked.is_some(), "{} has no slot", pod.name);
                continue;
            }
            place(bench, pod, subject.slot)?;
            for side in dice.sides(pod, 5, 2) {
                // By the port that it comes from a flow is the node's, the peer's or the pod's own.
                let client = if side.from_node { 40_002 } else { 40_001 };
                let client = if side.ingress { client } else { 40_000 };
                let Some(frame) = packet(pod, &side, client) else { continue };
                let (hook, ingress) = match (side.ingress, side.from_node) {
                    (false, _) => (Hook::FromPod, 0),
                    (true, true) => (Hook::ToPod, 0),
                    (true, false) => (Hook::ToPod, bench.ifindex(&NODE_ONE)),
                };
                let oracle = Oracle { cluster: &cluster, broken: None };
                let wanted = oracle.judge(pod, &side);
                let bytes = frame.build();
                if !matches!(side.proto, proto::TCP | proto::UDP | proto::SCTP) && side.port.is_some() {
                    // Without ports, what goes one way answers what came the other way.
                    forget(bench, &frame, side.proto)?;
                }
                let before = audited(bench, subject.slot)?;
                let run = bench.run_from(hook, &POD_ONE, ingress, &bytes)?;
                let got = match run.verdict.cast_signed() {
                    verdict::PASS => true,
                    verdict::DROP => false,
                    other => bail!("edit {edit}: verdict {other} for {frame:?}"),
                };
                if got != wanted.allowed || run.packet != bytes {
                    // What is counted now is counted for the same reason.
                    let counts = bench.feed_from(hook, &POD_ONE, ingress, &bytes)?.counts;
                    bail!("edit {edit}: {} {side:?}: programs {got}, {counts:?}, oracle {wanted:?}", pod.name);
                }
                // What audited policies would refuse is told once for a flow: maybe not of this packet, never of another.
                let told = audited(bench, subject.slot)? - before;
                let refused = got && oracle.shadow(pod, &side).is_some_and(|shadow| !shadow.allowed);
                ensure!(told <= u64::from(refused), "edit {edit}: {} {side:?}: audited {told}", pod.name);
                reached.audited += told;
                reached.packets += 1;
                allowed += u64::from(got && !wanted.rules.is_empty());
                denied += u64::from(!got);
                let own = frame.as_ip().map(|ip| if side.ingress { ip.dst } else { ip.src }).context("IP")?;
                if got
                    && !side.from_node
                    && let Some((rule, slot)) = stamped(bench, &side, own, client)?
                {
                    reached.named += 1;
                    ensure!(
                        slot == subject.slot && names_it(&policed, rule, &side, &wanted),
                        "edit {edit}: {} {side:?}: {rule:?} of slot {slot}, oracle {wanted:?}",
                        pod.name
                    );
                }
            }
        }
        reached.allowed += allowed;
        reached.denied += denied;
        if allowed > 0 && denied > 0 { reached.cases += 1 } else { reached.void += 1 }
    }
    Ok(())
}

/// Judgements of a pod that audited policies would have refused.
fn audited(bench: &Bench, slot: u16) -> Result<u64> {
    let row = bench.bpf().maps().policy.pod_hits.get(&slot.into())?.context("a row")?;
    Ok(row.audited.iter().sum())
}

#[test]
fn the_programs_do_what_the_oracle_says() -> Result<()> {
    assert_eq!(NODE, proxy_tests::bpf::policed::NODE);
    let cases = number("NETPOL_PACKET_CASES", 10_000);
    let mut seed = number("NETPOL_SEED", 0);
    let start = Instant::now();
    let mut reached = Reached::default();
    while reached.cases < cases {
        let benched = Bench::run(ROOMY, |bench| -> Result<Reached> {
            let mut sum = Reached::default();
            for seed in seed..seed + PER_BENCH {
                cluster(bench, seed, &mut sum).with_context(|| format!("seed {seed}"))?;
                if reached.cases + sum.cases >= cases {
                    break;
                }
            }
            Ok(sum)
        })??;
        seed += PER_BENCH;
        reached.cases += benched.cases;
        reached.void += benched.void;
        reached.packets += benched.packets;
        reached.allowed += benched.allowed;
        reached.denied += benched.denied;
        reached.named += benched.named;
        reached.audited += benched.audited;
    }
    println!("{reached:?} in {:.1?}", start.elapsed());
    ensure!(reached.allowed > cases && reached.denied > cases && reached.named > cases, "{reached:?}");
    ensure!(reached.audited > cases / 4, "{reached:?}");
    Ok(())
}
