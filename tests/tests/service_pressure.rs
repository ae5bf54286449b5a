//! Services under pressure: one pod that takes all it can get, and endpoints that change a thousand times a second.

use std::io::{self, ErrorKind, Write as _};
use std::net::{SocketAddr, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use proxy_tests::cluster::{ClusterSpec, NodeSpec};
use proxy_tests::manifests::{EndpointSlice, Service};
use proxy_tests::scenario::{SERVICE_PORT, Scenario, service, vip};
use proxy_tests::traffic::flow::ping_all;
use proxy_tests::traffic::socket::tcp_connect;
use proxy_tests::traffic::wire::{Greeting, Mode};
use proxy_tests::traffic::{ANSWERED_WITHIN, BusyFlows, Flow, Steady, SteadyOptions, connect_steadily_while};
use proxy_tests::{Deadline, Family, Pod};

const SECOND: Duration = Duration::from_secs(1);
/// Set to make three times as many changes.
const LONG: &str = "PROXY_TESTS_LONG";
/// How long the work of a test may take where the machine is slow.
const LIMIT: u64 = 300;
/// Entries of each flow table.
const ENTRIES: u64 = 4096;
/// Established flows that one pod may have: half of the entries, two for each.
const QUOTA: usize = 1024;
const FLOODERS: usize = 4;
/// New connections of each family that others make beside the flood.
const CONNECTIONS: u64 = 750;
/// Established flows that are quiet: with 16 busy ones and the flooder's share they leave 14 free, for the 12 that others
/// have at a time.
const IDLE: usize = 994;

fn target(family: Family) -> SocketAddr {
    SocketAddr::new(vip(family, 1), SERVICE_PORT)
}

/// What one pod got that asked for ten times as much as the table has.
#[derive(Debug, Default)]
struct Flood {
    attempts: u64,
    held: Vec<TcpStream>,
    refused: u64,
    others: Vec<ErrorKind>,
}

fn open(target: SocketAddr) -> io::Result<TcpStream> {
    let mut connection = tcp_connect(target, 0, ANSWERED_WITHIN)?;
    connection.write_all(&Mode::Echo.encode())?;
    Greeting::read(&connection)?;
    Ok(connection)
}

/// Opens connections and keeps them, until it has tried often enough and is told to stop.
fn flood(pod: &Pod, stop: &Arc<AtomicBool>) -> Vec<Flood> {
    let tried = Arc::new(AtomicU64::new(0));
    let threads: Vec<_> = (0..FLOODERS)
        .map(|_| {
            let (stop, tried) = (Arc::clone(stop), Arc::clone(&tried));
            let flooding = move || {
                let mut flood = Flood::default();
                while tried.load(Ordering::Relaxed) < 10 * ENTRIES || !stop.load(Ordering::Relaxed) {
                    let number = tried.fetch_add(1, Ordering::Relaxed);
                    flood.attempts += 1;
                    match open(target(Family::BOTH[usize::from(number % 2 == 1)])) {
                        Ok(connection) => flood.held.push(connection),
                        Err(error) if error.kind() == ErrorKind::ConnectionRefused => flood.refused += 1,
                        Err(error) => flood.others.push(error.kind()),
                    }
                }
                flood
            };
            pod.netns().spawn("flood", flooding).expect("thread")
        })
        .collect();
    threads.into_iter().map(proxy_tests::netns::Inside::join).collect()
}

/// The flow tables are full, half of that one pod's: it is refused more; nobody else notices.
#[test]
fn one_pod_floods_and_the_others_do_not_notice() {
    let spec = ClusterSpec::default().node(NodeSpec::new("node1").hostile(true).pods(["a", "b", "c", "e"]));
    let mut scenario = Scenario::build(&spec).expect("scenario");
    scenario.serve_pod("b").expect("servers");
    scenario.publish("web", 1, &["b"]).expect("published");
    let entries = ENTRIES.to_string();
    scenario.start_agents(&["--flow-live-entries", &entries, "--flow-brief-entries", &entries]).expect("agents");
    let [a, c, e] = ["a", "c", "e"].map(|name| scenario.cluster().pod(name).expect("pod"));
    let family = |number: usize| Family::BOTH[number % 2];
    let mut idle: Vec<_> =
        (0..IDLE).map(|n| Flow::open(a.netns(), target(family(n)), 0, ANSWERED_WITHIN).expect("a flow")).collect();
    ping_all(&mut idle, ANSWERED_WITHIN).check("idle flows before").expect("whole");
    let ms = Duration::from_millis(20);
    let busy =
        Family::BOTH.map(|family| BusyFlows::start(a.netns(), target(family), 8, ms, ANSWERED_WITHIN).expect("flows"));
    let before = scenario.counters(0).expect("counters");
    let stop = Arc::new(AtomicBool::new(false));
    let limit = Deadline::secs(LIMIT);
    let go_on = move |made| made < CONNECTIONS && limit.left().is_some();
    let (floods, reports, full) = thread::scope(|scope| {
        let flooding = scope.spawn(|| flood(&c, &stop));
        let clients = Family::BOTH.map(|family| {
            let netns = e.netns().clone();
            scope.spawn(move || connect_steadily_while(&netns, target(family), 6, 100, go_on).expect("connections"))
        });
        let reports = clients.map(|client| client.join().expect("clients"));
        let mut full = 0;
        let is_full = || {
            full = full.max(scenario.status(0).expect("status").used("flow_live"));
            full >= ENTRIES * 99 / 100
        };
        // What came of it is looked at below; the flooder is to be stopped in any case.
        let _ = Deadline::secs(60).until("the table is full", is_full);
        stop.store(true, Ordering::Relaxed);
        (flooding.join().expect("flood"), reports, full)
    });
    let added = scenario.counters(0).expect("counters").since(&before);
    let sum = |of: fn(&Flood) -> u64| floods.iter().map(of).sum::<u64>();
    let (attempts, refused) = (sum(|flood| flood.attempts), sum(|flood| flood.refused));
    let held: usize = floods.iter().map(|flood| flood.held.len()).sum();
    let others: Vec<_> = floods.iter().flat_map(|flood| &flood.others).collect();
    eprintln!(
        "{attempts} attempts, {held} held, {refused} refused, {} otherwise; flow_live {full} of {ENTRIES}; {} and {}; {added}",
        others.len(),
        reports[0],
        reports[1]
    );

    // Nobody else is harmed: established flows, quiet and busy, and new connections.
    let whole = ping_all(&mut idle, ANSWERED_WITHIN).check("idle flows after").expect("whole");
    assert_eq!(whole.flows, IDLE as u64);
    for flows in busy {
        flows.stop().check("busy flows").expect("whole");
    }
    for report in &reports {
        assert!(report.operations >= CONNECTIONS, "{} of {CONNECTIONS}: {report}", report.operations);
        assert!(report.errors * 100 <= report.operations, "{report}: {:?}", report.first_error);
        assert!(report.quantile(0.99) < 5 * SECOND, "{report}");
    }
    // The flooder gets its share, and a refusal for everything else.
    assert!(attempts >= 10 * ENTRIES, "{attempts}");
    // A flow that finds the table full is not counted: a few more get in while it is.
    assert!((QUOTA..QUOTA + QUOTA / 16).contains(&held), "{held} held");
    assert_eq!((refused, others.as_slice()), (attempts - held as u64, &[][..]));
    assert_eq!(added.get("from_pod", "pod_quota"), refused, "{added}");
    assert!(full >= ENTRIES * 99 / 100, "flow_live holds {full}");
    // What it lets go it may have again.
    drop(floods);
    let again = || c.netns().run(|| open(target(Family::V4))).is_ok_and(|opened| opened.is_ok());
    Deadline::secs(30).until("the flooder may connect again", again).expect("it may");
}

/// Which pods are behind the second slice of the Service that always has `b`, one after the other.
const TURNS: [&[&str]; 6] = [&["c"], &["c", "e"], &[], &["e"], &["b", "e"], &["b"]];
/// Services beside it that change, too.
const BESIDE: u16 = 40;

/// A thousand changes a second: half of them of a Service under load, which always has a ready endpoint. So many are due; a
/// machine that cannot write as fast makes them all the same, and says how fast it was.
#[test]
fn endpoints_change_a_thousand_times_a_second() {
    const RATE: u32 = 1000;
    let seconds = if std::env::var_os(LONG).is_some() { 60 } else { 20 };
    let wanted = seconds * RATE;
    let connections = u64::from(seconds) * 90;
    let spec = ClusterSpec::default().node(NodeSpec::new("node1").hostile(true).pods(["a", "b", "c", "e"]));
    let mut scenario = Scenario::build(&spec).expect("scenario");
    for pod in ["b", "c", "e"] {
        scenario.serve_pod(pod).expect("servers");
    }
    let web = scenario.publish("web", 1, &["b"]).expect("published");
    let beside: Vec<Service> = (0..BESIDE).map(|n| service(&format!("beside-{n}"), 100 + n)).collect();
    for one in &beside {
        scenario.publish_service(one, &["c"]).expect("published");
    }
    scenario.start_agents(&[]).expect("agents");
    let a = scenario.netns("a").expect("pod");
    // Made beforehand: what is timed is writing.
    let turns = |service: &Service, suffix: &str| -> Vec<EndpointSlice> {
        let slices = TURNS.iter().flat_map(|pods| Family::BOTH.map(|family| scenario.slice(service, family, pods)));
        let named = slices.map(|slice| slice.map(|slice| EndpointSlice { name: slice.name.clone() + suffix, ..slice }));
        named.collect::<Result<_, _>>().expect("slices")
    };
    let mine = turns(&web, "-more");
    let theirs: Vec<_> = beside.iter().flat_map(|service| turns(service, "")).collect();
    let changed = Arc::new(AtomicBool::new(false));
    let (done, limit) = (Arc::clone(&changed), Deadline::secs(LIMIT));
    // Connections are made for as long as endpoints change.
    let go_on = move |made| (made < connections || !done.load(Ordering::Relaxed)) && limit.left().is_some();
    let (took, reports, udp) = thread::scope(|scope| {
        let changing = scope.spawn(|| {
            let start = Instant::now();
            let mut changes = 0_u32;
            while changes < wanted && limit.left().is_some() {
                let due = start + SECOND / RATE * changes;
                if let Some(early) = due.checked_duration_since(Instant::now()).filter(|early| !early.is_zero()) {
                    thread::park_timeout(early);
                    continue;
                }
                let turn = changes as usize / 2;
                let slice =
                    if changes.is_multiple_of(2) { &mine[turn % mine.len()] } else { &theirs[turn % theirs.len()] };
                scenario.manifests().write(slice).expect("written");
                changes += 1;
            }
            changed.store(true, Ordering::Relaxed);
            assert_eq!(changes, wanted, "changes in {:?}", start.elapsed());
            start.elapsed()
        });
        let steady = Family::BOTH.map(|family| {
            Steady::start(&a, target(family), SteadyOptions { rate: 100, ..SteadyOptions::default() }).expect("sender")
        });
        let clients = Family::BOTH.map(|family| {
            let (a, go_on) = (a.clone(), go_on.clone());
            scope.spawn(move || connect_steadily_while(&a, target(family), 8, 100, go_on).expect("connections"))
        });
        let reports = clients.map(|client| client.join().expect("clients"));
        let took = changing.join().expect("changes");
        (took, reports, steady.map(Steady::stop))
    });
    let done = Instant::now();
    scenario.set_endpoints(&web, &["b", "c"]).expect("written");
    for family in Family::BOTH {
        let slice = scenario.slice(&web, family, &["e"]).expect("slice");
        let slice = EndpointSlice { name: slice.name.clone() + "-more", ..slice };
        scenario.manifests().write(&slice).expect("written");
    }
    scenario.wait_endpoints(0, "web", Some(3)).expect("the last change is applied");
    eprintln!(
        "{wanted} changes in {took:?}, {:.0} a second, the last one applied after {:?}; {} and {}; UDP lost {} and {}",
        f64::from(wanted) / took.as_secs_f64(),
        done.elapsed(),
        reports[0],
        reports[1],
        udp[0].lost(),
        udp[1].lost()
    );
    for report in &reports {
        assert_eq!((report.errors, report.first_error.as_deref()), (0, None), "{report}");
        assert!(report.operations >= connections, "{} of {connections}: {report}", report.operations);
    }
    for report in &udp {
        assert_eq!((report.lost(), report.strangers, report.damaged), (0, 0, 0));
        assert!(report.sent() > 1000, "{}", report.sent());
    }
}
