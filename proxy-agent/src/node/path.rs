//! Which way packets of a pod interface may take, and whose traffic control programs are on it.

use proxy_core::event::LinkPath;

use super::wire::{Filter, Link};

/// Tells whether an interface carries tcx programs that are not ours. Netlink does not show them; who attaches ours
/// can ask the kernel with `BPF_PROG_QUERY`.
pub trait ForeignTcx: Send + 'static {
    /// Is there a tcx program of somebody else on this interface?
    fn is_present(&self, ifindex: u32) -> bool;
}

impl<F: Fn(u32) -> bool + Send + 'static> ForeignTcx for F {
    fn is_present(&self, ifindex: u32) -> bool {
        self(ifindex)
    }
}

/// Is a `bpf` filter of this name (`TCA_BPF_NAME`) one of ours?
pub fn is_ours(name: &str) -> bool {
    ["proxy_", "from_pod", "to_pod"].iter().any(|prefix| name.starts_with(prefix))
}

/// Is a filter one of somebody else? The head of a list, which the kernel lists too, is no filter.
pub fn is_foreign(filter: &Filter) -> bool {
    filter.handle != 0 && !(filter.kind == "bpf" && filter.name.as_deref().is_some_and(is_ours))
}

/// The way for a pod interface. `foreign`: programs of somebody else are on it.
pub fn path(link: &Link, bridge: Option<&Link>, foreign: bool) -> LinkPath {
    let kept_apart = link.isolated || bridge.is_some_and(|bridge| bridge.vlan_filtering);
    match (kept_apart, foreign, bridge) {
        (true, _, _) | (false, true, None) => LinkPath::Stack,
        (false, true, Some(_)) => LinkPath::Switch,
        (false, false, _) => LinkPath::Redirect,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn foreign_filters() {
        let filter = |handle, kind: &str, name: Option<&str>| {
            is_foreign(&Filter { handle, kind: kind.into(), name: name.map(str::to_owned) })
        };
        let cases = [
            (filter(0, "matchall", None), false, "head of a list"),
            (filter(1, "matchall", None), true, "the bandwidth plugin's mirror"),
            (filter(0x8000_0800, "u32", None), true, "a u32 match"),
            (filter(1, "bpf", Some("from_pod")), false, "ours"),
            (filter(1, "bpf", Some("to_pod")), false, "ours"),
            (filter(1, "bpf", Some("proxy_from_pod")), false, "ours"),
            (filter(1, "bpf", Some("cil_from_container")), true, "another product"),
            (filter(1, "bpf", None), true, "nameless"),
            (filter(1, "flower", Some("from_pod")), true, "our name on another kind"),
        ];
        for (found, expected, case) in cases {
            assert_eq!(found, expected, "{case}");
        }
    }

    #[test]
    fn paths() {
        let plain = Link::default();
        let isolated = Link { isolated: true, ..Link::default() };
        let filtering = Link { vlan_filtering: true, ..Link::default() };
        let cases = [
            (path(&plain, Some(&plain), false), LinkPath::Redirect),
            (path(&plain, None, false), LinkPath::Redirect),
            (path(&plain, Some(&plain), true), LinkPath::Switch),
            (path(&plain, None, true), LinkPath::Stack),
            (path(&isolated, Some(&plain), false), LinkPath::Stack),
            (path(&isolated, Some(&plain), true), LinkPath::Stack),
            (path(&plain, Some(&filtering), false), LinkPath::Stack),
            (path(&plain, Some(&filtering), true), LinkPath::Stack),
        ];
        for (n, (found, expected)) in cases.into_iter().enumerate() {
            assert_eq!(found, expected, "case {n}");
        }
    }
}
