//! Times as Go's `fmt` shows them, which is how kube-proxy's health answers have them.

use std::time::{Duration, SystemTime};

/// `2006-01-02 15:04:05.999999999 +0000 UTC`: no trailing zeros, year 1 for "never".
pub fn go_time(time: Option<SystemTime>) -> String {
    let Some(since) = time.and_then(|time| time.duration_since(SystemTime::UNIX_EPOCH).ok()) else {
        return "0001-01-01 00:00:00 +0000 UTC".to_owned();
    };
    let (year, month, day) = date(since.as_secs() / 86_400);
    let of_day = since.as_secs() % 86_400;
    let (hour, minute, second) = (of_day / 3_600, of_day / 60 % 60, of_day % 60);
    let nanos = match since.subsec_nanos() {
        0 => String::new(),
        nanos => format!(".{}", format!("{nanos:09}").trim_end_matches('0')),
    };
    format!("{year:04}-{month:02}-{day:02} {hour:02}:{minute:02}:{second:02}{nanos} +0000 UTC")
}

/// Seconds since 1970.
pub fn unix_seconds(time: SystemTime) -> f64 {
    time.duration_since(SystemTime::UNIX_EPOCH).unwrap_or(Duration::ZERO).as_secs_f64()
}

/// Gregorian date of a day after 1970-01-01. Years begin in March here, so that the leap day is the last.
const fn date(days: u64) -> (u64, u64, u64) {
    let shifted = days + 719_468;
    let era = shifted / 146_097;
    let of_era = shifted % 146_097;
    let year_of_era = (of_era - of_era / 1_460 + of_era / 36_524 - of_era / 146_096) / 365;
    let of_year = of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let month_from_march = (5 * of_year + 2) / 153;
    let day = of_year - (153 * month_from_march + 2) / 5 + 1;
    let month = if month_from_march < 10 { month_from_march + 3 } else { month_from_march - 9 };
    let year = year_of_era + era * 400 + if month <= 2 { 1 } else { 0 };
    (year, month, day)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_as_go_shows_them() {
        let rows = [
            (0, 0, "1970-01-01 00:00:00 +0000 UTC"),
            (951_782_400, 0, "2000-02-29 00:00:00 +0000 UTC"),
            (1_709_251_199, 120_000_000, "2024-02-29 23:59:59.12 +0000 UTC"),
            (1_735_689_600, 1, "2025-01-01 00:00:00.000000001 +0000 UTC"),
            (4_107_542_400, 0, "2100-03-01 00:00:00 +0000 UTC"),
        ];
        for (seconds, nanos, want) in rows {
            assert_eq!(go_time(Some(SystemTime::UNIX_EPOCH + Duration::new(seconds, nanos))), want);
        }
        assert_eq!(go_time(None), "0001-01-01 00:00:00 +0000 UTC");
    }
}
