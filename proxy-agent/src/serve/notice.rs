//! What people should hear of through Events on objects, and how often.

use std::collections::BTreeMap;
use std::time::Duration;

use proxy_core::diagnostic::{Diagnostic, Severity};
use proxy_core::name::ObjectName;
use tokio::sync::mpsc;

/// The object that a notice is about.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum About {
    /// A Service.
    Service(ObjectName),
    /// This node.
    Node(String),
}

/// A Warning Event to be.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Notice {
    /// Object.
    pub about: About,
    /// `CamelCase`, for programs.
    pub reason: &'static str,
    /// For people.
    pub text: String,
}

impl Notice {
    /// About this node.
    pub fn node(name: &str, reason: &'static str, text: String) -> Self {
        Self { about: About::Node(name.to_owned()), reason, text }
    }

    /// About a Service.
    pub fn service(name: &ObjectName, reason: &'static str, text: String) -> Self {
        Self { about: About::Service(name.clone()), reason, text }
    }

    /// Of a finding; `None` when it is not about a Service of the API server.
    pub fn of(finding: &Diagnostic) -> Option<Self> {
        let (namespace, name) = finding.object.strip_prefix("Service ")?.split_once('/')?;
        let reason = match finding.severity {
            Severity::Warning => "ServedInPart",
            Severity::Error => "NotServed",
        };
        let field = if finding.field.is_empty() { String::new() } else { format!("{}: ", finding.field) };
        let text = format!("{field}{}; {}", finding.problem, finding.fix);
        Some(Self::service(&ObjectName::new(namespace, name), reason, text))
    }
}

/// Where notices go. Nothing waits for them: when too many are under way, further ones are dropped, for the log has
/// them all.
#[derive(Clone, Debug)]
pub struct Notices(Option<mpsc::Sender<Notice>>);

/// Notices that may be under way.
const QUEUE: usize = 256;

impl Notices {
    /// To an API server: who receives must run.
    pub fn channel() -> (Self, mpsc::Receiver<Notice>) {
        let (tx, rx) = mpsc::channel(QUEUE);
        (Self(Some(tx)), rx)
    }

    /// To nobody: objects from a folder have no Events.
    pub const fn none() -> Self {
        Self(None)
    }

    /// Sends one.
    pub fn send(&self, notice: Notice) {
        if let Some(tx) = &self.0
            && tx.try_send(notice).is_err()
        {
            tracing::debug!("an Event is dropped: too many are under way");
        }
    }
}

/// The same text about the same object is told once in this time.
pub const AGAIN: Duration = Duration::from_mins(10);
/// Events about one object at once, as by client-go's spam filter.
pub const OBJECT_BURST: u32 = 25;
/// After that, one in this time.
pub const OBJECT_REFILL: Duration = Duration::from_mins(5);
/// Texts and objects that are remembered. Beyond that some are forgotten: an Event too many is no harm.
const REMEMBERED: usize = 4_096;

/// Decides what is told. Time is a parameter, from any origin.
#[derive(Debug)]
pub struct Filter {
    all: Bucket,
    qps: f64,
    burst: f64,
    objects: BTreeMap<About, Bucket>,
    said: BTreeMap<(About, &'static str, String), Duration>,
}

#[derive(Clone, Copy, Debug)]
struct Bucket {
    tokens: f64,
    at: Duration,
}

impl Bucket {
    fn fill(&mut self, now: Duration, per_second: f64, most: f64) {
        self.tokens = (self.tokens + now.saturating_sub(self.at).as_secs_f64() * per_second).min(most);
        self.at = now;
    }
}

impl Filter {
    /// `qps` and `burst` bound all Events together.
    pub fn new(qps: f32, burst: u32) -> Self {
        let burst = f64::from(burst);
        let all = Bucket { tokens: burst, at: Duration::ZERO };
        Self { all, qps: qps.into(), burst, objects: BTreeMap::new(), said: BTreeMap::new() }
    }

    /// Is it to be told?
    pub fn admit(&mut self, notice: &Notice, now: Duration) -> bool {
        self.forget(now);
        let key = (notice.about.clone(), notice.reason, notice.text.clone());
        if self.said.contains_key(&key) {
            return false;
        }
        let most = f64::from(OBJECT_BURST);
        let fresh = Bucket { tokens: most, at: now };
        let object = self.objects.entry(notice.about.clone()).or_insert(fresh);
        object.fill(now, 1.0 / OBJECT_REFILL.as_secs_f64(), most);
        self.all.fill(now, self.qps, self.burst);
        if object.tokens < 1.0 || self.all.tokens < 1.0 {
            return false;
        }
        object.tokens -= 1.0;
        self.all.tokens -= 1.0;
        self.said.insert(key, now);
        true
    }

    fn forget(&mut self, now: Duration) {
        self.said.retain(|_, at| now.saturating_sub(*at) < AGAIN);
        let full = OBJECT_REFILL * OBJECT_BURST;
        self.objects.retain(|_, bucket| now.saturating_sub(bucket.at) < full);
        while self.said.len() >= REMEMBERED {
            self.said.pop_first();
        }
        while self.objects.len() >= REMEMBERED {
            self.objects.pop_first();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn notice(name: &str, text: &str) -> Notice {
        Notice::service(&ObjectName::new("ns", name), "NotServed", text.to_owned())
    }

    #[test]
    fn the_same_is_told_once_in_ten_minutes() {
        let mut filter = Filter::new(1_000.0, 1_000);
        let at = Duration::from_secs;
        let rows = [
            (at(0), notice("a", "x"), true),
            (at(1), notice("a", "x"), false),
            (at(1), notice("a", "y"), true),
            (at(1), notice("b", "x"), true),
            (at(599), notice("a", "x"), false),
            (at(600), notice("a", "x"), true),
            (at(601), notice("a", "x"), false),
        ];
        for (now, notice, want) in rows {
            assert_eq!(filter.admit(&notice, now), want, "{notice:?} at {now:?}");
        }
    }

    #[test]
    fn one_object_does_not_use_up_what_others_need() {
        let mut filter = Filter::new(1_000.0, 1_000);
        let told = |filter: &mut Filter, name, now: Duration| {
            (0..100).filter(|n| filter.admit(&notice(name, &format!("{now:?} {n}")), now)).count()
        };
        assert_eq!(told(&mut filter, "a", Duration::ZERO), 25);
        assert_eq!(told(&mut filter, "b", Duration::ZERO), 25);
        assert_eq!(told(&mut filter, "a", Duration::from_secs(299)), 0);
        assert_eq!(told(&mut filter, "a", Duration::from_mins(5)), 1);
        assert_eq!(told(&mut filter, "a", Duration::from_mins(15)), 2);
    }

    #[test]
    fn all_together_stay_within_the_limits_of_the_client() {
        let mut filter = Filter::new(5.0, 10);
        let told = |filter: &mut Filter, now: Duration| {
            (0..100).filter(|n| filter.admit(&notice(&format!("{n}"), &format!("{now:?}")), now)).count()
        };
        assert_eq!(told(&mut filter, Duration::from_secs(1)), 10);
        assert_eq!(told(&mut filter, Duration::from_secs(2)), 5);
        assert_eq!(told(&mut filter, Duration::from_mins(1)), 10);
    }

    #[test]
    fn findings_that_become_notices() {
        let finding = |severity, object: &str, field: &str| Diagnostic {
            severity,
            object: object.to_owned(),
            field: field.to_owned(),
            problem: "p".to_owned(),
            fix: "f".to_owned(),
        };
        let rows = [
            (finding(Severity::Error, "Service ns/a", ""), Some(("ns/a", "NotServed", "p; f"))),
            (finding(Severity::Warning, "Service ns/a", "spec.x"), Some(("ns/a", "ServedInPart", "spec.x: p; f"))),
            (finding(Severity::Error, "EndpointSlice ns/a", ""), None),
            (finding(Severity::Error, "a.yaml Service ns/a", ""), None),
        ];
        for (finding, want) in rows {
            let want = want.map(|(name, reason, text)| {
                let (namespace, name) = name.split_once('/').expect("two parts");
                Notice::service(&ObjectName::new(namespace, name), reason, text.to_owned())
            });
            assert_eq!(Notice::of(&finding), want);
        }
    }
}
