//! `trace drops`: what is dropped on this node, grouped by reason and place. No event is written for a packet.

use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;
use std::time::Duration;

use proxy_abi::trace::{TraceDropKey, TraceDrops, TraceFilter};
use proxy_abi::{Hook, Proto, Reason};
use serde_json::{Value, json};

use super::expect::Outcome;
use super::kernel::Kernel;
use super::names::{Names, Owner};
use super::{TraceError, drops, layout, maps, own_namespace};
use crate::dataplane::pins::Maps;
use crate::dataplane::probes::{Probes, Probing};

/// What to show.
#[derive(Debug)]
#[expect(clippy::struct_excessive_bools, reason = "each is a flag of the command line")]
pub struct Options {
    /// The agent's pins.
    pub pin_root: PathBuf,
    /// The CNI's records.
    pub cni: PathBuf,
    /// Groups to show.
    pub top: usize,
    /// How often.
    pub every: Duration,
    /// For so long.
    pub limit: Duration,
    /// One table at the end.
    pub once: bool,
    /// Routine as well.
    pub all: bool,
    /// JSON.
    pub is_json: bool,
    /// Of every namespace of this machine.
    pub all_namespaces: bool,
}

/// A group of drops.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Group {
    /// Name of the reason.
    pub reason: String,
    /// Function, or our hook.
    pub place: String,
    /// Device.
    pub device: String,
    /// See [`drops::Cause`].
    pub class: &'static str,
    /// See [`drops::Cause`].
    pub advice: String,
    /// Packets since the command began.
    pub packets: u64,
    /// The last of them: who to whom.
    pub last: String,
    /// Not worth a look.
    pub is_routine: bool,
}

fn own_counts(maps: &Maps) -> Result<BTreeMap<(u32, u32), u64>, TraceError> {
    let mut counts = BTreeMap::new();
    for hook in Hook::ALL {
        for reason in Reason::ALL.iter().filter(|reason| reason.is_drop()) {
            let values = maps.counter.get_per_cpu(&reason.index(*hook))?;
            counts.insert((*hook as u32, *reason as u32), values.iter().map(|value| value.packets).sum());
        }
    }
    Ok(counts)
}

/// Groups of the kernel's drops, and of those of our programs since `before`.
fn groups(
    rows: &[(TraceDropKey, TraceDrops)],
    before: &BTreeMap<(u32, u32), u64>,
    now: &BTreeMap<(u32, u32), u64>,
    names: &Names,
    kernel: &Kernel,
) -> Vec<Group> {
    let mut found: Vec<Group> = Vec::new();
    let ours: u64 = now.iter().map(|(key, count)| count.saturating_sub(before.get(key).copied().unwrap_or(0))).sum();
    for (key, drops) in rows {
        let cause = drops::of_kernel(key.reason, key.location, kernel);
        let end = drops.device.iter().position(|byte| *byte == 0).unwrap_or(16);
        let device = String::from_utf8_lossy(drops.device.get(..end).unwrap_or_default()).into_owned();
        let device = match names.pod_behind(key.peer) {
            Some(pod) => format!("{} {device}", names.pod_name(pod)),
            None => device,
        };
        // What our programs drop the kernel tells as well, with less: their own counts are shown instead.
        let is_programs = matches!(cause.reason.as_str(), "TC_INGRESS" | "TC_EGRESS") && ours > 0;
        found.push(Group {
            is_routine: kernel.is_routine(key.reason) || is_programs,
            reason: cause.reason,
            place: cause.place,
            device,
            class: cause.class,
            advice: cause.advice,
            packets: drops.packets,
            last: last(key, drops, names),
        });
    }
    for ((hook, reason), count) in now {
        let packets = count.saturating_sub(before.get(&(*hook, *reason)).copied().unwrap_or(0));
        let (Some(hook), Some(reason)) = (
            Hook::ALL.iter().find(|known| **known as u32 == *hook),
            Reason::ALL.iter().find(|known| **known as u32 == *reason),
        ) else {
            continue;
        };
        if packets > 0 {
            let (class, advice) = drops::own_advice(*reason);
            found.push(Group {
                reason: reason.name().to_owned(),
                place: hook.name().to_owned(),
                device: "-".to_owned(),
                class,
                advice: advice.to_owned(),
                packets,
                last: "-".to_owned(),
                is_routine: false,
            });
        }
    }
    found.sort_by(|a, b| b.packets.cmp(&a.packets).then_with(|| a.reason.cmp(&b.reason)));
    found
}

fn last(key: &TraceDropKey, drops: &TraceDrops, names: &Names) -> String {
    let Ok(proto) = u8::try_from(key.proto) else { return "-".to_owned() };
    let named = |ip: IpAddr, port: u16| {
        let address = SocketAddr::new(ip, port);
        let shown = if port == 0 { ip.to_string() } else { address.to_string() };
        match names.owner(address, Proto(proto)) {
            Owner::Pod(name) => format!("{name} ({shown})"),
            Owner::Service(name) => format!("svc {name} ({shown})"),
            Owner::Node => format!("node ({shown})"),
            Owner::Backend(_) | Owner::Other => shown,
        }
    };
    if proto == 0 {
        return "-".to_owned();
    }
    format!(
        "{} {} → {}",
        Proto(proto).to_string().to_lowercase(),
        named(drops.src.into(), drops.src_port.get()),
        named(drops.dst.into(), drops.dst_port.get())
    )
}

/// A table with the most first, and how much is not shown.
pub fn table(groups: &[Group], top: usize, all: bool, seconds: u64) -> String {
    let shown: Vec<&Group> = groups.iter().filter(|group| all || !group.is_routine).collect();
    let hidden: u64 = groups.iter().filter(|group| !all && group.is_routine).map(|group| group.packets).sum();
    let mut lines = Vec::new();
    for group in shown.iter().take(top) {
        let rate = group.packets.checked_div(seconds).unwrap_or(0);
        lines.push(format!(
            "{:>8}  {rate:>6}/s  {} at {} on {}  [{}]",
            group.packets, group.reason, group.place, group.device, group.class
        ));
        lines.push(format!("                    last: {}", group.last));
        lines.push(format!("                    fix:  {}", group.advice));
    }
    if shown.is_empty() {
        lines.push("no drops".to_owned());
    }
    let beyond: u64 = shown.iter().skip(top).map(|group| group.packets).sum();
    lines.push(format!("not shown: {beyond} beyond the first {top}, {hidden} routine or told twice (--all)"));
    lines.join("\n")
}

/// For programs.
pub fn json(groups: &[Group]) -> Value {
    let items: Vec<Value> = groups
        .iter()
        .map(|group| {
            json!({
                "reason": group.reason, "place": group.place, "device": group.device, "class": group.class,
                "advice": group.advice, "packets": group.packets, "last": group.last, "routine": group.is_routine,
            })
        })
        .collect();
    json!({ "version": 1, "items": items })
}

/// Shows them until the time is over or a signal comes.
///
/// # Errors
/// [`TraceError`].
pub async fn run(options: Options, mut write: impl FnMut(&str) -> std::io::Result<()>) -> Result<Outcome, TraceError> {
    let pinned = maps(&options.pin_root)?;
    let names = Names::read(pinned.as_ref().map(|(_, maps)| maps), &options.cni)?;
    let btf = super::btf::Btf::of_kernel()?;
    let (offsets, _) = layout::offsets(&btf)?;
    let kernel = Kernel::new(&btf, super::symbols::Symbols::of_kernel());
    drop(btf);
    let mut probes = Probes::open(pinned.as_ref().map(|(pins, _)| pins), &offsets, 4096, Probing::Drops)?;
    let own = |maps: Option<&Maps>| maps.map_or_else(|| Ok(BTreeMap::new()), own_counts);
    let before = own(pinned.as_ref().map(|(_, maps)| maps))?;
    let mut flags = TraceFilter::DROPS;
    if options.all_namespaces {
        flags |= TraceFilter::ALL_NAMESPACES;
    }
    let filter = TraceFilter {
        netns: own_namespace(),
        flags,
        ifindex: 0,
        proto: 0,
        rows: 0,
        sample: 0,
        rate: 0,
        begun: 0,
        second: 0,
        most: 0,
        total: 0,
        first_drop: kernel.first_drop(),
        ends: 0,
    };
    probes.follow(&filter, &[], &[])?;
    let began = tokio::time::Instant::now();
    let signal = |kind| {
        tokio::signal::unix::signal(kind).map_err(|source| TraceError::File { path: "signal".to_owned(), source })
    };
    let mut interrupt = signal(tokio::signal::unix::SignalKind::interrupt())?;
    let mut terminate = signal(tokio::signal::unix::SignalKind::terminate())?;
    let mut ticks = tokio::time::interval(options.every);
    ticks.tick().await;
    tell_ready();
    let mut stopped = false;
    loop {
        let over = tokio::time::sleep_until(began + options.limit);
        let mut done = false;
        tokio::select! {
            _ = ticks.tick() => {}
            () = over => done = true,
            _ = interrupt.recv() => (stopped, done) = (true, true),
            _ = terminate.recv() => (stopped, done) = (true, true),
        }
        if done || !options.once {
            let now = own(pinned.as_ref().map(|(_, maps)| maps))?;
            let groups = groups(&probes.drops()?, &before, &now, &names, &kernel);
            let text = if options.is_json {
                json(&groups).to_string()
            } else {
                table(&groups, options.top, options.all, began.elapsed().as_secs())
            };
            if write(&text).is_err() {
                return Ok(Outcome::Good);
            }
        }
        if done {
            return Ok(if stopped && !options.once { Outcome::Interrupted } else { Outcome::Good });
        }
    }
}

/// Tells on standard error that drops count from now on.
fn tell_ready() {
    #[expect(clippy::print_stderr, reason = "a word to whoever waits, apart from the table itself")]
    {
        eprintln!("counting drops");
    }
}

#[cfg(test)]
mod tests {
    use super::super::names::tests::names;
    use super::*;

    #[test]
    fn drops_are_grouped_named_and_ordered() {
        let reasons = [
            "SKB_NOT_DROPPED_YET",
            "SKB_CONSUMED",
            "SKB_DROP_REASON_NOT_SPECIFIED",
            "SKB_DROP_REASON_NO_SOCKET",
            "SKB_DROP_REASON_OTHERHOST",
            "SKB_DROP_REASON_TC_INGRESS",
        ];
        let kernel = Kernel::with_reasons((0..).zip(reasons.map(str::to_owned)).collect());
        let key =
            |reason, peer| TraceDropKey { location: 5, netns: 1, ifindex: 2, reason, proto: 6, peer, reserved: 0 };
        let drops = |packets| {
            let ip = |text: &str| text.parse::<IpAddr>().expect("an address").into();
            let mut device = [0; 16];
            device[..4].copy_from_slice(b"eth0");
            TraceDrops {
                packets,
                bytes: 0,
                src: ip("10.1.0.2"),
                dst: ip("10.96.0.7"),
                src_port: proxy_abi::PortBe::new(4000),
                dst_port: proxy_abi::PortBe::new(80),
                reserved: 0,
                device,
            }
        };
        let rows = [(key(3, 8), drops(2)), (key(4, 0), drops(100)), (key(5, 0), drops(9))];
        let no_backend = (Hook::FromPod as u32, Reason::NoBackend as u32);
        let found = groups(&rows, &[(no_backend, 3)].into(), &[(no_backend, 12)].into(), &names(), &kernel);
        let short: Vec<(&str, u64, &str, bool)> = found
            .iter()
            .map(|group| (group.reason.as_str(), group.packets, group.device.as_str(), group.is_routine))
            .collect();
        assert_eq!(
            short,
            [
                ("OTHERHOST", 100, "eth0", true),
                ("TC_INGRESS", 9, "eth0", true),
                ("no_backend", 9, "-", false),
                ("NO_SOCKET", 2, "shop/api-0 eth0", false)
            ]
        );
        assert_eq!(found[3].last, "tcp shop/web-0 (10.1.0.2:4000) → svc shop/api:http (10.96.0.7:80)");
        let text = table(&found, 1, false, 3);
        assert!(text.starts_with("       9       3/s  no_backend at from_pod on -  [own-service]"), "{text}");
        assert!(text.ends_with("not shown: 2 beyond the first 1, 109 routine or told twice (--all)"), "{text}");
    }
}
