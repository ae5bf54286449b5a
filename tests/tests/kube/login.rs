//! How agents log in, and whom they do not believe.

use std::fs;
use std::time::Duration;

use proxy_tests::cluster::NodeSpec;
use proxy_tests::kube_server::account::{ClusterEntry, Credentials, Mounted, kube_options, kubeconfig};
use proxy_tests::kube_server::pki::Authority;
use proxy_tests::kube_server::{ApiOptions, KubeServer};
use proxy_tests::{Agent, AgentOptions, Cluster};
use serde_json::json;

use crate::stage::{Stage, Vigil, deployed_account, dual, quiet, rows};

/// For a process that has nothing to wait for.
const AT_ONCE: Duration = Duration::from_secs(20);

fn nodes(count: usize) -> Stage {
    Stage::build(&(0..count).fold(Cluster::builder(), |spec, n| spec.node(NodeSpec::new(format!("node{n}")))))
}

/// Options with a kubeconfig of these parts.
fn with_kubeconfig(server: &KubeServer, name: &str, cluster: &ClusterEntry, user: &Credentials) -> AgentOptions {
    let path = kubeconfig(server, name, cluster, user).expect("kubeconfig");
    quiet(kube_options().args(["--kubeconfig".to_owned(), path.display().to_string()]))
}

#[test]
fn kubeconfigs_with_certificate_token_and_token_file() {
    let stage = nodes(4);
    let service = dual("web", 10);
    stage.publish(&service);
    let server = &stage.server;
    let authority = server.dir().join("ca.crt");
    let cluster = ClusterEntry::verified(server, &authority);

    // A user of its own, with the role of deploy/.
    let identity = server.authority().client("proxy-agent@node0", None).expect("certificate");
    let subject = json!({ "kind": "User", "apiGroup": "rbac.authorization.k8s.io", "name": "proxy-agent@node0" });
    stage.create(&json!({
        "apiVersion": "rbac.authorization.k8s.io/v1",
        "kind": "ClusterRoleBinding",
        "metadata": { "name": "certificate" },
        "roleRef": { "apiGroup": "rbac.authorization.k8s.io", "kind": "ClusterRole", "name": "proxy-agent" },
        "subjects": [subject],
    }));
    let account = deployed_account();
    let token = || account.token(server, None).expect("token");
    let file = server.dir().join("token");
    fs::write(&file, token()).expect("token file");
    let data = json!({ "certificate-authority-data": base64(server.authority().pem()) });
    let cases = [
        ("certificate", cluster.clone(), Credentials::Certificate(identity)),
        ("token", cluster.clone(), Credentials::Token(token())),
        ("token-file", cluster, Credentials::TokenFile(file)),
        ("inline-authority", ClusterEntry { server: server.url6(), fields: data }, Credentials::Token(token())),
    ];
    let agents: Vec<_> = (0..)
        .zip(&cases)
        .map(|(node, (name, cluster, user))| {
            Agent::start(stage.node(node), with_kubeconfig(server, name, cluster, user))
                .unwrap_or_else(|error| panic!("{name}: {error}"))
        })
        .collect();
    for agent in &agents {
        Stage::wait_rows(agent, "default/web:", &rows(&service, &[20]));
    }
    let mut users: Vec<_> = stage.server.requests().expect("audit log").into_iter().map(|r| r.user).collect();
    users.sort();
    users.dedup();
    assert_eq!(users, ["proxy-agent@node0".to_owned(), account.user()]);
}

fn base64(text: &str) -> String {
    use base64::Engine as _;
    base64::engine::general_purpose::STANDARD.encode(text)
}

#[test]
fn servers_that_cannot_be_verified_are_refused() {
    let stage = nodes(5);
    let service = dual("web", 10);
    stage.publish(&service);
    let server = &stage.server;
    let token = deployed_account().token(server, None).expect("token");
    let user = Credentials::Token(token);
    let authority = server.dir().join("ca.crt");

    // Refused before anything is sent: the process ends and says why.
    let insecure = ClusterEntry { server: server.url(), fields: json!({ "insecure-skip-tls-verify": true }) };
    let plain = ClusterEntry { server: server.url().replace("https", "http"), fields: json!({}) };
    let proxied = ClusterEntry {
        server: server.url(),
        fields: json!({ "certificate-authority": authority, "proxy-url": "http://p:1" }),
    };
    let at_once = [
        ("insecure", insecure, "sets insecure-skip-tls-verify; whoever answers could then rewrite all Services"),
        ("plain", plain, "would be spoken to without TLS; use https"),
        ("proxied", proxied, "sets proxy-url, which is not supported; give a direct address with --apiserver"),
    ];
    for (node, (name, cluster, message)) in (0..).zip(at_once) {
        let options = with_kubeconfig(server, name, &cluster, &user);
        let mut agent = Agent::start_unchecked(stage.node(node), options).expect("started");
        let status = agent.wait_exit(AT_ONCE).unwrap_or_else(|error| panic!("{name}: {error}: {}", agent.log_text()));
        assert!(status.is_some_and(|status| status.code() == Some(1)), "{name}: {status:?}");
        let log = agent.log_text();
        assert!(log.contains(message), "{name}: {log}");
    }
    let audit = server.requests().expect("audit log");
    assert_eq!(audit, [], "nothing reached the server");

    // Refused in the handshake: the agent says so, and goes on trying.
    let stranger = server.dir().join("stranger.crt");
    fs::write(&stranger, Authority::new("cluster").expect("authority").pem()).expect("written");
    let named = json!({ "certificate-authority": authority, "tls-server-name": "other.example" });
    let in_handshake = [
        ("stranger", ClusterEntry::verified(server, &stranger)),
        ("other-name", ClusterEntry { server: server.url(), fields: named }),
    ];
    let agents: Vec<_> = (3..)
        .zip(&in_handshake)
        .map(|(node, (name, cluster))| {
            let options = with_kubeconfig(server, name, cluster, &user);
            Agent::start_unchecked(stage.node(node), options).expect("started")
        })
        .collect();
    for ((name, _), agent) in in_handshake.iter().zip(&agents) {
        let line = Stage::wait_logged(agent, 0, &["trouble=\"tls\"", "invalid peer certificate"]);
        let fix = "check the CA and the names in the server's certificate";
        assert!(line.contains(fix), "{name}: {line}");
        assert_eq!(agent.get("/healthz").expect("its health").0, 503, "{name}");
        assert!(Stage::services(agent).is_empty(), "{name}");
    }
    assert_eq!(server.requests().expect("audit log"), [], "no token was shown to a server that was not verified");

    // With the right authority in the file it goes on by itself.
    fs::write(&stranger, server.authority().pem()).expect("written");
    Stage::wait_rows(&agents[0], "default/web:", &rows(&service, &[20]));
}

#[test]
fn rotated_token_is_taken_up_and_nothing_is_lost() {
    let mut stage = nodes(1);
    let service = dual("web", 10);
    stage.publish(&service);
    let account = deployed_account();
    let secret = |name: &str| {
        let metadata = json!({ "namespace": account.namespace, "name": name });
        json!({ "apiVersion": "v1", "kind": "Secret", "metadata": metadata })
    };
    for name in ["first", "second"] {
        stage.create(&secret(name));
    }
    let first = account.token(&stage.server, Some("first")).expect("token");
    let mounted = Mounted::new(&stage.server, "account", &first).expect("folder of the account");
    let agent = Agent::start(stage.node(0), quiet(mounted.options(&stage.server.url()))).expect("healthy");
    Stage::wait_rows(&agent, "default/web:", &rows(&service, &[20]));
    let vigil = Vigil::start(stage.node(0), &agent, "default/web:");

    // The token ends with its Secret; a new server has no memory of having accepted it.
    stage.server.client().delete(&secret("first")).expect("deleted");
    let token = account.token(&stage.server, Some("second")).expect("token");
    stage.server.kill_api().expect("killed");
    stage.server.start_api(ApiOptions::default()).expect("ready");
    let line = Stage::wait_logged(&agent, 0, &["trouble=\"unauthorized\""]);
    assert!(line.contains("renew the token or client certificate; the files are read again by themselves"), "{line}");
    let refused = stage.server.requests().expect("audit log").iter().filter(|request| request.code == 401).count();
    assert!(refused > 0, "the server refused the old token");

    mounted.set_token(&token).expect("rotated");
    stage.check_follows(&agent, "after", 11);
    vigil.end(10);
    assert_eq!(agent.get("/healthz").expect("its health").0, 200);
}
