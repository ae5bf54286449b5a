//! Services and endpoint slices as the proxy understands them: parsed once, valid by type.

use std::net::IpAddr;
use std::num::NonZeroU16;
use std::sync::Arc;

use ipnet::IpNet;

use crate::name::ObjectName;

/// Transport protocol of a service port.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Protocol {
    /// TCP.
    Tcp,
    /// UDP.
    Udp,
    /// SCTP.
    Sctp,
}

impl Protocol {
    /// As in keys and packets.
    pub const fn number(self) -> proxy_abi::Proto {
        match self {
            Self::Tcp => proxy_abi::Proto::TCP,
            Self::Udp => proxy_abi::Proto::UDP,
            Self::Sctp => proxy_abi::Proto::SCTP,
        }
    }
}

/// A Service with at least one cluster address. Headless and `ExternalName` Services never get here.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Service {
    /// Name.
    pub name: ObjectName,
    /// `spec.clusterIPs`, at most one of each family.
    pub cluster_ips: Vec<IpAddr>,
    /// `spec.ports`.
    pub ports: Vec<ServicePort>,
    /// Session affinity by client address, in seconds.
    pub affinity_seconds: Option<u32>,
    /// `spec.externalIPs`, of any family.
    pub external_ips: Vec<IpAddr>,
    /// `status.loadBalancer.ingress[].ip`, those with `ipMode: VIP` or none.
    pub load_balancer_ips: Vec<IpAddr>,
    /// `spec.loadBalancerSourceRanges`.
    pub source_ranges: Vec<IpNet>,
    /// `spec.internalTrafficPolicy: Local`.
    pub internal_local: bool,
    /// `spec.externalTrafficPolicy: Local`.
    pub external_local: bool,
    /// `spec.healthCheckNodePort`, for a load balancer with `externalTrafficPolicy: Local`.
    pub health_check_node_port: Option<NonZeroU16>,
}

/// One entry of `spec.ports`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ServicePort {
    /// Name; empty when the Service has one unnamed port.
    pub name: Arc<str>,
    /// Protocol.
    pub protocol: Protocol,
    /// Port of the cluster address.
    pub port: NonZeroU16,
    /// Port of the node's addresses.
    pub node_port: Option<NonZeroU16>,
}

/// An `EndpointSlice` of address type IPv4 or IPv6 that belongs to a Service.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct EndpointSlice {
    /// Name of the slice.
    pub name: ObjectName,
    /// Service named by its label `kubernetes.io/service-name`, in the same namespace.
    pub service: ObjectName,
    /// `ports`: those with a number.
    pub ports: Vec<EndpointPort>,
    /// `endpoints`.
    pub endpoints: Vec<Endpoint>,
    /// When the change began that the slice tells of, in milliseconds since 1970: its annotation
    /// `endpoints.kubernetes.io/last-change-trigger-time`.
    pub triggered: Option<u64>,
}

/// One entry of a slice's `ports`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct EndpointPort {
    /// Name: matches the port of the Service with the same name.
    pub name: Arc<str>,
    /// Protocol.
    pub protocol: Protocol,
    /// Target port.
    pub port: NonZeroU16,
}

/// One entry of a slice's `endpoints`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Endpoint {
    /// `addresses[0]`.
    pub address: IpAddr,
    /// `conditions.ready`, where absent means true.
    pub ready: bool,
    /// `conditions.serving`, where absent means the same as ready.
    pub serving: bool,
    /// `conditions.terminating`, where absent means false.
    pub terminating: bool,
    /// `nodeName`.
    pub node: Option<Arc<str>>,
    /// `hints.forZones`, empty when absent.
    pub for_zones: Vec<Arc<str>>,
    /// `hints.forNodes`, empty when absent.
    pub for_nodes: Vec<Arc<str>>,
}
