//! What the programs themselves say of the packet, beside what the maps say of it.

use std::net::SocketAddr;

use proxy_abi::policy::RuleRef;
use proxy_abi::{Hook, Reason};

use super::super::drops;
use super::check::Check;
use crate::view::explain::numbered;

/// What the maps say that a program does.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Expected {
    /// It lets the packet pass, to one of these backends where a Service translates.
    Passes(Vec<SocketAddr>),
    /// It drops or refuses it, for one of these reasons.
    Drops(Vec<Reason>),
    /// The maps do not tell.
    Open,
}

/// What a program did in a dry run.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Ran {
    /// Which.
    pub hook: Hook,
    /// Where.
    pub device: String,
    /// Its return value.
    pub verdict: i32,
    /// Why; `None` where it could not tell.
    pub reason: Option<Reason>,
    /// The policy rule that decided, and what it is called.
    pub rule: Option<(RuleRef, Option<String>)>,
    /// The backend that was chosen.
    pub backend: Option<SocketAddr>,
}

/// `TC_ACT_SHOT`.
const SHOT: i32 = 2;
/// `TC_ACT_REDIRECT`.
const REDIRECT: i32 = 7;

impl Ran {
    /// Would it be dropped, or sent back as a refusal?
    pub fn is_drop(&self) -> bool {
        self.verdict == SHOT || self.reason.is_some_and(Reason::is_drop)
    }

    /// In words: `from_pod at veth7: service_new, redirect to 10.1.0.3:8080`.
    pub fn shown(&self) -> String {
        let reason = self.reason.map_or("it does not tell why", Reason::name);
        let verdict = match self.verdict {
            SHOT => "drop",
            _ if self.is_drop() => "refuse",
            REDIRECT => "redirect",
            _ => "pass",
        };
        let to = self.backend.map(|backend| format!(", to {backend}")).unwrap_or_default();
        let rule = match &self.rule {
            Some((_, Some(name))) => format!(", by {name}"),
            Some((rule, None)) => format!(", by {}", numbered(*rule)),
            None => String::new(),
        };
        format!("{} at {}: {reason}, {verdict}{to}{rule}", self.hook.name(), self.device)
    }

    /// Against what the maps say.
    pub fn check(&self, expected: &Expected) -> Check {
        let what = "dry run";
        let disagrees = |maps: &str| {
            Check::cause(
                what,
                format!("the maps say that {maps}, and the program does otherwise: {}", self.shown()),
                "restart the agent; if it stays so, report it with this output",
            )
        };
        let names = |reasons: &[Reason]| reasons.iter().map(|reason| reason.name()).collect::<Vec<_>>().join(" or ");
        match expected {
            Expected::Drops(reasons) if !self.is_drop() => disagrees(&format!("it is dropped ({})", names(reasons))),
            Expected::Drops(reasons) if self.reason.is_some_and(|reason| !reasons.contains(&reason)) => {
                disagrees(&format!("it is dropped by {}", names(reasons)))
            }
            Expected::Passes(backends) if !self.is_drop() => match self.backend {
                Some(backend) if !backends.contains(&backend) => disagrees("another backend is taken"),
                None if !backends.is_empty() && self.reason.is_some() => disagrees("a backend is taken"),
                _ => Check::good(what, self.shown()),
            },
            Expected::Drops(_) => Check::good(what, format!("{}, as the maps say", self.shown())),
            Expected::Open if !self.is_drop() => Check::good(what, self.shown()),
            // Something that the checks before do not look at.
            Expected::Passes(_) | Expected::Open => {
                let advice =
                    self.reason.map_or("`proxy-agent status` counts the reasons", |reason| drops::own_advice(reason).1);
                Check::cause(what, self.shown(), advice)
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::check::State;
    use super::*;

    #[test]
    fn maps_and_programs_are_compared() {
        let backend = |port| SocketAddr::from(([10, 1, 0, 3], port));
        let ran = |verdict, reason, backend| Ran {
            hook: Hook::FromPod,
            device: "veth7".to_owned(),
            verdict,
            reason: Some(reason),
            rule: None,
            backend,
        };
        let chosen = ran(REDIRECT, Reason::ServiceNew, Some(backend(8080)));
        assert_eq!(chosen.shown(), "from_pod at veth7: service_new, redirect, to 10.1.0.3:8080");
        let denied = Ran {
            rule: Some((RuleRef(0), Some("shop/web ingress[0]".to_owned()))),
            ..ran(SHOT, Reason::PolicyEgress, None)
        };
        assert_eq!(denied.shown(), "from_pod at veth7: policy_egress, drop, by shop/web ingress[0]");
        let direct = ran(-1, Reason::DirectNew, None);
        let passes = |ports: &[u16]| Expected::Passes(ports.iter().map(|port| backend(*port)).collect());
        let drops = |reason| Expected::Drops(vec![reason]);
        let rows = [
            (&chosen, passes(&[8080, 8081]), State::Good, "service_new"),
            (&chosen, passes(&[8081]), State::Cause, "another backend"),
            (&chosen, drops(Reason::NoBackend), State::Cause, "does otherwise"),
            (&chosen, Expected::Open, State::Good, "service_new"),
            (&denied, drops(Reason::PolicyEgress), State::Good, "as the maps say"),
            (&denied, drops(Reason::NoBackend), State::Cause, "dropped by no_backend"),
            (&denied, passes(&[]), State::Cause, "policy_egress"),
            (&direct, passes(&[]), State::Good, "direct_new"),
            (&direct, passes(&[8080]), State::Cause, "a backend is taken"),
        ];
        for (n, (ran, expected, state, words)) in rows.into_iter().enumerate() {
            let check = ran.check(&expected);
            assert_eq!(check.state, state, "row {n}: {}", check.found);
            assert!(check.found.contains(words), "row {n}: {}", check.found);
        }
    }
}
