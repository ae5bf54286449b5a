//! What tracing shares between the programs of the dataplane, the probes at the kernel's tracepoints and their reader.
//!
//! ```text
//!   map             type    key          value               written by
//!   trace           ARRAY   0            TraceControl   32   reader: until when; programs: what was lost
//!   trace_packet    HASH    address  8   TracePacket    32   probes: packets that are followed, by sk_buff and by its head
//!   trace_ring      RINGBUF              TraceDecision  96   programs of the dataplane
//! ```
//!
//! These three are pinned with the dataplane's maps, so that a reader reaches the attached programs while the agent is
//! down. All others belong to the reader and end with it. While `until` is in the past the programs of the dataplane
//! look at nothing else: a reader that was killed costs them one load and one clock for each packet, until the next
//! reader or agent sets it to 0.

use crate::{IpBytes, PortBe};

/// Names of the pinned maps of tracing.
pub mod map {
    /// The word that switches.
    pub const TRACE: &str = "trace";
    /// Packets that are followed.
    pub const TRACE_PACKET: &str = "trace_packet";
    /// Decisions.
    pub const TRACE_RING: &str = "trace_ring";
    /// All.
    pub const ALL: [&str; 3] = [TRACE, TRACE_PACKET, TRACE_RING];
}

/// Entry of the map `trace` that the reader writes.
pub const CONTROL: u32 = 0;
/// Entry of the map `trace` that the probes write.
pub const FOLLOWED: u32 = 1;
/// Entries of the map `trace`.
pub const CONTROLS: u32 = 2;
/// Packets that are followed at once; two entries each. A packet is followed for as long as it is in the node.
pub const PACKETS: u32 = 8_192;
/// Bytes of `trace_ring`.
pub const RING_BYTES: u32 = 1 << 18;
/// Bytes of a packet that an event carries, from its IP header on.
pub const SNAP: usize = 96;
/// Rows of a compiled expression.
pub const ROWS: u32 = 32;
/// Addresses of both sides of a selection together.
pub const ENDS: u32 = 8_192;
/// Counters of the probes, by [`count`].
pub const COUNTS: u32 = 8;

/// What the probes count.
pub mod count {
    /// Events that the ring had no room for.
    pub const RING_FULL: u32 = 0;
    /// Packets that could not be followed, because the table was full.
    pub const TABLE_FULL: u32 = 1;
    /// Packets that matched and were over the rate.
    pub const RATE_LIMITED: u32 = 2;
    /// Packets that are followed.
    pub const STARTED: u32 = 3;
    /// Events written.
    pub const EVENTS: u32 = 4;
    /// Drops that the table of drops had no room for.
    pub const DROPS_FULL: u32 = 5;
    /// Packets that were looked at for a match.
    pub const LOOKED_AT: u32 = 6;
}

/// Where an event comes from: `TraceEvent::point`.
pub mod point {
    /// `netif_receive_skb`: the stack takes the packet from a device.
    pub const RECEIVE: u32 = 0;
    /// `net_dev_queue`: the packet goes to a device, after the egress programs.
    pub const QUEUE: u32 = 1;
    /// `net_dev_start_xmit`: the driver gets it.
    pub const TRANSMIT: u32 = 2;
    /// `kfree_skb`: dropped, with a reason.
    pub const DROP: u32 = 3;
    /// `consume_skb`: done with.
    pub const CONSUME: u32 = 4;
    /// Number of points.
    pub const COUNT: u32 = 5;
}

/// What the programs `listener_tcp` and `listener_udp` of the probes are asked, by a map of one entry, and what they return.
pub mod listener {
    /// `struct bpf_sock_tuple` at the beginning: source, destination, ports; then the words below.
    pub type Question = [u32; 11];
    /// Word: id of the network namespace, as seen from the packet's; negative = that one.
    pub const NAMESPACE: usize = 9;
    /// Word: is the tuple of IPv4? 0 or 1.
    pub const V4: usize = 10;
    /// Bytes of a tuple of IPv4.
    pub const TUPLE_V4: u32 = 12;
    /// Bytes of a tuple of IPv6.
    pub const TUPLE_V6: u32 = 36;
    /// There is a socket.
    pub const FOUND: i32 = 1;
    /// There is none.
    pub const NONE: i32 = 2;
}

abi! {
    /// What the program `symbol` of the probes is asked and answers, by a map of one entry.
    pub struct TraceSymbol [136] {
        /// An address of the kernel's code.
        pub address: u64,
        /// `name+0x12/0x34 [module]`, ended by a zero; the address again where there is no name.
        pub text: [u8; 128],
    }

    /// The value of the map `trace`. Entry [`CONTROL`] is the reader's, who writes it as a whole; of entry [`FOLLOWED`], which is
    /// the probes', `until` alone counts: 0 = no packet has been followed yet, so no program has to look for its own.
    pub struct TraceControl [32] {
        /// CLOCK_MONOTONIC, nanoseconds: decisions are told until then. 0 = off.
        pub until: u64,
        /// Decisions that the ring had no room for, since it was made.
        pub lost: u64,
        /// Decisions told, since it was made.
        pub told: u64,
        /// Bytes before `head` in the kernel's `sk_buff`.
        pub head_offset: u32,
        /// 0.
        pub reserved: u32,
    }

    /// A packet that is followed.
    pub struct TracePacket [32] {
        /// When it was first seen, and the CPU: `nanoseconds << 6 | cpu % 64`.
        pub id: u64,
        /// CLOCK_MONOTONIC, nanoseconds, of the last sight.
        pub last: u64,
        /// What no translation changes: tells another packet in the same memory.
        pub imprint: u64,
        /// Sights so far.
        pub sights: u32,
        /// 0.
        pub reserved: u32,
    }

    /// What a program of the dataplane decided about a packet that is followed.
    pub struct TraceDecision [96] {
        /// CLOCK_MONOTONIC, nanoseconds, when the program ended.
        pub at: u64,
        /// [`TracePacket::id`]; of a socket's call its cookie.
        pub id: u64,
        /// Address of the `sk_buff`; 0 for a socket's call.
        pub skb: u64,
        /// Address of its head.
        pub head: u64,
        /// Interface of the program.
        pub ifindex: u32,
        /// Bytes, Ethernet header included.
        pub len: u32,
        /// [`crate::Hook`].
        pub hook: u32,
        /// 0 = pass, 1 = redirect, 2 = drop.
        pub verdict: u32,
        /// [`crate::Reason`].
        pub reason: u32,
        /// Service port; 0 = none.
        pub service: u32,
        /// Backend.
        pub backend: u32,
        /// Policy rule; 0 = none.
        pub rule: u32,
        /// CPU.
        pub cpu: u32,
        /// 0.
        pub reserved: [u32; 7],
    }

    /// A followed packet at a tracepoint of the kernel.
    pub struct TraceEvent [216] {
        /// CLOCK_MONOTONIC, nanoseconds.
        pub at: u64,
        /// [`TracePacket::id`].
        pub id: u64,
        /// Address of the `sk_buff`.
        pub skb: u64,
        /// Address of its head.
        pub head: u64,
        /// Where it was dropped or consumed: an address of code.
        pub location: u64,
        /// The kernel's connection and its state in the lowest 3 bits; 0 = conntrack has not seen the packet.
        pub nfct: u64,
        /// Cookie of the socket that it belongs to; 0 = it has none, or nobody has asked for it yet.
        pub cookie: u64,
        /// Inode number of the device's network namespace.
        pub netns: u32,
        /// Index of the device there; 0 = the packet has none.
        pub ifindex: u32,
        /// Name of the device, padded with zero bytes.
        pub device: [u8; 16],
        /// Index of the veth's other end, where that lies in the reader's namespace and this one does not.
        pub peer: u32,
        /// One of [`point`].
        pub point: u32,
        /// CPU.
        pub cpu: u32,
        /// Bytes of the packet, as the kernel counts them here.
        pub len: u32,
        /// `skb->mark`.
        pub mark: u32,
        /// Of a drop: `enum skb_drop_reason`.
        pub reason: u32,
        /// Index in the map of stacks; all bits set = none.
        pub stack: u32,
        /// Netfilter hooks with entries in this namespace: 5 bits for the packet's family in the order of `NF_INET_*`, then
        /// 5 bits for bridges.
        pub hooks: u32,
        /// `skb->active_extensions`.
        pub extensions: u32,
        /// Bytes of `packet` that are the packet's.
        pub captured: u32,
        /// From the IP header on; beyond `captured` it means nothing.
        pub packet: [u8; 96],
    }

    /// What is followed: the value of the map `trace_filter`.
    pub struct TraceFilter [64] {
        /// Inode number of the reader's network namespace.
        pub netns: u32,
        /// [`TraceFilter::ACTIVE`] and others.
        pub flags: u32,
        /// Interface in the reader's namespace; 0 = any.
        pub ifindex: u32,
        /// IP protocol; 0 = any.
        pub proto: u32,
        /// Rows of `trace_row` in use; 0 = any packet.
        pub rows: u32,
        /// Follow one flow of so many; 0 and 1 = all.
        pub sample: u32,
        /// Packets to begin to follow each second; 0 = any number.
        pub rate: u32,
        /// Packets begun in this second.
        pub begun: u32,
        /// The second.
        pub second: u64,
        /// Packets to begin to follow altogether; 0 = any number.
        pub most: u64,
        /// Packets begun altogether.
        pub total: u64,
        /// First reason that is a drop.
        pub first_drop: u32,
        /// A bit for each address of `trace_end`, by [`TraceFilter::bit_of`]: most packets need no look-up there.
        pub ends: u32,
    }

    /// An address of one side of a selection.
    pub struct TraceEnd [24] {
        /// The address.
        pub ip: IpBytes,
        /// Port; 0 = any, and then what is said of ports as well.
        pub port: PortBe,
        /// 0.
        pub reserved: u16,
        /// 0.
        pub reserved_more: u32,
    }

    /// A row of a compiled expression: all of it must hold.
    pub struct TraceRow [96] {
        /// Source, after the mask.
        pub src: IpBytes,
        /// Bits of the source that count.
        pub src_mask: IpBytes,
        /// Destination, after the mask.
        pub dst: IpBytes,
        /// Bits of the destination that count.
        pub dst_mask: IpBytes,
        /// Lowest source port.
        pub src_low: u16,
        /// Highest source port.
        pub src_high: u16,
        /// Lowest destination port.
        pub dst_low: u16,
        /// Highest destination port.
        pub dst_high: u16,
        /// IP protocol; 0 = any.
        pub proto: u32,
        /// TCP flags that count.
        pub flags_mask: u32,
        /// What they must be.
        pub flags: u32,
        /// [`crate::FAMILY_IPV4`] or [`crate::FAMILY_IPV6`]; 0 = any.
        pub family: u32,
        /// Parts that must not hold: bits of [`TraceRow`].
        pub negated: u32,
        /// 0.
        pub reserved: u32,
    }

    /// A group of drops.
    pub struct TraceDropKey [32] {
        /// Where: an address of code.
        pub location: u64,
        /// Network namespace.
        pub netns: u32,
        /// Device there.
        pub ifindex: u32,
        /// `enum skb_drop_reason`.
        pub reason: u32,
        /// IP protocol.
        pub proto: u32,
        /// Veth's other end in the reader's namespace.
        pub peer: u32,
        /// 0.
        pub reserved: u32,
    }

    /// What was dropped.
    pub struct TraceDrops [72] {
        /// Packets.
        pub packets: u64,
        /// Their bytes.
        pub bytes: u64,
        /// Source of the last.
        pub src: IpBytes,
        /// Destination of the last.
        pub dst: IpBytes,
        /// Its ports.
        pub src_port: PortBe,
        /// Its ports.
        pub dst_port: PortBe,
        /// 0.
        pub reserved: u32,
        /// Name of the device.
        pub device: [u8; 16],
    }

    /// An entry of a netfilter hook.
    pub struct TraceHookKey [16] {
        /// Network namespace.
        pub netns: u32,
        /// 0 = IPv4, 1 = IPv6, 2 = ARP, 3 = bridge.
        pub family: u32,
        /// `NF_INET_*`, `NF_ARP_*` or `NF_BR_*`.
        pub hook: u32,
        /// Position.
        pub index: u32,
    }

    /// What it calls.
    pub struct TraceHookEntry [88] {
        /// Address of the function.
        pub function: u64,
        /// Priority.
        pub priority: u32,
        /// `enum nf_hook_ops_type`.
        pub kind: u32,
        /// nftables: the table.
        pub table: [u8; 32],
        /// nftables: the chain.
        pub chain: [u8; 32],
        /// A task in that namespace.
        pub pid: u32,
        /// 0.
        pub reserved: u32,
    }
}

impl TraceControl {
    /// Off.
    pub const OFF: Self = Self { until: 0, lost: 0, told: 0, head_offset: 0, reserved: 0 };
}

impl TraceEvent {
    /// No stack.
    pub const NO_STACK: u32 = u32::MAX;
}

impl TraceFilter {
    /// The bit of an address in `ends`.
    #[inline(always)]
    pub const fn bit_of(ip: &IpBytes) -> u32 {
        let [a, b, c, d] = ip.0;
        let all = a ^ b ^ c ^ d;
        let half = all ^ all >> 16;
        1 << ((half ^ half >> 8) & 31)
    }

    /// Packets are followed.
    pub const ACTIVE: u32 = 1;
    /// Side A is any address.
    pub const ANY_A: u32 = 2;
    /// Side B is any address.
    pub const ANY_B: u32 = 4;
    /// Drops are grouped in `trace_drop`.
    pub const DROPS: u32 = 8;
    /// Stacks are taken.
    pub const STACKS: u32 = 16;
    /// Packets of other nodes' namespaces count as well: nobody else is on this machine.
    pub const ALL_NAMESPACES: u32 = 32;
}

impl TraceEnd {
    /// In the value of `trace_end`: the address belongs to side A.
    pub const A: u32 = 1;
    /// It belongs to side B.
    pub const B: u32 = 2;
    /// Entries with a port exist for the address.
    pub const PORTS: u32 = 4;
}

impl TraceRow {
    /// The source must be another.
    pub const NOT_SRC: u32 = 1;
    /// The destination must be another.
    pub const NOT_DST: u32 = 2;
    /// The source port must be another.
    pub const NOT_SRC_PORT: u32 = 4;
    /// The destination port must be another.
    pub const NOT_DST_PORT: u32 = 8;
    /// The protocol must be another.
    pub const NOT_PROTO: u32 = 16;
    /// The flags must be others.
    pub const NOT_FLAGS: u32 = 32;
    /// The family must be the other.
    pub const NOT_FAMILY: u32 = 64;
    /// Holds for every packet.
    pub const ANY: Self = Self {
        src: IpBytes::UNSPECIFIED,
        src_mask: IpBytes::UNSPECIFIED,
        dst: IpBytes::UNSPECIFIED,
        dst_mask: IpBytes::UNSPECIFIED,
        src_low: 0,
        src_high: u16::MAX,
        dst_low: 0,
        dst_high: u16::MAX,
        proto: 0,
        flags_mask: 0,
        flags: 0,
        family: 0,
        negated: 0,
        reserved: 0,
    };
}
