//! Nine pods of three namespaces on two nodes, each with servers and a Service; and who reaches whom.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write as _;
use std::net::{IpAddr, SocketAddr};
use std::thread;
use std::time::Duration;

use proxy_tests::agent::find_binary;
use proxy_tests::cluster::{ClusterSpec, NodeSpec, PodSpec};
use proxy_tests::manifests::{Endpoint, Service, ServicePort};
use proxy_tests::policy_manifest::{PodObject, namespace, network_policy};
use proxy_tests::scenario::{Scenario, vip};
use proxy_tests::traffic::{Answer, TcpServer, Transport, UdpServer, probe_all};
use proxy_tests::{Deadline, Family, Pod};
use serde_json::{Value, json};

/// Where each pod is: names are `NAMESPACE-POD`.
const NODES: [(&str, &[&str]); 2] =
    [("node1", &["x-a", "x-b", "y-a", "z-b"]), ("node2", &["x-c", "y-b", "y-c", "z-a", "z-c"])];
/// Namespaces, each with the label `ns`.
const NAMESPACES: [&str; 3] = ["x", "y", "z"];
/// Ports that every pod serves on TCP and UDP, under the names `serve-80-tcp` and so on.
pub(crate) const PORTS: [u16; 2] = [80, 81];
/// A Service's port for SCTP is this much more than the pod's: nobody listens, so that packets tell whether it was translated.
pub(crate) const SCTP_PORTS: u16 = 1_000;
/// How long a request waits when it is first made, and at most: twice as long each time that it is made again, because on a
/// busy machine an answer may need it.
const PATIENCE: [Duration; 2] = [Duration::from_millis(250), Duration::from_secs(4)];
/// How long a policy may take to show, on a machine that is busy with other tests.
const ARRIVES: Duration = Duration::from_mins(1);

/// The nodes at work. Dropped in this order: servers need their namespaces.
pub(crate) struct Stage {
    servers: BTreeMap<(String, u16), (TcpServer, UdpServer)>,
    pub(crate) scenario: Scenario,
    /// Objects of pods as last written.
    pods: BTreeMap<String, PodObject>,
    /// Policies that are there.
    policies: BTreeSet<(String, String)>,
}

/// What is expected of one port: who reaches whom, all others do.
#[derive(Clone, Debug)]
pub(crate) struct Expect {
    pub(crate) transport: Transport,
    pub(crate) port: u16,
    /// From, to, and whether: `*`, `x/*` or `x/a`. The last that fits counts.
    pub(crate) rules: Vec<(&'static str, &'static str, bool)>,
}

impl Stage {
    /// With agents that run.
    pub(crate) fn build() -> Self {
        Self::with(&[])
    }

    /// With agents that run with these further arguments.
    pub(crate) fn with(args: &[&str]) -> Self {
        let node = |(name, pods): &(&str, &[&str])| {
            let pod = |name: &&str| {
                let (namespace, pod) = name.split_once('-').expect("NAMESPACE-POD");
                PodSpec::new(*name).namespace(namespace).label("pod", pod)
            };
            NodeSpec::new(*name).pods(pods.iter().map(pod))
        };
        let spec = NODES.iter().fold(ClusterSpec::default(), |spec, one| spec.node(node(one)));
        let mut scenario = Scenario::build(&spec).expect("cluster");
        let manifests = scenario.manifests();
        for name in NAMESPACES {
            manifests.write(&namespace(name, &[("ns", name)])).expect("written");
        }
        let (mut servers, mut pods) = (BTreeMap::new(), BTreeMap::new());
        for pod in scenario.cluster().pods() {
            let mut object = PodObject::of(&pod);
            let mut ports = Vec::new();
            for port in PORTS {
                for protocol in ["TCP", "UDP"] {
                    object = object.port(&format!("serve-{port}-{}", protocol.to_lowercase()), port, protocol);
                }
                ports.extend([
                    ServicePort::tcp(&format!("tcp-{port}"), port, port),
                    ServicePort::udp(&format!("udp-{port}"), port, port),
                    ServicePort::sctp(&format!("sctp-{port}"), SCTP_PORTS + port, port),
                ]);
                let tcp = TcpServer::start(pod.netns(), pod.name(), port).expect("server");
                let udp = UdpServer::start(pod.netns(), pod.name(), port).expect("server");
                servers.insert((pod.name().to_owned(), port), (tcp, udp));
            }
            manifests.write(&object).expect("written");
            let service = Service::new(pod.name(), &Family::BOTH.map(|family| vip(family, number(pod.name()))), ports);
            for family in Family::BOTH {
                let mut slice = service.slice(family, &[]);
                slice.endpoints.push(Endpoint::of(&pod, family));
                manifests.write(&slice).expect("written");
            }
            manifests.write(&service).expect("written");
            pods.insert(pod.name().to_owned(), object);
        }
        scenario.start_agents(args).expect("agents");
        Self { servers, scenario, pods, policies: BTreeSet::new() }
    }

    /// Writes a policy.
    pub(crate) fn apply(&mut self, namespace: &str, name: &str, spec: &Value) {
        self.scenario.manifests().write(&network_policy(namespace, name, spec)).expect("written");
        self.policies.insert((namespace.to_owned(), name.to_owned()));
    }

    /// Writes a policy that is only audited.
    pub(crate) fn audit(&mut self, namespace: &str, name: &str, spec: &Value) {
        let mut object = network_policy(namespace, name, spec);
        object["metadata"]["annotations"] = json!({ "proxy-agent.io/audit": "true" });
        self.scenario.manifests().write(&object).expect("written");
        self.policies.insert((namespace.to_owned(), name.to_owned()));
    }

    /// Deletes a policy.
    pub(crate) fn delete(&mut self, namespace: &str, name: &str) {
        self.scenario.manifests().remove(&network_policy(namespace, name, &json!({}))).expect("removed");
        self.policies.remove(&(namespace.to_owned(), name.to_owned()));
    }

    /// Deletes all policies, and gives pods and namespaces the labels of the beginning.
    pub(crate) fn reset(&mut self) {
        for (namespace, name) in self.policies.clone() {
            self.delete(&namespace, &name);
        }
        for name in NAMESPACES {
            self.scenario.manifests().write(&namespace(name, &[("ns", name)])).expect("written");
        }
        for (name, object) in &mut self.pods {
            let pod = self.scenario.cluster().pod(name).expect("pod");
            let labels = pod.labels().to_vec();
            if object.labels != labels {
                object.labels = labels;
                self.scenario.manifests().write(object).expect("written");
            }
        }
        self.settle();
    }

    /// Labels a pod.
    pub(crate) fn label_pod(&mut self, pod: &str, name: &str, value: &str) {
        let object = self.pods.remove(pod).expect("a pod").label(name, value);
        self.scenario.manifests().write(&object).expect("written");
        self.pods.insert(pod.to_owned(), object);
    }

    /// Labels a namespace.
    pub(crate) fn label_namespace(&mut self, of: &str, name: &str, value: &str) {
        self.scenario.manifests().write(&namespace(of, &[("ns", of), (name, value)])).expect("written");
    }

    /// Waits until the agents know exactly these policies.
    pub(crate) fn settle(&self) {
        let want: BTreeSet<String> =
            self.policies.iter().map(|(namespace, name)| format!("{namespace}/{name}")).collect();
        for node in 0..NODES.len() {
            let known = || {
                let list: Value =
                    serde_json::from_str(&self.scenario.agent(node).cli(&["policy", "list", "-o", "json"]).ok()?)
                        .ok()?;
                let rows = list["items"].as_array()?.iter();
                Some(rows.filter_map(|row| row["policy"].as_str().map(str::to_owned)).collect::<BTreeSet<_>>())
            };
            let settled = Deadline::after(ARRIVES).until("policies are known", || known().as_ref() == Some(&want));
            settled.unwrap_or_else(|error| panic!("{error}; {:?}\n{}", known(), self.scenario.agent(node).log_text()));
        }
    }

    /// Asks until everything is as expected. On every port: all pods but oneself, by address and by Service, in both
    /// families.
    pub(crate) fn check(&self, what: &str, expects: &[Expect]) {
        let mut wrong = String::new();
        let deadline = Deadline::after(ARRIVES);
        let mut patience = PATIENCE[0];
        loop {
            let again = self.wrong(expects, patience);
            if again.is_empty() {
                return;
            }
            if deadline.left().is_none() {
                wrong.push_str(&again);
                break;
            }
            patience = (2 * patience).min(PATIENCE[1]);
        }
        let logs: Vec<_> = (0..NODES.len())
            .map(|node| {
                let agent = self.scenario.agent(node);
                format!("{}\n{}", agent.cli(&["endpoint", "list"]).unwrap_or_default(), agent.log_text())
            })
            .collect();
        panic!("{what}:{wrong}\n{}", logs.join("\n"));
    }

    /// What is not as expected, in lines.
    fn wrong(&self, expects: &[Expect], patience: Duration) -> String {
        let pods: Vec<Pod> = self.pods.keys().map(|name| self.scenario.cluster().pod(name).expect("a pod")).collect();
        let asked = thread::scope(|scope| {
            let asking: Vec<_> = pods
                .iter()
                .map(|from| {
                    let questions = self.questions(from.name(), expects);
                    scope.spawn(move || {
                        let targets: Vec<_> = questions.iter().map(|one| (one.target, one.transport)).collect();
                        let answers = probe_all(from.netns(), &targets, patience).expect("namespace");
                        questions.into_iter().zip(answers).collect::<Vec<_>>()
                    })
                })
                .collect();
            asking.into_iter().flat_map(|one| one.join().expect("asked")).collect::<Vec<_>>()
        });
        let mut text = String::new();
        for (question, answer) in asked {
            let reached = matches!(&answer, Answer::From { server, .. } if *server == question.to);
            if reached != question.expected {
                let Question { from, to, target, transport, expected } = question;
                let _ = write!(text, "\n  {from} → {to} at {target} {transport}: {answer}, expected {expected}");
            }
        }
        text
    }

    fn questions(&self, from: &str, expects: &[Expect]) -> Vec<Question> {
        let mut questions = Vec::new();
        for to in self.pods.keys().filter(|to| *to != from) {
            let to = self.scenario.cluster().pod(to).expect("a pod");
            for expect in expects {
                let expected = expect.of(from, to.name());
                for family in Family::BOTH {
                    for ip in [to.ip(family), self.vip(to.name(), family)] {
                        questions.push(Question {
                            from: from.to_owned(),
                            to: to.name().to_owned(),
                            target: SocketAddr::new(ip, expect.port),
                            transport: expect.transport,
                            expected,
                        });
                    }
                }
            }
        }
        questions
    }

    /// Address of a pod's Service.
    pub(crate) fn vip(&self, pod: &str, family: Family) -> IpAddr {
        assert!(self.pods.contains_key(pod), "{pod}");
        vip(family, number(pod))
    }

    /// Datagrams that a pod has answered on a port.
    pub(crate) fn answered(&self, pod: &str, port: u16) -> u64 {
        self.servers[&(pod.to_owned(), port)].1.answered()
    }

    /// Runs the agent's command line on a node: its exit code, and what it said on either channel.
    pub(crate) fn run(&self, node: usize, words: &[&str]) -> (i32, String) {
        let agent = self.scenario.agent(node);
        let mut command =
            self.scenario.node(node).netns().command(&find_binary().expect("the agent").to_string_lossy());
        let output = command.args(words).arg("--pin-root").arg(agent.pin_root()).output().expect("run");
        let said = if output.stdout.is_empty() { output.stderr } else { output.stdout };
        (output.status.code().unwrap_or(-1), String::from_utf8_lossy(&said).into_owned())
    }

    /// `endpoint list` of a node.
    pub(crate) fn endpoints(&self, node: usize) -> Vec<Value> {
        let (code, text) = self.run(node, &["endpoint", "list", "-o", "json"]);
        assert_eq!(code, 0, "{text}");
        let list: Value = serde_json::from_str(&text).expect("JSON");
        list["items"].as_array().expect("items").clone()
    }

    /// Waits until a node holds this for a pod's interface, as `endpoint list` calls it.
    pub(crate) fn wait_endpoint(&self, node: usize, pod: &Pod, policy: &str) {
        let name = &pod.host_veth().name;
        let reached =
            || self.endpoints(node).iter().any(|row| row["interface"] == name.as_str() && row["policy"] == policy);
        let reached = Deadline::after(ARRIVES).until(policy, reached);
        reached.unwrap_or_else(|error| {
            panic!("{}: {error}; {:?}\n{}", pod.name(), self.endpoints(node), self.scenario.agent(node).log_text())
        });
    }

    /// Address of a pod.
    pub(crate) fn ip(&self, pod: &str, family: Family) -> IpAddr {
        self.scenario.cluster().pod(pod).expect("pod").ip(family)
    }
}

/// Number of the Service of a pod that is there from the beginning.
fn number(pod: &str) -> u16 {
    let at = NODES.iter().flat_map(|(_, pods)| *pods).position(|name| *name == pod);
    100 + u16::try_from(at.expect("a pod of the beginning")).expect("a small number")
}

struct Question {
    from: String,
    to: String,
    target: SocketAddr,
    transport: Transport,
    expected: bool,
}

impl Expect {
    /// Is `to` to be reached from `from`?
    pub(crate) fn of(&self, from: &str, to: &str) -> bool {
        let fits = |pattern: &str, pod: &str| match pattern.split_once('/') {
            None => true,
            Some((namespace, "*")) => pod.split('-').next() == Some(namespace),
            Some((namespace, name)) => pod == format!("{namespace}-{name}"),
        };
        let last = self.rules.iter().rev().find(|(a, b, _)| fits(a, from) && fits(b, to));
        last.is_none_or(|(_, _, reached)| *reached)
    }
}
