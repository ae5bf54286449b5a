//! Connection tracking.
//!
//! A flow has two tuples, both written in the direction of its initiator: **original** as the initiator sends it and
//! **translated** as the backend receives it. They are equal for a direct flow. The four hooks of a same-node service
//! flow see
//!
//! ```text
//!            from_pod(client)      to_pod(backend)     from_pod(backend)    to_pod(client)
//!   packet   C → VIP               C → B               B → C                VIP → C
//!   key      {C, VIP}              {C, B}              {B, C}               {VIP, C}
//!            original              translated          translated           original
//! ```
//!
//! A key holds its two ends in a fixed order, whatever the direction of the packet. So both directions and all hooks
//! find a flow with one lookup; a direct flow is one entry, a translated flow two; and two flows that would look alike
//! on the wire between node and backend meet in one key, where `BPF_NOEXIST` shows the clash.

use crate::{FAMILY_IPV4, IpBytes, MacBytes, PortBe, Proto};

/// Bytes that the imagined next version has more of in a flow.
const NEXT: usize = if cfg!(feature = "layout-next") { 8 } else { 0 };

abi! {
    /// Two ends in a fixed order, protocol and family. SCTP uses its ports. An echo request has
    /// its identifier as source port and its type as destination port; what has no ports has 0.
    pub struct FlowKey [40] {
        /// The end that comes first in the order of [`Tuple::src_is_low`].
        pub low: IpBytes,
        /// The other end.
        pub high: IpBytes,
        /// Port of `low`.
        pub low_port: PortBe,
        /// Port of `high`.
        pub high_port: PortBe,
        /// Protocol.
        pub proto: Proto,
        /// [`FAMILY_IPV4`] or [`crate::FAMILY_IPV6`].
        pub family: u8,
        /// [`FlowKey::SIDE_COMMON`] or [`FlowKey::SIDE_INITIATOR`].
        pub side: u8,
        /// 0.
        pub reserved: u8,
    }

    /// Source and destination of a packet.
    pub struct Tuple [36] {
        /// Source address.
        pub src: IpBytes,
        /// Destination address.
        pub dst: IpBytes,
        /// Source port.
        pub src_port: PortBe,
        /// Destination port.
        pub dst_port: PortBe,
    }

    /// A policy decision on one side of a flow: it may pass, as long as slot and revision of the pod are the same.
    pub struct Stamp [8] {
        /// Revision of the pod's policy slot when it was judged; 0 = never.
        pub revision: u32,
        /// The rule that decided; 0 = none.
        pub rule: u32,
    }

    /// A moment of a TCP sender, in host byte order: what a socket in TIME_WAIT compares a new SYN with.
    pub struct TcpMoment [8] {
        /// Sequence number.
        pub sequence: u32,
        /// TSval of its timestamp option (RFC 7323 §3.2); 0 = it has none.
        pub timestamp: u32,
    }

    /// State of a flow. The same layout under both keys of a translated flow, each complete in itself.
    pub struct FlowEntry [144 + NEXT] {
        /// As the initiator sends.
        pub original: Tuple,
        /// As the responder receives; its source is another address for a hairpin or SNAT, another port after a clash.
        pub translated: Tuple,
        /// Of the imagined next version: whatever was here before is somewhere else.
        #[cfg(feature = "layout-next")]
        pub next: u64,
        /// CLOCK_MONOTONIC, nanoseconds, coarse; written at most once a second.
        pub last_seen: u64,
        /// Service port; 0 = direct.
        pub service: u32,
        /// Backend; meaningful when `service` is not 0.
        pub backend: u32,
        /// Generation of that backend when the flow was made.
        pub generation: u32,
        /// Interface of the initiator's pod; 0 = not a pod of this node.
        pub initiator_ifindex: u32,
        /// Interface of the responder's pod; 0 = not a pod of this node, or reached through the stack.
        pub responder_ifindex: u32,
        /// Policy on the initiator's side (egress).
        pub initiator_stamp: Stamp,
        /// Policy on the responder's side (ingress).
        pub responder_stamp: Stamp,
        /// Of a masqueraded connection that the responder closed first: the initiator's last segment. All zero otherwise.
        pub last_sent: TcpMoment,
        /// MAC of the initiator's pod.
        pub initiator_mac: MacBytes,
        /// MAC of the responder's pod.
        pub responder_mac: MacBytes,
        /// Policy slot that `initiator_stamp` is of.
        pub initiator_slot: u16,
        /// Policy slot that `responder_stamp` is of.
        pub responder_slot: u16,
        /// [`FlowEntry::REDIRECT`] and others.
        pub flags: u16,
        /// State of [`crate::flow::state`].
        pub state: u8,
        /// Where the flow came from: [`crate::flow::provenance`].
        pub provenance: u8,
    }

    /// Where a program makes a new flow: one for each CPU, in a map of its own that is not pinned. Programs at tc run
    /// with bottom halves off, so none of them interrupts another on its CPU. Being in a map, it costs no stack, and the
    /// verifier forgets what was written: paths that differ by nothing else are walked once.
    pub struct Work [432 + NEXT] {
        /// The tuple that a packet is to get.
        pub new: Tuple,
        /// Interface that it is redirected to; 0: on through the stack.
        pub redirect: u32,
        /// Destination MAC that it is to get.
        pub mac: MacBytes,
        /// Is `mac` to be set? Flags of [`FlowEntry`]; `ROUTED`: the route says where to.
        pub set_mac: u16,
        /// Service port of its flow.
        pub service: u32,
        /// Backend of its flow.
        pub backend: u32,
        /// The flow.
        pub entry: FlowEntry,
        /// A key of it.
        pub key: FlowKey,
        /// The key of a fragment; what is reserved in it stays 0.
        pub fragment: FragmentKey,
        /// A reason (`crate::Reason`) on its way back to the caller.
        pub reason: u32,
        /// Flags of the frontend that a new flow is made for.
        pub frontend_flags: u32,
        /// The tuple of the packet that an ICMP error quotes.
        pub quoted: Tuple,
        /// Argument of `bpf_fib_lookup`: `struct bpf_fib_lookup` of the kernel, 64 bytes.
        pub route: [u32; 16],
        /// MTU of the path that a packet is too big for.
        pub mtu: u32,
        /// Of the SYN that asks for a masqueraded connection.
        pub asked: TcpMoment,
        /// Question to the policy: the other end.
        pub peer: IpBytes,
        /// Its answer: the revision under which it holds.
        pub revision: u32,
        /// Its answer: the rule that decided, [`crate::policy::RuleRef`]; of the packet at hand, 0 = none.
        pub rule: u32,
        /// What was asked, so that the shadow can be asked the same: protocol, flags and port.
        pub asked_about: u32,
        /// Of which slot.
        pub asked_slot: u32,
    }

    /// A fragmented packet: RFC 791 §3.2, RFC 8200 §4.5.
    pub struct FragmentKey [40] {
        /// Source address.
        pub src: IpBytes,
        /// Destination address.
        pub dst: IpBytes,
        /// Identification, as it stands in the header (16 bits for IPv4).
        pub id: u32,
        /// Protocol of the whole packet.
        pub proto: Proto,
        /// 0; keeps the key free of padding.
        pub reserved: [u8; 3],
    }

    /// What the first fragment said.
    pub struct FragmentEntry [8] {
        /// Source port.
        pub src_port: PortBe,
        /// Destination port.
        pub dst_port: PortBe,
        /// 0.
        pub reserved: u32,
    }
}

impl FlowKey {
    /// Every tuple, as any hook sees it: one space, or a clash could not be seen.
    pub const SIDE_COMMON: u8 = 0;
    /// The original tuple of a flow that got another source port because a translated flow holds its tuple on the
    /// common side: a pod talks to a backend directly, from the port from which it also talks to it through a Service.
    /// Looked up only when the initiator's veth finds a translated tuple going forward, which no other flow does.
    pub const SIDE_INITIATOR: u8 = 1;
}

impl Tuple {
    /// No address, no port.
    pub const ZERO: Self =
        Self { src: IpBytes([0; 4]), dst: IpBytes([0; 4]), src_port: PortBe(0), dst_port: PortBe(0) };

    /// The tuple of a reply.
    #[inline(always)]
    #[must_use]
    pub const fn reversed(&self) -> Self {
        Self { src: self.dst, dst: self.src, src_port: self.dst_port, dst_port: self.src_port }
    }

    /// Is the source the `low` end of the key? The order is the same for every program and has no meaning beyond that.
    #[inline(always)]
    pub const fn src_is_low(&self) -> bool {
        let (src, dst) = (self.src.halves(), self.dst.halves());
        // IPv4 differs in the second half alone; it is compared first.
        if src.1 != dst.1 {
            return src.1 < dst.1;
        }
        if src.0 != dst.0 {
            return src.0 < dst.0;
        }
        self.src_port.0 <= self.dst_port.0
    }

    /// Is it the same tuple? Without a branch for each word.
    #[inline(always)]
    pub const fn is(&self, other: &Self) -> bool {
        let (a, b, c, d) = (self.src.halves(), other.src.halves(), self.dst.halves(), other.dst.halves());
        let ports = (self.src_port.0 ^ other.src_port.0) | (self.dst_port.0 ^ other.dst_port.0);
        (a.0 ^ b.0) | (a.1 ^ b.1) | (c.0 ^ d.0) | (c.1 ^ d.1) | ports as u64 == 0
    }

    /// The key under which both directions are found.
    #[inline(always)]
    pub const fn key(&self, proto: Proto, family: u8, side: u8) -> FlowKey {
        self.key_by(self.src_is_low() as u32, proto, family, side)
    }

    /// The same, with the outcome of [`Tuple::src_is_low`] as a number, which a program can let the verifier forget.
    #[inline(always)]
    pub const fn key_by(&self, src_is_low: u32, proto: Proto, family: u8, side: u8) -> FlowKey {
        // By masks instead of two copies of the code: the verifier walks one path after the comparison.
        let mask = 0_u32.wrapping_sub(src_is_low);
        let (s, d) = (self.src.0, self.dst.0);
        #[expect(clippy::cast_possible_truncation, reason = "all bits are the same")]
        let (ports, swap) = (self.src_port.0, (self.src_port.0 ^ self.dst_port.0) & mask as u16);
        let x = [(s[0] ^ d[0]) & mask, (s[1] ^ d[1]) & mask, (s[2] ^ d[2]) & mask, (s[3] ^ d[3]) & mask];
        FlowKey {
            low: IpBytes([d[0] ^ x[0], d[1] ^ x[1], d[2] ^ x[2], d[3] ^ x[3]]),
            high: IpBytes([s[0] ^ x[0], s[1] ^ x[1], s[2] ^ x[2], s[3] ^ x[3]]),
            low_port: PortBe(self.dst_port.0 ^ swap),
            high_port: PortBe(ports ^ swap),
            proto,
            family,
            side,
            reserved: 0,
        }
    }
}

impl FlowEntry {
    /// The packet goes from veth to veth by redirect, in both directions, and replies are translated back at the
    /// responder's veth. Without it replies are translated back at the initiator's veth.
    pub const REDIRECT: u16 = 1;
    /// The destination MAC is set to the responder's, so that the bridge switches the frame.
    pub const SWITCH: u16 = 2;
    /// The entry lies under the key of the original tuple.
    pub const KEY_ORIGINAL: u16 = 4;
    /// The entry lies under the key of the translated tuple.
    pub const KEY_TRANSLATED: u16 = 8;
    /// The initiator is its own backend.
    pub const HAIRPIN: u16 = 16;
    /// `flow_live` had no room when the flow was established, or its pod has its share of direct ones there; tried again once
    /// a second.
    pub const NOT_PROMOTED: u16 = 32;
    /// Marks a key of `pod_flows`, which is an interface index else: it counts the direct flows of that pod.
    pub const DIRECT_OF: u32 = 1 << 31;
    /// The key of the original tuple is on [`FlowKey::SIDE_INITIATOR`].
    pub const INITIATOR_SIDE: u16 = 64;
    /// The initiator is not a pod of this node: with `REDIRECT`, its packets leave by the interface that the route to it
    /// names.
    pub const OUTSIDE: u16 = 128;
    /// With `REDIRECT`: packets to the responder leave by the interface that the route to it names.
    pub const ROUTED: u16 = 256;
    /// The translated source is an address of the node.
    pub const MASQUERADED: u16 = 512;

    /// No flow.
    pub const NONE: Self = Self {
        original: Tuple::ZERO,
        translated: Tuple::ZERO,
        #[cfg(feature = "layout-next")]
        next: 0,
        last_seen: 0,
        service: 0,
        backend: 0,
        generation: 0,
        initiator_ifindex: 0,
        responder_ifindex: 0,
        initiator_stamp: Stamp { revision: 0, rule: 0 },
        responder_stamp: Stamp { revision: 0, rule: 0 },
        last_sent: TcpMoment { sequence: 0, timestamp: 0 },
        initiator_mac: MacBytes([0; 6]),
        responder_mac: MacBytes([0; 6]),
        initiator_slot: 0,
        responder_slot: 0,
        flags: 0,
        state: 0,
        provenance: 0,
    };

    /// Is anything rewritten?
    #[inline(always)]
    pub const fn is_translated(&self) -> bool {
        // A direct flow's entry is under both keys at once, because they are one.
        self.flags & (Self::KEY_ORIGINAL | Self::KEY_TRANSLATED) != Self::KEY_ORIGINAL | Self::KEY_TRANSLATED
    }

    /// Under which key of `pod_flows` this entry is counted: flows through Services, and direct ones, of the pod that began
    /// them. `None` = not at all, because no pod did, or the flow's other entry is.
    #[inline(always)]
    pub const fn charged_to(&self) -> Option<u32> {
        if self.flags & Self::KEY_ORIGINAL == 0 || self.initiator_ifindex == 0 {
            return None;
        }
        Some(if self.is_translated() { self.initiator_ifindex } else { self.initiator_ifindex | Self::DIRECT_OF })
    }
}

impl FragmentKey {
    /// Family that the addresses are of.
    pub const fn family(&self) -> u8 {
        if self.src.is_v4() { FAMILY_IPV4 } else { crate::FAMILY_IPV6 }
    }
}

/// States of a flow (`FlowEntry::state`). TCP in the order of its life, then the others.
pub mod state {
    /// Initiator sent SYN.
    pub const SYN_SENT: u8 = 1;
    /// Responder answered SYN-ACK.
    pub const SYN_RECEIVED: u8 = 2;
    /// Initiator acknowledged, or data was seen in both directions of a flow older than the agent.
    pub const ESTABLISHED: u8 = 3;
    /// Initiator sent FIN.
    pub const FIN_INITIATOR: u8 = 4;
    /// Responder sent FIN.
    pub const FIN_RESPONDER: u8 = 5;
    /// Both sent FIN.
    pub const CLOSED: u8 = 6;
    /// One of them sent RST.
    pub const RESET: u8 = 7;
    /// A segment without SYN began the flow: it is older than our programs.
    pub const MIDSTREAM: u8 = 8;
    /// Not TCP; no answer yet.
    pub const UNREPLIED: u8 = 16;
    /// Not TCP; both directions seen.
    pub const ASSURED: u8 = 17;

    /// For people.
    pub const fn name(state: u8) -> &'static str {
        match state {
            SYN_SENT => "SYN_SENT",
            SYN_RECEIVED => "SYN_RECEIVED",
            ESTABLISHED => "ESTABLISHED",
            FIN_INITIATOR => "FIN_INITIATOR",
            FIN_RESPONDER => "FIN_RESPONDER",
            CLOSED => "CLOSED",
            RESET => "RESET",
            MIDSTREAM => "MIDSTREAM",
            UNREPLIED => "UNREPLIED",
            ASSURED => "ASSURED",
            _ => "UNKNOWN",
        }
    }
}

/// Who began a flow (`FlowEntry::provenance`).
pub mod provenance {
    /// A pod of this node: the first packet was seen at its veth.
    pub const POD: u8 = 1;
    /// Somebody else: the first packet was seen on its way to a pod of this node.
    pub const OUTSIDE: u8 = 2;
    /// A process of this node: the first packet came to a pod of this node from a socket of the node's.
    pub const NODE: u8 = 3;
}
