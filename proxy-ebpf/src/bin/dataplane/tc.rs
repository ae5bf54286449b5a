//! `from_pod` and `to_pod`: what is looked up, in which order, and what follows from it.
//!
//! Each entry of a flow lies under the tuple of one side, its role. With the direction of the packet that gives four
//! cases, and what each hook does in them:
//!
//! ```text
//!   role, direction       packet      from_pod                         to_pod
//!   original,   forward   C → VIP     translate; redirect or go on     –
//!   original,   reply     VIP → C     –                                already translated back: go on
//!   translated, forward   C → B       the same ports, directly: beside already translated: go on
//!   translated, reply     B → C       REDIRECT: translate back, send   translate back
//!   both,       any       direct      go on                            go on
//! ```
//!
//! `to_pod` never assumes that `from_pod` ran: the packet may come from the node, from outside or from a veth that is
//! not programmed.

use aya_ebpf::bindings::__sk_buff;
use aya_ebpf::helpers::bpf_redirect;
use proxy_abi::{
    DeviceEntry, FlowEntry, FlowKey, FragmentEntry, FrontendEntry, Hook, IpBytes, PortBe, Proto, Reason, Tuple, Work,
};
use proxy_ebpf::conntrack::{self, Sender};
use proxy_ebpf::packet::{self, Family, Fragment, Parsed, V4, V6};

use crate::ctx::{Skb, copy, copy_mac, forget, write_key};
use crate::exit::{self, Outcome, Verdict};
use crate::maps::{DEVICE, FRAGMENT, WORK};
use crate::service::Meta;
use crate::{flow, service};

/// Bytes that are made readable at once: Ethernet, IPv6 with some extension, TCP.
const HEADERS: u32 = 128;

/// What is to become of a packet, as a number: the verifier is to forget how it came about (see [`forget`]).
mod step {
    /// Go on as it is.
    pub(super) const PASS: u32 = 0;
    /// Drop.
    pub(super) const DROP: u32 = 1;
    /// Write it as the plan says.
    pub(super) const WRITE: u32 = 2;
    /// Make a direct flow.
    pub(super) const OPEN_DIRECT: u32 = 3;
    /// Make a direct flow in place of an old one.
    pub(super) const REOPEN_DIRECT: u32 = 4;
    /// Make a direct flow beside one through a Service.
    pub(super) const OPEN_BESIDE: u32 = 5;
    /// Make a flow through a Service.
    pub(super) const OPEN_SERVICE: u32 = 6;
}

#[inline(always)]
pub(crate) fn run(skb: *mut __sk_buff, hook: Hook) -> i32 {
    let skb = Skb(skb);
    let outcome = if skb.has_vlan() {
        Outcome::pass(Reason::NotIp)
    } else if skb.ethertype() == V4::ETHERTYPE {
        packet::<V4>(skb, hook)
    } else if skb.ethertype() == V6::ETHERTYPE {
        packet::<V6>(skb, hook)
    } else {
        Outcome::pass(Reason::NotIp)
    };
    exit::packet(hook, skb.len(), &outcome)
}

#[inline(always)]
fn packet<F: Family>(skb: Skb, hook: Hook) -> Outcome {
    let ifindex = skb.ifindex();
    let Some(device) = DEVICE.get_ptr(&ifindex) else {
        return Outcome::pass(Reason::NoDevice);
    };
    skb.pull(HEADERS);
    let mut parsed = match packet::parse::<F, Skb>(&skb) {
        Ok(parsed) => parsed,
        Err(reason) => return Outcome::pass(reason),
    };
    if parsed.fragment != Fragment::WHOLE {
        let first = u32::from(parsed.fragment == Fragment::FIRST);
        let ports = fragment_ports(&parsed.tuple, parsed.fragment_id, u32::from(parsed.proto.0), first);
        if ports == u64::MAX {
            return Outcome::drop(Reason::FragmentBeforeFirst);
        }
        parsed.tuple.src_port = PortBe(ports as u16);
        parsed.tuple.dst_port = PortBe((ports >> 16) as u16);
    }
    parsed.fragment = Fragment(forget(u32::from(parsed.fragment.0)) as u8);
    let Some(work) = WORK.get_ptr_mut(0) else {
        return Outcome::pass(Reason::Untracked);
    };
    // SAFETY: this CPU's entry of the map `work`, which nobody else uses now; here and below.
    let plan = unsafe { &mut *work };
    plan.service = 0;
    plan.backend = 0;
    let mut frontend = None;
    write_key(
        &mut plan.key,
        &parsed.tuple,
        u16::from(parsed.proto.0) | u16::from(F::FAMILY) << 8,
        FlowKey::SIDE_COMMON,
    );
    let (next, reason) = match flow::find(&plan.key) {
        Some(found) => known::<F>(hook, &parsed, device, ifindex, found, plan),
        None => (step::OPEN_SERVICE, Reason::ServiceNew),
    };
    let (mut next, mut reason) = (forget(next), forget(reason as u32));
    let replace = if reason == Reason::ServiceNew as u32 { 0 } else { Meta::REPLACE };
    if next == step::OPEN_SERVICE {
        next = step::OPEN_DIRECT;
        if matches!(hook, Hook::FromPod) {
            frontend = service::frontend(&parsed.tuple.dst, parsed.tuple.dst_port, parsed.proto);
            if frontend.is_some() {
                next = step::OPEN_SERVICE;
            }
        }
        if next == step::OPEN_DIRECT && reason != Reason::ServiceNew as u32 {
            // A flow through a Service that has gone, with its backend.
            next = step::DROP;
            reason = Reason::NoBackend as u32;
        }
    }
    if next >= step::OPEN_DIRECT {
        (next, reason) = open(&parsed, device, ifindex, frontend, next, hook, forget(replace), work);
        (next, reason) = (forget(next), forget(reason));
    }
    if next == step::WRITE {
        return write::<F>(skb, &parsed, device, work, reason);
    }
    let verdict = if next == step::DROP { Verdict::Drop } else { Verdict::Pass };
    Outcome::numbered(verdict, reason).of(plan.service, plan.backend)
}

/// The ports of a fragmented packet, destination in the upper half: those of the first fragment, which are remembered
/// for the later ones. All bits set: the first has not come by.
#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn fragment_ports(tuple: *const Tuple, id: u32, proto: u32, first: u32) -> u64 {
    // SAFETY: the caller's.
    let Some(tuple) = (unsafe { tuple.as_ref() }) else { return u64::MAX };
    let Some(work) = WORK.get_ptr_mut(0) else { return u64::MAX };
    // SAFETY: this CPU's entry of the map `work`, which nobody else uses now.
    let key = unsafe { &mut (*work).fragment };
    copy(&mut key.src, &tuple.src);
    copy(&mut key.dst, &tuple.dst);
    key.id = id;
    key.proto = Proto(proto as u8);
    let mut entry = FragmentEntry { src_port: tuple.src_port, dst_port: tuple.dst_port, reserved: 0 };
    if first != 0 {
        if FRAGMENT.insert(&*key, &entry, 0).is_err() {
            return u64::MAX;
        }
    } else if let Some(found) = FRAGMENT.get_ptr(&*key) {
        // SAFETY: a pointer into a map that was just found.
        entry = unsafe { *found };
    } else {
        return u64::MAX;
    }
    u64::from(entry.dst_port.0) << 16 | u64::from(entry.src_port.0)
}

/// A packet whose flow is in the table.
#[inline(always)]
fn known<F: Family>(
    hook: Hook,
    parsed: &Parsed,
    device: *const DeviceEntry,
    ifindex: u32,
    found: *mut FlowEntry,
    plan: &mut Work,
) -> (u32, Reason) {
    let from_pod = matches!(hook, Hook::FromPod);
    let mut found = found;
    // SAFETY: a pointer into a map that was just found; here and below.
    let mut entry = unsafe { &*found };
    let mut original = entry.flags & FlowEntry::KEY_ORIGINAL;
    let role = if original != 0 { &entry.original } else { &entry.translated };
    let (a, b) = (role.src.halves(), parsed.tuple.src.halves());
    let apart = (a.0 ^ b.0) | (a.1 ^ b.1) | u64::from(role.src_port.0 ^ parsed.tuple.src_port.0);
    // 0: from the initiator.
    let mut answers = forget(u32::from(apart != 0));
    if from_pod && original == 0 && answers == 0 && entry.initiator_ifindex == ifindex {
        // Another flow of this pod looks to the backend as this packet would.
        plan.key.side = FlowKey::SIDE_INITIATOR;
        let Some(beside) = flow::find(&plan.key) else {
            if parsed.proto == Proto::TCP && !conntrack::opens(parsed.tcp_flags) {
                return (step::PASS, Reason::Direct);
            }
            return (step::OPEN_BESIDE, Reason::DirectNew);
        };
        found = beside;
        // SAFETY: as above.
        entry = unsafe { &*found };
        original = FlowEntry::KEY_ORIGINAL;
        answers = 0;
    }
    let (original, answers) = (forget(u32::from(original)), forget(answers));
    let now = flow::now();
    let translated = forget(u32::from(entry.is_translated()));
    let proto_family = u16::from(parsed.proto.0) | u16::from(F::FAMILY) << 8;
    // Another pod has got the address of the one that began the flow.
    let moved = from_pod
        && translated & !answers != 0
        && entry.service != 0
        && entry.initiator_ifindex != ifindex
        && device_ip::<F>(device).halves() == parsed.tuple.src.halves();
    if original != 0
        && answers & translated == 0
        && forget(u32::from(service::is_stale(entry, parsed, now, forget(u32::from(moved)) != 0))) != 0
    {
        if parsed.proto == Proto::TCP && translated != 0 {
            flow::flow_discard(found, u32::from(proto_family));
        }
        if translated == 0 {
            return (step::REOPEN_DIRECT, Reason::DirectNew);
        }
        if entry.flags & FlowEntry::INITIATOR_SIDE != 0 {
            return (step::OPEN_BESIDE, Reason::DirectNew);
        }
        plan.service = entry.service;
        plan.backend = entry.backend;
        return (step::OPEN_SERVICE, Reason::NoBackend);
    }
    let sender = if answers == 0 { Sender::Initiator } else { Sender::Responder };
    let state = forget(u32::from(conntrack::step(entry.state, sender, parsed.proto, parsed.tcp_flags))) as u8;
    let idle = now.saturating_sub(entry.last_seen);
    if state != entry.state || idle > conntrack::TOUCH {
        flow::update(found, state, now, proto_family, hook);
    }
    plan.service = entry.service;
    plan.backend = entry.backend;
    if translated == 0 {
        return (step::PASS, Reason::Direct);
    }
    if original != 0 && answers == 0 && from_pod {
        forward(entry, plan);
        return (step::WRITE, Reason::Service);
    }
    let redirects = entry.flags & FlowEntry::REDIRECT != 0;
    // A reply of a flow that is redirected comes to `to_pod` as it is only when no program of ours is at the backend.
    if original == 0 && answers != 0 && (redirects || !from_pod) {
        backward(entry, plan, from_pod);
        return (step::WRITE, Reason::Reply);
    }
    (step::PASS, Reason::Seen)
}

/// The pod's address as the agent bound it.
#[inline(always)]
fn device_ip<'a, F: Family>(device: *const DeviceEntry) -> &'a IpBytes {
    // SAFETY: a pointer into a map that was found for this packet; entries of maps outlive the program's run.
    unsafe { if F::HEADER_CHECKSUM.is_some() { &(*device).ip4 } else { &(*device).ip6 } }
}

/// A packet that makes a flow: the next step, with its reason.
#[inline(always)]
fn open(
    parsed: &Parsed,
    device: *const DeviceEntry,
    ifindex: u32,
    frontend: Option<*const FrontendEntry>,
    how: u32,
    hook: Hook,
    replace: u32,
    work: *mut Work,
) -> (u32, u32) {
    let from_pod = matches!(hook, Hook::FromPod);
    let meta = Meta::new(parsed, replace | if from_pod { Meta::FROM_POD } else { 0 });
    // SAFETY: this CPU's entry of the map `work`, which nobody else uses now.
    copy(unsafe { &mut (*work).entry.original }, &parsed.tuple);
    if how == step::OPEN_SERVICE {
        let Some(frontend) = frontend else {
            return (step::DROP, Reason::NoBackend as u32);
        };
        if parsed.proto == Proto::TCP && !conntrack::opens(parsed.tcp_flags) {
            // SAFETY: a pointer into a map that was just found.
            unsafe { (*work).service = (*frontend).service };
            return (step::DROP, Reason::NoFlow as u32);
        }
        service::service_open(work, frontend, device, ifindex, meta.0);
    } else if how == step::OPEN_BESIDE {
        service::service_open_beside(work, device, ifindex, meta.0);
    } else {
        service::service_open_direct(work, device, ifindex, meta.0);
        return (step::PASS, service::reason(work));
    }
    let reason = service::reason(work);
    // SAFETY: this CPU's entry of the map `work`; the plan and the entry are different parts of it.
    let entry = unsafe { &*(&raw const (*work).entry) };
    // SAFETY: as above.
    forward(entry, unsafe { &mut *work });
    if reason >= u32::from(Reason::FIRST_DROP) { (step::DROP, reason) } else { (step::WRITE, reason) }
}

/// From the initiator's tuple to the responder's.
#[inline(always)]
fn forward(entry: &FlowEntry, plan: &mut Work) {
    copy(&mut plan.new, &entry.translated);
    copy_mac(&mut plan.mac, &entry.responder_mac);
    plan.set_mac = entry.flags & (FlowEntry::REDIRECT | FlowEntry::SWITCH);
    plan.redirect = if entry.flags & FlowEntry::REDIRECT != 0 { entry.responder_ifindex } else { 0 };
    plan.service = entry.service;
    plan.backend = entry.backend;
}

/// From the responder's reply to what the initiator expects.
#[inline(always)]
fn backward(entry: &FlowEntry, plan: &mut Work, redirect: bool) {
    copy(&mut plan.new, &entry.original.reversed());
    copy_mac(&mut plan.mac, &entry.initiator_mac);
    plan.set_mac = if redirect { FlowEntry::REDIRECT } else { 0 };
    plan.redirect = if redirect { entry.initiator_ifindex } else { 0 };
}

/// Writes the packet as planned and sends it on its way.
#[inline(always)]
fn write<F: Family>(skb: Skb, parsed: &Parsed, device: *const DeviceEntry, plan: *const Work, reason: u32) -> Outcome {
    // SAFETY: a pointer into a map that was found for this packet; and this CPU's entry of `work`.
    let (gateway, plan) = unsafe { (&(*device).gateway_mac, &*plan) };
    // A bridge that switches the frame wants to see the pod's own MAC, not its own, at the pod's port.
    let written = (plan.set_mac == 0 || skb.set_dst_mac(&plan.mac).is_some())
        && (plan.set_mac & FlowEntry::REDIRECT == 0 || skb.set_src_mac(gateway).is_some())
        && skb.rewrite::<F>(parsed, &parsed.tuple, &plan.new).is_some();
    if !written {
        return Outcome::drop(Reason::RewriteFailed).of(plan.service, plan.backend);
    }
    let mut outcome = Outcome::numbered(Verdict::Pass, reason).of(plan.service, plan.backend);
    if plan.redirect != 0 {
        // SAFETY: sets the target of this packet; an interface that is gone drops it in the kernel.
        unsafe { bpf_redirect(plan.redirect, 0) };
        outcome.verdict = Verdict::Redirect;
    }
    outcome
}
