//! Every map and every load-time constant, and who has the map `work`. What they hold is written in `proxy_abi`.

use aya_ebpf::Global;
use aya_ebpf::bindings::BPF_F_NO_PREALLOC;
use aya_ebpf::macros::map;
use aya_ebpf::maps::{Array, HashMap, LpmTrie, LruHashMap, PerCpuArray};
use proxy_abi::policy::{
    Bits, BitsKey, BlockEntry, CellEntry, CellWord, HitsEntry, PAGES, PodDigest, PodHits, PortPage, SetEntry, SlotWord,
    capacity as policy_capacity,
};
use proxy_abi::verdict::COUNTERS;
use proxy_abi::{
    AffinityEntry, AffinityKey, BackendEntry, CgroupPodEntry, CounterEntry, DeviceEntry, FlowEntry, FlowKey,
    FragmentEntry, FragmentKey, FrontendEntry, FrontendKey, IpBytes, LocalPodEntry, ServiceEntry, SocketEntry,
    SocketKey, Work, capacity,
};

#[map(name = "service")]
pub(crate) static SERVICE: HashMap<u32, ServiceEntry> = HashMap::with_max_entries(capacity::SERVICE, BPF_F_NO_PREALLOC);
#[map(name = "backend")]
pub(crate) static BACKEND: Array<BackendEntry> = Array::with_max_entries(capacity::BACKEND, 0);
#[map(name = "backend_slot")]
pub(crate) static BACKEND_SLOT: Array<u32> = Array::with_max_entries(capacity::BACKEND_SLOT, 0);
#[map(name = "frontend")]
pub(crate) static FRONTEND: HashMap<FrontendKey, FrontendEntry> =
    HashMap::with_max_entries(capacity::FRONTEND, BPF_F_NO_PREALLOC);
#[map(name = "device")]
pub(crate) static DEVICE: HashMap<u32, DeviceEntry> = HashMap::with_max_entries(capacity::DEVICE, BPF_F_NO_PREALLOC);
#[map(name = "local_pod")]
pub(crate) static LOCAL_POD: HashMap<IpBytes, LocalPodEntry> =
    HashMap::with_max_entries(capacity::LOCAL_POD, BPF_F_NO_PREALLOC);
#[map(name = "flow_live")]
pub(crate) static FLOW_LIVE: HashMap<FlowKey, FlowEntry> =
    HashMap::with_max_entries(capacity::FLOW_LIVE, BPF_F_NO_PREALLOC);
#[map(name = "flow_brief")]
pub(crate) static FLOW_BRIEF: LruHashMap<FlowKey, FlowEntry> = LruHashMap::with_max_entries(capacity::FLOW_BRIEF, 0);
#[map(name = "fragment")]
pub(crate) static FRAGMENT: LruHashMap<FragmentKey, FragmentEntry> =
    LruHashMap::with_max_entries(capacity::FRAGMENT, 0);
#[map(name = "socket")]
pub(crate) static SOCKET: LruHashMap<SocketKey, SocketEntry> = LruHashMap::with_max_entries(capacity::SOCKET, 0);
#[map(name = "cgroup_pod")]
pub(crate) static CGROUP_POD: HashMap<u64, CgroupPodEntry> =
    HashMap::with_max_entries(capacity::CGROUP_POD, BPF_F_NO_PREALLOC);
/// Apart from the sockets of the node: no pod's number of sockets is to make those forgotten. The agent makes it larger
/// where it is used.
#[map(name = "pod_socket")]
pub(crate) static POD_SOCKET: LruHashMap<SocketKey, SocketEntry> =
    LruHashMap::with_max_entries(capacity::NO_POD_SOCKET, 0);
#[map(name = "prefix")]
pub(crate) static PREFIX: LpmTrie<[u32; 5], u32> = LpmTrie::with_max_entries(capacity::PREFIX, BPF_F_NO_PREALLOC);
#[map(name = "affinity")]
pub(crate) static AFFINITY: LruHashMap<AffinityKey, AffinityEntry> =
    LruHashMap::with_max_entries(capacity::AFFINITY, 0);
#[map(name = "counter")]
pub(crate) static COUNTER: PerCpuArray<CounterEntry> = PerCpuArray::with_max_entries(COUNTERS, 0);
/// Where a new flow is made.
#[map(name = "work")]
pub(crate) static WORK: PerCpuArray<Work> = PerCpuArray::with_max_entries(1, 0);

/// This CPU's entry of [`WORK`], for an exported function that hands a part of it to a map, as key or value. It does not
/// take it as an argument: of an argument the verifier knows that it is memory, not whose, and Linux 6.1 takes no such
/// memory for keys and values.
#[inline(always)]
pub(crate) fn own_work<'w>() -> Option<&'w mut Work> {
    // SAFETY: programs of one CPU do not interrupt each other here, and what calls such a function looks at the entry
    // again only when it is done.
    WORK.get_ptr_mut(0).map(|work| unsafe { &mut *work })
}

#[map(name = "pod_flows")]
pub(crate) static POD_FLOWS: HashMap<u32, u64> = HashMap::with_max_entries(capacity::DEVICE, BPF_F_NO_PREALLOC);
#[map(name = "policy_epoch")]
pub(crate) static POLICY_EPOCH: Array<u32> = Array::with_max_entries(1, 0);
#[map(name = "policy_slot")]
pub(crate) static POLICY_SLOT: Array<SlotWord> = Array::with_max_entries(2 * policy_capacity::SLOT, 0);
#[map(name = "policy_pod")]
static POLICY_POD: HashMap<u32, PodDigest> = HashMap::with_max_entries(policy_capacity::SLOT, BPF_F_NO_PREALLOC);
#[map(name = "policy_block")]
pub(crate) static POLICY_BLOCK: Array<BlockEntry> = Array::with_max_entries(policy_capacity::BLOCK, 0);
#[map(name = "policy_set")]
pub(crate) static POLICY_SET: Array<SetEntry> = Array::with_max_entries(policy_capacity::SET, 0);
#[map(name = "policy_ip")]
pub(crate) static POLICY_IP: HashMap<IpBytes, CellWord> =
    HashMap::with_max_entries(policy_capacity::IP, BPF_F_NO_PREALLOC);
#[map(name = "policy_prefix")]
pub(crate) static POLICY_PREFIX: LpmTrie<[u32; 5], CellWord> =
    LpmTrie::with_max_entries(policy_capacity::PREFIX, BPF_F_NO_PREALLOC);
#[map(name = "policy_page")]
pub(crate) static POLICY_PAGE: Array<PortPage> = Array::with_max_entries(2 * PAGES, 0);
#[map(name = "policy_cell")]
static POLICY_CELL: HashMap<u32, CellEntry> = HashMap::with_max_entries(policy_capacity::CELL, BPF_F_NO_PREALLOC);
#[map(name = "policy_bits")]
pub(crate) static POLICY_BITS: HashMap<BitsKey, Bits> =
    HashMap::with_max_entries(policy_capacity::BITS, BPF_F_NO_PREALLOC);

#[map(name = "policy_hits")]
pub(crate) static POLICY_HITS: HashMap<u32, HitsEntry> =
    HashMap::with_max_entries(policy_capacity::HITS, BPF_F_NO_PREALLOC);
#[map(name = "policy_pod_hits")]
pub(crate) static POLICY_POD_HITS: Array<PodHits> = Array::with_max_entries(policy_capacity::SLOT, 0);

/// When the last ICMP error was sent, nanoseconds: see `refuse`.
#[map(name = "limit")]
pub(crate) static LIMIT: PerCpuArray<u64> = PerCpuArray::with_max_entries(1, 0);

// The agent sets each of these before it loads the programs. What stands here must be a value that no constant of the
// programs has: the compiler keeps one copy of equal constants, and a zero that is meant to stay zero would change with
// the setting.

/// Does the kernel know `bpf_set_retval` (Linux 5.18)? 0 or 1.
#[unsafe(no_mangle)]
pub(crate) static SET_RETVAL: Global<u32> = Global::new(0xa5a5_0001);
/// Established flows that one pod may have begun; 0 = any number.
#[unsafe(no_mangle)]
pub(crate) static POD_QUOTA: Global<u32> = Global::new(0xa5a5_0002);
/// May a pod reach its own node whatever its policies say? 0 or 1.
#[unsafe(no_mangle)]
pub(crate) static NODE_OPEN: Global<u32> = Global::new(0xa5a5_0004);
/// Nanoseconds that a flow which is not TCP may be idle for: without an answer, and with answers.
#[unsafe(no_mangle)]
pub(crate) static UDP_UNREPLIED: Global<u64> = Global::new(0xa5a5_0007_a5a5_0007);
/// See [`UDP_UNREPLIED`].
#[unsafe(no_mangle)]
pub(crate) static UDP_ASSURED: Global<u64> = Global::new(0xa5a5_0008_a5a5_0008);
/// Cookie of the network namespace whose sockets are translated (`SO_NETNS_COOKIE` of a socket of the agent).
#[unsafe(no_mangle)]
pub(crate) static NETNS_COOKIE: Global<u64> = Global::new(0xa5a5_0003_a5a5_0003);
/// Are sockets of pods translated, too (`--socket-lb=all`)? 0 or 1.
#[unsafe(no_mangle)]
pub(crate) static SOCKET_LB: Global<u32> = Global::new(0xa5a5_0009);
/// Is this a load that is attached nowhere and only asked what it would do? 0 or 1. With 1 the verifier finds every write
/// to a map that others have dead, and leaves it out.
#[unsafe(no_mangle)]
pub(crate) static DRY_RUN: Global<u32> = Global::new(0xa5a5_0006);
