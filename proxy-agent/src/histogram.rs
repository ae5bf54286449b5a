//! Times, counted in buckets.

use std::sync::Mutex;
use std::time::Duration;

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

    /// What it holds; `None` if a thread ended while it counted.
    pub fn read(&self) -> Option<Reading> {
        let seen = self.seen.lock().ok()?;
        let mut sum = 0;
        let mut below = Vec::with_capacity(self.bounds.len());
        for (bound, count) in self.bounds.iter().zip(&seen.counts) {
            sum += count;
            below.push((*bound, sum));
        }
        Some(Reading { below, count: seen.count, sum: seen.sum })
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

/// What a histogram holds.
#[derive(Clone, Debug, PartialEq)]
pub struct Reading {
    /// Each bound, in seconds, with how many were not above it.
    pub below: Vec<(f64, u64)>,
    /// How many there were.
    pub count: u64,
    /// Seconds in all.
    pub sum: f64,
}
