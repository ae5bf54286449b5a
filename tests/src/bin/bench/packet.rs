//! Nanoseconds of one program for one packet of an established flow, by `BPF_PROG_TEST_RUN`.
//!
//! Ten thousand TCP connections through a Service are opened by the programs themselves: SYN, SYN-ACK and ACK of each.
//! (First they are opened and closed again, round by round, and each packet of that is measured too.) Then every connection sends one segment, in random order, in its own system call with `repeat` 1. So every run begins
//! with an untranslated packet and with a flow that is seldom in the CPU's caches; what the call itself costs, the clock
//! included, is what the same call with a program of two instructions costs, and is subtracted.

use std::net::IpAddr;
use std::os::fd::{AsFd as _, BorrowedFd};

use anyhow::{Context as _, Result, ensure};
use aya::Ebpf;
use aya::programs::SchedClassifier;
use proxy_abi::{
    BackendEntry, DeviceEntry, FrontendEntry, FrontendKey, Hook, IpBytes, LocalPodEntry, MacBytes, NameBytes, PortBe,
    Proto, Reason, ServiceEntry, capacity,
};
use proxy_agent::dataplane::sysbpf::test_run;
use proxy_agent::dataplane::{AttachMode, Bpf, Config, SocketLb};
use proxy_core::dataplane::Dataplane as _;
use proxy_core::netpol::engine::Limits;
use proxy_core::tables::Op;
use proxy_ebpf::conntrack::UdpIdle;
use proxy_tests::packet::{Frame, L4, Tcp, tcp_flag};
use proxy_tests::{Cluster, Node, NodeSpec, Pod};
use serde_json::{Value, json};

use crate::empty;
use crate::objects::{self, FAMILY, Port};
use crate::stats::{Budget, Estimate, median};
use crate::traffic::{right_aligned, table};

/// Connections.
const FLOWS: u16 = 10_000;
/// Source port of the first.
const FIRST_PORT: u16 = 20_000;
/// Bytes that a segment carries.
const PAYLOAD: usize = 64;

/// One kind of packet at one hook.
struct Case {
    title: &'static str,
    program: &'static str,
    hook: Hook,
    reason: Reason,
    ifindex: u32,
    frames: Vec<Vec<u8>>,
}

/// One packet of every connection.
struct Stage {
    title: &'static str,
    ifindex: u32,
    frames: Vec<Vec<u8>>,
}

/// Measures so many rounds, prints, and returns everything as JSON.
pub(crate) fn run(rounds: usize) -> Result<Value> {
    let cluster = Cluster::builder().node(NodeSpec::new("node1").pods(["client", "server"])).build()?;
    let node = cluster.node("node1")?;
    let (client, server) = (cluster.pod("client")?, cluster.pod("server")?);
    node.netns().run(|| {
        let config = Config {
            pin_root: node.pin_root(),
            attach: AttachMode::Auto,
            cgroup: None,
            socket_lb: SocketLb::Node,
            flow_live: capacity::FLOW_LIVE,
            flow_brief: capacity::FLOW_BRIEF,
            pod_quota: 0,
            node_open: false,
            udp_idle: UdpIdle::DEFAULT,
            policy: Limits::default(),
        };
        let mut bpf = Bpf::open(&config).context("loading the programs")?;
        let measured = measure(&mut bpf, node, &client, &server, rounds);
        drop(bpf);
        proxy_agent::dataplane::cleanup(&node.pin_root())?;
        measured
    })?
}

fn measure(bpf: &mut Bpf, node: &Node, client: &Pod, server: &Pod, rounds: usize) -> Result<Value> {
    for op in tables(node, client, server)? {
        bpf.apply(&op).with_context(|| format!("{op:?}"))?;
    }
    let mut object = Ebpf::load(&empty::object()).context("the empty program")?;
    let nothing: &mut SchedClassifier = object.program_mut(empty::PROGRAM).context("no program")?.try_into()?;
    nothing.load()?;
    let nothing = nothing.fd()?.as_fd();

    let (vip, pod) = (objects::vip(), server.ip(FAMILY));
    let gateway = node.bridge_mac();
    let frame = |from: (&Pod, IpAddr, u16), to: (IpAddr, u16), flags: u8, payload: usize| {
        let (pod, src, src_port) = from;
        let payload = vec![0x5a; payload];
        let tcp = Tcp { src: src_port, dst: to.1, seq: 1, ack: 1, flags, window: 1_000, payload, ..Tcp::default() };
        Frame::ip((pod.mac(), src), (gateway, to.0), L4::Tcp(tcp)).build()
    };
    let up = |number: u16, flags, payload| {
        frame((client, client.ip(FAMILY), FIRST_PORT + number), (vip, Port::Short.service()), flags, payload)
    };
    let down = |number: u16, flags, payload| {
        frame((server, pod, Port::Short.target()), (client.ip(FAMILY), FIRST_PORT + number), flags, payload)
    };
    let (near, far) = (client.host_veth().ifindex, server.host_veth().ifindex);
    let from_pod = bpf.program_fd("from_pod")?;
    let (syn, ack, fin) = (tcp_flag::SYN, tcp_flag::ACK, tcp_flag::FIN | tcp_flag::ACK);
    let all = |make: &dyn Fn(u16) -> Vec<u8>| -> Vec<Vec<u8>> {
        let mut numbers: Vec<u16> = (0..FLOWS).collect();
        fastrand::shuffle(&mut numbers);
        numbers.into_iter().map(make).collect()
    };
    let life = [
        Stage { title: "SYN: choose, two entries", ifindex: near, frames: all(&|n| up(n, syn, 0)) },
        Stage { title: "SYN-ACK", ifindex: far, frames: all(&|n| down(n, syn | ack, 0)) },
        Stage { title: "ACK: established, both entries move", ifindex: near, frames: all(&|n| up(n, ack, 0)) },
        Stage { title: "request", ifindex: near, frames: all(&|n| up(n, ack, PAYLOAD)) },
        Stage { title: "reply", ifindex: far, frames: all(&|n| down(n, ack, PAYLOAD)) },
        Stage { title: "FIN of the client", ifindex: near, frames: all(&|n| up(n, fin, 0)) },
        Stage { title: "FIN of the server: both entries move back", ifindex: far, frames: all(&|n| down(n, fin, 0)) },
        Stage { title: "last ACK", ifindex: near, frames: all(&|n| up(n, ack, 0)) },
    ];
    let lives = report_life(bpf, nothing, &life, rounds)?;
    for number in 0..FLOWS {
        test_run(from_pod, &up(number, syn, 0), (near, 0), 1)?;
        test_run(from_pod, &down(number, syn | ack, 0), (far, 0), 1)?;
        test_run(from_pod, &up(number, ack, 0), (near, 0), 1)?;
    }
    let live = bpf.maps().flow_live.read()?.len();
    ensure!(live == 2 * usize::from(FLOWS), "{live} entries of established flows, not two for each of {FLOWS}");

    // What arrives at the backend's veth has been translated by the first hook already.
    let translated =
        |number: u16| test_run(from_pod, &up(number, tcp_flag::ACK, PAYLOAD), (near, 0), 1).map(|run| run.packet);
    let order = || {
        let mut numbers: Vec<u16> = (0..FLOWS).collect();
        fastrand::shuffle(&mut numbers);
        numbers
    };
    let request = order().into_iter().map(|n| up(n, tcp_flag::ACK, PAYLOAD)).collect();
    let reply = order().into_iter().map(|n| down(n, tcp_flag::ACK, PAYLOAD)).collect();
    let arriving = order().into_iter().map(translated).collect::<Result<_, _>>()?;
    let case = |title, program, hook, reason, ifindex, frames| Case { title, program, hook, reason, ifindex, frames };
    let cases = [
        case("request at the client's veth: translate", "from_pod", Hook::FromPod, Reason::Service, near, request),
        case("reply at the backend's veth: translate back", "from_pod", Hook::FromPod, Reason::Reply, far, reply),
        case("request on its way to the backend", "to_pod", Hook::ToPod, Reason::Seen, far, arriving),
    ];
    let established = report(bpf, nothing, &cases, rounds)?;
    Ok(json!({ "flows": FLOWS, "rounds": rounds, "connection": lives, "established": established }))
}

/// Every packet of short connections, as `from_pod` sees them: what a new connection costs.
fn report_life(bpf: &Bpf, nothing: BorrowedFd<'_>, life: &[Stage], rounds: usize) -> Result<Value> {
    println!("\n== ns of from_pod for each packet of a new connection (BPF_PROG_TEST_RUN), {rounds} rounds");
    println!(
        "   {FLOWS} connections in random order, one kind of packet after the other; less an empty program's call"
    );
    let program = bpf.program_fd("from_pod")?;
    let mut columns = vec![Vec::new(); life.len()];
    let mut bare = Vec::new();
    for _ in 0..rounds {
        for (stage, column) in life.iter().zip(&mut columns) {
            let frames: Vec<&[u8]> = stage.frames.iter().map(Vec::as_slice).collect();
            column.push(average(program, &frames, stage.ifindex)?);
            bare.push(average(nothing, &frames, stage.ifindex)?);
        }
    }
    let live = bpf.maps().flow_live.read()?.len();
    ensure!(live == 0, "{live} entries of established flows are left of closed connections");
    let empty = median(&bare);
    let mut table = table();
    table.set_header(["", "ns", "95 % interval"]);
    let mut rows = Vec::new();
    let mut sum = 0.0;
    for (stage, column) in life.iter().zip(&columns) {
        let less: Vec<f64> = column.iter().map(|whole| whole - empty).collect();
        let estimate = Estimate::of(&less);
        sum += estimate.mean;
        let Estimate { mean, low, high, .. } = estimate;
        table.add_row([stage.title.to_owned(), format!("{mean:.0}"), format!("{low:.0} to {high:.0}")]);
        rows.push(json!({ "what": stage.title, "ns": estimate }));
    }
    table.add_row(["all of them".to_owned(), format!("{sum:.0}"), String::new()]);
    right_aligned(&mut table);
    println!("{table}");
    Ok(json!({ "empty": empty, "stages": rows, "sum": sum }))
}

fn report(bpf: &Bpf, nothing: BorrowedFd<'_>, cases: &[Case], rounds: usize) -> Result<Value> {
    println!("\n== ns of one program for one packet of an established flow (BPF_PROG_TEST_RUN), {rounds} rounds");
    println!("   cold: {FLOWS} flows in random order; warm: one flow as often; both less an empty program's call");
    let mut table = table();
    table.set_header(["", "program", "empty", "warm", "cold", "95 % interval", "budget", "verdict"]);
    let mut rows = Vec::new();
    for case in cases {
        let program = bpf.program_fd(case.program)?;
        let counted = || -> Result<u64> {
            let values = bpf.maps().counter.get_per_cpu(&case.reason.index(case.hook))?;
            Ok(values.iter().map(|value| value.packets).sum())
        };
        let (mut whole, mut bare, mut one) = (Vec::new(), Vec::new(), Vec::new());
        let same = vec![case.frames.first().context("a case has packets")?.as_slice(); case.frames.len()];
        let random: Vec<&[u8]> = case.frames.iter().map(Vec::as_slice).collect();
        let before = counted()?;
        for _ in 0..rounds {
            whole.push(average(program, &random, case.ifindex)?);
            bare.push(average(nothing, &random, case.ifindex)?);
            one.push(average(program, &same, case.ifindex)?);
        }
        let took = counted()? - before;
        let expected = 2 * (rounds * case.frames.len()) as u64;
        ensure!(took == expected, "{}: {took} of {expected} packets ended as {}", case.title, case.reason);
        let (estimate, warm) = (Estimate::of_differences(&whole, &bare), Estimate::of_differences(&one, &bare));
        let budget = Budget::AtMost(150.0);
        let verdict = estimate.against(budget);
        table.add_row([
            case.title.to_owned(),
            case.program.to_owned(),
            format!("{:.0}", median(&bare)),
            format!("{:.0}", warm.mean),
            format!("{:.0}", estimate.mean),
            format!("{:.0} to {:.0}", estimate.low, estimate.high),
            budget.to_string(),
            verdict.to_string(),
        ]);
        rows.push(json!({
            "what": case.title, "program": case.program, "with_call": whole, "empty": bare, "difference": estimate, "warm": warm,
            "budget": budget, "verdict": verdict,
        }));
    }
    right_aligned(&mut table);
    println!("{table}");
    Ok(Value::from(rows))
}

/// Mean nanoseconds over some packets.
fn average(program: BorrowedFd<'_>, frames: &[&[u8]], ifindex: u32) -> Result<f64> {
    let mut total = 0_u64;
    for frame in frames {
        total += u64::from(test_run(program, frame, (ifindex, 0), 1)?.nanoseconds);
    }
    #[expect(clippy::cast_precision_loss, reason = "seconds in nanoseconds, far below 2^52")]
    Ok(total as f64 / crate::stats::count(frames.len()))
}

/// One Service with one backend on this node, as the agent would write it.
fn tables(node: &Node, client: &Pod, server: &Pod) -> Result<Vec<Op>> {
    let (service, backend, slot) = (1, 1, 1);
    let name = NameBytes::new("default/bench:short").context("a short name")?;
    // The caller is inside the node's namespace.
    let bridge = nix::net::if_::if_nametoindex(proxy_tests::node::BRIDGE)?;
    let gateway = |family| IpBytes::from(node.bridge_ip(family));
    let device = |pod: &Pod| {
        let [ip4, ip6] = [pod.ip4(), pod.ip6()].map(IpBytes::from);
        let [gateway_ip4, gateway_ip6] = proxy_tests::Family::BOTH.map(gateway);
        DeviceEntry {
            ip4,
            ip6,
            gateway_ip4,
            gateway_ip6,
            pod_mac: MacBytes(pod.mac().0),
            gateway_mac: MacBytes(node.bridge_mac().0),
            bridge,
            flags: DeviceEntry::REDIRECT | DeviceEntry::SWITCH,
            slot: 0,
            reserved: 0,
            since: 1,
            mtu: 0,
        }
    };
    let local = |pod: &Pod| LocalPodEntry {
        ifindex: pod.host_veth().ifindex,
        mac: MacBytes(pod.mac().0),
        slot: 0,
        flags: DeviceEntry::REDIRECT | DeviceEntry::SWITCH,
    };
    let mut ops = Vec::new();
    for pod in [client, server] {
        ops.push(Op::SetDevice(pod.host_veth().ifindex, device(pod)));
        ops.extend([pod.ip4(), pod.ip6()].map(|ip| Op::SetLocalPod(ip.into(), local(pod))));
    }
    ops.push(Op::SetService(service, ServiceEntry { name, reserved: 0, affinity_seconds: 0 }));
    ops.push(Op::SetBackend(
        backend,
        BackendEntry {
            ip: server.ip(FAMILY).into(),
            service,
            generation: 1,
            port: PortBe::new(Port::Short.target()),
            proto: Proto::TCP,
            reserved: 0,
            flags: BackendEntry::LOCAL,
        },
    ));
    ops.push(Op::SetSlot(slot, backend));
    ops.push(Op::SetFrontend(
        FrontendKey {
            ip: objects::vip().into(),
            port: PortBe::new(Port::Short.service()),
            proto: Proto::TCP,
            scope: FrontendKey::SCOPE_CLUSTER,
        },
        FrontendEntry { first: slot, count: 1, service, flags: 0, affinity_seconds: 0, generation: 1 },
    ));
    Ok(ops)
}
