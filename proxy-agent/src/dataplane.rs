//! The kernel behind the port [`Dataplane`]: the eBPF object, its pinned maps and its links.
//!
//! aya is named in here and nowhere else. What is pinned where is drawn in [`pins`]; what lies in the maps in
//! `proxy_abi`.

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};

use aya::programs::{CgroupSockAddr, ProgramError, SchedClassifier};
use aya::{Ebpf, EbpfError, EbpfLoader};
use proxy_abi::flow::state;
use proxy_abi::{BackendEntry, DeviceEntry, FlowEntry, FlowKey, PortBe, Proto, Tuple, capacity, map as map_name};
use proxy_core::dataplane::Dataplane;
use proxy_core::netpol::engine::Limits;
use proxy_core::tables::{Op, Tables};
use proxy_ebpf::conntrack::{self, UdpIdle};

pub mod attach;
mod cleanup;
pub mod describe;
pub mod dry;
pub mod map;
pub mod pins;
pub mod policy;
pub mod probes;
pub mod sizing;
pub mod sweep;
pub mod symbol;
pub mod sysbpf;
pub mod upgrade;

use attach::Way;
pub use cleanup::{cleanup, retire};
use describe::Description;
use map::Layout;
use pins::{LinkPin, Maps, Pins};

use crate::node::conntrack::Translated;

/// The eBPF object, as `build.rs` made it.
static OBJECT: &[u8] = aya::include_bytes_aligned!(concat!(env!("OUT_DIR"), "/dataplane.o"));

/// The object itself: for tests that load it in another way.
pub fn object() -> &'static [u8] {
    OBJECT
}

/// What went wrong, with what, and what to do.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Nothing can be pinned there.
    #[error("{path} is not on a bpf file system; mount one (mount -t bpf bpf /sys/fs/bpf) or give another --pin-root")]
    NoBpffs {
        /// The pin directory.
        path: PathBuf,
    },
    /// The process may not do that.
    #[error(
        "{operation}: not permitted; run as root, or with CAP_BPF, CAP_PERFMON and CAP_NET_ADMIN and a --pin-root of one's own"
    )]
    Denied {
        /// What was tried.
        operation: String,
        /// The kernel's answer.
        source: io::Error,
    },
    /// A pin cannot be read or made.
    #[error("pin {path}")]
    Pin {
        /// The pin.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// A pinned map is not what its name says.
    #[error(
        "pinned map {path} is {found:?}, not {expected:?}; somebody else made it: give another --pin-root, or remove it \
         with `proxy-agent cleanup` (translated connections end)"
    )]
    Layout {
        /// The pin.
        path: PathBuf,
        /// What it must be.
        expected: Layout,
        /// What it is.
        found: Layout,
    },
    /// Nothing is pinned.
    #[error("{path} does not exist: the agent has never run here, or was cleaned up")]
    NotRunning {
        /// The directory of the maps.
        path: PathBuf,
    },
    /// A map operation failed.
    #[error("cannot {operation} {key} in {path}")]
    Map {
        /// The pin of the map.
        path: PathBuf,
        /// What was tried.
        operation: &'static str,
        /// With which key.
        key: String,
        /// Why.
        source: io::Error,
    },
    /// The object was refused.
    #[error("the kernel refused the eBPF object; `proxy-agent check` tells what it lacks")]
    Object(#[source] Box<EbpfError>),
    /// A program was refused.
    #[error("program {program}: the kernel refused it; `proxy-agent check` tells what it lacks")]
    Program {
        /// The program.
        program: &'static str,
        /// Why.
        source: ProgramError,
    },
    /// The object has no such program: it was built from other sources.
    #[error("the eBPF object has no program {program}; it was built from other sources (BPF_OBJECT?)")]
    NoProgram {
        /// The program.
        program: &'static str,
    },
    /// A program cannot be attached.
    #[error("cannot attach {program} to {target}")]
    Attach {
        /// The program.
        program: &'static str,
        /// The interface or cgroup.
        target: String,
        /// Why.
        source: io::Error,
    },
    /// Another agent works on the same pins.
    #[error("another agent holds {path}; stop it first, or give this one another --pin-root")]
    Locked {
        /// The pin directory.
        path: PathBuf,
    },
    /// The interface is gone; netlink will tell soon.
    #[error("interface {ifindex} is gone")]
    InterfaceGone {
        /// Its index.
        ifindex: u32,
    },
    /// tcx was asked for and is not there.
    #[error("this kernel has no tcx (Linux 6.6); use --attach auto or clsact")]
    NoTcx,
}

impl Error {
    /// A failure in a directory of pins.
    fn pin(path: &Path, source: io::Error) -> Self {
        if source.kind() == io::ErrorKind::PermissionDenied {
            return Self::Denied { operation: format!("pin in {}", path.display()), source };
        }
        Self::Pin { path: path.to_owned(), source }
    }

    /// Would it be the same without the object that it is about?
    pub fn is_interface_gone(&self) -> bool {
        matches!(self, Self::InterfaceGone { .. })
    }
}

/// How to attach, as asked for on the command line.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum)]
pub enum AttachMode {
    /// tcx where the kernel has it, else clsact.
    #[default]
    Auto,
    /// tcx or nothing.
    Tcx,
    /// clsact.
    Clsact,
}

/// Whose sockets are led to backends before there is a packet, as asked for on the command line.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum)]
pub enum SocketLb {
    /// Those of the node's own network namespace: its processes and hostNetwork pods.
    #[default]
    Node,
    /// Those of pods, too, but for pods with the annotation proxy-agent.io/socket-lb: "disabled".
    All,
}

/// What the dataplane is to be.
#[derive(Clone, Debug)]
pub struct Config {
    /// Where to pin.
    pub pin_root: PathBuf,
    /// How to attach to interfaces.
    pub attach: AttachMode,
    /// Root of the cgroup v2 hierarchy; `None` leaves sockets of the node alone.
    pub cgroup: Option<PathBuf>,
    /// Whose sockets are translated there.
    pub socket_lb: SocketLb,
    /// Entries of `flow_live`.
    pub flow_live: u32,
    /// Entries of `flow_brief`.
    pub flow_brief: u32,
    /// Established flows through Services that one pod may have begun; 0 = any number.
    pub pod_quota: u32,
    /// A pod reaches its own node whatever its policies say.
    pub node_open: bool,
    /// How long a flow that is not TCP may be idle.
    pub udp_idle: UdpIdle,
    /// Entries of the maps of policy, where they are not pinned yet.
    pub policy: Limits,
}

/// The loaded object with its maps, pinned and open.
#[derive(Debug)]
pub struct Bpf {
    _lock: pins::Lock,
    ebpf: Ebpf,
    maps: Maps,
    pins: Pins,
    way: Way,
    ended: BTreeMap<(u32, u32), BackendEntry>,
}

impl Config {
    /// Entries of `pod_socket`.
    const fn pod_sockets(&self) -> u32 {
        match self.socket_lb {
            SocketLb::Node => capacity::NO_POD_SOCKET,
            SocketLb::All => capacity::POD_SOCKET,
        }
    }
}

impl Bpf {
    /// Loads the programs over the pinned maps, made where they are missing, and swaps them into the links that are
    /// there. Attaches the socket programs. Packets go on all the while.
    pub fn open(config: &Config) -> Result<Self, Error> {
        let pins = Pins::new(&config.pin_root);
        pins.create()?;
        let lock = pins.lock()?;
        pins.check()?;
        let way = Way::choose(config.attach)?;
        let mut upgrades = upgrade::find(&pins)?;
        let config = &Config {
            flow_live: room(&upgrades, map_name::FLOW_LIVE, config.flow_live),
            flow_brief: room(&upgrades, map_name::FLOW_BRIEF, config.flow_brief),
            ..config.clone()
        };
        pins.resize(map_name::POD_SOCKET, config.pod_sockets())?;
        let mut ebpf = match load(&pins, config, true) {
            // Without `bpf_set_retval` (Linux 5.18) the socket programs refuse in another way.
            Err(Error::Program { program, .. }) if attach::CGROUP_PROGRAMS.iter().any(|(name, _)| *name == program) => {
                load(&pins, config, false)?
            }
            loaded => loaded?,
        };
        let UdpIdle { unreplied, assured } = config.udp_idle;
        let [unreplied, assured] =
            [unreplied, assured].map(|time| u32::try_from(time / conntrack::SECOND).unwrap_or(u32::MAX));
        let settings = [
            (describe::POD_QUOTA, config.pod_quota),
            (describe::NODE_OPEN, u32::from(config.node_open)),
            (describe::SOCKET_LB, u32::from(config.socket_lb == SocketLb::All)),
            (describe::UDP_IDLE[0], unreplied),
            (describe::UDP_IDLE[1], assured),
        ];
        Description::own(&settings).write(&pins.maps())?;
        for upgrade in &mut upgrades {
            upgrade.carry(&ebpf, &pins)?;
        }
        match &config.cgroup {
            Some(cgroup) => attach::attach_cgroup(&ebpf, &pins, cgroup)?,
            None => attach::detach_cgroup(&pins)?,
        }
        let maps = pins.open()?;
        maps.tell_sizes(config);
        // Interfaces that have gone while nobody watched: `load` will not name them, so the plan removes their rest.
        let rows: BTreeMap<u32, DeviceEntry> = maps.device.read()?.into_iter().collect();
        for ifindex in attached(&pins)? {
            let Some(programs) = rows.get(&ifindex).and_then(attach::programs) else {
                attach::detach(&pins, ifindex)?;
                continue;
            };
            match attach::attach(&mut ebpf, &pins, way, ifindex, programs) {
                Ok(()) => {}
                Err(e) if e.is_interface_gone() => attach::detach(&pins, ifindex)?,
                Err(e) => return Err(e),
            }
        }
        upgrades.into_iter().try_for_each(upgrade::Upgrade::finish)?;
        // A row without programs does nothing: it is of an interface that has gone, or that was not finished.
        let attached = attached(&pins)?;
        let unfinished =
            |(ifindex, row): &(&u32, &DeviceEntry)| attach::programs(row).is_some() && !attached.contains(*ifindex);
        for (ifindex, _) in rows.iter().filter(unfinished) {
            maps.device.delete(ifindex)?;
        }
        Ok(Self { _lock: lock, ebpf, maps, pins, way, ended: BTreeMap::new() })
    }

    /// The open maps.
    pub const fn maps(&self) -> &Maps {
        &self.maps
    }

    /// UDP backends that serve no more since this was last asked, by id and generation.
    pub fn take_ended(&mut self) -> BTreeMap<(u32, u32), BackendEntry> {
        std::mem::take(&mut self.ended)
    }

    fn delete_backend(&mut self, id: u32) -> Result<(), Error> {
        if let Some(was) = self.maps.backend.get(&id)?.filter(|was| was.proto == Proto::UDP) {
            self.ended.insert((id, was.generation), was);
        }
        self.maps.backend.set(&id, &NO_BACKEND)
    }

    /// How programs are attached.
    pub const fn way(&self) -> Way {
        self.way
    }

    /// A loaded program, for `BPF_PROG_TEST_RUN`.
    pub fn program_fd(&self, program: &'static str) -> Result<std::os::fd::BorrowedFd<'_>, Error> {
        use std::os::fd::AsFd as _;
        let found = self.ebpf.program(program).ok_or(Error::NoProgram { program })?;
        Ok(found.fd().map_err(|source| Error::Program { program, source })?.as_fd())
    }

    /// Ids of our programs for interfaces: what else is there on tcx is somebody else's.
    pub fn interface_program_ids(&self) -> BTreeSet<u32> {
        let names = attach::POD_PROGRAMS.iter().chain(&attach::NETDEV_PROGRAMS);
        names.filter_map(|(name, _, _)| Some(self.ebpf.program(name)?.info().ok()?.id())).collect()
    }

    /// Instructions that the verifier walked, for each program (Linux 5.16; 0 before).
    pub fn verified_instructions(&self) -> Vec<(String, u32)> {
        self.ebpf
            .programs()
            .filter_map(|(name, program)| {
                Some((name.to_owned(), program.info().ok()?.verified_instruction_count().unwrap_or(0)))
            })
            .collect()
    }

    fn set_device(&mut self, ifindex: u32, entry: &DeviceEntry) -> Result<(), Error> {
        // The entry first: a program without it does nothing.
        self.maps.device.set(&ifindex, entry)?;
        let Some(programs) = attach::programs(entry) else {
            return attach::detach(&self.pins, ifindex);
        };
        match attach::attach(&mut self.ebpf, &self.pins, self.way, ifindex, programs) {
            Err(e) if e.is_interface_gone() => {
                self.maps.device.delete(&ifindex)?;
                attach::detach(&self.pins, ifindex)?;
                Err(e)
            }
            other => other,
        }
    }
}

/// Is there a tcx program on an interface that is not among `own`?
pub fn has_foreign_tcx(ifindex: u32, own: &BTreeSet<u32>) -> bool {
    attach::POD_PROGRAMS.iter().any(|(_, _, attach_type)| {
        sysbpf::query_tcx(ifindex, *attach_type).is_ok_and(|ids| ids.iter().any(|id| !own.contains(id)))
    })
}

/// Entries of a flow table that has to hold another version's as well.
fn room(upgrades: &[upgrade::Upgrade], name: &str, asked: u32) -> u32 {
    upgrades.iter().filter_map(|upgrade| upgrade.capacity(name)).fold(asked, u32::max)
}

/// Interfaces with programs of ours, by the pins.
fn attached(pins: &Pins) -> Result<BTreeSet<u32>, Error> {
    Ok(pins
        .list_links()?
        .into_iter()
        .filter_map(|pin| match pin {
            LinkPin::Tcx(_, ifindex) | LinkPin::Clsact(ifindex) => Some(ifindex),
            LinkPin::Cgroup(_) => None,
        })
        .collect())
}

fn load(pins: &Pins, config: &Config, set_retval: bool) -> Result<Ebpf, Error> {
    let cookie = sysbpf::netns_cookie().map_err(|source| Error::Attach {
        program: "connect4",
        target: "network namespace".to_owned(),
        source,
    })?;
    let directory = pins.maps();
    let mut loader = EbpfLoader::new();
    let set_retval = u32::from(set_retval);
    loader.override_global("NETNS_COOKIE", &cookie, true);
    loader.override_global("SET_RETVAL", &set_retval, true);
    loader.override_global("POD_QUOTA", &config.pod_quota, true);
    let node_open = u32::from(config.node_open);
    loader.override_global("NODE_OPEN", &node_open, true);
    loader.override_global("UDP_UNREPLIED", &config.udp_idle.unreplied, true);
    loader.override_global("UDP_ASSURED", &config.udp_idle.assured, true);
    let tracing = u32::from(!is_memory_hidden());
    loader.override_global("TRACING", &tracing, true);
    let socket_lb = u32::from(config.socket_lb == SocketLb::All);
    loader.override_global("SOCKET_LB", &socket_lb, true);
    loader.override_global("DRY_RUN", &0_u32, true);
    for layout in pins::LAYOUTS {
        loader.map_pin_path(layout.name, directory.join(layout.name));
    }
    for name in proxy_abi::trace::map::ALL {
        loader.map_pin_path(name, directory.join(name));
    }
    loader.map_max_entries(map_name::FLOW_LIVE, config.flow_live);
    loader.map_max_entries(map_name::FLOW_BRIEF, config.flow_brief);
    loader.map_max_entries(map_name::POD_SOCKET, config.pod_sockets());
    for (name, entries) in policy::entries(&config.policy) {
        loader.map_max_entries(name, entries);
    }
    let mut ebpf = loader.load(OBJECT).map_err(|e| Error::Object(Box::new(e)))?;
    for (program, _, _) in attach::POD_PROGRAMS.into_iter().chain(attach::NETDEV_PROGRAMS) {
        let found = ebpf.program_mut(program).ok_or(Error::NoProgram { program })?;
        let found: &mut SchedClassifier = found.try_into().map_err(|source| Error::Program { program, source })?;
        found.load().map_err(|source| Error::Program { program, source })?;
    }
    if config.cgroup.is_some() {
        for (program, _) in attach::CGROUP_PROGRAMS {
            let found = ebpf.program_mut(program).ok_or(Error::NoProgram { program })?;
            let found: &mut CgroupSockAddr = found.try_into().map_err(|source| Error::Program { program, source })?;
            found.load().map_err(|source| Error::Program { program, source })?;
        }
    }
    Ok(ebpf)
}

/// Must programs not read the kernel's memory here, not even for tracing?
fn is_memory_hidden() -> bool {
    std::fs::read_to_string("/sys/kernel/security/lockdown").is_ok_and(|text| text.contains("[confidentiality]"))
}

/// The row of an array map that says "nothing here".
pub(crate) const NO_BACKEND: BackendEntry = BackendEntry {
    ip: proxy_abi::IpBytes::UNSPECIFIED,
    service: 0,
    generation: 0,
    port: proxy_abi::PortBe(0),
    proto: Proto(0),
    reserved: 0,
    flags: 0,
};

impl Maps {
    /// Logs how large the flow tables are, and where that is not what was asked for.
    fn tell_sizes(&self, config: &Config) {
        for (flows, asked, flag) in [
            (&self.flow_live, config.flow_live, "--flow-live-entries"),
            (&self.flow_brief, config.flow_brief, "--flow-brief-entries"),
        ] {
            let (map, entries) = (flows.layout().name, flows.capacity());
            let bytes_when_full = sizing::bytes_when_full(flows.layout(), entries);
            tracing::info!(map, entries, bytes_when_full, "flow table");
            if entries != asked {
                tracing::warn!(
                    map,
                    entries,
                    asked,
                    "the pinned flow table keeps its size; to change it, stop the agent, run `proxy-agent cleanup` (connections \
                     through Services end) and start the agent, with {flag} if need be"
                );
            }
        }
    }

    /// Reads back what the agent owns. Rows of array maps that are zero are not named.
    pub fn tables(&self) -> Result<Tables, Error> {
        Ok(Tables {
            services: self.service.read()?.into_iter().collect(),
            backends: self.backend.read()?.into_iter().filter(|(_, b)| *b != NO_BACKEND).collect(),
            slots: self.slot.read()?.into_iter().filter(|(_, b)| *b != 0).collect(),
            frontends: self.frontend.read()?.into_iter().collect(),
            devices: self.device.read()?.into_iter().collect(),
            local_pods: self.local_pod.read()?.into_iter().collect(),
            prefixes: self.prefix.read()?.into_iter().collect(),
            cgroup_pods: self.cgroup_pod.read()?.into_iter().collect(),
        })
    }
}

impl Dataplane for Bpf {
    type Error = Error;

    fn load(&mut self) -> Result<Tables, Error> {
        let mut tables = self.maps.tables()?;
        // A device row without its programs is not there: the plan writes it again, and that attaches them.
        let attached = attached(&self.pins)?;
        tables.devices.retain(|ifindex, row| attach::programs(row).is_none() || attached.contains(ifindex));
        Ok(tables)
    }

    fn apply(&mut self, op: &Op) -> Result<(), Error> {
        match op {
            Op::SetService(id, entry) => self.maps.service.set(id, entry),
            Op::DeleteService(id) => self.maps.service.delete(id).map(|_| ()),
            Op::SetBackend(id, entry) => self.maps.backend.set(id, entry),
            Op::DeleteBackend(id) => self.delete_backend(*id),
            Op::SetSlot(slot, backend) => self.maps.slot.set(slot, backend),
            Op::DeleteSlot(slot) => self.maps.slot.set(slot, &0),
            Op::SetFrontend(key, entry) => self.maps.frontend.set(key, entry),
            Op::DeleteFrontend(key) => self.maps.frontend.delete(key).map(|_| ()),
            Op::SetDevice(ifindex, entry) => self.set_device(*ifindex, entry),
            Op::DeleteDevice(ifindex) => {
                attach::detach(&self.pins, *ifindex)?;
                self.maps.device.delete(ifindex).map(|_| ())
            }
            Op::SetLocalPod(ip, entry) => self.maps.local_pod.set(ip, entry),
            Op::DeleteLocalPod(ip) => self.maps.local_pod.delete(ip).map(|_| ()),
            Op::SetPrefix(key, value) => self.maps.prefix.set(key, value),
            Op::DeletePrefix(key) => self.maps.prefix.delete(key).map(|_| ()),
            Op::SetCgroupPod(id, entry) => self.maps.cgroup_pod.set(id, entry),
            Op::DeleteCgroupPod(id) => self.maps.cgroup_pod.delete(id).map(|_| ()),
        }
    }

    fn apply_batch(&mut self, ops: &[Op]) -> Vec<Result<(), Error>> {
        macro_rules! batch {
            ($map:ident, $variant:ident) => {{
                let rows: Option<(Vec<_>, Vec<_>)> =
                    ops.iter().map(|op| if let Op::$variant(k, v) = op { Some((*k, *v)) } else { None }).collect();
                if let Some((keys, values)) = rows {
                    return self.maps.$map.set_all(&keys, &values);
                }
            }};
        }
        match ops {
            [Op::SetService(..), _, ..] => batch!(service, SetService),
            [Op::SetBackend(..), _, ..] => batch!(backend, SetBackend),
            [Op::SetSlot(..), _, ..] => batch!(slot, SetSlot),
            [Op::SetFrontend(..), _, ..] => batch!(frontend, SetFrontend),
            [Op::SetPrefix(..), _, ..] => batch!(prefix, SetPrefix),
            _ => {}
        }
        ops.iter().map(|op| self.apply(op)).collect()
    }
}

/// Leaves TCP connections to what translates them now: each gets an entry as a direct flow, so that its segments pass
/// untouched. Without one a segment to a Service in the middle of an unknown connection drops. Another entry, as the backend
/// sees the connection, keeps its port from being taken for one that is masqueraded here. Returns how many were new.
pub fn adopt(maps: &Maps, connections: &[Translated], now: u64) -> Result<usize, Error> {
    let mut adopted = 0;
    for connection in connections {
        let asked = adopt_one(maps, connection.from, connection.to, now)?;
        adopt_one(maps, connection.seen, connection.backend, now)?;
        adopted += usize::from(asked);
    }
    Ok(adopted)
}

/// A direct flow that is established, unless something is known of it. Was it not?
fn adopt_one(maps: &Maps, from: SocketAddr, to: SocketAddr, now: u64) -> Result<bool, Error> {
    let tuple = Tuple {
        src: from.ip().into(),
        dst: to.ip().into(),
        src_port: PortBe::new(from.port()),
        dst_port: PortBe::new(to.port()),
    };
    let key = tuple.key(Proto::TCP, tuple.dst.family(), FlowKey::SIDE_COMMON);
    if maps.flow_live.get(&key)?.is_some() || maps.flow_brief.get(&key)?.is_some() {
        return Ok(false);
    }
    let entry = FlowEntry {
        original: tuple,
        translated: tuple,
        last_seen: now,
        flags: FlowEntry::KEY_ORIGINAL | FlowEntry::KEY_TRANSLATED,
        state: state::ESTABLISHED,
        ..FlowEntry::NONE
    };
    maps.flow_live.set(&key, &entry)?;
    Ok(true)
}
