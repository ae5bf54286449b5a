//! NetworkPolicies: Pods and Namespaces are watched from when there is one, and a right that lacks is told of.

use proxy_tests::cluster::NodeSpec;
use proxy_tests::kube_server::account::{Account, Mounted};
use proxy_tests::policy_manifest::network_policy;
use proxy_tests::{Agent, Cluster, Deadline};
use serde_json::{Value, json};

use crate::rights::{create_account, deployed, one_resource_each, renamed};
use crate::stage::{ARRIVES, Stage, deployed_account, quiet};

/// Each with what is said by an agent that may not watch the kind.
const LACKING: [(&str, &str); 3] = [
    ("networkpolicies", "NetworkPolicy: the agent may not watch NetworkPolicies"),
    ("pods", "Pod: the agent may not watch Pods"),
    ("namespaces", "Namespace: the agent may not watch Namespaces"),
];

/// The ClusterRole of `deploy/` under another name, without this resource.
fn role_without(name: &str, resource: &str) -> Value {
    let mut role = renamed(&deployed("ClusterRole"), name);
    let rules = role["rules"].as_array().expect("rules").iter().flat_map(one_resource_each);
    role["rules"] = rules.filter(|rule| rule["resources"][0] != resource).collect();
    role
}

/// Requests for a resource that were answered with 200, by their verbs.
fn granted(stage: &Stage, user: &str, resource: &str) -> Vec<String> {
    let requests = stage.server.requests().expect("audit log").into_iter();
    let mine = requests.filter(|r| r.user == user && r.resource == resource && r.code == 200);
    mine.map(|request| request.verb).collect()
}

fn policies(agent: &Agent) -> Vec<String> {
    let list: Value =
        serde_json::from_str(&agent.cli(&["policy", "list", "-o", "json"]).expect("policy list")).expect("JSON");
    let rows = list["items"].as_array().expect("items").iter();
    rows.filter_map(|row| row["policy"].as_str().map(str::to_owned)).collect()
}

#[test]
fn what_policies_need_is_watched_when_there_is_one() {
    let names = (0..=LACKING.len()).map(|index| format!("node{index}"));
    let spec = names.fold(Cluster::builder(), |spec, name| spec.node(NodeSpec::new(name)));
    let stage = Stage::build(&spec);
    let whole = stage.start(LACKING.len());
    let agents: Vec<Agent> = (0..)
        .zip(LACKING)
        .map(|(node, (resource, _))| {
            let name = format!("no-{resource}");
            stage.create(&role_without(&name, resource));
            let account = create_account(&stage, &name);
            let token = account.token(&stage.server, None).expect("token");
            let mounted = Mounted::new(&stage.server, &name, &token).expect("folder of the account");
            // Services do not wait for policies.
            Agent::start(stage.node(node), quiet(mounted.options(&stage.server.url()))).expect("healthy")
        })
        .collect();
    let user = deployed_account().user();
    let watched = |resource: &str| granted(&stage, &user, resource).iter().any(|verb| verb == "watch");
    Deadline::after(ARRIVES).until("policies are watched", || watched("networkpolicies")).expect("watched");
    for resource in ["pods", "namespaces"] {
        assert_eq!(granted(&stage, &user, resource), [""; 0], "{resource} before the first policy");
    }

    let policy = network_policy("default", "deny", &json!({ "podSelector": {}, "policyTypes": ["Ingress"] }));
    stage.create(&policy);
    for resource in ["pods", "namespaces"] {
        Deadline::after(ARRIVES)
            .until("watched", || watched(resource))
            .unwrap_or_else(|error| panic!("{resource}: {error}"));
    }
    Deadline::after(ARRIVES).until("known", || policies(&whole) == ["default/deny"]).expect("known");
    for ((resource, said), agent) in LACKING.iter().zip(&agents) {
        let line = Stage::wait_logged(agent, 0, &[said]);
        assert!(line.contains("give the agent's user get, list and watch on this kind"), "{resource}: {line}");
        stage.check_follows(agent, &format!("beside-{resource}"), 30 + u16::try_from(resource.len()).expect("short"));
    }

    // Given the right, each goes on by itself.
    for ((resource, said), agent) in LACKING.iter().zip(&agents) {
        stage.apply(&renamed(&deployed("ClusterRole"), &format!("no-{resource}")));
        let user = Account { name: format!("no-{resource}"), ..deployed_account() }.user();
        let watched = || granted(&stage, &user, resource).iter().any(|verb| verb == "watch");
        Deadline::after(ARRIVES).until("watched", watched).unwrap_or_else(|error| panic!("{resource}: {error}"));
        Stage::wait_logged(agent, 0, &["no more: ", said]);
        Deadline::after(ARRIVES).until("known", || policies(agent) == ["default/deny"]).expect("known");
    }
    stage.delete(&policy);
    Deadline::after(ARRIVES).until("gone", || policies(&whole).is_empty()).expect("gone");
    let refusals = whole.log_text().lines().filter(|line| line.contains("forbidden")).count();
    assert_eq!(refusals, 0, "with the rights of deploy/:\n{}", whole.log_text());
}
