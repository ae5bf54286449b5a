//! Programs that simulated nodes are made with.

use super::apt::Apt;
use super::report::Row;
use crate::process;

/// A program and the Debian package that has it.
const TOOLS: [(&str, &str); 9] = [
    ("ip", "iproute2"),
    ("bridge", "iproute2"),
    ("tc", "iproute2"),
    ("nft", "nftables"),
    ("iptables", "iptables"),
    ("ip6tables", "iptables"),
    ("nsenter", "util-linux"),
    ("ethtool", "ethtool"),
    ("cc", "gcc"),
];

/// Packages of the programs that `present` does not know, each once.
fn lacking(present: impl Fn(&str) -> bool) -> Vec<&'static str> {
    let mut packages: Vec<_> =
        TOOLS.iter().filter(|(program, _)| !present(program)).map(|(_, package)| *package).collect();
    packages.dedup();
    packages
}

/// Finds or installs them.
pub(super) fn provide(apt: Option<&Apt>) -> Row {
    const WHAT: &str = "network tools, C compiler";
    let missing = || lacking(|program| process::find(program).is_some());
    let packages = missing();
    if packages.is_empty() {
        return Row::present(WHAT, "");
    }
    let advice = format!("install {}", packages.join(" "));
    let Some(apt) = apt else { return Row::missing(WHAT, &advice) };
    match apt.install(&packages) {
        Ok(()) if missing().is_empty() => Row::installed(WHAT, &format!("apt: {}", packages.join(" "))),
        Ok(()) => Row::missing(WHAT, &format!("install {}", missing().join(" "))),
        Err(error) => Row::missing(WHAT, &format!("{error:#}\n{advice}")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_lacking_package_is_named_once() {
        assert_eq!(lacking(|_| true), Vec::<&str>::new());
        assert_eq!(lacking(|program| !["ip", "tc", "bridge", "nft"].contains(&program)), ["iproute2", "nftables"]);
    }
}
