//! The first packet of a flow: which backend, under which tuple, on which path.

use aya_ebpf::bindings::{BPF_ANY, BPF_NOEXIST};
use aya_ebpf::helpers::bpf_get_prandom_u32;
use proxy_abi::flow::{provenance, state};
use proxy_abi::{
    BackendEntry, DeviceEntry, FlowEntry, FlowKey, FrontendEntry, FrontendKey, Hook, IpBytes, MacBytes, Proto, Reason,
    Stamp, Work,
};
use proxy_ebpf::packet::Parsed;
use proxy_ebpf::{balance, conntrack};

use crate::ctx::forget;
use crate::exit::count;
use crate::flow;
use crate::maps::{BACKEND, BACKEND_SLOT, DEVICE, FLOW_BRIEF, FLOW_LIVE, FRONTEND, LOCAL_POD};

/// How long a handshake that gets no further stands in the way of another flow.
const HANDSHAKE: u64 = 60 * conntrack::SECOND;

#[inline(always)]
pub(crate) fn random() -> u32 {
    // SAFETY: no arguments.
    unsafe { bpf_get_prandom_u32() }
}

/// The frontend that a packet from the cluster asks for.
#[inline(always)]
pub(crate) fn frontend(ip: &IpBytes, port: proxy_abi::PortBe, proto: Proto) -> Option<*const FrontendEntry> {
    FRONTEND.get_ptr(&FrontendKey { ip: *ip, port, proto, scope: FrontendKey::SCOPE_CLUSTER })
}

/// A backend that serves, by chance; with its id.
#[inline(always)]
pub(crate) fn choose(entry: &FrontendEntry) -> Result<(u32, &'static BackendEntry), Reason> {
    let slot = balance::pick(random(), entry.count).ok_or(Reason::NoBackend)?;
    let id = *BACKEND_SLOT.get(entry.first.wrapping_add(slot)).ok_or(Reason::BackendMissing)?;
    let backend = BACKEND.get(id).ok_or(Reason::BackendMissing)?;
    if backend.generation == 0 {
        return Err(Reason::BackendMissing);
    }
    Ok((id, backend))
}

/// Does the backend that a flow was made with still serve?
#[inline(always)]
pub(crate) fn serves(backend: u32, generation: u32) -> bool {
    BACKEND.get(backend).is_some_and(|b| b.generation == generation)
}

/// Fills in a direct flow: the same tuple for both sides.
#[inline(always)]
fn begin(entry: &mut FlowEntry, parsed: &Parsed, device: &DeviceEntry, ifindex: u32, from_pod: bool) {
    const NONE: Stamp = Stamp { revision: 0, rule: 0 };
    entry.original = parsed.tuple;
    entry.translated = parsed.tuple;
    entry.last_seen = flow::now();
    entry.service = 0;
    entry.backend = 0;
    entry.generation = 0;
    entry.initiator_ifindex = if from_pod { ifindex } else { 0 };
    entry.responder_ifindex = if from_pod { 0 } else { ifindex };
    entry.initiator_stamp = NONE;
    entry.responder_stamp = NONE;
    entry.initiator_mac = if from_pod { device.pod_mac } else { MacBytes([0; 6]) };
    entry.responder_mac = if from_pod { MacBytes([0; 6]) } else { device.pod_mac };
    entry.initiator_slot = if from_pod { device.slot } else { 0 };
    entry.responder_slot = if from_pod { 0 } else { device.slot };
    entry.flags = FlowEntry::KEY_ORIGINAL | FlowEntry::KEY_TRANSLATED;
    entry.state = conntrack::first(parsed.proto, parsed.tcp_flags);
    entry.provenance = if from_pod { provenance::POD } else { provenance::OUTSIDE };
}

/// May a new flow take the key of this one? Yes when it is the same flow's leftover, has ended, or leads nowhere.
#[inline(always)]
fn gives_way(old: &FlowEntry, new: &FlowEntry, proto: Proto) -> bool {
    if conntrack::is_live(old.state) {
        return false;
    }
    let idle = new.last_seen.saturating_sub(old.last_seen);
    if conntrack::is_over(old.state) || conntrack::is_idle(old.state, idle) {
        return true;
    }
    let (a, b) = (&old.original, &new.original);
    let ports = (a.src_port.0 ^ b.src_port.0) | (a.dst_port.0 ^ b.dst_port.0);
    let (s, t, d, e) = (a.src.halves(), b.src.halves(), a.dst.halves(), b.dst.halves());
    if u64::from(ports) | (s.0 ^ t.0) | (s.1 ^ t.1) | (d.0 ^ e.0) | (d.1 ^ e.1) == 0 {
        return true;
    }
    if proto == Proto::TCP {
        return idle > HANDSHAKE;
    }
    old.service != 0 && !serves(old.backend, old.generation)
}

/// Takes the key of the translated tuple for the flow in `work`, or tells that another flow has it.
#[inline(never)]
fn reserve(work: *mut Work, proto_family: u16) -> u32 {
    let (proto, family) = (Proto(proto_family as u8), (proto_family >> 8) as u8);
    // SAFETY: this CPU's entry of the map `work`, which nobody else uses now.
    let work = unsafe { &mut *work };
    work.key = work.entry.translated.key(proto, family, FlowKey::SIDE_COMMON);
    let mut reason = Reason::ClashUnresolved;
    if proto != Proto::TCP || FLOW_LIVE.get_ptr(&work.key).is_none() {
        if FLOW_BRIEF.insert(&work.key, &work.entry, u64::from(BPF_NOEXIST)).is_ok() {
            reason = Reason::ServiceNew;
        } else if let Some(old) = FLOW_BRIEF.get_ptr(&work.key) {
            // SAFETY: a pointer into a map that was just found.
            if gives_way(unsafe { &*old }, &work.entry, proto) {
                let taken = FLOW_BRIEF.insert(&work.key, &work.entry, u64::from(BPF_ANY)).is_ok();
                reason = if taken { Reason::ServiceNew } else { Reason::FlowTableFull };
            }
        } else {
            reason = Reason::FlowTableFull;
        }
    }
    work.reason = reason as u32;
    0
}

/// What `reserve` and its like left in `work`. Read from memory, so that the verifier walks what follows once.
#[inline(always)]
pub(crate) fn reason(work: *const Work) -> u32 {
    // SAFETY: as in `reserve`.
    unsafe { core::ptr::read_volatile(&raw const (*work).reason) }
}

#[inline(always)]
fn set_reason(work: *mut Work, reason: Reason) {
    // SAFETY: as in `reserve`.
    unsafe { core::ptr::write_volatile(&raw mut (*work).reason, reason as u32) };
}

/// Chooses a backend for the flow in `work`, and with it the path.
#[inline(never)]
fn try_backend(work: *mut Work, frontend: *const FrontendEntry, device: *const DeviceEntry) -> u32 {
    // SAFETY: pointers into maps that were just found.
    let (entry, frontend, device) = unsafe { (&mut (*work).entry, &*frontend, &*device) };
    match choose(frontend) {
        Ok((id, backend)) => {
            entry.backend = id;
            entry.generation = backend.generation;
            entry.translated.dst = backend.ip;
            entry.translated.dst_port = backend.port;
            entry.translated.src = entry.original.src;
            path(entry, device);
            forget(1)
        }
        Err(why) => {
            set_reason(work, why);
            forget(0)
        }
    }
}

/// Makes the flow of a first packet to a Service and leaves it under both of its keys, and in `work`. The entry for
/// replies goes in first, with BPF_NOEXIST; where two flows would look alike to a backend, another backend or source
/// port is taken. The reason is in `work`.
#[inline(never)]
pub(crate) fn open(
    work: *mut Work,
    parsed: &Parsed,
    frontend: *const FrontendEntry,
    device: *const DeviceEntry,
    ifindex: u32,
) -> u32 {
    // SAFETY: pointers into maps that were just found.
    let (entry, service) = unsafe { (&mut (*work).entry, (*frontend).service) };
    // SAFETY: as above.
    begin(entry, parsed, unsafe { &*device }, ifindex, true);
    entry.service = service;
    let proto_family = u16::from(parsed.proto.0) | u16::from(parsed.family) << 8;
    let mut found = 0;
    for attempt in 0..balance::BACKEND_TRIES + balance::PORT_TRIES {
        if attempt < balance::BACKEND_TRIES {
            if try_backend(work, frontend, device) == 0 {
                continue;
            }
            found = forget(1);
        } else {
            if found == 0 {
                break;
            }
            // SAFETY: as above.
            unsafe { (*work).entry.translated.src_port = balance::source_port(random()) };
        }
        // SAFETY: as above.
        unsafe { (*work).entry.flags = (*work).entry.flags & !FlowEntry::KEY_ORIGINAL | FlowEntry::KEY_TRANSLATED };
        reserve(work, proto_family);
        if reason(work) == Reason::ServiceNew as u32 {
            break;
        }
    }
    if reason(work) == Reason::ServiceNew as u32 {
        finish(work, proto_family, FlowKey::SIDE_COMMON);
    }
    0
}

/// Puts the flow in `work` under the key of its original tuple, too.
#[inline(never)]
fn finish(work: *mut Work, proto_family: u16, side: u8) -> u32 {
    let (proto, family) = (Proto(proto_family as u8), (proto_family >> 8) as u8);
    // SAFETY: as in `reserve`.
    let work = unsafe { &mut *work };
    work.entry.flags = work.entry.flags & !FlowEntry::KEY_TRANSLATED | FlowEntry::KEY_ORIGINAL;
    work.key = work.entry.original.key(proto, family, side);
    if FLOW_BRIEF.insert(&work.key, &work.entry, u64::from(BPF_ANY)).is_err() {
        work.reason = Reason::FlowTableFull as u32;
    }
    if work.entry.translated.src_port != work.entry.original.src_port {
        count(Hook::FromPod, Reason::PortRemapped, 0);
    }
    0
}

/// Which way the packets of a flow take, and so where replies are translated back.
#[inline(always)]
fn path(out: &mut FlowEntry, device: &DeviceEntry) {
    out.flags &= !(FlowEntry::REDIRECT | FlowEntry::SWITCH | FlowEntry::HAIRPIN);
    out.responder_ifindex = 0;
    let Some(pod) = LOCAL_POD.get_ptr(&out.translated.dst) else {
        // Not a pod of this node: the stack routes there and back.
        return;
    };
    // SAFETY: a pointer into a map that was just found.
    let pod = unsafe { &*pod };
    out.responder_mac = pod.mac;
    out.responder_slot = pod.slot;
    if pod.ifindex == out.initiator_ifindex {
        // A pod that reaches itself: it must see another address than its own, or its stack would take the answer for
        // its own packet. kube-proxy's masquerade shows it the bridge's address, so do we.
        let gateway = if out.original.src.is_v4() { device.gateway_ip4 } else { device.gateway_ip6 };
        if gateway != IpBytes::UNSPECIFIED {
            out.translated.src = gateway;
            out.responder_ifindex = pod.ifindex;
            out.flags |= FlowEntry::REDIRECT | FlowEntry::HAIRPIN;
        }
        return;
    }
    let both = device.flags & pod.flags;
    if both & DeviceEntry::REDIRECT != 0 {
        out.responder_ifindex = pod.ifindex;
        out.flags |= FlowEntry::REDIRECT;
    } else if both & DeviceEntry::SWITCH != 0
        && let Some(other) = DEVICE.get_ptr(&pod.ifindex)
    {
        // SAFETY: a pointer into a map that was just found.
        if device.bridge != 0 && unsafe { (*other).bridge } == device.bridge {
            out.flags |= FlowEntry::SWITCH;
        }
    }
}

/// Makes the flow of a first packet that no Service is part of. The reason is in `work`.
#[inline(never)]
pub(crate) fn open_direct(
    work: *mut Work,
    parsed: &Parsed,
    device: *const DeviceEntry,
    ifindex: u32,
    from_pod_replace: u32,
) -> u32 {
    // SAFETY: pointers into maps that were just found.
    begin(unsafe { &mut (*work).entry }, parsed, unsafe { &*device }, ifindex, from_pod_replace & 1 != 0);
    // SAFETY: as in `reserve`.
    let work = unsafe { &mut *work };
    work.key = parsed.tuple.key(parsed.proto, parsed.family, FlowKey::SIDE_COMMON);
    let mode = if from_pod_replace & 2 != 0 { BPF_ANY } else { BPF_NOEXIST };
    let reason = match FLOW_BRIEF.insert(&work.key, &work.entry, u64::from(mode)) {
        Ok(()) => Reason::DirectNew,
        // EEXIST: the other direction was faster on another CPU.
        Err(-17) => Reason::Direct,
        Err(_) => Reason::Untracked,
    };
    work.reason = reason as u32;
    0
}

/// Makes the flow of a pod that talks to a backend directly, from a port from which it also talks to that backend
/// through a Service: the backend gets to see another source port. The reason is in `work`.
#[inline(never)]
pub(crate) fn open_beside(work: *mut Work, parsed: &Parsed, device: *const DeviceEntry, ifindex: u32) -> u32 {
    // SAFETY: pointers into maps that were just found.
    begin(unsafe { &mut (*work).entry }, parsed, unsafe { &*device }, ifindex, true);
    let proto_family = u16::from(parsed.proto.0) | u16::from(parsed.family) << 8;
    for _ in 0..balance::PORT_TRIES {
        // SAFETY: as in `reserve`.
        unsafe {
            (*work).entry.translated.src_port = balance::source_port(random());
            (*work).entry.flags = FlowEntry::KEY_TRANSLATED | FlowEntry::INITIATOR_SIDE;
        }
        reserve(work, proto_family);
        if reason(work) == Reason::ServiceNew as u32 {
            set_reason(work, Reason::DirectNew);
            finish(work, proto_family, FlowKey::SIDE_INITIATOR);
            break;
        }
    }
    0
}

/// Is a flow that is in the table to be made anew by this packet of its initiator?
#[inline(always)]
pub(crate) fn is_stale(old: &FlowEntry, parsed: &Parsed, now: u64) -> bool {
    if parsed.proto == Proto::TCP {
        return conntrack::opens(parsed.tcp_flags)
            && (conntrack::is_over(old.state)
                || old.state == state::SYN_SENT && old.service != 0 && !serves(old.backend, old.generation));
    }
    if conntrack::is_idle(old.state, now.saturating_sub(old.last_seen)) {
        return true;
    }
    old.service != 0 && !serves(old.backend, old.generation)
}
