//! What the policies of both ends say, as checks.

use proxy_abi::policy::Direction;

use super::check::Check;
use crate::view::explain::Say;

const fn name(direction: Direction) -> &'static str {
    match direction {
        Direction::Ingress => "ingress",
        Direction::Egress => "egress",
    }
}

/// One side's verdict. `peer`: the other end, for the advice.
pub(crate) fn check(say: &Say, peer: &str) -> Check {
    let direction = name(say.direction);
    let mut lines = say.text().into_iter().map(|line| line.trim().to_owned());
    let found = lines.next().unwrap_or_default();
    let found = found.strip_prefix(direction).map(|rest| rest.trim().to_owned()).unwrap_or(found);
    let mut check = if say.allowed() {
        Check::good(direction, found)
    } else {
        let policies = say.reason.as_ref().map(|reason| reason.isolated_by.join(", ")).unwrap_or_default();
        let denied = say.reason.as_ref().and_then(|reason| reason.rule.as_ref()).map(|rule| rule.policy.clone());
        let side = match say.direction {
            Direction::Ingress => format!("an ingress rule from {peer}"),
            Direction::Egress => format!("an egress rule to {peer}"),
        };
        let fix = match (denied, policies.is_empty()) {
            (Some(policy), _) => format!("change that rule of {policy}"),
            (None, false) => format!("add {side} to one of the policies that select {}: {policies}", say.pod),
            // Only the agent knows which policy a number stands for.
            (None, true) if say.reason.is_none() && say.judgement.rule.set() != 0 => {
                "start the agent and ask again: it knows which policy that is, and which rules are near".to_owned()
            }
            (None, true) => format!("{}: `proxy-agent endpoint list`, and the agent's log", say.cause()),
        };
        Check::cause(direction, found, fix)
    };
    check.details.extend(lines);
    check
}

/// A side of which nothing can be said here.
pub fn elsewhere(direction: Direction, end: &str) -> Check {
    Check::unknown(
        name(direction),
        format!("{end} is no pod of this node: its policies are judged where it lives"),
        "ask there",
    )
}
