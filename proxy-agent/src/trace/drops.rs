//! Why packets are dropped, in words: class, place and what to do.

use proxy_abi::Reason;

use super::journey::{Decision, Journey, Sight};
use super::kernel::Kernel;

/// Why a packet was dropped.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Cause {
    /// Name: of our reason where a program of ours decided, else of the kernel's.
    pub reason: String,
    /// The kernel's number; 0 where the kernel has not told its part.
    pub code: u32,
    /// Function in the kernel, or the hook of our program.
    pub place: String,
    /// `own-service`, `own-policy`, `netfilter`, `route`, `neigh`, `qdisc`, `l4` or `other`.
    pub class: &'static str,
    /// What to do.
    pub advice: String,
    /// It was decided by a program of ours.
    pub is_ours: bool,
}

/// Reason of the kernel, class, advice.
const KERNEL: [(&str, &str, &str); 36] = [
    (
        "NETFILTER_DROP",
        "netfilter",
        "a rule of netfilter dropped it: `trace hooks` lists who is registered; look for the rule with `nft list ruleset` and `iptables-save -c`",
    ),
    (
        "IP_RPFILTER",
        "route",
        "the reverse path filter: the way back to the source leads out of another device; set net.ipv4.conf.DEV.rp_filter to 2 or 0, or mend the route",
    ),
    ("IP_OUTNOROUTES", "route", "no route to the destination: `ip route get`"),
    (
        "IP_INNOROUTES",
        "route",
        "no route, or forwarding is off: set net.ipv4.ip_forward (net.ipv6.conf.all.forwarding) to 1, or add the route",
    ),
    ("IP_INADDRERRORS", "route", "the address cannot be forwarded here: is net.ipv4.ip_forward 1?"),
    (
        "IP_LOCAL_SOURCE",
        "route",
        "the source is an address of this node, but the packet came from outside: two hosts with one address, or a loop",
    ),
    ("IP_INVALID_SOURCE", "route", "the source is no address that a host can have"),
    ("IP_LOCALNET", "route", "a loopback address on a wire: net.ipv4.conf.DEV.route_localnet is off"),
    ("IP_INVALID_DEST", "route", "the destination is no address that can be forwarded to"),
    ("IPV6DISABLED", "route", "IPv6 is switched off on the device: net.ipv6.conf.DEV.disable_ipv6"),
    (
        "NEIGH_FAILED",
        "neigh",
        "nobody answers for the next hop's address (ARP, neighbour discovery): is the receiver up and on this link?",
    ),
    ("NEIGH_CREATEFAIL", "neigh", "the neighbour table is full: raise net.ipv4.neigh.default.gc_thresh3"),
    (
        "NEIGH_QUEUEFULL",
        "neigh",
        "more packets wait for a neighbour's answer than fit: the receiver does not answer, or slowly",
    ),
    ("NEIGH_DEAD", "neigh", "the neighbour entry was removed meanwhile"),
    (
        "PKT_TOO_BIG",
        "route",
        "bigger than the next link's MTU, and not to be fragmented: make the MTUs equal, or let ICMP through",
    ),
    ("NO_SOCKET", "l4", "nobody listens there: is the process up, and on this port and address?"),
    ("SOCKET_RCVBUFF", "l4", "the receiver's buffer is full: it reads too slowly"),
    ("SOCKET_BACKLOG", "l4", "the receiver is too busy: its backlog is full"),
    ("SOCKET_FILTER", "l4", "a filter on the receiver's socket dropped it"),
    ("PROTO_MEM", "l4", "the protocol's memory is used up: net.ipv4.tcp_mem, udp_mem"),
    ("TCP_LISTEN_OVERFLOW", "l4", "the listener's queue is full: it accepts too slowly, or its backlog is too small"),
    ("TCP_CSUM", "l4", "a wrong TCP checksum: a broken driver or offload, or a faulty translation"),
    ("UDP_CSUM", "l4", "a wrong UDP checksum: a broken driver or offload, or a faulty translation"),
    ("SKB_CSUM", "l4", "a wrong checksum: a broken driver or offload, or a faulty translation"),
    ("TCP_RESET", "l4", "the other end ended the connection"),
    ("TCP_FLAGS", "l4", "TCP flags that do not fit the connection's state"),
    ("TCP_CLOSE", "l4", "the connection is closed"),
    ("TCP_INVALID_SEQUENCE", "l4", "a sequence number outside of the window: of another connection, or much delayed"),
    (
        "TC_INGRESS",
        "other",
        "a program or filter at the device's ingress dropped it: `tc filter show dev DEV ingress`, `bpftool net`",
    ),
    (
        "TC_EGRESS",
        "other",
        "a program or filter at the device's egress dropped it: `tc filter show dev DEV egress`, `bpftool net`",
    ),
    ("BPF_CGROUP_EGRESS", "other", "a program at the sender's cgroup dropped it"),
    ("QDISC_DROP", "qdisc", "the device's queue is full: it is slower than its traffic"),
    ("CPU_BACKLOG", "qdisc", "the CPU's backlog is full: raise net.core.netdev_max_backlog, or spread the load (RPS)"),
    ("FULL_RING", "qdisc", "the device's ring is full: its reader is too slow"),
    ("DEV_READY", "other", "the device is down"),
    ("OTHERHOST", "other", "the frame was for another MAC: a flood, or a stale neighbour entry"),
];

/// Functions whose unspecific drops say enough.
const PLACES: [(&str, &str, &str); 7] = [
    (
        "neigh_invalidate",
        "neigh",
        "nobody answers for the next hop's address (ARP, neighbour discovery): is the receiver up and on this link?",
    ),
    ("ip_forward", "route", "not forwarded: is net.ipv4.ip_forward 1, and the TTL above 1?"),
    ("ip6_forward", "route", "not forwarded: is net.ipv6.conf.all.forwarding 1, and the hop limit above 1?"),
    ("ip_rcv_finish_core", "route", "no route, or a source that cannot come from there"),
    ("ip_error", "route", "no route, or forwarding is off: set net.ipv4.ip_forward to 1, or add the route"),
    ("br_handle_frame_finish", "other", "the bridge's port does not forward: its state, or VLAN filtering"),
    ("nf_hook_slow", "netfilter", "a rule of netfilter dropped it: `trace hooks` lists who is registered"),
];

/// Advice for drops of our own programs.
const OWN: [(Reason, &str, &str); 16] = [
    (
        Reason::NoBackend,
        "own-service",
        "the Service has no ready endpoint: look at its EndpointSlices and the readiness of its pods",
    ),
    (
        Reason::NoLocalBackend,
        "own-service",
        "the traffic policy is Local and no endpoint is on this node: run one here, or use Cluster",
    ),
    (Reason::NoSuchPort, "own-service", "the Service has no such port: compare with spec.ports"),
    (Reason::Unallocated, "own-service", "no Service has this address: an old address in a client's cache?"),
    (Reason::SourceNotAllowed, "own-service", "the client is in no range of loadBalancerSourceRanges"),
    (
        Reason::NoFlow,
        "own-service",
        "a connection that this node does not know: it began before the agent, or has ended; the client must connect anew",
    ),
    (
        Reason::FlowTableFull,
        "own-service",
        "the flow table is full: raise --flow-live-entries and --flow-brief-entries",
    ),
    (
        Reason::PodQuota,
        "own-service",
        "the pod holds as many flows as one may: raise --pod-flow-quota, or mend the pod",
    ),
    (
        Reason::ClashUnresolved,
        "own-service",
        "all ports towards this backend are taken: more backends, or fewer connections",
    ),
    (Reason::NoRoute, "route", "the node has no route to the backend: `ip route get`"),
    (
        Reason::TooBig,
        "route",
        "bigger than the next link carries; the sender is told by ICMP, which must not be filtered",
    ),
    (Reason::FragmentBeforeFirst, "own-service", "fragments out of order: make packets smaller than the MTU"),
    (Reason::BackendMissing, "own-service", "the maps contradict each other: restart the agent, and report this"),
    (Reason::RewriteFailed, "own-service", "the packet could not be written: report this"),
    (
        Reason::FrameSource,
        "own-policy",
        "the pod sends with an address or MAC that is not its own, and policies are in force: it may use what its CNI has recorded",
    ),
    (Reason::RefuseLimited, "own-service", "too many refusals a second: somebody scans, or a Service has no endpoint"),
];

/// Why a dropped packet was dropped: by our decision, if there is one.
pub fn cause(journey: &Journey, kernel: &Kernel) -> Cause {
    let sight = journey.drop_sight(kernel);
    if let Some(decision) = journey.decisions().rev().find(|decision| decision.is_drop()) {
        return own(decision, sight);
    }
    let (code, location) = sight.map_or((0, 0), |sight| (sight.reason, sight.location));
    of_kernel(code, location, kernel)
}

fn own(decision: &Decision, sight: Option<&Sight>) -> Cause {
    let (class, advice) = decision.reason.map_or(("own-policy", ""), own_advice);
    Cause {
        reason: decision.reason_name(),
        code: sight.map_or(0, |sight| sight.reason),
        place: format!("{} at {}", decision.hook.map_or("program", proxy_abi::Hook::name), decision.device),
        class,
        advice: match &decision.rule {
            Some(rule) => format!("{advice}: {rule} (`trace why` tells which rules were near)"),
            None => advice.to_owned(),
        },
        is_ours: true,
    }
}

/// Class of a drop of our programs, and what to do.
pub fn own_advice(reason: Reason) -> (&'static str, &'static str) {
    let known = OWN.iter().find(|(known, _, _)| *known == reason);
    known.map_or(("own-policy", reason.text()), |(_, class, advice)| (*class, *advice))
}

/// A drop of the kernel.
pub fn of_kernel(code: u32, location: u64, kernel: &Kernel) -> Cause {
    let reason = kernel.reason(code);
    let function = kernel.symbols.function(location);
    let known = KERNEL.iter().find(|(name, _, _)| *name == reason);
    let placed = PLACES.iter().find(|(name, _, _)| *name == function);
    let (_, class, advice) = known.or(placed).copied().unwrap_or((
        "",
        "other",
        "the kernel gives no more than this place: look it up in the kernel's sources",
    ));
    Cause { reason, code, place: kernel.symbols.place(location), class, advice: advice.to_owned(), is_ours: false }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_of_the_table_are_names_of_the_kernel() {
        let btf = super::super::btf::Btf::of_kernel().expect("types of this kernel");
        let known = btf.enumeration("skb_drop_reason");
        let missing: Vec<&str> = KERNEL
            .iter()
            .map(|(name, _, _)| *name)
            .filter(|name| !known.values().any(|known| known.strip_prefix("SKB_DROP_REASON_") == Some(name)))
            .collect();
        // Kernels before 6.12 lack some of these; none may be misspelt on one that has them all.
        assert!(missing.is_empty() || known.len() < 120, "{missing:?}");
    }

    #[test]
    fn every_drop_of_ours_has_advice() {
        let without: Vec<&Reason> = Reason::ALL
            .iter()
            .filter(|reason| reason.is_drop() && !OWN.iter().any(|(known, _, _)| known == *reason))
            .collect();
        // What policies drop is told by the reason's own sentence.
        let policy = |reason: &&Reason| reason.text().starts_with("drop: ") || reason.text().starts_with("refused: ");
        assert!(without.iter().all(policy), "{without:?}");
    }
}
