//! From one version of the map layouts to the next and back, under forbidden packets: none of them arrives.

use std::net::SocketAddr;

use proxy_tests::Family;
use proxy_tests::agent::find_binary;
use proxy_tests::traffic::{Steady, SteadyOptions};

use crate::prober::{expected, only_y};
use crate::stage::Stage;

#[test]
fn nothing_forbidden_passes_while_versions_change() {
    let now = find_binary().expect("an agent");
    let next = now.with_file_name("proxy-agent-next");
    assert!(next.exists(), "cargo build -p proxy-agent --features layout-next --bin proxy-agent-next");
    let mut stage = Stage::build();
    stage.apply("x", "only-y", &only_y());
    stage.settle();
    stage.check("before", &[expected()]);
    let steady = |from: &str, target: SocketAddr| {
        let netns = stage.scenario.netns(from).expect("namespace");
        Steady::start(&netns, target, SteadyOptions { rate: 1000, ..SteadyOptions::default() }).expect("sender")
    };
    let forbidden = [
        steady("z-b", SocketAddr::new(stage.ip("x-a", Family::V4), 80)),
        steady("z-a", SocketAddr::new(stage.vip("x-a", Family::V6), 80)),
        steady("x-b", SocketAddr::new(stage.ip("z-a", Family::V6), 80)),
    ];
    let allowed = [
        steady("y-a", SocketAddr::new(stage.vip("x-a", Family::V4), 81)),
        steady("x-a", SocketAddr::new(stage.ip("y-c", Family::V6), 81)),
    ];
    for binary in [&next, &now] {
        for node in 0..2 {
            let agent = stage.scenario.agent_mut(node);
            agent.stop().expect("stopped");
            agent.set_binary(binary.clone());
            agent.restart().expect("healthy");
        }
        stage.settle();
        stage.check(&format!("{}", binary.display()), &[expected()]);
    }
    let (mut sent, mut answered) = (0, 0);
    for sender in forbidden {
        let report = sender.stop_unanswered();
        (sent, answered) = (sent + report.sent(), answered + report.answered());
    }
    assert!(sent > 1000, "{sent}");
    assert_eq!(answered, 0, "of {sent} forbidden packets");
    for sender in allowed {
        sender.stop().assert_whole();
    }
}
