//! Interfaces of the node and the pods behind them.

use crate::{IpBytes, MacBytes};

abi! {
    /// A host-side veth of a pod, by interface index. The programs do nothing on an interface without an entry.
    pub struct DeviceEntry [96] {
        /// The pod's IPv4 address as the agent bound it, or [`IpBytes::UNSPECIFIED`].
        pub ip4: IpBytes,
        /// The pod's IPv6 address as the agent bound it, or [`IpBytes::UNSPECIFIED`].
        pub ip6: IpBytes,
        /// The bridge's IPv4 address in the pod's subnet, or [`IpBytes::UNSPECIFIED`]: the source that a pod sees when
        /// it reaches itself through a Service, as with kube-proxy's masquerade.
        pub gateway_ip4: IpBytes,
        /// The bridge's IPv6 address in the pod's subnet, or [`IpBytes::UNSPECIFIED`].
        pub gateway_ip6: IpBytes,
        /// MAC of the pod's end.
        pub pod_mac: MacBytes,
        /// MAC of the bridge: what the pod takes for its gateway.
        pub gateway_mac: MacBytes,
        /// Index of the bridge; 0 when the interface is not a bridge port.
        pub bridge: u32,
        /// [`DeviceEntry::REDIRECT`] and others.
        pub flags: u32,
        /// Policy slot of the pod; 0 = none.
        pub slot: u16,
        /// 0.
        pub reserved: u16,
        /// Nanoseconds of CLOCK_MONOTONIC when the interface was first seen, in units of 2^30: orders two claims.
        pub since: u32,
        /// 0.
        pub reserved2: u32,
    }

    /// A pod of this node, by address.
    pub struct LocalPodEntry [16] {
        /// Host-side veth.
        pub ifindex: u32,
        /// MAC of the pod's end.
        pub mac: MacBytes,
        /// Policy slot of the pod; 0 = none.
        pub slot: u16,
        /// As in [`DeviceEntry`].
        pub flags: u32,
    }
}

impl DeviceEntry {
    /// Packets may be redirected from and to this interface past the bridge: nobody else's program or bridge setting
    /// has to see them.
    pub const REDIRECT: u32 = 1;
    /// Packets for another port of the same bridge may be switched: the destination MAC is set to the backend's, and
    /// the bridge and all programs on both interfaces see the frame. Without it and without `REDIRECT` the packet goes
    /// up to the IP stack.
    pub const SWITCH: u32 = 2;
}
