//! Interfaces of the node, and the pods behind some of them.
//!
//! ```text
//!   kind          ip4, ip6              gateway_ip4, gateway_ip6    pod_mac      gateway_mac     flags
//!   pod's veth    the pod's             the bridge's                the pod's    the bridge's    REDIRECT, SWITCH
//!   uplink ...    source of what is     unspecified                 its own      its own         NETDEV
//!                 masqueraded there
//!   bridge ...    the same              unspecified                 its own      its own         PLAIN
//! ```

use crate::{IpBytes, MacBytes};

abi! {
    /// An interface, by its index. The programs do nothing on an interface without an entry.
    pub struct DeviceEntry [96] {
        /// The pod's IPv4 address as the agent bound it; on another device the address that what leaves there is
        /// masqueraded with; or [`IpBytes::UNSPECIFIED`].
        pub ip4: IpBytes,
        /// The same for IPv6.
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
        /// Policy slot of the pod; 0 = nothing is enforced here; [`DeviceEntry::HELD`].
        pub slot: u16,
        /// 0.
        pub reserved: u16,
        /// Nanoseconds of CLOCK_MONOTONIC when the interface was first seen, in units of 2^30: orders two claims.
        pub since: u32,
        /// MTU in bytes, as the IP stack counts it; 0 = not known.
        pub mtu: u32,
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
    /// In place of a policy slot: policies exist, and whose interface this is is not known. Nothing passes but what the
    /// node itself begins.
    pub const HELD: u16 = u16::MAX;
    /// Packets may be redirected from and to this interface past the bridge: nobody else's program or bridge setting
    /// has to see them.
    pub const REDIRECT: u32 = 1;
    /// Packets for another port of the same bridge may be switched: the destination MAC is set to the backend's, and
    /// the bridge and all programs on both interfaces see the frame. Without it and without `REDIRECT` the packet goes
    /// up to the IP stack.
    pub const SWITCH: u32 = 2;
    /// Not a pod's: an uplink or tunnel with `from_netdev` and `to_netdev`.
    pub const NETDEV: u32 = 4;
    /// Not a pod's, and without programs: a bridge, whose addresses are what counts.
    pub const PLAIN: u32 = 8;
    /// A pod's, with a slot whose policies are audited alone: no policy of the cluster is enforced, so the frame rules are
    /// not either.
    pub const AUDITED: u32 = 16;
}
