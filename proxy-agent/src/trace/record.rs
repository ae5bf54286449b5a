//! A journey for programs: one JSON object a line, told apart by `t`. Fields are added under one version, never changed.

use serde_json::{Value, json};

use super::hooks::Hooks;
use super::journey::{Decision, Place, Point, Sight, Step};
use super::packet::Packet;
use super::story::{Context, Story, device, reference};

/// Version of the lines.
pub const VERSION: u32 = 1;

/// The first line.
pub fn meta(filter: &str, node: &str, kernel: &str, boot_epoch: u64, decisions: bool) -> Value {
    json!({
        "t": "meta", "v": VERSION, "node": node, "kernel": kernel, "tier": [0, 1], "filter": filter,
        "unavailable": if decisions { json!({}) } else { json!({ "decisions": "no pins of an agent here" }) },
        "clock": "monotonic", "boot_epoch_ns": boot_epoch,
    })
}

/// The number by which lines of one packet belong together.
pub fn id(journey: u64) -> String {
    format!("{journey:016x}")
}

fn tuple(packet: &Packet) -> Value {
    json!({ "src": packet.src, "sport": packet.src_port, "dst": packet.dst, "dport": packet.dst_port })
}

/// All lines of one packet. `flow`: its number with `r` for a reply.
pub fn lines(flow: &str, story: &Story<'_>, context: Context<'_>) -> Vec<Value> {
    let journey = story.journey;
    let id = id(journey.id);
    let mut lines = Vec::new();
    if let Some(packet) = journey.first() {
        let first = journey.sights().next();
        lines.push(json!({
            "t": "pkt", "id": id, "flow": flow, "dir": if story.is_reply { "reply" } else { "orig" },
            "skb": first.map(|sight| format!("{:#x}", sight.skb)),
            "l3": if packet.src.is_ipv4() { 4 } else { 6 }, "proto": packet.proto.to_string().to_lowercase(),
            "src": packet.src, "sport": packet.src_port, "dst": packet.dst, "dport": packet.dst_port,
            "flags": packet.short_flags(), "kind": packet.kind(), "ipid": packet.ident, "len": packet.len,
            "src_ref": reference(packet, true, context.names), "dst_ref": reference(packet, false, context.names),
        }));
    }
    for (n, leg) in story.legs.iter().enumerate() {
        lines.push(match leg.step {
            Step::Sight(sight) => hop(&id, n, leg.took, leg.way.name(), sight),
            Step::Decision(decision) => decided(&id, n, leg.took, decision, context),
        });
    }
    lines.extend(hooks(&id, story, context.hooks));
    if let Some(cause) = &story.cause {
        lines.push(json!({
            "t": "drop", "id": id, "reason": cause.reason, "reason_code": cause.code, "location": cause.place,
            "class": cause.class, "ours": cause.is_ours, "advice": cause.advice,
        }));
    }
    let split = story.split;
    lines.push(json!({
        "t": "end", "id": id, "flow": flow, "result": story.ending.name(), "ns_total": journey.total(),
        "split": { "own": split.own, "kernel": split.kernel, "netfilter": split.netfilter, "queue": split.queue },
        "bridge_nf": story.bridge_nf, "conntrack": story.conntrack, "netfilter": story.is_touched(context.hooks),
        "snat": journey.has_new_source(story.is_reply), "flood": !journey.flooded().is_empty(), "surprises": story.surprises(),
    }));
    lines
}

fn hop(id: &str, n: usize, took: u64, way: &str, sight: &Sight) -> Value {
    let reference = match &sight.place {
        Place::Host(_) => "host".to_owned(),
        Place::Pod(pod, _) => format!("pod {pod}"),
        Place::Beyond(_) => "beyond".to_owned(),
        Place::Nowhere => "none".to_owned(),
    };
    let mut line = json!({
        "t": "hop", "id": id, "n": n, "ns": sight.at, "d_ns": took, "way": way, "cpu": sight.cpu,
        "point": sight.point.name(), "src": "tp", "dev": device(&sight.place), "ifindex": sight.ifindex,
        "netns": sight.netns, "netns_ref": reference, "tuple": sight.packet.as_ref().map(tuple),
        "ttl": sight.packet.as_ref().map(|packet| packet.ttl), "len": sight.len, "mark": sight.mark,
        "conntrack": sight.nfct != 0, "bridge_nf": sight.bridge_nf, "hooks": sight.hooks,
        "data": hex(&sight.bytes),
    });
    if let Value::Object(fields) = &mut line {
        if !sight.stack.is_empty() {
            fields.insert("stack".to_owned(), json!(sight.stack));
        }
        if matches!(sight.point, Point::Drop | Point::Consume) {
            fields.insert("location".to_owned(), json!(sight.location));
            fields.insert("reason_code".to_owned(), json!(sight.reason));
        }
    }
    line
}

fn decided(id: &str, n: usize, took: u64, decision: &Decision, context: Context<'_>) -> Value {
    let told = &decision.told;
    let names = context.names;
    let service = (told.service != 0).then(|| {
        let name = names.service(told.service);
        let (namespace, rest) = name.split_once('/').unwrap_or(("", &name));
        let (service, port) = rest.rsplit_once(':').unwrap_or((rest, ""));
        let backend = names.backends.get(&told.backend).map(|backend| backend.address);
        let pod = backend.and_then(|backend| names.pod_at(backend.ip())).map(|pod| names.pod_name(pod));
        json!({
            "ns": namespace, "name": service, "port": port, "id": told.service, "backend": backend, "backend_ref": pod,
            "candidates": names.candidates.get(&told.service),
        })
    });
    let verdict = ["pass", "redirect", "drop"].get(told.verdict as usize).copied().unwrap_or("?");
    json!({
        "t": "decision", "id": id, "n": n, "ns": told.at, "d_ns": took, "cpu": told.cpu,
        "hook": decision.hook.map(proxy_abi::Hook::name), "dev": decision.device, "ifindex": told.ifindex,
        "pod": decision.pod, "verdict": verdict, "reason": decision.reason_name(),
        "text": decision.reason.map(proxy_abi::Reason::text), "service": service,
        "rule": (told.rule != 0).then_some(told.rule), "policy": decision.rule,
    })
}

fn hooks(id: &str, story: &Story<'_>, hooks: Option<&Hooks>) -> Vec<Value> {
    let Some(hooks) = hooks else { return Vec::new() };
    let passed = story.passed.hooks.iter().map(|hook| (hook, hooks.get(hook).map(Vec::as_slice).unwrap_or_default()));
    passed
        .map(|((family, number), entries)| {
            let via = if story.passed.by_bridge.contains(number) && family.name() != "bridge" { "br_netfilter" } else { family.name() };
            let names: Vec<String> = entries.iter().filter(|entry| !entry.is_passing()).map(super::hooks::HookEntry::name).collect();
            json!({ "t": "hook", "id": id, "pf": family.name(), "hook": family.hook(*number), "via": via, "entries": names })
        })
        .collect()
}

/// What was lost, for the last lines.
pub fn lost(counts: &[(&str, u64)]) -> Value {
    let mut line = json!({ "t": "lost" });
    if let Value::Object(fields) = &mut line {
        fields.extend(counts.iter().map(|(name, count)| ((*name).to_owned(), json!(count))));
    }
    line
}

/// Bytes as digits.
pub fn hex(bytes: &[u8]) -> String {
    use std::fmt::Write as _;
    bytes.iter().fold(String::new(), |mut text, byte| {
        let _ = write!(text, "{byte:02x}");
        text
    })
}

/// Digits as bytes.
pub fn unhex(text: &str) -> Option<Vec<u8>> {
    let digits = text.as_bytes();
    let pairs = digits.chunks_exact(2);
    if !pairs.remainder().is_empty() || !digits.iter().all(u8::is_ascii_hexdigit) {
        return None;
    }
    pairs.map(|pair| u8::from_str_radix(std::str::from_utf8(pair).ok()?, 16).ok()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_come_back() {
        let bytes: Vec<u8> = (0..=255).collect();
        assert_eq!(unhex(&hex(&bytes)), Some(bytes));
        assert_eq!(["0", "zz", "+1"].map(unhex), [None, None, None]);
    }
}
