//! Means, intervals, and what they say about a budget.

use std::fmt;

use serde::Serialize;

/// A mean with its 95 % interval.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub(crate) struct Estimate {
    pub(crate) mean: f64,
    pub(crate) low: f64,
    pub(crate) high: f64,
    pub(crate) rounds: usize,
}

/// What is allowed.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Budget {
    AtLeast(f64),
    AtMost(f64),
}

/// Whether an estimate keeps its budget.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Verdict {
    /// The whole interval does.
    Met,
    /// No part of the interval does.
    Missed,
    /// The interval is wider than the margin.
    Undecided,
}

impl Estimate {
    /// Of values that came one by one, with Student's t. One value alone has an endless interval.
    pub(crate) fn of(values: &[f64]) -> Self {
        let n = count(values.len());
        let mean = values.iter().sum::<f64>() / n;
        let variance = values.iter().map(|v| (v - mean).powi(2)).sum::<f64>() / (n - 1.0);
        let half = if values.len() < 2 { f64::INFINITY } else { student(values.len() - 1) * (variance / n).sqrt() };
        Self { mean, low: mean - half, high: mean + half, rounds: values.len() }
    }

    /// Of the ratios a ÷ b, round by round: on their logarithms, so that a ÷ b and b ÷ a say the same.
    pub(crate) fn of_ratios(a: &[f64], b: &[f64]) -> Self {
        let logs: Vec<f64> = a.iter().zip(b).map(|(a, b)| (a / b).ln()).collect();
        let Self { mean, low, high, rounds } = Self::of(&logs);
        Self { mean: mean.exp(), low: low.exp(), high: high.exp(), rounds }
    }

    /// Of the differences a − b, round by round.
    pub(crate) fn of_differences(a: &[f64], b: &[f64]) -> Self {
        Self::of(&a.iter().zip(b).map(|(a, b)| a - b).collect::<Vec<_>>())
    }

    /// Against a budget.
    pub(crate) fn against(&self, budget: Budget) -> Verdict {
        let (surely, possibly) = match budget {
            Budget::AtLeast(limit) => (self.low >= limit, self.high >= limit),
            Budget::AtMost(limit) => (self.high <= limit, self.low <= limit),
        };
        match (surely, possibly) {
            (true, _) => Verdict::Met,
            (false, true) => Verdict::Undecided,
            (false, false) => Verdict::Missed,
        }
    }
}

impl fmt::Display for Budget {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::AtLeast(limit) => write!(f, "≥ {limit}"),
            Self::AtMost(limit) => write!(f, "≤ {limit}"),
        }
    }
}

impl fmt::Display for Verdict {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Met => "met",
            Self::Missed => "MISSED",
            Self::Undecided => "undecided",
        })
    }
}

/// The middle value; of an even number, the mean of both.
pub(crate) fn median(values: &[f64]) -> f64 {
    quantile(values, 0.5)
}

/// The value that this share does not exceed, interpolated.
pub(crate) fn quantile(values: &[f64], share: f64) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    let Some(last) = sorted.len().checked_sub(1) else { return f64::NAN };
    let at = share * count(last);
    #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "between 0 and the number of values")]
    let below = at.floor() as usize;
    let above = (below + 1).min(last);
    sorted[below] + (sorted[above] - sorted[below]) * (at - at.floor())
}

/// A count as a float.
#[expect(clippy::cast_precision_loss, reason = "counts are far below 2^52")]
pub(crate) const fn count(number: usize) -> f64 {
    number as f64
}

/// The two-sided 95 % quantile of Student's t.
fn student(freedom: usize) -> f64 {
    const TABLE: [f64; 30] = [
        12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131,
        2.120, 2.110, 2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042,
    ];
    // Beyond the table by its expansion in 1/freedom, right to three digits there.
    freedom.checked_sub(1).and_then(|at| TABLE.get(at)).copied().unwrap_or_else(|| 1.96 + 2.372 / count(freedom))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn interval_of_known_values() {
        let estimate = Estimate::of(&[1.0, 2.0, 3.0]);
        // Standard error 1/√3, t(2) = 4.303.
        assert!((estimate.mean - 2.0).abs() < 1e-9 && (estimate.high - 2.0 - 4.303 / 3_f64.sqrt()).abs() < 1e-9);
        let ratio = Estimate::of_ratios(&[2.0, 8.0], &[1.0, 1.0]);
        assert!((ratio.mean - 4.0).abs() < 1e-9 && (ratio.low * ratio.high - 16.0).abs() < 1e-6, "{ratio:?}");
        assert!(Estimate::of(&[1.0]).high.is_infinite());
    }

    #[test]
    fn verdict_needs_the_whole_interval() {
        let estimate = |low, high| Estimate { mean: f64::midpoint(low, high), low, high, rounds: 9 };
        let budget = Budget::AtLeast(1.0);
        let verdicts = [(1.0, 1.2), (0.9, 1.1), (0.8, 0.9)].map(|(low, high)| estimate(low, high).against(budget));
        assert_eq!(verdicts, [Verdict::Met, Verdict::Undecided, Verdict::Missed]);
        let at_most = [(8.0, 9.0), (9.0, 11.0), (11.0, 12.0)]
            .map(|(low, high)| estimate(low, high).against(Budget::AtMost(10.0)));
        assert_eq!(at_most, [Verdict::Met, Verdict::Undecided, Verdict::Missed]);
    }

    #[test]
    fn quantiles_interpolate() {
        assert_eq!([0.0, 0.5, 1.0].map(|share| quantile(&[4.0, 1.0, 3.0, 2.0], share).to_string()), ["1", "2.5", "4"]);
    }
}
