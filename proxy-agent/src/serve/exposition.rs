//! Prometheus' text format 0.0.4, written out.
//!
//! The client libraries for Rust write OpenMetrics, whose names of counter families lack `_total` and whose media type
//! is another: kube-proxy's users scrape this one, and their dashboards know these names.

use std::fmt::Write as _;
use std::sync::Mutex;
use std::time::Duration;

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

    /// A whole histogram.
    pub fn histogram(&mut self, name: &str, help: &str, histogram: &Histogram) {
        self.head(name, "histogram", help);
        let Ok(seen) = histogram.seen.lock() else { return };
        let bucket = format!("{name}_bucket");
        let mut below = 0;
        for (bound, count) in histogram.bounds.iter().zip(&seen.counts) {
            below += count;
            self.sample(&bucket, &[("le", &bound.to_string())], float(below));
        }
        self.sample(&bucket, &[("le", "+Inf")], float(seen.count));
        self.sample(&format!("{name}_sum"), &[], seen.sum);
        self.sample(&format!("{name}_count"), &[], float(seen.count));
    }

    fn head(&mut self, name: &str, kind: &str, help: &str) {
        // Writing to a String does not fail.
        let _ = writeln!(self.0, "# HELP {name} {help}\n# TYPE {name} {kind}");
    }
}

/// Times, counted in buckets.
#[derive(Debug)]
pub struct Histogram {
    bounds: Vec<f64>,
    seen: Mutex<Seen>,
}

#[derive(Debug)]
struct Seen {
    counts: Vec<u64>,
    count: u64,
    sum: f64,
}

impl Histogram {
    /// With these upper bounds, in seconds, which rise.
    pub fn new(bounds: Vec<f64>) -> Self {
        let seen = Mutex::new(Seen { counts: vec![0; bounds.len()], count: 0, sum: 0.0 });
        Self { bounds, seen }
    }

    /// `first`, and `count` bounds in all, each twice the one before.
    pub fn doubling(first: f64, count: u32) -> Self {
        Self::new((0..count).map(|n| first * f64::from(1_u32 << n)).collect())
    }

    /// Counts one.
    pub fn observe(&self, time: Duration) {
        let Ok(mut seen) = self.seen.lock() else { return };
        let seconds = time.as_secs_f64();
        if let Some(at) = self.bounds.iter().position(|bound| seconds <= *bound) {
            seen.counts[at] += 1;
        }
        seen.count += 1;
        seen.sum += seconds;
    }
}

/// A count as a sample: exact up to 2^53, as in every Prometheus.
#[expect(clippy::cast_precision_loss, reason = "samples are floats")]
pub const fn float(count: u64) -> f64 {
    count as f64
}
