//! Reading the kernel's structures: offsets come from the running kernel's BTF, as load-time constants.
//!
//! A constant offset lets the verifier check a plain load against BTF, so none of these costs a call; only what lies
//! outside of typed memory is read by helper.

use aya_ebpf::Global;
use aya_ebpf::helpers::bpf_probe_read_kernel;
use aya_ebpf::helpers::generated::bpf_probe_read_kernel as read_bytes;
use core::ffi::c_void;
use proxy_abi::trace::SNAP;
use proxy_abi::{IpBytes, PortBe};

macro_rules! offsets {
    ($($(#[$meta:meta])* $name:ident;)+) => { $(
        $(#[$meta])*
        #[unsafe(no_mangle)]
        pub(crate) static $name: Global<u32> = Global::new(0);
    )+ };
}

offsets! {
    SKB_HEAD; SKB_DATA; SKB_TAIL; SKB_NETWORK; SKB_LEN; SKB_DEV; SKB_NFCT; SKB_MARK; SKB_EXTENSIONS;
    SKB_SK; SK_COOKIE;
    DEV_NAME; DEV_IFINDEX; DEV_NET;
    /// To the driver's own part of a device.
    DEV_PRIVATE;
    VETH_PEER;
    NET_INUM; NET_HOOKS_V4; NET_HOOKS_V6; NET_HOOKS_ARP; NET_HOOKS_BRIDGE;
    TASK_NSPROXY; TASK_PID; NSPROXY_NET;
    ENTRIES_HOOKS; OPS_PRIORITY; OPS_KIND; OPS_NFT; CHAIN_NAME; CHAIN_TABLE; TABLE_NAME;
    /// Where `consume_skb` writes down who consumed the packet: not 0 where it is told that.
    CONSUME_LOCATION;
}

/// A field of a structure whose type the verifier knows.
///
/// # Safety
/// `base` must be such a pointer, and the field of type `T`.
#[inline(always)]
pub(crate) unsafe fn field<T: Copy>(base: u64, offset: &Global<u32>) -> T {
    // SAFETY: by the caller. The verifier checks it, and a fault reads as 0.
    unsafe { *((base + u64::from(offset.load())) as *const T) }
}

/// A value anywhere in the kernel's memory; zero where there is none.
#[inline(always)]
pub(crate) fn read<T: Copy + Default>(address: u64) -> T {
    // SAFETY: the helper checks the address.
    unsafe { bpf_probe_read_kernel(address as *const T) }.unwrap_or_default()
}

/// A packet's addresses and what else is asked of it. Not of a fragment's rest: there are no ports then.
#[derive(Clone, Copy)]
pub(crate) struct Header {
    pub(crate) bytes: [u8; HEADER],
    pub(crate) src: IpBytes,
    pub(crate) dst: IpBytes,
    pub(crate) imprint: u64,
    pub(crate) src_port: PortBe,
    pub(crate) dst_port: PortBe,
    pub(crate) proto: u32,
    pub(crate) flags: u32,
    pub(crate) family: u32,
}

/// Bytes that are read for a match.
const HEADER: usize = 80;

impl Header {
    #[inline(always)]
    fn half(&self, at: usize) -> u16 {
        u16::from_ne_bytes([self.bytes[at & 63], self.bytes[(at & 63) + 1]])
    }

    #[inline(always)]
    fn word(&self, at: usize) -> u32 {
        let at = at & 63;
        u32::from_ne_bytes([self.bytes[at], self.bytes[at + 1], self.bytes[at + 2], self.bytes[at + 3]])
    }

    /// Reads the headers at an address. False when there is no IP packet.
    #[inline(always)]
    pub(crate) fn read(&mut self, address: u64) -> bool {
        // SAFETY: the buffer is as long as said; the helper checks the address.
        if unsafe { read_bytes(self.bytes.as_mut_ptr().cast::<c_void>(), HEADER as u32, address as *const c_void) } != 0
        {
            return false;
        }
        let version = self.bytes[0] >> 4;
        let (l4, identification);
        if version == 4 {
            l4 = usize::from(self.bytes[0] & 0xf) * 4;
            self.family = 4;
            self.proto = u32::from(self.bytes[9]);
            self.src = IpBytes::from_v4_word(self.word(12));
            self.dst = IpBytes::from_v4_word(self.word(16));
            identification = u64::from(self.half(4));
            if u16::from_be(self.half(6)) & 0x1fff != 0 {
                return self.rest_of_fragment(identification);
            }
        } else if version == 6 {
            self.family = 6;
            self.src = IpBytes([self.word(8), self.word(12), self.word(16), self.word(20)]);
            self.dst = IpBytes([self.word(24), self.word(28), self.word(32), self.word(36)]);
            let mut proto = u32::from(self.bytes[6]);
            let mut at = 40;
            let mut id = 0;
            // A fragment header, which is the only one that ordinary traffic has.
            if proto == 44 {
                proto = u32::from(self.bytes[40]);
                at = 48;
                id = u64::from(self.word(44));
                if u16::from_be(self.half(42)) & 0xfff8 != 0 {
                    self.proto = proto;
                    return self.rest_of_fragment(id);
                }
            }
            self.proto = proto;
            l4 = at;
            identification = id;
        } else {
            return false;
        }
        self.src_port = PortBe(0);
        self.dst_port = PortBe(0);
        self.flags = 0;
        self.imprint = identification << 32 | u64::from(self.proto);
        if self.proto == 6 {
            self.ports(l4);
            self.flags = u32::from(self.bytes[(l4 & 63) + 13]);
            self.imprint = u64::from(self.word(l4 + 4)) << 32 | u64::from(self.word(l4 + 8));
        } else if self.proto == 17 {
            self.ports(l4);
            self.imprint ^= u64::from(self.half(l4 + 4)) << 16;
        } else if self.proto == 132 {
            self.ports(l4);
            self.imprint ^= u64::from(self.word(l4 + 4)) << 16;
        } else if self.proto == 1 || self.proto == 58 {
            // Type, code and an echo's sequence number. The checksum and the identifier may be translated.
            self.imprint ^= u64::from(self.half(l4)) << 8 ^ u64::from(self.half(l4 + 6)) << 24;
        }
        true
    }

    #[inline(always)]
    fn ports(&mut self, l4: usize) {
        self.src_port = PortBe(self.half(l4));
        self.dst_port = PortBe(self.half(l4 + 2));
    }

    #[inline(always)]
    fn rest_of_fragment(&mut self, identification: u64) -> bool {
        self.src_port = PortBe(0);
        self.dst_port = PortBe(0);
        self.flags = 0;
        self.imprint = identification << 32 | u64::from(self.proto) | 1 << 31;
        true
    }
}

/// Where a packet's IP header lies: address, and how many bytes of it are in one piece from there on.
#[inline(always)]
pub(crate) fn ip_header(skb: u64, head: u64, received: bool) -> (u64, u32) {
    // SAFETY: `skb` comes from a tracepoint.
    let (tail, network, data) =
        unsafe { (field::<u32>(skb, &SKB_TAIL), field::<u16>(skb, &SKB_NETWORK), field::<u64>(skb, &SKB_DATA)) };
    // The stack has not set the offset when it takes a packet from a device: its data begins there then.
    let offset = if received { data.wrapping_sub(head) as u32 } else { u32::from(network) };
    let linear = tail.wrapping_sub(offset);
    if offset == 0 || offset == 0xffff || linear > 0xffff {
        return (0, 0);
    }
    let captured = if linear > SNAP as u32 { SNAP as u32 } else { linear };
    (head + u64::from(offset), captured)
}

/// Index of the other end of a veth, if that lies in the namespace `home` and the device itself does not.
#[inline(always)]
pub(crate) fn peer_at_home(device: u64, home: u32) -> u32 {
    let own = device + u64::from(DEV_PRIVATE.load()) + u64::from(VETH_PEER.load());
    let peer: u64 = read(own);
    if peer == 0 {
        return 0;
    }
    // Only a veth's driver has there a device that points back.
    let back: u64 = read(peer + u64::from(DEV_PRIVATE.load()) + u64::from(VETH_PEER.load()));
    if back != device {
        return 0;
    }
    let net: u64 = read(peer + u64::from(DEV_NET.load()));
    if read::<u32>(net + u64::from(NET_INUM.load())) != home {
        return 0;
    }
    read(peer + u64::from(DEV_IFINDEX.load()))
}
