//! A journey for people: one block for each packet.

use std::fmt::Write as _;

use proxy_abi::Hook;

use super::hooks::{Family, Hooks};
use super::journey::{Decision, Place, Point, Step};
use super::names::Names;
use super::story::{Context, Leg, Story, Way, device, named};

/// Tenths of a microsecond and more as `4.1µs`, `12ms`.
pub fn duration(nanoseconds: u64) -> String {
    match nanoseconds {
        0..1_000_000 => format!("{}.{}µs", nanoseconds / 1000, nanoseconds % 1000 / 100),
        1_000_000..1_000_000_000 => format!("{}.{}ms", nanoseconds / 1_000_000, nanoseconds % 1_000_000 / 100_000),
        _ => format!("{}.{}s", nanoseconds / 1_000_000_000, nanoseconds % 1_000_000_000 / 100_000_000),
    }
}

/// A line of the block.
struct Row {
    offset: u64,
    text: String,
    took: String,
    more: Vec<String>,
}

/// `#1`, or `#1r` for a reply.
pub fn block(number: &str, clock: &str, story: &Story<'_>, context: Context<'_>) -> String {
    let mut text = String::new();
    let journey = story.journey;
    let head = journey.first().map_or_else(
        || "a packet whose headers could not be read".to_owned(),
        |packet| {
            let kind = packet.kind();
            let names = context.names;
            let proto = packet.proto.to_string().to_lowercase();
            format!("{proto} {kind}  {} → {}", named(packet, true, names), named(packet, false, names))
        },
    );
    let _ = writeln!(text, "#{number}  {head}   {clock}");
    for row in rows(story, context.names) {
        let offset = format!("+{}", duration(row.offset));
        let took = if row.took.is_empty() { String::new() } else { format!("   {}", row.took) };
        let _ = writeln!(text, "│  {offset:<9} {}{took}", row.text);
        for line in row.more {
            let _ = writeln!(text, "│     {line}");
        }
    }
    let _ = writeln!(text, "│  netfilter  {}", panel(story, context.hooks));
    for surprise in story.surprises() {
        let _ = writeln!(text, "│  ⚠ {surprise}");
    }
    let split = story.split;
    let netfilter =
        if split.netfilter > 0 { format!(" │ past netfilter {}", duration(split.netfilter)) } else { String::new() };
    let parts = format!(
        "total {}: own {} │ kernel {}{netfilter} │ queue {}",
        duration(journey.total()),
        duration(split.own),
        duration(split.kernel),
        duration(split.queue)
    );
    if let Some(cause) = &story.cause {
        let ours = if cause.is_ours { "ours: " } else { "" };
        let _ = writeln!(text, "│  ✗ DROPPED  {ours}{} at {}", cause.reason, cause.place);
        let _ = writeln!(text, "└─ {parts}");
        let _ = writeln!(text, "   fix: {}", cause.advice);
    } else {
        let _ = writeln!(text, "└─ {}  {parts}", story.ending.name());
    }
    text
}

fn place(place: &Place) -> String {
    match place {
        Place::Pod(pod, device) => format!("{pod} {device}"),
        other => device(other).to_owned(),
    }
}

fn way(way: Way) -> &'static str {
    match way {
        Way::Redirect => "redirect → ",
        Way::Switch => "bridge → ",
        Way::UpCall => "bridge ↑ ",
        Way::BridgeOut => "bridge ↓ ",
        Way::Forward => "route, forward → ",
        Way::LocalOut => "socket of the node → ",
        _ => "",
    }
}

fn rows(story: &Story<'_>, names: &Names) -> Vec<Row> {
    let begin = story.journey.began();
    let mut rows: Vec<Row> = Vec::new();
    let mut ttl = None;
    for leg in &story.legs {
        let offset = leg.step.at().saturating_sub(begin);
        match leg.step {
            Step::Decision(decision) => rows.push(decided(decision, leg, offset, names)),
            Step::Sight(sight) => {
                let mut more = Vec::new();
                let now = sight.packet.as_ref().map(|packet| packet.ttl);
                if let (Some(before), Some(after)) = (ttl, now)
                    && before != after
                {
                    more.push(format!("ttl {before} → {after}"));
                }
                ttl = now.or(ttl);
                match (sight.point, rows.last_mut()) {
                    // The driver's part of the line before; worth a word only when the packet waited.
                    (Point::Transmit, Some(row)) => {
                        if leg.took > 100_000 {
                            row.more.push(format!(
                                "waited {} in the queue of {}",
                                duration(leg.took),
                                device(&sight.place)
                            ));
                        }
                    }
                    (Point::Receive, Some(row)) if leg.way == Way::Wire => {
                        let _ = write!(row.text, " ─→ {}", place(&sight.place));
                        row.more.extend(more);
                        let netns = if matches!(sight.place, Place::Pod(..)) { "node → pod" } else { "pod → node" };
                        row.took = format!("{netns}  cpu{}", sight.cpu);
                    }
                    (Point::Drop, _) => {}
                    (Point::Consume, _) => {
                        rows.push(Row {
                            offset,
                            text: format!("{}  used up", place(&sight.place)),
                            took: String::new(),
                            more,
                        });
                    }
                    _ => {
                        let took = if leg.way == Way::Begin {
                            String::new()
                        } else {
                            format!("kernel {}", duration(leg.took))
                        };
                        let text = format!("{}{}", way(leg.way), place(&sight.place));
                        rows.push(Row { offset, text, took, more });
                    }
                }
            }
        }
    }
    rows
}

fn decided(decision: &Decision, leg: &Leg<'_>, offset: u64, names: &Names) -> Row {
    let told = &decision.told;
    let hook = decision.hook.map_or("program", Hook::name);
    let direction = match decision.hook {
        Some(Hook::FromPod | Hook::FromNetdev | Hook::FromBridge) => "tc ingress",
        Some(Hook::ToPod | Hook::ToNetdev | Hook::ToBridge) => "tc egress",
        _ => "socket",
    };
    let pod = decision.pod.as_ref().map(|pod| format!(" ({pod})")).unwrap_or_default();
    let verdict = ["pass", "redirect", "DROP"].get(told.verdict as usize).copied().unwrap_or("?");
    let mut more = Vec::new();
    if told.service != 0 {
        let candidates = names.candidates.get(&told.service).copied().unwrap_or(0);
        let backend = names.backends.get(&told.backend).map_or_else(String::new, |backend| {
            let pod = names.pod_at(backend.address.ip()).map(|pod| {
                let place = if pod.elsewhere { "another" } else { "this" };
                format!("  {}, on {place} node", names.pod_name(pod))
            });
            format!(" → {}{}", backend.address, pod.unwrap_or_default())
        });
        let one_of = if backend.is_empty() { String::new() } else { format!("  (1 of {candidates})") };
        more.push(format!("service   {}{backend}{one_of}", names.service(told.service)));
    }
    if told.rule != 0 {
        let name = decision.rule.clone().unwrap_or_else(|| format!("rule #{}", told.rule));
        more.push(format!("policy    {name}"));
    }
    if let Some(reason) = decision.reason {
        more.push(format!("because   {}", reason.text()));
    }
    let took = if leg.way == Way::Own && direction == "tc ingress" {
        format!("own {}", duration(leg.took))
    } else {
        String::new()
    };
    Row {
        offset,
        text: format!("{}{pod} {direction}  {hook}: {} {verdict}", decision.device, decision.reason_name()),
        took,
        more,
    }
}

/// Who of netfilter was on its way.
fn panel(story: &Story<'_>, hooks: Option<&Hooks>) -> String {
    let Some(hooks) = hooks else { return "not known: the kernel has no iterator over tasks".to_owned() };
    if story.passed.hooks.is_empty() {
        return "none: it passed no hook of the node's namespace".to_owned();
    }
    let mut parts = Vec::new();
    for (family, number) in &story.passed.hooks {
        let entries = hooks.get(&(*family, *number)).map(Vec::as_slice).unwrap_or_default();
        let names: Vec<String> =
            entries.iter().filter(|entry| !entry.is_passing()).map(super::hooks::HookEntry::name).collect();
        let by =
            if *family != Family::Bridge && story.passed.by_bridge.contains(number) { " by br_netfilter" } else { "" };
        let entries = if names.is_empty() { "–".to_owned() } else { names.join(", ") };
        if *family != Family::Bridge || !names.is_empty() {
            parts.push(format!("{} {}{by} {entries}", family.name(), family.hook(*number)));
        }
    }
    if parts.is_empty() {
        parts.push("nothing but the bridge's own hooks, with no entry".to_owned());
    }
    let conntrack = if story.conntrack { "conntrack has seen it" } else { "conntrack has not seen it" };
    format!("{}; {conntrack}", parts.join(" · "))
}

#[cfg(test)]
mod tests {
    use super::duration;

    #[test]
    fn durations_are_short() {
        let found = [0, 99, 4_150, 999_999, 12_345_678, 2_500_000_000].map(duration);
        assert_eq!(found, ["0.0µs", "0.0µs", "4.1µs", "999.9µs", "12.3ms", "2.5s"]);
    }
}
