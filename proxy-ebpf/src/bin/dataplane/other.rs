//! What is neither TCP, UDP nor SCTP, and fragments whose ports are not known, at a pod with a policy.
//!
//! ```text
//!   ARP                           checked where a pod sends it
//!   neighbours, listeners         checked where a pod sends them, never judged: the link lives by them
//!   echo request                  judged, and tracked by its identifier: answers pass
//!   ICMP errors                   pass with the flow that they are about; else judged, each
//!   other ICMP, echo reply alone  judged, each
//!   other protocols               judged and tracked by their addresses
//!   fragment without ports        judged, each; rules with ports do not match
//! ```

use aya_ebpf::bindings::__sk_buff;
use proxy_abi::{DeviceEntry, FlowKey, Hook, IpBytes, PortBe, Proto, Reason, Work};
use proxy_ebpf::conntrack::{self, Sender};
use proxy_ebpf::frame::{self, Message, kind};
use proxy_ebpf::packet::{self, ETH_LEN, Family, Fragment, Packet as _, V4, V6};

use crate::ctx::{Skb, copy, forget, write_key};
use crate::exit::Outcome;
use crate::maps::{DEVICE, FLOW_BRIEF, WORK};
use crate::service::Meta;
use crate::{flow, policy, service};

/// Bytes that are made readable of what is no IP packet: an ARP packet for IPv4.
const ARP_LEN: u32 = ETH_LEN as u32 + 28;

/// A frame that is neither IPv4 nor IPv6, or has a VLAN tag.
#[inline(always)]
pub(crate) fn frame(skb: Skb, hook: Hook) -> Outcome {
    if !matches!(hook, Hook::FromPod | Hook::ToPod) {
        return Outcome::pass(Reason::NotIp);
    }
    let reason = forget(other_frame(skb.0, u32::from(matches!(hook, Hook::FromPod))));
    Outcome::decided(reason)
}

#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn other_frame(skb: *mut __sk_buff, leaves: u32) -> u32 {
    let skb = Skb(skb);
    let Some(device) = DEVICE.get_ptr(&skb.ifindex()) else { return Reason::NotIp as u32 };
    // SAFETY: a pointer into a map that was just found.
    let device = unsafe { &*device };
    if device.slot == 0 {
        return Reason::NotIp as u32;
    }
    if skb.has_vlan() || skb.ethertype() != frame::ARP {
        return Reason::FrameType as u32;
    }
    if leaves == 0 {
        return Reason::NotIp as u32;
    }
    skb.pull(ARP_LEN);
    if !frame::is_from(&skb, device) {
        return Reason::FrameSource as u32;
    }
    frame::arp(&skb, device).unwrap_or(Reason::NotIp) as u32
}

/// May an enforced pod send a TCP, UDP or SCTP packet, or an ICMP error, with this source?
#[inline(always)]
pub(crate) fn is_own(skb: Skb, device: *const DeviceEntry, own: &IpBytes, src: &IpBytes) -> bool {
    // SAFETY: a pointer into a map that was found for this packet.
    let entry = unsafe { &*device };
    let address = forget(u32::from(own.halves() == src.halves() && own.halves() != (0, 0))) != 0;
    forget(u32::from(frame::is_from(&skb, entry))) != 0 && (address || other_is_own(device, src) != 0)
}

#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn other_is_own(device: *const DeviceEntry, ip: *const IpBytes) -> u32 {
    // SAFETY: the caller's: the stack, or a pointer into a map that was found for this packet.
    let (Some(device), Some(ip)) = (unsafe { (device.as_ref(), ip.as_ref()) }) else { return 0 };
    u32::from(frame::is_own(device, ip))
}

/// An IP packet that is none of TCP, UDP and SCTP, nor an error about a flow; a reason, which says whether it is dropped.
#[inline(always)]
pub(crate) fn packet<F: Family>(skb: Skb, device: *const DeviceEntry, hook: Hook) -> u32 {
    let leaves = u32::from(matches!(hook, Hook::FromPod));
    forget(if F::HEADER_CHECKSUM.is_some() { other_v4(skb.0, device, leaves) } else { other_v6(skb.0, device, leaves) })
}

#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn other_v4(skb: *mut __sk_buff, device: *const DeviceEntry, leaves: u32) -> u32 {
    other::<V4>(Skb(skb), device, leaves != 0)
}

#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn other_v6(skb: *mut __sk_buff, device: *const DeviceEntry, leaves: u32) -> u32 {
    other::<V6>(Skb(skb), device, leaves != 0)
}

#[inline(always)]
fn other<F: Family>(skb: Skb, device: *const DeviceEntry, leaves: bool) -> u32 {
    // SAFETY: a pointer into a map that was found for this packet; and this CPU's entry of the map `work`, which nobody
    // else uses now.
    let Some(entry) = (unsafe { device.as_ref() }) else { return Reason::NoDevice as u32 };
    let Some(work) = WORK.get_ptr_mut(0) else { return Reason::PolicyUnready as u32 };
    let plan = unsafe { &mut *work };
    let Ok(header) = F::parse_header(&skb) else { return Reason::FrameUnparsed as u32 };
    if packet::is_cut_short(F::FAMILY, header.proto) {
        return Reason::FrameUnparsed as u32;
    }
    let proto = Proto(forget(u32::from(header.proto)) as u8);
    let l4 = forget(header.l4 as u32);
    let fragment = forget(u32::from(header.fragment.0)) as u8;
    copy(&mut plan.entry.original.src, &header.src);
    copy(&mut plan.entry.original.dst, &header.dst);
    let mut how = how::FOLLOWED | how::BEGINS;
    let (mut from, mut to) = (0, 0);
    if proto == F::ICMP {
        how = 0;
        if fragment != Fragment::LATER.0 {
            let Some(kind) = skb.byte(l4 as usize) else { return Reason::FrameUnparsed as u32 };
            if F::HEADER_CHECKSUM.is_none() && (kind::is_neighbour(kind) || kind::is_listener(kind)) {
                return link_message(
                    skb,
                    device,
                    l4,
                    u32::from(kind) | u32::from(fragment) << 8 | u32::from(leaves) << 16,
                );
            }
            if kind == F::ECHO || kind == F::ECHO_REPLY {
                let Some(id) = skb.half(l4 as usize + 4) else { return Reason::FrameUnparsed as u32 };
                let mark = u16::from(F::ECHO).to_be();
                (from, to) = if kind == F::ECHO { (id, mark) } else { (mark, id) };
                how = if kind == F::ECHO { how::FOLLOWED | how::BEGINS | how::ASKS } else { how::FOLLOWED };
            }
        }
    }
    if leaves && (!frame::is_from(&skb, entry) || other_is_own(device, &plan.entry.original.src) == 0) {
        return Reason::FrameSource as u32;
    }
    plan.entry.original.src_port = PortBe(forget(u32::from(from)) as u16);
    plan.entry.original.dst_port = PortBe(forget(u32::from(to)) as u16);
    how |= if leaves { how::LEAVES } else { 0 };
    other_track(skb.0, work, device, u32::from(proto.0) | u32::from(F::FAMILY) << 8, forget(how))
}

/// What a packet of these protocols may be.
mod how {
    /// Part of a flow.
    pub(super) const FOLLOWED: u32 = 1;
    /// The first of one.
    pub(super) const BEGINS: u32 = 2;
    /// It asks, so it answers nothing.
    pub(super) const ASKS: u32 = 4;
    /// A pod sends it.
    pub(super) const LEAVES: u32 = 8;
}

#[inline(always)]
fn link_message(skb: Skb, device: *const DeviceEntry, l4: u32, about: u32) -> u32 {
    forget(other_link_message(skb.0, device, l4, about))
}

/// `about`: type, place in a fragmented packet, whether the pod sends it.
#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn other_link_message(skb: *mut __sk_buff, device: *const DeviceEntry, l4: u32, about: u32) -> u32 {
    let skb = Skb(skb);
    // SAFETY: a pointer into a map that was found for this packet.
    let Some(device) = (unsafe { device.as_ref() }) else { return Reason::NoDevice as u32 };
    let message_kind = about as u8;
    if about >> 16 == 0 {
        let forged = kind::is_neighbour(message_kind) && !frame::has_full_hops(&skb);
        return if forged { Reason::FrameNeighbour } else { Reason::OtherProtocol } as u32;
    }
    if !frame::is_from(&skb, device) {
        return Reason::FrameSource as u32;
    }
    let words = [0, 4, 8, 12].map(|part| skb.word(V6::SRC + part));
    let [Some(a), Some(b), Some(c), Some(d)] = words else { return Reason::FrameUnparsed as u32 };
    let fragmented = (about >> 8) as u8 != Fragment::WHOLE.0;
    let message = Message { src: IpBytes([a, b, c, d]), at: l4, kind: message_kind, fragmented };
    frame::link_message(&skb, device, &message).unwrap_or(Reason::OtherProtocol) as u32
}

/// A packet with its tuple in `work`; what it may be is told by [`how`].
#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn other_track(
    skb: *mut __sk_buff,
    work: *mut Work,
    device: *const DeviceEntry,
    proto_family: u32,
    how: u32,
) -> u32 {
    let skb = Skb(skb);
    // SAFETY: this CPU's entry of the map `work`, which nobody else uses now, and a pointer into a map.
    let (Some(plan), Some(entry)) = (unsafe { (work.as_mut(), device.as_ref()) }) else {
        return Reason::PolicyUnready as u32;
    };
    let (proto, leaves) = (Proto(proto_family as u8), how & how::LEAVES != 0);
    let now = flow::now();
    if how & how::FOLLOWED != 0 {
        write_key(&mut plan.key, &plan.entry.original, proto_family as u16, FlowKey::SIDE_COMMON);
        if let Some(found) = FLOW_BRIEF.get_ptr_mut(&plan.key) {
            // SAFETY: a pointer into a map that was just found; fields are written as in `flow_update`.
            let known = unsafe { &mut *found };
            let (a, b) = (known.original.src.halves(), plan.entry.original.src.halves());
            let answers = u32::from(
                (a.0 ^ b.0) | (a.1 ^ b.1) | u64::from(known.original.src_port.0 ^ plan.entry.original.src_port.0) != 0,
            );
            let idle = now.saturating_sub(known.last_seen);
            let fits = if answers == 0 { how & how::BEGINS != 0 } else { how & how::ASKS == 0 };
            if fits && !conntrack::is_idle(known.state, idle) {
                let why = policy::check(skb, found, work, entry.slot, !leaves, forget(answers), proto);
                if why == 0 {
                    let sender = if answers == 0 { Sender::Initiator } else { Sender::Responder };
                    known.state = conntrack::step(known.state, sender, proto, 0);
                    known.last_seen = now;
                    return Reason::OtherProtocol as u32;
                }
                return why;
            }
        }
    }
    if how & how::BEGINS == 0 {
        if leaves {
            copy(&mut plan.peer, &plan.entry.original.dst);
        } else {
            copy(&mut plan.peer, &plan.entry.original.src);
        }
        let why = policy::single(skb, work, entry.slot, !leaves, proto);
        return if why == 0 { Reason::OtherProtocol as u32 } else { why };
    }
    let from_node = !leaves && policy::is_from_node(skb);
    let meta = proto_family
        | if leaves { Meta::FROM_POD } else { 0 }
        | if from_node { Meta::FROM_NODE } else { 0 }
        | Meta::REPLACE;
    service::service_open_direct(skb.0, work, device, meta);
    let why = service::reason(work);
    if why >= u32::from(Reason::FIRST_DROP) { why } else { Reason::OtherProtocol as u32 }
}

/// A later fragment whose ports nobody has seen, on its way to a pod.
#[inline(always)]
pub(crate) fn portless(skb: Skb, work: *mut Work, slot: u16, src: &IpBytes, proto: Proto) -> u32 {
    // SAFETY: this CPU's entry of the map `work`, which nobody else uses now.
    copy(unsafe { &mut (*work).peer }, src);
    policy::single(skb, work, slot, true, proto)
}
