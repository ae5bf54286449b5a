//! What `proxy-agent trace` costs: compiled in and off, on with a filter that matches nothing; and what it finds of few
//! packets beside as many others as the machine can send.

use std::net::SocketAddr;
use std::os::fd::AsFd as _;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use aya::programs::SchedClassifier;
use aya::{Ebpf, EbpfLoader};
use proxy_agent::dataplane::object;
use proxy_agent::dataplane::sysbpf::test_run;
use proxy_tests::Cluster;
use proxy_tests::NodeSpec;
use proxy_tests::packet::{Frame, L4, Udp};
use proxy_tests::rawsock::RawSocket;
use proxy_tests::tracer::Tracer;
use proxy_tests::traffic::{UdpOptions, udp_exchange};
use serde_json::{Value, json};

use crate::contender::{OURS, Scene, Site};
use crate::measure::{Kind, measure};
use crate::objects::{FAMILY, Port};
use crate::stats::{Budget, Estimate};
use crate::traffic::{Comparison, print_comparisons};

/// Runs of a program in one system call.
const REPEAT: u32 = 400_000;
/// Nobody has this address.
const NOBODY: &str = "10.255.255.1";
/// Where the flood goes: nobody reads there.
const FLOODED: u16 = 9_999;
/// Longest time between the start of a trace and its end, besides what is measured.
const SLACK: Duration = Duration::from_secs(20);

/// All of it: so many rounds, each measurement for `time`.
pub(crate) fn run(rounds: usize, time: Duration) -> Result<Value> {
    let off = off(rounds)?;
    let (on, flood) = (on(rounds, time)?, flood(u32::try_from(rounds)?)?);
    Ok(json!({ "off": off, "matching_nothing": on, "flood": flood }))
}

/// The program `from_pod`, with tracing or without: where the constant is 0, the verifier has taken it out.
fn load(tracing: u32) -> Result<Ebpf> {
    let mut loader = EbpfLoader::new();
    loader.override_global("TRACING", &tracing, true);
    loader.override_global("DRY_RUN", &0_u32, true);
    loader.override_global("SOCKET_LB", &0_u32, true);
    let mut ebpf = loader.load(object())?;
    let program: &mut SchedClassifier = ebpf.program_mut("from_pod").context("no from_pod")?.try_into()?;
    program.load()?;
    Ok(ebpf)
}

/// ns of a packet on an interface without an entry: all of it is the way in and out, where tracing is.
fn nanoseconds(ebpf: &Ebpf) -> Result<f64> {
    let program = ebpf.program("from_pod").context("no from_pod")?.fd()?;
    let mut packet = [0_u8; 64];
    packet[12..15].copy_from_slice(&[8, 0, 0x45]);
    Ok(f64::from(test_run(program.as_fd(), &packet, (1, 0), REPEAT)?.nanoseconds))
}

/// Compiled in and off, against compiled out.
fn off(rounds: usize) -> Result<Value> {
    println!("\n== tracing that is off: from_pod with it and without (BPF_PROG_TEST_RUN), {rounds} rounds");
    let cluster = Cluster::builder().node(NodeSpec::new("node1")).build()?;
    let pairs = cluster.node("node1")?.netns().run(|| -> Result<Vec<[f64; 2]>> {
        let [without, with] = [load(0)?, load(1)?];
        (0..rounds).map(|_| Ok([nanoseconds(&with)?, nanoseconds(&without)?])).collect()
    })??;
    let column = |at: usize| pairs.iter().map(|pair| pair[at]).collect::<Vec<_>>();
    let comparison = Comparison {
        text: "ns a packet: compiled in and off − compiled out".to_owned(),
        estimate: Estimate::of_differences(&column(0), &column(1)),
        budget: Some(Budget::AtMost(5.0)),
    };
    print_comparisons(std::slice::from_ref(&comparison));
    Ok(json!({ "with": column(0), "without": column(1), "comparison": comparison.json() }))
}

/// On, with a filter that nothing matches, against off: the same node, in turns.
fn on(rounds: usize, time: Duration) -> Result<Value> {
    println!("\n== tracing that is on and matches nothing, against off: {rounds} rounds of {time:?}");
    let site = Site::build(OURS, Scene::SameNode, 10, None)?;
    let kinds = [Kind::Connect16, Kind::TcpRequest, Kind::UdpRequest];
    let mut rates = kinds.map(|_| [Vec::new(), Vec::new()]);
    let duration = |time: Duration| format!("{}ms", time.as_millis());
    for round in 0..=rounds {
        for traced in [round % 2 == 0, round % 2 != 0] {
            let whole = duration(time * 8 + SLACK);
            let tracer = if traced { Some(Tracer::start(site.node()?, &[NOBODY, "--for", &whole])?) } else { None };
            for (kind, [off, on]) in kinds.into_iter().zip(&mut rates) {
                let sample = measure(&site, kind, time)?;
                if round > 0 {
                    if traced { on } else { off }.push(sample.rate);
                }
            }
            if let Some(tracer) = tracer {
                let ended = tracer.interrupt()?;
                ensure!(ended.code == Some(130), "the trace ended before: {:?} {}", ended.code, ended.err);
            }
        }
        eprint!("\rround {round} of {rounds}");
    }
    eprintln!();
    let comparisons = kinds.into_iter().zip(&rates).map(|(kind, [off, on])| Comparison {
        text: format!("{}: on ÷ off", kind.title()),
        estimate: Estimate::of_ratios(on, off),
        budget: Some(Budget::AtLeast(0.95)),
    });
    let comparisons: Vec<Comparison> = comparisons.collect();
    print_comparisons(&comparisons);
    Ok(comparisons.iter().map(Comparison::json).collect())
}

/// One request a second through the Service, while the client sends datagrams to the server as fast as it can: how many
/// of the requests the trace shows, and whether it says so where it is not all.
fn flood(seconds: u32) -> Result<Value> {
    println!("\n== one match a second in a flood, {seconds} s");
    let site = Site::build(OURS, Scene::SameNode, 10, None)?;
    let node = site.node()?;
    let (client, server) = site.pods();
    let socket = RawSocket::open(client.netns(), "eth0")?;
    let reader = SocketAddr::new(server.ip(FAMILY), FLOODED);
    let _unread = server.netns().run(|| std::net::UdpSocket::bind(reader))??;
    let datagram = L4::Udp(Udp { src: FLOODED, dst: FLOODED, payload: vec![0x5a; 18], ..Udp::default() });
    let frame = Frame::ip((client.mac(), client.ip(FAMILY)), (server.mac(), server.ip(FAMILY)), datagram).build();
    let (count, whole) = (seconds.to_string(), format!("{}s", u64::from(seconds) + SLACK.as_secs()));
    let service = "svc:default/bench";
    let filter = ["pod:default/client", "to", service, "-f", "udp", "--all-of-flow", "--no-replies", "-c", &count];
    let arguments = [&filter[..], &["--for", &whole, "--rate", "0", "-o", "ndjson"]].concat();
    let tracer = Tracer::start(node, &arguments)?;
    let stop = AtomicBool::new(false);
    let (begin, frames) = (Instant::now(), [frame]);
    let flooded = thread::scope(|scope| -> Result<_> {
        let flood = scope.spawn(|| socket.flood(&frames, None, |_| !stop.load(Ordering::Relaxed)));
        let asked = (1..=seconds).try_for_each(|second| -> Result<()> {
            udp_exchange(client.netns(), site.target(Port::Datagram), &UdpOptions::default())?;
            thread::park_timeout(
                (begin + Duration::from_secs(second.into())).saturating_duration_since(Instant::now()),
            );
            Ok(())
        });
        stop.store(true, Ordering::Relaxed);
        let flooded = flood.join().map_err(|_| anyhow::anyhow!("the flood panicked"))?;
        asked?;
        Ok(flooded?)
    })?;
    let traced = tracer.finish(SLACK * 2)?;
    let (found, summary) = (traced.packets().len(), traced.one("summary"));
    println!("{} packets a second; {found} of {seconds} requests shown, exit code {:?}", flooded.rate(), traced.code);
    println!("{summary}");
    let told = traced.code == Some(4);
    ensure!(told || found == seconds as usize, "requests are missing and the trace does not say so: {summary}");
    Ok(json!({
        "per_second": flooded.rate(), "asked": seconds, "found": found, "code": traced.code, "summary": summary,
    }))
}
