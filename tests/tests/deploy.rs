//! The manifests of `deploy/`: what they ask for is what the agent takes, and no more than it needs.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::net::SocketAddr;
use std::path::Path;
use std::sync::Arc;

use clap::{CommandFactory as _, Parser as _};
use proxy_agent::cli::Cli;
use proxy_agent::kubeproxy::{Flags, Settings};
use proxy_agent::serve::{self, Health};
use proxy_tests::kube_manifest::{deploy_dir, documents, of_kind};
use serde_json::{Value, json};

fn daemonset() -> Value {
    of_kind(&documents("daemonset.yaml").expect("daemonset.yaml"), "DaemonSet").expect("one").clone()
}

fn pod() -> Value {
    daemonset()["spec"]["template"]["spec"].clone()
}

fn container() -> Value {
    let containers = pod()["containers"].as_array().expect("containers").clone();
    assert_eq!(containers.len(), 1, "one program");
    containers[0].clone()
}

fn texts(value: &Value) -> Vec<&str> {
    value.as_array().into_iter().flatten().filter_map(Value::as_str).collect()
}

/// `name` of each item, in order.
fn names(items: &Value) -> Vec<&str> {
    items.as_array().into_iter().flatten().filter_map(|item| item["name"].as_str()).collect()
}

fn run_command() -> clap::Command {
    Cli::command().find_subcommand("run").expect("`run`").clone()
}

/// Default of a flag of `run`.
fn default_of(flag: &str) -> String {
    let command = run_command();
    let argument = command.get_arguments().find(|argument| argument.get_long() == Some(flag)).expect("a flag");
    argument.get_default_values()[0].to_string_lossy().into_owned()
}

#[test]
fn pod_asks_for_what_the_agent_needs_and_no_more() {
    let pod = pod();
    assert_eq!(
        json!({
            "hostNetwork": pod["hostNetwork"],
            "hostPID": pod["hostPID"],
            "hostIPC": pod["hostIPC"],
            "dnsPolicy": pod["dnsPolicy"],
            "priorityClassName": pod["priorityClassName"],
            "tolerations": pod["tolerations"],
            "nodeSelector": pod["nodeSelector"],
            "securityContext": pod["securityContext"],
        }),
        json!({
            "hostNetwork": true,
            "hostPID": null,
            "hostIPC": null,
            "dnsPolicy": "Default",
            "priorityClassName": "system-node-critical",
            // Of every node, whatever its taints: pods there need Services too.
            "tolerations": [{ "operator": "Exists" }],
            "nodeSelector": { "kubernetes.io/os": "linux" },
            "securityContext": { "seccompProfile": { "type": "RuntimeDefault" } },
        })
    );
    assert_eq!(
        container()["securityContext"],
        json!({
            "runAsUser": 0,
            "readOnlyRootFilesystem": true,
            "allowPrivilegeEscalation": false,
            "capabilities": { "drop": ["ALL"], "add": ["BPF", "NET_ADMIN", "PERFMON"] },
        })
    );
    assert_eq!(pod["initContainers"], Value::Null);
}

#[test]
fn arguments_are_those_of_the_command_line() {
    let container = container();
    let args = texts(&container["args"]);
    let parsed = Cli::try_parse_from(["proxy-agent"].iter().chain(&args));
    assert!(parsed.is_ok(), "{args:?}: {:?}", parsed.err());
    assert!(Cli::try_parse_from(["proxy-agent", "run", "--no-such-flag"]).is_err(), "other flags are refused");
    assert_eq!(args, ["run", "--source=kube", "--bridge-guard"]);

    let command = run_command();
    let known: BTreeSet<_> = command.get_arguments().filter_map(|argument| argument.get_env()?.to_str()).collect();
    let used: BTreeSet<_> = names(&container["env"]).into_iter().collect();
    assert_eq!(used.difference(&known).collect::<Vec<_>>(), Vec::<&&str>::new(), "read by no flag; known: {known:?}");
    assert_eq!(used, BTreeSet::from(["NODE_NAME", "PROXY_AGENT_APISERVER", "PROXY_AGENT_CONNTRACK_SETTINGS"]));
    let node_name = container["env"].as_array().into_iter().flatten().find(|entry| entry["name"] == "NODE_NAME");
    assert_eq!(node_name.map(|entry| &entry["valueFrom"]["fieldRef"]["fieldPath"]), Some(&json!("spec.nodeName")));
}

#[test]
fn names_in_the_manifests_agree() {
    let (daemonset, pod, container) = (daemonset(), pod(), container());
    let selector = &daemonset["spec"]["selector"]["matchLabels"];
    assert_eq!(selector, &daemonset["spec"]["template"]["metadata"]["labels"], "it selects its own pods");

    let of_daemonset = documents("daemonset.yaml").expect("daemonset.yaml");
    let config = of_kind(&of_daemonset, "ConfigMap").expect("one");
    assert_eq!(config["metadata"]["namespace"], daemonset["metadata"]["namespace"]);
    let references =
        container["env"].as_array().into_iter().flatten().map(|entry| &entry["valueFrom"]["configMapKeyRef"]);
    for reference in references.filter(|reference| !reference.is_null()) {
        assert_eq!(reference["name"], config["metadata"]["name"]);
        let key = reference["key"].as_str().expect("a key");
        assert!(config["data"][key].is_string(), "{key} is in the ConfigMap");
    }

    let volumes: BTreeMap<_, _> = pod["volumes"]
        .as_array()
        .expect("volumes")
        .iter()
        .map(|volume| (volume["name"].as_str().expect("a name"), volume["hostPath"]["path"].as_str().expect("a path")))
        .collect();
    let mounts = container["volumeMounts"].as_array().expect("mounts");
    let mounted: BTreeMap<_, _> = mounts
        .iter()
        .map(|mount| {
            let writable = mount["readOnly"] != true;
            (mount["mountPath"].as_str().expect("a path"), (volumes[mount["name"].as_str().expect("a name")], writable))
        })
        .collect();
    let expected = BTreeMap::from([
        ("/sys/fs/bpf", ("/sys/fs/bpf", true)),
        ("/host/cgroup", ("/sys/fs/cgroup", false)),
        ("/host/conntrack", ("/proc/sys/net/netfilter", true)),
        ("/var/lib/cni", ("/var/lib/cni", false)),
    ]);
    assert_eq!(mounted, expected);
    assert_eq!(mounts.len(), volumes.len(), "every volume is mounted");
    assert!(default_of("pin-root").starts_with("/sys/fs/bpf/"), "pins are where the bpf file system is mounted");
    assert!(default_of("cni-results").starts_with("/var/lib/cni/"), "the CNI's records are where they are mounted");

    let rbac = documents("rbac.yaml").expect("rbac.yaml");
    let account = of_kind(&rbac, "ServiceAccount").expect("one");
    let role = of_kind(&rbac, "ClusterRole").expect("one");
    let binding = of_kind(&rbac, "ClusterRoleBinding").expect("one");
    let (name, namespace) = (&account["metadata"]["name"], &account["metadata"]["namespace"]);
    assert_eq!((&pod["serviceAccountName"], &daemonset["metadata"]["namespace"]), (name, namespace));
    assert_eq!(binding["subjects"], json!([{ "kind": "ServiceAccount", "name": name, "namespace": namespace }]));
    assert_eq!(
        binding["roleRef"],
        json!({ "apiGroup": "rbac.authorization.k8s.io", "kind": "ClusterRole", "name": role["metadata"]["name"] })
    );
    assert_eq!(rbac.len(), 3, "nothing else is granted");
}

#[test]
fn role_reads_what_is_watched_and_writes_events_alone() {
    let rbac = documents("rbac.yaml").expect("rbac.yaml");
    let role = of_kind(&rbac, "ClusterRole").expect("one");
    let mut granted: BTreeMap<(String, String), BTreeSet<String>> = BTreeMap::new();
    for rule in role["rules"].as_array().expect("rules") {
        let fields: Vec<_> = rule.as_object().expect("a rule").keys().collect();
        assert_eq!(fields.len(), 3, "groups, resources, verbs: {fields:?}");
        for group in texts(&rule["apiGroups"]) {
            for resource in texts(&rule["resources"]) {
                let verbs = texts(&rule["verbs"]).into_iter().map(str::to_owned);
                granted.entry((group.to_owned(), resource.to_owned())).or_default().extend(verbs);
            }
        }
    }
    let (read, write) = (["get", "list", "watch"], ["create", "patch"]);
    let expected = [
        ("", "services", &read[..]),
        ("", "nodes", &read),
        ("", "pods", &read),
        ("", "namespaces", &read),
        ("discovery.k8s.io", "endpointslices", &read),
        ("networking.k8s.io", "servicecidrs", &read),
        ("networking.k8s.io", "networkpolicies", &read),
        ("", "events", &write),
        ("events.k8s.io", "events", &write),
    ];
    let expected = expected.map(|(group, resource, verbs)| {
        ((group.to_owned(), resource.to_owned()), verbs.iter().map(|&verb| verb.to_owned()).collect())
    });
    assert_eq!(granted, BTreeMap::from(expected));
}

#[test]
fn kustomization_names_every_manifest_and_the_image() {
    let kustomization = documents("kustomization.yaml").expect("kustomization.yaml");
    let named: BTreeSet<String> = texts(&kustomization[0]["resources"]).into_iter().map(str::to_owned).collect();
    let files = fs::read_dir(deploy_dir()).expect("deploy/").map(|entry| entry.expect("an entry").file_name());
    let there: BTreeSet<String> = files
        .filter_map(|name| name.into_string().ok())
        .filter(|name| Path::new(name).extension().is_some_and(|end| end == "yaml") && name != "kustomization.yaml")
        .collect();
    assert_eq!(named, there);
    for file in &named {
        for document in documents(file).expect("well-formed") {
            let what = format!("{file}: {}", document["kind"]);
            assert!(document["apiVersion"].is_string() && document["metadata"]["name"].is_string(), "{what}");
        }
    }
    assert_eq!(names(&kustomization[0]["images"]), [container()["image"].as_str().expect("an image")]);
}

#[test]
fn probes_ask_what_the_agent_serves() {
    let address = Settings::new(None, &Flags::default(), None).expect("defaults").0.healthz.expect("served by default");
    let container = container();
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
    runtime.block_on(async {
        let free = std::net::TcpListener::bind("127.0.0.1:0").and_then(|socket| socket.local_addr()).expect("a port");
        serve::spawn(free, Arc::new(Health::default())).await.expect("served");
        for (probe, path) in [("startupProbe", "/healthz"), ("readinessProbe", "/healthz"), ("livenessProbe", "/livez")]
        {
            let get = &container[probe]["httpGet"];
            // The node's own address works from kubelet, and nothing outside needs it.
            let expected = json!({ "host": "127.0.0.1", "port": address.port(), "path": path });
            assert_eq!(get, &expected, "{probe}");
            assert!(address.ip().is_unspecified() || address.ip().is_loopback(), "{address} is served at 127.0.0.1");
            assert_eq!(status(free, path).await, 503, "{path} before the first lists");
        }
        assert_eq!(status(free, "/elsewhere").await, 404);
    });
    let limits = |probe: &str| {
        let seconds = |field: &str, default: u64| container[probe][field].as_u64().unwrap_or(default);
        seconds("periodSeconds", 10) * seconds("failureThreshold", 3)
    };
    assert!(limits("startupProbe") >= 60, "an API server that is slow to answer ends no agent");
    assert!(limits("livenessProbe") >= 60, "nor does a moment without processor time");
}

/// Status of a GET.
async fn status(address: SocketAddr, path: &str) -> u16 {
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
    let mut connection = tokio::net::TcpStream::connect(address).await.expect("connected");
    let request = format!("GET {path} HTTP/1.1\r\nHost: {address}\r\nConnection: close\r\n\r\n");
    connection.write_all(request.as_bytes()).await.expect("asked");
    let mut answer = String::new();
    connection.read_to_string(&mut answer).await.expect("answered");
    answer.split(' ').nth(1).and_then(|code| code.parse().ok()).unwrap_or_else(|| panic!("{answer}"))
}
