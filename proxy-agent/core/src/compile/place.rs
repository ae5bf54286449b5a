//! The addresses at which a Service is served, and what keeps one from being served.

use std::collections::BTreeSet;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use proxy_abi::{FrontendKey, IpBytes, PortBe};

use crate::address::{AddressFault, Family};
use crate::diagnostic::Diagnostic;
use crate::policy::Policy;
use crate::service::{Service, ServicePort};
use crate::state::ClusterState;

use super::error;

/// What an address is to its Service.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    /// A cluster address.
    Cluster,
    /// All addresses of the node that serve NodePorts.
    NodePort,
    /// One of `spec.externalIPs`.
    External,
    /// One of `status.loadBalancer`.
    LoadBalancer,
}

/// What keeps an address from being served, and what to do about it.
pub(super) type Fault = (String, &'static str);

/// The addresses of one Service that may be served, each once, with findings about the others.
#[derive(Debug, Default)]
pub(super) struct Addresses {
    served: Vec<(Kind, IpAddr)>,
    families: Vec<Family>,
    external_local: bool,
    pub(super) findings: Vec<Diagnostic>,
}

/// A frontend that a port asks for.
#[derive(Clone, Copy, Debug)]
pub(super) struct Asked {
    /// In the scope of the cluster.
    pub(super) key: FrontendKey,
    pub(super) kind: Kind,
    /// Unspecified for a NodePort.
    pub(super) ip: IpAddr,
    /// Has another set of backends for what comes from outside.
    pub(super) split: bool,
}

impl Kind {
    /// The field that names the port or address, for a finding about `spec.ports[index]`.
    pub(super) fn field(self, index: usize) -> String {
        match self {
            Self::Cluster => format!("spec.ports[{index}].port"),
            Self::NodePort => format!("spec.ports[{index}].nodePort"),
            Self::External => "spec.externalIPs".to_owned(),
            Self::LoadBalancer => "status.loadBalancer.ingress".to_owned(),
        }
    }
}

impl Asked {
    /// The frontend beside it for traffic from outside.
    pub(super) const fn outside(&self) -> FrontendKey {
        FrontendKey { scope: FrontendKey::SCOPE_EXTERNAL, ..self.key }
    }
}

impl Addresses {
    pub(super) fn of(state: &ClusterState, policy: &Policy, service: &Service) -> Self {
        let mut addresses = Self { external_local: service.external_local, ..Self::default() };
        for (index, ip) in service.cluster_ips.iter().enumerate() {
            addresses.families.push(Family::of(*ip));
            match cluster_address_fault(state, *ip) {
                None => addresses.served.push((Kind::Cluster, *ip)),
                Some(fault) => addresses.refuse(service, format!("spec.clusterIPs[{index}]"), fault),
            }
        }
        // A load balancer's address that is an external one too is the former: its sources are filtered.
        let balanced = service.load_balancer_ips.iter().map(|ip| (Kind::LoadBalancer, *ip));
        let external = service.external_ips.iter().map(|ip| (Kind::External, *ip));
        let mut seen = BTreeSet::new();
        for (kind, ip) in balanced.chain(external) {
            // Of a family that the Service has not: not its business.
            if !addresses.families.contains(&Family::of(ip)) || !seen.insert(ip) {
                continue;
            }
            match outside_fault(state, policy, kind, ip) {
                None => addresses.served.push((kind, ip)),
                Some(fault) => addresses.refuse(service, kind.field(0), fault),
            }
        }
        addresses
    }

    fn refuse(&mut self, service: &Service, field: String, (problem, fix): Fault) {
        self.findings.push(error(format!("Service {}", service.name), field, problem, fix));
    }

    /// The frontends that a port asks for.
    pub(super) fn asked(&self, port: &ServicePort) -> impl Iterator<Item = Asked> {
        let proto = port.protocol.number();
        let key = move |ip, port| FrontendKey { ip, port, proto, scope: FrontendKey::SCOPE_CLUSTER };
        let number = PortBe::new(port.port.get());
        let named = self.served.iter().map(move |(kind, ip)| Asked {
            key: key(IpBytes::from(*ip), number),
            kind: *kind,
            ip: *ip,
            split: self.external_local && *kind != Kind::Cluster,
        });
        let node_port = port.node_port.map(|port| PortBe::new(port.get()));
        let wild = node_port.into_iter().flat_map(move |number| {
            self.families.iter().map(move |family| {
                let (ip, is_v4) = match family {
                    Family::V4 => (IpAddr::V4(Ipv4Addr::UNSPECIFIED), true),
                    Family::V6 => (IpAddr::V6(Ipv6Addr::UNSPECIFIED), false),
                };
                let key = key(FrontendKey::wildcard(is_v4), number);
                Asked { key, kind: Kind::NodePort, ip, split: self.external_local }
            })
        });
        named.chain(wild)
    }

    /// The keys of those, and of the ones beside them for traffic from outside.
    pub(super) fn keys(&self, port: &ServicePort) -> BTreeSet<FrontendKey> {
        self.asked(port).flat_map(|asked| [Some(asked.key), asked.split.then(|| asked.outside())]).flatten().collect()
    }
}

/// What keeps a cluster address from being a frontend.
fn cluster_address_fault(state: &ClusterState, ip: IpAddr) -> Option<Fault> {
    match AddressFault::of(ip) {
        // A cluster range may be link-local: the address never leaves the node.
        None | Some(AddressFault::LinkLocal) => {}
        Some(fault) => {
            return Some((
                format!("{ip} is {} {fault} address; it is not served", article(fault)),
                "use an address of the cluster's service range",
            ));
        }
    }
    if state.is_of_node(ip) {
        return Some((format!("{ip} is an address of this node; it is not served"), "take it from one of the two"));
    }
    pod_fault(state, ip, "keep the pod range and the service range apart")
}

/// What keeps an external address, or that of a load balancer, from being a frontend: whoever may write a Service would
/// otherwise take over what is not theirs (CVE-2020-8554).
fn outside_fault(state: &ClusterState, policy: &Policy, kind: Kind, ip: IpAddr) -> Option<Fault> {
    if kind == Kind::External && !policy.external_ips.allow(ip) {
        let problem = format!("{ip} is no external address that the agent's configuration allows; it is not served");
        return Some((problem, "use a load balancer or a NodePort, or have the address allowed"));
    }
    if let Some(fault) = AddressFault::of(ip) {
        let problem = format!("{ip} is {} {fault} address; it is not served", article(fault));
        return Some((problem, "use an address that leads to the cluster from outside"));
    }
    if let Some(owner) = state.cluster_address_of(ip) {
        let problem = format!("{ip} is the cluster address of Service {owner}; it is not served for this field");
        return Some((problem, "use an address outside the service range"));
    }
    let mut ranges = state.service_cidrs().flat_map(|(name, ranges)| ranges.iter().map(move |range| (name, range)));
    if let Some((name, range)) = ranges.find(|(_, range)| range.contains(&ip)) {
        let problem = format!("{ip} is in {range}, the range of ServiceCIDR {name}; it is not served");
        return Some((problem, "use an address outside the service range"));
    }
    if let Some(range) = state.node().pod_cidrs.iter().find(|range| range.contains(&ip)) {
        let problem = format!("{ip} is in {range}, this node's range of pod addresses; it is not served");
        return Some((problem, "use an address outside the pod range"));
    }
    // A load balancer may well hand out addresses of nodes, as that of k3s does.
    if kind == Kind::External && state.is_on_node(ip) {
        let problem = format!("{ip} is an address of this node; it is not served");
        return Some((problem, "use a NodePort, or an address that no node has"));
    }
    pod_fault(state, ip, "use an address that no pod has")
}

fn pod_fault(state: &ClusterState, ip: IpAddr, fix: &'static str) -> Option<Fault> {
    let link = state.holder(ip).and_then(|ifindex| state.link(ifindex))?;
    Some((format!("{ip} is the address of the pod behind {}; it is not served", link.name), fix))
}

pub(super) const fn article(fault: AddressFault) -> &'static str {
    match fault {
        AddressFault::Unspecified | AddressFault::Ipv4Mapped => "an",
        AddressFault::Loopback | AddressFault::LinkLocal | AddressFault::Multicast | AddressFault::Broadcast => "a",
    }
}
