//! Agent against maps: does it want what they hold? What it wants and they do not have yet is why packets meet the old state.

use std::collections::BTreeSet;
use std::net::SocketAddr;

use super::check::Check;
use super::service::{Frontend, address};
use crate::ask::{FrontendInfo, ModelInfo};

const WHAT: &str = "agent";

/// The agent cannot be asked.
pub fn away(why: &str) -> Check {
    Check::unknown(
        WHAT,
        format!("the maps are as the agent left them, and cannot be compared with the objects: {why}"),
        "start the agent: until then no change arrives",
    )
}

fn endpoints(count: usize) -> String {
    if count == 1 { "1 endpoint".to_owned() } else { format!("{count} endpoints") }
}

/// What it wants, beside what the maps have. `epoch`: the maps' epoch of policies.
pub fn check(told: &ModelInfo, frontend: Option<&Frontend>, epoch: u32) -> Check {
    let has: BTreeSet<SocketAddr> = frontend.iter().flat_map(|found| &found.backends).flatten().map(address).collect();
    let wants: BTreeSet<SocketAddr> = told.frontend.iter().flat_map(|found| &found.endpoints).copied().collect();
    let generation = frontend.map(|found| found.entry.generation);
    let wanted = told.frontend.as_ref().map(|found| found.generation);
    if has != wants || generation != wanted {
        let shown = |generation: Option<u32>, count| match generation {
            Some(generation) => format!("generation {generation} with {}", endpoints(count)),
            None => "no such Service".to_owned(),
        };
        let found =
            format!("the maps have {}, the agent wants {}", shown(generation, has.len()), shown(wanted, wants.len()));
        let fix = if told.settled {
            "restart the agent: then it compares every row; somebody else may have written to its maps"
        } else {
            "ask again; if it stays so, the agent's log says which write the kernel refuses"
        };
        // What the maps have is what packets meet.
        return if has.is_empty() && !wants.is_empty() {
            Check::cause(WHAT, found, fix)
        } else {
            Check::note(WHAT, found, fix)
        };
    }
    if !told.missing.is_empty() {
        let missing = told.missing.join(", ");
        return Check::note(
            WHAT,
            format!("it has not listed all {missing} yet: until then the maps stay as they were"),
            "may it list them, and does the API server answer? The agent's log",
        );
    }
    if !told.settled || told.epoch != epoch {
        return Check::note(
            WHAT,
            format!("it has changes that the maps do not have yet (policy epoch {}, in the maps {epoch})", told.epoch),
            "ask again; if it stays so, the agent's log says which write the kernel refuses",
        );
    }
    let of = match &told.frontend {
        Some(FrontendInfo { generation, .. }) => format!(": Service generation {generation}, policy epoch {epoch}"),
        None => format!(": policy epoch {epoch}"),
    };
    Check::good(WHAT, format!("it wants what the maps have{of}"))
}

#[cfg(test)]
mod tests {
    use proxy_abi::{BackendEntry, FrontendEntry, PortBe, Proto};

    use super::super::check::State;
    use super::*;

    #[test]
    fn what_the_agent_wants_is_compared_with_the_maps() {
        let backend = |last: u8| BackendEntry {
            ip: std::net::IpAddr::from([10, 1, 0, last]).into(),
            service: 7,
            generation: 1,
            port: PortBe::new(8080),
            proto: Proto::TCP,
            reserved: 0,
            flags: 0,
        };
        let frontend = |generation, backends: &[u8]| Frontend {
            name: "shop/api:http".to_owned(),
            address: "10.96.0.7:80".parse().expect("an address"),
            entry: FrontendEntry { first: 4, count: 1, service: 7, flags: 0, affinity_seconds: 0, generation },
            backends: backends.iter().map(|last| Some(backend(*last))).collect(),
            affinity: None,
            allowed: None,
        };
        let wants = |generation, endpoints: &[u8]| {
            let endpoints = endpoints.iter().map(|last| SocketAddr::from(([10, 1, 0, *last], 8080))).collect();
            ModelInfo {
                settled: true,
                epoch: 3,
                frontend: Some(FrontendInfo { generation, endpoints }),
                ..ModelInfo::default()
            }
        };
        let nothing = ModelInfo { settled: true, epoch: 3, ..ModelInfo::default() };
        let unlisted = ModelInfo { missing: vec!["pods".to_owned()], ..nothing.clone() };
        let rows = [
            (wants(5, &[2, 3]), Some(frontend(5, &[3, 2])), State::Good, "generation 5, policy epoch 3"),
            (nothing.clone(), None, State::Good, "policy epoch 3"),
            (
                wants(6, &[2]),
                Some(frontend(5, &[])),
                State::Cause,
                "generation 5 with 0 endpoints, the agent wants generation 6 with 1",
            ),
            (wants(6, &[2]), None, State::Cause, "no such Service, the agent wants generation 6"),
            (wants(6, &[3]), Some(frontend(5, &[2])), State::Note, "generation 5 with 1 endpoint,"),
            (nothing.clone(), Some(frontend(5, &[2])), State::Note, "the agent wants no such Service"),
            (unlisted, None, State::Note, "not listed all pods"),
            (ModelInfo { settled: false, ..nothing.clone() }, None, State::Note, "changes"),
            (ModelInfo { epoch: 4, ..nothing }, None, State::Note, "epoch 4, in the maps 3"),
        ];
        for (n, (told, has, state, words)) in rows.into_iter().enumerate() {
            let check = check(&told, has.as_ref(), 3);
            assert_eq!(check.state, state, "row {n}: {}", check.found);
            assert!(check.found.contains(words), "row {n}: {}", check.found);
        }
        assert_eq!(away("why").state, State::Unknown);
    }
}
