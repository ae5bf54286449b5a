//! Where a packet must go that cannot enter the node's IP stack, because its source is an address of the node: the stack
//! would drop it as a martian (`ip_route_input_slow`). The route is looked up here, and the neighbour below the stack.
//!
//! `struct bpf_fib_lookup` (include/uapi/linux/bpf.h), 64 bytes, here as sixteen words in memory order:
//!
//! ```text
//!   0  family, protocol, source port     4  source address, 4 words      12 VLAN
//!   1  destination port, length or MTU   8  destination; then next hop   13 MACs
//!   2  interface in; then out            3  tos
//! ```

use aya_ebpf::bindings::{__sk_buff, bpf_fib_lookup, bpf_redir_neigh};
use aya_ebpf::helpers;
use core::ffi::c_void;
use proxy_abi::{IpBytes, Tuple, Work};

use crate::ctx::{Skb, forget};

/// Outcomes of [`look_up`].
pub(crate) mod found {
    /// The packet fits and has a way.
    pub(crate) const WAY: u32 = 0;
    /// There is no route, or it may not be used.
    pub(crate) const NONE: u32 = 1;
    /// The packet is bigger than the MTU in `work`.
    pub(crate) const TOO_BIG: u32 = 2;
}

const AF_INET: u32 = 2;
const AF_INET6: u32 = 10;

/// `BPF_FIB_LKUP_RET_NO_NEIGH`: a route, but nobody has been asked for the neighbour yet. `bpf_redirect_neigh` asks.
const NO_NEIGHBOUR: i64 = 7;
/// `BPF_FIB_LKUP_RET_FRAG_NEEDED`.
const FRAGMENTATION_NEEDED: i64 = 8;

/// Looks up the route of a packet with the tuple `tuple`, as if it had come in by `ifindex`; leaves the result in `work`.
#[inline(always)]
pub(crate) fn look_up(skb: *mut __sk_buff, work: *mut Work, new: bool, ifindex: u32, proto: u32) -> u32 {
    forget(route_look_up(skb, work, u32::from(new), ifindex, proto))
}

#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn route_look_up(skb: *mut __sk_buff, work: *mut Work, new: u32, ifindex: u32, proto: u32) -> u32 {
    // SAFETY: this CPU's entry of the map `work`, which nobody else uses now.
    let Some(work) = (unsafe { work.as_mut() }) else { return found::NONE };
    let tuple: &Tuple = if new != 0 { &work.new } else { &work.entry.translated };
    let route = &mut work.route;
    let (src, dst) = (tuple.src.0, tuple.dst.0);
    let v4 = tuple.dst.is_v4();
    route[0] = if v4 { AF_INET } else { AF_INET6 } | (proto & 0xff) << 8 | u32::from(tuple.src_port.0) << 16;
    route[1] = u32::from(tuple.dst_port.0);
    route[2] = ifindex;
    route[3] = 0;
    let addresses = if v4 {
        [src[3], 0, 0, 0, dst[3], 0, 0, 0]
    } else {
        [src[0], src[1], src[2], src[3], dst[0], dst[1], dst[2], dst[3]]
    };
    let mut i = 0;
    while i < 8 {
        route[4 + i] = addresses[i];
        i += 1;
    }
    route[12] = 0;
    // SAFETY: the context is valid; the buffer is the 64 bytes that the helper takes.
    let result =
        unsafe { helpers::bpf_fib_lookup(skb.cast::<c_void>(), route.as_mut_ptr().cast::<bpf_fib_lookup>(), 64, 0) };
    match result {
        0 | NO_NEIGHBOUR => found::WAY,
        FRAGMENTATION_NEEDED => {
            work.mtu = route[1] >> 16;
            found::TOO_BIG
        }
        _ => found::NONE,
    }
}

/// The interface that the route in `work` leads out of.
#[inline(always)]
pub(crate) fn interface(work: &Work) -> u32 {
    work.route[2]
}

/// Tells the kernel to send the packet along the route in `work`, after it has found the neighbour.
#[unsafe(no_mangle)]
#[inline(never)]
pub(crate) extern "C" fn route_redirect(work: *const Work) -> u32 {
    // SAFETY: as in `route_look_up`.
    let Some(work) = (unsafe { work.as_ref() }) else { return 0 };
    let route = &work.route;
    // `struct bpf_redir_neigh`: family and next hop, 20 bytes.
    let mut next = [route[0] & 0xff, route[8], route[9], route[10], route[11]];
    // SAFETY: the argument has the size that is told. Sets the target of this packet.
    unsafe { helpers::bpf_redirect_neigh(route[2], next.as_mut_ptr().cast::<bpf_redir_neigh>(), 20, 0) };
    0
}

/// Is a packet too big for an interface with this MTU (0: any)? One that the kernel will cut (GSO) is not.
#[inline(always)]
pub(crate) fn is_too_big(skb: Skb, mtu: u32) -> bool {
    mtu != 0 && skb.len() > mtu + 14 && !skb.is_gso()
}

/// No address of either family: a device without one.
#[inline(always)]
pub(crate) fn is_none(ip: &IpBytes) -> bool {
    ip.halves() == (0, 0)
}
