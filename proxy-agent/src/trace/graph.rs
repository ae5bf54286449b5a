//! The paths of a trace as one graph: a node for each step, an edge for each way between two, with counts and times.

use std::collections::BTreeMap;
use std::fmt::Write as _;

use super::recorded::{Recorded, RecordedStep};
use super::tree::duration;

/// A column of the picture.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Lane {
    /// In a pod.
    Pod,
    /// A program of ours.
    Own,
    /// In the node's namespace.
    Host,
    /// An end.
    End,
}

/// A step.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct GraphNode {
    /// What stands in it.
    pub label: String,
    /// Where.
    pub lane: Lane,
    /// Steps before it, on the longest path.
    pub rank: usize,
    /// A drop?
    pub is_drop: bool,
}

/// Packets that went from one step to another.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct GraphEdge {
    /// How.
    pub way: String,
    /// Nanoseconds of each.
    pub times: Vec<u64>,
    /// Where a bridge or the IP stack handed them on, and not a program of ours.
    pub is_detour: bool,
}

/// The graph.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Graph {
    /// By number.
    pub nodes: Vec<GraphNode>,
    /// By the numbers of both ends.
    pub edges: BTreeMap<(usize, usize), GraphEdge>,
}

fn lane(step: &RecordedStep) -> Lane {
    if step.decision.is_some() {
        Lane::Own
    } else if step.netns.starts_with("pod") {
        Lane::Pod
    } else {
        Lane::Host
    }
}

impl Graph {
    /// Of all packets of a trace, requests and replies apart.
    pub fn new(recorded: &Recorded) -> Self {
        let mut graph = Self::default();
        let mut known: BTreeMap<(bool, String, usize), usize> = BTreeMap::new();
        for packet in &recorded.packets {
            let is_reply = packet.flow.ends_with('r');
            let mut before: Option<usize> = None;
            // The same place twice in one path is two nodes: a graph without circles can be drawn from left to right.
            let mut times_at: BTreeMap<String, usize> = BTreeMap::new();
            let end = match &packet.drop {
                Some(drop) => ("end".to_owned(), format!("✗ {drop}"), true),
                None => ("end".to_owned(), packet.result.clone(), false),
            };
            let steps = packet.steps.iter().filter(|step| {
                step.point != "net_dev_start_xmit" && step.point != "kfree_skb" && step.point != "consume_skb"
            });
            let steps = steps.map(|step| (step.label(), lane(step), step.took, step.way.clone(), false));
            let ends = std::iter::once((
                format!("{}{}", end.1, if is_reply { " (reply)" } else { "" }),
                Lane::End,
                0,
                String::new(),
                end.2,
            ));
            for (label, lane, took, way, is_drop) in steps.chain(ends) {
                let count = times_at.entry(label.clone()).or_default();
                let key = (is_reply, label.clone(), *count);
                *count += 1;
                let number = *known.entry(key).or_insert_with(|| {
                    graph.nodes.push(GraphNode { label, lane, rank: 0, is_drop });
                    graph.nodes.len() - 1
                });
                if let Some(before) = before {
                    let edge = graph.edges.entry((before, number)).or_default();
                    edge.is_detour =
                        ["switch", "up-call", "forward", "bridge-out", "local-out"].contains(&way.as_str());
                    edge.way = way;
                    edge.times.push(took);
                }
                before = Some(number);
            }
        }
        graph.rank();
        graph
    }

    /// Gives each node its distance from the beginning. Paths that visit places in another order may form a circle: its
    /// edges back are left out of account.
    fn rank(&mut self) {
        for _ in 0..self.nodes.len() {
            let mut changed = false;
            for (from, to) in self.edges.keys() {
                let next = self.nodes.get(*from).map_or(0, |node| node.rank + 1);
                let most = self.nodes.len();
                if let Some(node) = self.nodes.get_mut(*to)
                    && node.rank < next
                    && next < most
                {
                    node.rank = next;
                    changed = true;
                }
            }
            if !changed {
                return;
            }
        }
    }

    /// As a Mermaid flow chart.
    pub fn mermaid(&self) -> String {
        let mut text = "flowchart LR\n".to_owned();
        for (number, node) in self.nodes.iter().enumerate() {
            let label = node.label.replace('"', "'");
            let class = if node.is_drop {
                ":::bad"
            } else {
                match node.lane {
                    Lane::Own => ":::own",
                    Lane::Pod => ":::pod",
                    Lane::Host | Lane::End => "",
                }
            };
            let _ = writeln!(text, " n{number}[\"{label}\"]{class}");
        }
        for ((from, to), edge) in &self.edges {
            let arrow = if edge.is_detour { "-.->" } else { "-->" };
            let _ = writeln!(text, " n{from} {arrow}|\"{}\"| n{to}", edge.label());
        }
        text.push_str(" classDef bad fill:#fdd,stroke:#c00\n classDef own fill:#def,stroke:#06c\n classDef pod fill:#efe,stroke:#090\n");
        text
    }
}

impl GraphEdge {
    /// Count and times.
    pub fn label(&self) -> String {
        let mut times = self.times.clone();
        times.sort_unstable();
        let at = |thousandths: usize| {
            times.get((times.len() * thousandths).div_ceil(1000).saturating_sub(1)).copied().unwrap_or(0)
        };
        if self.way.is_empty() {
            return self.times.len().to_string();
        }
        format!("{} · {} · p50 {} · p99 {}", self.times.len(), self.way, duration(at(500)), duration(at(990)))
    }
}

#[cfg(test)]
mod tests {
    use super::super::recorded::tests::lines;
    use super::*;

    #[test]
    fn paths_are_merged() {
        let recorded =
            Recorded::new([lines("a1", 500, false), lines("a2", 700, false), lines("a3", 700, true)].concat().iter());
        let graph = Graph::new(&recorded);
        let labels: Vec<(&str, usize, bool)> =
            graph.nodes.iter().map(|node| (node.label.as_str(), node.rank, node.is_drop)).collect();
        assert_eq!(
            labels,
            [
                ("shop/web-0 eth0 net_dev_queue", 0, false),
                ("veth7 from_pod: service_new redirect", 1, false),
                ("shop/api-0 eth0 netif_receive_skb", 2, false),
                ("delivered", 3, false),
                ("veth7 from_pod: service_new drop", 1, false),
                ("✗ no_backend at from_pod at veth7", 2, true),
            ]
        );
        assert_eq!(graph.edges[&(0, 1)].label(), "2 · own · p50 0.5µs · p99 0.7µs");
        let mermaid = graph.mermaid();
        for line in [
            " n1[\"veth7 from_pod: service_new redirect\"]:::own",
            " n0 -->|\"2 · own · p50 0.5µs · p99 0.7µs\"| n1",
            " n4 -->|\"1\"| n5",
        ] {
            assert!(mermaid.lines().any(|found| found == line), "{line}\n{mermaid}");
        }
    }

    #[test]
    fn circles_end() {
        let mut graph = Graph::default();
        for label in ["a", "b"] {
            graph.nodes.push(GraphNode { label: label.to_owned(), lane: Lane::Host, rank: 0, is_drop: false });
        }
        graph.edges.insert((0, 1), GraphEdge::default());
        graph.edges.insert((1, 0), GraphEdge::default());
        graph.rank();
        assert!(graph.nodes.iter().all(|node| node.rank < 2));
    }
}
