//! A pod: a namespace with `eth0` on the node's bridge.

use std::fmt::Write as _;
use std::net::IpAddr;
use std::path::PathBuf;
use std::sync::Arc;

use crate::address::{Family, Mac};
use crate::cluster::PodSpec;
use crate::cni::{self, Attachment};
use crate::error::{Context as _, Error, Result};
use crate::link::wait_carrying;
use crate::netns::Netns;
use crate::node::{BRIDGE, Node};
use crate::underlay::{CLIENT_SYSCTLS, COMMON_SYSCTLS};

/// A pod of a [`Node`]; clones are the same pod.
#[derive(Clone, Debug)]
pub struct Pod {
    live: Arc<Live>,
}

#[derive(Debug)]
struct Live {
    name: String,
    namespace: String,
    labels: Vec<(String, String)>,
    uid: String,
    container_id: String,
    node: String,
    host: u16,
    netns: Netns,
    node_netns: Netns,
    ip4: IpAddr,
    ip6: IpAddr,
    mac: Mac,
    veth: HostVeth,
    cni_result: PathBuf,
}

/// The node's end of a pod's veth pair.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HostVeth {
    /// `veth` and eight random hex digits.
    pub name: String,
    /// Index in the node's namespace.
    pub ifindex: u32,
    /// Its own MAC.
    pub mac: Mac,
}

/// What it takes to start a pod.
pub(crate) struct Start<'a> {
    pub(crate) node: &'a Node,
    pub(crate) spec: &'a PodSpec,
    pub(crate) host: u16,
    pub(crate) mtu: u16,
}

impl Pod {
    /// In the bridge plugin's order: pair made from inside the pod, host end up, enslaved, port flags, addresses,
    /// `eth0` up, routes, wait for the port, record the result.
    pub(crate) fn start(start: &Start<'_>) -> Result<Self> {
        let Start { node, spec, host, mtu } = *start;
        let [ip4, ip6] = Family::BOTH.map(|family| node.pod_cidr(family).host(host));
        let mac = match ip4 {
            IpAddr::V4(ip) => Mac::of_ipv4(ip),
            IpAddr::V6(_) => Mac::default(),
        };
        let netns = Netns::create(&format!("{}-{}-{}", node.prefix(), node.name(), spec.name))?;
        netns.sysctl(&COMMON_SYSCTLS)?;
        netns.sysctl(&CLIENT_SYSCTLS)?;
        let veth = format!("veth{:08x}", fastrand::u32(..));
        let node_name = node.netns().name();
        netns.ip(&format!(
            "link set lo up\n\
             link add eth0 address {mac} mtu {mtu} type veth peer name {veth} mtu {mtu} netns {node_name}\n"
        ))?;
        let isolated = if spec.isolated { "on" } else { "off" };
        node.netns().ip(&format!(
            "link set {veth} up\nlink set {veth} master {BRIDGE}\n\
             link set {veth} type bridge_slave hairpin off isolated {isolated}\n"
        ))?;
        let mut batch = format!("addr add {ip4}/24 dev eth0\naddr add {ip6}/64 dev eth0 nodad\nlink set eth0 up\n");
        for family in Family::BOTH {
            let _ = writeln!(batch, "route add default via {} dev eth0", node.bridge_ip(family));
        }
        netns.ip(&batch)?;
        wait_carrying(&netns, &["eth0"])?;
        let link = wait_carrying(node.netns(), &[&veth, BRIDGE])?.swap_remove(0);
        let address = link.address.unwrap_or_default();
        let veth_mac = Mac::parse(&address).ok_or_else(|| Error::Name(format!("MAC {address} of {veth}")))?;
        let veth = HostVeth { name: veth, ifindex: link.ifindex, mac: veth_mac };
        let container_id = format!("{:032x}{:032x}", fastrand::u128(..), fastrand::u128(..));
        let uid = uid();
        let cni_result = cni::write_result(&Attachment {
            dir: &node.cni_results_dir(),
            namespace: &spec.namespace,
            name: &spec.name,
            uid: &uid,
            container_id: &container_id,
            sandbox: netns.path(),
            bridge: (BRIDGE, node.bridge_mac()),
            host_veth: (&veth.name, veth.mac),
            pod_mac: mac,
            addresses: Family::BOTH.map(|family| (node.pod_cidr(family).host(host), node.pod_cidr(family))),
            gateways: Family::BOTH.map(|family| node.bridge_ip(family)),
            mtu,
        })?;
        let live = Live {
            name: spec.name.clone(),
            namespace: spec.namespace.clone(),
            labels: spec.labels.clone(),
            uid,
            container_id,
            node: node.name().to_owned(),
            host,
            netns,
            node_netns: node.netns().clone(),
            ip4,
            ip6,
            mac,
            veth,
            cni_result,
        };
        Ok(Self { live: Arc::new(live) })
    }

    pub(crate) fn stop(&self) -> Result<()> {
        self.netns().ip("link del eth0\n")?;
        let record = &self.live.cni_result;
        std::fs::remove_file(record).context(|| format!("remove {}", record.display()))?;
        self.netns().remove()
    }

    /// Name.
    pub fn name(&self) -> &str {
        &self.live.name
    }

    /// Kubernetes namespace.
    pub fn namespace(&self) -> &str {
        &self.live.namespace
    }

    /// Labels that it was started with.
    pub fn labels(&self) -> &[(String, String)] {
        &self.live.labels
    }

    /// UID, as in the CNI result and in the Pod object.
    pub fn uid(&self) -> &str {
        &self.live.uid
    }

    /// Id of its sandbox container.
    pub fn container_id(&self) -> &str {
        &self.live.container_id
    }

    /// Name of its node.
    pub fn node(&self) -> &str {
        &self.live.node
    }

    pub(crate) fn host_number(&self) -> u16 {
        self.live.host
    }

    /// The pod's network namespace.
    pub fn netns(&self) -> &Netns {
        &self.live.netns
    }

    /// Its address of a family.
    pub fn ip(&self, family: Family) -> IpAddr {
        match family {
            Family::V4 => self.live.ip4,
            Family::V6 => self.live.ip6,
        }
    }

    /// Its IPv4 address.
    pub fn ip4(&self) -> IpAddr {
        self.live.ip4
    }

    /// Its IPv6 address.
    pub fn ip6(&self) -> IpAddr {
        self.live.ip6
    }

    /// MAC of its `eth0`.
    pub fn mac(&self) -> Mac {
        self.live.mac
    }

    /// The node's end of its veth pair.
    pub fn host_veth(&self) -> &HostVeth {
        &self.live.veth
    }

    /// File with its CNI result.
    pub fn cni_result(&self) -> &std::path::Path {
        &self.live.cni_result
    }

    /// Adds an address to `eth0` from inside, as a pod with NET_ADMIN can.
    pub fn add_address(&self, ip: IpAddr) -> Result<()> {
        let (len, nodad) = if ip.is_ipv4() { (32, "") } else { (128, " nodad") };
        self.netns().ip(&format!("addr add {ip}/{len} dev eth0{nodad}\n"))
    }

    /// Takes an address from `eth0`.
    pub fn remove_address(&self, ip: IpAddr) -> Result<()> {
        let len = if ip.is_ipv4() { 32 } else { 128 };
        self.netns().ip(&format!("addr del {ip}/{len} dev eth0\n"))
    }

    /// Switches bridge port isolation.
    pub fn set_isolated(&self, on: bool) -> Result<()> {
        self.set_port("isolated", on)
    }

    /// Switches hairpin mode of the bridge port.
    pub fn set_hairpin(&self, on: bool) -> Result<()> {
        self.set_port("hairpin", on)
    }

    fn set_port(&self, option: &str, on: bool) -> Result<()> {
        let (veth, value) = (&self.live.veth.name, if on { "on" } else { "off" });
        self.live.node_netns.ip(&format!("link set {veth} type bridge_slave {option} {value}\n"))
    }
}

/// A random UID in the form of a version 4 UUID.
fn uid() -> String {
    let [a, b] = [fastrand::u64(..), fastrand::u64(..)];
    let (low, mid, version) = (a >> 32, (a >> 16) & 0xffff, a & 0xfff);
    let (variant, node) = ((b >> 48) & 0x3fff | 0x8000, b & 0xffff_ffff_ffff);
    format!("{low:08x}-{mid:04x}-4{version:03x}-{variant:04x}-{node:012x}")
}
