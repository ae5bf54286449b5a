//! What a test needs, and so how it is run.

use std::fmt;

use clap::ValueEnum;

/// From the cheapest to the dearest; they run in this order.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, ValueEnum)]
pub(crate) enum Level {
    /// Functions, tables, properties, golden scenarios: needs nothing.
    Unit,
    /// Programs in the kernel, fed with single packets.
    Packet,
    /// Simulated nodes: what is none of the following.
    Node,
    /// Connections between namespaces.
    Traffic,
    /// kill -9 and upgrade under traffic.
    Restart,
    /// A real kube-apiserver and etcd.
    Kube,
}

/// Names of test files that need no root although they lie beside those that do.
const UNPRIVILEGED: [&str; 6] = ["abi", "scenario", "manifest", "deploy", "cli", "k8s"];

impl Level {
    pub(crate) const ALL: [Self; 6] = [Self::Unit, Self::Packet, Self::Node, Self::Traffic, Self::Restart, Self::Kube];

    /// The level of an integration test file: by the beginning of its name, else by its package. What is not known
    /// runs as root with one thread, which is right for every test.
    pub(crate) fn of_file(package: &str, name: &str) -> Self {
        let named = [
            ("packet", Self::Packet),
            ("traffic", Self::Traffic),
            ("restart", Self::Restart),
            ("upgrade", Self::Restart),
            ("kube", Self::Kube),
        ];
        if let Some((_, level)) = named.iter().find(|(beginning, _)| name.starts_with(beginning)) {
            return *level;
        }
        let unprivileged = UNPRIVILEGED.iter().any(|beginning| name.starts_with(beginning));
        let with_nodes = ["proxy-agent", "proxy-tests"].contains(&package);
        if with_nodes && !unprivileged { Self::Node } else { Self::Unit }
    }

    /// The level of the tests beside the code. Those of the simulator make namespaces.
    pub(crate) fn of_library(package: &str) -> Self {
        if package == "proxy-tests" { Self::Node } else { Self::Unit }
    }

    pub(crate) fn needs_root(self) -> bool {
        self != Self::Unit
    }

    /// Whether it is an error that there is no test of this level.
    pub(crate) fn is_expected(self) -> bool {
        self != Self::Node
    }
}

impl fmt::Display for Level {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Unit => "unit",
            Self::Packet => "packet",
            Self::Node => "node",
            Self::Traffic => "traffic",
            Self::Restart => "restart",
            Self::Kube => "kube",
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn level_follows_from_package_and_file_name() {
        let cases = [
            ("proxy-tests", "packets", Level::Packet),
            ("proxy-tests", "traffic_matrix", Level::Traffic),
            ("proxy-tests", "restart", Level::Restart),
            ("proxy-tests", "upgrade", Level::Restart),
            ("proxy-tests", "kube_watch", Level::Kube),
            ("proxy-tests", "scenarios", Level::Unit),
            ("proxy-tests", "simulator", Level::Node),
            ("proxy-agent", "node_netlink", Level::Node),
            ("proxy-agent", "k8s_convert", Level::Unit),
            ("proxy-core", "properties", Level::Unit),
            ("proxy-abi", "abi", Level::Unit),
        ];
        let found = cases.map(|(package, name, _)| Level::of_file(package, name));
        assert_eq!(found, cases.map(|(_, _, level)| level));
        assert_eq!((Level::of_library("proxy-tests"), Level::of_library("proxy-agent")), (Level::Node, Level::Unit));
    }
}
