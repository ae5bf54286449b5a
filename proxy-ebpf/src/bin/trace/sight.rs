//! A packet at a tracepoint: is it followed, or to be followed from here on?

use aya_ebpf::helpers::generated::{
    bpf_get_smp_processor_id, bpf_get_stackid, bpf_ktime_get_ns, bpf_probe_read_kernel,
};
use core::ffi::c_void;
use proxy_abi::trace::{FOLLOWED, SNAP, TraceEvent, TraceFilter, TracePacket, count, point};

use crate::filter;
use crate::kernel::{
    DEV_IFINDEX, DEV_NAME, DEV_NET, Header, NET_HOOKS_BRIDGE, NET_HOOKS_V4, NET_HOOKS_V6, NET_INUM, SK_COOKIE, SKB_DEV,
    SKB_EXTENSIONS, SKB_HEAD, SKB_LEN, SKB_MARK, SKB_NFCT, SKB_SK, field, ip_header, peer_at_home, read,
};
use crate::maps::{self, EVENT, FILTER, HEADER, STACK, TRACE, TRACE_PACKET};

/// A packet that is looked at.
struct Sight {
    ctx: *mut c_void,
    skb: u64,
    head: u64,
    point: u32,
    now: u64,
    /// Address of the IP header, and how much of the packet lies there; 0 = not known.
    header: u64,
    captured: u32,
}

impl Sight {
    #[inline(always)]
    fn new(ctx: *mut c_void, skb: u64, point: u32) -> Self {
        // SAFETY: `skb` comes from a tracepoint.
        let head = unsafe { field::<u64>(skb, &SKB_HEAD) };
        let (header, captured) = ip_header(skb, head, point == point::RECEIVE);
        Self { ctx, skb, head, point, now: 0, header, captured }
    }

    /// The id that this packet is followed under. What lies under its addresses may be another packet's, long gone.
    #[inline(always)]
    fn followed(&self, imprint: u64) -> Option<u64> {
        let (skb, head) = (self.skb, self.head);
        let (mut found, mut known) = (0, 0);
        // One after the other: two pointers are never asked for at once, which the verifier would not follow.
        // What lies there of another packet goes: the programs of the dataplane, which come next, ask by address alone.
        if let Some(entry) = TRACE_PACKET.get_ptr_mut(&skb) {
            // SAFETY: a pointer into a map that was just found; here and below.
            let entry = unsafe { &mut *entry };
            if entry.imprint == imprint {
                known |= 1;
                entry.last = self.now;
                entry.sights += 1;
                found = entry.id;
            } else {
                let _ = TRACE_PACKET.remove(&skb);
            }
        }
        if let Some(entry) = TRACE_PACKET.get_ptr_mut(&head) {
            // SAFETY: as above.
            let entry = unsafe { &mut *entry };
            if entry.imprint == imprint {
                known |= 2;
                entry.last = self.now;
                entry.sights += 1;
                found = entry.id;
            } else {
                let _ = TRACE_PACKET.remove(&head);
            }
        }
        if found == 0 {
            return None;
        }
        let id = found;
        // A clone, or a packet whose data was copied: it goes on under both addresses.
        if known != 3 {
            let entry = TracePacket { id, last: self.now, imprint, sights: 1, reserved: 0 };
            let key = if known == 2 { skb } else { head };
            if TRACE_PACKET.insert(&key, &entry, 0).is_err() {
                maps::count(count::TABLE_FULL);
            }
        }
        Some(id)
    }

    /// Follows it from now on.
    #[inline(always)]
    fn follow(&self, imprint: u64) -> Option<u64> {
        // SAFETY: no arguments.
        let cpu = unsafe { bpf_get_smp_processor_id() };
        let id = self.now << 6 | u64::from(cpu) & 63;
        let entry = TracePacket { id, last: self.now, imprint, sights: 1, reserved: 0 };
        let (skb, head) = (self.skb, self.head);
        // Before it can be found: the programs of the dataplane look for packets from now on.
        if let Some(followed) = TRACE.get_ptr_mut(FOLLOWED) {
            // SAFETY: an array's entry; whoever writes it writes the same.
            unsafe { core::ptr::write_volatile(&raw mut (*followed).until, 1) };
        }
        if TRACE_PACKET.insert(&skb, &entry, 0).is_err() || TRACE_PACKET.insert(&head, &entry, 0).is_err() {
            maps::count(count::TABLE_FULL);
            return None;
        }
        maps::count(count::STARTED);
        Some(id)
    }

    #[inline(always)]
    fn forget(&self) {
        let (skb, head) = (self.skb, self.head);
        // It need not be there.
        let _ = TRACE_PACKET.remove(&skb);
        let _ = TRACE_PACKET.remove(&head);
    }

    #[inline(always)]
    fn tell(&self, id: u64, filter: &TraceFilter, location: u64, reason: u32) {
        let stack =
            if filter.flags & TraceFilter::STACKS != 0 && (self.point == point::QUEUE || self.point == point::DROP) {
                // SAFETY: the context is the program's own; the helper checks the map.
                unsafe { bpf_get_stackid(self.ctx, (&raw const STACK).cast_mut().cast::<c_void>(), 0x200) }
            } else {
                -1
            };
        let Some(mut entry) = EVENT.reserve::<TraceEvent>(0) else {
            maps::count(count::RING_FULL);
            return;
        };
        let event = entry.as_mut_ptr();
        // SAFETY: the entry is as large as the event, and every field of it is written. `skb` comes from a tracepoint, and
        // what hangs on it is typed by the kernel.
        unsafe {
            (*event).at = self.now;
            (*event).id = id;
            (*event).skb = self.skb;
            (*event).head = self.head;
            (*event).location = location;
            (*event).nfct = field(self.skb, &SKB_NFCT);
            (*event).cookie = cookie_of(self.skb);
            (*event).point = self.point;
            (*event).cpu = bpf_get_smp_processor_id();
            (*event).len = field(self.skb, &SKB_LEN);
            (*event).mark = field(self.skb, &SKB_MARK);
            (*event).extensions = u32::from(field::<u8>(self.skb, &SKB_EXTENSIONS));
            (*event).reason = reason;
            (*event).stack = if stack < 0 { TraceEvent::NO_STACK } else { stack as u32 };
            let device: u64 = field(self.skb, &SKB_DEV);
            let (mut netns, mut ifindex, mut peer, mut hooks) = (0_u32, 0_u32, 0, 0);
            let mut name = [0_u64; 2];
            if device != 0 {
                let net: u64 = read(device + u64::from(DEV_NET.load()));
                netns = read(net + u64::from(NET_INUM.load()));
                ifindex = read(device + u64::from(DEV_IFINDEX.load()));
                name = read(device + u64::from(DEV_NAME.load()));
                peer = if netns == filter.netns { 0 } else { peer_at_home(device, filter.netns) };
                hooks = hooks_of(net, self.header);
            }
            (*event).netns = netns;
            (*event).ifindex = ifindex;
            (*event).device = core::mem::transmute::<[u64; 2], [u8; 16]>(name);
            (*event).peer = peer;
            (*event).hooks = hooks;
            (*event).captured = self.captured;
            let packet = (&raw mut (*event).packet).cast::<c_void>();
            if self.header == 0 || bpf_probe_read_kernel(packet, SNAP as u32, self.header as *const c_void) != 0 {
                (*event).captured = 0;
            }
        }
        entry.submit(0);
        maps::count(count::EVENTS);
    }
}

/// Cookie of the packet's socket. Whatever kind of socket it is, its first part is the same.
#[inline(always)]
fn cookie_of(skb: u64) -> u64 {
    if SKB_SK.load() == 0 || SK_COOKIE.load() == 0 {
        return 0;
    }
    let sk: u64 = read(skb + u64::from(SKB_SK.load()));
    if sk == 0 { 0 } else { read(sk + u64::from(SK_COOKIE.load())) }
}

/// Hooks with entries, as [`TraceEvent::hooks`] has them.
#[inline(always)]
fn hooks_of(net: u64, header: u64) -> u32 {
    let version: u8 = read(header);
    let table = if version >> 4 == 6 { NET_HOOKS_V6.load() } else { NET_HOOKS_V4.load() };
    let own: [u64; 5] = read(net + u64::from(table));
    let bridge: [u64; 5] = read(net + u64::from(NET_HOOKS_BRIDGE.load()));
    let mut hooks = 0;
    let mut i = 0;
    while i < 5 {
        hooks |= u32::from(own[i] != 0) << i | u32::from(bridge[i] != 0) << (i + 5);
        i += 1;
    }
    hooks
}

#[inline(always)]
fn filter() -> Option<&'static mut TraceFilter> {
    let filter = FILTER.get_ptr_mut(0)?;
    // SAFETY: an array's entry; its counters may lose one where two CPUs count at once.
    let filter = unsafe { &mut *filter };
    (filter.flags & TraceFilter::ACTIVE != 0).then_some(filter)
}

/// Reads the headers to the place of this program.
#[inline(always)]
fn headers(sight: &Sight, place: u32) -> Option<&'static Header> {
    if sight.header == 0 {
        return None;
    }
    let header = HEADER.get_ptr_mut(place)?;
    // SAFETY: this program's entry on this CPU, and it does not interrupt itself.
    let header = unsafe { &mut *header };
    header.read(sight.header).then_some(header)
}

/// Does the packet's device belong to the node of the reader, at this end or at the other?
#[inline(always)]
fn is_at_home(skb: u64, filter: &TraceFilter) -> bool {
    // SAFETY: `skb` comes from a tracepoint, at which packets have a device.
    let (device, netns, ifindex) = unsafe {
        let device: u64 = field(skb, &SKB_DEV);
        let net: u64 = field(device, &DEV_NET);
        (device, field::<u32>(net, &NET_INUM), field::<u32>(device, &DEV_IFINDEX))
    };
    if filter.flags & TraceFilter::ALL_NAMESPACES != 0 {
        return true;
    }
    if netns == filter.netns {
        return filter.ifindex == 0 || filter.ifindex == ifindex;
    }
    let peer = peer_at_home(device, filter.netns);
    peer != 0 && (filter.ifindex == 0 || filter.ifindex == peer)
}

/// Is any packet followed at all? Where none is, most of the work is left out.
#[inline(always)]
fn is_busy(filter: &TraceFilter) -> bool {
    filter.total != 0
}

#[inline(always)]
fn now() -> u64 {
    // SAFETY: no arguments.
    unsafe { bpf_ktime_get_ns() }
}

/// May a packet begin here? What a pod receives has been on the node before.
#[inline(always)]
fn may_begin(skb: u64, point: u32, filter: &TraceFilter) -> bool {
    if point != point::RECEIVE || filter.flags & TraceFilter::ALL_NAMESPACES != 0 {
        return true;
    }
    // SAFETY: `skb` comes from a tracepoint, at which packets have a device.
    unsafe {
        let device: u64 = field(skb, &SKB_DEV);
        let net: u64 = field(device, &DEV_NET);
        field::<u32>(net, &NET_INUM) == filter.netns
    }
}

/// Where packets begin and go on.
#[inline(always)]
pub(crate) fn begins(ctx: *mut c_void, skb: u64, point: u32) {
    let Some(filter) = filter() else { return };
    let may_begin = may_begin(skb, point, filter);
    if !may_begin && !is_busy(filter) {
        return;
    }
    let mut sight = Sight::new(ctx, skb, point);
    if sight.header == 0 || !is_busy(filter) && !filter::may_match(filter, sight.header) {
        return;
    }
    let Some(header) = headers(&sight, point) else { return };
    let mut id = None;
    if is_busy(filter) {
        sight.now = now();
        id = sight.followed(header.imprint);
    }
    // The namespaces last: to look at the other end of a veth takes longer than all else.
    if id.is_none() && may_begin && filter::matches(filter, header, point) && is_at_home(skb, filter) {
        maps::count(count::LOOKED_AT);
        sight.now = now();
        if filter::admits(filter, sight.now) {
            id = sight.follow(header.imprint);
        }
    }
    if let Some(id) = id {
        sight.tell(id, filter, 0, 0);
    }
}

/// Where packets only go on.
#[inline(always)]
pub(crate) fn goes_on(ctx: *mut c_void, skb: u64, point: u32) {
    let Some(filter) = filter() else { return };
    if !is_busy(filter) {
        return;
    }
    let mut sight = Sight::new(ctx, skb, point);
    let Some(header) = headers(&sight, point) else { return };
    sight.now = now();
    if let Some(id) = sight.followed(header.imprint) {
        sight.tell(id, filter, 0, 0);
    }
}

/// Where they end badly: also those that never came to a device.
#[inline(always)]
pub(crate) fn dropped(ctx: *mut c_void, skb: u64, location: u64, reason: u32) {
    let Some(filter) = filter() else { return };
    let begins = reason >= filter.first_drop;
    if !begins && !is_busy(filter) {
        return;
    }
    let mut sight = Sight::new(ctx, skb, point::DROP);
    let Some(header) = headers(&sight, point::DROP) else { return };
    sight.now = now();
    let mut id = if is_busy(filter) { sight.followed(header.imprint) } else { None };
    if id.is_none()
        && begins
        && filter::matches(filter, header, point::DROP)
        && is_anywhere_at_home(skb, filter)
        && filter::admits(filter, sight.now)
    {
        id = sight.follow(header.imprint);
    }
    if let Some(id) = id {
        sight.tell(id, filter, location, reason);
        sight.forget();
    }
}

/// As [`is_at_home`], of a packet that may have no device.
#[inline(always)]
fn is_anywhere_at_home(skb: u64, filter: &TraceFilter) -> bool {
    // SAFETY: `skb` comes from a tracepoint. The field may hold something else in a socket's queue, so what is behind it is
    // read with care.
    let device: u64 = unsafe { field(skb, &SKB_DEV) };
    let net: u64 = read(device + u64::from(DEV_NET.load()));
    let netns: u32 = read(net + u64::from(NET_INUM.load()));
    if device == 0 || filter.ifindex != 0 {
        return false;
    }
    netns == filter.netns || filter.flags & TraceFilter::ALL_NAMESPACES != 0 || peer_at_home(device, filter.netns) != 0
}

/// Where they end well.
#[inline(always)]
pub(crate) fn consumed(ctx: *mut c_void, skb: u64, location: u64) {
    let Some(filter) = filter() else { return };
    if !is_busy(filter) {
        return;
    }
    let mut sight = Sight::new(ctx, skb, point::CONSUME);
    let Some(header) = headers(&sight, point::CONSUME) else { return };
    sight.now = now();
    if let Some(id) = sight.followed(header.imprint) {
        sight.tell(id, filter, location, 0);
        sight.forget();
    }
}
