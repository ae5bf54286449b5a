//! Who has which address here: from the pinned maps and the CNI's records. No server is asked, and the agent need not run;
//! only for pods of other nodes it is asked, if it does.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, SocketAddr};
use std::path::Path;

use proxy_abi::{DeviceEntry, FrontendKey, IpBytes, Proto};
use serde_json::Value;

use super::selection::{End, Who};
use crate::ask::{Answer, PodInfo, Question, ask};
use crate::dataplane::pins::Maps;

/// A pod: of this node, or one that the agent has told of.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct PodName {
    /// `namespace/name`; `None` where the CNI keeps no records.
    pub name: Option<String>,
    /// Host-side veth; 0 when the agent does not know it.
    pub ifindex: u32,
    /// Addresses.
    pub addresses: BTreeSet<IpAddr>,
    /// It is on another node.
    pub elsewhere: bool,
}

/// A backend of a Service.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BackendName {
    /// Address and port.
    pub address: SocketAddr,
    /// Service port.
    pub service: u32,
}

/// What is known of addresses, Services and interfaces.
#[derive(Clone, Debug, Default)]
pub struct Names {
    /// `namespace/name:port` by id of the service port.
    pub services: BTreeMap<u32, String>,
    /// Service port by address, port and protocol. The unspecified address stands for all of the node's of its family.
    pub frontends: BTreeMap<(IpAddr, u16, u8), u32>,
    /// Endpoints that the frontends of a service port select, the most of any frontend.
    pub candidates: BTreeMap<u32, u32>,
    /// By id.
    pub backends: BTreeMap<u32, BackendName>,
    /// Pods of this node.
    pub pods: Vec<PodName>,
    /// Addresses of the node itself.
    pub own: BTreeSet<IpAddr>,
    /// Those of them that are on the pods' bridges.
    pub gateways: BTreeSet<IpAddr>,
    /// Interfaces of this namespace.
    pub interfaces: BTreeMap<u32, String>,
    /// Interfaces of this namespace that are pods' veths.
    pub veths: BTreeSet<u32>,
    /// Addresses of the pods with the labels that a selection names, by those: [`label_text`].
    pub labelled: BTreeMap<String, BTreeSet<IpAddr>>,
    /// Indices of `pods` by address.
    by_address: BTreeMap<IpAddr, usize>,
}

/// `app=web,tier=front`.
pub fn label_text(labels: &[(String, String)]) -> String {
    labels.iter().map(|(key, value)| format!("{key}={value}")).collect::<Vec<_>>().join(",")
}

/// What an address belongs to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Owner {
    /// A pod of this node: `namespace/name`, or the name of its veth in brackets.
    Pod(String),
    /// A Service: `namespace/name:port`.
    Service(String),
    /// The node.
    Node,
    /// A backend on another node, by its Service.
    Backend(String),
    /// Nobody that is known here.
    Other,
}

fn address(ip: IpBytes) -> Option<IpAddr> {
    (ip != IpBytes::UNSPECIFIED).then(|| ip.into())
}

impl Names {
    /// From what this namespace shows, the pinned maps where there are any, and the CNI's records.
    ///
    /// # Errors
    /// When a map cannot be read.
    pub fn read(maps: Option<&Maps>, cni: &Path) -> Result<Self, crate::dataplane::Error> {
        let mut names = Self::default();
        for address in nix::ifaddrs::getifaddrs().into_iter().flatten() {
            let ip = address.address.as_ref().and_then(|address| {
                let v4 = address.as_sockaddr_in().map(|a| IpAddr::V4(a.ip()));
                v4.or_else(|| address.as_sockaddr_in6().map(|a| IpAddr::V6(a.ip())))
            });
            names.own.extend(ip);
        }
        for interface in nix::net::if_::if_nameindex().iter().flat_map(|all| all.iter()) {
            names.interfaces.insert(interface.index(), interface.name().to_string_lossy().into_owned());
        }
        if let Some(maps) = maps {
            names.add_maps(maps)?;
        }
        for file in std::fs::read_dir(cni).into_iter().flatten().flatten() {
            // A record may be half written just now.
            let text = std::fs::read_to_string(file.path()).unwrap_or_default();
            if let Some((name, addresses)) = cni_record(&text) {
                names.add_pod(name, addresses);
            }
        }
        names.index();
        Ok(names)
    }

    fn add_maps(&mut self, maps: &Maps) -> Result<(), crate::dataplane::Error> {
        for (id, entry) in maps.service.read()? {
            self.services.insert(id, entry.name.as_str().to_owned());
        }
        let tables = maps.tables()?;
        for (key, entry) in tables.frontends {
            // Port 0: the mark that says "this address belongs to a Service".
            if key.port.get() != 0 {
                self.frontends.insert((key.ip.into(), key.port.get(), key.proto.0), entry.service);
                let most = self.candidates.entry(entry.service).or_default();
                *most = entry.count.max(*most);
            }
        }
        for (id, entry) in tables.backends {
            let address = SocketAddr::new(entry.ip.into(), entry.port.get());
            self.backends.insert(id, BackendName { address, service: entry.service });
        }
        for (ifindex, entry) in tables.devices {
            if entry.flags & (DeviceEntry::NETDEV | DeviceEntry::PLAIN) == 0 {
                self.veths.insert(ifindex);
                let addresses = [address(entry.ip4), address(entry.ip6)].into_iter().flatten().collect();
                self.gateways.extend([address(entry.gateway_ip4), address(entry.gateway_ip6)].into_iter().flatten());
                self.pods.push(PodName { ifindex, addresses, ..PodName::default() });
            }
        }
        Ok(())
    }

    /// Names a pod by its addresses.
    pub fn add_pod(&mut self, name: String, addresses: BTreeSet<IpAddr>) {
        let known = self.pods.iter_mut().find(|pod| !pod.addresses.is_disjoint(&addresses));
        if let Some(pod) = known {
            pod.name = Some(name);
        } else {
            self.pods.push(PodName { name: Some(name), addresses, ..PodName::default() });
        }
    }

    /// Names a pod that the agent has told of.
    fn add_known(&mut self, pod: PodInfo) {
        let (name, local) = (pod.name.clone(), pod.local);
        self.add_pod(pod.name, pod.ips.into_iter().collect());
        for pod in self.pods.iter_mut().filter(|pod| pod.name.as_ref() == Some(&name)) {
            pod.elsewhere = !local;
        }
    }

    /// Makes pods findable; after the last was added.
    pub fn index(&mut self) {
        self.by_address =
            self.pods.iter().enumerate().flat_map(|(i, pod)| pod.addresses.iter().map(move |ip| (*ip, i))).collect();
    }

    /// Pods of other nodes, and pods by their labels, that are named in words of a selection. The agent knows them where
    /// there are NetworkPolicies; while it does not run, or knows of none, they stay unknown.
    pub fn ask_for(&mut self, pin_root: &Path, words: &[String]) {
        let ends: Vec<End> = words.iter().filter_map(|word| word.parse().ok()).collect();
        let asked = |question: &Question| match ask(pin_root, question) {
            Ok(Answer::Pods { found, .. }) => found.into_iter().filter(|pod| !pod.ips.is_empty()).collect(),
            _ => Vec::new(),
        };
        let unknown = ends.iter().filter_map(|end| match &end.who {
            Who::Pod(name) if !self.pods.iter().any(|pod| pod.name.as_ref() == Some(name)) => Some(name.clone()),
            _ => None,
        });
        let unknown: Vec<String> = unknown.collect();
        if !unknown.is_empty() {
            for pod in asked(&Question::Pods { names: unknown, ips: Vec::new() }) {
                self.add_known(pod);
            }
        }
        for end in ends {
            let Who::Labels(labels) = end.who else { continue };
            let found = asked(&Question::Labelled(labels.clone()));
            let addresses = found.iter().flat_map(|pod| pod.ips.iter().copied()).collect();
            self.labelled.insert(label_text(&labels), addresses);
            for pod in found {
                self.add_known(pod);
            }
        }
        self.index();
    }

    /// The pod that has an address.
    pub fn pod_at(&self, ip: IpAddr) -> Option<&PodName> {
        self.pods.get(*self.by_address.get(&ip)?)
    }

    /// The pod behind a veth.
    pub fn pod_behind(&self, ifindex: u32) -> Option<&PodName> {
        self.pods.iter().find(|pod| pod.ifindex == ifindex && ifindex != 0)
    }

    /// How a pod is called.
    pub fn pod_name(&self, pod: &PodName) -> String {
        let veth = || self.interfaces.get(&pod.ifindex).map(|name| format!("[{name}]"));
        let address = || pod.addresses.first().map(ToString::to_string);
        pod.name.clone().or_else(veth).or_else(address).unwrap_or_default()
    }

    /// The service port that a frontend leads to.
    pub fn frontend(&self, address: SocketAddr, proto: Proto) -> Option<u32> {
        let found = self.frontends.get(&(address.ip(), address.port(), proto.0));
        found.copied().or_else(|| {
            if !self.own.contains(&address.ip()) {
                return None;
            }
            let wildcard = IpAddr::from(FrontendKey::wildcard(address.is_ipv4()));
            self.frontends.get(&(wildcard, address.port(), proto.0)).copied()
        })
    }

    /// Name of a service port; its number where it has gone.
    pub fn service(&self, id: u32) -> String {
        self.services.get(&id).cloned().unwrap_or_else(|| format!("#{id}"))
    }

    /// Who has an address; `port` 0 for none.
    pub fn owner(&self, address: SocketAddr, proto: Proto) -> Owner {
        if let Some(pod) = self.pod_at(address.ip()) {
            return Owner::Pod(self.pod_name(pod));
        }
        if let Some(service) = self.frontend(address, proto) {
            return Owner::Service(self.service(service));
        }
        if self.own.contains(&address.ip()) {
            return Owner::Node;
        }
        let backend = self.backends.values().find(|backend| backend.address == address);
        backend.map_or(Owner::Other, |backend| Owner::Backend(self.service(backend.service)))
    }

    /// Service ports of a Service, and of one port of it where that is named.
    pub fn service_ports(&self, name: &str, port: Option<&str>) -> BTreeSet<u32> {
        let by_number = |port: &str, id: u32| {
            self.frontends.iter().any(|((_, number, _), service)| *service == id && number.to_string() == port)
        };
        let is = |id: u32, found: &str| {
            let (service, found_port) = found.rsplit_once(':').unwrap_or((found, ""));
            service == name && port.is_none_or(|port| found_port == port || by_number(port, id))
        };
        self.services.iter().filter(|(id, found)| is(**id, found)).map(|(id, _)| *id).collect()
    }

    /// Names of pods and Services that look like this one, the nearest first.
    pub fn nearest(&self, kind: &str, name: &str) -> Vec<String> {
        let all: BTreeSet<String> = if kind == "pod" {
            self.pods.iter().filter_map(|pod| pod.name.clone()).collect()
        } else {
            let without_port = |name: &String| name.rsplit_once(':').map_or(name.clone(), |(name, _)| name.to_owned());
            self.services.values().map(without_port).collect()
        };
        let mut near: Vec<(usize, String)> = all.into_iter().map(|found| (distance(&found, name), found)).collect();
        near.sort();
        near.into_iter().take(3).map(|(_, found)| format!("{kind}:{found}")).collect()
    }
}

/// Namespace and name of a pod, with its addresses, from a record of libcni.
fn cni_record(text: &str) -> Option<(String, BTreeSet<IpAddr>)> {
    let record: Value = serde_json::from_str(text).ok()?;
    let arguments = record["cniArgs"].as_array()?;
    let argument = |name: &str| {
        let found = arguments.iter().find(|pair| pair[0] == name)?;
        found[1].as_str().map(str::to_owned)
    };
    let name = format!("{}/{}", argument("K8S_POD_NAMESPACE")?, argument("K8S_POD_NAME")?);
    let addresses = record["result"]["ips"].as_array()?.iter().filter_map(|ip| {
        let (ip, _) = ip["address"].as_str()?.split_once('/')?;
        ip.parse().ok()
    });
    Some((name, addresses.collect()))
}

/// Letters to change, add or leave out (Levenshtein).
fn distance(a: &str, b: &str) -> usize {
    let b: Vec<char> = b.chars().collect();
    let mut row: Vec<usize> = (0..=b.len()).collect();
    for (i, x) in a.chars().enumerate() {
        let mut before = i;
        if let Some(first) = row.first_mut() {
            *first = i + 1;
        }
        for (j, y) in b.iter().enumerate() {
            let (above, left) = (row.get(j + 1).copied().unwrap_or(0), row.get(j).copied().unwrap_or(0));
            let cost = (before + usize::from(x != *y)).min(above + 1).min(left + 1);
            before = above;
            if let Some(cell) = row.get_mut(j + 1) {
                *cell = cost;
            }
        }
    }
    row.last().copied().unwrap_or(0)
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    /// Two pods, one Service with a local and a remote endpoint, a NodePort.
    pub(crate) fn names() -> Names {
        let ip = |text: &str| text.parse::<IpAddr>().expect("an address");
        let mut names = Names {
            services: [(7, "shop/api:http".to_owned())].into(),
            frontends: [((ip("10.96.0.7"), 80, 6), 7), ((ip("fd96::7"), 80, 6), 7), ((ip("0.0.0.0"), 30080, 6), 7)]
                .into(),
            candidates: [(7, 2)].into(),
            backends: [
                (1, BackendName { address: "10.1.0.3:8080".parse().expect("an address"), service: 7 }),
                (2, BackendName { address: "10.2.0.3:8080".parse().expect("an address"), service: 7 }),
            ]
            .into(),
            own: [ip("192.168.0.1"), ip("10.1.0.1")].into(),
            labelled: [
                ("app=web".to_owned(), ["10.1.0.2", "fd01::2", "10.2.0.2"].map(ip).into()),
                ("app=web,tier=back".to_owned(), ["10.1.0.3"].map(ip).into()),
                ("app=db".to_owned(), BTreeSet::new()),
            ]
            .into(),
            interfaces: [(1, "lo".to_owned()), (2, "eth0".to_owned()), (3, "cni0".to_owned())].into(),
            ..Names::default()
        };
        for (ifindex, name, addresses) in
            [(7, "shop/web-0", ["10.1.0.2", "fd01::2"]), (8, "shop/api-0", ["10.1.0.3", "fd01::3"])]
        {
            names.interfaces.insert(ifindex, format!("veth{ifindex}"));
            names.veths.insert(ifindex);
            let addresses = addresses.map(ip).into();
            names.pods.push(PodName { name: Some(name.to_owned()), ifindex, addresses, elsewhere: false });
        }
        names.index();
        names
    }

    #[test]
    fn addresses_have_owners() {
        let names = names();
        let owner = |address: &str| names.owner(address.parse().expect("an address"), Proto::TCP);
        assert_eq!(owner("10.1.0.2:5"), Owner::Pod("shop/web-0".to_owned()));
        assert_eq!(owner("10.96.0.7:80"), Owner::Service("shop/api:http".to_owned()));
        assert_eq!(owner("10.96.0.7:81"), Owner::Other);
        assert_eq!(owner("192.168.0.1:30080"), Owner::Service("shop/api:http".to_owned()));
        assert_eq!(owner("192.168.0.1:22"), Owner::Node);
        assert_eq!(owner("10.2.0.3:8080"), Owner::Backend("shop/api:http".to_owned()));
        assert_eq!(names.service_ports("shop/api", None), [7].into());
        assert_eq!(names.service_ports("shop/api", Some("http")), [7].into());
        assert_eq!(names.service_ports("shop/api", Some("80")), [7].into());
        assert_eq!(names.service_ports("shop/api", Some("81")), [].into());
        assert_eq!(names.nearest("pod", "shop/web-1"), ["pod:shop/web-0", "pod:shop/api-0"]);
        assert_eq!(names.nearest("svc", "shop/app"), ["svc:shop/api"]);
    }

    #[test]
    fn records_of_the_cni_are_read() {
        let record = r#"{"cniArgs":[["K8S_POD_NAMESPACE","a"],["K8S_POD_NAME","b"]],
            "result":{"ips":[{"address":"10.1.0.9/24"},{"address":"fd01::9/64"}]}}"#;
        let addresses = ["10.1.0.9", "fd01::9"].map(|ip| ip.parse().expect("an address")).into();
        assert_eq!(cni_record(record), Some(("a/b".to_owned(), addresses)));
        for text in ["", "{}", r#"{"cniArgs":[],"result":{}}"#, "half a rec"] {
            assert_eq!(cni_record(text), None, "{text}");
        }
    }
}
