//! Prometheus' text format 0.0.4, written out.
//!
//! The client libraries for Rust write OpenMetrics, whose names of counter families lack `_total` and whose media type
//! is another: kube-proxy's users scrape this one, and their dashboards know these names.

use std::fmt::Write as _;

use crate::histogram::Histogram;

/// A text that grows.
#[derive(Debug, Default)]
pub struct Exposition(String);

/// What a family is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// It only grows.
    Counter,
    /// It goes up and down.
    Gauge,
}

impl Exposition {
    /// The text.
    pub fn into_text(self) -> String {
        self.0
    }

    /// Begins a family.
    pub fn family(&mut self, name: &str, kind: Kind, help: &str) {
        let kind = match kind {
            Kind::Counter => "counter",
            Kind::Gauge => "gauge",
        };
        self.head(name, kind, help);
    }

    /// One sample of the family begun last.
    pub fn sample(&mut self, name: &str, labels: &[(&str, &str)], value: f64) {
        self.0.push_str(name);
        for (at, (label, text)) in labels.iter().enumerate() {
            self.0.push(if at == 0 { '{' } else { ',' });
            let text = text.replace('\\', "\\\\").replace('"', "\\\"").replace('\n', "\\n");
            let _ = write!(self.0, "{label}=\"{text}\"");
        }
        if !labels.is_empty() {
            self.0.push('}');
        }
        // What is huge is written in full, which every parser reads.
        let _ = writeln!(self.0, " {value}");
    }

    /// A family of one sample without labels.
    pub fn single(&mut self, name: &str, kind: Kind, help: &str, value: f64) {
        self.family(name, kind, help);
        self.sample(name, &[], value);
    }

    /// A family of one histogram.
    pub fn histogram(&mut self, name: &str, help: &str, histogram: &Histogram) {
        self.histograms(name, help, [(&[][..], histogram)]);
    }

    /// A family of histograms with labels.
    pub fn histograms<'a>(
        &mut self,
        name: &str,
        help: &str,
        all: impl IntoIterator<Item = (&'a [(&'a str, &'a str)], &'a Histogram)>,
    ) {
        self.head(name, "histogram", help);
        let bucket = format!("{name}_bucket");
        for (labels, histogram) in all {
            let Some(seen) = histogram.read() else { continue };
            for (bound, below) in seen.below {
                let bound = bound.to_string();
                self.sample(&bucket, &[labels, &[("le", &bound)]].concat(), float(below));
            }
            self.sample(&bucket, &[labels, &[("le", "+Inf")]].concat(), float(seen.count));
            self.sample(&format!("{name}_sum"), labels, seen.sum);
            self.sample(&format!("{name}_count"), labels, float(seen.count));
        }
    }

    fn head(&mut self, name: &str, kind: &str, help: &str) {
        // Writing to a String does not fail.
        let _ = writeln!(self.0, "# HELP {name} {help}\n# TYPE {name} {kind}");
    }
}

/// A count as a sample: exact up to 2^53, as in every Prometheus.
#[expect(clippy::cast_precision_loss, reason = "samples are floats")]
pub const fn float(count: u64) -> f64 {
    count as f64
}
