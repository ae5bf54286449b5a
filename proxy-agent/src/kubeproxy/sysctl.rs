//! The settings of the kernel's own connection tracking that kube-proxy makes (`cmd/kube-proxy/app/conntrack.go`): for
//! what still passes it, above all pods that talk to the outside. Only where asked for, with the directory that holds
//! them: a container sees its own `/proc/sys` read-only.
//!
//! ```text
//!   nf_conntrack_max                      larger of maxPerCore × cores and min, never less than it is
//!   nf_conntrack_tcp_timeout_established  tcpEstablishedTimeout   24 h
//!   nf_conntrack_tcp_timeout_close_wait   tcpCloseWaitTimeout      1 h
//!   nf_conntrack_tcp_be_liberal           1 when tcpBeLiberal
//!   nf_conntrack_udp_timeout(_stream)     udpTimeout, udpStreamTimeout when not 0
//! ```

use std::fs;
use std::path::Path;

use super::Settings;

/// A setting that is to have a value.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Wanted {
    /// Name of its file.
    pub name: &'static str,
    /// Value.
    pub value: u64,
    /// A higher value that is there stays.
    pub at_least: bool,
}

/// What `settings` ask for.
pub fn wanted(settings: &Settings) -> Vec<Wanted> {
    let conntrack = &settings.effective.conntrack;
    let exact = |name, value| Wanted { name, value, at_least: false };
    let mut all = vec![
        exact("nf_conntrack_tcp_timeout_established", settings.timeouts.established.as_secs()),
        exact("nf_conntrack_tcp_timeout_close_wait", settings.timeouts.half_closed.as_secs()),
    ];
    if let Some(flows) = settings.flows {
        all.push(Wanted { name: "nf_conntrack_max", value: flows.into(), at_least: true });
    }
    if conntrack.tcp_be_liberal == Some(true) {
        all.push(exact("nf_conntrack_tcp_be_liberal", 1));
    }
    let spans = [
        ("nf_conntrack_udp_timeout", conntrack.udp_timeout),
        ("nf_conntrack_udp_timeout_stream", conntrack.udp_stream_timeout),
    ];
    all.extend(spans.into_iter().filter_map(|(name, span)| {
        let seconds = span.map(|span| span.0.as_secs()).filter(|seconds| *seconds > 0)?;
        Some(exact(name, seconds))
    }));
    all
}

/// Writes them where they differ. What cannot be written is said, and is no reason not to run.
pub fn apply(directory: &Path, wanted: &[Wanted]) {
    for Wanted { name, value, at_least } in wanted {
        let path = directory.join(name);
        let is = match fs::read_to_string(&path) {
            Ok(text) => text.trim().parse::<u64>().ok(),
            Err(error) => {
                tracing::warn!(path = %path.display(), %error, "a setting of conntrack cannot be read");
                continue;
            }
        };
        if is == Some(*value) || *at_least && is.is_some_and(|is| is > *value) {
            continue;
        }
        match fs::write(&path, value.to_string()) {
            Ok(()) => tracing::info!(name, was = is, value, "a setting of conntrack, as kube-proxy makes it"),
            Err(error) => {
                tracing::warn!(path = %path.display(), value, %error, "a setting of conntrack cannot be written");
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;
    use crate::kubeproxy::{Flags, KubeProxyConfiguration};

    fn settings(yaml: &str) -> Settings {
        let header = "apiVersion: kubeproxy.config.k8s.io/v1alpha1\nkind: KubeProxyConfiguration\n";
        let path = std::env::temp_dir().join(format!("conntrack-{}-{}", std::process::id(), yaml.len()));
        fs::write(&path, format!("{header}{yaml}")).unwrap();
        let file = crate::kubeproxy::config::ConfigFile::read(&path).unwrap();
        fs::remove_file(&path).unwrap();
        let _: &KubeProxyConfiguration = &Settings::new(Some(&file), &Flags::default(), None).unwrap().0.effective;
        Settings::new(Some(&file), &Flags::default(), None).unwrap().0
    }

    #[test]
    fn only_what_differs_is_written_and_the_limit_is_never_lowered() {
        let directory = std::env::temp_dir().join(format!("conntrack-settings-{}", std::process::id()));
        fs::create_dir_all(&directory).unwrap();
        let files = [
            ("nf_conntrack_tcp_timeout_established", "432000\n"),
            ("nf_conntrack_tcp_timeout_close_wait", "60\n"),
            ("nf_conntrack_max", "1000000\n"),
            ("nf_conntrack_udp_timeout", "30\n"),
        ];
        for (name, text) in files {
            fs::write(directory.join(name), text).unwrap();
        }
        apply(
            &directory,
            &wanted(&settings("conntrack: {maxPerCore: 1, min: 2000, udpTimeout: 10s, tcpBeLiberal: true}\n")),
        );
        let now: BTreeMap<String, String> = fs::read_dir(&directory)
            .unwrap()
            .map(|entry| entry.unwrap().path())
            .map(|path| (path.file_name().unwrap().to_string_lossy().into_owned(), fs::read_to_string(&path).unwrap()))
            .collect();
        fs::remove_dir_all(&directory).unwrap();
        let expected = [
            ("nf_conntrack_tcp_timeout_established", "86400"),
            ("nf_conntrack_tcp_timeout_close_wait", "3600"),
            ("nf_conntrack_max", "1000000\n"),
            ("nf_conntrack_udp_timeout", "10"),
        ];
        assert_eq!(now, expected.map(|(name, text)| (name.to_owned(), text.to_owned())).into());
    }
}
