//! ICMP errors about translated packets: unreachable, too big, time exceeded. The quoted packet is turned back into what
//! its sender wrote, and the addresses around it with it, or the sender would not know the connection.
//!
//! ```text
//!   R → B    [IP R → C][ICMP 3/4, MTU 1400][IP C → B][ports …]        what a router R says to client C
//!   becomes  [IP R → C][ICMP 3/4, MTU 1400][IP C → VIP][ports …]      what C understands
//! ```
//!
//! An error about a packet goes the way of an answer to it. So it is looked up under the quoted tuple turned round, and
//! the same hook that translates answers translates it. The outer source changes only when it is an end of the flow
//! itself; a router keeps its name.

use aya_ebpf::bindings::__sk_buff;
use proxy_abi::{DeviceEntry, FlowEntry, FlowKey, Hook, IpBytes, Proto, Reason, Tuple};
use proxy_ebpf::packet::{self, ETH_LEN, Family, ICMP_LEN, OFFSET_MASK, V4, V6};
use proxy_ebpf::rewrite;

use crate::ctx::{Skb, copy, forget, write_key};
use crate::exit::Verdict;
use crate::maps::WORK;
use crate::route::found;
use crate::{flow, policy, send, service, tc};

/// Offsets of the transport checksum that may be quoted.
const TCP_CHECKSUM: usize = 16;
const UDP_CHECKSUM: usize = 6;

/// In `work`, in place of a reason: the error is about a flow, and policy is to be asked about that. With the flags of
/// [`policy::again`] and the protocol.
const ASK: u32 = 1 << 31;

/// What becomes of an ICMP error with its header at `l4`. In two functions one after the other, because their stacks
/// would not fit into one.
#[inline(always)]
pub(crate) fn error<F: Family>(skb: Skb, hook: Hook, l4: u32, device: *const DeviceEntry, slot: u16) -> (Verdict, u32) {
    let comes = u32::from(matches!(hook, Hook::FromPod | Hook::FromNetdev)) | u32::from(slot) << 1;
    // What is quoted may lie behind what has been made readable.
    skb.pull(l4 + ICMP_LEN as u32 + 80);
    let v4 = F::HEADER_CHECKSUM.is_some();
    let about = if v4 { icmp_find_v4(skb.0, l4, comes) } else { icmp_find_v6(skb.0, l4, comes) };
    let about = forget(about);
    if slot != 0
        && let Some(work) = WORK.get_ptr_mut(0)
    {
        let asked = forget(service::reason(work));
        if asked & ASK != 0 && about != Reason::OtherProtocol as u32 {
            let why = policy::by_key(skb, work, hook, asked & 0xff_0000 | u32::from(slot), Proto(asked as u8));
            if why != 0 {
                return (Verdict::Drop, why);
            }
        }
    }
    if about < 256 {
        let verdict = if about >= u32::from(Reason::FIRST_DROP) { Verdict::Drop } else { Verdict::Pass };
        return (verdict, about);
    }
    // SAFETY: this CPU's entry of the map `work`; a pointer into a map that was found for this packet.
    let (Some(work), Some(device)) = (WORK.get_ptr_mut(0), unsafe { device.as_ref() }) else {
        return (Verdict::Pass, Reason::OtherProtocol as u32);
    };
    // SAFETY: as above.
    let (redirect, set_mac, mac) =
        unsafe { (forget((*work).redirect), forget(u32::from((*work).set_mac)), &(*work).mac) };
    if set_mac == u32::from(FlowEntry::ROUTED)
        && send::way_out(skb, work, device, 0, u32::from(F::ICMP.0)) == found::NONE
    {
        return (Verdict::Drop, Reason::NoRoute as u32);
    }
    let macs = (set_mac & u32::from(FlowEntry::REDIRECT | FlowEntry::SWITCH) == 0 || skb.set_dst_mac(mac).is_some())
        && (set_mac & u32::from(FlowEntry::REDIRECT) == 0 || skb.set_src_mac(&device.gateway_mac).is_some());
    let written = if v4 { icmp_rewrite_v4(skb.0, l4, about) } else { icmp_rewrite_v6(skb.0, l4, about) };
    if !macs || forget(written) == 0 {
        return (Verdict::Drop, Reason::RewriteFailed as u32);
    }
    let outcome = send::send(work, redirect, set_mac, Reason::IcmpError as u32);
    (outcome.verdict, outcome.reason)
}

#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn icmp_find_v4(skb: *mut __sk_buff, l4: u32, comes: u32) -> u32 {
    find::<V4>(Skb(skb), l4, comes & 1 != 0, (comes >> 1) as u16)
}

#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn icmp_find_v6(skb: *mut __sk_buff, l4: u32, comes: u32) -> u32 {
    find::<V6>(Skb(skb), l4, comes & 1 != 0, (comes >> 1) as u16)
}

/// Finds the flow of the quoted packet and plans the way of the error, which is in `work` then. A reason to let it pass
/// or to drop it, below 256; or protocol and offset of the quoted transport header, times 256 and 65,536.
#[inline(always)]
fn find<F: Family>(skb: Skb, l4: u32, comes: bool, slot: u16) -> u32 {
    let Some(work) = WORK.get_ptr_mut(0) else { return Reason::OtherProtocol as u32 };
    let Some(quoted) = packet::quoted::<F, Skb>(&skb, l4 as usize) else {
        return Reason::OtherProtocol as u32;
    };
    // SAFETY: this CPU's entry of the map `work`, which nobody else uses now.
    let plan = unsafe { &mut *work };
    copy(&mut plan.quoted, &quoted.tuple);
    plan.reason = 0;
    let proto_family = u16::from(quoted.proto.0) | u16::from(F::FAMILY) << 8;
    write_key(&mut plan.key, &plan.quoted, proto_family, FlowKey::SIDE_COMMON);
    let Some(found) = flow::find(&plan.key) else {
        return Reason::OtherProtocol as u32;
    };
    // SAFETY: a pointer into a map that was just found.
    let entry = unsafe { &*found };
    if slot == 0 && !entry.is_translated() {
        return Reason::OtherProtocol as u32;
    }
    let original = entry.flags & FlowEntry::KEY_ORIGINAL != 0;
    let role = if original { &entry.original } else { &entry.translated };
    let (a, b) = (role.src.halves(), plan.quoted.src.halves());
    // The quoted packet came from the initiator: the error answers it.
    let answers = (a.0 ^ b.0) | (a.1 ^ b.1) | u64::from(role.src_port.0 ^ plan.quoted.src_port.0) == 0;
    if slot != 0 {
        // It is this pod's flow only if the quoted packet came to it, or from it.
        let (own, end) = if comes { (F::SRC, &plan.quoted.dst) } else { (F::DST, &plan.quoted.src) };
        if address::<F>(skb, own).is_none_or(|own| own.halves() != end.halves()) {
            return Reason::OtherProtocol as u32;
        }
        plan.reason = policy::side(!comes, u32::from(answers)) | u32::from(quoted.proto.0) | ASK;
        if !entry.is_translated() {
            return Reason::Direct as u32;
        }
    }
    let redirects = entry.flags & FlowEntry::REDIRECT != 0;
    if original && !answers && comes {
        tc::forward(entry, plan);
    } else if !original && answers && (redirects || !comes) {
        tc::backward(entry, plan, comes);
    } else {
        return Reason::Seen as u32;
    }
    u32::from(quoted.proto.0) << 8 | u32::from(quoted.l4) << 16
}

#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn icmp_rewrite_v4(skb: *mut __sk_buff, l4: u32, about: u32) -> u32 {
    rewritten::<V4>(Skb(skb), l4, about)
}

#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn icmp_rewrite_v6(skb: *mut __sk_buff, l4: u32, about: u32) -> u32 {
    rewritten::<V6>(Skb(skb), l4, about)
}

#[inline(always)]
fn rewritten<F: Family>(skb: Skb, l4: u32, about: u32) -> u32 {
    let Some(work) = WORK.get_ptr_mut(0) else { return 0 };
    // SAFETY: this CPU's entry of the map `work`, which nobody else uses now.
    let plan = unsafe { &*work };
    let (proto, quoted_l4) = (Proto((about >> 8) as u8), (about >> 16) as usize);
    u32::from(rewrite_error::<F>(skb, l4 as usize, quoted_l4, proto, &plan.quoted, &plan.new).is_some())
}

/// `quoted`: the quoted tuple as it stands there. `new`: the tuple that an answer to it gets; the quoted packet gets the
/// reverse of it.
#[inline(always)]
fn rewrite_error<F: Family>(skb: Skb, icmp: usize, l4: usize, proto: Proto, quoted: &Tuple, new: &Tuple) -> Option<()> {
    let (icmp, l4) = (icmp & OFFSET_MASK, l4 & OFFSET_MASK);
    let inner = icmp + ICMP_LEN;
    let (src, dst) = (address::<F>(skb, F::SRC)?, address::<F>(skb, F::DST)?);
    // The outer packet: from the end that the quoted one went to, or from a router; to the end that it came from.
    let mut outer = 0_u64;
    if src.halves() == quoted.dst.halves() {
        outer += u64::from(rewrite::address_difference(&src, &new.src));
        skb.write_ip::<F>(F::SRC, &new.src)?;
    }
    if dst.halves() == quoted.src.halves() {
        outer += u64::from(rewrite::address_difference(&dst, &new.dst));
        skb.write_ip::<F>(F::DST, &new.dst)?;
    }
    let outer = rewrite::fold32(outer);
    if let Some(offset) = F::HEADER_CHECKSUM {
        let checksum: u16 = skb.read(offset)?;
        skb.write(offset, rewrite::header_checksum(checksum, outer))?;
    }
    // The quoted packet. What changes in it changes the checksum of ICMP, the quoted checksums among it.
    let back = new.reversed();
    let addresses = rewrite::difference(quoted, &back);
    let (old_ports, new_ports) =
        (rewrite::ports_word(quoted.src_port, quoted.dst_port), rewrite::ports_word(back.src_port, back.dst_port));
    let ports = rewrite::fold32(u64::from(!old_ports) + u64::from(new_ports));
    let mut total = u64::from(addresses) + u64::from(ports);
    skb.write_ip::<F>(inner + F::SRC - ETH_LEN, &back.src)?;
    skb.write_ip::<F>(inner + F::DST - ETH_LEN, &back.dst)?;
    if let Some(offset) = F::HEADER_CHECKSUM {
        let at = inner + offset - ETH_LEN;
        let old: u16 = skb.read(at)?;
        let fresh = rewrite::header_checksum(old, addresses);
        skb.write(at, fresh)?;
        total += u64::from(!old) + u64::from(fresh);
    }
    skb.write(l4, new_ports)?;
    let field = if proto == Proto::TCP { TCP_CHECKSUM } else { UDP_CHECKSUM };
    // TCP's may not be quoted; UDP's may be none.
    if proto != Proto::SCTP
        && let Some(old) = skb.read::<u16>(l4 + field)
        && old != 0
    {
        let difference = rewrite::fold32(u64::from(addresses) + u64::from(ports));
        let fresh = rewrite::header_checksum(old, difference);
        skb.write(l4 + field, fresh)?;
        total += u64::from(!old) + u64::from(fresh);
    }
    if F::HEADER_CHECKSUM.is_none() {
        // RFC 4443 §2.3: the pseudo-header counts.
        total += u64::from(outer);
    }
    let old: u16 = skb.read(icmp + 2)?;
    // The kernel and devices finish the checksum of ICMP before it is sent; nothing is pending.
    skb.write(icmp + 2, rewrite::header_checksum(old, rewrite::fold32(total)))
}

#[inline(always)]
fn address<F: Family>(skb: Skb, offset: usize) -> Option<IpBytes> {
    if F::HEADER_CHECKSUM.is_some() {
        return skb.read(offset).map(IpBytes::from_v4_word);
    }
    Some(IpBytes([skb.read(offset)?, skb.read(offset + 4)?, skb.read(offset + 8)?, skb.read(offset + 12)?]))
}
