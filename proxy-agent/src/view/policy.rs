//! `policy list`, `policy lint` and `endpoint list`: what is in force on this node.

use std::collections::BTreeMap;
use std::path::Path;
use std::process::ExitCode;
use std::time::{Duration, UNIX_EPOCH};

use anyhow::{Result, bail};
use proxy_abi::policy::{BlockEntry, Direction, PodHits, SlotWord};
use proxy_abi::{DeviceEntry, IpBytes};
use proxy_core::netpol::lint::rule_name;
use serde_json::{Value, json};

use super::{Format, open, print};
use crate::ask::{Answer, AskError, HitsInfo, LintInfo, PodInfo, PolicyInfo, Question, ask};
use crate::dataplane::policy::PolicyMaps;
use crate::serve::clock::go_time;

/// Exit code when something is the matter with a policy.
const FOUND: u8 = 2;

/// NetworkPolicies, as the agent knows them.
pub fn policies(pin_root: &Path, format: Format) -> Result<()> {
    let all = known(pin_root)?;
    let rules = |rules: &Option<Vec<String>>, hits: &[Option<HitsInfo>]| match (rules, format) {
        (None, _) => Value::Null,
        (Some(rules), Format::Json) => json!(rules),
        (Some(rules), Format::Table) if rules.is_empty() => json!("nothing"),
        (Some(rules), Format::Table) => {
            let counted = |(at, rule): (usize, &String)| match hits.get(at).copied().flatten() {
                Some(hits) => format!("{rule} ({})", hits.count),
                None => rule.clone(),
            };
            json!(rules.iter().enumerate().map(counted).collect::<Vec<_>>().join("; "))
        }
    };
    let row = |policy: PolicyInfo| {
        let both = policy.ingress_hits.iter().chain(&policy.egress_hits);
        let sum = both.flatten().map(|hits| hits.count).reduce(u64::saturating_add);
        let mut row = vec![
            json!(policy.name),
            json!(policy.subject),
            json!(if policy.audited { "audited" } else { "enforced" }),
            json!(policy.pods),
            rules(&policy.ingress, &policy.ingress_hits),
            rules(&policy.egress, &policy.egress_hits),
            json!(sum),
            json!(policy.refused.map(|hits| hits.count)),
            json!(policy.lint),
            json!(policy.problems),
        ];
        if format == Format::Json {
            row.extend([json!(policy.ingress_hits), json!(policy.egress_hits), json!(policy.refused)]);
        }
        row
    };
    let columns = ["policy", "for", "mode", "pods here", "lets in", "lets out", "hits", "refused", "lint", "problems"];
    let more = ["ingress hits", "egress hits", "refusals"];
    let columns: Vec<_> = columns.into_iter().chain(more.into_iter().filter(|_| format == Format::Json)).collect();
    print(format, &columns, all.into_iter().map(row).collect())
}

/// Rules that pods of this node have, and that have decided about no flow since they are counted.
pub fn unused(pin_root: &Path, format: Format) -> Result<()> {
    let mut rows = Vec::new();
    for policy in known(pin_root)? {
        let directions = [
            (Direction::Ingress, &policy.ingress, &policy.ingress_hits),
            (Direction::Egress, &policy.egress, &policy.egress_hits),
        ];
        for (direction, rules, hits) in directions {
            for (at, (rule, hits)) in rules.iter().flatten().zip(hits).enumerate() {
                let Some(hits) = hits.filter(|hits| hits.count == 0) else { continue };
                let since = match format {
                    Format::Json => json!(hits.since),
                    Format::Table => json!(go_time(UNIX_EPOCH.checked_add(Duration::from_secs(hits.since)))),
                };
                rows.push(vec![json!(policy.name), json!(rule_name(direction, at)), json!(rule), since]);
            }
        }
    }
    if rows.is_empty() && format == Format::Table {
        return super::write("every rule that is counted here has decided about a flow");
    }
    print(format, &["policy", "rule", "lets pass", "unused since"], rows)
}

fn known(pin_root: &Path) -> Result<Vec<PolicyInfo>> {
    Ok(match ask(pin_root, &Question::Policies)? {
        Answer::Policies(all) => all,
        Answer::Pods { .. } | Answer::Lint(_) | Answer::Reason(_) | Answer::Model(_) => Vec::new(),
    })
}

/// What is the matter with NetworkPolicies, or with one of them. Ends with 2 when something is.
pub fn lint(pin_root: &Path, format: Format, policy: Option<&str>) -> Result<ExitCode> {
    let question = Question::Lint { policy: policy.map(str::to_owned) };
    let Answer::Lint(Some(all)) = ask(pin_root, &question)? else {
        bail!("no NetworkPolicy is called {}", policy.unwrap_or_default());
    };
    let code = if all.is_empty() { ExitCode::SUCCESS } else { ExitCode::from(FOUND) };
    if all.is_empty() && format == Format::Table {
        super::write("nothing is the matter")?;
        return Ok(code);
    }
    let row = |LintInfo { policy, rule, kind, problem, fix }: LintInfo| {
        vec![json!(policy), json!(rule), json!(kind), json!(problem), json!(fix)]
    };
    print(format, &["policy", "rule", "kind", "problem", "fix"], all.into_iter().map(row).collect())?;
    Ok(code)
}

/// Pod interfaces of this node, with the policy that the maps hold for them. Names are the agent's: without it they are
/// left out.
pub fn endpoints(pin_root: &Path, format: Format) -> Result<()> {
    let maps = open(pin_root)?;
    let names = local_pods(pin_root);
    let epoch = maps.policy.epoch.get(&0)?.unwrap_or(0);
    let mut devices = maps.device.read()?;
    devices.retain(|(_, device)| device.flags & (DeviceEntry::NETDEV | DeviceEntry::PLAIN) == 0);
    devices.sort();
    let ip = |ip: IpBytes| if ip == IpBytes::UNSPECIFIED { Value::Null } else { json!(ip.to_string()) };
    let mut rows = Vec::new();
    for (ifindex, device) in devices {
        let interface = nix::net::if_::if_indextoname(ifindex).map_or(Value::Null, |n| json!(n.to_string_lossy()));
        let pod = names.as_ref().ok().and_then(|names| names.get(&device.slot));
        let word = word(&maps.policy, device.slot, epoch)?;
        let in_force = device.slot != 0 && device.slot != DeviceEntry::HELD;
        let hits = maps.policy.pod_hits.get(&device.slot.into())?.filter(|_| in_force).unwrap_or(PodHits::ZERO);
        let sum = |of: [u64; 2]| if in_force { json!(of.iter().sum::<u64>()) } else { Value::Null };
        rows.push(vec![
            json!(ifindex),
            interface,
            pod.map_or(Value::Null, |pod| json!(pod.name)),
            ip(device.ip4),
            ip(device.ip6),
            json!(state(&maps.policy, device.slot, word)?),
            if in_force { json!(device.slot) } else { Value::Null },
            if in_force { json!(word.revision) } else { Value::Null },
            pod.map_or(Value::Null, |pod| json!(pod.policies)),
            sum(hits.refused),
            sum(hits.audited),
        ]);
    }
    let columns =
        ["ifindex", "interface", "pod", "ipv4", "ipv6", "policy", "slot", "revision", "by", "refused", "audited"];
    print(format, &columns, rows)?;
    if let (Err(error), Format::Table) = (names, format) {
        super::write(&format!("\nnames of pods and policies are not known: {error}"))?;
    }
    Ok(())
}

/// Pods of this node by their slots.
fn local_pods(pin_root: &Path) -> Result<BTreeMap<u16, PodInfo>, AskError> {
    let Answer::Pods { found, .. } = ask(pin_root, &Question::Endpoints)? else { return Ok(BTreeMap::new()) };
    Ok(found.into_iter().filter_map(|pod| Some((pod.slot?, pod))).collect())
}

/// The word of a slot on the side that counts.
pub(super) fn word(policy: &PolicyMaps, slot: u16, epoch: u32) -> Result<SlotWord> {
    const NONE: SlotWord = SlotWord { block: 0, revision: 0 };
    if slot == 0 || slot == DeviceEntry::HELD {
        return Ok(NONE);
    }
    Ok(policy.slot.get(&SlotWord::index(slot, epoch))?.unwrap_or(NONE))
}

/// What holds for an interface, in a word.
fn state(policy: &PolicyMaps, slot: u16, word: SlotWord) -> Result<&'static str> {
    Ok(match (slot, word.block) {
        (0, _) => "none",
        (DeviceEntry::HELD, _) => "held",
        (_, 0) => "not ready",
        (_, BlockEntry::OPEN_ID) => "open",
        (_, BlockEntry::LOCKED_ID) => "locked",
        (_, block) => match policy.block.get(&block)? {
            None => "broken",
            Some(block) => match (block.ingress != [0; 3], block.egress != [0; 3]) {
                (false, false) if block.shadow != 0 => "audited",
                (false, false) => "open",
                (true, false) => "ingress",
                (false, true) => "egress",
                (true, true) => "ingress, egress",
            },
        },
    })
}
