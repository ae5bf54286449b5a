//! Who is measured: each on a node of its own, all at once, so that rounds can be interleaved.

use std::fmt;
use std::net::SocketAddr;
use std::path::Path;

use anyhow::{Context as _, Result};
use proxy_tests::traffic::{Serving, TcpServer, UdpServer, tcp_exchange};
use proxy_tests::{Agent, AgentOptions, Cluster, Deadline, Manifests, NodeSpec, Pod};

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

/// A running contender. Fields go in order: proxies before the cluster they run in.
#[derive(Debug)]
pub(crate) struct Site {
    pub(crate) contender: Contender,
    _agent: Option<Agent>,
    _kube_proxy: Option<KubeProxy>,
    servers: (TcpServer, TcpServer, UdpServer),
    client: Pod,
    server: Pod,
    _folder: Option<Manifests>,
    _cluster: Cluster,
}

impl Site {
    /// Builds the node, starts the proxy with so many Services, and waits until the Service answers.
    pub(crate) fn build(contender: Contender, services: u16, kube_proxy: Option<&Path>) -> Result<Self> {
        let spec = NodeSpec::new("node1").br_netfilter(contender.br_netfilter).pods(["client", "server"]);
        let cluster = Cluster::builder().node(spec).build()?;
        let (client, server) = (cluster.pod("client")?, cluster.pod("server")?);
        let node = cluster.node("node1")?;
        let everywhere = |port: Port| SocketAddr::from(([0_u16; 8], port.target()));
        let servers = (
            TcpServer::start_on(server.netns(), "short", everywhere(Port::Short), Serving::Inline(2))?,
            TcpServer::start_on(server.netns(), "long", everywhere(Port::Long), Serving::Threads)?,
            UdpServer::start(server.netns(), "datagram", Port::Datagram.target())?,
        );
        let objects: Vec<_> = [objects::measured(&server)].into_iter().chain(objects::fillers(services)).collect();
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
            client,
            server,
            _folder: folder,
            _cluster: cluster,
        };
        // Large rule sets become effective some time after the first health check.
        let answers = || tcp_exchange(site.client.netns(), site.target(Port::Long), 64, 64).is_ok();
        Deadline::secs(120).until(&format!("{contender}: the Service answers"), answers)?;
        Ok(site)
    }

    /// The client's pod.
    pub(crate) fn client(&self) -> &Pod {
        &self.client
    }

    /// Where the client sends to.
    pub(crate) fn target(&self, port: Port) -> SocketAddr {
        match self.contender.way {
            Way::Plain => SocketAddr::new(self.server.ip(FAMILY), port.target()),
            Way::Ours | Way::KubeProxy(_) => objects::at_service(port),
        }
    }

    /// Operations that the servers have seen: TCP connections and datagrams.
    pub(crate) fn served(&self) -> u64 {
        self.servers.0.accepted() + self.servers.1.accepted() + self.servers.2.answered()
    }
}
