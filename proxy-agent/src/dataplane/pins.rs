//! What is pinned, and where.
//!
//! ```text
//!   /sys/fs/bpf/proxy-agent/       --pin-root
//!     v2/                          version of all layouts: two versions never share a map
//!       maps/frontend, …           one for each of [`LAYOUTS`]
//!       maps/layout                what they look like, field by field, for an agent of another version
//!       links/from_pod_7           tcx link of interface 7: the kernel keeps forwarding while the agent is away
//!       links/to_pod_7
//!       links/clsact_9/            no link: interface 9 has clsact filters (Linux < 6.6, or asked for)
//!       links/clsact_9/qdisc/      and its queueing discipline is ours, too
//!       links/connect4, …          cgroup links
//! ```
//!
//! Another version's directory is there until its flows are carried over: see [`super::upgrade`].
//!
//! A restarted agent recognises all of its kernel state by these names.

use std::collections::BTreeMap;
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::{fs, io};

use aya::maps::MapType;
use nix::fcntl::{Flock, FlockArg};
use nix::sys::statfs::{BPF_FS_MAGIC, statfs};
use proxy_abi::policy::{
    Bits, BitsKey, BlockEntry, CellEntry, CellWord, HitsEntry, PodDigest, PodHits, PortPage, SetEntry, SlotWord,
    map as policy_map,
};
use proxy_abi::{
    ABI_VERSION, AffinityEntry, AffinityKey, BackendEntry, CgroupPodEntry, CounterEntry, DeviceEntry, FlowEntry,
    FlowKey, FragmentEntry, FragmentKey, FrontendEntry, FrontendKey, IpBytes, LocalPodEntry, PrefixKey, ServiceEntry,
    SocketEntry, SocketKey, map,
};

use super::map::{Layout, Map, size_u32};
use super::policy::PolicyMaps;
use super::{Error, NO_BACKEND, sizing};

const fn layout<K, V>(name: &'static str, kind: MapType) -> Layout {
    Layout { name, kind, key: size_u32::<K>(), value: size_u32::<V>() }
}

/// Every pinned map.
pub const LAYOUTS: [Layout; 28] = [
    layout::<u32, ServiceEntry>(map::SERVICE, MapType::Hash),
    layout::<u32, BackendEntry>(map::BACKEND, MapType::Array),
    layout::<u32, u32>(map::BACKEND_SLOT, MapType::Array),
    layout::<FrontendKey, FrontendEntry>(map::FRONTEND, MapType::Hash),
    layout::<u32, DeviceEntry>(map::DEVICE, MapType::Hash),
    layout::<IpBytes, LocalPodEntry>(map::LOCAL_POD, MapType::Hash),
    layout::<FlowKey, FlowEntry>(map::FLOW_LIVE, MapType::Hash),
    layout::<FlowKey, FlowEntry>(map::FLOW_BRIEF, MapType::LruHash),
    layout::<FragmentKey, FragmentEntry>(map::FRAGMENT, MapType::LruHash),
    layout::<SocketKey, SocketEntry>(map::SOCKET, MapType::LruHash),
    layout::<u32, CounterEntry>(map::COUNTER, MapType::PerCpuArray),
    layout::<PrefixKey, u32>(map::PREFIX, MapType::LpmTrie),
    layout::<AffinityKey, AffinityEntry>(map::AFFINITY, MapType::LruHash),
    layout::<u32, u64>(map::POD_FLOWS, MapType::Hash),
    layout::<u64, CgroupPodEntry>(map::CGROUP_POD, MapType::Hash),
    layout::<SocketKey, SocketEntry>(map::POD_SOCKET, MapType::LruHash),
    layout::<u32, u32>(policy_map::EPOCH, MapType::Array),
    layout::<u32, SlotWord>(policy_map::SLOT, MapType::Array),
    layout::<u32, PodDigest>(policy_map::POD, MapType::Hash),
    layout::<u32, BlockEntry>(policy_map::BLOCK, MapType::Array),
    layout::<u32, SetEntry>(policy_map::SET, MapType::Array),
    layout::<IpBytes, CellWord>(policy_map::IP, MapType::Hash),
    layout::<PrefixKey, CellWord>(policy_map::PREFIX, MapType::LpmTrie),
    layout::<u32, PortPage>(policy_map::PAGE, MapType::Array),
    layout::<u32, CellEntry>(policy_map::CELL, MapType::Hash),
    layout::<BitsKey, Bits>(policy_map::BITS, MapType::Hash),
    layout::<u32, HitsEntry>(policy_map::HITS, MapType::Hash),
    layout::<u32, PodHits>(policy_map::POD_HITS, MapType::Array),
];

/// The pin directory of this version.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Pins {
    root: PathBuf,
    version: u32,
}

/// Held by the one agent that works on a pin directory.
pub type Lock = Flock<fs::File>;

/// All maps, open.
#[derive(Debug)]
#[expect(missing_docs, reason = "each is named after its map; see proxy_abi")]
pub struct Maps {
    pub service: Map<u32, ServiceEntry>,
    pub backend: Map<u32, BackendEntry>,
    pub slot: Map<u32, u32>,
    pub frontend: Map<FrontendKey, FrontendEntry>,
    pub device: Map<u32, DeviceEntry>,
    pub local_pod: Map<IpBytes, LocalPodEntry>,
    pub prefix: Map<PrefixKey, u32>,
    pub affinity: Map<AffinityKey, AffinityEntry>,
    pub pod_flows: Map<u32, u64>,
    pub flow_live: Map<FlowKey, FlowEntry>,
    pub flow_brief: Map<FlowKey, FlowEntry>,
    pub socket: Map<SocketKey, SocketEntry>,
    pub cgroup_pod: Map<u64, CgroupPodEntry>,
    pub pod_socket: Map<SocketKey, SocketEntry>,
    pub counter: Map<u32, CounterEntry>,
    pub policy: PolicyMaps,
}

/// How full a map is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Usage {
    /// Its name.
    pub map: &'static str,
    /// Entries in use.
    pub used: usize,
    /// Entries that fit.
    pub capacity: u32,
    /// Bytes that the kernel holds for it, as [`Map::memory`] tells.
    pub bytes: Option<u64>,
    /// Bytes when it is full, as [`sizing::bytes_when_full`] tells.
    pub bytes_full: Option<u64>,
}

impl Maps {
    /// How full each map is. Entries are counted batch by batch, and none is kept.
    ///
    /// # Errors
    /// When a map cannot be read.
    pub fn usage(&self) -> Result<Vec<Usage>, Error> {
        let any = |layout: &Layout, used, capacity, bytes| Usage {
            map: layout.name,
            used,
            capacity,
            bytes,
            bytes_full: sizing::bytes_when_full(layout, capacity),
        };
        let mut all = Vec::new();
        macro_rules! count {
            ($($($field:ident).+ $used:expr;)+) => { $({
                let map = &self.$($field).+;
                all.push(any(map.layout(), map.count($used)?, map.capacity(), map.memory()));
            })+ };
        }
        count! {
            service |_, _| true;
            frontend |_, _| true;
            backend |_, entry| *entry != NO_BACKEND;
            device |_, _| true;
            local_pod |_, _| true;
            prefix |_, _| true;
            flow_live |_, _| true;
            flow_brief |_, _| true;
            affinity |_, _| true;
            socket |_, _| true;
            cgroup_pod |_, _| true;
            pod_socket |_, _| true;
            pod_flows |_, _| true;
            policy.slot |_, word| word.block != 0;
            policy.pod |_, _| true;
            policy.block |id, block| *id == BlockEntry::OPEN_ID || *block != BlockEntry::OPEN;
            policy.set |_, set| set.digest != [0; 2];
            policy.ip |_, _| true;
            policy.prefix |_, _| true;
            policy.page |_, page| *page != PortPage::ZERO;
            policy.cell |_, _| true;
            policy.bits |_, _| true;
            policy.hits |_, _| true;
        }
        // By the ranges that frontends own: to look at every slot would take longer than all else.
        let mut ranges = BTreeMap::new();
        self.frontend.scan(|_, entry| {
            ranges.insert(entry.first, entry.count as usize);
            ControlFlow::Continue(())
        })?;
        let slots = &self.slot;
        all.push(any(slots.layout(), ranges.values().sum(), slots.capacity(), slots.memory()));
        Ok(all)
    }
}

/// A name in the directory of links.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum LinkPin {
    /// A tcx link: program and interface.
    Tcx(String, u32),
    /// The mark of an interface with clsact filters.
    Clsact(u32),
    /// A cgroup link: program.
    Cgroup(String),
}

impl Pins {
    /// Under a root such as `/sys/fs/bpf/proxy-agent`.
    pub fn new(root: &Path) -> Self {
        Self { root: root.to_owned(), version: ABI_VERSION }
    }

    /// The directories of other versions under the same root, the newest first.
    pub fn others(&self) -> Result<Vec<Self>, Error> {
        let pin = |source| Error::Pin { path: self.root.clone(), source };
        let mut versions = Vec::new();
        for entry in fs::read_dir(&self.root).map_err(pin)? {
            let name = entry.map_err(pin)?.file_name();
            let version: Option<u32> = name.to_str().and_then(|name| name.strip_prefix('v')?.parse().ok());
            versions.extend(version.filter(|version| *version != self.version));
        }
        versions.sort_unstable_by(|a, b| b.cmp(a));
        Ok(versions.into_iter().map(|version| Self { root: self.root.clone(), version }).collect())
    }

    /// Version of the layouts in this directory.
    pub const fn version_number(&self) -> u32 {
        self.version
    }

    /// `--pin-root`.
    pub fn root(&self) -> &Path {
        &self.root
    }

    fn version(&self) -> PathBuf {
        self.root.join(format!("v{}", self.version))
    }

    /// Directory of the maps.
    pub fn maps(&self) -> PathBuf {
        self.version().join("maps")
    }

    /// Directory of the links.
    pub fn links(&self) -> PathBuf {
        self.version().join("links")
    }

    /// Path of one link.
    pub fn link(&self, pin: &LinkPin) -> PathBuf {
        self.links().join(match pin {
            LinkPin::Tcx(program, ifindex) => format!("{program}_{ifindex}"),
            LinkPin::Clsact(ifindex) => format!("clsact_{ifindex}"),
            LinkPin::Cgroup(program) => program.clone(),
        })
    }

    /// Stands in the mark of an interface whose clsact queueing discipline we made: it goes with our filters.
    pub fn made_qdisc(&self, ifindex: u32) -> PathBuf {
        self.link(&LinkPin::Clsact(ifindex)).join("qdisc")
    }

    /// Makes the directories. They must lie on a bpffs: elsewhere nothing can be pinned.
    pub fn create(&self) -> Result<(), Error> {
        let mut above = self.root.as_path();
        while !above.exists() {
            let Some(parent) = above.parent() else { break };
            above = parent;
        }
        let kind = statfs(above).map_err(|e| Error::pin(above, e.into()))?;
        if kind.filesystem_type() != BPF_FS_MAGIC {
            return Err(Error::NoBpffs { path: self.root.clone() });
        }
        for path in [self.maps(), self.links()] {
            fs::create_dir_all(&path).map_err(|source| Error::pin(&path, source))?;
        }
        Ok(())
    }

    /// Makes this process the only one that writes here, until the lock is dropped or the process ends, however it ends.
    pub fn lock(&self) -> Result<Lock, Error> {
        let directory = fs::File::open(&self.root).map_err(|source| Error::Pin { path: self.root.clone(), source })?;
        Flock::lock(directory, FlockArg::LockExclusiveNonblock).map_err(|(_, errno)| {
            if errno == nix::errno::Errno::EWOULDBLOCK {
                Error::Locked { path: self.root.clone() }
            } else {
                Error::Pin { path: self.root.clone(), source: errno.into() }
            }
        })
    }

    /// Compares every map that is already pinned with its layout.
    pub fn check(&self) -> Result<(), Error> {
        for layout in LAYOUTS {
            let path = self.maps().join(layout.name);
            if path.exists() {
                layout.check(&path)?;
            }
        }
        Ok(())
    }

    /// Takes away the pin of a map that has another number of entries, so that it is made anew. Programs that have it go on
    /// with it until they are swapped; then what it holds is forgotten.
    pub fn resize(&self, name: &str, entries: u32) -> Result<(), Error> {
        let path = self.maps().join(name);
        let Some(layout) = LAYOUTS.iter().find(|layout| layout.name == name).filter(|_| path.exists()) else {
            return Ok(());
        };
        if layout.check(&path)?.max_entries() == entries {
            return Ok(());
        }
        fs::remove_file(&path).map_err(|source| Error::pin(&path, source))
    }

    /// Opens all maps.
    pub fn open(&self) -> Result<Maps, Error> {
        let directory = self.maps();
        if !directory.exists() {
            return Err(Error::NotRunning { path: directory });
        }
        let [
            service,
            backend,
            slot,
            frontend,
            device,
            local_pod,
            live,
            brief,
            _,
            socket,
            counter,
            prefix,
            affinity,
            pod_flows,
            cgroup_pod,
            pod_socket,
            ..,
        ] = LAYOUTS;
        Ok(Maps {
            service: Map::open(&directory, service)?,
            backend: Map::open(&directory, backend)?,
            slot: Map::open(&directory, slot)?,
            frontend: Map::open(&directory, frontend)?,
            device: Map::open(&directory, device)?,
            local_pod: Map::open(&directory, local_pod)?,
            prefix: Map::open(&directory, prefix)?,
            affinity: Map::open(&directory, affinity)?,
            pod_flows: Map::open(&directory, pod_flows)?,
            flow_live: Map::open(&directory, live)?,
            flow_brief: Map::open(&directory, brief)?,
            socket: Map::open(&directory, socket)?,
            cgroup_pod: Map::open(&directory, cgroup_pod)?,
            pod_socket: Map::open(&directory, pod_socket)?,
            counter: Map::open(&directory, counter)?,
            policy: PolicyMaps::open(&directory)?,
        })
    }

    /// The links that are pinned.
    pub fn list_links(&self) -> Result<Vec<LinkPin>, Error> {
        let path = self.links();
        let pin = |source| Error::Pin { path: path.clone(), source };
        let mut links = Vec::new();
        let entries = match fs::read_dir(&path) {
            // A directory that was being made or removed when its agent was killed.
            Err(source) if source.kind() == io::ErrorKind::NotFound => return Ok(links),
            entries => entries.map_err(pin)?,
        };
        for entry in entries {
            let name = entry.map_err(pin)?.file_name().to_string_lossy().into_owned();
            links.push(match name.rsplit_once('_').and_then(|(p, i)| Some((p, i.parse().ok()?))) {
                Some(("clsact", ifindex)) => LinkPin::Clsact(ifindex),
                Some((program, ifindex)) => LinkPin::Tcx(program.to_owned(), ifindex),
                None => LinkPin::Cgroup(name),
            });
        }
        links.sort();
        Ok(links)
    }

    /// Removes a link's pin, which detaches its program unless somebody else holds the link.
    pub fn remove_link(&self, pin: &LinkPin) -> Result<(), Error> {
        let path = self.link(pin);
        let removed =
            if matches!(pin, LinkPin::Clsact(_)) { fs::remove_dir_all(&path) } else { fs::remove_file(&path) };
        match removed {
            Err(source) if source.kind() != io::ErrorKind::NotFound => Err(Error::Pin { path, source }),
            _ => Ok(()),
        }
    }

    /// Removes this version's directory. Pins of links that are still in it detach.
    pub fn remove_version(&self) -> Result<(), Error> {
        let path = self.version();
        match fs::remove_dir_all(&path) {
            Err(source) if source.kind() != io::ErrorKind::NotFound => Err(Error::Pin { path, source }),
            _ => Ok(()),
        }
    }

    /// Removes the whole root with all versions under it.
    pub fn remove(&self) -> Result<(), Error> {
        match fs::remove_dir_all(&self.root) {
            Err(source) if source.kind() != io::ErrorKind::NotFound => {
                Err(Error::Pin { path: self.root.clone(), source })
            }
            _ => Ok(()),
        }
    }
}
