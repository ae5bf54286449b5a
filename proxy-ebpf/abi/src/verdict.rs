//! Where a packet was seen and what became of it: one list each, used by programs, metrics and command line.

abi! {
    /// Packets that left one hook for one reason, on one CPU.
    pub struct CounterEntry [16] {
        /// Packets; a super-packet counts once.
        pub packets: u64,
        /// Their bytes, Ethernet header included.
        pub bytes: u64,
    }
}

/// Declares an enum of `u8` with a name and a sentence for each value.
macro_rules! named {
    ($(#[$meta:meta])* pub enum $enum:ident { $( $variant:ident = $value:literal, $name:literal, $text:literal; )+ }) => {
        $(#[$meta])*
        #[repr(u8)]
        #[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
        pub enum $enum { $( #[doc = $text] $variant = $value, )+ }

        impl $enum {
            /// Every value.
            pub const ALL: &'static [Self] = &[ $( Self::$variant, )+ ];

            /// The name in metrics and tables.
            pub const fn name(self) -> &'static str {
                match self { $( Self::$variant => $name, )+ }
            }

            /// What it means, in a sentence.
            pub const fn text(self) -> &'static str {
                match self { $( Self::$variant => $text, )+ }
            }
        }

        impl core::fmt::Display for $enum {
            fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
                f.pad(self.name())
            }
        }
    };
}

named! {
    /// A place where a program runs.
    pub enum Hook {
        FromPod = 0, "from_pod", "tcx ingress of a pod's host-side veth";
        ToPod = 1, "to_pod", "tcx egress of a pod's host-side veth";
        FromNetdev = 2, "from_netdev", "tcx ingress of an uplink or tunnel";
        ToNetdev = 3, "to_netdev", "tcx egress of an uplink or tunnel";
        FromBridge = 4, "from_bridge", "tcx ingress of the pod bridge";
        ToBridge = 5, "to_bridge", "tcx egress of the pod bridge";
        Connect = 6, "connect", "connect() of a socket of the node, or of a pod";
        Sendmsg = 7, "sendmsg", "sendmsg() of an unconnected UDP socket of the node, or of a pod";
        Recvmsg = 8, "recvmsg", "recvmsg() of a UDP socket of the node, or of a pod";
        Getpeername = 9, "getpeername", "getpeername() of a socket of the node, or of a pod";
    }
}

named! {
    /// Why a program ended as it did. Values of [`Reason::FIRST_DROP`] and above are drops.
    pub enum Reason {
        NotIp = 0, "not_ip", "neither IPv4 nor IPv6: passed untouched";
        NoDevice = 1, "no_device", "the interface has no entry: passed untouched";
        OtherProtocol = 2, "other_protocol", "neither TCP, UDP nor SCTP: passed untouched, where policy allows it";
        Unparsed = 3, "unparsed", "headers that cannot be followed: passed untouched, where no policy is enforced";
        NotService = 4, "not_service", "socket address is not a frontend: passed untouched";
        NotThisNode = 5, "not_this_node", "socket of another network namespace: passed untouched";
        DirectNew = 6, "direct_new", "first packet of a flow that no Service is part of";
        Direct = 7, "direct", "later packet of such a flow";
        ServiceNew = 8, "service_new", "first packet to a Service: backend chosen, translated";
        Service = 9, "service", "later packet to a Service: translated";
        Reply = 10, "reply", "reply of a backend: translated back to the Service's address";
        Seen = 11, "seen", "packet of a translated flow that another hook of this node translates";
        Untracked = 12, "untracked", "the flow table took no entry for a direct flow: passed untracked";
        FlowLiveFull = 13, "flow_live_full", "no room for an established flow: it stays evictable";
        PortRemapped = 14, "port_remapped", "source port changed, because two flows would look alike to the backend";
        Socket = 15, "socket", "socket address replaced by a backend's";
        SocketReply = 16, "socket_reply", "backend's address shown as the Service's";
        Masqueraded = 17, "masqueraded", "first packet of a flow whose source becomes an address of the node";
        IcmpError = 18, "icmp_error", "ICMP error about a translated packet: translated like it";
        Midstream = 19, "midstream", "TCP segment to a Service from outside, in a connection that is not known: passed to the node";
        FragmentUnknown = 20, "fragment_unknown", "a fragment came before the one that has the ports: passed untouched";
        PolicyAudit = 21, "policy_audit", "passed, and NetworkPolicies that are only audited would refuse the flow";
        PacketPath = 22, "packet_path", "socket of a pod: what only packets can do is left to the programs at its interface";
        NoBackend = 32, "no_backend", "refused: the Service has no endpoint";
        FragmentBeforeFirst = 33, "fragment_before_first", "drop: a fragment came before the one that has the ports";
        NoFlow = 34, "no_flow", "drop: TCP segment to a Service in the middle of a connection that is not known";
        FlowTableFull = 35, "flow_table_full", "drop: no room for a translated flow, whose reply could not be translated back";
        ClashUnresolved = 36, "clash_unresolved", "drop: no backend and port found that another flow does not use";
        RewriteFailed = 37, "rewrite_failed", "drop: the packet could not be written";
        BackendMissing = 38, "backend_missing", "drop: a slot names a backend that is not there";
        NoLocalBackend = 39, "no_local_backend", "drop: traffic policy Local, and no endpoint on this node";
        NoSuchPort = 40, "no_such_port", "refused: the Service's address has no such port";
        Unallocated = 41, "unallocated", "drop: an address of the Service range that no Service has";
        SourceNotAllowed = 42, "source_not_allowed", "drop: the client is in no range of loadBalancerSourceRanges";
        NoRoute = 43, "no_route", "drop: the node has no route to where the packet must go";
        TooBig = 44, "too_big", "refused: the packet is bigger than what the next link carries";
        PodQuota = 46, "pod_quota", "refused: the pod holds as many established flows as one pod may";
        PolicyEgress = 47, "policy_egress", "drop: no NetworkPolicy rule allows what the pod sends";
        PolicyIngress = 48, "policy_ingress", "drop: no NetworkPolicy rule allows what comes to the pod";
        PolicyCut = 49, "policy_cut", "drop: NetworkPolicy allowed this flow before and does so no more";
        PolicyUnready = 50, "policy_unready", "drop: the pod's NetworkPolicies are not in the maps, or do not fit there";
        PolicyHeld = 51, "policy_held", "drop: NetworkPolicies exist, and whose interface this is is not known";
        FrameType = 52, "frame_type", "drop: a VLAN tag, or an EtherType other than IPv4, IPv6 and ARP, at an enforced pod";
        FrameSource = 53, "frame_source", "drop: a source address or MAC that is not the pod's own";
        FrameNeighbour = 54, "frame_neighbour", "drop: ARP or neighbour discovery that speaks for somebody else, or is malformed";
        FrameRouter = 55, "frame_router", "drop: a pod plays router or DHCP server";
        FrameUnparsed = 56, "frame_unparsed", "drop: headers that cannot be followed, at an enforced pod";
        RefuseLimited = 45, "refuse_limited", "drop: refusals are limited to as many a second as the kernel sends";
    }
}

impl Reason {
    /// The first value that means a drop.
    pub const FIRST_DROP: u8 = 32;
    /// Room for reasons in the index of `counter`.
    pub const ROOM: u32 = 64;

    /// Does the packet end here?
    pub const fn is_drop(self) -> bool {
        self as u8 >= Self::FIRST_DROP
    }

    /// Index in the map `counter`: hook × 64 + reason.
    pub const fn index(self, hook: Hook) -> u32 {
        hook as u32 * Self::ROOM + self as u32
    }
}

/// Entries of the map `counter`.
pub const COUNTERS: u32 = 16 * Reason::ROOM;
