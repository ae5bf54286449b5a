//! A graph as a picture (SVG) without anything from outside: from left to right by steps, lanes from top to bottom.

use std::collections::BTreeMap;
use std::fmt::Write as _;

use super::graph::{Graph, Lane};

const WIDTH: usize = 250;
const HEIGHT: usize = 46;
const GAP_X: usize = 150;
const GAP_Y: usize = 34;
const MARGIN: usize = 24;

/// Letters of a line in a box.
const LETTERS: usize = 38;

fn escape(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;").replace('"', "&quot;")
}

/// The text in lines of a box.
fn wrap(text: &str) -> Vec<String> {
    let mut lines = vec![String::new()];
    for word in text.split(' ') {
        let full =
            lines.last().is_some_and(|line| !line.is_empty() && line.chars().count() + word.chars().count() >= LETTERS);
        if full {
            lines.push(String::new());
        }
        if let Some(line) = lines.last_mut() {
            if !line.is_empty() {
                line.push(' ');
            }
            line.push_str(word);
        }
    }
    lines.truncate(3);
    lines
}

/// The picture.
pub fn svg(graph: &Graph) -> String {
    let mut rows: BTreeMap<usize, usize> = BTreeMap::new();
    let mut places: Vec<(usize, usize)> = Vec::new();
    for node in &graph.nodes {
        let row = rows.entry(node.rank).or_default();
        places.push((MARGIN + node.rank * (WIDTH + GAP_X), MARGIN + *row * (HEIGHT + GAP_Y)));
        *row += 1;
    }
    let width = places.iter().map(|(x, _)| x + WIDTH).max().unwrap_or(0) + MARGIN;
    let height = places.iter().map(|(_, y)| y + HEIGHT).max().unwrap_or(0) + MARGIN;
    let most = graph.edges.values().map(|edge| edge.times.iter().sum::<u64>()).max().unwrap_or(0).max(1);
    let mut text = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"{width}\" height=\"{height}\" viewBox=\"0 0 {width} {height}\" \
         font-family=\"sans-serif\" font-size=\"11\">\n<defs><marker id=\"tip\" viewBox=\"0 0 8 8\" refX=\"8\" refY=\"4\" \
         markerWidth=\"7\" markerHeight=\"7\" orient=\"auto\"><path d=\"M0 0L8 4L0 8z\" fill=\"#555\"/></marker></defs>\n"
    );
    for ((from, to), edge) in &graph.edges {
        let (Some((x1, y1)), Some((x2, y2))) = (places.get(*from), places.get(*to)) else { continue };
        let (x1, y1, y2) = (x1 + WIDTH, y1 + HEIGHT / 2, y2 + HEIGHT / 2);
        // The share of the time, from 1 to 5 pixels.
        let thick = 1 + edge.times.iter().sum::<u64>() * 4 / most;
        let dash = if edge.is_detour { " stroke-dasharray=\"5 3\"" } else { "" };
        let middle = usize::midpoint(x1, *x2);
        let _ = writeln!(
            text,
            "<path d=\"M{x1} {y1}C{middle} {y1} {middle} {y2} {x2} {y2}\" fill=\"none\" stroke=\"#555\" \
             stroke-width=\"{thick}\"{dash} marker-end=\"url(#tip)\"/>"
        );
        let label = edge.label();
        for (line, part) in label.splitn(3, " · ").enumerate() {
            let y = usize::midpoint(y1, y2) + line * 12;
            let _ = writeln!(
                text,
                "<text x=\"{middle}\" y=\"{}\" text-anchor=\"middle\" fill=\"#333\">{}</text>",
                y.saturating_sub(8),
                escape(part)
            );
        }
    }
    for (node, (x, y)) in graph.nodes.iter().zip(&places) {
        let (fill, stroke) = if node.is_drop {
            ("#fdd", "#c00")
        } else {
            match node.lane {
                Lane::Own => ("#def", "#06c"),
                Lane::Pod => ("#efe", "#090"),
                Lane::Host => ("#f7f7f7", "#666"),
                Lane::End => ("#fff", "#333"),
            }
        };
        let _ = writeln!(
            text,
            "<rect x=\"{x}\" y=\"{y}\" width=\"{WIDTH}\" height=\"{HEIGHT}\" rx=\"5\" fill=\"{fill}\" stroke=\"{stroke}\"/>"
        );
        for (line, part) in wrap(&node.label).iter().enumerate() {
            let _ = writeln!(text, "<text x=\"{}\" y=\"{}\">{}</text>", x + 8, y + 15 + line * 13, escape(part));
        }
    }
    text.push_str("</svg>\n");
    text
}

#[cfg(test)]
mod tests {
    use super::super::recorded::{Recorded, tests::lines};
    use super::*;

    #[test]
    fn a_picture_has_a_box_for_each_node_and_a_line_for_each_edge() {
        let graph = Graph::new(&Recorded::new([lines("a1", 500, false), lines("a3", 700, true)].concat().iter()));
        let picture = svg(&graph);
        assert_eq!(picture.matches("<rect ").count(), graph.nodes.len());
        assert_eq!(picture.matches("<path d=\"M").count(), graph.edges.len() + 1);
        assert_eq!(picture.matches("#fdd").count(), 1);
        assert!(!picture.contains("href"), "{picture}");
        assert!(svg(&Graph::default()).ends_with("</svg>\n"));
    }

    #[test]
    fn labels_are_wrapped_and_escaped() {
        let found = wrap("veth12345678 from_pod: service_new redirect and more words");
        assert_eq!(found, ["veth12345678 from_pod: service_new", "redirect and more words"]);
        assert_eq!(escape("a<b>&\"c\""), "a&lt;b&gt;&amp;&quot;c&quot;");
    }
}
