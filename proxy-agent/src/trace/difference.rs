//! Two traces side by side: steps that only one of them has, and how the times changed.

use std::collections::BTreeMap;
use std::fmt::Write as _;

use super::recorded::{Recorded, RecordedPacket};
use super::tree::duration;

/// Packets of the same kind: the same ends and direction.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct Group {
    /// The steps of most packets.
    steps: Vec<String>,
    results: BTreeMap<String, usize>,
    times: Vec<u64>,
}

/// A path's steps without what differs from run to run: names of veths.
fn steps(packet: &RecordedPacket) -> Vec<String> {
    packet
        .steps
        .iter()
        .map(|step| {
            let words: Vec<&str> =
                step.place.split(' ').map(|word| if is_veth(word) { "veth*" } else { word }).collect();
            let way = if step.way.is_empty() || step.way == "own" { String::new() } else { format!(" ({})", step.way) };
            match &step.decision {
                Some((reason, verdict)) => format!("{} {}: {reason} {verdict}", words.join(" "), step.point),
                None => format!("{} {}{way}", words.join(" "), step.point),
            }
        })
        .collect()
}

fn is_veth(word: &str) -> bool {
    word.strip_prefix("veth").is_some_and(|rest| rest.len() > 2)
}

fn groups(recorded: &Recorded) -> BTreeMap<(bool, String), Group> {
    let mut by_steps: BTreeMap<(bool, String), BTreeMap<Vec<String>, usize>> = BTreeMap::new();
    let mut groups: BTreeMap<(bool, String), Group> = BTreeMap::new();
    for packet in &recorded.packets {
        let key = (packet.flow.ends_with('r'), packet.who.clone());
        *by_steps.entry(key.clone()).or_default().entry(steps(packet)).or_default() += 1;
        let group = groups.entry(key).or_default();
        *group.results.entry(packet.result.clone()).or_default() += 1;
        group.times.push(packet.total);
    }
    for (key, group) in &mut groups {
        let most = by_steps.get(key).and_then(|all| all.iter().max_by_key(|(_, count)| **count));
        group.steps = most.map(|(steps, _)| steps.clone()).unwrap_or_default();
        group.times.sort_unstable();
    }
    groups
}

impl Group {
    fn p50(&self) -> u64 {
        self.times.get(self.times.len().saturating_sub(1) / 2).copied().unwrap_or(0)
    }
}

/// Both lists as one: kept, taken away, added (longest common subsequence).
fn changes<'a>(before: &'a [String], after: &'a [String]) -> Vec<(char, &'a str)> {
    let width = after.len() + 1;
    let mut longest = vec![0_usize; (before.len() + 1) * width];
    let cell = |table: &[usize], row: usize, column: usize| table.get(row * width + column).copied().unwrap_or(0);
    for row in (0..before.len()).rev() {
        for column in (0..after.len()).rev() {
            let best = if before.get(row) == after.get(column) {
                cell(&longest, row + 1, column + 1) + 1
            } else {
                cell(&longest, row + 1, column).max(cell(&longest, row, column + 1))
            };
            if let Some(place) = longest.get_mut(row * width + column) {
                *place = best;
            }
        }
    }
    let (mut row, mut column, mut all) = (0, 0, Vec::new());
    loop {
        match (before.get(row), after.get(column)) {
            (None, None) => return all,
            (Some(old), Some(new)) if old == new => {
                all.push((' ', old.as_str()));
                (row, column) = (row + 1, column + 1);
            }
            (Some(old), new) if new.is_none() || cell(&longest, row + 1, column) >= cell(&longest, row, column + 1) => {
                all.push(('-', old.as_str()));
                row += 1;
            }
            (_, new) => {
                all.extend(new.map(|new| ('+', new.as_str())));
                column += 1;
            }
        }
    }
}

/// The comparison, and whether anything differs but the times.
pub fn compare(a: &Recorded, b: &Recorded) -> (String, bool) {
    let (left, right) = (groups(a), groups(b));
    let mut text = String::new();
    let mut differs = false;
    let none = Group::default();
    let keys: std::collections::BTreeSet<&(bool, String)> = left.keys().chain(right.keys()).collect();
    for key in keys {
        let (before, after) = (left.get(key).unwrap_or(&none), right.get(key).unwrap_or(&none));
        let reply = if key.0 { "  (reply)" } else { "" };
        let _ = writeln!(text, "{}{reply}", key.1);
        let counts = |group: &Group| {
            group.results.iter().map(|(result, count)| format!("{count} {result}")).collect::<Vec<_>>().join(", ")
        };
        let same: Vec<&String> = before.results.keys().collect();
        differs |= same != after.results.keys().collect::<Vec<_>>();
        let _ = writeln!(text, "  - {}  p50 {}", counts(before), duration(before.p50()));
        let _ = writeln!(text, "  + {}  p50 {}", counts(after), duration(after.p50()));
        for (sign, step) in changes(&before.steps, &after.steps) {
            differs |= sign != ' ';
            let _ = writeln!(text, "  {sign} {step}");
        }
    }
    (text, differs)
}

#[cfg(test)]
mod tests {
    use super::super::recorded::tests::lines;
    use super::*;

    #[test]
    fn what_differs_is_shown() {
        let whole = Recorded::new(lines("a", 500, false).iter());
        let dropped = Recorded::new(lines("b", 500, true).iter());
        let (text, differs) = compare(&whole, &dropped);
        assert!(differs);
        let expected = "shop/web-0 → service shop/api:http
  - 1 delivered  p50 1.0µs
  + 1 dropped  p50 1.0µs
    shop/web-0 eth0 net_dev_queue (begin)
  - veth7 from_pod: service_new redirect
  - shop/api-0 eth0 netif_receive_skb (wire)
  + veth7 from_pod: service_new drop
";
        assert_eq!(text, expected);
        let (_, differs) = compare(&whole, &Recorded::new(lines("c", 900, false).iter()));
        assert!(!differs, "times alone are no difference");
    }

    #[test]
    fn names_of_veths_do_not_count() {
        assert!(is_veth("veth0a1b2c3d") && !is_veth("veth") && !is_veth("eth0"));
    }
}
