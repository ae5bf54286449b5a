//! Would a packet find a socket in a namespace that this process is not in? Asked by `trace why` with
//! `BPF_PROG_TEST_RUN`: the kernel's own look-up, so nothing enters the namespace. Attached nowhere.

use aya_ebpf::bindings::{__sk_buff, bpf_sock, bpf_sock_tuple};
use aya_ebpf::helpers::{bpf_sk_lookup_tcp, bpf_sk_lookup_udp, bpf_sk_release};
use core::ffi::c_void;
use proxy_abi::trace::listener::{FOUND, NAMESPACE, NONE, TUPLE_V4, TUPLE_V6, V4};

use crate::maps::LISTENER;

/// One program for each protocol: the compiler makes one call of two, and an address of a helper is no number to choose.
#[inline(always)]
pub(crate) fn tcp(skb: *mut __sk_buff) -> i32 {
    // SAFETY: see `look_up`.
    look_up(|tuple, length, namespace| unsafe { bpf_sk_lookup_tcp(skb.cast::<c_void>(), tuple, length, namespace, 0) })
}

#[inline(always)]
pub(crate) fn udp(skb: *mut __sk_buff) -> i32 {
    // SAFETY: see `look_up`.
    look_up(|tuple, length, namespace| unsafe { bpf_sk_lookup_udp(skb.cast::<c_void>(), tuple, length, namespace, 0) })
}

/// The tuple stands at the beginning of the entry, and is as long as said; the kernel checks the rest.
#[inline(always)]
fn look_up(find: impl FnOnce(*mut bpf_sock_tuple, u32, u64) -> *mut bpf_sock) -> i32 {
    let Some(question) = LISTENER.get_ptr_mut(0) else { return 0 };
    // SAFETY: an array's entry.
    let (namespace, v4) = unsafe { ((*question)[NAMESPACE], (*question)[V4]) };
    // A negative number is the namespace of the packet.
    let namespace = i64::from(namespace.cast_signed()).cast_unsigned();
    let length = if v4 != 0 { TUPLE_V4 } else { TUPLE_V6 };
    let found = find(question.cast::<bpf_sock_tuple>(), length, namespace);
    if found.is_null() {
        return NONE;
    }
    // SAFETY: a socket that the helper has just given out.
    unsafe { bpf_sk_release(found.cast::<c_void>()) };
    FOUND
}
