//! `KubeProxyConfiguration`, version `kubeproxy.config.k8s.io/v1alpha1`, read strictly.
//!
//! Every field may be left out, be `null`, or (where it is a text) be empty: kubeadm writes all of them so.

use std::collections::BTreeMap;
use std::fmt;
use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::{fs, io};

use serde::{Deserialize, Serialize};

use super::value::{Bind, ClusterCidrs, LocalMode, LogFormat, Mode, NodePorts, Span, optional, section};

/// `apiVersion` of the file.
pub const API_VERSION: &str = "kubeproxy.config.k8s.io/v1alpha1";
/// `kind` of the file.
pub const KIND: &str = "KubeProxyConfiguration";

/// Declares a section: all fields optional, unknown ones refused.
macro_rules! sections {
    ($( $(#[$meta:meta])* pub struct $name:ident { $( $(#[$fmeta:meta])* pub $field:ident : $type:ty ),+ $(,)? } )+) => { $(
        $(#[$meta])*
        #[derive(Clone, Debug, Default, PartialEq, Deserialize, Serialize)]
        #[serde(default, deny_unknown_fields, rename_all = "camelCase")]
        #[expect(missing_docs, reason = "the fields are kube-proxy's own, documented by Kubernetes")]
        pub struct $name { $( $(#[$fmeta])* pub $field: $type ),+ }
    )+ };
}

sections! {
    /// The whole file. `None` is "not given".
    pub struct KubeProxyConfiguration {
        pub api_version: String,
        pub kind: String,
        pub feature_gates: Option<BTreeMap<String, bool>>,
        #[serde(deserialize_with = "section")]
        pub client_connection: ClientConnection,
        #[serde(deserialize_with = "section")]
        pub logging: Logging,
        pub hostname_override: Option<String>,
        #[serde(deserialize_with = "address")]
        pub bind_address: Option<IpAddr>,
        #[serde(deserialize_with = "optional")]
        pub healthz_bind_address: Option<Bind>,
        #[serde(deserialize_with = "optional")]
        pub metrics_bind_address: Option<Bind>,
        pub bind_address_hard_fail: Option<bool>,
        pub enable_profiling: Option<bool>,
        pub show_hidden_metrics_for_version: Option<String>,
        #[serde(deserialize_with = "optional")]
        pub mode: Option<Mode>,
        #[serde(deserialize_with = "section")]
        pub iptables: Iptables,
        #[serde(deserialize_with = "section")]
        pub ipvs: Ipvs,
        #[serde(deserialize_with = "section")]
        pub nftables: Nftables,
        #[serde(deserialize_with = "section")]
        pub winkernel: Winkernel,
        #[serde(deserialize_with = "optional")]
        pub detect_local_mode: Option<LocalMode>,
        #[serde(deserialize_with = "section")]
        pub detect_local: DetectLocal,
        #[serde(rename = "clusterCIDR", deserialize_with = "optional")]
        pub cluster_cidr: Option<ClusterCidrs>,
        pub node_port_addresses: Option<Vec<NodePorts>>,
        pub oom_score_adj: Option<i32>,
        #[serde(deserialize_with = "section")]
        pub conntrack: Conntrack,
        pub config_sync_period: Option<Span>,
        pub port_range: Option<String>,
        pub windows_run_as_service: Option<bool>,
    }

    /// `clientConnection`.
    pub struct ClientConnection {
        pub kubeconfig: Option<String>,
        pub accept_content_types: Option<String>,
        pub content_type: Option<String>,
        pub qps: Option<f32>,
        pub burst: Option<i32>,
    }

    /// `logging`.
    pub struct Logging {
        #[serde(deserialize_with = "optional")]
        pub format: Option<LogFormat>,
        pub flush_frequency: Option<serde_json::Value>,
        pub verbosity: Option<u32>,
        pub vmodule: Option<serde_json::Value>,
        pub options: Option<serde_json::Value>,
    }

    /// `iptables`.
    pub struct Iptables {
        pub masquerade_bit: Option<i32>,
        pub masquerade_all: Option<bool>,
        pub localhost_node_ports: Option<bool>,
        pub sync_period: Option<Span>,
        pub min_sync_period: Option<Span>,
    }

    /// `nftables`.
    pub struct Nftables {
        pub masquerade_bit: Option<i32>,
        pub masquerade_all: Option<bool>,
        pub sync_period: Option<Span>,
        pub min_sync_period: Option<Span>,
    }

    /// `ipvs`.
    pub struct Ipvs {
        pub sync_period: Option<Span>,
        pub min_sync_period: Option<Span>,
        pub scheduler: Option<String>,
        #[serde(rename = "excludeCIDRs")]
        pub exclude_cidrs: Option<Vec<String>>,
        #[serde(rename = "strictARP")]
        pub strict_arp: Option<bool>,
        pub tcp_timeout: Option<Span>,
        pub tcp_fin_timeout: Option<Span>,
        pub udp_timeout: Option<Span>,
    }

    /// `winkernel`.
    pub struct Winkernel {
        pub network_name: Option<String>,
        pub source_vip: Option<String>,
        #[serde(rename = "enableDSR")]
        pub enable_dsr: Option<bool>,
        pub root_hns_endpoint_name: Option<String>,
        pub forward_health_check_vip: Option<bool>,
    }

    /// `detectLocal`.
    pub struct DetectLocal {
        pub bridge_interface: Option<String>,
        pub interface_name_prefix: Option<String>,
    }

    /// `conntrack`.
    pub struct Conntrack {
        pub max_per_core: Option<i32>,
        pub min: Option<i32>,
        pub tcp_established_timeout: Option<Span>,
        pub tcp_close_wait_timeout: Option<Span>,
        pub tcp_be_liberal: Option<bool>,
        pub udp_timeout: Option<Span>,
        pub udp_stream_timeout: Option<Span>,
    }
}

fn address<'de, D: serde::Deserializer<'de>>(deserializer: D) -> Result<Option<IpAddr>, D::Error> {
    match Option::<String>::deserialize(deserializer)? {
        Some(text) if !text.is_empty() => {
            text.parse().map(Some).map_err(|_| serde::de::Error::custom(format_args!("{text:?} is no IP address")))
        }
        _ => Ok(None),
    }
}

/// Why a configuration is refused.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// It cannot be read.
    #[error("{}: {cause}", .path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// Why.
        cause: io::Error,
    },
    /// Something in it is wrong.
    #[error("{place}: {problem}")]
    Wrong {
        /// Where.
        place: Place,
        /// What is wrong, and what to write.
        problem: String,
    },
}

/// A place in a configuration. Shown as `FILE:LINE:COLUMN: FIELD`, without what is not known.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Place {
    /// The file; `None` when a flag said it.
    pub file: Option<PathBuf>,
    /// Line and column, counted from 1.
    pub at: Option<(u64, u64)>,
    /// The field, as in `conntrack.udpTimeout`; empty for the whole.
    pub field: String,
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match (&self.file, self.at) {
            (Some(file), Some((line, column))) => write!(f, "{}:{line}:{column}", file.display())?,
            (Some(file), None) => write!(f, "{}", file.display())?,
            (None, _) => f.write_str("configuration")?,
        }
        if self.field.is_empty() { Ok(()) } else { write!(f, ": {}", self.field) }
    }
}

/// A file that was read: what it says, and its text.
#[derive(Clone, Debug)]
pub struct ConfigFile {
    /// Its path.
    pub path: PathBuf,
    /// Its content.
    pub text: String,
    /// What it says.
    pub config: KubeProxyConfiguration,
}

impl ConfigFile {
    /// Reads a file.
    pub fn read(path: &Path) -> Result<Self, ConfigError> {
        let text = fs::read_to_string(path).map_err(|cause| ConfigError::Read { path: path.to_owned(), cause })?;
        let config = KubeProxyConfiguration::parse(path, &text)?;
        Ok(Self { path: path.to_owned(), text, config })
    }

    /// Where a field stands.
    pub fn place(&self, field: &str) -> Place {
        Place { file: Some(self.path.clone()), at: position(&self.text, field), field: field.to_owned() }
    }
}

impl KubeProxyConfiguration {
    /// Reads the text of a file. Anything that is not understood is an error: a misspelt field would be a setting that
    /// silently has no effect.
    pub fn parse(path: &Path, text: &str) -> Result<Self, ConfigError> {
        let options = serde_saphyr::options! { strict_booleans: true, with_snippet: false };
        let mut field = String::new();
        let read = serde_saphyr::with_deserializer_from_str_with_options(text, options, |deserializer| {
            let mut track = serde_path_to_error::Track::new();
            let read = Self::deserialize(serde_path_to_error::Deserializer::new(deserializer, &mut track));
            if read.is_err() {
                let path = track.path().to_string();
                // A part that is not known is shown as a question mark.
                path.trim_end_matches('?').trim_end_matches('.').clone_into(&mut field);
            }
            read
        });
        let place = |at, field| Place { file: Some(path.to_owned()), at, field };
        let config = read.map_err(|error| {
            let error = error.without_snippet();
            let at = error.location().map(|at| (at.line(), at.column())).filter(|(line, _)| *line > 0);
            ConfigError::Wrong { place: place(at, field), problem: message(error) }
        })?;
        let wrong = |field: &str, was: &str, want: &str| ConfigError::Wrong {
            place: place(position(text, field), field.to_owned()),
            problem: format!("{was:?} is not what this agent reads; write {want}"),
        };
        if config.api_version != API_VERSION {
            return Err(wrong("apiVersion", &config.api_version, API_VERSION));
        }
        if config.kind != KIND {
            return Err(wrong("kind", &config.kind, KIND));
        }
        Ok(config)
    }
}

/// The error alone: its place is told beside it.
fn message(error: &serde_saphyr::Error) -> String {
    let text = error.to_string();
    let first = text.lines().next().unwrap_or_default();
    // The reader's own advice is for programmers.
    let cut = [" at line ", ", set DuplicateKeyPolicy"].iter().filter_map(|end| first.find(end)).min();
    first[..cut.unwrap_or(first.len())].trim_end_matches(',').to_owned()
}

/// Line and column of a key, by its indentation: for what is found wrong after reading.
fn position(text: &str, field: &str) -> Option<(u64, u64)> {
    let mut wanted = field.split(['.', '[']);
    let mut name = wanted.next()?;
    let mut depth = 0;
    for (line, number) in text.lines().zip(1_u64..) {
        let indent = line.len() - line.trim_start().len();
        let key = line.trim_start().split(':').next().unwrap_or_default();
        if key.trim_matches('"') != name || (depth == 0) != (indent == 0) {
            continue;
        }
        match wanted.next() {
            Some(next) if !next.ends_with(']') => {
                name = next;
                depth += 1;
            }
            _ => return Some((number, u64::try_from(indent).unwrap_or_default() + 1)),
        }
    }
    None
}
