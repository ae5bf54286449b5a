//! Where a trace goes, and in which form.

use std::collections::BTreeMap;
use std::io::{self, Write};

use serde_json::Value;

use super::record;
use super::recorded::Recorded;
use super::story::{Context, Story};
use super::{capture, graph, line, picture, tree};

/// Form of a trace.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum)]
pub enum Form {
    /// A block for each packet; packets that take a path again are counted.
    #[default]
    Tree,
    /// `key=value`, a line for each packet.
    Line,
    /// A JSON object a line: meta, pkt, hop, decision, hook, drop, end, lost, summary.
    Ndjson,
    /// A capture file with an interface for each place, for Wireshark.
    Pcapng,
    /// The paths as a Mermaid flow chart.
    Mermaid,
    /// The paths as a picture.
    Svg,
    /// Nothing but the sums at the end.
    Summary,
}

impl Form {
    /// Is it written as a whole at the end?
    pub const fn is_whole(self) -> bool {
        matches!(self, Self::Pcapng | Self::Mermaid | Self::Svg)
    }
}

/// Packets that took the same path.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Path {
    /// Who to whom.
    pub who: String,
    /// Its steps.
    pub steps: Vec<String>,
    /// How it ended.
    pub ending: &'static str,
    /// Nanoseconds of each packet.
    pub times: Vec<u64>,
}

/// A trace being written.
pub struct Output {
    form: Form,
    to: Box<dyn Write>,
    /// Also packets whose path was shown already.
    each: bool,
    paths: BTreeMap<(String, Vec<String>), Path>,
    kept: Vec<Value>,
    boot_epoch: u64,
    utc: bool,
}

impl Output {
    /// To a file or to standard output.
    pub fn new(form: Form, to: Box<dyn Write>, each: bool, utc: bool, boot_epoch: u64) -> Self {
        Self { form, to, each, paths: BTreeMap::new(), kept: Vec::new(), boot_epoch, utc }
    }

    /// The first line.
    ///
    /// # Errors
    /// When it cannot be written.
    pub fn begin(&mut self, meta: Value) -> io::Result<()> {
        if self.form == Form::Ndjson {
            return writeln!(self.to, "{meta}");
        }
        self.kept.push(meta);
        Ok(())
    }

    /// A packet.
    ///
    /// # Errors
    /// When it cannot be written.
    pub fn packet(&mut self, number: &str, story: &Story<'_>, context: Context<'_>) -> io::Result<()> {
        let who = story.journey.first().map_or_else(String::new, |packet| {
            let name = |source| {
                let named = super::story::named(packet, source, context.names);
                named.split(" (").next().unwrap_or_default().to_owned()
            };
            let strip = |name: String| {
                name.rsplit_once(':')
                    .filter(|(_, port)| port.parse::<u16>().is_ok())
                    .map_or(name.clone(), |(ip, _)| ip.to_owned())
            };
            format!("{} → {}", strip(name(true)), strip(name(false)))
        });
        let steps = story.signature();
        let path = self.paths.entry((who.clone(), steps.clone())).or_default();
        let is_first = path.times.is_empty();
        if is_first {
            *path = Path { who, steps, ending: story.ending.name(), times: Vec::new() };
        }
        path.times.push(story.journey.total());
        let clock = clock(self.boot_epoch + story.journey.began(), self.utc);
        match self.form {
            Form::Tree if is_first || self.each => write!(self.to, "{}", tree::block(number, &clock, story, context)),
            Form::Line => writeln!(self.to, "{}", line::line(number, &clock, story, context)),
            Form::Ndjson => {
                record::lines(number, story, context).iter().try_for_each(|line| writeln!(self.to, "{line}"))
            }
            Form::Pcapng | Form::Mermaid | Form::Svg => {
                self.kept.extend(record::lines(number, story, context));
                Ok(())
            }
            Form::Tree | Form::Summary => Ok(()),
        }?;
        self.to.flush()
    }

    /// The end: sums, and what was lost.
    ///
    /// # Errors
    /// When it cannot be written.
    pub fn end(&mut self, lost: &Value, summary: &Value, text: &str) -> io::Result<()> {
        match self.form {
            Form::Ndjson => writeln!(self.to, "{lost}\n{summary}")?,
            Form::Tree | Form::Summary | Form::Line => {
                if self.form != Form::Line {
                    for path in self.paths.values() {
                        if path.times.len() > 1 || self.form == Form::Summary {
                            writeln!(self.to, "{}", path.line())?;
                        }
                    }
                }
                writeln!(self.to, "{text}")?;
            }
            Form::Pcapng | Form::Mermaid | Form::Svg => {
                let recorded = Recorded::new(self.kept.iter());
                self.to.write_all(&whole(self.form, &recorded))?;
            }
        }
        self.to.flush()
    }

    /// The paths, with the most packets first.
    pub fn paths(&self) -> Vec<&Path> {
        let mut paths: Vec<&Path> = self.paths.values().collect();
        paths.sort_by_key(|path| std::cmp::Reverse(path.times.len()));
        paths
    }
}

/// A trace in a form that is written as a whole.
pub fn whole(form: Form, recorded: &Recorded) -> Vec<u8> {
    match form {
        Form::Pcapng => capture::file(recorded),
        Form::Svg => picture::svg(&graph::Graph::new(recorded)).into_bytes(),
        _ => graph::Graph::new(recorded).mermaid().into_bytes(),
    }
}

impl Path {
    /// A share of the times, in thousandths.
    pub fn quantile(&self, thousandths: usize) -> u64 {
        let mut times = self.times.clone();
        times.sort_unstable();
        let index = (times.len() * thousandths).div_ceil(1000).saturating_sub(1);
        times.get(index).copied().unwrap_or(0)
    }

    fn line(&self) -> String {
        let (p50, p99) = (tree::duration(self.quantile(500)), tree::duration(self.quantile(990)));
        format!(
            "×{:<5} {}  {}  p50 {p50}  p99 {p99}  {} steps",
            self.times.len(),
            self.who,
            self.ending,
            self.steps.len()
        )
    }
}

/// Time of day, in UTC; with `utc` the whole date.
pub fn clock(nanoseconds: u64, utc: bool) -> String {
    let seconds = nanoseconds / 1_000_000_000;
    let micros = nanoseconds % 1_000_000_000 / 1000;
    let day = seconds % 86_400;
    let time = format!("{:02}:{:02}:{:02}.{micros:06}", day / 3600, day % 3600 / 60, day % 60);
    if !utc {
        return time;
    }
    let (year, month, day) = date(seconds / 86_400);
    format!("{year:04}-{month:02}-{day:02}T{time}Z")
}

/// Date of a day after 1970-01-01, by the proleptic Gregorian calendar.
fn date(days: u64) -> (u64, u64, u64) {
    let mut year = 1970;
    let mut rest = days;
    loop {
        let leap = year % 4 == 0 && (year % 100 != 0 || year % 400 == 0);
        let length = if leap { 366 } else { 365 };
        if rest < length {
            let february = if leap { 29 } else { 28 };
            for (month, length) in (1..).zip([31, february, 31, 30, 31, 30, 31, 31, 30, 31, 30, 31]) {
                if rest < length {
                    return (year, month, rest + 1);
                }
                rest -= length;
            }
        }
        rest -= length;
        year += 1;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn clocks_are_written() {
        assert_eq!(clock(1_763_799_600_123_456_789, false), "08:20:00.123456");
        assert_eq!(clock(1_763_799_600_123_456_789, true), "2025-11-22T08:20:00.123456Z");
        assert_eq!(
            [0, 59, 11_016, 19_782, 20_512].map(date),
            [(1970, 1, 1), (1970, 3, 1), (2000, 2, 29), (2024, 2, 29), (2026, 2, 28)]
        );
    }

    #[test]
    fn quantiles_are_times_that_were() {
        let path = Path { times: (1..=100).rev().collect(), ..Path::default() };
        assert_eq!([500, 990, 1000, 1].map(|share| path.quantile(share)), [50, 99, 100, 1]);
        assert_eq!(Path::default().quantile(500), 0);
    }
}
