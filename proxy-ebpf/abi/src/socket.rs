//! Sockets that are translated at `connect` and `sendmsg` instead of per packet: those of the node's own network namespace,
//! and with `--socket-lb=all` those of pods.

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
        /// [`SocketEntry::CONNECTED`], or 0.
        pub flags: u16,
        /// Backend id.
        pub backend: u32,
        /// Generation of that backend; a forward entry of another one is stale.
        pub generation: u32,
        /// Service port.
        pub service: u32,
    }

    /// A pod of this node whose sockets are translated; its key is the id of its cgroup, which the kernel uses once. Where no
    /// ancestor of a process has an entry, its packets are translated instead.
    pub struct CgroupPodEntry [40] {
        /// The pod's IPv4 address, or [`IpBytes::UNSPECIFIED`]: which client it is to session affinity and source ranges.
        pub ip4: IpBytes,
        /// The same for IPv6.
        pub ip6: IpBytes,
        /// Host-side veth.
        pub ifindex: u32,
        /// 0.
        pub reserved: u32,
    }
}

impl SocketEntry {
    /// Of a forward entry: `connect` chose, so a datagram that names the Service again goes there, too.
    pub const CONNECTED: u16 = 1;
}

impl SocketKey {
    /// service address → backend: keeps an unconnected UDP socket on one backend.
    pub const FORWARD: u16 = 0;
    /// backend → service address: what `recvmsg` and `getpeername` show.
    pub const REVERSE: u16 = 1;
}
