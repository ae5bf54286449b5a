//! Live changes of objects, and how soon traffic follows them.

use std::net::SocketAddr;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result};
use proxy_abi::{FrontendKey, Proto};
use proxy_agent::dataplane::pins::Maps;
use proxy_tests::traffic::{
    Flow, Steady, SteadyOptions, TcpOptions, UdpOptions, flow::Ping, tcp_exchange, tcp_exchange_with, udp_exchange,
};
use proxy_tests::{Deadline, Family, Pod};

use crate::narrator::{Narrator, time};
use crate::stage::{NODES, Stage};

/// How soon a change must have reached traffic.
const SOON: Duration = Duration::from_millis(100);
/// Connections that show where new ones go.
const SAMPLE: usize = 32;
/// When a step gives up.
const LIMIT: u64 = 10;

/// The key of a frontend.
fn key(at: SocketAddr, proto: Proto) -> FrontendKey {
    let (ip, port) = (at.ip().into(), proxy_abi::PortBe::new(at.port()));
    FrontendKey { ip, port, proto, scope: FrontendKey::SCOPE_CLUSTER }
}

/// Waits until a frontend has so many backends; the time since `start`.
fn until_selected(maps: &Maps, key: &FrontendKey, count: Option<u32>, start: Instant) -> Result<Duration> {
    let what = format!("{key:?} selects {count:?} backends");
    Deadline::secs(LIMIT).until(&what, || maps.frontend.get(key).is_ok_and(|entry| entry.map(|e| e.count) == count))?;
    Ok(start.elapsed())
}

/// A pod more.
pub(crate) fn scale_up(narrator: &mut Narrator, stage: &mut Stage) -> Result<()> {
    narrator.step("Scale up: pod web-3 starts, the EndpointSlices of Service web name it");
    let pod = stage.cluster.add_pod(NODES[0], "web-3")?;
    stage.serve(&pod)?;
    let (hooks, web) = (stage.hooks()?, stage.service("web")?);
    let (maps, vip) = (hooks.maps(NODES[0])?, web.at(Family::V4, "http")?);
    let client = stage.netns("client")?;
    // The interface is programmed as soon as it is there; the slices come when the pod is ready.
    let local = || maps.local_pod.get(&pod.ip4().into()).is_ok_and(|entry| entry.is_some());
    Deadline::secs(LIMIT).until("the agent knows the new pod's interface", local)?;
    let pods = web.selected(&stage.cluster.pods());
    let start = Instant::now();
    web.apply_slices(&stage.folder, &pods)?;
    let in_map = until_selected(maps, &key(vip, Proto::TCP), Some(3), start)?;
    let mut asked = 0;
    let answered = Deadline::secs(LIMIT).poll("web-3 answers", || {
        asked += 1;
        let report = tcp_exchange(&client, vip, 16, 16)?;
        Ok((report.server_name == "web-3").then(|| start.elapsed()))
    })?;
    narrator.check(
        in_map < SOON,
        format!("{} after the slices were written the kernel's maps have three backends", time(in_map)),
    );
    narrator.check(true, format!("after {} it answered: connection {asked} since the change", time(answered)));
    Ok(())
}

/// A pod less, while a connection to it is open.
pub(crate) fn scale_down(narrator: &mut Narrator, stage: &Stage) -> Result<()> {
    narrator.step("Scale down: web-1 leaves the EndpointSlices while a connection to it is open");
    let (hooks, web) = (stage.hooks()?, stage.service("web")?);
    let (maps, vip) = (hooks.maps(NODES[0])?, web.at(Family::V4, "http")?);
    let client = stage.netns("client")?;
    let mut flow = Deadline::secs(LIMIT).poll("a connection to web-1", || {
        let flow = Flow::open(&client, vip, 0, Duration::from_secs(1))?;
        Ok((flow.server_name() == "web-1").then_some(flow))
    })?;
    let pods: Vec<Pod> = web.selected(&stage.cluster.pods()).into_iter().filter(|p| p.name() != "web-1").collect();
    let start = Instant::now();
    web.apply_slices(&stage.folder, &pods)?;
    let in_map = until_selected(maps, &key(vip, Proto::TCP), Some(2), start)?;
    let mut answered: Vec<String> = Vec::new();
    for _ in 0..SAMPLE {
        answered.push(tcp_exchange(&client, vip, 16, 16)?.server_name);
    }
    let by = |name: &str| answered.iter().filter(|server| *server == name).count();
    narrator.check(
        in_map < SOON && by("web-1") == 0,
        format!(
            "{} after the change the maps have two backends; of {SAMPLE} new connections web-2 answered {}, web-3 {}, \
             web-1 {}",
            time(in_map),
            by("web-2"),
            by("web-3"),
            by("web-1"),
        ),
    );
    let ping = flow.ping(Duration::from_secs(1));
    let lives = matches!(ping, Ping::Echoed(_));
    narrator.check(lives, "the connection that was open goes on with web-1, until one of the two closes it");
    Ok(())
}

/// A UDP client keeps its port, and its backend goes away.
pub(crate) fn udp_switch(narrator: &mut Narrator, stage: &Stage) -> Result<()> {
    narrator.step("UDP with a fixed source port: its backend leaves the EndpointSlices");
    let dns = stage.service("dns")?;
    let client = stage.netns("client")?;
    for family in Family::BOTH {
        let vip = dns.at(family, "dns")?;
        let all = dns.selected(&stage.cluster.pods());
        let port = 40_053;
        let first = udp_exchange(&client, vip, &UdpOptions { source_port: port, ..UdpOptions::default() })?.server_name;
        let options = SteadyOptions { rate: 2_000, source_port: port, connected: true, ..SteadyOptions::default() };
        let steady = Steady::start(&client, vip, options)?;
        let left: Vec<Pod> = all.iter().filter(|pod| pod.name() != first).cloned().collect();
        let second = left.first().context("one dns pod is left")?.name().to_owned();
        let since = |report: Duration| report.as_millis() >= 200;
        Deadline::secs(LIMIT).until("a stream before the change", || since(steady.started().elapsed()))?;
        let changed = steady.started().elapsed();
        dns.apply_slices(&stage.folder, &left)?;
        let enough = changed + Duration::from_millis(400);
        Deadline::secs(LIMIT).until("a stream after the change", || steady.started().elapsed() >= enough)?;
        let report = steady.stop();
        dns.apply_slices(&stage.folder, &all)?;
        let switched = report.first_answered_by(&second, changed).map(|at| at.saturating_sub(changed));
        let last = report.last_answered_by(&first).map(|at| at.saturating_sub(changed));
        let whole = report.lost() == 0 && report.strangers + report.damaged + report.duplicates == 0;
        narrator.check(
            switched.is_some_and(|after| after < SOON) && last < switched && whole,
            format!(
                "{family}: {} datagrams from port {port}, {} lost; {first} answered up to {} after the change, {second} \
                 from {} on",
                report.sent(),
                report.lost(),
                last.map_or("never".to_owned(), time),
                switched.map_or("never".to_owned(), time),
            ),
        );
        until_selected(stage.hooks()?.maps(NODES[0])?, &key(vip, Proto::UDP), Some(2), Instant::now())?;
    }
    Ok(())
}

/// A Service gets another port.
pub(crate) fn edit_port(narrator: &mut Narrator, stage: &mut Stage) -> Result<()> {
    narrator.step("Edit the Service: port 80 becomes 8000");
    let (client, hooks) = (stage.netns("client")?, stage.hooks()?);
    let mut web = stage.service("web")?.clone();
    let old = web.at(Family::V4, "http")?;
    web.edit_port("http", 8000)?;
    let new = web.at(Family::V4, "http")?;
    let maps = hooks.maps(NODES[0])?;
    let start = Instant::now();
    web.apply(&stage.folder)?;
    let in_map = until_selected(maps, &key(new, Proto::TCP), Some(2), start)?;
    let report = tcp_exchange(&client, new, 16, 16)?;
    let answered = start.elapsed();
    narrator.check(
        in_map < SOON,
        format!(
            "{} after the change port 8000 is in the maps; after {} {} answered from {}",
            time(in_map),
            time(answered),
            report.server_name,
            report.peer
        ),
    );
    until_selected(maps, &key(old, Proto::TCP), None, start)?;
    let before = hooks.settled()?;
    let options = TcpOptions { timeout: Duration::from_millis(200), ..TcpOptions::default() };
    let refused = tcp_exchange_with(&client, old, &options).is_err();
    let counted = hooks.settled()?.since(&before);
    narrator.check(refused, "port 80 answers no more:");
    narrator.detail(&counted);
    web.edit_port("http", 80)?;
    web.apply(&stage.folder)?;
    until_selected(maps, &key(old, Proto::TCP), Some(2), Instant::now())?;
    Ok(())
}
