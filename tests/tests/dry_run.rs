//! A dry run of the programs, as `trace why` makes it: it writes nothing at all, and says what the programs then do.

use std::collections::BTreeMap;
use std::path::Path;
use std::process::Command;

use anyhow::{Context as _, Result, ensure};
use proxy_abi::{FrontendEntry, Hook, Reason};
use proxy_agent::dataplane::Error;
use proxy_agent::dataplane::dry::DryRun;
use proxy_agent::dataplane::pins::Pins;
use proxy_core::name::ObjectName;
use proxy_core::netpol::engine::Limits;
use proxy_core::netpol::spec::{Change, PolicySpec, RuleSpec, SelectorSpec};
use proxy_tests::bpf::policed::{NODE, Policed, namespace, pod};
use proxy_tests::bpf::talk::{TALKS, Talk};
use proxy_tests::bpf::{Bench, ROOMY, frontend};
use proxy_tests::packet::Frame;
use proxy_tests::packet::named::{Host, NODE_ONE, OUTSIDE, POD_ONE, POD_REMOTE, POD_TWO, VIP_ONE, VIP_TWO};
use proxy_tests::packet::tcp_flag::{ACK, FIN, RST, SYN};

const CLIENT: u16 = 40_000;
const PORT: u16 = 80;
const STICKY: u16 = 81;
const EMPTY: u16 = 82;
const TARGET: u16 = 8080;
/// What is large enough to be sent in fragments, and what they fit into.
const LARGE: usize = 3000;
const MTU: usize = 1500;

/// A frame at a program.
struct Asked {
    hook: Hook,
    at: Host,
    frame: Vec<u8>,
    what: String,
}

const fn program(hook: Hook) -> &'static str {
    match hook {
        Hook::FromPod => "from_pod",
        Hook::FromNetdev => "from_netdev",
        Hook::ToNetdev => "to_netdev",
        _ => "to_pod",
    }
}

/// Services with one backend each, so that nothing is left to chance: plain, with affinity, with none; and one whose
/// clients are masqueraded.
fn services(bench: &Bench) -> Result<()> {
    for talk in TALKS {
        let backend = [(POD_TWO.ip(talk.family), TARGET)];
        let key = |vip: &Host, port| frontend(vip.ip(talk.family), port, talk.proto);
        bench.set_frontend(key(&VIP_ONE, PORT), &backend, 0, 0)?;
        bench.set_frontend(key(&VIP_ONE, STICKY), &backend, 0, 60)?;
        bench.set_frontend(key(&VIP_ONE, EMPTY), &[], 0, 0)?;
        let outside = [(OUTSIDE.ip(talk.family), TARGET)];
        bench.set_frontend(key(&VIP_TWO, PORT), &outside, FrontendEntry::MASQUERADE, 0)?;
    }
    Ok(())
}

/// Who sends to whom, in every state of a connection, at every program; fragments and echoes besides.
fn questions() -> Vec<Asked> {
    let senders = [
        (&POD_ONE, CLIENT),
        (&POD_ONE, CLIENT + 1),
        (&POD_TWO, TARGET),
        (&OUTSIDE, CLIENT),
        (&OUTSIDE, TARGET),
        (&POD_REMOTE, CLIENT),
        (&VIP_ONE, PORT),
    ];
    let receivers = [
        (&VIP_ONE, PORT),
        (&VIP_ONE, STICKY),
        (&VIP_ONE, EMPTY),
        (&VIP_TWO, PORT),
        (&POD_TWO, TARGET),
        (&POD_ONE, CLIENT),
        (&NODE_ONE, CLIENT),
        (&OUTSIDE, TARGET),
    ];
    let places = [
        (Hook::FromPod, POD_ONE),
        (Hook::ToPod, POD_ONE),
        (Hook::FromPod, POD_TWO),
        (Hook::ToPod, POD_TWO),
        (Hook::FromNetdev, NODE_ONE),
        (Hook::ToNetdev, NODE_ONE),
    ];
    let mut asked = Vec::new();
    for talk in TALKS {
        let all: &[u8] = if talk.is_tcp() { &[SYN, SYN | ACK, ACK, FIN | ACK, RST] } else { &[0] };
        for (from, to) in senders.iter().flat_map(|from| receivers.iter().map(move |to| (*from, *to))) {
            let mut frames: Vec<Vec<u8>> = all.iter().map(|flags| talk.frame(from, to, *flags).build()).collect();
            if !talk.is_tcp() {
                let large = from.0.udp(from.1, to.0, to.1, talk.family, &[7; LARGE]);
                frames.extend(large.fragments(MTU).iter().map(Frame::build));
            }
            for (hook, at) in places {
                for (number, frame) in frames.iter().enumerate() {
                    let what = format!("{talk:?} {} → {}, {number}, {hook} of {}", from.0.ip4, to.0.ip4, at.ip4);
                    asked.push(Asked { hook, at, frame: frame.clone(), what });
                }
            }
        }
    }
    asked
}

/// Opens for everybody what the policy of a pod is about: `None` = nothing.
fn policy(on: &str, rules: Option<RuleSpec>) -> Change {
    let selector = SelectorSpec { labels: [("app".into(), on.into())].into(), ..SelectorSpec::default() };
    Change::Policy(PolicySpec {
        audit: None,
        name: ObjectName::new("default", format!("for-{on}")),
        pod_selector: Some(selector),
        policy_types: Some(vec!["Ingress".into()]),
        ingress: Some(rules.into_iter().collect()),
        egress: None,
    })
}

/// Every pinned map, entry for entry.
fn content(bench: &Bench) -> Result<BTreeMap<String, String>> {
    let mut all = BTreeMap::new();
    for file in std::fs::read_dir(bench.pins().maps())? {
        let path = file?.path();
        let name = path.file_name().context("a name")?.to_string_lossy().into_owned();
        let output = Command::new("bpftool").args(["map", "dump", "pinned"]).arg(&path).output()?;
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        // A ring has no entries that could be looked up.
        ensure!(output.status.success() || name == "trace_ring", "{name}: {output:?}");
        all.insert(name, text);
    }
    Ok(all)
}

/// Where the source port of a frame without options stands, as bytes.
fn source_port(frame: &[u8]) -> Option<&[u8]> {
    let at = if frame.get(12..14)? == [0x86, 0xdd] { 54 } else { 34 };
    frame.get(at..at + 2)
}

/// Names of the maps that differ.
fn differing(before: &BTreeMap<String, String>, after: &BTreeMap<String, String>) -> Vec<String> {
    before.iter().filter(|(name, text)| after.get(*name) != Some(text)).map(|(name, _)| name.clone()).collect()
}

/// Runs `work` on a bench with Services, a policy at pod two and flows in all states.
fn with_flows(work: impl FnOnce(&Bench, &[Asked]) -> Result<()> + Send) -> Result<()> {
    Bench::run(ROOMY, |bench| {
        services(bench)?;
        let objects = [("one", &POD_ONE), ("two", &POD_TWO)].map(|(name, host)| Change::Pod(pod(name, host, NODE)));
        let everybody = || Some(RuleSpec { peers: None, ports: None });
        let changes = [namespace("default")].into_iter().chain(objects).chain([policy("two", everybody())]);
        let mut policed = Policed::start(bench, Limits::default(), changes.collect())?;
        policed.place_pod(&POD_TWO, "two")?;
        let asked = questions();
        for talk in TALKS.into_iter().filter(|talk| talk.is_tcp()) {
            establish(bench, talk)?;
        }
        for one in asked.iter().filter(|one| one.hook == Hook::FromPod).step_by(3) {
            bench.feed(one.hook, &one.at, &one.frame)?;
        }
        // So that flows are judged anew.
        policed.change([policy("one", None)])?;
        policed.change([policy("two", None)])?;
        policed.change([policy("two", everybody())])?;
        work(bench, &asked)
    })?
}

fn establish(bench: &Bench, talk: Talk) -> Result<()> {
    let (client, vip, backend) = ((&POD_ONE, CLIENT + 7), (&VIP_ONE, PORT), (&POD_TWO, TARGET));
    for flags in [SYN, ACK] {
        bench.feed(Hook::FromPod, &POD_ONE, &talk.frame(client, vip, flags).build())?;
        bench.feed(Hook::FromPod, &POD_TWO, &talk.frame(backend, client, flags | ACK).build())?;
    }
    Ok(())
}

#[test]
fn nothing_is_written() -> Result<()> {
    with_flows(|bench, asked| {
        let flows = bench.flows()?;
        ensure!(flows.iter().any(|(_, entry, _)| entry.live), "an established flow");
        let mut dry = DryRun::open(&bench.pins())?;
        let before = content(bench)?;
        for one in asked {
            dry.run(program(one.hook), &one.frame, (bench.ifindex(&one.at), 0)).context(one.what.clone())?;
        }
        assert_eq!(differing(&before, &content(bench)?), [""; 0]);
        // The programs themselves would have written.
        for one in asked {
            bench.run_once(one.hook, &one.at, &one.frame)?;
        }
        let written = differing(&before, &content(bench)?);
        for name in ["affinity", "counter", "flow_brief", "flow_live", "fragment"] {
            assert!(written.iter().any(|found| found == name), "{name} is not among {written:?}");
        }
        Ok(())
    })
}

#[test]
fn it_is_what_the_programs_do() -> Result<()> {
    with_flows(|bench, asked| {
        let mut dry = DryRun::open(&bench.pins())?;
        let mut seen: BTreeMap<Reason, usize> = BTreeMap::new();
        for one in asked {
            let said = dry.run(program(one.hook), &one.frame, (bench.ifindex(&one.at), 0))?;
            let done = bench.feed(one.hook, &one.at, &one.frame)?;
            let told = said.decision.with_context(|| format!("{}: no decision", one.what))?;
            let reason = Reason::ALL.iter().find(|reason| **reason as u32 == told.reason).context("a reason")?;
            assert_eq!(said.verdict, done.verdict, "{}: {reason:?}, {:?}", one.what, done.counts);
            assert!(done.counts.contains_key(&(one.hook, *reason)), "{}: {reason:?}, {:?}", one.what, done.counts);
            // A new source port, for a masquerade or because of a clash, is by chance.
            if source_port(&done.packet) == source_port(&one.frame) {
                assert_eq!(said.packet, done.packet, "{}: {reason:?}", one.what);
            }
            *seen.entry(*reason).or_default() += 1;
        }
        for reason in [Reason::ServiceNew, Reason::Service, Reason::Reply, Reason::NoBackend, Reason::DirectNew] {
            assert!(seen.contains_key(&reason), "{reason:?} is not among {seen:?}");
        }
        Ok(())
    })
}

#[test]
fn without_pins_there_is_nothing_to_run() {
    let error = DryRun::open(&Pins::new(Path::new("/sys/fs/bpf/no-such-agent"))).expect_err("no pins");
    assert!(matches!(error, Error::NotRunning { .. }), "{error:?}");
}
