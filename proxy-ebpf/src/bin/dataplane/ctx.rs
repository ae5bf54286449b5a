//! The packet in the kernel: all reading and writing of it, and nothing else.

use aya_ebpf::bindings::{__sk_buff, BPF_F_MARK_MANGLED_0, BPF_F_PSEUDO_HDR};
use aya_ebpf::helpers;
use proxy_abi::{FlowEntry, FlowKey, IpBytes, MacBytes, Proto, Tuple};
use proxy_ebpf::packet::{self, Extensions, Family, Fragment, OFFSET_MASK, Packet, Parsed};
use proxy_ebpf::{rewrite, sctp};

/// A packet at a tc hook.
#[derive(Clone, Copy)]
pub(crate) struct Skb(pub(crate) *mut __sk_buff);

impl Skb {
    #[inline(always)]
    fn data(&self) -> usize {
        // SAFETY: the kernel hands a valid context to the program; the field is readable.
        // Read anew each time: what is known of an older copy would set the paths after it apart.
        unsafe { core::ptr::read_volatile(&raw const (*self.0).data) as usize }
    }

    #[inline(always)]
    fn data_end(&self) -> usize {
        // SAFETY: as above.
        unsafe { core::ptr::read_volatile(&raw const (*self.0).data_end) as usize }
    }

    /// Length in bytes, Ethernet header included.
    #[inline(always)]
    pub(crate) fn len(&self) -> u32 {
        // SAFETY: as above.
        unsafe { (*self.0).len }
    }

    /// EtherType in memory order.
    #[inline(always)]
    pub(crate) fn ethertype(&self) -> u16 {
        // SAFETY: as above.
        unsafe { (*self.0).protocol as u16 }
    }

    /// Does the packet carry a VLAN tag?
    #[inline(always)]
    pub(crate) fn has_vlan(&self) -> bool {
        // SAFETY: as above.
        unsafe { (*self.0).vlan_present != 0 }
    }

    /// Interface of the hook.
    #[inline(always)]
    pub(crate) fn ifindex(&self) -> u32 {
        // SAFETY: as above.
        unsafe { (*self.0).ifindex }
    }

    /// Interface that it came into this node by; 0 = it was made here. Redirects and bridges keep it.
    #[inline(always)]
    pub(crate) fn ingress_ifindex(&self) -> u32 {
        // SAFETY: as above.
        unsafe { (*self.0).ingress_ifindex }
    }

    /// Does a socket of this network namespace own it? Those of the kernel do, for resets and ICMP.
    #[inline(always)]
    pub(crate) fn has_socket(&self) -> bool {
        // SAFETY: the context is valid.
        unsafe { helpers::bpf_get_socket_cookie(self.0.cast()) != 0 }
    }

    /// Is it a super-packet, which is cut into segments later?
    #[inline(always)]
    pub(crate) fn is_gso(&self) -> bool {
        // SAFETY: as above.
        unsafe { (*self.0).gso_size != 0 }
    }

    /// Makes the first `len` bytes readable and writable by direct access.
    #[inline(always)]
    pub(crate) fn pull(&self, len: u32) {
        let len = if self.len() < len { self.len() } else { len };
        if self.data() + (len as usize & OFFSET_MASK) > self.data_end() {
            // SAFETY: the context is valid; all packet pointers are derived again after the call. A failure shows as a
            // packet that ends early.
            unsafe { helpers::bpf_skb_pull_data(self.0, len) };
        }
    }

    /// Makes the headers readable: `most` bytes, or of a plain TCP segment just what they take where that is readable
    /// already. A sender's payload lies apart, and the segment shares its head with the one that is kept for sending it
    /// again: to pull a single byte of payload in has the kernel allocate and copy that head (`__pskb_pull_tail`).
    #[inline(always)]
    pub(crate) fn pull_headers<F: Family>(&self, most: u32) {
        let end = packet::segment_headers::<F, Self>(self);
        if end.is_none_or(|end| self.data() + (end & OFFSET_MASK) > self.data_end()) {
            self.pull(most);
        }
    }

    #[inline(always)]
    fn at<T>(&self, offset: usize) -> Option<*mut T> {
        let start = self.data() + (offset & OFFSET_MASK);
        if start + size_of::<T>() > self.data_end() {
            return None;
        }
        Some(start as *mut T)
    }

    #[inline(always)]
    pub(crate) fn read<T: Copy>(&self, offset: usize) -> Option<T> {
        // SAFETY: `at` checked that the whole of it lies in the packet. The kernel allows unaligned access where the
        // machine does, and packet fields are aligned with the network header.
        self.at::<T>(offset).map(|p| unsafe { *p })
    }

    #[inline(always)]
    pub(crate) fn write<T: Copy>(&self, offset: usize, value: T) -> Option<()> {
        let p = self.at::<T>(offset)?;
        // SAFETY: as in `read`; the kernel unshares the head of the packet before a program that writes runs.
        unsafe { *p = value };
        Some(())
    }

    /// Sets the destination MAC.
    #[inline(always)]
    pub(crate) fn set_dst_mac(&self, mac: &MacBytes) -> Option<()> {
        self.write(0, mac.0)
    }

    /// Sets the source MAC.
    #[inline(always)]
    pub(crate) fn set_src_mac(&self, mac: &MacBytes) -> Option<()> {
        self.write(6, mac.0)
    }

    /// Writes an address at an offset: the last word for IPv4, all four for IPv6.
    #[inline(always)]
    pub(crate) fn write_ip<F: Family>(&self, offset: usize, ip: &IpBytes) -> Option<()> {
        if F::HEADER_CHECKSUM.is_some() {
            return self.write(offset, ip.v4_word());
        }
        self.write(offset, ip.0[0])?;
        self.write(offset + 4, ip.0[1])?;
        self.write(offset + 8, ip.0[2])?;
        self.write(offset + 12, ip.0[3])
    }

    /// Turns the addresses and ports of a packet from `old` to `new`, with all checksums.
    ///
    /// The IPv4 header checksum is written directly (RFC 1624): no device computes it for us. The transport checksum
    /// goes through `bpf_l4_csum_replace`, which knows whether a device will complete it (CHECKSUM_PARTIAL, where the
    /// field holds the pseudo-header's sum alone): once for the addresses with BPF_F_PSEUDO_HDR, once for both ports
    /// without it. A later fragment has neither ports nor checksum. All direct writes come first, because the helper
    /// invalidates packet pointers.
    #[inline(always)]
    pub(crate) fn rewrite<F: Family>(&self, parsed: &Parsed, old: &Tuple, new: &Tuple) -> Option<()> {
        let difference = rewrite::difference(old, new);
        if let Some(offset) = F::HEADER_CHECKSUM {
            let checksum: u16 = self.read(offset)?;
            self.write(offset, rewrite::header_checksum(checksum, difference))?;
        }
        self.write_ip::<F>(F::SRC, &new.src)?;
        self.write_ip::<F>(F::DST, &new.dst)?;
        if parsed.fragment == Fragment::LATER {
            return Some(());
        }
        let l4 = parsed.l4 as usize & OFFSET_MASK;
        if parsed.proto == Proto::SCTP {
            sctp_ports(self.0, l4 as u32, rewrite::ports_word(new.src_port, new.dst_port));
            return Some(());
        }
        let (field, zero_stays) = if parsed.proto == Proto::TCP {
            (l4 + 16, 0)
        } else {
            // RFC 768: a checksum of 0 means there is none, and it stays so.
            (l4 + 6, u64::from(BPF_F_MARK_MANGLED_0))
        };
        let old_ports = rewrite::ports_word(old.src_port, old.dst_port);
        let new_ports = rewrite::ports_word(new.src_port, new.dst_port);
        self.write(l4, new_ports)?;
        let skb = self.0;
        let flags = u64::from(BPF_F_PSEUDO_HDR) | zero_stays;
        // SAFETY: the context is valid; the helper checks the offset; no packet pointer lives on.
        unsafe {
            if helpers::bpf_l4_csum_replace(skb, field as u32, 0, u64::from(difference), flags) != 0 {
                return None;
            }
            if old_ports != new_ports
                && helpers::bpf_l4_csum_replace(
                    skb,
                    field as u32,
                    u64::from(old_ports),
                    u64::from(new_ports),
                    zero_stays | 4,
                ) != 0
            {
                return None;
            }
        }
        Some(())
    }
}

/// Writes the ports of an SCTP packet and its checksum, which covers no address.
#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn sctp_ports(skb: *mut __sk_buff, l4: u32, new: u32) -> u32 {
    let skb = Skb(skb);
    let l4 = l4 as usize & OFFSET_MASK;
    let (Some(old), Some(field)) = (skb.read::<u32>(l4), skb.read::<u32>(l4 + 8)) else { return 0 };
    // By the IP header: a short frame has padding behind the packet. Total length, or payload length.
    let end = if skb.ethertype() == packet::V4::ETHERTYPE {
        skb.read::<u16>(packet::ETH_LEN + 2).map(|total| packet::ETH_LEN as u32 + u32::from(u16::from_be(total)))
    } else {
        skb.read::<u16>(packet::ETH_LEN + 4).map(|rest| packet::ETH_LEN as u32 + 40 + u32::from(u16::from_be(rest)))
    };
    let Some(end) = end else { return 0 };
    let length = end.wrapping_sub(l4 as u32) as u16;
    skb.write(l4, new);
    skb.write(l4 + 8, sctp::checksum(field, old ^ new, length));
    0
}

impl Packet for Skb {
    #[inline(always)]
    fn byte(&self, offset: usize) -> Option<u8> {
        // Two bytes are asked for: "start >= end" for one gives the verifier no range.
        self.read::<[u8; 2]>(offset).map(|[byte, _]| byte)
    }

    #[inline(always)]
    fn half(&self, offset: usize) -> Option<u16> {
        self.read(offset)
    }

    #[inline(always)]
    fn word(&self, offset: usize) -> Option<u32> {
        self.read(offset)
    }

    #[inline(always)]
    fn forget(&self, number: u32) -> u32 {
        forget(number)
    }

    #[inline(always)]
    fn extensions(&self, first: u8) -> Option<Extensions> {
        let packed = extension_headers(self.0, u32::from(first));
        if packed == u64::MAX { None } else { Some(Extensions::unpack(packed)) }
    }
}

/// [`packet::walk`]; all bits set where it finds no end.
///
/// Exported functions like this one the verifier looks at once by themselves, whatever they are called with, and not
/// once for each state in which they are called. So they take numbers and pointers that may be null, and return a
/// number.
#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn extension_headers(skb: *mut __sk_buff, first: u32) -> u64 {
    packet::walk(&Skb(skb), first as u8).map_or(u64::MAX, Extensions::pack)
}

/// See [`Packet::forget`]. The verifier follows numbers through the stack in slots of eight bytes, from their beginning;
/// what is written to the second half of a slot it knows only to be written, unless it is zero, hence the mask.
#[inline(always)]
pub(crate) fn forget(number: u32) -> u32 {
    const MASK: u32 = 0x5a5a_5a5a;
    #[repr(align(8))]
    struct Slot([u32; 2]);
    let mut slot = Slot([MASK; 2]);
    // SAFETY: a local variable.
    unsafe {
        core::ptr::write_volatile(&raw mut slot.0[1], number ^ MASK);
        core::ptr::read_volatile(&raw const slot.0[1]) ^ MASK
    }
}

/// Copies a value word by word. An ordinary copy between places that might overlap becomes a call of `memmove`, which
/// here is a loop over bytes: slow to run, and walked by the verifier byte for byte.
#[inline(always)]
fn copy_by<W: Copy, T>(to: &mut T, from: &T) {
    const { assert!(align_of::<T>() >= align_of::<W>() && size_of::<T>().is_multiple_of(size_of::<W>())) };
    let (to, from) = (core::ptr::from_mut(to).cast::<W>(), core::ptr::from_ref(from).cast::<W>());
    let mut i = 0;
    while i < size_of::<T>() / size_of::<W>() {
        // SAFETY: both are references to a `T`, whose words are copied one by one; asserted above.
        unsafe { core::ptr::write_volatile(to.add(i), core::ptr::read_volatile(from.add(i))) };
        i += 1;
    }
}

/// Copies an address, a tuple or a stamp.
#[inline(always)]
pub(crate) fn copy<T>(to: &mut T, from: &T) {
    copy_by::<u32, T>(to, from);
}

/// Copies a MAC.
#[inline(always)]
pub(crate) fn copy_mac(to: &mut MacBytes, from: &MacBytes) {
    copy_by::<u8, MacBytes>(to, from);
}

/// Copies a flow.
#[inline(always)]
pub(crate) fn copy_flow(to: &mut FlowEntry, from: &FlowEntry) {
    copy_by::<u64, FlowEntry>(to, from);
}

/// [`Tuple::key`], with the comparison forgotten. `proto_family`: protocol, and family in the upper byte.
#[inline(always)]
pub(crate) fn write_key(to: &mut FlowKey, tuple: &Tuple, proto_family: u16, side: u8) {
    let low = forget(u32::from(tuple.src_is_low())) & 1;
    *to = tuple.key_by(low, Proto(proto_family as u8), (proto_family >> 8) as u8, side);
}
