//! kube-proxy's configuration: what is honoured, what is ignored with a word about it, what is refused, and where.

use std::fs;
use std::path::Path;

use clap::Parser as _;
use proxy_agent::dataplane::sweep::Timeouts;
use proxy_agent::kubeproxy::config::ConfigFile;
use proxy_agent::kubeproxy::reload::{Look, Reload};
use proxy_agent::kubeproxy::{Flags, KubeProxyConfiguration, Settings};
use proxy_core::policy::{DetectLocal, ExternalIps, NodePortAddresses, Policy};

const HEAD: &str = "apiVersion: kubeproxy.config.k8s.io/v1alpha1\nkind: KubeProxyConfiguration\n";

#[derive(clap::Parser)]
struct Command {
    #[command(flatten)]
    flags: Flags,
}

fn flags(words: &[&str]) -> Flags {
    Command::try_parse_from([&["proxy-agent"], words].concat()).expect("flags").flags
}

fn file(body: &str) -> ConfigFile {
    let text = format!("{HEAD}{body}");
    let path = Path::new("kube-proxy.yaml");
    let config = KubeProxyConfiguration::parse(path, &text).unwrap_or_else(|error| panic!("{body}: {error}"));
    ConfigFile { path: path.to_owned(), text, config }
}

/// Settings of a file and flags, with the names of the fields that were ignored.
fn settings(body: &str, words: &[&str]) -> (Settings, Vec<&'static str>) {
    let (settings, ignored) = Settings::new(Some(&file(body)), &flags(words), None).expect(body);
    (settings, ignored.into_iter().map(|one| one.field).collect())
}

/// What differs from the settings of an empty file.
fn seen(settings: &Settings) -> String {
    let (default, _) = Settings::new(None, &Flags::default(), None).expect("defaults");
    let mut all = Vec::new();
    macro_rules! differ {
        ($($field:ident),+) => { $(
            let (is, was) = (format!("{:?}", settings.$field), format!("{:?}", default.$field));
            if is != was {
                all.push(format!("{}={is}", stringify!($field)));
            }
        )+ };
    }
    differ!(healthz, metrics, bind_hard_fail, node_name, kubeconfig, qps, burst, timeouts, oom_score_adj);
    differ!(mode, profiling, min_sync, health_timeout, log_format, verbosity, flows);
    let (is, was) = (&settings.policy, Policy::default());
    macro_rules! policy {
        ($($field:ident),+) => { $(
            if is.$field != was.$field {
                all.push(format!("{}={:?}", stringify!($field), is.$field));
            }
        )+ };
    }
    policy!(node_port_addresses, localhost_node_ports, masquerade_all, detect_local, cluster_cidrs, external_ips);
    all.join(" ")
}

#[test]
fn fields_that_are_honoured() {
    let rows = [
        ("", ""),
        ("healthzBindAddress: 10.0.0.1:99", "healthz=Some(10.0.0.1:99)"),
        ("healthzBindAddress: 10.0.0.1", "healthz=Some(10.0.0.1:10256)"),
        ("healthzBindAddress: none", "healthz=None"),
        ("healthzBindAddress: \"\"", ""),
        ("metricsBindAddress: 0.0.0.0:10249", "metrics=Some(0.0.0.0:10249)"),
        ("metricsBindAddress: \"[::]:10249\"", "metrics=Some([::]:10249)"),
        ("bindAddress: \"::\"", "healthz=Some([::]:10256) metrics=Some([::1]:10249)"),
        ("bindAddressHardFail: true", "bind_hard_fail=true"),
        ("hostnameOverride: Node-1", "node_name=Some(\"node-1\")"),
        (
            "clientConnection: {kubeconfig: /etc/k, qps: 50, burst: 100}",
            "kubeconfig=Some(\"/etc/k\") qps=50.0 burst=100",
        ),
        (
            "conntrack: {tcpEstablishedTimeout: 12h0m0s, tcpCloseWaitTimeout: 30m}",
            "timeouts=Timeouts { established: 43200s, half_closed: 1800s, udp: 30s, udp_stream: 120s }",
        ),
        (
            "conntrack: {udpTimeout: 10s, udpStreamTimeout: 5m}",
            "timeouts=Timeouts { established: 86400s, half_closed: 3600s, udp: 10s, udp_stream: 300s }",
        ),
        ("conntrack: {tcpEstablishedTimeout: 0s, tcpCloseWaitTimeout: 0s, udpTimeout: 0s, udpStreamTimeout: 0s}", ""),
        ("conntrack: {maxPerCore: 1, min: 500000}", "flows=Some(500000)"),
        ("conntrack: {maxPerCore: 0, min: 500000}", ""),
        ("conntrack: {maxPerCore: null, min: null}", ""),
        ("conntrack: {tcpBeLiberal: true}", ""),
        ("oomScoreAdj: -998", "oom_score_adj=Some(-998)"),
        (
            "mode: nftables\nnftables: {masqueradeAll: true, syncPeriod: 1m, minSyncPeriod: 2s}",
            "min_sync=2s health_timeout=120s masquerade_all=true",
        ),
        ("iptables: {masqueradeAll: true, minSyncPeriod: 0s, syncPeriod: 0s}", "masquerade_all=true"),
        ("iptables: {localhostNodePorts: false}", "localhost_node_ports=false"),
        ("ipvs: {strictARP: true}", ""),
        ("clusterCIDR: 10.244.0.0/16,fd00::/48", "detect_local=ClusterCidr cluster_cidrs=[10.244.0.0/16, fd00::/48]"),
        ("detectLocalMode: NodeCIDR", "detect_local=NodeCidr"),
        ("nodePortAddresses: [primary]", ""),
        ("nodePortAddresses: []", ""),
        ("nodePortAddresses: [10.0.0.0/8, localhost]", "node_port_addresses=[Range(10.0.0.0/8), Localhost]"),
        ("nodePortAddresses: [all]", "node_port_addresses=[All]"),
        ("featureGates: {AllowServiceExternalIPs: false}", "external_ips=None"),
        ("featureGates: {AllowServiceExternalIPs: true}", ""),
        ("logging: {format: json, verbosity: 5, flushFrequency: 5s}", "log_format=Json verbosity=5"),
        ("logging: {flushFrequency: 0, options: {json: {infoBufferSize: \"0\"}, text: {}}}", ""),
    ];
    for (body, want) in rows {
        let (settings, ignored) = settings(body, &[]);
        assert_eq!((seen(&settings).as_str(), ignored.as_slice()), (want, [].as_slice()), "{body}");
    }
}

#[test]
fn fields_that_are_ignored_with_one_warning_each() {
    let rows: [(&str, &[&str]); 27] = [
        ("mode: iptables", &["mode"]),
        ("mode: ipvs", &["mode"]),
        ("bindAddress: 10.0.0.1", &["bindAddress"]),
        ("bindAddress: 0.0.0.0", &[]),
        ("clientConnection: {contentType: application/cbor}", &["clientConnection.contentType"]),
        ("clientConnection: {contentType: application/vnd.kubernetes.protobuf}", &[]),
        ("iptables: {masqueradeBit: 15}\nnftables: {masqueradeBit: 14}", &["iptables.masqueradeBit"]),
        ("nftables: {masqueradeAll: true}", &["nftables.masqueradeAll"]),
        ("mode: nftables\niptables: {masqueradeAll: true}", &["iptables.masqueradeAll"]),
        ("ipvs: {scheduler: mh, tcpTimeout: 1s}", &["ipvs.scheduler", "ipvs.tcpTimeout"]),
        ("ipvs: {scheduler: \"\", tcpTimeout: 0s, excludeCIDRs: null}", &[]),
        ("ipvs: {excludeCIDRs: [10.0.0.0/8]}", &["ipvs.excludeCIDRs"]),
        ("winkernel: {enableDSR: true, sourceVip: 10.0.0.1}", &["winkernel.sourceVip", "winkernel.enableDSR"]),
        ("winkernel: {enableDSR: false, sourceVip: \"\"}", &[]),
        ("windowsRunAsService: true", &["windowsRunAsService"]),
        ("configSyncPeriod: 15m0s", &[]),
        ("configSyncPeriod: 1m0s", &["configSyncPeriod"]),
        (
            "conntrack: {udpTimeout: 500ms, udpStreamTimeout: 1s}",
            &["conntrack.udpTimeout", "conntrack.udpStreamTimeout"],
        ),
        ("conntrack: {udpTimeout: 2s, udpStreamTimeout: 0s}", &[]),
        ("portRange: 30000-32767", &["portRange"]),
        ("showHiddenMetricsForVersion: \"1.30\"", &["showHiddenMetricsForVersion"]),
        ("enableProfiling: true", &["enableProfiling"]),
        ("featureGates: {AllAlpha: true, Other: false}", &["featureGates"]),
        ("detectLocalMode: ClusterCIDR", &["detectLocalMode"]),
        ("detectLocalMode: BridgeInterface\ndetectLocal: {bridgeInterface: cni0}", &["detectLocal.bridgeInterface"]),
        ("detectLocalMode: NodeCIDR\nclusterCIDR: 10.0.0.0/8", &["clusterCIDR"]),
        ("logging: {vmodule: [{filePattern: a, verbosity: 1}]}", &["logging.vmodule"]),
    ];
    for (body, want) in rows {
        assert_eq!(settings(body, &[]).1, want, "{body}");
    }
}

/// What `kubeadm init` writes: nothing of it is wrong, and nothing is worth a word.
#[test]
fn the_file_of_kubeadm_is_taken_as_it_is() {
    let body = "\
bindAddress: 0.0.0.0
bindAddressHardFail: false
clientConnection:
  acceptContentTypes: \"\"
  burst: 0
  contentType: \"\"
  kubeconfig: /var/lib/kube-proxy/kubeconfig.conf
  qps: 0
clusterCIDR: 10.244.0.0/16
configSyncPeriod: 0s
conntrack:
  maxPerCore: null
  min: null
  tcpBeLiberal: false
  tcpCloseWaitTimeout: null
  tcpEstablishedTimeout: null
  udpStreamTimeout: 0s
  udpTimeout: 0s
detectLocal:
  bridgeInterface: \"\"
  interfaceNamePrefix: \"\"
detectLocalMode: \"\"
enableProfiling: false
healthzBindAddress: \"\"
hostnameOverride: \"\"
iptables:
  localhostNodePorts: null
  masqueradeAll: false
  masqueradeBit: null
  minSyncPeriod: 0s
  syncPeriod: 0s
ipvs:
  excludeCIDRs: null
  minSyncPeriod: 0s
  scheduler: \"\"
  strictARP: false
  syncPeriod: 0s
  tcpFinTimeout: 0s
  tcpTimeout: 0s
  udpTimeout: 0s
logging:
  flushFrequency: 0
  options:
    json:
      infoBufferSize: \"0\"
    text:
      infoBufferSize: \"0\"
  verbosity: 0
metricsBindAddress: \"\"
mode: \"\"
nftables:
  masqueradeAll: false
  masqueradeBit: null
  minSyncPeriod: 0s
  syncPeriod: 0s
nodePortAddresses: null
oomScoreAdj: null
portRange: \"\"
showHiddenMetricsForVersion: \"\"
winkernel:
  enableDSR: false
  forwardHealthCheckVip: false
  networkName: \"\"
  rootHnsEndpointName: \"\"
  sourceVip: \"\"
";
    let (settings, ignored) = settings(body, &[]);
    assert_eq!(ignored, [""; 0]);
    let want = "kubeconfig=Some(\"/var/lib/kube-proxy/kubeconfig.conf\") detect_local=ClusterCidr cluster_cidrs=[10.244.0.0/16]";
    assert_eq!(seen(&settings), want);
    // What is shown reads back as the same.
    let shown = settings.configz()["kubeproxy.config.k8s.io"].to_string();
    let read = KubeProxyConfiguration::parse(Path::new("configz"), &shown).expect("JSON is YAML");
    assert_eq!(read, settings.effective);
}

#[test]
fn flags_win_over_the_file() {
    let body =
        "mode: ipvs\nmetricsBindAddress: 0.0.0.0:10249\niptables: {masqueradeAll: true}\nnodePortAddresses: [all]";
    let rows: [(&[&str], &str); 9] = [
        (&[], "metrics=Some(0.0.0.0:10249) mode=Ipvs node_port_addresses=[All] masquerade_all=true"),
        (
            &["--masquerade-all=false", "--proxy-mode", "iptables", "--metrics-bind-address", "127.0.0.1:10249"],
            "mode=Iptables node_port_addresses=[All]",
        ),
        (
            &[
                "--proxy-mode=nftables",
                "--masquerade-all",
                "--nodeport-addresses",
                "10.0.0.0/8,primary",
                "--metrics-bind-address=",
            ],
            "metrics=None node_port_addresses=[Range(10.0.0.0/8), Primary] masquerade_all=true",
        ),
        (
            &["--hostname-override=A", "--oom-score-adj", "-5", "--feature-gates=AllowServiceExternalIPs=false"],
            "metrics=Some(0.0.0.0:10249) node_name=Some(\"a\") oom_score_adj=Some(-5) mode=Ipvs node_port_addresses=[All] masquerade_all=true external_ips=None",
        ),
        (
            &["--healthz-bind-address=none", "--cluster-cidr", "10.1.2.3/16", "-v", "6"],
            "healthz=None metrics=Some(0.0.0.0:10249) mode=Ipvs verbosity=6 node_port_addresses=[All] masquerade_all=true detect_local=ClusterCidr cluster_cidrs=[10.1.0.0/16]",
        ),
        (
            &[
                "--conntrack-tcp-timeout-established=1h",
                "--iptables-localhost-nodeports=false",
                "--v=4",
                "--kube-api-qps=9",
            ],
            "metrics=Some(0.0.0.0:10249) qps=9.0 timeouts=Timeouts { established: 3600s, half_closed: 3600s, udp: 30s, udp_stream: 120s } mode=Ipvs verbosity=4 node_port_addresses=[All] localhost_node_ports=false masquerade_all=true",
        ),
        (
            &["--kubeconfig", "/k", "--bind-address", "::1", "--bind-address-hard-fail"],
            "healthz=Some([::]:10256) metrics=Some(0.0.0.0:10249) bind_hard_fail=true kubeconfig=Some(\"/k\") mode=Ipvs node_port_addresses=[All] masquerade_all=true",
        ),
        (
            &["--ipvs-sync-period=1m", "--ipvs-min-sync-period=1s", "--logging-format=json"],
            "metrics=Some(0.0.0.0:10249) mode=Ipvs min_sync=1s health_timeout=120s log_format=Json node_port_addresses=[All] masquerade_all=true",
        ),
        (
            &["--detect-local-mode", "BridgeInterface", "--pod-bridge-interface", "cni0", "--profiling"],
            "metrics=Some(0.0.0.0:10249) mode=Ipvs profiling=true node_port_addresses=[All] masquerade_all=true",
        ),
    ];
    for (words, want) in rows {
        assert_eq!(seen(&settings(body, words).0), want, "{words:?}");
    }
    let own = ExternalIps::Within(vec!["192.0.2.0/24".parse().expect("a CIDR")]);
    let gate = flags(&["--feature-gates=AllowServiceExternalIPs=false"]);
    let (settings, _) = Settings::new(None, &gate, Some(&own)).expect("both");
    assert_eq!(settings.policy.external_ips, own, "the agent's own flag says it more exactly");
}

#[test]
fn defaults_are_kube_proxys_in_nftables_mode() {
    let (settings, ignored) = Settings::new(None, &Flags::default(), None).expect("defaults");
    assert_eq!(ignored, []);
    let policy = Policy {
        node_port_addresses: vec![NodePortAddresses::Primary],
        localhost_node_ports: true,
        masquerade_all: false,
        detect_local: DetectLocal::Interface,
        cluster_cidrs: Vec::new(),
        external_ips: ExternalIps::All,
    };
    assert_eq!(settings.policy, policy);
    assert_eq!(settings.timeouts, Timeouts::default());
    let address = |at: &str| Some(at.parse().expect("an address"));
    assert_eq!((settings.healthz, settings.metrics), (address("0.0.0.0:10256"), address("127.0.0.1:10249")));
    assert_eq!(settings.mode.to_string(), "nftables");
}

#[test]
fn wrong_files_are_refused_with_line_and_field() {
    let rows = [
        (
            "iptables: {masqueradAll: true}",
            "kube-proxy.yaml:3:12: iptables.masqueradAll: unknown field `masqueradAll`, expected one of masqueradeBit, masqueradeAll, localhostNodePorts, syncPeriod, minSyncPeriod",
        ),
        (
            "detectLocal:\n  bridge: cni0\n",
            "kube-proxy.yaml:4:3: detectLocal.bridge: unknown field `bridge`, expected one of bridgeInterface, interfaceNamePrefix",
        ),
        (
            "mode: userspace",
            "kube-proxy.yaml:3:7: mode: \"userspace\" is no mode of kube-proxy on Linux; write iptables, ipvs or nftables",
        ),
        (
            "nodePortAddresses:\n- 10.0.0.0/8\n- eth0\n",
            "kube-proxy.yaml:5:3: nodePortAddresses[1]: \"eth0\" is no range of addresses; write a CIDR, primary, localhost or all",
        ),
        (
            "conntrack:\n  udpTimeout: 10\n",
            "kube-proxy.yaml:4:15: conntrack.udpTimeout: \"10\" is no duration; write it like 24h, 1m30s or 500ms",
        ),
        (
            "conntrack:\n  udpTimeout: -1s\n",
            "kube-proxy.yaml:4:15: conntrack.udpTimeout: \"-1s\" is negative; 0s leaves the default",
        ),
        (
            "clusterCIDR: 10.0.0.0/8,10.1.0.0/16",
            "kube-proxy.yaml:3:14: clusterCIDR: \"10.0.0.0/8,10.1.0.0/16\" has two ranges of one family; write one of each at most",
        ),
        (
            "bindAddressHardFail: maybe",
            "kube-proxy.yaml:3:22: bindAddressHardFail: invalid boolean (strict mode expects true/false)",
        ),
        ("oomScoreAdj: -1001", "kube-proxy.yaml:3:1: oomScoreAdj: -1001 is out of range; write -1000 to 1000"),
        (
            "iptables:\n  masqueradeBit: 32\n",
            "kube-proxy.yaml:4:3: iptables.masqueradeBit: 32 is out of range; write 0 to 31",
        ),
        (
            "iptables:\n  syncPeriod: 1s\n  minSyncPeriod: 2s\n",
            "kube-proxy.yaml:5:3: iptables.minSyncPeriod: 2s is longer than syncPeriod, 1s; write that much at most",
        ),
        (
            "detectLocalMode: BridgeInterface",
            "kube-proxy.yaml: detectLocal.bridgeInterface: detectLocalMode is BridgeInterface, and this is empty; name the bridge",
        ),
        (
            "detectLocalMode: Bridge",
            "kube-proxy.yaml:3:18: detectLocalMode: \"Bridge\" is none of ClusterCIDR, NodeCIDR, BridgeInterface, InterfaceNamePrefix",
        ),
        ("conntrack:\n  min: [", "kube-proxy.yaml:4:8: conntrack.min: expected string scalar"),
        ("conntrack:\n  min: 1\n  min: 2\n", "kube-proxy.yaml:5:3: conntrack: duplicate mapping key: min"),
    ];
    let mut wrong = Vec::new();
    for (body, want) in rows {
        let text = format!("{HEAD}{body}");
        let path = Path::new("kube-proxy.yaml");
        let read =
            KubeProxyConfiguration::parse(path, &text).map(|config| ConfigFile { path: path.into(), text, config });
        let got = match read.and_then(|file| Settings::new(Some(&file), &Flags::default(), None)) {
            Ok(_) => "taken".to_owned(),
            Err(error) => error.to_string(),
        };
        if got != want {
            wrong.push(format!("{body:?}\n  got  {got}\n  want {want}"));
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
    for (text, want) in [
        ("", "kube-proxy.yaml"),
        (
            "kind: KubeProxyConfiguration\n",
            "kube-proxy.yaml: apiVersion: \"\" is not what this agent reads; write kubeproxy.config.k8s.io/v1alpha1",
        ),
        (
            "apiVersion: kubeproxy.config.k8s.io/v1alpha1\nkind: KubeletConfiguration\n",
            "kube-proxy.yaml:2:1: kind: \"KubeletConfiguration\" is not what this agent reads; write KubeProxyConfiguration",
        ),
    ] {
        let got = KubeProxyConfiguration::parse(Path::new("kube-proxy.yaml"), text).expect_err("refused").to_string();
        assert!(got.starts_with(want), "{text:?}: {got}");
    }
}

#[test]
fn a_changed_file_ends_the_agent_and_a_wrong_one_does_not() {
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("config.conf");
    let write = |body: &str| fs::write(&path, format!("{HEAD}{body}")).expect("written");
    write("mode: nftables\n");
    let file = ConfigFile::read(&path).expect("read");
    let flags = flags(&["--masquerade-all"]);
    let (settings, _) = Settings::new(Some(&file), &flags, None).expect("settings");
    let mut reload = Reload::new(file, flags, None, settings);
    let place = path.display().to_string();
    let mut look = |body: &str| {
        write(body);
        match reload.look() {
            Look::Same => "same".to_owned(),
            Look::Changed(fields) => format!("{fields:?}"),
            Look::Wrong(error) => error.to_string().replace(&place, "FILE"),
        }
    };
    let rows = [
        ("mode: nftables\n", "same"),
        ("mode: nftables # a remark\n", "same"),
        ("mode: nftables\nnftables: {masqueradeAll: false}\n", "same"),
        (
            "mode: nftable",
            "FILE:3:7: mode: \"nftable\" is no mode of kube-proxy on Linux; write iptables, ipvs or nftables",
        ),
        ("mode: nftable", "same"),
        ("mode: nftables\n", "same"),
        (
            "mode: nftables\nconntrack: {tcpEstablishedTimeout: 12h}\n",
            "[(\"conntrack.tcpEstablishedTimeout\", \"\\\"24h0m0s\\\"\", \"\\\"12h0m0s\\\"\")]",
        ),
    ];
    for (body, want) in rows {
        assert_eq!(look(body), want, "{body}");
    }
}

/// A ConfigMap's volume: the file is a link into `..data`, which is switched to another folder by a rename.
#[tokio::test]
async fn a_switched_volume_is_noticed() {
    let folder = tempfile::tempdir().expect("a folder");
    let at = |name: &str| folder.path().join(name);
    let version = |name: &str, body: &str| {
        fs::create_dir(at(name)).expect("made");
        fs::write(at(name).join("config.conf"), format!("{HEAD}{body}")).expect("written");
        std::os::unix::fs::symlink(name, at("..tmp")).expect("linked");
        fs::rename(at("..tmp"), at("..data")).expect("switched");
    };
    version("..1", "");
    std::os::unix::fs::symlink("..data/config.conf", at("config.conf")).expect("linked");
    let file = ConfigFile::read(&at("config.conf")).expect("read");
    let (settings, _) = Settings::new(Some(&file), &Flags::default(), None).expect("settings");
    let reload = Reload::new(file, Flags::default(), None, settings);
    let mut changed = tokio::spawn(reload.changed());
    version("..2", "mode: nothing\n");
    let early = tokio::time::timeout(std::time::Duration::from_millis(300), &mut changed).await;
    assert!(early.is_err(), "a wrong file ends nothing");
    version("..3", "mode: ipvs\n");
    let ended = tokio::time::timeout(std::time::Duration::from_secs(20), changed).await;
    ended.expect("in time, long before the file is read anyway").expect("no panic");
}
