//! Waiting for a condition, never for a time.

use std::thread;
use std::time::{Duration, Instant};

use crate::error::{Error, Result};

/// Pause between two looks at a condition.
const POLL: Duration = Duration::from_millis(2);

/// A point in time at which waiting ends.
#[derive(Clone, Copy, Debug)]
pub struct Deadline {
    start: Instant,
    limit: Duration,
}

impl Deadline {
    /// From now.
    pub fn after(limit: Duration) -> Self {
        Self { start: Instant::now(), limit }
    }

    /// From now, in seconds.
    pub fn secs(limit: u64) -> Self {
        Self::after(Duration::from_secs(limit))
    }

    /// Time left; `None` when it is over.
    pub fn left(&self) -> Option<Duration> {
        self.limit.checked_sub(self.start.elapsed()).filter(|left| !left.is_zero())
    }

    /// The error for a condition that did not come true.
    pub fn missed(&self, what: impl Into<String>) -> Error {
        Error::Timeout { what: what.into(), waited: self.start.elapsed() }
    }

    /// Looks until `look` gives a value; at least once. An error of `look` ends it at once.
    pub fn poll<T>(&self, what: &str, mut look: impl FnMut() -> Result<Option<T>>) -> Result<T> {
        loop {
            let over = self.left().is_none();
            if let Some(value) = look()? {
                return Ok(value);
            }
            if over {
                return Err(self.missed(what));
            }
            thread::park_timeout(POLL);
        }
    }

    /// Looks until `look` is true; at least once.
    pub fn until(&self, what: &str, mut look: impl FnMut() -> bool) -> Result<()> {
        self.poll(what, || Ok(look().then_some(())))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn polls_until_true_and_at_least_once_after_the_end() {
        let mut looks = 0;
        let third = Deadline::secs(5).poll("third look", || {
            looks += 1;
            Ok((looks == 3).then_some(looks))
        });
        assert_eq!(third.expect("in time"), 3);
        Deadline::after(Duration::ZERO).until("true at once", || true).expect("looked once");
        let missed = Deadline::after(Duration::from_millis(5)).until("never", || false).expect_err("never true");
        assert!(matches!(missed, Error::Timeout { what, .. } if what == "never"));
    }
}
