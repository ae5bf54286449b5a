//! Drops in groups: nothing is written for a single packet, so this can be left on.

use proxy_abi::trace::{TraceDropKey, TraceDrops, TraceFilter, count, point};
use proxy_abi::{IpBytes, PortBe};

use crate::kernel::{
    DEV_IFINDEX, DEV_NAME, DEV_NET, NET_INUM, SKB_DEV, SKB_HEAD, SKB_LEN, field, ip_header, peer_at_home, read,
};
use crate::maps::{self, DROP, FILTER, HEADER};

#[inline(always)]
pub(crate) fn group(skb: u64, location: u64, reason: u32) {
    let Some(filter) = FILTER.get_ptr(0) else { return };
    // SAFETY: an array's entry.
    let filter = unsafe { &*filter };
    if filter.flags & TraceFilter::DROPS == 0 || reason < filter.first_drop {
        return;
    }
    // SAFETY: `skb` comes from a tracepoint; the device may be anything in a socket's queue.
    let (head, device, len) =
        unsafe { (field::<u64>(skb, &SKB_HEAD), field::<u64>(skb, &SKB_DEV), field::<u32>(skb, &SKB_LEN)) };
    let net: u64 = read(device + u64::from(DEV_NET.load()));
    let netns: u32 = read(net + u64::from(NET_INUM.load()));
    let mut peer = 0;
    if netns != filter.netns && filter.flags & TraceFilter::ALL_NAMESPACES == 0 {
        peer = peer_at_home(device, filter.netns);
        if peer == 0 {
            return;
        }
    }
    let Some(header) = HEADER.get_ptr_mut(point::COUNT) else { return };
    // SAFETY: this program's entry on this CPU, and it does not interrupt itself.
    let header = unsafe { &mut *header };
    let (address, _) = ip_header(skb, head, false);
    let known = address != 0 && header.read(address);
    let key = TraceDropKey {
        location,
        netns,
        ifindex: read(device + u64::from(DEV_IFINDEX.load())),
        reason,
        proto: if known { header.proto } else { 0 },
        peer,
        reserved: 0,
    };
    if let Some(found) = DROP.get_ptr_mut(&key) {
        // SAFETY: a pointer into a map that was just found. Two CPUs at once may lose a count; the last packet is any.
        unsafe {
            (*found).packets += 1;
            (*found).bytes += u64::from(len);
            if known {
                (*found).src = header.src;
                (*found).dst = header.dst;
                (*found).src_port = header.src_port;
                (*found).dst_port = header.dst_port;
            }
        }
        return;
    }
    let none = IpBytes::UNSPECIFIED;
    let name: [u64; 2] = read(device + u64::from(DEV_NAME.load()));
    let first = TraceDrops {
        packets: 1,
        bytes: u64::from(len),
        src: if known { header.src } else { none },
        dst: if known { header.dst } else { none },
        src_port: if known { header.src_port } else { PortBe(0) },
        dst_port: if known { header.dst_port } else { PortBe(0) },
        reserved: 0,
        // SAFETY: the same bytes.
        device: unsafe { core::mem::transmute::<[u64; 2], [u8; 16]>(name) },
    };
    if DROP.insert(&key, &first, 0).is_err() {
        maps::count(count::DROPS_FULL);
    }
}
