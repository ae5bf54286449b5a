//! Answers to packets that go nowhere: a reset for TCP, ICMP unreachable for the rest, ICMP too big where a link is
//! narrower. Made out of the packet itself, sent back by the interface it came in by.
//!
//! A sender may have left the transport checksum to a device (CHECKSUM_PARTIAL): then the kernel keeps, beside the
//! packet, from where to where to sum and where to put the result, and a device without that ability makes the kernel
//! do so when the answer leaves: over the answer. No program can see or clear this mark. So an answer is made such that
//! it does no harm:
//!
//! ```text
//!   reset   TCP header at its old place, 20 bytes. `bpf_skb_change_tail` refuses to cut off the field that a pending
//!           checksum goes to: cutting one byte too many tells whether there is one. Then the field gets the sum of the
//!           pseudo-header alone, else the whole sum.
//!   ICMP    [Ethernet][IP][ICMP 8][quoted IP header][first 8 bytes of UDP or SCTP, 20 of TCP]
//!           The mark still points at the quoted transport header. Its checksum field, which nobody can verify in a
//!           packet that was cut, gets the one value f that summing leaves as it is: f = ~(rest + f), so 2f = ~rest in
//!           one's complement, and halving is a rotation by one bit.
//! ```

use aya_ebpf::bindings::__sk_buff;
use aya_ebpf::helpers;
use proxy_abi::{MacBytes, Proto, Reason};
use proxy_ebpf::packet::{ETH_LEN, Family, Packet as _, Parsed, V4, V6, tcp_flag};
use proxy_ebpf::rewrite;

use crate::ctx::{Skb, forget};
use crate::exit::{Outcome, Verdict};
use crate::maps::LIMIT;

/// Answers and drops: `mtu` 0 refuses, any other tells the largest packet. Without an answer (a reset, a header that
/// cannot be followed, too many a second) the packet only drops.
#[inline(always)]
pub(crate) fn packet<F: Family>(skb: Skb, parsed: &Parsed, mtu: u32, reason: u32) -> Outcome {
    let l4 = u32::from(parsed.l4);
    let about = u32::from(parsed.proto.0) | u32::from(parsed.tcp_flags) << 8;
    let answered = if parsed.fragment.0 == 2 {
        0
    } else if F::HEADER_CHECKSUM.is_some() {
        refuse_v4(skb.0, l4, about, mtu)
    } else {
        refuse_v6(skb.0, l4, about, mtu)
    };
    match forget(answered) {
        0 => Outcome::numbered(Verdict::Drop, reason),
        LIMITED => Outcome::drop(Reason::RefuseLimited),
        _ => {
            // SAFETY: sets the target of this packet.
            unsafe { helpers::bpf_redirect(skb.ifindex(), 0) };
            Outcome::numbered(Verdict::Redirect, reason)
        }
    }
}

const LIMITED: u32 = 2;

/// May the stack cut this packet into fragments?
#[inline(always)]
pub(crate) fn may_be_cut<F: Family>(skb: Skb) -> bool {
    // RFC 791 §3.1: bit 14 of flags and offset is Don't Fragment. IPv6 routers never fragment.
    F::HEADER_CHECKSUM.is_some() && skb.half(ETH_LEN + 6).is_some_and(|field| u16::from_be(field) & 0x4000 == 0)
}

#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn refuse_v4(skb: *mut __sk_buff, l4: u32, about: u32, mtu: u32) -> u32 {
    answer::<V4>(Skb(skb), l4, about, mtu)
}

#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn refuse_v6(skb: *mut __sk_buff, l4: u32, about: u32, mtu: u32) -> u32 {
    answer::<V6>(Skb(skb), l4, about, mtu)
}

#[inline(always)]
fn answer<F: Family>(skb: Skb, l4: u32, about: u32, mtu: u32) -> u32 {
    // Up to 20 bytes of options or extension headers: more is nobody's.
    if l4 as usize > ETH_LEN + 60 || (l4 as usize) < ETH_LEN + 20 {
        return 0;
    }
    let (proto, flags) = (Proto(about as u8), (about >> 8) as u8);
    if proto == Proto::TCP && mtu == 0 {
        return u32::from(reset::<F>(skb, l4, flags).is_some());
    }
    if !allowed() {
        return LIMITED;
    }
    u32::from(icmp::<F>(skb, l4, proto, mtu).is_some())
}

/// As many ICMP errors as the kernel sends at most (`net.ipv4.icmp_msgs_per_sec` 1,000, `icmp_msgs_burst` 50), here for
/// each CPU: one token a millisecond.
#[inline(always)]
fn allowed() -> bool {
    const BURST: u64 = 50;
    const TOKEN: u64 = 1_000_000;
    let Some(limit) = LIMIT.get_ptr_mut(0) else { return false };
    // SAFETY: this CPU's entry. The time up to which tokens have been used lags behind the clock by at most a burst.
    unsafe {
        let now = helpers::bpf_ktime_get_ns();
        let oldest = now.saturating_sub(BURST * TOKEN);
        let used = if *limit < oldest { oldest } else { *limit };
        if used + TOKEN > now {
            return false;
        }
        *limit = used + TOKEN;
    }
    true
}

/// Folds a sum to 16 bits.
#[inline(always)]
fn fold(sum: u32) -> u16 {
    let sum = (sum & 0xffff) + (sum >> 16);
    ((sum & 0xffff) + (sum >> 16)) as u16
}

/// Sum over the packet from one offset to another, both even; at most 88 bytes.
#[inline(always)]
fn sum(skb: Skb, from: usize, to: usize) -> Option<u32> {
    let sum = forget(refuse_sum(skb.0, from as u32, to as u32));
    if sum == u32::MAX { None } else { Some(sum) }
}

#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn refuse_sum(skb: *mut __sk_buff, from: u32, to: u32) -> u32 {
    let skb = Skb(skb);
    let mut sum = 0;
    for i in 0..44 {
        let at = from + 2 * i;
        if at >= to {
            break;
        }
        let Some(half) = skb.read::<u16>(at as usize) else { return u32::MAX };
        sum = forget(sum + u32::from(half));
    }
    sum
}

/// Sum over both addresses, which a swap does not change, and what else a pseudo-header has.
#[inline(always)]
fn pseudo<F: Family>(skb: Skb, at: usize, proto: Proto, length: u16) -> Option<u32> {
    let first = at + F::SRC - ETH_LEN;
    let size = F::DST - F::SRC;
    Some(sum(skb, first, first + 2 * size)? + u32::from(u16::from(proto.0).to_be()) + u32::from(length.to_be()))
}

#[inline(always)]
fn swap_macs(skb: Skb) -> Option<()> {
    let (dst, src) = (MacBytes(skb.read(0)?), MacBytes(skb.read(6)?));
    skb.set_dst_mac(&src)?;
    skb.set_src_mac(&dst)
}

#[inline(always)]
fn swap_addresses<F: Family>(skb: Skb) -> Option<()> {
    let mut i = 0;
    while i < F::DST - F::SRC {
        let (src, dst) = (skb.read::<u32>(F::SRC + i)?, skb.read::<u32>(F::DST + i)?);
        skb.write(F::SRC + i, dst)?;
        skb.write(F::DST + i, src)?;
        i += 4;
    }
    Some(())
}

#[inline(always)]
fn change_tail(skb: Skb, length: u32) -> bool {
    // SAFETY: the context is valid; all packet pointers are derived again after the call.
    unsafe { helpers::bpf_skb_change_tail(skb.0, length, 0) == 0 }
}

/// RFC 9293 §3.5.2: with an ACK the reset takes its sequence number from it; without, it acknowledges the segment.
#[inline(always)]
fn reset<F: Family>(skb: Skb, l4: u32, flags: u8) -> Option<()> {
    if flags & tcp_flag::RST != 0 {
        return None;
    }
    let at = l4 as usize;
    let ports = skb.read::<u32>(at)?;
    let (seq, ack) = (u32::from_be(skb.read(at + 4)?), skb.read::<u32>(at + 8)?);
    let data = u32::from(skb.byte(at + 12)? >> 4) * 4;
    let headers = l4 - ETH_LEN as u32;
    let total = match F::HEADER_CHECKSUM {
        Some(_) => u32::from(u16::from_be(skb.half(ETH_LEN + 2)?)),
        None => u32::from(u16::from_be(skb.half(ETH_LEN + 4)?)) + 40,
    };
    let payload = total.wrapping_sub(headers).wrapping_sub(data);
    let occupies = payload + u32::from(flags & tcp_flag::SYN != 0) + u32::from(flags & tcp_flag::FIN != 0);
    let pending = skb.len() > l4 + 17 && !change_tail(skb, l4 + 17);
    if !change_tail(skb, l4 + 20) {
        return None;
    }
    skb.pull(l4 + 20);
    let acknowledges = flags & tcp_flag::ACK != 0;
    let bits = if acknowledges { tcp_flag::RST } else { tcp_flag::RST | tcp_flag::ACK };
    skb.write(at, ports.rotate_left(16))?;
    skb.write(at + 4, if acknowledges { ack } else { 0 })?;
    skb.write(at + 8, if acknowledges { 0 } else { seq.wrapping_add(occupies).to_be() })?;
    skb.write(at + 12, u32::from_ne_bytes([5 << 4, bits, 0, 0]))?;
    skb.write(at + 16, 0_u32)?;
    let pseudo = pseudo::<F>(skb, ETH_LEN, Proto::TCP, 20)?;
    let field = if pending { fold(pseudo) } else { !fold(pseudo + sum(skb, at, at + 20)?) };
    skb.write(at + 16, field)?;
    let length = (headers + 20) as u16;
    if let Some(checksum) = F::HEADER_CHECKSUM {
        let (old_length, old_life): (u16, u16) = (skb.read(ETH_LEN + 2)?, skb.read(ETH_LEN + 8)?);
        let [_, proto] = old_life.to_ne_bytes();
        let life = u16::from_ne_bytes([64, proto]);
        let difference = u32::from(!old_length) + u32::from(length.to_be()) + u32::from(!old_life) + u32::from(life);
        let old: u16 = skb.read(checksum)?;
        skb.write(checksum, rewrite::header_checksum(old, difference))?;
        skb.write(ETH_LEN + 2, length.to_be())?;
        skb.write(ETH_LEN + 8, life)?;
    } else {
        skb.write(ETH_LEN + 4, (length - 40).to_be())?;
        let [proto, _] = skb.read::<[u8; 2]>(ETH_LEN + 6)?;
        skb.write(ETH_LEN + 6, [proto, 64])?;
    }
    swap_addresses::<F>(skb)?;
    swap_macs(skb)
}

/// RFC 792 type 3, code 3 or 4; RFC 4443 type 1 code 4, or type 2. The packet that it is about moves back behind a new
/// header.
#[inline(always)]
fn icmp<F: Family>(skb: Skb, l4: u32, proto: Proto, mtu: u32) -> Option<()> {
    let at = l4 as usize;
    let end = l4 + if proto == Proto::TCP { 20 } else { 8 };
    if skb.len() < end || skb.len() > end && !change_tail(skb, end) {
        return None;
    }
    skb.pull(end);
    let field = if proto == Proto::TCP { 16 } else { 6 };
    if proto != Proto::SCTP && skb.read::<u16>(at + field)? != 0 {
        skb.write(at + field, 0_u16)?;
        let rest = fold(sum(skb, at, end as usize)?);
        // In memory order a rotation is one in the other order, too, up to the byte it starts in: done in network order.
        let fixed = u16::from_be(!rest).rotate_right(1).to_be();
        skb.write(at + field, fixed)?;
    }
    let (dst_mac, src_mac) = (MacBytes(skb.read(0)?), MacBytes(skb.read(6)?));
    let grow = F::DST - ETH_LEN + (F::DST - F::SRC) + 8;
    // SAFETY: the context is valid; all packet pointers are derived again after the call.
    if unsafe { helpers::bpf_skb_change_head(skb.0, grow as u32, 0) } != 0 {
        return None;
    }
    let whole = end + grow as u32;
    skb.pull(whole);
    skb.set_dst_mac(&src_mac)?;
    skb.set_src_mac(&dst_mac)?;
    skb.write(12, F::ETHERTYPE)?;
    let quote = ETH_LEN + grow;
    let header = quote - 8;
    // Addresses of the quoted packet, exchanged.
    let mut i = 0;
    while i < F::DST - F::SRC {
        let (src, dst) = (skb.read::<u32>(grow + F::SRC + i)?, skb.read::<u32>(grow + F::DST + i)?);
        skb.write(F::SRC + i, dst)?;
        skb.write(F::DST + i, src)?;
        i += 4;
    }
    let length = (whole - ETH_LEN as u32) as u16;
    let (kind, mut total) = if let Some(checksum) = F::HEADER_CHECKSUM {
        skb.write(ETH_LEN, [0x45_u8, 0])?;
        skb.write(ETH_LEN + 2, length.to_be())?;
        skb.write(ETH_LEN + 4, 0x4000_u32.to_be())?;
        skb.write(ETH_LEN + 8, [64_u8, Proto::ICMP.0])?;
        skb.write(checksum, 0_u16)?;
        let own = !fold(sum(skb, ETH_LEN, header)?);
        skb.write(checksum, own)?;
        ([3_u8, if mtu == 0 { 3 } else { 4 }], 0)
    } else {
        let payload = length - 40;
        skb.write(ETH_LEN, 0x6000_0000_u32.to_be())?;
        skb.write(ETH_LEN + 4, payload.to_be())?;
        skb.write(ETH_LEN + 6, [Proto::ICMPV6.0, 64])?;
        let kind = if mtu == 0 { [1_u8, 4] } else { [2, 0] };
        (kind, pseudo::<F>(skb, ETH_LEN, Proto::ICMPV6, payload)?)
    };
    skb.write(header, kind)?;
    skb.write(header + 2, 0_u16)?;
    skb.write(header + 4, mtu.to_be())?;
    total += sum(skb, header, whole as usize)?;
    skb.write(header + 2, !fold(total))
}
