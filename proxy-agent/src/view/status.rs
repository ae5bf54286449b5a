//! `status`.

use std::path::Path;

use anyhow::Result;
use proxy_abi::{DeviceEntry, FlowEntry, Hook, Reason};
use serde_json::{Value, json};

use super::{Format, VERSION, print, write};
use crate::dataplane::describe::{Description, POD_QUOTA, SOCKET_LB};
use crate::dataplane::pins::{Maps, Pins, Usage};

/// A pod that holds as many flows as it may.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Limited {
    ifindex: u32,
    interface: Option<String>,
    flows: u64,
}

/// NetworkPolicy as the interfaces of this node have it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Enforced {
    /// Interfaces whose pods have a slot.
    pods: usize,
    /// Interfaces that are held.
    held: usize,
    /// Epoch of the policy in the maps.
    revision: u32,
}

impl Enforced {
    fn of(slots: impl Iterator<Item = u16>, revision: u32) -> Self {
        let mut enforced = Self { revision, ..Self::default() };
        for slot in slots {
            match slot {
                0 => {}
                DeviceEntry::HELD => enforced.held += 1,
                _ => enforced.pods += 1,
            }
        }
        enforced
    }

    fn text(self) -> String {
        match self {
            Self { pods: 0, held: 0, .. } => "not in force on any interface".to_owned(),
            Self { pods, held, revision } => {
                format!("in force for {pods} pods, revision {revision}; held interfaces: {held}")
            }
        }
    }
}

/// Packets that left a hook for a reason.
#[derive(Clone, Copy, Debug)]
struct Count {
    hook: Hook,
    reason: Reason,
    packets: u64,
    bytes: u64,
}

/// Entries in percent of the capacity, rounded up: one is more than none.
fn pressure(usage: &Usage) -> u64 {
    let used = u64::try_from(usage.used).unwrap_or(u64::MAX);
    used.saturating_mul(100).div_ceil(u64::from(usage.capacity.max(1)))
}

fn counts(maps: &Maps) -> Result<Vec<Count>> {
    let mut counts = Vec::new();
    for hook in Hook::ALL {
        for reason in Reason::ALL {
            let values = maps.counter.get_per_cpu(&reason.index(*hook))?;
            let packets: u64 = values.iter().map(|v| v.packets).sum();
            let bytes: u64 = values.iter().map(|v| v.bytes).sum();
            if packets > 0 {
                counts.push(Count { hook: *hook, reason: *reason, packets, bytes });
            }
        }
    }
    Ok(counts)
}

/// Drops of all hooks by reason, the most first.
fn drops(counts: &[Count]) -> Vec<(Reason, u64)> {
    let of = |reason: Reason| counts.iter().filter(|count| count.reason == reason).map(|count| count.packets).sum();
    let mut drops: Vec<(Reason, u64)> =
        Reason::ALL.iter().filter(|reason| reason.is_drop()).map(|reason| (*reason, of(*reason))).collect();
    drops.retain(|(_, packets)| *packets > 0);
    drops.sort_by_key(|(_, packets)| std::cmp::Reverse(*packets));
    drops
}

fn limited(maps: &Maps, quota: u32) -> Result<Vec<Limited>> {
    if quota == 0 {
        return Ok(Vec::new());
    }
    let mut pods: Vec<Limited> = Vec::new();
    for (ifindex, flows) in maps.pod_flows.read()? {
        // Direct flows beyond it are not refused.
        if flows >= quota.into() && ifindex & FlowEntry::DIRECT_OF == 0 {
            let interface = nix::net::if_::if_indextoname(ifindex).ok().map(|n| n.to_string_lossy().into_owned());
            pods.push(Limited { ifindex, interface, flows });
        }
    }
    pods.sort_by_key(|pod| (std::cmp::Reverse(pod.flows), pod.ifindex));
    Ok(pods)
}

/// What is pinned, how full the maps are, what became of the packets.
pub fn status(pin_root: &Path, format: Format) -> Result<()> {
    let pins = Pins::new(pin_root);
    let maps = pins.open()?;
    let running = pins.lock().is_err();
    let links = pins.list_links()?.len();
    let usage = maps.usage()?;
    let counts = counts(&maps)?;
    let drops = drops(&counts);
    let settings = Description::read(&pins.maps())?.unwrap_or_default().settings;
    let quota = settings.get(POD_QUOTA).copied();
    let translated = match settings.get(SOCKET_LB) {
        Some(1) => Some(maps.cgroup_pod.count(|_, _| true)?),
        _ => None,
    };
    let limited = limited(&maps, quota.unwrap_or(0))?;
    let slots = maps.device.read()?.into_iter().map(|(_, device)| device.slot);
    let enforced = Enforced::of(slots, maps.policy.epoch.get(&0)?.unwrap_or(0));
    if format == Format::Json {
        let usage: Vec<Value> = usage
            .iter()
            .map(|row| {
                json!({
                    "map": row.map, "used": row.used, "capacity": row.capacity, "pressure": pressure(row),
                    "bytes": row.bytes, "bytes_full": row.bytes_full,
                })
            })
            .collect();
        let counters: Vec<Value> = counts
            .iter()
            .map(|Count { hook, reason, packets, bytes }| {
                json!({
                    "hook": hook.name(), "reason": reason.name(), "drop": reason.is_drop(), "packets": packets,
                    "bytes": bytes,
                })
            })
            .collect();
        let drops: Vec<Value> =
            drops.iter().map(|(reason, packets)| json!({ "reason": reason.name(), "packets": packets })).collect();
        let limited: Vec<Value> = limited
            .iter()
            .map(|pod| json!({ "ifindex": pod.ifindex, "interface": pod.interface, "flows": pod.flows }))
            .collect();
        let status = json!({
            "version": VERSION,
            "agent": if running { "running" } else { "down" },
            "pins": pins.root().display().to_string(),
            "links": links,
            "maps": usage,
            "pod_flow_quota": quota,
            "pods_at_quota": limited,
            "socket_lb": { "of": if translated.is_some() { "all" } else { "node" }, "pods": translated.unwrap_or(0) },
            "policy": { "pods": enforced.pods, "held": enforced.held, "revision": enforced.revision },
            "drops": drops,
            "counters": counters,
        });
        return write(&serde_json::to_string_pretty(&status)?);
    }
    let quota = match quota {
        Some(0) => "any number of flows".to_owned(),
        Some(quota) => format!("{quota} flows"),
        None => "not known".to_owned(),
    };
    write(&format!(
        "agent   {}\npins    {}\nlinks   {links}\nquota   {quota} for each pod; pods at it: {}\n\
         policy  {}\nsockets {}\n",
        if running { "running" } else { "down; the kernel goes on with what it has" },
        pins.root().display(),
        limited.len(),
        enforced.text(),
        translated.map_or("of the node".to_owned(), |pods| format!("of the node, and of {pods} pods")),
    ))?;
    let rows = usage
        .iter()
        .map(|row| {
            let percent = json!(format!("{}%", pressure(row)));
            vec![
                json!(row.map),
                json!(row.used),
                json!(row.capacity),
                percent,
                mebibytes(row.bytes),
                mebibytes(row.bytes_full),
            ]
        })
        .collect();
    print(Format::Table, &["map", "used", "capacity", "pressure", "MiB now", "MiB when full"], rows)?;
    write("")?;
    if !limited.is_empty() {
        let rows = limited.iter().map(|pod| vec![json!(pod.ifindex), json!(pod.interface), json!(pod.flows)]).collect();
        print(Format::Table, &["ifindex", "pod at its quota", "flows"], rows)?;
        write("")?;
    }
    if !drops.is_empty() {
        let rows = drops.iter().map(|(reason, n)| vec![json!(reason.name()), json!(n), json!(reason.text())]).collect();
        print(Format::Table, &["dropped for", "packets", "meaning"], rows)?;
        write("")?;
    }
    let rows = counts
        .iter()
        .map(|Count { hook, reason, packets, bytes }| {
            vec![json!(hook.name()), json!(reason.name()), json!(packets), json!(bytes), json!(reason.text())]
        })
        .collect();
    print(Format::Table, &["hook", "reason", "packets", "bytes", "meaning"], rows)
}

fn mebibytes(bytes: Option<u64>) -> Value {
    // Tenths: small maps are not to look like nothing.
    bytes.map_or(Value::Null, |bytes| {
        let tenths = bytes.saturating_mul(10) >> 20;
        json!(format!("{}.{}", tenths / 10, tenths % 10))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn drops_are_summed_over_hooks_and_ordered() {
        let count = |hook, reason, packets| Count { hook, reason, packets, bytes: 0 };
        let counts = [
            count(Hook::FromPod, Reason::NoFlow, 2),
            count(Hook::FromPod, Reason::Service, 9),
            count(Hook::ToPod, Reason::NoFlow, 3),
            count(Hook::FromPod, Reason::NoBackend, 7),
        ];
        assert_eq!(drops(&counts), [(Reason::NoBackend, 7), (Reason::NoFlow, 5)]);
    }

    #[test]
    fn slots_tell_what_is_in_force() {
        const HELD: u16 = DeviceEntry::HELD;
        let rows = [
            (&[][..], "not in force on any interface"),
            (&[0, 0], "not in force on any interface"),
            (&[0, 3, 4, HELD], "in force for 2 pods, revision 7; held interfaces: 1"),
            (&[HELD], "in force for 0 pods, revision 7; held interfaces: 1"),
        ];
        for (slots, want) in rows {
            assert_eq!(Enforced::of(slots.iter().copied(), 7).text(), want, "{slots:?}");
        }
    }

    #[test]
    fn pressure_is_in_percent() {
        let usage = |used, capacity| Usage { map: "service", used, capacity, bytes: None, bytes_full: None };
        let found = [usage(0, 256), usage(1, 256), usage(128, 256), usage(5, 0)].map(|row| pressure(&row));
        assert_eq!(found, [0, 1, 50, 500]);
    }
}
