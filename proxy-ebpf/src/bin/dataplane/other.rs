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
use crate::maps::{DEVICE, DRY_RUN, FLOW_BRIEF, WORK, own_work};
use crate::service::Meta;
use crate::{flow, policy, tc};

/// Bytes that are made readable of what is no IP packet: an ARP packet for IPv4.
const ARP_LEN: u32 = ETH_LEN as u32 + 28;

/// A frame that is neither IPv4 nor IPv6, or has a VLAN tag.
#[inline(always)]
pub(crate) fn frame(skb: Skb, hook: Hook) -> Outcome {
    if !matches!(hook, Hook::FromPod | Hook::ToPod) {
        return Outcome::pass(Reason::NotIp);
    }
    Outcome::decided(other_frame(skb.0, u32::from(matches!(hook, Hook::FromPod))))
}

#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn other_frame(skb: *mut __sk_buff, leaves: u32) -> u32 {
    let skb = Skb(skb);
    let Some(device) = DEVICE.get_ptr(&skb.ifindex()) else { return Reason::NotIp as u32 };
    // SAFETY: a pointer into a map that was just found.
    let device = unsafe { &*device };
    if device.slot == 0 || is_free(device) {
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

/// May an enforced pod send this TCP, UDP or SCTP packet, or ICMP error, by its MAC and its source?
#[inline(always)]
pub(crate) fn is_own<F: Family>(skb: Skb, device: *const DeviceEntry) -> bool {
    let own = if F::HEADER_CHECKSUM.is_some() { other_own_v4(skb.0, device) } else { other_own_v6(skb.0, device) };
    own != 0
}

#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn other_own_v4(skb: *mut __sk_buff, device: *const DeviceEntry) -> u32 {
    let skb = Skb(skb);
    let source = skb.word(V4::SRC).map(IpBytes::from_v4_word);
    // SAFETY: a pointer into a map that was found for this packet.
    let (Some(device), Some(source)) = (unsafe { device.as_ref() }, source) else { return 0 };
    u32::from(is_free(device) || frame::is_from(&skb, device) && frame::is_own(device, &source))
}

#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn other_own_v6(skb: *mut __sk_buff, device: *const DeviceEntry) -> u32 {
    let skb = Skb(skb);
    // SAFETY: a pointer into a map that was found for this packet.
    let (Some(device), Some(source)) = (unsafe { device.as_ref() }, source_v6(skb)) else { return 0 };
    u32::from(is_free(device) || frame::is_from(&skb, device) && frame::is_own(device, &source))
}

/// Is the slot there only to audit, so that the frame rules do not hold?
#[inline(always)]
pub(crate) fn is_free(device: *const DeviceEntry) -> bool {
    // SAFETY: a pointer into a map that was found for this packet.
    unsafe { (*device).flags & DeviceEntry::AUDITED != 0 }
}

#[inline(always)]
fn source_v6(skb: Skb) -> Option<IpBytes> {
    let word = |part| skb.word(V6::SRC + part);
    Some(IpBytes([word(0)?, word(4)?, word(8)?, word(12)?]))
}

/// An IP packet that is none of TCP, UDP and SCTP, nor an error about a flow; a reason, which says whether it is dropped.
#[inline(always)]
pub(crate) fn packet<F: Family>(skb: Skb, device: *const DeviceEntry, hook: Hook, slot: u16) -> u32 {
    let leaves = matches!(hook, Hook::FromPod);
    let Some(work) = WORK.get_ptr_mut(0) else { return Reason::PolicyUnready as u32 };
    // SAFETY: this CPU's entry of the map `work`, which nobody else uses now.
    let plan = unsafe { &mut *work };
    // What the packet before was for is none of this one's.
    (plan.service, plan.backend, plan.rule) = (0, 0, 0);
    let read = if F::HEADER_CHECKSUM.is_some() {
        other_v4(skb.0, device, u32::from(leaves))
    } else {
        other_v6(skb.0, device, u32::from(leaves))
    };
    if read & how::READ == 0 {
        return if F::HEADER_CHECKSUM.is_none() && read & how::LINK != 0 {
            other_link_message(skb.0, device, read)
        } else if forget(read) == Reason::FrameUnparsed as u32 && is_free(device) {
            Reason::Unparsed as u32
        } else {
            read
        };
    }
    let proto = Proto(read as u8);
    let place = other_place(read | u32::from(F::FAMILY) << 8);
    let refused = if place == place::NEW {
        let from_node = !leaves && policy::is_from_node(skb);
        let meta = u32::from(proto.0) | u32::from(F::FAMILY) << 8 | Meta::REPLACE;
        let meta = meta | if leaves { Meta::FROM_POD } else { 0 } | if from_node { Meta::FROM_NODE } else { 0 };
        let reason = tc::open_direct(skb, work, device, hook, Meta(meta));
        if reason >= u32::from(Reason::FIRST_DROP) { reason } else { 0 }
    } else if place == place::NONE {
        policy::single(skb, work, slot, hook, proto)
    } else {
        let answers = u32::from(place == place::ANSWER);
        let refused = policy::by_key(skb, work, hook, policy::side(!leaves, answers) | u32::from(slot), proto);
        if refused == 0 {
            other_touch(answers);
        }
        refused
    };
    if refused == 0 { Reason::OtherProtocol as u32 } else { refused }
}

/// Where a packet of these protocols belongs.
mod place {
    /// To no flow, and it makes none.
    pub(super) const NONE: u32 = 0;
    /// It is the first of one.
    pub(super) const NEW: u32 = 1;
    /// It goes the way of the first one of its flow.
    pub(super) const FORWARD: u32 = 2;
    /// It goes the other way.
    pub(super) const ANSWER: u32 = 3;
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
                if l4 > how::PLACE {
                    return Reason::FrameUnparsed as u32;
                }
                let whole = if fragment == Fragment::WHOLE.0 { 0 } else { how::FRAGMENT };
                let sent = if leaves { how::LEAVES } else { 0 };
                return how::LINK | whole | sent | u32::from(kind) | (l4 & how::PLACE) << 8;
            }
            if kind == F::ECHO || kind == F::ECHO_REPLY {
                let Some(id) = skb.half(l4 as usize + 4) else { return Reason::FrameUnparsed as u32 };
                let mark = u16::from(F::ECHO).to_be();
                (from, to) = if kind == F::ECHO { (id, mark) } else { (mark, id) };
                how = if kind == F::ECHO { how::FOLLOWED | how::BEGINS | how::ASKS } else { how::FOLLOWED };
            }
        }
    }
    if leaves && !is_own::<F>(skb, device) {
        return Reason::FrameSource as u32;
    }
    plan.entry.original.src_port = PortBe(forget(u32::from(from)) as u16);
    plan.entry.original.dst_port = PortBe(forget(u32::from(to)) as u16);
    how |= if leaves { how::LEAVES } else { 0 };
    forget(how) | how::READ | u32::from(proto.0)
}

/// What a packet of these protocols may be.
mod how {
    /// It has been read. Without this and `LINK`, a number is a reason.
    pub(super) const READ: u32 = 1 << 31;
    /// A message of the link.
    pub(super) const LINK: u32 = 1 << 30;
    /// Where its header is, at most; in a number with `LINK` times 256.
    pub(super) const PLACE: u32 = 0x7ff;
    /// That message is a fragment.
    pub(super) const FRAGMENT: u32 = 1 << 29;
    /// Part of a flow.
    pub(super) const FOLLOWED: u32 = 1 << 16;
    /// The first of one.
    pub(super) const BEGINS: u32 = 1 << 17;
    /// It asks, so it answers nothing.
    pub(super) const ASKS: u32 = 1 << 18;
    /// A pod sends it.
    pub(super) const LEAVES: u32 = 1 << 19;
}

/// A message of the link. `read`: type, place of the ICMPv6 header times 256, flags of [`how`].
#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn other_link_message(skb: *mut __sk_buff, device: *const DeviceEntry, read: u32) -> u32 {
    let skb = Skb(skb);
    // SAFETY: a pointer into a map that was found for this packet.
    let Some(device) = (unsafe { device.as_ref() }) else { return Reason::NoDevice as u32 };
    let message_kind = read as u8;
    if is_free(device) {
        return Reason::OtherProtocol as u32;
    }
    if read & how::LEAVES == 0 {
        let forged = kind::is_neighbour(message_kind) && !frame::has_full_hops(&skb);
        return if forged { Reason::FrameNeighbour } else { Reason::OtherProtocol } as u32;
    }
    if !frame::is_from(&skb, device) {
        return Reason::FrameSource as u32;
    }
    let Some(src) = source_v6(skb) else { return Reason::FrameUnparsed as u32 };
    let fragmented = read & how::FRAGMENT != 0;
    let message = Message { src, at: read >> 8 & how::PLACE, kind: message_kind, fragmented };
    frame::link_message(&skb, device, &message).unwrap_or(Reason::OtherProtocol) as u32
}

/// Where the packet belongs whose tuple is in `work`; `read` tells what it may be, by [`how`], its protocol and its family.
/// The key of its flow comes into `work`, or the other end.
#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn other_place(read: u32) -> u32 {
    let Some(plan) = own_work() else { return place::NONE };
    let leaves = read & how::LEAVES != 0;
    copy(&mut plan.peer, if leaves { &plan.entry.original.dst } else { &plan.entry.original.src });
    if read & how::FOLLOWED == 0 {
        return place::NONE;
    }
    write_key(&mut plan.key, &plan.entry.original, read as u16, FlowKey::SIDE_COMMON);
    if let Some(found) = FLOW_BRIEF.get_ptr(&plan.key) {
        // SAFETY: a pointer into a map that was just found.
        let known = unsafe { &*found };
        let (a, b) = (known.original.src.halves(), plan.entry.original.src.halves());
        let apart = known.original.src_port.0 ^ plan.entry.original.src_port.0;
        let answers = (a.0 ^ b.0) | (a.1 ^ b.1) | u64::from(apart) != 0;
        let fits = read & if answers { how::ASKS } else { how::BEGINS };
        let idle = flow::now().saturating_sub(known.last_seen);
        if !flow::is_idle(known.state, idle) && (fits == 0) == answers {
            return if answers { place::ANSWER } else { place::FORWARD };
        }
    }
    if read & how::BEGINS != 0 { place::NEW } else { place::NONE }
}

/// A packet of the flow under the key in `work` has passed.
#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn other_touch(answers: u32) -> u32 {
    if DRY_RUN.load() != 0 {
        return 0;
    }
    let Some(work) = own_work() else { return 0 };
    if let Some(found) = FLOW_BRIEF.get_ptr_mut(&work.key) {
        // SAFETY: a pointer into a map that was just found; fields are written as in `flow_update`.
        let known = unsafe { &mut *found };
        let sender = if answers == 0 { Sender::Initiator } else { Sender::Responder };
        known.state = conntrack::step(known.state, sender, work.key.proto, 0);
        known.last_seen = flow::now();
    }
    0
}

/// A later fragment whose ports nobody has seen, on its way to a pod.
#[inline(always)]
pub(crate) fn portless(skb: Skb, work: *mut Work, slot: u16, src: &IpBytes, proto: Proto) -> u32 {
    // SAFETY: this CPU's entry of the map `work`, which nobody else uses now.
    let plan = unsafe { &mut *work };
    (plan.service, plan.backend) = (0, 0);
    copy(&mut plan.peer, src);
    policy::single(skb, work, slot, Hook::ToPod, proto)
}
