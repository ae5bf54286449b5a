//! What the demo plays on: two nodes, their pods, servers in the pods, an agent on each node.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::path::Path;

use anyhow::{Context as _, Result};
use proxy_tests::traffic::{TcpServer, UdpServer};
use proxy_tests::{Agent, AgentOptions, Cluster, Family, Manifests, Netns, Node, NodeSpec, Pod};

use crate::controller::{self, Example};
use crate::hooks::Hooks;

/// The nodes' names.
pub(crate) const NODES: [&str; 2] = ["node1", "node2"];

/// Everything that runs. Agents go before the cluster they run in.
#[derive(Debug)]
pub(crate) struct Stage {
    pub(crate) agents: BTreeMap<&'static str, Agent>,
    servers: Vec<(String, Server)>,
    pub(crate) folder: Manifests,
    pub(crate) services: BTreeMap<String, Example>,
    pub(crate) cluster: Cluster,
}

/// Kept for as long as its pod serves.
#[derive(Debug)]
#[expect(dead_code, reason = "a server serves until it is dropped; nothing else is asked of it")]
enum Server {
    Tcp(TcpServer),
    Udp(UdpServer),
}

impl Stage {
    /// Nodes and pods with their servers, and the objects in the folder. No agent runs yet.
    pub(crate) fn build(examples: &Path) -> Result<Self> {
        let examples = controller::read(examples)?;
        let cluster = Cluster::builder()
            .node(NodeSpec::new(NODES[0]).pods(["client", "web-1", "dns-1"]))
            .node(NodeSpec::new(NODES[1]).pods(["web-2", "dns-2", "guest"]))
            .build()?;
        let folder = Manifests::open(&cluster.manifest_dir())?;
        let services = examples.into_iter().map(|example| (example.name().to_owned(), example)).collect();
        let mut stage = Self { agents: BTreeMap::new(), servers: Vec::new(), folder, services, cluster };
        for pod in stage.cluster.pods() {
            stage.serve(&pod)?;
        }
        for node in stage.cluster.nodes() {
            stage.folder.write(&node)?;
        }
        for service in stage.services.values() {
            service.apply(&stage.folder)?;
            service.apply_slices(&stage.folder, &service.selected(&stage.cluster.pods()))?;
        }
        Ok(stage)
    }

    /// Starts in a pod what the Services that select it expect there.
    pub(crate) fn serve(&mut self, pod: &Pod) -> Result<()> {
        for service in self.services.values().filter(|s| !s.selected(std::slice::from_ref(pod)).is_empty()) {
            for port in service.ports()? {
                let server = match port.protocol.as_str() {
                    "UDP" => Server::Udp(UdpServer::start(pod.netns(), pod.name(), port.target)?),
                    _ => Server::Tcp(TcpServer::start(pod.netns(), pod.name(), port.target)?),
                };
                self.servers.push((pod.name().to_owned(), server));
            }
        }
        Ok(())
    }

    /// Starts an agent on every node, over the one folder of objects.
    pub(crate) fn start_agents(&mut self) -> Result<()> {
        for name in NODES {
            let options = AgentOptions::dir(self.folder.dir());
            self.agents.insert(name, Agent::start(self.cluster.node(name)?, options)?);
        }
        Ok(())
    }

    /// The agent of a node.
    pub(crate) fn agent(&self, node: &str) -> Result<&Agent> {
        self.agents.get(node).with_context(|| format!("no agent on {node}"))
    }

    /// The agent of a node, to stop or start it.
    pub(crate) fn agent_mut(&mut self, node: &str) -> Result<&mut Agent> {
        self.agents.get_mut(node).with_context(|| format!("no agent on {node}"))
    }

    /// A Service.
    pub(crate) fn service(&self, name: &str) -> Result<&Example> {
        self.services.get(name).with_context(|| format!("the examples have no Service {name}"))
    }

    /// The counters of both nodes.
    pub(crate) fn hooks(&self) -> Result<Hooks> {
        Hooks::open(self.cluster.nodes())
    }

    /// A node.
    pub(crate) fn node(&self, name: &str) -> Result<&Node> {
        Ok(self.cluster.node(name)?)
    }

    /// The namespace of a pod or node.
    pub(crate) fn netns(&self, name: &str) -> Result<Netns> {
        let pod = self.cluster.pod(name).map(|pod| pod.netns().clone());
        pod.or_else(|_| Ok(self.cluster.node(name)?.netns().clone()))
    }

    /// Address of a pod.
    pub(crate) fn pod_ip(&self, name: &str, family: Family) -> Result<IpAddr> {
        Ok(self.cluster.pod(name)?.ip(family))
    }
}
