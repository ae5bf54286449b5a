//! The first packet of a flow: which backend, under which tuple, on which path.

use aya_ebpf::bindings::{__sk_buff, BPF_ANY, BPF_NOEXIST};
use proxy_abi::flow::{provenance, state};
use proxy_abi::{DeviceEntry, FlowEntry, FlowKey, FrontendEntry, MacBytes, Proto, Reason, TcpMoment, Work};
use proxy_ebpf::packet::Parsed;
use proxy_ebpf::{balance, conntrack, timewait};

use crate::ctx::{Skb, copy, copy_flow, copy_mac, forget, write_key};
use crate::flow::{self, EEXIST};
use crate::frontend::{self, choose, random, serves};
use crate::maps::{DEVICE, FLOW_BRIEF, FLOW_LIVE, LOCAL_POD, own_work};
use crate::route::{self, found};

/// How long the source port of a masqueraded flow rests whose end was not seen, or whose backend holds it in TIME_WAIT.
const RESTING: u64 = 60 * conntrack::SECOND;

/// How long it rests after any other end: its last segments may still be on their way, and would be taken for the next
/// one's.
const SETTLING: u64 = conntrack::SECOND / 2;

/// How long a handshake that gets no further stands in the way of another flow.
const HANDSHAKE: u64 = 60 * conntrack::SECOND;

/// What the functions below are told of a packet, as one number.
#[derive(Clone, Copy)]
pub(crate) struct Meta(pub(crate) u32);

impl Meta {
    /// Its flow takes the place of one that is in the table.
    pub(crate) const REPLACE: u32 = 1 << 24;
    /// It comes from a pod.
    pub(crate) const FROM_POD: u32 = 1 << 25;
    /// It comes from outside, at an interface of the node.
    pub(crate) const FROM_NETDEV: u32 = 1 << 26;
    /// Its source becomes an address of the node.
    pub(crate) const MASQUERADE: u32 = 1 << 27;
    /// It comes from a socket of this node.
    pub(crate) const FROM_NODE: u32 = 1 << 28;
    /// Work out the flow, but leave it in `work` only: policy is asked next.
    pub(crate) const PROPOSE: u32 = 1 << 29;
    /// The flow is in `work`, and policy allows it.
    pub(crate) const SETTLE: u32 = 1 << 30;

    #[inline(always)]
    pub(crate) fn new(parsed: &Parsed, flags: u32) -> Self {
        Self(u32::from(parsed.proto.0) | u32::from(parsed.family) << 8 | u32::from(parsed.tcp_flags) << 16 | flags)
    }

    #[inline(always)]
    fn proto(self) -> Proto {
        Proto(self.0 as u8)
    }

    #[inline(always)]
    fn proto_family(self) -> u16 {
        self.0 as u16
    }

    #[inline(always)]
    fn tcp_flags(self) -> u8 {
        (self.0 >> 16) as u8
    }

    #[inline(always)]
    fn is(self, flag: u32) -> bool {
        self.0 & flag != 0
    }
}

/// Fills in a direct flow with the tuple in `original`: the same for both sides.
#[inline(always)]
fn begin(entry: &mut FlowEntry, meta: Meta, device: &DeviceEntry, ifindex: u32) {
    const NOBODY: MacBytes = MacBytes([0; 6]);
    copy(&mut entry.translated, &entry.original);
    // Not copied from a constant: of eight zero bytes the compiler makes one with `NETNS_COOKIE`, which is set at load time.
    (entry.initiator_stamp.revision, entry.initiator_stamp.rule) = (0, 0);
    (entry.responder_stamp.revision, entry.responder_stamp.rule) = (0, 0);
    (entry.last_sent.sequence, entry.last_sent.timestamp) = (0, 0);
    entry.initiator_slot = 0;
    entry.responder_slot = 0;
    entry.last_seen = flow::now();
    entry.service = 0;
    entry.backend = 0;
    entry.generation = 0;
    entry.flags = FlowEntry::KEY_ORIGINAL | FlowEntry::KEY_TRANSLATED;
    entry.state = conntrack::first(meta.proto(), meta.tcp_flags());
    if meta.is(Meta::FROM_POD) {
        entry.initiator_ifindex = ifindex;
        entry.responder_ifindex = 0;
        copy_mac(&mut entry.initiator_mac, &device.pod_mac);
        copy_mac(&mut entry.responder_mac, &NOBODY);
        entry.provenance = provenance::POD;
    } else if meta.is(Meta::FROM_NETDEV) {
        entry.flags |= FlowEntry::OUTSIDE;
        entry.initiator_ifindex = 0;
        entry.responder_ifindex = 0;
        copy_mac(&mut entry.initiator_mac, &NOBODY);
        copy_mac(&mut entry.responder_mac, &NOBODY);
        entry.provenance = provenance::OUTSIDE;
    } else {
        entry.initiator_ifindex = 0;
        entry.responder_ifindex = ifindex;
        copy_mac(&mut entry.initiator_mac, &NOBODY);
        copy_mac(&mut entry.responder_mac, &device.pod_mac);
        entry.provenance = if meta.is(Meta::FROM_NODE) { provenance::NODE } else { provenance::OUTSIDE };
    }
}

/// May a new flow take the key of this one, which is not in `flow_live`? Yes when it is the same flow's leftover, has
/// ended, or leads nowhere.
#[inline(always)]
fn gives_way(old: &FlowEntry, new: &FlowEntry, proto: Proto, asked: TcpMoment) -> bool {
    if old.original.is(&new.original) {
        return true;
    }
    let idle = new.last_seen.saturating_sub(old.last_seen);
    if old.flags & FlowEntry::MASQUERADED != 0 && idle < RESTING {
        if idle < SETTLING || !conntrack::is_over(old.state) {
            return false;
        }
        let waits = old.state == state::CLOSED && (old.last_sent.sequence | old.last_sent.timestamp) != 0;
        return !waits || timewait::is_later(old.last_sent, asked);
    }
    if conntrack::is_live(old.state) {
        // Established, but in no other table: `flow_live` had no room; or it is being moved there this very moment; or
        // it was removed from there, and this is what was left behind.
        return old.flags & FlowEntry::NOT_PROMOTED == 0 && idle > HANDSHAKE;
    }
    if conntrack::is_over(old.state) || flow::is_idle(old.state, idle) {
        return true;
    }
    if proto == Proto::TCP {
        return idle > HANDSHAKE;
    }
    old.service != 0 && !serves(old.backend, old.generation)
}

/// Takes the key of the translated tuple for the flow in `work`, or tells that another flow has it.
#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn service_reserve(proto_family: u32) -> u32 {
    let proto = Proto(proto_family as u8);
    let Some(work) = own_work() else { return 0 };
    write_key(&mut work.key, &work.entry.translated, proto_family as u16, FlowKey::SIDE_COMMON);
    let mut reason = Reason::ClashUnresolved;
    if proto != Proto::TCP || FLOW_LIVE.get_ptr(&work.key).is_none() {
        if flow::put(&work.key, &work.entry, BPF_NOEXIST).is_ok() {
            reason = Reason::ServiceNew;
        } else if let Some(old) = FLOW_BRIEF.get_ptr(&work.key) {
            // SAFETY: a pointer into a map that was just found.
            if gives_way(unsafe { &*old }, &work.entry, proto, work.asked) {
                let taken = flow::put(&work.key, &work.entry, BPF_ANY).is_ok();
                reason = if taken { Reason::ServiceNew } else { Reason::FlowTableFull };
            }
        } else {
            reason = Reason::FlowTableFull;
        }
    }
    work.reason = reason as u32;
    0
}

/// What the functions here left in `work`. Read from memory, so that the verifier walks what follows once.
#[inline(always)]
pub(crate) fn reason(work: *const Work) -> u32 {
    // SAFETY: this CPU's entry of the map `work`.
    unsafe { core::ptr::read_volatile(&raw const (*work).reason) }
}

/// Chooses a backend for the flow in `work`. 0: none, with the reason in `work`.
#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn service_backend(work: *mut Work, frontend: *const FrontendEntry) -> u32 {
    // SAFETY: this CPU's entry of the map `work`, and a pointer into a map that was just found.
    let (Some(work), Some(frontend)) = (unsafe { (work.as_mut(), frontend.as_ref()) }) else { return 0 };
    match choose(frontend, &work.entry.original.src) {
        Ok((id, backend)) => {
            let entry = &mut work.entry;
            entry.backend = id;
            entry.generation = backend.generation;
            copy(&mut entry.translated.dst, &backend.ip);
            entry.translated.dst_port = backend.port;
            copy(&mut entry.translated.src, &entry.original.src);
            entry.translated.src_port = entry.original.src_port;
            1
        }
        Err(why) => {
            work.reason = why as u32;
            0
        }
    }
}

/// Makes the flow of a first packet to a Service, whose tuple is in `work`, and leaves it under both of its keys, and in
/// `work`. The entry for replies goes in first, with BPF_NOEXIST; where two flows would look alike to a backend, another
/// backend or source port is taken. The reason is in `work`.
#[unsafe(no_mangle)]
#[inline(never)]
pub(crate) extern "C" fn service_open(
    skb: *mut __sk_buff,
    work: *mut Work,
    frontend: *const FrontendEntry,
    device: *const DeviceEntry,
    meta: u32,
) -> u32 {
    // SAFETY: this CPU's entry of the map `work`, and pointers into maps that were just found.
    let (Some(work), Some(frontend), Some(device)) = (unsafe { (work.as_mut(), frontend.as_ref(), device.as_ref()) })
    else {
        return 0;
    };
    let meta = Meta(meta);
    if !meta.is(Meta::SETTLE) {
        begin(&mut work.entry, meta, device, Skb(skb).ifindex());
        work.entry.service = frontend.service;
    }
    let mut found = forget(u32::from(meta.is(Meta::SETTLE)));
    for attempt in 0..balance::BACKEND_TRIES + balance::PORT_TRIES {
        if attempt < balance::BACKEND_TRIES {
            if meta.is(Meta::SETTLE) {
                // Policy was asked about this backend: on a clash another source port is taken at once.
                if attempt > 0 {
                    continue;
                }
            } else if service_backend(work, frontend) == 0 || service_path(skb, device, meta.0) == 0 {
                continue;
            }
            if meta.is(Meta::PROPOSE) {
                work.reason = 0;
                return 0;
            }
            found = forget(1);
        } else {
            if found == 0 {
                break;
            }
            work.entry.translated.src_port = if work.entry.flags & FlowEntry::MASQUERADED == 0 {
                balance::source_port(random())
            } else {
                balance::masquerade_port(random())
            };
        }
        work.entry.flags = work.entry.flags & !FlowEntry::KEY_ORIGINAL | FlowEntry::KEY_TRANSLATED;
        service_reserve(u32::from(meta.proto_family()));
        if reason(work) == Reason::ServiceNew as u32 {
            break;
        }
    }
    if reason(work) == Reason::ServiceNew as u32 {
        let mode = if meta.is(Meta::REPLACE) { BPF_ANY } else { BPF_NOEXIST };
        service_finish(u32::from(meta.proto_family()), u32::from(FlowKey::SIDE_COMMON), mode);
    }
    0
}

/// Puts the flow in `work` under the key of its original tuple, too.
#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn service_finish(proto_family: u32, side: u32, mode: u32) -> u32 {
    let Some(work) = own_work() else { return 0 };
    let mut mode = mode;
    work.entry.flags = work.entry.flags & !FlowEntry::KEY_TRANSLATED | FlowEntry::KEY_ORIGINAL;
    if work.entry.original.is(&work.entry.translated) {
        // A Service whose address is its backend's: nothing to translate, and one key, which the flow has already.
        work.entry.flags = FlowEntry::KEY_ORIGINAL | FlowEntry::KEY_TRANSLATED;
        mode = BPF_ANY;
    }
    write_key(&mut work.key, &work.entry.original, proto_family as u16, side as u8);
    match flow::put(&work.key, &work.entry, mode) {
        Ok(()) => {}
        // Another CPU opened the flow with its first or second packet, this very moment: this one goes the same way.
        Err(EEXIST) if let Some(first) = FLOW_BRIEF.get_ptr(&work.key) => {
            // SAFETY: a pointer into a map that was just found.
            copy_flow(&mut work.entry, unsafe { &*first });
            work.reason = Reason::Service as u32;
        }
        Err(_) => work.reason = Reason::FlowTableFull as u32,
    }
    0
}

/// Which way the packets of a flow take, and so where replies are translated back; with it, the source that the backend
/// sees. 0: there is no way, with the reason in `work`.
///
/// ```text
///   backend            source kept                              source masqueraded
///   initiator itself   –                                        bridge's address; back into the same veth
///   pod of this node   veth to veth, or bridge, or stack        bridge's address; into the veth, or by the route
///   the node itself    stack                                    stack, source kept: it never leaves the node
///   anywhere else      stack                                    address of the outgoing interface; by the route
/// ```
#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn service_path(skb: *mut __sk_buff, device: *const DeviceEntry, meta: u32) -> u32 {
    const PATH: u16 =
        FlowEntry::REDIRECT | FlowEntry::SWITCH | FlowEntry::HAIRPIN | FlowEntry::ROUTED | FlowEntry::MASQUERADED;
    // SAFETY: a pointer into a map that was found for this packet.
    let (Some(work), Some(device)) = (own_work(), unsafe { device.as_ref() }) else { return 0 };
    let meta = Meta(meta);
    work.entry.flags &= !PATH;
    work.entry.responder_ifindex = 0;
    let v4 = work.entry.original.src.is_v4();
    if let Some(pod) = LOCAL_POD.get_ptr(&work.entry.translated.dst) {
        // SAFETY: a pointer into a map that was just found.
        let pod = unsafe { &*pod };
        copy_mac(&mut work.entry.responder_mac, &pod.mac);
        // A pod that reaches itself must see another address than its own, or its stack would take the answer for its
        // own packet. kube-proxy's masquerade shows it the bridge's address, so do we.
        let itself = pod.ifindex == work.entry.initiator_ifindex;
        if itself || meta.is(Meta::MASQUERADE) {
            let Some(other) = DEVICE.get_ptr(&pod.ifindex) else {
                work.reason = Reason::NoRoute as u32;
                return 0;
            };
            // SAFETY: a pointer into a map that was just found.
            let other = unsafe { &*other };
            let gateway = if v4 { &other.gateway_ip4 } else { &other.gateway_ip6 };
            if route::is_none(gateway) {
                work.reason = Reason::NoRoute as u32;
                // Without another address a pod cannot reach itself; it never could.
                return u32::from(itself && !meta.is(Meta::MASQUERADE));
            }
            copy(&mut work.entry.translated.src, gateway);
            work.entry.translated.src_port = balance::masquerade_port(random());
            work.entry.flags |= FlowEntry::REDIRECT | FlowEntry::MASQUERADED;
            if itself {
                work.entry.flags |= FlowEntry::HAIRPIN;
            }
            if itself || pod.flags & DeviceEntry::REDIRECT != 0 {
                work.entry.responder_ifindex = pod.ifindex;
            } else {
                work.entry.flags |= FlowEntry::ROUTED;
            }
            return 1;
        }
        let both = pod.flags & if meta.is(Meta::FROM_POD) { device.flags } else { DeviceEntry::REDIRECT };
        if both & DeviceEntry::REDIRECT != 0 {
            work.entry.responder_ifindex = pod.ifindex;
            work.entry.flags |= FlowEntry::REDIRECT;
        } else if both & DeviceEntry::SWITCH != 0
            && let Some(other) = DEVICE.get_ptr(&pod.ifindex)
        {
            // SAFETY: a pointer into a map that was just found.
            if device.bridge != 0 && unsafe { (*other).bridge } == device.bridge {
                work.entry.flags |= FlowEntry::SWITCH;
            }
        }
        return 1;
    }
    if !meta.is(Meta::MASQUERADE) || frontend::address(&work.entry.translated.dst) & FrontendEntry::ADDRESS_NODE != 0 {
        return 1;
    }
    let proto = u32::from(meta.proto().0);
    // The route decides which address the packet gets; its source is still the client's.
    let ifindex = incoming(skb, device);
    if route::look_up(skb, work, false, ifindex, proto) == found::NONE {
        work.reason = Reason::NoRoute as u32;
        return 0;
    }
    let Some(out) = DEVICE.get_ptr(&route::interface(work)) else {
        work.reason = Reason::NoRoute as u32;
        return 0;
    };
    // SAFETY: a pointer into a map that was just found.
    let source = unsafe { if v4 { &(*out).ip4 } else { &(*out).ip6 } };
    if route::is_none(source) {
        work.reason = Reason::NoRoute as u32;
        return 0;
    }
    copy(&mut work.entry.translated.src, source);
    work.entry.translated.src_port = balance::masquerade_port(random());
    work.entry.flags |= FlowEntry::REDIRECT | FlowEntry::ROUTED | FlowEntry::MASQUERADED;
    1
}

/// The interface that a packet would come into the IP stack by: a pod's does so by its bridge.
#[inline(always)]
pub(crate) fn incoming(skb: *mut __sk_buff, device: &DeviceEntry) -> u32 {
    if device.bridge != 0 { device.bridge } else { Skb(skb).ifindex() }
}

/// Makes the flow of a first packet that no Service is part of, whose tuple is in `work`. The reason is in `work`.
#[unsafe(no_mangle)]
#[inline(never)]
pub(crate) extern "C" fn service_open_direct(skb: *mut __sk_buff, device: *const DeviceEntry, meta: u32) -> u32 {
    // SAFETY: a pointer into a map that was found for this packet.
    let (Some(work), Some(device)) = (own_work(), unsafe { device.as_ref() }) else { return 0 };
    let meta = Meta(meta);
    if !meta.is(Meta::SETTLE) {
        begin(&mut work.entry, meta, device, Skb(skb).ifindex());
        work.reason = 0;
    }
    if meta.is(Meta::PROPOSE) {
        return 0;
    }
    write_key(&mut work.key, &work.entry.original, meta.proto_family(), FlowKey::SIDE_COMMON);
    let mode = if meta.is(Meta::REPLACE) { BPF_ANY } else { BPF_NOEXIST };
    let reason = match flow::put(&work.key, &work.entry, mode) {
        Ok(()) => Reason::DirectNew,
        // The other direction was faster on another CPU.
        Err(EEXIST) => Reason::Direct,
        Err(_) => Reason::Untracked,
    };
    work.reason = reason as u32;
    0
}

/// Makes the flow of a pod that talks to a backend directly, from a port from which it also talks to that backend
/// through a Service: the backend gets to see another source port. The tuple is in `work`, the reason comes there.
#[unsafe(no_mangle)]
#[inline(never)]
pub(crate) extern "C" fn service_open_beside(
    skb: *mut __sk_buff,
    work: *mut Work,
    device: *const DeviceEntry,
    meta: u32,
) -> u32 {
    // SAFETY: as in `service_open`.
    let (Some(work), Some(device)) = (unsafe { (work.as_mut(), device.as_ref()) }) else { return 0 };
    let meta = Meta(meta);
    if !meta.is(Meta::SETTLE) {
        begin(&mut work.entry, meta, device, Skb(skb).ifindex());
        work.reason = 0;
    }
    if meta.is(Meta::PROPOSE) {
        return 0;
    }
    for _ in 0..balance::PORT_TRIES {
        work.entry.translated.src_port = balance::source_port(random());
        work.entry.flags = FlowEntry::KEY_TRANSLATED | FlowEntry::INITIATOR_SIDE;
        service_reserve(u32::from(meta.proto_family()));
        if reason(work) == Reason::ServiceNew as u32 {
            work.reason = Reason::DirectNew as u32;
            service_finish(u32::from(meta.proto_family()), u32::from(FlowKey::SIDE_INITIATOR), BPF_ANY);
            break;
        }
    }
    0
}

/// Is a flow that is in the table to be made anew by this packet of its initiator? `moved`: the initiator's address
/// belongs to another pod than when the flow was made.
#[inline(always)]
pub(crate) fn is_stale(old: &FlowEntry, parsed: &Parsed, now: u64, moved: bool) -> bool {
    let idle = now.saturating_sub(old.last_seen);
    if parsed.proto == Proto::TCP {
        if !conntrack::opens(parsed.tcp_flags) {
            return false;
        }
        if conntrack::is_over(old.state) || moved {
            return true;
        }
        // A connection to a backend that is gone lives on; but one that asks to be opened once more never will.
        return old.service != 0
            && (old.state == state::SYN_SENT || idle > HANDSHAKE)
            && !serves(old.backend, old.generation);
    }
    if flow::is_idle(old.state, idle) || moved {
        return true;
    }
    old.service != 0 && !serves(old.backend, old.generation)
}
