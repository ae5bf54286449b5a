//! The packet programs: what is looked up, in which order, and what follows from it.
//!
//! Each entry of a flow lies under the tuple of one side, its role. With the direction of the packet that gives four
//! cases, and what each hook does in them; `from` is `from_pod` or `from_netdev`, `to` is `to_pod` or `to_netdev`:
//!
//! ```text
//!   role, direction       packet      from                             to
//!   original,   forward   C → VIP     translate; redirect or go on     –
//!   original,   reply     VIP → C     –                                already translated back: go on
//!   translated, forward   C → B       the same ports, directly: beside already translated: go on
//!   translated, reply     B → C       REDIRECT: translate back, send   translate back
//!   both,       any       direct      go on                            go on
//! ```
//!
//! No program assumes that another one ran: the packet may come from the node, from outside or from a veth that is not
//! programmed. At the interfaces of the node only flows through Services are followed; all else passes without an entry.

use aya_ebpf::bindings::__sk_buff;
use proxy_abi::flow::state::{CLOSED, FIN_RESPONDER, SYN_SENT};
use proxy_abi::{
    DeviceEntry, FlowEntry, FlowKey, FragmentEntry, FrontendEntry, Hook, IpBytes, PortBe, PrefixKey, Proto, Reason,
    TcpMoment, Tuple, Work,
};
use proxy_ebpf::conntrack::{self, Sender};
use proxy_ebpf::packet::{self, Family, Fragment, OFFSET_MASK, Parsed, V4, V6, tcp_flag};
use proxy_ebpf::{frame, timewait};

use crate::ctx::{Skb, copy, copy_mac, forget, write_key};
use crate::exit::{self, Outcome, Verdict};
use crate::maps::{DEVICE, DRY_RUN, FRAGMENT, WORK};
use crate::service::Meta;
use crate::{flow, frontend, icmp, other, policy, refuse, send, service};

/// Bytes that are made readable at once where it is not a plain TCP segment: Ethernet, IPv6 with some extension, TCP.
const HEADERS: u32 = 128;

/// What is to become of a packet, as a number: the verifier is to forget how it came about (see [`forget`]).
mod step {
    /// Go on as it is.
    pub(super) const PASS: u32 = 0;
    /// Drop.
    pub(super) const DROP: u32 = 1;
    /// Write it as the plan says.
    pub(super) const WRITE: u32 = 2;
    /// Answer that there is nothing, and drop.
    pub(super) const REFUSE: u32 = 3;
    /// Make a direct flow.
    pub(super) const OPEN_DIRECT: u32 = 4;
    /// Make a direct flow beside one through a Service.
    pub(super) const OPEN_BESIDE: u32 = 5;
    /// Make a flow through a Service, if there is one; else a direct one.
    pub(super) const OPEN_SERVICE: u32 = 6;
}

#[inline(always)]
pub(crate) fn run(skb: *mut __sk_buff, hook: Hook) -> i32 {
    let skb = Skb(skb);
    let outcome = if skb.has_vlan() {
        other::frame(skb, hook)
    } else if skb.ethertype() == V4::ETHERTYPE {
        packet::<V4>(skb, hook)
    } else if skb.ethertype() == V6::ETHERTYPE {
        packet::<V6>(skb, hook)
    } else {
        other::frame(skb, hook)
    };
    exit::packet(hook, skb, &outcome)
}

#[inline(always)]
fn packet<F: Family>(skb: Skb, hook: Hook) -> Outcome {
    let ifindex = skb.ifindex();
    let Some(device) = DEVICE.get_ptr(&ifindex) else {
        return Outcome::pass(Reason::NoDevice);
    };
    let comes = matches!(hook, Hook::FromPod | Hook::FromNetdev);
    let netdev = matches!(hook, Hook::FromNetdev | Hook::ToNetdev);
    // SAFETY: a pointer into a map that was just found.
    let slot = if netdev { 0 } else { forget(u32::from(unsafe { (*device).slot })) as u16 };
    skb.pull_headers::<F>(HEADERS);
    let mut parsed = match packet::parse::<F, Skb>(&skb) {
        Ok(parsed) => parsed,
        Err(Reason::OtherProtocol) if slot != 0 => return judged(other::packet::<F>(skb, device, hook, slot)),
        Err(_) if slot != 0 && !other::is_free(device) => return Outcome::drop(Reason::FrameUnparsed),
        Err(reason) => return Outcome::pass(reason),
    };
    if slot != 0 && matches!(hook, Hook::FromPod) {
        if !other::is_own::<F>(skb, device) {
            return Outcome::drop(Reason::FrameSource);
        }
        let (from, to) = (parsed.tuple.src_port.get(), parsed.tuple.dst_port.get());
        if parsed.proto == Proto::UDP && frame::is_dhcp_server(from, to) && !other::is_free(device) {
            return Outcome::drop(Reason::FrameRouter);
        }
    }
    if parsed.proto == F::ICMP {
        let (verdict, reason) = icmp::error::<F>(skb, hook, u32::from(parsed.l4), device, slot);
        if slot != 0 && forget(reason) == Reason::OtherProtocol as u32 {
            return judged(other::packet::<F>(skb, device, hook, slot));
        }
        return Outcome::numbered(verdict, reason);
    }
    if parsed.fragment != Fragment::WHOLE {
        let first = u32::from(parsed.fragment == Fragment::FIRST);
        let ports = fragment_ports(&parsed.tuple, parsed.fragment_id, u32::from(parsed.proto.0), first);
        if ports == u64::MAX {
            if slot != 0
                && matches!(hook, Hook::ToPod)
                && let Some(work) = WORK.get_ptr_mut(0)
            {
                let why = other::portless(skb, work, slot, &parsed.tuple.src, parsed.proto);
                return judged(if why == 0 { Reason::FragmentUnknown as u32 } else { why });
            }
            if !matches!(hook, Hook::FromPod) {
                // Whose it is cannot be known. If a Service's, whoever puts it together waits for the rest in vain, as it
                // would if it were dropped. If not, nothing is lost.
                return Outcome::pass(Reason::FragmentUnknown);
            }
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
    plan.rule = 0;
    let mut frontend = None;
    write_key(
        &mut plan.key,
        &parsed.tuple,
        u16::from(parsed.proto.0) | u16::from(F::FAMILY) << 8,
        FlowKey::SIDE_COMMON,
    );
    let (next, reason) = match flow::find(&plan.key) {
        Some(found) => known::<F>(skb, hook, &parsed, device, slot, found, work),
        None => (step::OPEN_SERVICE, Reason::ServiceNew as u32),
    };
    let (mut next, mut reason) = (forget(next), forget(reason));
    let unknown = reason == Reason::ServiceNew as u32;
    let gone = reason == Reason::NoBackend as u32;
    let mut meta = if unknown { 0 } else { Meta::REPLACE };
    if next == step::OPEN_SERVICE {
        next = step::OPEN_DIRECT;
        if netdev && unknown && (!comes || parsed.proto == Proto::TCP && !conntrack::opens(parsed.tcp_flags)) {
            // Most of what the node itself sends and receives ends here.
            return Outcome::pass(Reason::NotService);
        }
        if comes {
            let found = ask(&parsed, netdev, plan);
            frontend = found.0;
            (next, reason) = (forget(found.1), if gone { reason } else { forget(found.2) });
            if next == step::OPEN_SERVICE && !netdev && parsed.proto == Proto::TCP && flow::is_over_quota(&ifindex) {
                (next, reason) = (step::REFUSE, Reason::PodQuota as u32);
            }
            meta |= if plan.frontend_flags & FrontendEntry::MASQUERADE != 0 { Meta::MASQUERADE } else { 0 };
        }
        if next == step::OPEN_DIRECT && gone {
            // A flow through a Service that has gone, with its backend.
            next = step::REFUSE;
            reason = Reason::NoBackend as u32;
        }
        if next == step::OPEN_DIRECT && netdev {
            return Outcome::pass(Reason::NotService);
        }
    }
    if next >= step::OPEN_DIRECT {
        (next, reason) = open(skb, &parsed, device, frontend, next, hook, forget(meta), work);
        (next, reason) = (forget(next), forget(reason));
    }
    if next == step::WRITE {
        return send::packet::<F>(skb, &parsed, device, work, hook, reason);
    }
    if next == step::REFUSE {
        return refuse::packet::<F>(skb, &parsed, 0, reason).of(plan.service, plan.backend);
    }
    let verdict = if next == step::DROP { Verdict::Drop } else { Verdict::Pass };
    Outcome::numbered(verdict, reason).of(plan.service, plan.backend).by(plan.rule)
}

/// The end of a packet that policy was asked about outside of the flow tables: a reason, which says what becomes of it.
#[inline(always)]
fn judged(reason: u32) -> Outcome {
    let outcome = Outcome::decided(reason);
    match WORK.get_ptr_mut(0) {
        // SAFETY: this CPU's entry of the map `work`.
        Some(work) => outcome.by(unsafe { (*work).rule }),
        None => outcome,
    }
}

/// The frontend that the first packet of a flow asks for, and what is to become of the packet: step and reason. Leaves
/// the frontend's flags in `plan`, MASQUERADE among them when this packet's source is to change.
#[inline(always)]
fn ask(parsed: &Parsed, netdev: bool, plan: &mut Work) -> (Option<*const FrontendEntry>, u32, u32) {
    let Tuple { src, dst, dst_port, .. } = &parsed.tuple;
    let mut found = match frontend::look_up(dst, *dst_port, parsed.proto) {
        Ok(found) => found,
        Err(mark) => {
            if mark & FrontendEntry::ADDRESS_REJECT != 0 {
                return (None, step::REFUSE, Reason::NoSuchPort as u32);
            }
            if mark == 0 && frontend::is_within(dst, PrefixKey::SERVICE_CIDR) {
                return (None, step::DROP, Reason::Unallocated as u32);
            }
            return (None, step::OPEN_DIRECT, Reason::DirectNew as u32);
        }
    };
    // SAFETY: a pointer into a map that was just found; here and below.
    let mut entry = unsafe { &*found };
    let special = FrontendEntry::EXTERNAL_SPLIT | FrontendEntry::MASQUERADE_OUTSIDE;
    let mut flags = forget(entry.flags);
    if netdev && flags & special != 0 && !frontend::is_within(src, PrefixKey::LOCAL_SOURCE) {
        if flags & FrontendEntry::MASQUERADE_OUTSIDE != 0 {
            flags |= FrontendEntry::MASQUERADE;
        }
        if flags & FrontendEntry::EXTERNAL_SPLIT != 0
            && let Some(split) = frontend::from_outside(dst, *dst_port, parsed.proto)
        {
            found = split;
            entry = unsafe { &*found };
            flags = entry.flags;
        }
    }
    plan.frontend_flags = flags;
    plan.service = entry.service;
    if flags & FrontendEntry::SOURCE_RANGES != 0 && !frontend::is_within(src, entry.service) {
        return (None, step::DROP, Reason::SourceNotAllowed as u32);
    }
    if entry.count == 0 {
        if flags & FrontendEntry::DROP_EMPTY != 0 {
            return (None, step::DROP, Reason::NoLocalBackend as u32);
        }
        return (None, step::REFUSE, Reason::NoBackend as u32);
    }
    (Some(found), step::OPEN_SERVICE, Reason::ServiceNew as u32)
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
        if DRY_RUN.load() == 0 && FRAGMENT.insert(&*key, &entry, 0).is_err() {
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
    skb: Skb,
    hook: Hook,
    parsed: &Parsed,
    device: *const DeviceEntry,
    slot: u16,
    found: *mut FlowEntry,
    work: *mut Work,
) -> (u32, u32) {
    let ifindex = skb.ifindex();
    let from_pod = matches!(hook, Hook::FromPod);
    let comes = matches!(hook, Hook::FromPod | Hook::FromNetdev);
    // SAFETY: this CPU's entry of the map `work`, which nobody else uses now.
    let plan = unsafe { &mut *work };
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
                let unknown = (step::DROP, Reason::NoFlow as u32);
                return if slot == 0 { (step::PASS, Reason::Direct as u32) } else { unknown };
            }
            return (step::OPEN_BESIDE, Reason::DirectNew as u32);
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
        && (comes || translated == 0)
        && answers & translated == 0
        && forget(u32::from(service::is_stale(entry, parsed, now, forget(u32::from(moved)) != 0))) != 0
    {
        if parsed.proto == Proto::TCP {
            flow::flow_discard(found, u32::from(proto_family));
        }
        if translated == 0 {
            return (step::OPEN_SERVICE, Reason::DirectNew as u32);
        }
        if entry.flags & FlowEntry::INITIATOR_SIDE != 0 {
            return (step::OPEN_BESIDE, Reason::DirectNew as u32);
        }
        if parsed.proto == Proto::TCP && forget(u32::from(conntrack::is_over(entry.state))) != 0 {
            // Another connection. Where its Service has gone meanwhile, it may be another proxy's.
            return (step::OPEN_SERVICE, Reason::DirectNew as u32);
        }
        plan.service = entry.service;
        plan.backend = entry.backend;
        return (step::OPEN_SERVICE, Reason::NoBackend as u32);
    }
    // Its entry for replies was evicted, and another flow has its port by now: answers would go there for ever. Asked where
    // no answer is known to have come: with a SYN that comes once more, and once a second for all else but TCP.
    if original != 0 && comes && translated & !answers != 0 {
        let asks = if parsed.proto == Proto::TCP {
            entry.state == SYN_SENT && conntrack::opens(parsed.tcp_flags)
        } else {
            now.saturating_sub(entry.last_seen) > conntrack::TOUCH
        };
        if forget(u32::from(asks)) != 0 && flow::flow_is_robbed(found, u32::from(proto_family)) != 0 {
            if entry.flags & FlowEntry::INITIATOR_SIDE != 0 {
                return (step::OPEN_BESIDE, Reason::DirectNew as u32);
            }
            return (step::OPEN_SERVICE, Reason::DirectNew as u32);
        }
    }
    // A connection that has ended is not answered any more: this one belongs to another that looks like it, for example one
    // of another proxy that masquerades with a port which was ours. What comes after this segment must not find it either.
    if original == 0
        && answers != 0
        && parsed.tcp_flags & tcp_flag::SYN != 0
        && parsed.proto == Proto::TCP
        && forget(u32::from(conntrack::is_over(entry.state))) != 0
    {
        flow::flow_discard(found, u32::from(proto_family));
        if slot != 0 {
            // To the policy it is a connection like any other.
            return (step::OPEN_SERVICE, Reason::DirectNew as u32);
        }
        return (step::PASS, Reason::Seen as u32);
    }
    // A Service may have come to the address that a direct flow goes to. Looked for with each request to open a connection,
    // and once a second for all else but TCP.
    if translated == 0 && comes && answers == 0 {
        let asks = if parsed.proto == Proto::TCP {
            conntrack::opens(parsed.tcp_flags)
        } else {
            now.saturating_sub(entry.last_seen) > conntrack::TOUCH
        };
        if forget(u32::from(asks)) != 0
            && frontend::look_up(&parsed.tuple.dst, parsed.tuple.dst_port, parsed.proto).is_ok()
        {
            if parsed.proto == Proto::TCP {
                flow::flow_discard(found, u32::from(proto_family));
            }
            return (step::OPEN_SERVICE, Reason::DirectNew as u32);
        }
    }
    if slot != 0 {
        let why = policy::check(skb, found, work, slot, hook, answers, parsed.proto);
        if why != 0 {
            return (step::DROP, why);
        }
    }
    let sender = if answers == 0 { Sender::Initiator } else { Sender::Responder };
    let state = forget(u32::from(conntrack::step(entry.state, sender, parsed.proto, parsed.tcp_flags))) as u8;
    let idle = now.saturating_sub(entry.last_seen);
    if forget(u32::from(state == CLOSED && entry.state == FIN_RESPONDER && entry.flags & FlowEntry::MASQUERADED != 0))
        != 0
    {
        // The backend closed first, and holds the connection in TIME_WAIT from this segment on.
        // SAFETY: as above; both directions write under the rules of `flow_update`.
        tcp_moment(skb.0, u32::from(parsed.l4), unsafe { &raw mut (*found).last_sent });
    }
    if state != entry.state || idle > conntrack::TOUCH {
        flow::update(found, state, now, proto_family, hook);
    }
    plan.service = entry.service;
    plan.backend = entry.backend;
    if translated == 0 {
        return (step::PASS, Reason::Direct as u32);
    }
    if original != 0 && answers == 0 && comes {
        forward(entry, plan);
        return (step::WRITE, Reason::Service as u32);
    }
    let redirects = entry.flags & FlowEntry::REDIRECT != 0;
    // A reply of a flow that is redirected comes to a `to` hook as it is only when no program of ours is at the backend.
    if original == 0 && answers != 0 && (redirects || !comes) {
        backward(entry, plan, comes);
        return (step::WRITE, Reason::Reply as u32);
    }
    (step::PASS, Reason::Seen as u32)
}

/// [`timewait::moment`] of a segment.
#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn tcp_moment(skb: *mut __sk_buff, l4: u32, to: *mut TcpMoment) -> u32 {
    if DRY_RUN.load() != 0 {
        return 0;
    }
    // SAFETY: the caller's: part of an entry of a map.
    let Some(to) = (unsafe { to.as_mut() }) else { return 0 };
    copy(to, &timewait::moment(&Skb(skb), l4 as usize & OFFSET_MASK));
    0
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
    skb: Skb,
    parsed: &Parsed,
    device: *const DeviceEntry,
    frontend: Option<*const FrontendEntry>,
    how: u32,
    hook: Hook,
    meta: u32,
    work: *mut Work,
) -> (u32, u32) {
    let origin = match hook {
        Hook::FromPod => Meta::FROM_POD,
        Hook::FromNetdev => Meta::FROM_NETDEV,
        Hook::ToPod if policy::is_from_node(skb) => Meta::FROM_NODE,
        _ => 0,
    };
    let meta = Meta::new(parsed, meta | origin);
    // SAFETY: this CPU's entry of the map `work`, which nobody else uses now.
    copy(unsafe { &mut (*work).entry.original }, &parsed.tuple);
    // SAFETY: a pointer into a map that was found for this packet.
    let policed = !netdev(hook) && unsafe { (*device).slot } != 0;
    if how == step::OPEN_SERVICE {
        let Some(frontend) = frontend else {
            return (step::DROP, Reason::NoBackend as u32);
        };
        if parsed.proto == Proto::TCP && !conntrack::opens(parsed.tcp_flags) {
            if matches!(hook, Hook::FromNetdev) {
                return (step::PASS, Reason::Midstream as u32);
            }
            return (step::DROP, Reason::NoFlow as u32);
        }
        if parsed.proto == Proto::TCP && meta.0 & Meta::MASQUERADE != 0 {
            // SAFETY: this CPU's entry of the map `work`, which nobody else uses now.
            tcp_moment(skb.0, u32::from(parsed.l4), unsafe { &raw mut (*work).asked });
        }
        let mut phase = 0;
        if policed {
            service::service_open(skb.0, work, frontend, device, meta.0 | Meta::PROPOSE);
            let mut refused = service::reason(work);
            if refused == 0 {
                refused = policy::open(skb, work, device, hook, parsed.proto);
            }
            if refused != 0 {
                return (step::DROP, refused);
            }
            phase = Meta::SETTLE;
        }
        service::service_open(skb.0, work, frontend, device, meta.0 | forget(phase));
    } else if how == step::OPEN_BESIDE {
        let mut phase = 0;
        if policed {
            service::service_open_beside(skb.0, work, device, meta.0 | Meta::PROPOSE);
            let refused = policy::open(skb, work, device, hook, parsed.proto);
            if refused != 0 {
                return (step::DROP, refused);
            }
            phase = Meta::SETTLE;
        }
        service::service_open_beside(skb.0, work, device, meta.0 | forget(phase));
    } else {
        let reason = open_direct(skb, work, device, hook, meta);
        return (if reason >= u32::from(Reason::FIRST_DROP) { step::DROP } else { step::PASS }, reason);
    }
    let reason = service::reason(work);
    // SAFETY: this CPU's entry of the map `work`; the plan and the entry are different parts of it.
    let entry = unsafe { &*(&raw const (*work).entry) };
    // SAFETY: as above.
    forward(entry, unsafe { &mut *work });
    if reason >= u32::from(Reason::FIRST_DROP) {
        return (step::DROP, reason);
    }
    if reason == Reason::ServiceNew as u32 || reason == Reason::DirectNew as u32 {
        if entry.flags & FlowEntry::MASQUERADED != 0 {
            exit::count(hook, Reason::Masqueraded, 0);
        } else if entry.translated.src_port != entry.original.src_port {
            exit::count(hook, Reason::PortRemapped, 0);
        }
    }
    (step::WRITE, reason)
}

/// Makes the direct flow whose tuple is in `work`, where policy allows it; the reason.
#[inline(always)]
pub(crate) fn open_direct(skb: Skb, work: *mut Work, device: *const DeviceEntry, hook: Hook, meta: Meta) -> u32 {
    let mut phase = 0;
    // SAFETY: a pointer into a map that was found for this packet.
    if !netdev(hook) && unsafe { (*device).slot } != 0 {
        service::service_open_direct(skb.0, device, meta.0 | Meta::PROPOSE);
        let refused = policy::open(skb, work, device, hook, Proto(meta.0 as u8));
        if refused != 0 {
            return refused;
        }
        phase = Meta::SETTLE;
    }
    service::service_open_direct(skb.0, device, meta.0 | forget(phase));
    service::reason(work)
}

/// From the initiator's tuple to the responder's.
#[inline(always)]
pub(crate) fn forward(entry: &FlowEntry, plan: &mut Work) {
    copy(&mut plan.new, &entry.translated);
    copy_mac(&mut plan.mac, &entry.responder_mac);
    let redirects = entry.flags & FlowEntry::REDIRECT != 0;
    plan.set_mac = entry.flags & (FlowEntry::REDIRECT | FlowEntry::SWITCH);
    if entry.flags & FlowEntry::ROUTED != 0 {
        plan.set_mac = FlowEntry::ROUTED;
    }
    plan.redirect = if redirects { entry.responder_ifindex } else { 0 };
    plan.service = entry.service;
    plan.backend = entry.backend;
}

/// From the responder's reply to what the initiator expects.
#[inline(always)]
pub(crate) fn backward(entry: &FlowEntry, plan: &mut Work, redirect: bool) {
    copy(&mut plan.new, &entry.original.reversed());
    copy_mac(&mut plan.mac, &entry.initiator_mac);
    plan.set_mac = if redirect { FlowEntry::REDIRECT } else { 0 };
    if redirect && entry.flags & FlowEntry::OUTSIDE != 0 {
        plan.set_mac = FlowEntry::ROUTED;
    }
    plan.redirect = if redirect { entry.initiator_ifindex } else { 0 };
}

/// Does the hook sit at an interface of the node?
#[inline(always)]
pub(crate) const fn netdev(hook: Hook) -> bool {
    matches!(hook, Hook::FromNetdev | Hook::ToNetdev)
}
