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

use crate::{IpBytes, PortBe, Proto};

abi! {
    /// Address, port and protocol at which a service port is reached.
    pub struct FrontendKey [20] {
        /// Address; [`IpBytes::UNSPECIFIED`] for a NodePort, which is one entry for all addresses of the node.
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
        /// Number of slots; 0 = no endpoint: packets drop with [`crate::Reason::NoBackend`].
        pub count: u32,
        /// Service port that owns it.
        pub service: u32,
        /// Reserved for traffic policies; 0.
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
        /// [`BackendEntry::LOCAL`].
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

impl FrontendKey {
    /// Traffic from pods and the node itself.
    pub const SCOPE_CLUSTER: u8 = 0;
    /// Traffic from outside, where `externalTrafficPolicy: Local` selects other backends.
    pub const SCOPE_EXTERNAL: u8 = 1;

    /// The entry that marks an address as one of a Service.
    pub const fn address(ip: IpBytes) -> Self {
        Self { ip, port: PortBe(0), proto: Proto(0), scope: Self::SCOPE_CLUSTER }
    }
}

impl BackendEntry {
    /// The backend is on this node.
    pub const LOCAL: u32 = 1;
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
