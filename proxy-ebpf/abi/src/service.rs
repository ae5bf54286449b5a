//! Services: frontends, the slots they own, backends.
//!
//! ```text
//!   frontend[10.96.0.1:80/TCP] = {first 40, count 3}      one update switches from the old range to the new one
//!        │
//!        ▼
//!   backend_slot[40..43] = 7, 9, 8                        written before the frontend points at it
//!        │
//!        ▼
//!   backend[7] = 10.244.0.5:8080, generation 3            content never changes while a slot or a flow names it;
//!                                                         generation 0 = serves no more
//! ```
//!
//! Frontends of a service port, by the kind of its address:
//!
//! ```text
//!   kind                  address in the key    scope CLUSTER (pods, node)      scope EXTERNAL (outside)
//!   ClusterIP             its own               internalTrafficPolicy's set     none: the same entry serves
//!   NodePort              wildcard of a family  cluster set                     local set, when externalTrafficPolicy
//!   externalIP, LB VIP    its own               cluster set                     is Local; else none
//!   address mark          its own, port 0       what else holds for this address: FrontendEntry::ADDRESS_*
//! ```
//!
//! A packet to an address and port without an entry looks at the address mark; `ADDRESS_NODE_PORT` there leads to the
//! wildcard, `ADDRESS_REJECT` to a refusal. Whoever has no mark and lies in `prefix` under [`PrefixKey::SERVICE_CIDR`]
//! is dropped.

use crate::{IpBytes, PortBe, Proto};

abi! {
    /// Address, port and protocol at which a service port is reached.
    pub struct FrontendKey [20] {
        /// Address; [`FrontendKey::wildcard`] for a NodePort, which is one entry for all addresses of a family.
        pub ip: IpBytes,
        /// Port; 0 in the entry that only says "this address belongs to a Service".
        pub port: PortBe,
        /// Protocol; 0 in that same entry.
        pub proto: Proto,
        /// [`FrontendKey::SCOPE_CLUSTER`] or another scope.
        pub scope: u8,
    }

    /// What a frontend leads to.
    pub struct FrontendEntry [24] {
        /// First slot of the range in `backend_slot`.
        pub first: u32,
        /// Number of slots; 0 = no endpoint: refused, or dropped with [`FrontendEntry::DROP_EMPTY`].
        pub count: u32,
        /// Service port that owns it.
        pub service: u32,
        /// [`FrontendEntry::MASQUERADE`] and others.
        pub flags: u32,
        /// Session affinity in seconds; 0 = none.
        pub affinity_seconds: u32,
        /// Counts the changes of this frontend.
        pub generation: u32,
    }

    /// A place that serves a service port.
    pub struct BackendEntry [32] {
        /// Address.
        pub ip: IpBytes,
        /// Service port that it belongs to: the same address under another Service is another backend.
        pub service: u32,
        /// Differs for each use of an id; 0 = serves no more. A flow that names another generation is stale.
        pub generation: u32,
        /// Port.
        pub port: PortBe,
        /// Protocol.
        pub proto: Proto,
        /// 0.
        pub reserved: u8,
        /// [`BackendEntry::LOCAL`] and others: the only field that changes while a flow names the backend.
        pub flags: u32,
    }

    /// The name of a service port, so that ids can be restored and shown without the agent.
    pub struct ServiceEntry [152] {
        /// `namespace/name:port`, padded with zero bytes.
        pub name: NameBytes,
        /// 0.
        pub reserved: u32,
        /// Session affinity in seconds; 0 = none.
        pub affinity_seconds: u32,
    }
}

abi! {
    /// An address range under a scope, for a longest-prefix match. Its kernel form: length first.
    pub struct PrefixKey [24] {
        /// Significant bits after this field: 32 of the scope, then those of the address; 96 more for IPv4.
        pub length: u32,
        /// [`PrefixKey::SERVICE_CIDR`], [`PrefixKey::LOCAL_SOURCE`], or the service port whose load balancer may be used
        /// from here.
        pub scope: u32,
        /// Address.
        pub ip: IpBytes,
    }

    /// A client of a service port with session affinity.
    pub struct AffinityKey [24] {
        /// Service port.
        pub service: u32,
        /// 0.
        pub reserved: u32,
        /// The client's address as it arrived.
        pub client: IpBytes,
    }

    /// The backend that it was sent to.
    pub struct AffinityEntry [16] {
        /// Backend.
        pub backend: u32,
        /// Its generation then.
        pub generation: u32,
        /// CLOCK_MONOTONIC, nanoseconds, of the last new connection: the time-out slides.
        pub last_used: u64,
    }
}

impl PrefixKey {
    /// Ranges that cluster addresses are taken from: what no Service has there is dropped.
    pub const SERVICE_CIDR: u32 = 0xffff_ffff;
    /// Sources that count as pods of the cluster, although they come from outside: kube-proxy's `detectLocalMode`.
    pub const LOCAL_SOURCE: u32 = 0xffff_fffe;

    /// A single address, to look up.
    #[inline(always)]
    pub const fn exact(scope: u32, ip: IpBytes) -> Self {
        Self { length: 160, scope, ip }
    }

    /// A range; `bits` of its address as written (0 to 32, or 0 to 128).
    pub const fn range(scope: u32, ip: IpBytes, bits: u8) -> Self {
        Self { length: 32 + bits as u32 + if ip.is_v4() { 96 } else { 0 }, scope, ip }
    }
}

impl FrontendEntry {
    /// The source of every packet becomes an address of the node (`externalTrafficPolicy: Cluster`, `masqueradeAll`).
    pub const MASQUERADE: u32 = 1;
    /// The same for what comes from outside and is in no range of [`PrefixKey::LOCAL_SOURCE`] (cluster addresses).
    pub const MASQUERADE_OUTSIDE: u32 = 2;
    /// From outside the entry of scope EXTERNAL counts.
    pub const EXTERNAL_SPLIT: u32 = 4;
    /// Without a slot packets drop; otherwise they are refused.
    pub const DROP_EMPTY: u32 = 8;
    /// The slots are those of the local set; otherwise of the cluster set.
    pub const LOCAL_SET: u32 = 16;
    /// Only sources in a range of `prefix` under this service port are served.
    pub const SOURCE_RANGES: u32 = 32;
    /// An address of the node is in those ranges.
    pub const NODE_ALLOWED: u32 = 64;
    /// Address mark: other ports of this address are refused (an active ClusterIP).
    pub const ADDRESS_REJECT: u32 = 1 << 16;
    /// Address mark: NodePorts are served here.
    pub const ADDRESS_NODE_PORT: u32 = 1 << 17;
    /// Address mark: an address of the node itself.
    pub const ADDRESS_NODE: u32 = 1 << 18;
    /// Address mark: a loopback address, where sockets of the node alone find NodePorts.
    pub const ADDRESS_LOOPBACK: u32 = 1 << 19;
}

impl FrontendKey {
    /// Traffic from pods and the node itself.
    pub const SCOPE_CLUSTER: u8 = 0;
    /// Traffic from outside, where `externalTrafficPolicy: Local` selects other backends.
    pub const SCOPE_EXTERNAL: u8 = 1;

    /// The address in the key of a NodePort: `0.0.0.0` as a mapped address, or `::`.
    #[inline(always)]
    pub const fn wildcard(is_v4: bool) -> IpBytes {
        if is_v4 { IpBytes::from_v4_word(0) } else { IpBytes::UNSPECIFIED }
    }

    /// The entry that tells what an address is, whatever the port.
    #[inline(always)]
    pub const fn address(ip: IpBytes) -> Self {
        Self { ip, port: PortBe(0), proto: Proto(0), scope: Self::SCOPE_CLUSTER }
    }
}

impl BackendEntry {
    /// The backend is on this node.
    pub const LOCAL: u32 = 1;
    /// In the cluster set: takes new flows under traffic policy Cluster.
    pub const IN_CLUSTER: u32 = 2;
    /// In the local set: takes new flows under traffic policy Local.
    pub const IN_LOCAL: u32 = 4;
}

/// `namespace/name:port` in UTF-8, zero padded: at most 63 + 1 + 63 + 1 + 15 = 143 bytes by Kubernetes' own limits.
#[repr(transparent)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct NameBytes(pub [u8; 144]);

impl NameBytes {
    /// From text; `None` when it is longer than 144 bytes.
    pub fn new(name: &str) -> Option<Self> {
        let mut bytes = [0; 144];
        bytes.get_mut(..name.len())?.copy_from_slice(name.as_bytes());
        Some(Self(bytes))
    }

    /// The text; empty when the bytes are not UTF-8.
    pub fn as_str(&self) -> &str {
        let end = self.0.iter().position(|b| *b == 0).unwrap_or(self.0.len());
        core::str::from_utf8(self.0.get(..end).unwrap_or(&[])).unwrap_or("")
    }
}
