//! Runs the scenarios of `upstream`.

use std::time::Instant;

use crate::stage::Stage;
use crate::upstream::{Change, scenarios};

/// Every scenario with bridge-nf-call-iptables off, then on: between pods of one node and of two, by their addresses and
/// by their Services, in both families.
#[test]
fn the_scenarios_of_kubernetes() {
    let mut stage = Stage::build();
    let all = scenarios(&|pod, family| stage.ip(pod, family));
    assert_eq!(all.len(), 45);
    for br_netfilter in [false, true] {
        for node in stage.scenario.cluster().nodes() {
            node.set_br_netfilter(br_netfilter).expect("set");
        }
        let begin = Instant::now();
        for scenario in &all {
            for (number, step) in scenario.steps.iter().enumerate() {
                for change in &step.changes {
                    match change {
                        Change::Apply(namespace, name, spec) => stage.apply(namespace, name, spec),
                        Change::Delete(namespace, name) => stage.delete(namespace, name),
                        Change::LabelPod(pod, name, value) => stage.label_pod(pod, name, value),
                        Change::LabelNamespace(namespace, name, value) => stage.label_namespace(namespace, name, value),
                    }
                }
                stage.settle();
                let what = format!("{}, step {}, br_netfilter {br_netfilter}", scenario.name, number + 1);
                stage.check(&what, &step.expects);
            }
            stage.reset();
        }
        println!("{} scenarios with br_netfilter {br_netfilter}: {:?}", all.len(), begin.elapsed());
    }
}
