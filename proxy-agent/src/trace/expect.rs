//! What a trace is expected to show, and the exit codes.

use super::hooks::Hooks;
use super::journey::Ending;
use super::story::Story;

/// How a command ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Outcome {
    /// As hoped.
    Good = 0,
    /// An expectation failed.
    Failed = 1,
    /// The command line is wrong.
    Usage = 2,
    /// No packet matched before the limit.
    NoPacket = 3,
    /// Something was lost: what was seen may not be all.
    Incomplete = 4,
    /// The kernel or another tracer does not allow it.
    Unavailable = 5,
    /// A safety limit stopped it.
    Stopped = 6,
    /// Ctrl-C.
    Interrupted = 130,
}

/// `--expect`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Expectation {
    /// Every packet gets to its receiver, or out of the node.
    Delivered,
    /// Every packet is dropped, for this reason if one is given.
    Dropped(Option<String>),
    /// Every packet is dropped by a policy.
    Denied,
}

/// `--expect-no`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum Absent {
    /// No entry of netfilter on the way.
    Nf,
    /// Not handed from a bridge to the hooks of IP.
    #[value(name = "br_netfilter")]
    BrNetfilter,
    /// The kernel's conntrack has not seen it.
    Conntrack,
    /// The source stays.
    Snat,
    /// The bridge knows every receiver.
    Flood,
}

impl std::str::FromStr for Expectation {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text.split_once(':').unwrap_or((text, "")) {
            ("delivered", "") => Ok(Self::Delivered),
            ("dropped", "") => Ok(Self::Dropped(None)),
            ("dropped", reason) => Ok(Self::Dropped(Some(reason.to_owned()))),
            ("denied", "") => Ok(Self::Denied),
            _ => Err(format!("`{text}`: expected delivered, dropped, dropped:REASON or denied")),
        }
    }
}

/// All that is expected.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Expectations {
    /// How packets end.
    pub ending: Option<Expectation>,
    /// What must not be.
    pub absent: Vec<Absent>,
    /// Nanoseconds that no step may take longer than.
    pub hop_latency: Option<u64>,
}

impl Expectations {
    /// Nothing?
    pub fn is_empty(&self) -> bool {
        *self == Self::default()
    }

    /// What a packet shows against them.
    pub fn failures(&self, story: &Story<'_>, hooks: Option<&Hooks>) -> Vec<String> {
        let mut failures = Vec::new();
        let ended = || match &story.cause {
            Some(cause) => format!("it was dropped: {} at {}", cause.reason, cause.place),
            None => format!("it is {}", story.ending.name()),
        };
        let arrives = matches!(story.ending, Ending::Delivered | Ending::LeftNode);
        match &self.ending {
            Some(Expectation::Delivered) if !arrives => failures.push(format!("expected delivered, {}", ended())),
            Some(Expectation::Dropped(reason)) => {
                let fits = |wanted: &String| {
                    story.cause.as_ref().is_some_and(|cause| cause.reason.eq_ignore_ascii_case(wanted))
                };
                if story.cause.is_none() || reason.as_ref().is_some_and(|reason| !fits(reason)) {
                    let wanted = reason.as_ref().map(|reason| format!(" for {reason}")).unwrap_or_default();
                    failures.push(format!("expected dropped{wanted}, {}", ended()));
                }
            }
            Some(Expectation::Denied) if story.cause.as_ref().is_none_or(|cause| cause.class != "own-policy") => {
                failures.push(format!("expected denied by a policy, {}", ended()));
            }
            _ => {}
        }
        for absent in &self.absent {
            let shown = match absent {
                Absent::Nf if story.is_touched(hooks) => story.touched(hooks).join(", "),
                Absent::BrNetfilter if story.bridge_nf => "br_netfilter handed it to the IP hooks".to_owned(),
                Absent::Conntrack if story.conntrack => "conntrack has seen it".to_owned(),
                Absent::Snat if story.journey.has_new_source(story.is_reply) => "its source was translated".to_owned(),
                Absent::Flood if !story.journey.flooded().is_empty() => "the bridge flooded it".to_owned(),
                _ => continue,
            };
            failures.push(format!(
                "expected no {}, but {shown}",
                clap::ValueEnum::to_possible_value(absent).map(|v| v.get_name().to_owned()).unwrap_or_default()
            ));
        }
        if let Some(limit) = self.hop_latency
            && let Some(leg) = story.legs.iter().find(|leg| leg.took > limit)
        {
            let label = super::story::step_label(leg.step);
            failures.push(format!("expected no step above {limit} ns, but {label} took {} ns", leg.took));
        }
        failures
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn expectations_are_read() {
        let cases = [
            ("delivered", Some(Expectation::Delivered)),
            ("dropped", Some(Expectation::Dropped(None))),
            ("dropped:NO_SOCKET", Some(Expectation::Dropped(Some("NO_SOCKET".to_owned())))),
            ("denied", Some(Expectation::Denied)),
            ("lost", None),
            ("delivered:soon", None),
        ];
        for (text, expected) in cases {
            assert_eq!(text.parse().ok(), expected, "{text}");
        }
    }
}
