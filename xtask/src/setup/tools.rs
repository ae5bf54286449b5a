//! Programs that simulated nodes, and machines with other kernels, are made with.

use super::apt::Apt;
use super::report::Row;
use crate::process;

/// Programs, each with the Debian package that has it, and what they are together.
pub(super) struct Tools {
    what: &'static str,
    programs: &'static [(&'static str, &'static str)],
}

/// For simulated nodes.
pub(super) const NODE: Tools = Tools {
    what: "network tools, C compiler",
    programs: &[
        ("ip", "iproute2"),
        ("bridge", "iproute2"),
        ("tc", "iproute2"),
        ("nft", "nftables"),
        ("iptables", "iptables"),
        ("ip6tables", "iptables"),
        ("nsenter", "util-linux"),
        ("ethtool", "ethtool"),
        ("bpftool", "bpftool"),
        ("sysctl", "procps"),
        ("cc", "gcc"),
    ],
};

/// For machines with other kernels.
pub(super) const MACHINE: Tools = Tools {
    what: "qemu, kernel modules",
    programs: &[
        ("qemu-system-x86_64", "qemu-system-x86"),
        ("busybox", "busybox-static"),
        ("depmod", "kmod"),
        ("modprobe", "kmod"),
        ("xz", "xz-utils"),
    ],
};

impl Tools {
    /// Packages of the programs that `present` does not know, each once.
    fn lacking(&self, present: impl Fn(&str) -> bool) -> Vec<&'static str> {
        let mut packages: Vec<_> =
            self.programs.iter().filter(|(program, _)| !present(program)).map(|(_, package)| *package).collect();
        packages.dedup();
        packages
    }

    /// Finds or installs them.
    pub(super) fn provide(&self, apt: Option<&Apt>) -> Row {
        let missing = || self.lacking(|program| process::find(program).is_some());
        let packages = missing();
        if packages.is_empty() {
            return Row::present(self.what, "");
        }
        let advice = format!("install {}", packages.join(" "));
        let Some(apt) = apt else { return Row::missing(self.what, &advice) };
        match apt.install(&packages) {
            Ok(()) if missing().is_empty() => Row::installed(self.what, &format!("apt: {}", packages.join(" "))),
            Ok(()) => Row::missing(self.what, &format!("install {}", missing().join(" "))),
            Err(error) => Row::missing(self.what, &format!("{error:#}\n{advice}")),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_lacking_package_is_named_once() {
        assert_eq!(NODE.lacking(|_| true), Vec::<&str>::new());
        assert_eq!(NODE.lacking(|program| !["ip", "tc", "bridge", "nft"].contains(&program)), ["iproute2", "nftables"]);
    }
}
