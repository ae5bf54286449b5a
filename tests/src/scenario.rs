//! A cluster at work: the real agent on every node, Services in the folder that they watch, servers in the pods.
//!
//! ```text
//!   Scenario ── Cluster     nodes and pods
//!            ── Manifests   Node, Service and EndpointSlice objects
//!            ── Agent       one per node
//!            ── Serving     a TCP and a UDP server under the name of each pod and each node
//!   views      what the agent's command line says, as values
//!   footprint  what a node is made of, to compare before and after
//!   matrix     who asks whom through a Service, and what every node must have counted
//! ```

pub mod footprint;
pub mod matrix;
pub mod views;

use std::net::{IpAddr, SocketAddr};
use std::time::{Duration, Instant};

use crate::address::{Family, service_cidr};
use crate::agent::{Agent, AgentOptions};
use crate::cluster::{Cluster, ClusterSpec};
use crate::deadline::Deadline;
use crate::error::{Error, Result};
use crate::manifests::{Endpoint, EndpointSlice, Manifests, Service, ServicePort};
use crate::netns::Netns;
use crate::node::Node;
use crate::traffic::tcp_server::Serving;
use crate::traffic::{TcpServer, UdpServer};
use views::{BackendRow, Counters, DeviceRow, FlowRow, ServiceRow, Status, rows};

/// Port that every server listens on.
pub const TARGET_PORT: u16 = 8080;
/// Port of every Service.
pub const SERVICE_PORT: u16 = 80;
/// How long what was written may take until it is in force, on a machine that is busy with something else.
const IN_FORCE_SECS: u64 = 60;
/// Looks at counters that must be equal, and how long it is from the first of them to the last at least.
const STILL: (usize, Duration) = (3, Duration::from_millis(250));
/// Name of the host that is no node.
pub const OUTSIDE: &str = "outside";

/// A running cluster with agents. Dropping it ends the servers, then the agents, then the cluster.
#[derive(Debug)]
pub struct Scenario {
    // Dropped in this order: servers and agents need their namespaces.
    servers: Vec<Servers>,
    agents: Vec<Agent>,
    manifests: Manifests,
    cluster: Cluster,
}

/// Who answers for one name.
#[derive(Debug)]
struct Servers {
    name: String,
    tcp: Vec<TcpServer>,
    udp: Vec<UdpServer>,
}

impl Scenario {
    /// Builds the cluster and writes its Node objects; no agent runs yet.
    pub fn build(spec: &ClusterSpec) -> Result<Self> {
        let cluster = spec.build()?;
        let manifests = Manifests::open(&cluster.manifest_dir())?;
        for node in cluster.nodes() {
            manifests.write(&node)?;
        }
        Ok(Self { servers: Vec::new(), agents: Vec::new(), manifests, cluster })
    }

    /// The cluster.
    pub fn cluster(&self) -> &Cluster {
        &self.cluster
    }

    /// The objects.
    pub fn manifests(&self) -> &Manifests {
        &self.manifests
    }

    /// Options of an agent that reads this scenario's objects.
    pub fn options(&self) -> AgentOptions {
        AgentOptions::dir(self.manifests.dir())
    }

    /// Starts an agent with these further arguments on every node, and waits until each is in sync and has found all
    /// pods of its node.
    pub fn start_agents(&mut self, args: &[&str]) -> Result<()> {
        for node in self.cluster.nodes() {
            let options = AgentOptions { ready_within: Duration::from_mins(1), ..self.options() };
            self.agents.push(Agent::start(node, options.args(args.iter().copied()))?);
        }
        for index in 0..self.agents.len() {
            self.wait_pods(index)?;
        }
        Ok(())
    }

    /// Waits until the agent of this node knows every pod of it, with both addresses.
    pub fn wait_pods(&self, node: usize) -> Result<()> {
        let pods = self.cluster.nodes()[node].pods();
        Deadline::secs(IN_FORCE_SECS).poll(&format!("node {node} knows its {} pods", pods.len()), || {
            let devices = self.devices(node)?;
            let known = |pod: &crate::Pod| {
                devices.iter().any(|device| {
                    device.name.as_deref() == Some(&pod.host_veth().name)
                        && device.ipv4 == Some(pod.ip4())
                        && device.ipv6 == Some(pod.ip6())
                })
            };
            Ok(pods.iter().all(known).then_some(()))
        })
    }

    /// The agent of a node, by the node's position.
    pub fn agent(&self, node: usize) -> &Agent {
        &self.agents[node]
    }

    /// The agent of a node, to stop or restart it.
    pub fn agent_mut(&mut self, node: usize) -> &mut Agent {
        &mut self.agents[node]
    }

    /// Starts a TCP and a UDP server in a pod, under the pod's name.
    pub fn serve_pod(&mut self, pod: &str) -> Result<()> {
        let netns = self.cluster.pod(pod)?.netns().clone();
        let tcp = vec![TcpServer::start(&netns, pod, TARGET_PORT)?];
        let udp = vec![UdpServer::start(&netns, pod, TARGET_PORT)?];
        self.servers.push(Servers { name: pod.to_owned(), tcp, udp });
        Ok(())
    }

    /// Starts a TCP and a UDP server on a node's own addresses, under the node's name.
    pub fn serve_node(&mut self, node: &str) -> Result<()> {
        let node = self.cluster.node(node)?;
        let addresses = Family::BOTH.map(|family| SocketAddr::new(node.ip(family), TARGET_PORT));
        let tcp = addresses.map(|at| TcpServer::start_on(node.netns(), node.name(), at, Serving::Threads));
        let udp = addresses.map(|at| UdpServer::start_on(node.netns(), node.name(), at));
        let servers = Servers {
            name: node.name().to_owned(),
            tcp: tcp.into_iter().collect::<Result<_>>()?,
            udp: udp.into_iter().collect::<Result<_>>()?,
        };
        self.servers.push(servers);
        Ok(())
    }

    /// Ends the servers of this name.
    pub fn stop_serving(&mut self, name: &str) {
        self.servers.retain(|servers| servers.name != name);
    }

    /// Connections that are open at the servers of this name.
    pub fn open_connections(&self, name: &str) -> usize {
        self.servers.iter().filter(|s| s.name == name).flat_map(|s| &s.tcp).map(TcpServer::open).sum()
    }

    /// Datagrams that the servers of this name answered.
    pub fn answered(&self, name: &str) -> u64 {
        self.servers.iter().filter(|s| s.name == name).flat_map(|s| &s.udp).map(UdpServer::answered).sum()
    }

    /// A dual-stack Service on TCP and UDP with these names of pods and nodes behind it, written to the folder. `host`
    /// is the number of its addresses in the service networks.
    pub fn publish(&self, name: &str, host: u16, behind: &[&str]) -> Result<Service> {
        let service = service(name, host);
        self.publish_service(&service, behind)?;
        Ok(service)
    }

    /// Writes a Service with these names of pods and nodes behind it.
    pub fn publish_service(&self, service: &Service, behind: &[&str]) -> Result<()> {
        self.set_endpoints(service, behind)?;
        self.manifests.write(service)
    }

    /// A slice of a Service with these names of pods and nodes.
    pub fn slice(&self, service: &Service, family: Family, behind: &[&str]) -> Result<EndpointSlice> {
        let mut slice = service.slice(family, &[]);
        slice.endpoints = behind
            .iter()
            .map(|name| match self.cluster.node(name) {
                Ok(node) => Ok(Endpoint::on(node, family)),
                Err(_) => Ok(Endpoint::of(&self.cluster.pod(name)?, family)),
            })
            .collect::<Result<_>>()?;
        Ok(slice)
    }

    /// Rewrites both slices of a Service.
    pub fn set_endpoints(&self, service: &Service, behind: &[&str]) -> Result<()> {
        Family::BOTH.iter().try_for_each(|&family| self.manifests.write(&self.slice(service, family, behind)?))
    }

    /// Waits until a node's maps hold exactly so many endpoints for a Service: for each family, protocol and port that
    /// `service list` shows. `None` waits until it is gone.
    pub fn wait_endpoints(&self, node: usize, name: &str, count: Option<u64>) -> Result<()> {
        let what = format!("node {node} has {count:?} endpoints of {name}");
        Deadline::secs(IN_FORCE_SECS).poll(&what, || {
            let mine = of(self.services(node)?, name);
            let there =
                count.map_or(mine.is_empty(), |count| !mine.is_empty() && mine.iter().all(|row| row.selected == count));
            Ok(there.then_some(()))
        })
    }

    /// Waits until the log of a node's agent has a line with all of these words; gives the line.
    pub fn wait_logged(&self, node: usize, words: &[&str]) -> Result<String> {
        let found = Deadline::secs(IN_FORCE_SECS).poll("logged", || {
            let log = self.agents[node].log_text();
            Ok(log.lines().find(|line| words.iter().all(|word| line.contains(word))).map(str::to_owned))
        });
        found.map_err(|_| Error::mismatch("agent's log", format!("{words:?}"), self.agents[node].log_text()))
    }

    /// `status` of a node.
    pub fn status(&self, node: usize) -> Result<Status> {
        views::parse("status", &self.agents[node].cli(&["status", "-o", "json"])?)
    }

    /// Packet counters of a node.
    pub fn counters(&self, node: usize) -> Result<Counters> {
        Ok(self.status(node)?.counters())
    }

    /// Packet counters of all nodes, once they stand still: what a connection that has ended still sends is in them.
    pub fn settled_counters(&self) -> Result<Vec<Counters>> {
        let all = || (0..self.agents.len()).map(|node| Ok(self.counters(node)?.rewrites())).collect::<Result<Vec<_>>>();
        let (looks, apart) = STILL;
        let (mut last, mut since, mut equal) = (all()?, Instant::now(), 1);
        Deadline::secs(30).poll("counters stand still", || {
            let now = all()?;
            if now == last {
                equal += 1;
            } else {
                (last, since, equal) = (now, Instant::now(), 1);
            }
            Ok((equal >= looks && since.elapsed() >= apart).then(|| last.clone()))
        })
    }

    /// `service list` of a node.
    pub fn services(&self, node: usize) -> Result<Vec<ServiceRow>> {
        rows(&self.agents[node], "service")
    }

    /// `backend list` of a node.
    pub fn backends(&self, node: usize) -> Result<Vec<BackendRow>> {
        rows(&self.agents[node], "backend")
    }

    /// `flow list` of a node.
    pub fn flows(&self, node: usize) -> Result<Vec<FlowRow>> {
        rows(&self.agents[node], "flow")
    }

    /// `device list` of a node.
    pub fn devices(&self, node: usize) -> Result<Vec<DeviceRow>> {
        rows(&self.agents[node], "device")
    }

    /// The node of that position.
    pub fn node(&self, node: usize) -> &Node {
        &self.cluster.nodes()[node]
    }

    /// The namespace of a pod or node, or of the host that is no node ([`OUTSIDE`]).
    pub fn netns(&self, name: &str) -> Result<Netns> {
        if name == OUTSIDE {
            return Ok(self.cluster.outside().clone());
        }
        match self.cluster.node(name) {
            Ok(node) => Ok(node.netns().clone()),
            Err(_) => Ok(self.cluster.pod(name)?.netns().clone()),
        }
    }

    /// The address of a pod, a node or the host that is no node.
    pub fn ip(&self, name: &str, family: Family) -> Result<IpAddr> {
        if name == OUTSIDE {
            return Ok(self.cluster.outside_ip(family));
        }
        match self.cluster.node(name) {
            Ok(node) => Ok(node.ip(family)),
            Err(_) => Ok(self.cluster.pod(name)?.ip(family)),
        }
    }
}

/// A dual-stack Service on TCP and UDP with the addresses of this number.
pub fn service(name: &str, host: u16) -> Service {
    let ips = Family::BOTH.map(|family| vip(family, host));
    let ports =
        vec![ServicePort::tcp("tcp", SERVICE_PORT, TARGET_PORT), ServicePort::udp("udp", SERVICE_PORT, TARGET_PORT)];
    Service::new(name, &ips, ports)
}

/// The service address of this number.
pub fn vip(family: Family, host: u16) -> IpAddr {
    service_cidr(family).host(host)
}

/// The rows of one Service, named without its namespace and port.
fn of(rows: Vec<ServiceRow>, name: &str) -> Vec<ServiceRow> {
    let mine = |row: &ServiceRow| {
        row.service
            .as_deref()
            .and_then(|full| full.strip_prefix("default/")?.strip_prefix(name))
            .is_some_and(|rest| rest.is_empty() || rest.starts_with(':'))
    };
    rows.into_iter().filter(mine).collect()
}
