//! The eBPF programs on a bench: loaded and fed with single packets by `BPF_PROG_TEST_RUN`, attached to nothing.
//!
//! A [`Bench`] has a network namespace of its own, with one veth for each of three pods, so that the interfaces that
//! the programs are told of exist; and a pin directory of its own, which goes with it.

pub mod policed;
pub mod talk;

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::path::PathBuf;
use std::process::Command;
use std::sync::atomic::{AtomicU32, Ordering};
use std::thread;

use anyhow::{Context as _, Result};
use nix::mount::{MsFlags, mount};
use nix::net::if_::if_nametoindex;
use nix::sched::{CloneFlags, unshare};
use proxy_abi::{
    BackendEntry, DeviceEntry, FlowEntry, FlowKey, FrontendEntry, FrontendKey, Hook, IpBytes, LocalPodEntry, MacBytes,
    PortBe, Proto, Reason,
};
use proxy_agent::dataplane::pins::{Maps, Pins};
use proxy_agent::dataplane::sysbpf::{self, TestRun};
use proxy_agent::dataplane::{AttachMode, Bpf, Config, SocketLb, cleanup};
use proxy_core::netpol::engine::Limits;
use proxy_ebpf::conntrack::UdpIdle;

use crate::address::Family;
use crate::command;
use crate::lease::BPFFS;
use crate::packet::Frame;
use crate::packet::named::{GATEWAY, Host, NODE_ONE, OUTSIDE, POD_ONE, POD_THREE, POD_TWO};

/// The pods that have a veth here, in the order of their interfaces.
pub const PODS: [Host; 3] = [POD_ONE, POD_TWO, POD_THREE];

/// Sizes of the flow tables that are large enough never to matter.
pub const ROOMY: Tables =
    Tables { live: 65_536, brief: 65_536, quota: 0, node_open: false, udp_idle: UdpIdle::DEFAULT, policy: None };

/// Entries of the flow tables, and what else is decided at the start.
#[derive(Clone, Copy, Debug)]
pub struct Tables {
    /// `flow_live`.
    pub live: u32,
    /// `flow_brief`.
    pub brief: u32,
    /// Flows that one pod may have begun; 0 = any number.
    pub quota: u32,
    /// A pod reaches its own node whatever its policies say.
    pub node_open: bool,
    /// How long a flow that is not TCP may be idle.
    pub udp_idle: UdpIdle,
    /// Room in the maps of policy; `None` = as much as there always is.
    pub policy: Option<Limits>,
}

/// Packets by hook and reason.
pub type Counts = BTreeMap<(Hook, Reason), u64>;

/// What a program made of a packet.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Outcome {
    /// Its return value.
    pub verdict: i32,
    /// The packet afterwards.
    pub packet: Vec<u8>,
    /// What was counted.
    pub counts: Counts,
}

/// Mounts a BPF file system for this thread's mount namespace alone: nothing is asked of the machine and nothing stays.
fn own_bpffs() -> Result<()> {
    let none = None::<&str>;
    mount(none, "/", none, MsFlags::MS_REC | MsFlags::MS_PRIVATE, none).context("keep mounts from spreading")?;
    mount(Some("bpf"), BPFFS, Some("bpf"), MsFlags::empty(), Some("mode=0700"))
        .with_context(|| format!("mount {BPFFS}"))
}

/// The node's addresses on the uplink, and routes out of it: what `bpf_fib_lookup` is asked for.
fn route_out() -> Result<()> {
    for setting in ["ipv4/ip_forward", "ipv6/conf/all/forwarding"] {
        let path = format!("/proc/sys/net/{setting}");
        std::fs::write(&path, "1").with_context(|| path.clone())?;
    }
    for link in ["lo", "one", "two", "three", "uplink", "uplink-pod"] {
        command::output(Command::new("ip").args(["link", "set", link, "up"]))?;
    }
    let (ip4, ip6) = (format!("{}/24", NODE_ONE.ip4), format!("{}/64", NODE_ONE.ip6));
    command::output(Command::new("ip").args(["address", "add", &ip4, "dev", "uplink"]))?;
    command::output(Command::new("ip").args(["address", "add", &ip6, "dev", "uplink", "nodad"]))?;
    let next = [OUTSIDE.ip4.to_string(), OUTSIDE.ip6.to_string()];
    for (to, via) in ["10.244.1.0/24", "fd00:10:244:1::/64"].into_iter().zip(&next) {
        command::output(Command::new("ip").args(["route", "add", to, "via", via, "dev", "uplink"]))?;
    }
    Ok(())
}

/// Return values of the tc programs.
pub mod verdict {
    /// `TCX_NEXT`.
    pub const PASS: i32 = -1;
    /// `TC_ACT_SHOT`.
    pub const DROP: i32 = 2;
    /// `TC_ACT_REDIRECT`.
    pub const REDIRECT: i32 = 7;
}

/// An end of a flow as people write it.
pub type End = (IpAddr, u16);

/// An entry of a flow table, without what differs from run to run.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Entry {
    /// Is it in `flow_live`?
    pub live: bool,
    /// Source and destination, as the initiator sends.
    pub original: (End, End),
    /// As the responder receives.
    pub translated: (End, End),
    /// [`proxy_abi::flow::state`].
    pub state: u8,
    /// Flags of [`FlowEntry`].
    pub flags: u16,
}

/// The loaded programs with their maps.
#[derive(Debug)]
pub struct Bench {
    bpf: Bpf,
    root: PathBuf,
    /// Of the pods, then of the uplink.
    ifindexes: [u32; 4],
    ids: AtomicU32,
}

impl Drop for Bench {
    fn drop(&mut self) {
        // What is left is under a name that nobody else uses; there is nobody to tell.
        let _ = cleanup(&self.root);
        let _ = std::fs::remove_dir(&self.root);
    }
}

impl Bench {
    /// Runs `work` with a bench, on a thread of its own in a network namespace of its own. A panic continues here.
    ///
    /// # Errors
    /// When the namespace, its links or the programs cannot be made (not root, no bpffs).
    pub fn run<T: Send>(tables: Tables, work: impl FnOnce(&Self) -> T + Send) -> Result<T> {
        thread::scope(|scope| {
            let inside = scope.spawn(|| Self::open(tables).map(|bench| work(&bench)));
            inside.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
        })
    }

    fn open(tables: Tables) -> Result<Self> {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        unshare(CloneFlags::CLONE_NEWNET | CloneFlags::CLONE_NEWNS).context("a network and a mount namespace")?;
        own_bpffs()?;
        let mut ifindexes = [0; 4];
        for (name, ifindex) in ["one", "two", "three", "uplink"].into_iter().zip(&mut ifindexes) {
            let add = ["link", "add", name, "type", "veth", "peer", "name", &format!("{name}-pod")].map(str::to_owned);
            command::output(Command::new("ip").args(add))?;
            *ifindex = if_nametoindex(name).context("index of a veth")?;
        }
        route_out()?;
        let count = COUNT.fetch_add(1, Ordering::Relaxed);
        let root = PathBuf::from(format!("{BPFFS}/pt{}-packets{count}", std::process::id()));
        let config = Config {
            pin_root: root.clone(),
            attach: AttachMode::Auto,
            cgroup: None,
            socket_lb: SocketLb::Node,
            flow_live: tables.live,
            flow_brief: tables.brief,
            pod_quota: tables.quota,
            node_open: tables.node_open,
            udp_idle: tables.udp_idle,
            policy: tables.policy.unwrap_or_default(),
        };
        // Also when opening fails half way, nothing stays.
        let bpf = Bpf::open(&config).inspect_err(|_| drop(cleanup(&root))).context("load the programs")?;
        let bench = Self { bpf, root, ifindexes, ids: AtomicU32::new(1) };
        bench.set_pods(DeviceEntry::REDIRECT | DeviceEntry::SWITCH)?;
        bench.set_uplink()?;
        Ok(bench)
    }

    /// The uplink, with the node's addresses.
    fn set_uplink(&self) -> Result<()> {
        let mac = MacBytes(NODE_ONE.mac.0);
        let entry = DeviceEntry {
            ip4: IpAddr::from(NODE_ONE.ip4).into(),
            ip6: IpAddr::from(NODE_ONE.ip6).into(),
            gateway_ip4: IpBytes::UNSPECIFIED,
            gateway_ip6: IpBytes::UNSPECIFIED,
            pod_mac: mac,
            gateway_mac: mac,
            bridge: 0,
            flags: DeviceEntry::NETDEV,
            slot: 0,
            reserved: 0,
            since: 0,
            mtu: 1500,
        };
        self.bpf.maps().device.set(&self.ifindex(&NODE_ONE), &entry)?;
        for family in [Family::V4, Family::V6] {
            let flags = FrontendEntry::ADDRESS_NODE | FrontendEntry::ADDRESS_NODE_PORT;
            self.mark(NODE_ONE.ip(family), flags)?;
        }
        Ok(())
    }

    /// Says what an address is: flags `ADDRESS_*` of [`FrontendEntry`].
    pub fn mark(&self, ip: IpAddr, flags: u32) -> Result<()> {
        let mark = FrontendEntry { first: 0, count: 0, service: 0, flags, affinity_seconds: 0, generation: 0 };
        Ok(self.bpf.maps().frontend.set(&FrontendKey::address(ip.into()), &mark)?)
    }

    /// Writes one frontend over backends in its family; returns their ids. Their service port is the first of them.
    pub fn set_frontend(
        &self,
        key: FrontendKey,
        backends: &[(IpAddr, u16)],
        flags: u32,
        affinity_seconds: u32,
    ) -> Result<Vec<u32>> {
        let maps = self.bpf.maps();
        let count = u32::try_from(backends.len())?;
        let first = self.ids.fetch_add(count.max(1), Ordering::Relaxed);
        let ids: Vec<u32> = (first..first + count).collect();
        for (id, (ip, port)) in ids.iter().zip(backends) {
            let entry = BackendEntry {
                ip: (*ip).into(),
                service: first,
                generation: *id,
                port: PortBe::new(*port),
                proto: key.proto,
                reserved: 0,
                flags: BackendEntry::IN_CLUSTER | BackendEntry::IN_LOCAL,
            };
            maps.backend.set(id, &entry)?;
            maps.slot.set(id, id)?;
        }
        let entry = FrontendEntry { first, count, service: first, flags, affinity_seconds, generation: first };
        maps.frontend.set(&key, &entry)?;
        Ok(ids)
    }

    /// The dataplane, for its maps.
    pub const fn bpf(&self) -> &Bpf {
        &self.bpf
    }

    /// Where its maps are pinned.
    pub fn pins(&self) -> Pins {
        Pins::new(&self.root)
    }

    /// Interface of a pod of [`PODS`], or the uplink of `NODE_ONE`; 0 for anybody else, where no program would run.
    pub fn ifindex(&self, pod: &Host) -> u32 {
        let found = PODS.iter().chain([&NODE_ONE]).zip(self.ifindexes).find(|(known, _)| *known == pod);
        found.map_or(0, |(_, ifindex)| ifindex)
    }

    /// Writes the rows of all pods and their interfaces, with flags of [`DeviceEntry`].
    pub fn set_pods(&self, flags: u32) -> Result<()> {
        for pod in &PODS {
            self.set_pod(pod, self.ifindex(pod), flags)?;
        }
        Ok(())
    }

    /// Puts a pod behind an interface.
    pub fn set_pod(&self, pod: &Host, ifindex: u32, flags: u32) -> Result<()> {
        let mac = MacBytes(pod.mac.0);
        let entry = DeviceEntry {
            ip4: IpAddr::from(pod.ip4).into(),
            ip6: IpAddr::from(pod.ip6).into(),
            gateway_ip4: IpAddr::from(GATEWAY.ip4).into(),
            gateway_ip6: IpAddr::from(GATEWAY.ip6).into(),
            pod_mac: mac,
            gateway_mac: MacBytes(GATEWAY.mac.0),
            // Any interface will do: what a route is looked up from.
            bridge: self.ifindex(&NODE_ONE),
            flags,
            slot: 0,
            reserved: 0,
            since: 0,
            mtu: 0,
        };
        self.bpf.maps().device.set(&ifindex, &entry)?;
        for ip in [entry.ip4, entry.ip6] {
            self.bpf.maps().local_pod.set(&ip, &LocalPodEntry { ifindex, mac, slot: 0, flags })?;
        }
        Ok(())
    }

    /// Writes a Service with new backends in both families; returns the backends' ids, two for each, IPv4 first.
    pub fn set_service(&self, vip: &Host, port: u16, proto: Proto, backends: &[(Host, u16)]) -> Result<Vec<u32>> {
        let maps = self.bpf.maps();
        let count = u32::try_from(backends.len())?;
        let mut all = Vec::new();
        for family in [Family::V4, Family::V6] {
            let first = self.ids.fetch_add(count.max(1), Ordering::Relaxed);
            for (id, (backend, port)) in (first..).zip(backends) {
                let entry = BackendEntry {
                    ip: backend.ip(family).into(),
                    service: first,
                    generation: id,
                    port: PortBe::new(*port),
                    proto,
                    reserved: 0,
                    flags: 0,
                };
                maps.backend.set(&id, &entry)?;
                maps.slot.set(&id, &id)?;
                all.push(id);
            }
            let key = frontend(vip.ip(family), port, proto);
            let entry =
                FrontendEntry { first, count, service: first, flags: 0, affinity_seconds: 0, generation: first };
            maps.frontend.set(&key, &entry)?;
        }
        Ok(all)
    }

    /// Says of a backend that it serves no more.
    pub fn end_backend(&self, id: u32) -> Result<()> {
        let backend = self.bpf.maps().backend.get(&id)?.context("no such backend")?;
        Ok(self.bpf.maps().backend.set(&id, &BackendEntry { generation: 0, ..backend })?)
    }

    /// Runs the program of a hook at a pod's interface on a frame.
    pub fn feed(&self, hook: Hook, pod: &Host, packet: &[u8]) -> Result<Outcome> {
        self.feed_from(hook, pod, 0, packet)
    }

    /// The same for a packet that came into the node by an interface; 0 = a socket of the node sent it.
    pub fn feed_from(&self, hook: Hook, pod: &Host, ingress: u32, packet: &[u8]) -> Result<Outcome> {
        let before = self.counts()?;
        let TestRun { verdict, packet, .. } = self.run_from(hook, pod, ingress, packet)?;
        let mut counts = self.counts()?;
        counts.retain(|key, now| {
            *now -= before.get(key).copied().unwrap_or_default();
            *now > 0
        });
        Ok(Outcome { verdict: verdict.cast_signed(), packet, counts })
    }

    /// The same without looking at the counters, which takes longer than the run.
    pub fn run_once(&self, hook: Hook, pod: &Host, packet: &[u8]) -> Result<TestRun> {
        self.run_from(hook, pod, 0, packet)
    }

    /// The same for a packet that came into the node by an interface; 0 = a socket of the node sent it.
    pub fn run_from(&self, hook: Hook, pod: &Host, ingress: u32, packet: &[u8]) -> Result<TestRun> {
        let program = match hook {
            Hook::FromPod => "from_pod",
            Hook::FromNetdev => "from_netdev",
            Hook::ToNetdev => "to_netdev",
            _ => "to_pod",
        };
        let program = self.bpf.program_fd(program)?;
        sysbpf::test_run(program, packet, (self.ifindex(pod), ingress), 1)
            .with_context(|| format!("{hook} with {packet:02x?}"))
    }

    fn counts(&self) -> Result<Counts> {
        let mut counts = Counts::new();
        for hook in [Hook::FromPod, Hook::ToPod, Hook::FromNetdev, Hook::ToNetdev] {
            for reason in Reason::ALL {
                let each = self.bpf.maps().counter.get_per_cpu(&reason.index(hook))?;
                counts.insert((hook, *reason), each.iter().map(|counter| counter.packets).sum());
            }
        }
        Ok(counts)
    }

    /// Both flow tables. An entry in `flow_brief` that `flow_live` has as well is left out: nobody looks at it.
    pub fn flows(&self) -> Result<Vec<(FlowKey, Entry, FlowEntry)>> {
        let live = self.bpf.maps().flow_live.read()?;
        let mut brief = self.bpf.maps().flow_brief.read()?;
        brief.retain(|(key, _)| live.iter().all(|(other, _)| key != other));
        let named = |live| move |(key, entry): (FlowKey, FlowEntry)| (key, Entry::new(live, &entry), entry);
        let mut all: Vec<_> = live.into_iter().map(named(true)).chain(brief.into_iter().map(named(false))).collect();
        all.sort_by_key(|(_, entry, _)| *entry);
        Ok(all)
    }

    /// Only what can be compared.
    pub fn entries(&self) -> Result<Vec<Entry>> {
        Ok(self.flows()?.into_iter().map(|(_, entry, _)| entry).collect())
    }

    /// The maps, as the agent has them.
    pub fn maps(&self) -> &Maps {
        self.bpf.maps()
    }

    /// Forgets all flows.
    pub fn forget_flows(&self) -> Result<()> {
        let maps = self.bpf.maps();
        for table in [&maps.flow_live, &maps.flow_brief] {
            for (key, _) in table.read()? {
                table.delete(&key)?;
            }
        }
        Ok(())
    }
}

impl Entry {
    fn new(live: bool, entry: &FlowEntry) -> Self {
        let ends = |tuple: &proxy_abi::Tuple| {
            let end = |ip: IpBytes, port: PortBe| (IpAddr::from(ip), port.get());
            (end(tuple.src, tuple.src_port), end(tuple.dst, tuple.dst_port))
        };
        Self {
            live,
            original: ends(&entry.original),
            translated: ends(&entry.translated),
            state: entry.state,
            flags: entry.flags,
        }
    }
}

/// Key of a frontend as pods reach it.
pub fn frontend(ip: IpAddr, port: u16, proto: Proto) -> FrontendKey {
    FrontendKey { ip: ip.into(), port: PortBe::new(port), proto, scope: FrontendKey::SCOPE_CLUSTER }
}

/// A frame with other MACs: as a redirect leaves it.
pub fn redirected(mut frame: Frame, to: &Host) -> Frame {
    frame.src = GATEWAY.mac;
    frame.dst = to.mac;
    frame
}
