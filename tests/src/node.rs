//! A node: a namespace with a bridge for pods and an uplink.

use std::collections::BTreeMap;
use std::fs;
use std::net::IpAddr;
use std::os::unix::fs::DirBuilderExt as _;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};

use crate::address::{Family, Mac, Network, node_host, pod_cidr, underlay};
use crate::cluster::{Links, NodeSpec, PodSpec};
use crate::error::{Context as _, Error, Result};
use crate::lease::{BPFFS, Lease};
use crate::netfilter::{self, Rule};
use crate::netns::Netns;
use crate::pod::{Pod, Start};
use crate::underlay::{COMMON_SYSCTLS, pod_mtu, uplink_lines};

/// The bridge that pods hang on.
pub const BRIDGE: &str = "cni0";
/// The uplink.
pub const UPLINK: &str = "eth0";

/// A node of a [`crate::Cluster`].
#[derive(Debug)]
pub struct Node {
    name: String,
    index: u8,
    prefix: String,
    netns: Netns,
    state_dir: PathBuf,
    pod_mtu: u16,
    bridge_mac: Mac,
    pods: Mutex<Pods>,
}

#[derive(Debug)]
struct Pods {
    running: BTreeMap<String, Pod>,
    next_host: u16,
}

/// Sysctls of a node, before its devices exist: they inherit from `default`.
pub(crate) fn prepare(netns: &Netns, spec: &NodeSpec) -> Result<()> {
    let flag = |on| if on { "1" } else { "0" };
    netns.sysctl(&COMMON_SYSCTLS)?;
    netns.sysctl(&[
        ("net/ipv4/ip_forward", "1"),
        ("net/ipv6/conf/all/forwarding", "1"),
        ("net/ipv6/conf/default/forwarding", "1"),
        ("net/ipv4/conf/all/rp_filter", flag(spec.rp_filter)),
        ("net/ipv4/conf/default/rp_filter", flag(spec.rp_filter)),
        ("net/bridge/bridge-nf-call-iptables", flag(spec.br_netfilter)),
        ("net/bridge/bridge-nf-call-ip6tables", flag(spec.br_netfilter)),
        ("net/bridge/bridge-nf-call-arptables", "0"),
    ])
}

impl Node {
    /// Wires a prepared namespace that has its uplink.
    pub(crate) fn create(lease: &Lease, netns: Netns, spec: &NodeSpec, index: u8, links: Links) -> Result<Self> {
        let pod_mtu = pod_mtu(links);
        let gateways = Family::BOTH.map(|family| pod_cidr(family, index).host(1));
        let bridge_mac = match gateways[0] {
            IpAddr::V4(ip) => Mac::of_ipv4(ip),
            IpAddr::V6(_) => Mac::default(),
        };
        // Named only when asked for: kernels without CONFIG_BRIDGE_VLAN_FILTERING refuse the word itself.
        let vlan_filtering = if spec.vlan_filtering { " vlan_filtering 1" } else { "" };
        // The MAC is set on purpose: a bridge without one takes the lowest of its ports and changes with them.
        let bridge = format!(
            "link add {BRIDGE} address {bridge_mac} mtu {pod_mtu} type bridge{vlan_filtering}\n\
             addr add {}/24 dev {BRIDGE}\naddr add {}/64 dev {BRIDGE} nodad\nlink set {BRIDGE} up\n",
            gateways[0], gateways[1]
        );
        netns.ip(&(uplink_lines(node_host(index)) + &bridge))?;
        if spec.hostile {
            netfilter::install_hostile(&netns, index)?;
        }
        let state_dir = lease.dir().join(&spec.name);
        let pods = Mutex::new(Pods { running: BTreeMap::new(), next_host: 2 });
        let name = spec.name.clone();
        let prefix = lease.prefix().to_owned();
        let node = Self { name, index, prefix, netns, state_dir, pod_mtu, bridge_mac, pods };
        let results = node.cni_results_dir();
        let made = fs::DirBuilder::new().recursive(true).mode(0o700).create(&results);
        made.context(|| format!("create {}", results.display()))?;
        Ok(node)
    }

    /// Name of the node, as its Node object has it.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Position in the cluster; it fixes the addresses.
    pub fn index(&self) -> u8 {
        self.index
    }

    /// The namespace.
    pub fn netns(&self) -> &Netns {
        &self.netns
    }

    /// The node's own address on the uplink.
    pub fn ip(&self, family: Family) -> IpAddr {
        underlay(family).host(node_host(self.index))
    }

    /// Range of its pods.
    pub fn pod_cidr(&self, family: Family) -> Network {
        pod_cidr(family, self.index)
    }

    /// Address of the bridge: the pods' gateway.
    pub fn bridge_ip(&self, family: Family) -> IpAddr {
        self.pod_cidr(family).host(1)
    }

    /// MAC of the bridge.
    pub fn bridge_mac(&self) -> Mac {
        self.bridge_mac
    }

    /// Folder for logs and pid files of this node; removed with the cluster.
    pub fn state_dir(&self) -> &Path {
        &self.state_dir
    }

    /// Folder with one CNI result per pod, as libcni's `/var/lib/cni/results`.
    pub fn cni_results_dir(&self) -> PathBuf {
        self.state_dir.join("cni/results")
    }

    /// Directory for pins, unique to this node; made by whoever pins.
    pub fn pin_root(&self) -> PathBuf {
        Path::new(BPFFS).join(format!("{}-{}", self.prefix, self.name))
    }

    /// Prefix of every name of the cluster.
    pub(crate) fn prefix(&self) -> &str {
        &self.prefix
    }

    /// Runs a program in the node's network namespace and returns its stdout.
    pub fn run(&self, program: &str, args: &[&str]) -> Result<String> {
        self.netns.output(program, args)
    }

    /// Every netfilter rule of the node.
    pub fn netfilter_rules(&self) -> Result<Vec<Rule>> {
        netfilter::rules(&self.netns)
    }

    /// Packets that the rules with this comment matched, in all tables.
    pub fn netfilter_packets(&self, comment: &str) -> Result<u64> {
        let rules = self.netfilter_rules()?;
        Ok(rules.iter().filter(|rule| rule.text == comment).filter_map(|rule| rule.packets).sum())
    }

    /// Switches VLAN filtering of the bridge.
    ///
    /// # Errors
    /// [`Error::Command`] on a kernel without `CONFIG_BRIDGE_VLAN_FILTERING`.
    pub fn set_vlan_filtering(&self, on: bool) -> Result<()> {
        self.netns.ip(&format!("link set {BRIDGE} type bridge vlan_filtering {}\n", u8::from(on)))
    }

    /// Switches `bridge-nf-call-iptables` and `-ip6tables`.
    pub fn set_br_netfilter(&self, on: bool) -> Result<()> {
        let value = if on { "1" } else { "0" };
        self.netns
            .sysctl(&[("net/bridge/bridge-nf-call-iptables", value), ("net/bridge/bridge-nf-call-ip6tables", value)])
    }

    /// Starts a pod.
    ///
    /// # Errors
    /// [`Error::Name`] when the name or the address is taken, or the step that failed.
    pub fn add_pod(&self, spec: &PodSpec) -> Result<Pod> {
        let mut pods = self.lock();
        if pods.running.contains_key(&spec.name) {
            return Err(Error::Name(format!("pod {} exists on {}", spec.name, self.name)));
        }
        let host = spec.host.unwrap_or(pods.next_host);
        if let Some(other) = pods.running.values().find(|pod| pod.host_number() == host) {
            return Err(Error::Name(format!("host {host} of {} belongs to pod {}", self.name, other.name())));
        }
        let start = Start { node: self, spec, host, mtu: self.pod_mtu };
        let pod = Pod::start(&start)?;
        pods.next_host = pods.next_host.max(host + 1);
        pods.running.insert(spec.name.clone(), pod.clone());
        Ok(pod)
    }

    /// Ends a pod as the bridge plugin does: interface first, then its record, then the namespace.
    pub fn remove_pod(&self, name: &str) -> Result<()> {
        let pod = self.lock().running.remove(name);
        pod.ok_or_else(|| Error::Name(format!("no pod {name} on {}", self.name)))?.stop()
    }

    /// The pod of that name.
    ///
    /// # Errors
    /// [`Error::Name`].
    pub fn pod(&self, name: &str) -> Result<Pod> {
        let pod = self.lock().running.get(name).cloned();
        pod.ok_or_else(|| Error::Name(format!("no pod {name} on {}", self.name)))
    }

    /// Its pods, by name.
    pub fn pods(&self) -> Vec<Pod> {
        self.lock().running.values().cloned().collect()
    }

    fn lock(&self) -> MutexGuard<'_, Pods> {
        // A panic elsewhere leaves a map that is still whole: it changes only after a pod is up.
        self.pods.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
