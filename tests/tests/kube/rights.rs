//! The rights of `deploy/rbac.yaml` suffice, and each of them is needed.

use std::collections::BTreeSet;

use proxy_tests::cluster::NodeSpec;
use proxy_tests::kube_manifest::{documents, of_kind};
use proxy_tests::kube_server::account::{Account, Mounted};
use proxy_tests::manifests::Service;
use proxy_tests::scenario::views::ServiceRow;
use proxy_tests::{Agent, Cluster, Deadline};
use serde_json::{Value, json};

use crate::stage::{ARRIVES, Stage, deployed_account, dual, is_of, quiet, rows};

/// A right that one agent lacks.
struct Lacking {
    verb: &'static str,
    resource: &'static str,
    kind: &'static str,
}

const LACKING: [Lacking; 6] = [
    Lacking { verb: "list", resource: "services", kind: "Service" },
    Lacking { verb: "watch", resource: "services", kind: "Service" },
    Lacking { verb: "list", resource: "endpointslices", kind: "EndpointSlice" },
    Lacking { verb: "watch", resource: "endpointslices", kind: "EndpointSlice" },
    Lacking { verb: "list", resource: "nodes", kind: "Node" },
    Lacking { verb: "watch", resource: "nodes", kind: "Node" },
];

impl Lacking {
    fn name(&self) -> String {
        format!("no-{}-{}", self.verb, self.resource)
    }

    /// What an agent without this right sees of a Service that came after its first lists.
    fn sees(&self, service: &Service) -> Vec<ServiceRow> {
        match (self.verb, self.resource) {
            ("list", _) | (_, "services") => Vec::new(),
            (_, "endpointslices") => rows(service, &[]),
            _ => rows(service, &[20]),
        }
    }

    /// The ClusterRole of `deploy/` under another name, without this right.
    fn role(&self) -> Value {
        let mut role = renamed(&deployed("ClusterRole"), &self.name());
        let rules = role["rules"].as_array().expect("rules").iter().flat_map(one_resource_each);
        role["rules"] = rules
            .map(|mut rule| {
                if rule["resources"][0] == self.resource {
                    rule["verbs"].as_array_mut().expect("verbs").retain(|verb| verb != self.verb);
                }
                rule
            })
            .collect();
        role
    }
}

pub(crate) fn one_resource_each(rule: &Value) -> Vec<Value> {
    let resources = rule["resources"].as_array().expect("resources").iter();
    resources
        .map(|resource| json!({ "apiGroups": rule["apiGroups"], "resources": [resource], "verbs": rule["verbs"] }))
        .collect()
}

pub(crate) fn deployed(kind: &str) -> Value {
    of_kind(&documents("rbac.yaml").expect("deploy/rbac.yaml"), kind).expect("one").clone()
}

pub(crate) fn renamed(object: &Value, name: &str) -> Value {
    let mut object = object.clone();
    object["metadata"]["name"] = name.into();
    object
}

/// The ServiceAccount and the binding of `deploy/` under another name, with the role of that name.
pub(crate) fn create_account(stage: &Stage, name: &str) -> Account {
    let account = Account { name: name.to_owned(), ..deployed_account() };
    stage.create(&account.object());
    let mut binding = renamed(&deployed("ClusterRoleBinding"), name);
    binding["roleRef"]["name"] = name.into();
    binding["subjects"][0]["name"] = name.into();
    stage.create(&binding);
    account
}

#[test]
fn deployed_rights_suffice_and_one_verb_less_is_told() {
    let names = (0..=LACKING.len()).map(|index| format!("node{index}"));
    let spec = names.fold(Cluster::builder(), |spec, name| spec.node(NodeSpec::new(name)));
    let stage = Stage::build(&spec);
    let before = dual("before", 10);
    stage.publish(&before);

    let whole = stage.start(LACKING.len());
    let agents: Vec<Agent> = (0..)
        .zip(&LACKING)
        .map(|(node, lacking)| {
            stage.create(&lacking.role());
            let account = create_account(&stage, &lacking.name());
            let token = account.token(&stage.server, None).expect("token");
            let mounted = Mounted::new(&stage.server, &lacking.name(), &token).expect("folder of the account");
            let options = quiet(mounted.options(&stage.server.url()));
            Agent::start_unchecked(stage.node(node), options).expect("started")
        })
        .collect();
    Stage::wait_rows(&whole, "default/before:", &rows(&before, &[20]));

    for (lacking, agent) in LACKING.iter().zip(&agents) {
        let Lacking { verb, resource, kind } = lacking;
        let cannot = format!("cannot {verb} resource \"{resource}\"");
        let line = Stage::wait_logged(agent, 0, &["trouble=\"forbidden\"", &format!("kind=\"{kind}\""), &cannot]);
        assert!(line.contains("give the agent's user get, list and watch on this kind"), "{}: {line}", lacking.name());
    }

    // Who may list has listed: the refusal of one kind may be told before another kind's list has come.
    for (lacking, agent) in LACKING.iter().zip(&agents).filter(|(lacking, _)| lacking.verb != "list") {
        let healthy =
            Deadline::after(ARRIVES).until("healthy", || agent.get("/healthz").is_ok_and(|(code, _)| code == 200));
        assert!(healthy.is_ok(), "{}:\n{}", lacking.name(), agent.log_text());
    }

    // What is told of after the first lists reaches only those who may watch it.
    let after = dual("after", 11);
    stage.publish(&after);
    Stage::wait_rows(&whole, "default/after:", &rows(&after, &[20]));
    // Those who see nothing of it are looked at last: it is there for all the others by then.
    let (see_nothing, see_some): (Vec<_>, Vec<_>) =
        LACKING.iter().zip(&agents).partition(|(lacking, _)| lacking.sees(&after).is_empty());
    for (lacking, agent) in see_some.into_iter().chain(see_nothing) {
        // Before all lists there is no write at all.
        let blind = lacking.verb == "list";
        let expected = (if blind { 503 } else { 200 }, lacking.sees(&after).into_iter().collect::<BTreeSet<_>>());
        let mut got = (0, BTreeSet::new());
        let as_expected = || {
            let rows = Stage::services(agent).into_iter();
            let seen = rows.filter(|row| blind || is_of(row, "default/after:")).collect();
            got = (agent.get("/healthz").map_or(0, |(status, _)| status), seen);
            got == expected
        };
        let reached = Deadline::after(ARRIVES).until("what it may see", as_expected);
        assert!(reached.is_ok(), "{}: {got:?}, not {expected:?}; log:\n{}", lacking.name(), agent.log_text());
    }

    // Given the right, each goes on by itself.
    for lacking in &LACKING {
        stage.apply(&renamed(&deployed("ClusterRole"), &lacking.name()));
    }
    for (lacking, agent) in LACKING.iter().zip(&agents) {
        let healthy =
            Deadline::after(ARRIVES).until("healthy", || agent.get("/healthz").is_ok_and(|(code, _)| code == 200));
        assert!(healthy.is_ok(), "{}:\n{}", lacking.name(), agent.log_text());
        Stage::wait_rows(agent, "default/after:", &rows(&after, &[20]));
        // Refused before, granted after that: the Node's watch shows it here only.
        let user = Account { name: lacking.name(), ..deployed_account() }.user();
        let granted = Deadline::after(ARRIVES).until("granted", || {
            let requests = stage.server.requests().expect("audit log").into_iter();
            let of_agent =
                requests.filter(|r| r.user == user && r.verb == lacking.verb && r.resource == lacking.resource);
            let codes: Vec<_> = of_agent.map(|r| r.code).collect();
            codes.first() == Some(&403) && codes.last() == Some(&200)
        });
        granted.unwrap_or_else(|error| panic!("{}: {error}", lacking.name()));
    }
    let refusals = whole.log_text().lines().filter(|line| line.contains("forbidden")).count();
    assert_eq!(refusals, 0, "with the rights of deploy/:\n{}", whole.log_text());
}
