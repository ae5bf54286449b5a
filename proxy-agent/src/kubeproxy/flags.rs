//! kube-proxy's flags, under their own names. What a flag says wins over the file.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::path::PathBuf;

use clap::Args;

use super::config::KubeProxyConfiguration;
use super::value::{Bind, ClusterCidrs, LocalMode, LogFormat, Mode, NodePorts, Span};

/// kube-proxy's flags. `None` is "not given".
#[derive(Clone, Debug, Default, Args)]
#[command(next_help_heading = "As kube-proxy")]
#[expect(missing_docs, reason = "the doc comments are the help texts; hidden flags are named by their warning")]
pub struct Flags {
    /// File with a KubeProxyConfiguration (kubeproxy.config.k8s.io/v1alpha1). Flags win over it. When it changes, the
    /// agent ends with exit code 0 to be started again; a file that is wrong changes nothing.
    #[arg(long, value_name = "FILE")]
    pub config: Option<PathBuf>,
    /// Kubeconfig file, for --source kube outside of a pod.
    #[arg(long, value_name = "FILE")]
    pub kubeconfig: Option<PathBuf>,
    /// URL of the API server; wins over the kubeconfig's and over --apiserver.
    #[arg(long, value_name = "URL")]
    pub master: Option<String>,
    /// Name of this node's Node object; wins over --node-name.
    #[arg(long, value_name = "NAME")]
    pub hostname_override: Option<String>,
    /// Events a second that may be written to the API server, on the average.
    #[arg(long, value_name = "N")]
    pub kube_api_qps: Option<f32>,
    /// Events that may be written at once.
    #[arg(long, value_name = "N")]
    pub kube_api_burst: Option<i32>,
    #[arg(long, hide = true)]
    pub kube_api_content_type: Option<String>,
    /// Family of the servers' default addresses. The node's own addresses come from its Node object.
    #[arg(long, value_name = "IP")]
    pub bind_address: Option<IpAddr>,
    /// Address of the health server (/healthz, /livez, /readyz): IP:PORT, IP or none [default: 0.0.0.0:10256]
    #[arg(long, value_name = "ADDRESS")]
    pub healthz_bind_address: Option<Bind>,
    /// Address of the metrics server (/metrics, /proxyMode, /configz): IP:PORT, IP or none [default: 127.0.0.1:10249]
    #[arg(long, value_name = "ADDRESS")]
    pub metrics_bind_address: Option<Bind>,
    /// End when one of the two cannot be bound; else it is tried again.
    #[arg(long, num_args = 0..=1, require_equals = true, default_missing_value = "true", value_name = "BOOL")]
    pub bind_address_hard_fail: Option<bool>,
    /// Addresses of the node that serve NodePorts: CIDRs, primary, localhost, all; with commas [default: primary]
    #[arg(long, value_delimiter = ',', value_name = "LIST", visible_alias = "node-port-addresses")]
    pub nodeport_addresses: Option<Vec<NodePorts>>,
    /// NodePorts on 127.0.0.1 and ::1 for processes of the node [default: true]
    #[arg(long, num_args = 0..=1, require_equals = true, default_missing_value = "true", value_name = "BOOL")]
    pub iptables_localhost_nodeports: Option<bool>,
    /// Ranges of the cluster's pods: one of each family at most.
    #[arg(long, value_name = "CIDR[,CIDR]")]
    pub cluster_cidr: Option<ClusterCidrs>,
    /// How traffic of pods that comes from outside the node is known: ClusterCIDR, NodeCIDR, BridgeInterface or
    /// InterfaceNamePrefix. Pods of this node are known by their interfaces in any case.
    #[arg(long, value_name = "MODE")]
    pub detect_local_mode: Option<LocalMode>,
    /// For --detect-local-mode BridgeInterface.
    #[arg(long, value_name = "NAME")]
    pub pod_bridge_interface: Option<String>,
    /// For --detect-local-mode InterfaceNamePrefix.
    #[arg(long, value_name = "PREFIX")]
    pub pod_interface_name_prefix: Option<String>,
    /// Make the source of all traffic to Services an address of the node.
    #[arg(long, num_args = 0..=1, require_equals = true, default_missing_value = "true", value_name = "BOOL")]
    pub masquerade_all: Option<bool>,
    /// What /proxyMode answers, and whose section of the file counts: iptables, ipvs or nftables. There is one dataplane.
    #[arg(long, value_name = "MODE")]
    pub proxy_mode: Option<Mode>,
    /// Half the time that a change may wait to be written before /healthz says 503 [default: 30s]
    #[arg(long, value_name = "TIME")]
    pub iptables_sync_period: Option<Span>,
    /// At least this long between two changes of the maps; without it every change is written at once.
    #[arg(long, value_name = "TIME")]
    pub iptables_min_sync_period: Option<Span>,
    #[arg(long, hide = true)]
    pub iptables_masquerade_bit: Option<i32>,
    #[arg(long, hide = true)]
    pub ipvs_sync_period: Option<Span>,
    #[arg(long, hide = true)]
    pub ipvs_min_sync_period: Option<Span>,
    #[arg(long, hide = true)]
    pub ipvs_scheduler: Option<String>,
    #[arg(long, hide = true, value_delimiter = ',')]
    pub ipvs_exclude_cidrs: Option<Vec<String>>,
    #[arg(long, hide = true, num_args = 0..=1, require_equals = true, default_missing_value = "true")]
    pub ipvs_strict_arp: Option<bool>,
    #[arg(long, hide = true)]
    pub ipvs_tcp_timeout: Option<Span>,
    #[arg(long, hide = true)]
    pub ipvs_tcpfin_timeout: Option<Span>,
    #[arg(long, hide = true)]
    pub ipvs_udp_timeout: Option<Span>,
    /// Flows for each CPU that the flow table has room for.
    #[arg(long, value_name = "N")]
    pub conntrack_max_per_core: Option<i32>,
    /// Flows that the flow table has room for, at least.
    #[arg(long, value_name = "N")]
    pub conntrack_min: Option<i32>,
    /// How long an established TCP connection may be idle [default: 24h]
    #[arg(long, value_name = "TIME")]
    pub conntrack_tcp_timeout_established: Option<Span>,
    /// How long a TCP connection that one side has closed may be idle [default: 1h]
    #[arg(long, value_name = "TIME")]
    pub conntrack_tcp_timeout_close_wait: Option<Span>,
    #[arg(long, hide = true, num_args = 0..=1, require_equals = true, default_missing_value = "true")]
    pub conntrack_tcp_be_liberal: Option<bool>,
    #[arg(long, hide = true)]
    pub conntrack_udp_timeout: Option<Span>,
    #[arg(long, hide = true)]
    pub conntrack_udp_timeout_stream: Option<Span>,
    /// oom_score_adj of this process, from -1000 to 1000; lowering it needs CAP_SYS_RESOURCE.
    #[arg(long, value_name = "N", allow_hyphen_values = true)]
    pub oom_score_adj: Option<i32>,
    #[arg(long, hide = true, num_args = 0..=1, require_equals = true, default_missing_value = "true")]
    pub profiling: Option<bool>,
    #[arg(long, hide = true)]
    pub config_sync_period: Option<Span>,
    #[arg(long, hide = true)]
    pub show_hidden_metrics_for_version: Option<String>,
    /// Feature gates: `AllowServiceExternalIPs=false` turns externalIPs off, others have no effect.
    #[arg(long, value_delimiter = ',', value_parser = gate, value_name = "NAME=BOOL")]
    pub feature_gates: Option<Vec<(String, bool)>>,
    /// Log lines for people or for programs: text or json.
    #[arg(long, value_name = "FORMAT", visible_alias = "log-format")]
    pub logging_format: Option<LogFormat>,
    /// How much to log: 0 to 3 as usual, 4 and 5 for finding errors, 6 and above everything. RUST_LOG wins.
    #[arg(short, long = "v", value_name = "LEVEL")]
    pub verbosity: Option<u32>,
    #[arg(long, hide = true)]
    pub vmodule: Option<String>,
    #[arg(long, hide = true)]
    pub log_flush_frequency: Option<String>,
}

fn gate(text: &str) -> Result<(String, bool), String> {
    let (name, value) = text.split_once('=').ok_or_else(|| format!("{text:?}: write NAME=true or NAME=false"))?;
    let value = value.parse().map_err(|_| format!("{text:?}: write NAME=true or NAME=false"))?;
    Ok((name.to_owned(), value))
}

impl Flags {
    /// Puts what was given over what the file says.
    pub fn apply(&self, config: &mut KubeProxyConfiguration) {
        // Named one by one: a flag that nobody uses does not compile.
        let Self {
            config: _,
            kubeconfig,
            // Not of the file: see `Settings`.
            master: _,
            hostname_override,
            kube_api_qps,
            kube_api_burst,
            kube_api_content_type,
            bind_address,
            healthz_bind_address,
            metrics_bind_address,
            bind_address_hard_fail,
            nodeport_addresses,
            iptables_localhost_nodeports,
            cluster_cidr,
            detect_local_mode,
            pod_bridge_interface,
            pod_interface_name_prefix,
            masquerade_all,
            proxy_mode,
            iptables_sync_period,
            iptables_min_sync_period,
            iptables_masquerade_bit,
            ipvs_sync_period,
            ipvs_min_sync_period,
            ipvs_scheduler,
            ipvs_exclude_cidrs,
            ipvs_strict_arp,
            ipvs_tcp_timeout,
            ipvs_tcpfin_timeout,
            ipvs_udp_timeout,
            conntrack_max_per_core,
            conntrack_min,
            conntrack_tcp_timeout_established,
            conntrack_tcp_timeout_close_wait,
            conntrack_tcp_be_liberal,
            conntrack_udp_timeout,
            conntrack_udp_timeout_stream,
            oom_score_adj,
            profiling,
            config_sync_period,
            show_hidden_metrics_for_version,
            feature_gates,
            logging_format,
            verbosity,
            vmodule,
            log_flush_frequency,
        } = self;
        let text = |value: &Option<String>| value.clone().map(serde_json::Value::String);
        over(
            &mut config.client_connection.kubeconfig,
            kubeconfig.as_ref().map(|path| path.display().to_string()).as_ref(),
        );
        over(&mut config.hostname_override, hostname_override.as_ref());
        over(&mut config.client_connection.qps, kube_api_qps.as_ref());
        over(&mut config.client_connection.burst, kube_api_burst.as_ref());
        over(&mut config.client_connection.content_type, kube_api_content_type.as_ref());
        over(&mut config.bind_address, bind_address.as_ref());
        over(&mut config.healthz_bind_address, healthz_bind_address.as_ref());
        over(&mut config.metrics_bind_address, metrics_bind_address.as_ref());
        over(&mut config.bind_address_hard_fail, bind_address_hard_fail.as_ref());
        over(&mut config.node_port_addresses, nodeport_addresses.as_ref());
        over(&mut config.iptables.localhost_node_ports, iptables_localhost_nodeports.as_ref());
        over(&mut config.cluster_cidr, cluster_cidr.as_ref());
        over(&mut config.detect_local_mode, detect_local_mode.as_ref());
        over(&mut config.detect_local.bridge_interface, pod_bridge_interface.as_ref());
        over(&mut config.detect_local.interface_name_prefix, pod_interface_name_prefix.as_ref());
        over(&mut config.iptables.masquerade_all, masquerade_all.as_ref());
        over(&mut config.nftables.masquerade_all, masquerade_all.as_ref());
        over(&mut config.mode, proxy_mode.as_ref());
        over(&mut config.iptables.sync_period, iptables_sync_period.as_ref());
        over(&mut config.nftables.sync_period, iptables_sync_period.as_ref());
        over(&mut config.iptables.min_sync_period, iptables_min_sync_period.as_ref());
        over(&mut config.nftables.min_sync_period, iptables_min_sync_period.as_ref());
        over(&mut config.iptables.masquerade_bit, iptables_masquerade_bit.as_ref());
        over(&mut config.ipvs.sync_period, ipvs_sync_period.as_ref());
        over(&mut config.ipvs.min_sync_period, ipvs_min_sync_period.as_ref());
        over(&mut config.ipvs.scheduler, ipvs_scheduler.as_ref());
        over(&mut config.ipvs.exclude_cidrs, ipvs_exclude_cidrs.as_ref());
        over(&mut config.ipvs.strict_arp, ipvs_strict_arp.as_ref());
        over(&mut config.ipvs.tcp_timeout, ipvs_tcp_timeout.as_ref());
        over(&mut config.ipvs.tcp_fin_timeout, ipvs_tcpfin_timeout.as_ref());
        over(&mut config.ipvs.udp_timeout, ipvs_udp_timeout.as_ref());
        over(&mut config.conntrack.max_per_core, conntrack_max_per_core.as_ref());
        over(&mut config.conntrack.min, conntrack_min.as_ref());
        over(&mut config.conntrack.tcp_established_timeout, conntrack_tcp_timeout_established.as_ref());
        over(&mut config.conntrack.tcp_close_wait_timeout, conntrack_tcp_timeout_close_wait.as_ref());
        over(&mut config.conntrack.tcp_be_liberal, conntrack_tcp_be_liberal.as_ref());
        over(&mut config.conntrack.udp_timeout, conntrack_udp_timeout.as_ref());
        over(&mut config.conntrack.udp_stream_timeout, conntrack_udp_timeout_stream.as_ref());
        over(&mut config.oom_score_adj, oom_score_adj.as_ref());
        over(&mut config.enable_profiling, profiling.as_ref());
        over(&mut config.config_sync_period, config_sync_period.as_ref());
        over(&mut config.show_hidden_metrics_for_version, show_hidden_metrics_for_version.as_ref());
        if let Some(gates) = feature_gates {
            let all = config.feature_gates.get_or_insert_with(BTreeMap::new);
            all.extend(gates.iter().cloned());
        }
        over(&mut config.logging.format, logging_format.as_ref());
        over(&mut config.logging.verbosity, verbosity.as_ref());
        over(&mut config.logging.vmodule, text(vmodule).as_ref());
        over(&mut config.logging.flush_frequency, text(log_flush_frequency).as_ref());
    }
}

fn over<T: Clone>(field: &mut Option<T>, flag: Option<&T>) {
    if let Some(flag) = flag {
        *field = Some(flag.clone());
    }
}
