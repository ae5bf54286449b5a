//! Who is measured: each on a node of its own, all at once, so that rounds can be interleaved.

use std::fmt;
use std::net::{IpAddr, SocketAddr};
use std::path::Path;

use anyhow::{Context as _, Result};
use proxy_tests::traffic::{Serving, TcpServer, UdpServer, tcp_exchange};
use proxy_tests::{Agent, AgentOptions, Cluster, Deadline, Manifests, Netns, Node, NodeSpec, Pod};

use crate::kube_proxy::{KubeProxy, Mode};
use crate::objects::{self, FAMILY, Port};

/// How packets get from pod to pod.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Way {
    /// Straight to the pod's address over the bridge; no Services at all.
    Plain,
    /// To the ClusterIP, by our programs.
    Ours,
    /// To the ClusterIP, by kube-proxy.
    KubeProxy(Mode),
}

/// One of those who are compared.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Contender {
    pub(crate) way: Way,
    pub(crate) br_netfilter: bool,
}

/// All of them. kube-proxy needs br_netfilter for pods of one bridge.
pub(crate) const ALL: [Contender; 6] = [
    PLAIN,
    OURS,
    Contender { way: Way::Plain, br_netfilter: true },
    Contender { way: Way::Ours, br_netfilter: true },
    NFTABLES,
    Contender { way: Way::KubeProxy(Mode::Iptables), br_netfilter: true },
];

/// What the budgets are about.
pub(crate) const PLAIN: Contender = Contender { way: Way::Plain, br_netfilter: false };
pub(crate) const OURS: Contender = Contender { way: Way::Ours, br_netfilter: false };
pub(crate) const NFTABLES: Contender = Contender { way: Way::KubeProxy(Mode::Nftables), br_netfilter: true };

impl fmt::Display for Contender {
    /// `plain/0`: the digit is `br_netfilter`.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.way {
            Way::Plain => f.write_str("plain"),
            Way::Ours => f.write_str("ClusterIP"),
            Way::KubeProxy(mode) => write!(f, "kube-proxy {mode}"),
        }?;
        write!(f, "/{}", u8::from(self.br_netfilter))
    }
}

/// Where the client and the server are, and by which address the client comes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Scene {
    /// Two pods of one bridge, by the ClusterIP.
    SameNode,
    /// Pods of two nodes, by the ClusterIP.
    CrossNode,
    /// A host that is no node, by a NodePort with `externalTrafficPolicy: Local`.
    OutsideLocal,
    /// The same with `Cluster`: the source becomes the node's.
    OutsideCluster,
    /// The same to a pod of another node than the one that was asked.
    OutsideRemote,
}

impl Scene {
    /// Those beside [`Scene::SameNode`].
    pub(crate) const OTHERS: [Self; 4] =
        [Self::CrossNode, Self::OutsideLocal, Self::OutsideCluster, Self::OutsideRemote];

    /// For a heading.
    pub(crate) const fn title(self) -> &'static str {
        match self {
            Self::SameNode => "same node, ClusterIP",
            Self::CrossNode => "cross-node, ClusterIP",
            Self::OutsideLocal => "from outside, NodePort, policy Local",
            Self::OutsideCluster => "from outside, NodePort, policy Cluster, pod of this node",
            Self::OutsideRemote => "from outside, NodePort, policy Cluster, pod of another node",
        }
    }

    /// Does the client come by a NodePort?
    pub(crate) const fn is_outside(self) -> bool {
        matches!(self, Self::OutsideLocal | Self::OutsideCluster | Self::OutsideRemote)
    }

    const fn server_node(self) -> &'static str {
        match self {
            Self::CrossNode | Self::OutsideRemote => "node2",
            Self::SameNode | Self::OutsideLocal | Self::OutsideCluster => "node1",
        }
    }
}

/// A running contender. Fields go in order: proxies before the cluster they run in.
#[derive(Debug)]
pub(crate) struct Site {
    pub(crate) contender: Contender,
    _agent: Option<Agent>,
    _kube_proxy: Option<KubeProxy>,
    servers: (TcpServer, TcpServer, UdpServer),
    scene: Scene,
    client: Pod,
    server: Pod,
    node_ip: IpAddr,
    _folder: Option<Manifests>,
    cluster: Cluster,
}

impl Site {
    /// Builds the node, starts the proxy with so many Services, and waits until the Service answers.
    pub(crate) fn build(contender: Contender, scene: Scene, services: u16, kube_proxy: Option<&Path>) -> Result<Self> {
        let node = |name: &str| NodeSpec::new(name).br_netfilter(contender.br_netfilter);
        let here = scene.server_node() == "node1";
        let mut builder =
            Cluster::builder().node(node("node1").pods(["client"].into_iter().chain(here.then_some("server"))));
        if !here {
            builder = builder.node(node("node2").pods(["server"]));
        }
        let cluster = builder.build()?;
        let (client, server) = (cluster.pod("client")?, cluster.pod("server")?);
        let node = cluster.node("node1")?;
        let everywhere = |port: Port| SocketAddr::from(([0_u16; 8], port.target()));
        let servers = (
            TcpServer::start_on(server.netns(), "short", everywhere(Port::Short), Serving::Inline(2))?,
            TcpServer::start_on(server.netns(), "long", everywhere(Port::Long), Serving::Threads)?,
            UdpServer::start(server.netns(), "datagram", Port::Datagram.target())?,
        );
        let objects: Vec<_> =
            [objects::measured(&server, scene)].into_iter().chain(objects::fillers(services)).collect();
        let (mut agent, mut proxy, mut folder) = (None, None, None);
        match contender.way {
            Way::Plain => {}
            Way::Ours => {
                let manifests = Manifests::open(&cluster.manifest_dir())?;
                manifests.write(&node)?;
                manifests.write_all("services.yaml", &objects.concat())?;
                agent = Some(Agent::start(node, AgentOptions::dir(manifests.dir()))?);
                folder = Some(manifests);
            }
            Way::KubeProxy(mode) => {
                let binary = kube_proxy.context("no kube-proxy to compare with")?;
                proxy = Some(KubeProxy::start(binary, node, mode, &objects)?);
            }
        }
        let site = Self {
            contender,
            _agent: agent,
            _kube_proxy: proxy,
            servers,
            scene,
            client,
            server,
            node_ip: node.ip(FAMILY),
            _folder: folder,
            cluster,
        };
        // Large rule sets become effective some time after the first health check.
        let answers = || tcp_exchange(site.client(), site.target(Port::Long), 64, 64).is_ok();
        Deadline::secs(120).until(&format!("{contender}: the Service answers"), answers)?;
        Ok(site)
    }

    /// Which way its clients take.
    pub(crate) const fn title(&self) -> &'static str {
        self.scene.title()
    }

    /// The node whose programs are measured.
    pub(crate) fn node(&self) -> Result<&Node> {
        Ok(self.cluster.node("node1")?)
    }

    /// The client's pod, and the server's.
    pub(crate) const fn pods(&self) -> (&Pod, &Pod) {
        (&self.client, &self.server)
    }

    /// Where the client is.
    pub(crate) fn client(&self) -> &Netns {
        if self.scene.is_outside() { self.cluster.outside() } else { self.client.netns() }
    }

    /// Where the client sends to.
    pub(crate) fn target(&self, port: Port) -> SocketAddr {
        match self.contender.way {
            Way::Plain => SocketAddr::new(self.server.ip(FAMILY), port.target()),
            Way::Ours | Way::KubeProxy(_) if self.scene.is_outside() => SocketAddr::new(self.node_ip, port.node_port()),
            Way::Ours | Way::KubeProxy(_) => objects::at_service(port),
        }
    }

    /// Operations that the servers have seen: TCP connections and datagrams.
    pub(crate) fn served(&self) -> u64 {
        self.servers.0.accepted() + self.servers.1.accepted() + self.servers.2.answered()
    }
}
