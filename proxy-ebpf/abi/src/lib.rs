//! The types that lie in the eBPF maps. They are defined here and nowhere else.
//!
//! ```text
//!   map             type       key              value                written by
//!   service         HASH       ServiceId    4   ServiceEntry    152  agent: names for ids, so that they survive it
//!   backend         ARRAY      BackendId    4   BackendEntry     32  agent
//!   backend_slot    ARRAY      slot         4   BackendId         4  agent: a frontend owns a range of slots
//!   frontend        HASH       FrontendKey 20   FrontendEntry    24  agent: one update switches a whole service port
//!   device          HASH       ifindex      4   DeviceEntry      96  agent
//!   local_pod       HASH       IpBytes     16   LocalPodEntry    16  agent
//!   flow_live       HASH       FlowKey     40   FlowEntry       136  programs: established TCP; never evicted
//!   flow_brief      LRU_HASH   FlowKey     40   FlowEntry       136  programs: handshakes, closing TCP, UDP
//!   fragment        LRU_HASH   FragmentKey 40   FragmentEntry     8  programs
//!   socket          LRU_HASH   SocketKey   32   SocketEntry      32  socket programs: sockets of the node
//!   cgroup_pod      HASH       cgroup id    8   CgroupPodEntry   40  agent: pods whose sockets are translated, if any
//!   pod_socket      LRU_HASH   SocketKey   32   SocketEntry      32  socket programs: sockets of pods
//!   counter         PERCPU_ARRAY index      4   CounterEntry     16  programs: hook × reason
//!   prefix          LPM_TRIE   PrefixKey   24   u32               4  agent: service ranges, sources; the value is 1
//!   pod_flows       HASH       ifindex      4   u64               8  programs: flows in flow_live; agent: recounted. With
//!                                                                    [`FlowEntry::DIRECT_OF`]: direct ones
//!   affinity        LRU_HASH   AffinityKey 24   AffinityEntry    16  programs
//!   work            PERCPU_ARRAY 0          4   Work            432  programs: scratch, not pinned
//!   policy_...      twelve maps, drawn in [`policy`]                     agent; programs count
//!   layout          ARRAY      row          4   LayoutRow        64  agent: these layouts, for another version's agent
//! ```
//!
//! Every struct is made by one macro, which fixes `repr(C)` and asserts its size and the absence of padding, so a map
//! key never carries an uninitialised byte. Fields are fixed-size integers or newtypes of them; no enum, `Option` or
//! `bool`, because the kernel side must be able to read any bit pattern.
#![no_std]

/// A field of a type that lies in a map.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Field {
    /// Its name.
    pub name: &'static str,
    /// Bytes before it.
    pub offset: usize,
    /// Bytes of it.
    pub size: usize,
    /// Its own fields, from its own beginning; none for a number or an address.
    pub inside: &'static [Self],
}

/// A type that lies in a map, described field by field: what one version wrote another can then read.
pub trait Fields {
    /// In their order; none for a number or an address.
    const FIELDS: &'static [Field] = &[];
}

macro_rules! without_fields {
    ($($type:ty),+) => { $( impl Fields for $type {} )+ };
}

without_fields!(u8, u16, u32, u64, IpBytes, MacBytes, PortBe, Proto, NameBytes);

impl<const N: usize, T: Fields> Fields for [T; N] {}

/// Declares the structs that lie in maps: `repr(C)`, an asserted size, asserted to have no padding, described in
/// [`Fields::FIELDS`]. A field under a `cfg` counts only where it is compiled.
macro_rules! abi {
    ($( $(#[$meta:meta])* pub struct $name:ident [$size:expr] {
        $( $(#[$fmeta:meta])* pub $field:ident : $type:ty ),+ $(,)?
    } )+) => { $(
        $(#[$meta])*
        #[repr(C)]
        #[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
        pub struct $name { $( $(#[$fmeta])* pub $field: $type ),+ }
        const _: () = {
            let (mut sum, mut at) = (0, 0);
            while at < <$name as $crate::Fields>::FIELDS.len() {
                sum += <$name as $crate::Fields>::FIELDS[at].size;
                at += 1;
            }
            assert!(core::mem::size_of::<$name>() == $size, "size is part of the map layout");
            assert!(sum == $size, "padding is not allowed");
        };
        #[expect(unused_doc_comments, reason = "the fields' documentation comes along with their cfg")]
        impl $crate::Fields for $name {
            const FIELDS: &'static [$crate::Field] = &[ $(
                $(#[$fmeta])*
                $crate::Field {
                    name: stringify!($field),
                    offset: core::mem::offset_of!($name, $field),
                    size: core::mem::size_of::<$type>(),
                    inside: <$type as $crate::Fields>::FIELDS,
                }
            ),+ ];
        }
        #[cfg(feature = "user")]
        // SAFETY: repr(C), no padding (asserted above), every field is valid for any bit pattern.
        unsafe impl aya::Pod for $name {}
    )+ };
}

pub mod addr;
pub mod device;
pub mod flow;
pub mod policy;
pub mod service;
pub mod socket;
pub mod trace;
pub mod verdict;

pub use addr::{IpBytes, MacBytes, PortBe, Proto};
pub use device::{DeviceEntry, LocalPodEntry};
pub use flow::{FlowEntry, FlowKey, FragmentEntry, FragmentKey, Stamp, TcpMoment, Tuple, Work};
pub use service::{
    AffinityEntry, AffinityKey, BackendEntry, FrontendEntry, FrontendKey, NameBytes, PrefixKey, ServiceEntry,
};
pub use socket::{CgroupPodEntry, SocketEntry, SocketKey};
pub use verdict::{CounterEntry, Hook, Reason};

/// Version of every layout in this crate. It names the pin directory, so that two versions never share a map.
/// Raise it with any change of a type here; `proxy-ebpf/abi/fingerprint` must change with it, which `cargo xtask tidy` checks.
#[cfg(not(feature = "layout-next"))]
pub const ABI_VERSION: u32 = 4;
/// Of the imagined next version: not the number of any real one.
#[cfg(feature = "layout-next")]
pub const ABI_VERSION: u32 = 1000;

abi! {
    /// A row of the map `layout`: a field of a key or value as this version lays it out, or a setting of the programs.
    /// This type never changes, whatever the version: every agent must be able to read it.
    pub struct LayoutRow [64] {
        /// Map that has the field, padded with zero bytes; empty for a setting, and in rows that are not used.
        pub map: [u8; 16],
        /// The field, with dots before the fields of a field; or the setting.
        pub name: [u8; 36],
        /// [`LayoutRow::KEY`], [`LayoutRow::VALUE`] or [`LayoutRow::SETTING`].
        pub part: u32,
        /// Bytes before it; the value of a setting.
        pub offset: u32,
        /// Bytes of it.
        pub size: u32,
    }
}

impl LayoutRow {
    /// Rows of the map.
    pub const ROOM: u32 = 512;
    /// The row is not used.
    pub const UNUSED: u32 = 0;
    /// A field of the key.
    pub const KEY: u32 = 1;
    /// A field of the value.
    pub const VALUE: u32 = 2;
    /// A setting.
    pub const SETTING: u32 = 3;
}

/// `AF_INET` as it stands in keys.
pub const FAMILY_IPV4: u8 = 4;
/// `AF_INET6` as it stands in keys.
pub const FAMILY_IPV6: u8 = 6;

/// Names of the pinned maps.
pub mod map {
    /// Service id → name.
    pub const SERVICE: &str = "service";
    /// Backend id → address and port.
    pub const BACKEND: &str = "backend";
    /// Slot → backend id.
    pub const BACKEND_SLOT: &str = "backend_slot";
    /// Frontend → range of slots.
    pub const FRONTEND: &str = "frontend";
    /// Interface index → what hangs there.
    pub const DEVICE: &str = "device";
    /// Pod address → interface.
    pub const LOCAL_POD: &str = "local_pod";
    /// Established TCP flows.
    pub const FLOW_LIVE: &str = "flow_live";
    /// All other flows.
    pub const FLOW_BRIEF: &str = "flow_brief";
    /// Ports of fragmented packets.
    pub const FRAGMENT: &str = "fragment";
    /// Service addresses that sockets of this node asked for.
    pub const SOCKET: &str = "socket";
    /// Cgroup id → pod whose sockets are translated.
    pub const CGROUP_POD: &str = "cgroup_pod";
    /// Service addresses that sockets of pods asked for.
    pub const POD_SOCKET: &str = "pod_socket";
    /// Packets and bytes by hook and reason.
    pub const COUNTER: &str = "counter";
    /// Address ranges.
    pub const PREFIX: &str = "prefix";
    /// Clients of Services with session affinity.
    pub const AFFINITY: &str = "affinity";
    /// Established flows of each pod.
    pub const POD_FLOWS: &str = "pod_flows";
    /// The layouts of all others.
    pub const LAYOUT: &str = "layout";
}

/// Default capacities, in entries. Idle, all maps with these take about 31 MiB: computed from 35.2 MiB measured with
/// 10,000 Services.
pub mod capacity {
    /// Service ports with a name.
    pub const SERVICE: u32 = 65_536;
    /// Backends of all service ports.
    pub const BACKEND: u32 = 131_072;
    /// Slots: twice the backends, because a changed service holds its old and its new range for a moment.
    pub const BACKEND_SLOT: u32 = 262_144;
    /// Frontends: address, port, protocol.
    pub const FRONTEND: u32 = 131_072;
    /// Interfaces; a Linux bridge has at most 1,024 ports.
    pub const DEVICE: u32 = 4_096;
    /// Pod addresses on this node.
    pub const LOCAL_POD: u32 = 8_192;
    /// Established TCP flows (two entries each when translated, one when not).
    pub const FLOW_LIVE: u32 = 262_144;
    /// Handshakes, closing TCP, UDP (two entries each when translated, one when not).
    pub const FLOW_BRIEF: u32 = 65_536;
    /// Fragmented packets in transit.
    pub const FRAGMENT: u32 = 8_192;
    /// Sockets of the node that use a Service over UDP, or asked for their peer.
    pub const SOCKET: u32 = 16_384;
    /// Pods of this node whose sockets are translated. Any more are served by their packets.
    pub const CGROUP_POD: u32 = 1_024;
    /// Sockets of pods, where those are translated.
    pub const POD_SOCKET: u32 = 65_536;
    /// The same where they are not: a map of this type is allocated at once.
    pub const NO_POD_SOCKET: u32 = 64;
    /// Service ranges, sources of load balancers.
    pub const PREFIX: u32 = 65_536;
    /// Clients of Services with session affinity.
    pub const AFFINITY: u32 = 16_384;
}
