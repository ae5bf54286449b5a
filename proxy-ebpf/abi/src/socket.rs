//! Sockets of the node's own network namespace, translated at `connect` and `sendmsg` instead of per packet.

use crate::{IpBytes, PortBe};

abi! {
    /// A socket and one of the addresses it talks to.
    pub struct SocketKey [32] {
        /// Kernel's cookie of the socket, never reused while the node runs.
        pub cookie: u64,
        /// Forward: the service address that the program asked for. Reverse: the backend that the kernel talks to.
        pub ip: IpBytes,
        /// Its port.
        pub port: PortBe,
        /// [`SocketKey::FORWARD`] or [`SocketKey::REVERSE`].
        pub direction: u16,
        /// 0.
        pub reserved: u32,
    }

    /// The other address.
    pub struct SocketEntry [32] {
        /// Forward: the backend. Reverse: the service address.
        pub ip: IpBytes,
        /// Its port.
        pub port: PortBe,
        /// 0.
        pub reserved: u16,
        /// Backend id.
        pub backend: u32,
        /// Generation of that backend; a forward entry of another one is stale.
        pub generation: u32,
        /// Service port.
        pub service: u32,
    }
}

impl SocketKey {
    /// service address → backend: keeps an unconnected UDP socket on one backend.
    pub const FORWARD: u16 = 0;
    /// backend → service address: what `recvmsg` and `getpeername` show.
    pub const REVERSE: u16 = 1;
}
