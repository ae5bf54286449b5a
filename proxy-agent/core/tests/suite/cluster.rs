//! Small clusters: objects from few words, a node that runs them, and what its tables mean.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::num::NonZeroU16;

use proxy_abi::{BackendEntry, FrontendKey, IpBytes, MacBytes, PrefixKey};
use proxy_core::event::{LinkPath, NetDevice, Node, PodLink};
use proxy_core::name::ObjectName;
use proxy_core::service::{Endpoint, EndpointPort, EndpointSlice, Protocol, Service, ServicePort};
use proxy_core::tables::Tables;

pub(crate) fn name(name: &str) -> ObjectName {
    ObjectName::new("default", name)
}

pub(crate) fn ip(text: &str) -> IpAddr {
    text.parse().expect("an address")
}

pub(crate) fn number(port: u16) -> NonZeroU16 {
    NonZeroU16::new(port).expect("not 0")
}

pub(crate) fn port(name: &str, protocol: Protocol, port: u16) -> ServicePort {
    ServicePort { name: name.into(), protocol, port: number(port), node_port: None }
}

pub(crate) fn service(n: &str, ips: &[&str], ports: &[ServicePort]) -> Service {
    Service {
        name: name(n),
        cluster_ips: ips.iter().map(|text| ip(text)).collect(),
        ports: ports.to_vec(),
        affinity_seconds: None,
        external_ips: Vec::new(),
        load_balancer_ips: Vec::new(),
        source_ranges: Vec::new(),
        internal_local: false,
        external_local: false,
        health_check_node_port: None,
    }
}

/// A Service with one unnamed TCP port 80.
pub(crate) fn web(n: &str, address: &str) -> Service {
    service(n, &[address], &[port("", Protocol::Tcp, 80)])
}

/// A slice of `service` with that same name, all its endpoints ready, target port 8080 of the unnamed TCP port.
pub(crate) fn web_slice(service: &str, addresses: &[&str]) -> EndpointSlice {
    slice(service, service, &[("", Protocol::Tcp, 8080)], addresses.iter().map(|a| ready(a)).collect())
}

pub(crate) fn slice(
    n: &str,
    service: &str,
    ports: &[(&str, Protocol, u16)],
    endpoints: Vec<Endpoint>,
) -> EndpointSlice {
    let ports = ports.iter().map(|(name, protocol, port)| EndpointPort {
        name: (*name).into(),
        protocol: *protocol,
        port: number(*port),
    });
    EndpointSlice { name: name(n), service: name(service), ports: ports.collect(), endpoints, triggered: None }
}

pub(crate) fn ready(address: &str) -> Endpoint {
    Endpoint {
        address: ip(address),
        ready: true,
        serving: true,
        terminating: false,
        node: None,
        for_zones: Vec::new(),
        for_nodes: Vec::new(),
    }
}

pub(crate) fn terminating(address: &str) -> Endpoint {
    Endpoint { ready: false, terminating: true, ..ready(address) }
}

pub(crate) fn unready(address: &str) -> Endpoint {
    Endpoint { ready: false, serving: false, ..ready(address) }
}

pub(crate) fn node() -> Node {
    Node { name: "node-a".into(), addresses: vec![ip("192.168.0.1"), ip("fd00:99::1")], ..Node::default() }
}

pub(crate) fn link(ifindex: u32, addresses: &[&str]) -> PodLink {
    let low = u8::try_from(ifindex).expect("a small index");
    PodLink {
        ifindex,
        name: format!("veth{ifindex}").into(),
        pod_mac: MacBytes([2, 0, 0, 0, 0, low]),
        gateway_mac: MacBytes([2, 0, 0, 0, 1, 0]),
        bridge: 3,
        addresses: addresses.iter().map(|text| ip(text)).collect(),
        gateways: vec![ip("10.244.0.1"), ip("fd00:244::1")],
        path: LinkPath::Redirect,
        mtu: 0,
        pod: None,
    }
}

/// An uplink with these addresses.
pub(crate) fn device(ifindex: u32, addresses: &[&str]) -> NetDevice {
    let low = u8::try_from(ifindex).expect("a small index");
    NetDevice {
        ifindex,
        name: format!("eth{ifindex}").into(),
        mac: MacBytes([2, 0, 0, 0, 2, low]),
        mtu: 1500,
        addresses: addresses.iter().map(|text| ip(text)).collect(),
        attach: true,
        pod_bridge: false,
    }
}

/// Address, port and protocol of a backend, with its flags.
pub(crate) type BackendMeaning = (IpAddr, u16, u8, u32);

/// What tables mean, apart from numbers.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Meaning {
    pub(crate) services: BTreeSet<String>,
    pub(crate) backends: BTreeSet<(String, BackendMeaning)>,
    /// Frontend → owner, flags and selected backends; the owner of an address mark is empty.
    pub(crate) frontends: BTreeMap<FrontendKey, (String, u32, Vec<BackendMeaning>)>,
    pub(crate) devices: BTreeMap<u32, proxy_abi::DeviceEntry>,
    pub(crate) local_pods: BTreeMap<IpBytes, proxy_abi::LocalPodEntry>,
    /// Scope, or owner, and range.
    pub(crate) prefixes: BTreeSet<(String, IpBytes, u32)>,
}

/// Panics when a frontend leads to something that is not there.
pub(crate) fn meaning(tables: &Tables) -> Meaning {
    let service = |id: u32| match id {
        0 => String::new(),
        id => tables.services.get(&id).expect("the service is there").name.as_str().to_owned(),
    };
    let backend = |entry: &BackendEntry| (IpAddr::from(entry.ip), entry.port.get(), entry.proto.0, entry.flags);
    let frontends = tables.frontends.iter().map(|(key, entry)| {
        let slots = entry.first..entry.first + entry.count;
        let mut backends: Vec<_> = slots
            .map(|slot| {
                let id = tables.slots.get(&slot).expect("the slot is written");
                let found = tables.backends.get(id).expect("the backend is there");
                assert_eq!(found.service, entry.service, "a frontend leads to a stranger's backend");
                backend(found)
            })
            .collect();
        backends.sort_unstable();
        (*key, (service(entry.service), entry.flags, backends))
    });
    let prefixes = tables.prefixes.keys().map(|key| match key.scope {
        PrefixKey::SERVICE_CIDR | PrefixKey::LOCAL_SOURCE => (format!("{:x}", key.scope), key.ip, key.length),
        id => (service(id), key.ip, key.length),
    });
    Meaning {
        services: tables.services.keys().map(|id| service(*id)).collect(),
        backends: tables.backends.values().map(|entry| (service(entry.service), backend(entry))).collect(),
        frontends: frontends.collect(),
        devices: tables.devices.clone(),
        local_pods: tables.local_pods.clone(),
        prefixes: prefixes.collect(),
    }
}

/// What settled tables mean. Panics when a thing has two numbers: it may, while operations fail, but not in the end.
pub(crate) fn settled_meaning(tables: &Tables) -> Meaning {
    let meaning = meaning(tables);
    assert_eq!(meaning.services.len(), tables.services.len(), "two ids for one service port");
    assert_eq!(meaning.backends.len(), tables.backends.len(), "two ids for one backend");
    let selected: usize = meaning.frontends.values().map(|(_, _, backends)| backends.len()).sum();
    assert_eq!(selected, tables.slots.len(), "slots that no frontend leads to");
    meaning
}
