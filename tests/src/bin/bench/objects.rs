//! The cluster's objects: the Service that is measured, and others that are only there.

use std::net::{IpAddr, SocketAddr};

use proxy_tests::address::{cluster_cidr, service_cidr};
use proxy_tests::manifests::{Endpoint, EndpointSlice, Object as _, Service, ServicePort};
use proxy_tests::{Family, Pod};
use serde_json::Value;

use crate::contender::Scene;

/// What is measured goes over this family.
pub(crate) const FAMILY: Family = Family::V4;

/// Ports of the servers in a pod, and of the Service: short connections, long connections, datagrams.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Port {
    Short,
    Long,
    Datagram,
}

impl Port {
    /// Where the pod listens.
    pub(crate) const fn target(self) -> u16 {
        match self {
            Self::Short => 8000,
            Self::Long | Self::Datagram => 8001,
        }
    }

    /// Where the Service is reached on the node's address.
    pub(crate) const fn node_port(self) -> u16 {
        match self {
            Self::Short => 30_080,
            Self::Long | Self::Datagram => 30_081,
        }
    }

    /// Where the Service is reached.
    pub(crate) const fn service(self) -> u16 {
        match self {
            Self::Short => 80,
            Self::Long | Self::Datagram => 81,
        }
    }
}

/// Address of the Service that is measured.
pub(crate) fn vip() -> IpAddr {
    service_cidr(FAMILY).host(10)
}

/// A port of the Service that is measured.
pub(crate) fn at_service(port: Port) -> SocketAddr {
    SocketAddr::new(vip(), port.service())
}

/// The Service that is measured.
pub(crate) fn service() -> Service {
    let ports = vec![
        ServicePort::tcp("short", Port::Short.service(), Port::Short.target()),
        ServicePort::tcp("long", Port::Long.service(), Port::Long.target()),
        ServicePort::udp("datagram", Port::Datagram.service(), Port::Datagram.target()),
    ];
    Service::new("bench", &[vip()], ports)
}

/// The Service that is measured and its slice with one pod.
pub(crate) fn measured(server: &Pod, scene: Scene) -> [Value; 2] {
    let service = service();
    let mut object = service.to_json();
    if scene.is_outside() {
        let policy = if scene == Scene::OutsideLocal { "Local" } else { "Cluster" };
        object["spec"]["type"] = "NodePort".into();
        object["spec"]["externalTrafficPolicy"] = policy.into();
        for (port, which) in [Port::Short, Port::Long, Port::Datagram].into_iter().enumerate() {
            object["spec"]["ports"][port]["nodePort"] = which.node_port().into();
        }
    }
    [object, service.slice(FAMILY, std::slice::from_ref(server)).to_json()]
}

/// The `number`-th Service that is only there, with its slice of two endpoints on another node.
pub(crate) fn filler(number: u16) -> [Value; 2] {
    let service = Service::new(
        &format!("filler-{number}"),
        &[service_cidr(FAMILY).host(1_000 + number)],
        vec![ServicePort::tcp("http", 80, 8080)],
    );
    // Above the pods that exist: 10.244.64.0 and later.
    let first = 64 * 256 + 2 * (number % 24_000);
    let endpoint = |host| Endpoint { node: Some("other".to_owned()), ..Endpoint::at(cluster_cidr(FAMILY).host(host)) };
    let slice = EndpointSlice { endpoints: vec![endpoint(first), endpoint(first + 1)], ..service.slice(FAMILY, &[]) };
    [service.to_json(), slice.to_json()]
}

/// Fillers, so that there are `services` with the one that is measured.
pub(crate) fn fillers(services: u16) -> impl Iterator<Item = [Value; 2]> {
    (1..services).map(filler)
}

/// Addresses on another node that no filler has.
pub(crate) fn elsewhere(number: u16) -> IpAddr {
    cluster_cidr(FAMILY).host(63 * 256 + number)
}
