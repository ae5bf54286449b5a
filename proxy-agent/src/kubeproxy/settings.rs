//! What a configuration means for this agent: honoured, ignored with a warning, or refused.

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::path::PathBuf;
use std::time::Duration;

use proxy_core::policy::{DetectLocal, ExternalIps, Policy};
use proxy_ebpf::conntrack::UdpIdle;

use super::config::{API_VERSION, ConfigError, ConfigFile, KIND, KubeProxyConfiguration, Place};
use super::flags::Flags;
use super::value::{Bind, LocalMode, LogFormat, Mode, NodePorts, Span};
use crate::dataplane::sweep::Timeouts;

/// kube-proxy's port for health.
pub const HEALTHZ_PORT: u16 = 10256;
/// kube-proxy's port for metrics.
pub const METRICS_PORT: u16 = 10249;
/// The gate that turns externalIPs off.
pub const EXTERNAL_IPS_GATE: &str = "AllowServiceExternalIPs";

/// Everything that kube-proxy's configuration decides here.
#[derive(Clone, Debug, PartialEq)]
pub struct Settings {
    /// What the maps hold.
    pub policy: Policy,
    /// Address of the health server.
    pub healthz: Option<SocketAddr>,
    /// Address of the metrics server.
    pub metrics: Option<SocketAddr>,
    /// End when one of them cannot be bound.
    pub bind_hard_fail: bool,
    /// Name of the Node object, if given.
    pub node_name: Option<String>,
    /// Kubeconfig file.
    pub kubeconfig: Option<PathBuf>,
    /// Events a second to the API server.
    pub qps: f32,
    /// Events at once.
    pub burst: u32,
    /// How long flows may be idle.
    pub timeouts: Timeouts,
    /// Room for established flows, in flows, if given.
    pub flows: Option<u32>,
    /// `oom_score_adj`, if given.
    pub oom_score_adj: Option<i32>,
    /// What `/proxyMode` answers.
    pub mode: Mode,
    /// Was profiling asked for?
    pub profiling: bool,
    /// Least time between two changes of the maps.
    pub min_sync: Duration,
    /// How long a change may wait before the proxy is unhealthy.
    pub health_timeout: Duration,
    /// How to write log lines.
    pub log_format: LogFormat,
    /// klog's level.
    pub verbosity: u32,
    /// The whole, with kube-proxy's defaults where nothing is given: what `/configz` shows.
    pub effective: KubeProxyConfiguration,
}

/// A field that is set and has no effect.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Ignored {
    /// The field.
    pub field: &'static str,
    /// Why it has no meaning here.
    pub why: &'static str,
}

/// What a refusal is about.
struct Refusal {
    field: &'static str,
    problem: String,
}

impl Settings {
    /// From the file, if there is one, and the flags over it. With the fields that are set and ignored.
    pub fn new(
        file: Option<&ConfigFile>,
        flags: &Flags,
        external_ips: Option<&ExternalIps>,
    ) -> Result<(Self, Vec<Ignored>), ConfigError> {
        let mut config = file.map(|file| file.config.clone()).unwrap_or_default();
        flags.apply(&mut config);
        check(&config).map_err(|refusal| ConfigError::Wrong {
            place: file.map_or_else(
                || Place { field: refusal.field.to_owned(), ..Place::default() },
                |file| file.place(refusal.field),
            ),
            problem: refusal.problem,
        })?;
        let ignored = ignored(&config);
        Ok((Self::of(config, external_ips), ignored))
    }

    fn of(config: KubeProxyConfiguration, external_ips: Option<&ExternalIps>) -> Self {
        let v6 = config.bind_address.is_some_and(|ip| ip.is_ipv6());
        let any = if v6 { IpAddr::V6(Ipv6Addr::UNSPECIFIED) } else { IpAddr::V4(Ipv4Addr::UNSPECIFIED) };
        let here = if v6 { IpAddr::V6(Ipv6Addr::LOCALHOST) } else { IpAddr::V4(Ipv4Addr::LOCALHOST) };
        let (masquerade_all, sync, min_sync) = match config.mode {
            Some(Mode::Nftables) => {
                (config.nftables.masquerade_all, config.nftables.sync_period, config.nftables.min_sync_period)
            }
            Some(Mode::Ipvs) => (config.iptables.masquerade_all, config.ipvs.sync_period, config.ipvs.min_sync_period),
            Some(Mode::Iptables) | None => {
                (config.iptables.masquerade_all, config.iptables.sync_period, config.iptables.min_sync_period)
            }
        };
        let timeouts = Timeouts::default();
        let gate = config.feature_gates.as_ref().and_then(|gates| gates.get(EXTERNAL_IPS_GATE));
        let by_gate = if gate == Some(&false) { ExternalIps::None } else { ExternalIps::All };
        let cluster_cidrs = config.cluster_cidr.as_ref().map(|cidrs| cidrs.0.clone()).unwrap_or_default();
        let default = Policy::default();
        let policy = Policy {
            node_port_addresses: match config.node_port_addresses.as_deref() {
                None | Some([]) => default.node_port_addresses,
                Some(all) => all.iter().map(|NodePorts(one)| *one).collect(),
            },
            localhost_node_ports: config.iptables.localhost_node_ports.unwrap_or(default.localhost_node_ports),
            masquerade_all: masquerade_all.unwrap_or(default.masquerade_all),
            detect_local: match config.detect_local_mode {
                Some(LocalMode::NodeCidr) => DetectLocal::NodeCidr,
                Some(LocalMode::BridgeInterface | LocalMode::InterfaceNamePrefix) => DetectLocal::Interface,
                // As by kube-proxy, this is the default; and without a range nothing can be told by it.
                Some(LocalMode::ClusterCidr) | None if cluster_cidrs.is_empty() => DetectLocal::Interface,
                Some(LocalMode::ClusterCidr) | None => DetectLocal::ClusterCidr,
            },
            cluster_cidrs,
            external_ips: external_ips.cloned().unwrap_or(by_gate),
        };
        let sync = given(sync).unwrap_or(Duration::from_secs(30));
        Self {
            policy,
            healthz: config.healthz_bind_address.unwrap_or(Bind::Ip(any)).at(HEALTHZ_PORT),
            metrics: config.metrics_bind_address.unwrap_or(Bind::Ip(here)).at(METRICS_PORT),
            bind_hard_fail: config.bind_address_hard_fail.unwrap_or_default(),
            node_name: config
                .hostname_override
                .as_deref()
                .map(str::trim)
                .filter(|name| !name.is_empty())
                .map(str::to_lowercase),
            kubeconfig: config.client_connection.kubeconfig.as_ref().filter(|path| !path.is_empty()).map(PathBuf::from),
            qps: config.client_connection.qps.filter(|qps| *qps > 0.0).unwrap_or(5.0),
            burst: config.client_connection.burst.and_then(|n| u32::try_from(n).ok()).filter(|n| *n > 0).unwrap_or(10),
            timeouts: Timeouts {
                established: given(config.conntrack.tcp_established_timeout).unwrap_or(timeouts.established),
                half_closed: given(config.conntrack.tcp_close_wait_timeout).unwrap_or(timeouts.half_closed),
                udp: given(config.conntrack.udp_timeout).unwrap_or(timeouts.udp),
                udp_stream: given(config.conntrack.udp_stream_timeout).unwrap_or(timeouts.udp_stream),
            },
            flows: flows(&config),
            oom_score_adj: config.oom_score_adj,
            mode: config.mode.unwrap_or(Mode::Nftables),
            profiling: config.enable_profiling.unwrap_or_default(),
            min_sync: given(min_sync).unwrap_or_default(),
            health_timeout: sync * 2,
            log_format: config.logging.format.unwrap_or_default(),
            verbosity: config.logging.verbosity.unwrap_or_default(),
            effective: complete(config),
        }
    }

    /// The filter of log lines that `verbosity` asks for.
    pub const fn log_filter(&self) -> &'static str {
        match self.verbosity {
            0..=3 => "info",
            4..=5 => "info,proxy_agent=debug,proxy_core=debug",
            6.. => "debug,proxy_agent=trace,proxy_core=trace",
        }
    }

    /// `/configz`.
    pub fn configz(&self) -> serde_json::Value {
        serde_json::json!({ "kubeproxy.config.k8s.io": &self.effective })
    }

    /// Every field in which two configurations differ: its name, what it was, what it is.
    pub fn changes(&self, new: &Self) -> Vec<(String, String, String)> {
        let (mut was, mut is) = (BTreeMap::new(), BTreeMap::new());
        flatten("", &serde_json::to_value(&self.effective).unwrap_or_default(), &mut was);
        flatten("", &serde_json::to_value(&new.effective).unwrap_or_default(), &mut is);
        let fields: std::collections::BTreeSet<&String> = was.keys().chain(is.keys()).collect();
        let of = |all: &BTreeMap<String, String>, field| all.get(field).cloned().unwrap_or_else(|| "null".to_owned());
        let pairs = fields.into_iter().map(|field| (field.clone(), of(&was, field), of(&is, field)));
        pairs.filter(|(_, was, is)| was != is).collect()
    }
}

fn flatten(at: &str, value: &serde_json::Value, into: &mut BTreeMap<String, String>) {
    if let serde_json::Value::Object(fields) = value {
        for (name, value) in fields {
            let path = if at.is_empty() { name.clone() } else { format!("{at}.{name}") };
            flatten(&path, value, into);
        }
    } else {
        into.insert(at.to_owned(), value.to_string());
    }
}

/// A time other than 0, which leaves the default.
fn given(span: Option<Span>) -> Option<Duration> {
    span.map(|span| span.0).filter(|time| !time.is_zero())
}

/// `conntrack.maxPerCore` and `conntrack.min`, by kube-proxy's rule, when either was given.
fn flows(config: &KubeProxyConfiguration) -> Option<u32> {
    let (per_core, min) = (config.conntrack.max_per_core, config.conntrack.min);
    if per_core.is_none() && min.is_none() {
        return None;
    }
    let number = |value: Option<i32>, default| value.map_or(default, |value| u32::try_from(value).unwrap_or_default());
    let per_core = number(per_core, 32_768);
    if per_core == 0 {
        return None;
    }
    let cores = std::thread::available_parallelism().map_or(1, |n| u32::try_from(n.get()).unwrap_or(u32::MAX));
    Some(per_core.saturating_mul(cores).max(number(min, 131_072)))
}

// === What is refused ===

fn check(config: &KubeProxyConfiguration) -> Result<(), Refusal> {
    let refuse = |field, problem: String| Err(Refusal { field, problem });
    let named = |name: &Option<String>| name.as_ref().is_some_and(|name| !name.is_empty());
    match config.detect_local_mode {
        Some(LocalMode::BridgeInterface) if !named(&config.detect_local.bridge_interface) => {
            return refuse(
                "detectLocal.bridgeInterface",
                "detectLocalMode is BridgeInterface, and this is empty; name the bridge".to_owned(),
            );
        }
        Some(LocalMode::InterfaceNamePrefix) if !named(&config.detect_local.interface_name_prefix) => {
            return refuse(
                "detectLocal.interfaceNamePrefix",
                "detectLocalMode is InterfaceNamePrefix, and this is empty; name the prefix".to_owned(),
            );
        }
        _ => {}
    }
    let within = |field, value: Option<i32>, least: i32, most: i32| match value {
        Some(value) if value < least || value > most => {
            Err(Refusal { field, problem: format!("{value} is out of range; write {least} to {most}") })
        }
        _ => Ok(()),
    };
    within("oomScoreAdj", config.oom_score_adj, -1_000, 1_000)?;
    within("conntrack.maxPerCore", config.conntrack.max_per_core, 0, i32::MAX)?;
    within("conntrack.min", config.conntrack.min, 0, i32::MAX)?;
    within("clientConnection.burst", config.client_connection.burst, 0, i32::MAX)?;
    within("iptables.masqueradeBit", config.iptables.masquerade_bit, 0, 31)?;
    within("nftables.masqueradeBit", config.nftables.masquerade_bit, 0, 31)?;
    let periods = [
        ("iptables.minSyncPeriod", config.iptables.min_sync_period, config.iptables.sync_period),
        ("nftables.minSyncPeriod", config.nftables.min_sync_period, config.nftables.sync_period),
        ("ipvs.minSyncPeriod", config.ipvs.min_sync_period, config.ipvs.sync_period),
    ];
    for (field, least, period) in periods {
        let period = given(period).unwrap_or(Duration::from_secs(30));
        if let Some(least) = given(least).filter(|least| *least > period) {
            let (least, period) = (Span(least), Span(period));
            return refuse(field, format!("{least} is longer than syncPeriod, {period}; write that much at most"));
        }
    }
    Ok(())
}

// === What is ignored ===

fn ignored(config: &KubeProxyConfiguration) -> Vec<Ignored> {
    let text = |value: &Option<String>, default: &str| value.as_ref().is_some_and(|v| !v.is_empty() && v != default);
    let span = |value: Option<Span>, default: u64| given(value).is_some_and(|v| v != Duration::from_secs(default));
    let value = |value: &Option<serde_json::Value>| {
        value.as_ref().is_some_and(|v| !matches!(v.as_array().map(Vec::len), Some(0)) && !v.is_null())
    };
    let on = |value: Option<bool>| value == Some(true);
    let bit = |value: Option<i32>| value.is_some_and(|bit| bit != 14);
    let content = |value: &Option<String>| {
        value.as_ref().is_some_and(|v| {
            !v.is_empty() && !v.contains("application/json") && v != "application/vnd.kubernetes.protobuf"
        })
    };
    let known = [EXTERNAL_IPS_GATE];
    let gates = config.feature_gates.iter().flatten().any(|(name, _)| !known.contains(&name.as_str()));
    let short = |value: Option<Span>| given(value).is_some_and(|time| time < Duration::from_nanos(UdpIdle::LEAST));
    let seldom = "a flow's last packet is noted once a second: less than 2s counts as 2s";
    let nftables = config.mode == Some(Mode::Nftables);
    let other = "only the section of `mode` counts, as by kube-proxy (iptables when there is none)";
    let ipvs = "there is no IPVS here";
    let windows = "it is for Windows nodes";
    let local = "pods of this node are known by their own interfaces, under whatever bridge or name";
    let rows = [
        (
            "mode",
            config.mode.is_some_and(|mode| mode != Mode::Nftables),
            "there is one dataplane, with the semantics of nftables mode; the mode is what /proxyMode answers, and whose section counts",
        ),
        (
            "bindAddress",
            config.bind_address.is_some_and(|ip| !ip.is_unspecified()),
            "the node's addresses come from its Node object; only the family counts, for the servers' default addresses",
        ),
        (
            "clientConnection.contentType",
            content(&config.client_connection.content_type),
            "the API server is asked for JSON",
        ),
        (
            "clientConnection.acceptContentTypes",
            content(&config.client_connection.accept_content_types),
            "the API server is asked for JSON",
        ),
        (
            "clusterCIDR",
            config.cluster_cidr.is_some() && !matches!(config.detect_local_mode, None | Some(LocalMode::ClusterCidr)),
            "it counts in detectLocalMode ClusterCIDR only",
        ),
        (
            "detectLocalMode",
            config.detect_local_mode == Some(LocalMode::ClusterCidr) && config.cluster_cidr.is_none(),
            "there is no clusterCIDR to tell pods by; they are known by their interfaces",
        ),
        ("conntrack.udpTimeout", short(config.conntrack.udp_timeout), seldom),
        ("conntrack.udpStreamTimeout", short(config.conntrack.udp_stream_timeout), seldom),
        ("detectLocal.bridgeInterface", text(&config.detect_local.bridge_interface, ""), local),
        ("detectLocal.interfaceNamePrefix", text(&config.detect_local.interface_name_prefix, ""), local),
        ("iptables.masqueradeBit", bit(config.iptables.masquerade_bit), "packets are not marked"),
        ("nftables.masqueradeBit", bit(config.nftables.masquerade_bit), "packets are not marked"),
        (
            "iptables.masqueradeAll",
            nftables && on(config.iptables.masquerade_all) && !on(config.nftables.masquerade_all),
            other,
        ),
        (
            "nftables.masqueradeAll",
            !nftables && on(config.nftables.masquerade_all) && !on(config.iptables.masquerade_all),
            other,
        ),
        ("ipvs.scheduler", text(&config.ipvs.scheduler, ""), "backends are chosen at random, each as likely"),
        ("ipvs.excludeCIDRs", config.ipvs.exclude_cidrs.as_ref().is_some_and(|all| !all.is_empty()), ipvs),
        ("ipvs.tcpTimeout", span(config.ipvs.tcp_timeout, 0), ipvs),
        ("ipvs.tcpFinTimeout", span(config.ipvs.tcp_fin_timeout, 0), ipvs),
        ("ipvs.udpTimeout", span(config.ipvs.udp_timeout, 0), ipvs),
        ("winkernel.networkName", text(&config.winkernel.network_name, ""), windows),
        ("winkernel.sourceVip", text(&config.winkernel.source_vip, ""), windows),
        ("winkernel.enableDSR", on(config.winkernel.enable_dsr), windows),
        ("winkernel.rootHnsEndpointName", text(&config.winkernel.root_hns_endpoint_name, ""), windows),
        ("winkernel.forwardHealthCheckVip", on(config.winkernel.forward_health_check_vip), windows),
        ("windowsRunAsService", on(config.windows_run_as_service), windows),
        ("configSyncPeriod", span(config.config_sync_period, 900), "nothing is asked for again that a watch tells"),
        ("portRange", text(&config.port_range, "0-0"), "NodePorts take no ports of the node's sockets"),
        (
            "showHiddenMetricsForVersion",
            text(&config.show_hidden_metrics_for_version, ""),
            "there are no hidden metrics",
        ),
        ("enableProfiling", on(config.enable_profiling), "there is no profiler to ask; /debug/pprof says so"),
        ("featureGates", gates, "but for AllowServiceExternalIPs, no gate changes this agent"),
        ("logging.vmodule", value(&config.logging.vmodule), "levels by module are set with RUST_LOG"),
    ];
    rows.into_iter().filter(|(_, set, _)| *set).map(|(field, _, why)| Ignored { field, why }).collect()
}

// === Defaults ===

/// Fills in kube-proxy's defaults: what `/configz` shows is what is in force.
fn complete(mut config: KubeProxyConfiguration) -> KubeProxyConfiguration {
    fn or<T>(field: &mut Option<T>, default: T) {
        field.get_or_insert(default);
    }
    let seconds = |n| Span(Duration::from_secs(n));
    let v6 = config.bind_address.is_some_and(|ip| ip.is_ipv6());
    API_VERSION.clone_into(&mut config.api_version);
    KIND.clone_into(&mut config.kind);
    or(&mut config.feature_gates, BTreeMap::new());
    or(&mut config.client_connection.kubeconfig, String::new());
    or(&mut config.client_connection.accept_content_types, String::new());
    or(&mut config.client_connection.content_type, "application/json".to_owned());
    or(&mut config.client_connection.qps, 5.0);
    or(&mut config.client_connection.burst, 10);
    or(&mut config.logging.format, LogFormat::Text);
    or(&mut config.logging.verbosity, 0);
    or(&mut config.hostname_override, String::new());
    or(&mut config.bind_address, if v6 { Ipv6Addr::UNSPECIFIED.into() } else { Ipv4Addr::UNSPECIFIED.into() });
    let (any, here) = if v6 { ("[::]", "[::1]") } else { ("0.0.0.0", "127.0.0.1") };
    let bind = |host: &str, port: u16| format!("{host}:{port}").parse().unwrap_or(Bind::Off);
    or(&mut config.healthz_bind_address, bind(any, HEALTHZ_PORT));
    or(&mut config.metrics_bind_address, bind(here, METRICS_PORT));
    or(&mut config.bind_address_hard_fail, false);
    or(&mut config.enable_profiling, false);
    or(&mut config.show_hidden_metrics_for_version, String::new());
    or(&mut config.mode, Mode::Nftables);
    or(&mut config.iptables.masquerade_bit, 14);
    or(&mut config.iptables.masquerade_all, false);
    or(&mut config.iptables.localhost_node_ports, true);
    or(&mut config.iptables.sync_period, seconds(30));
    or(&mut config.iptables.min_sync_period, Span::default());
    or(&mut config.nftables.masquerade_bit, 14);
    or(&mut config.nftables.masquerade_all, false);
    or(&mut config.nftables.sync_period, seconds(30));
    or(&mut config.nftables.min_sync_period, Span::default());
    or(&mut config.ipvs.sync_period, seconds(30));
    or(&mut config.ipvs.min_sync_period, Span::default());
    or(&mut config.ipvs.scheduler, String::new());
    or(&mut config.ipvs.exclude_cidrs, Vec::new());
    or(&mut config.ipvs.strict_arp, false);
    or(&mut config.ipvs.tcp_timeout, Span::default());
    or(&mut config.ipvs.tcp_fin_timeout, Span::default());
    or(&mut config.ipvs.udp_timeout, Span::default());
    or(&mut config.winkernel.network_name, String::new());
    or(&mut config.winkernel.source_vip, String::new());
    or(&mut config.winkernel.enable_dsr, false);
    or(&mut config.winkernel.root_hns_endpoint_name, String::new());
    or(&mut config.winkernel.forward_health_check_vip, false);
    or(&mut config.detect_local_mode, LocalMode::ClusterCidr);
    or(&mut config.detect_local.bridge_interface, String::new());
    or(&mut config.detect_local.interface_name_prefix, String::new());
    if config.node_port_addresses.as_ref().is_none_or(Vec::is_empty) {
        config.node_port_addresses = Some(vec![NodePorts(proxy_core::policy::NodePortAddresses::Primary)]);
    }
    or(&mut config.conntrack.max_per_core, 32_768);
    or(&mut config.conntrack.min, 131_072);
    or(&mut config.conntrack.tcp_established_timeout, seconds(86_400));
    or(&mut config.conntrack.tcp_close_wait_timeout, seconds(3_600));
    or(&mut config.conntrack.tcp_be_liberal, false);
    or(&mut config.conntrack.udp_timeout, Span::default());
    or(&mut config.conntrack.udp_stream_timeout, Span::default());
    or(&mut config.config_sync_period, seconds(900));
    or(&mut config.port_range, String::new());
    or(&mut config.windows_run_as_service, false);
    config
}
