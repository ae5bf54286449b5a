//! The probes of `proxy-agent trace`: loaded for one reader, and gone with its descriptors, however it ends.
//!
//! ```text
//!   trace, trace_packet, trace_ring   pinned by the agent: opened, where they are; else private like all others
//!   links, programs, other maps       private: nothing is pinned
//! ```

use std::fs::File;
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::os::fd::{AsFd as _, AsRawFd as _};
use std::path::{Path, PathBuf};

use aya::maps::{Array, HashMap, MapData, PerCpuArray, RingBuf, StackTraceMap};
use aya::programs::{BtfTracePoint, Iter, ProgramError, SchedClassifier, Xdp};
use aya::{Btf, Ebpf, EbpfError, EbpfLoader};
use nix::fcntl::{Flock, FlockArg};
use proxy_abi::trace::{
    self, TraceControl, TraceDecision, TraceDropKey, TraceDrops, TraceEnd, TraceEvent, TraceFilter, TraceHookEntry,
    TraceHookKey, TracePacket, TraceRow, listener,
};

use super::pins::Pins;

pub(super) static OBJECT: &[u8] = aya::include_bytes_aligned!(concat!(env!("OUT_DIR"), "/trace.o"));

/// Program and tracepoint.
const FOLLOWING: [(&str, &str); 5] = [
    ("transmit", "net_dev_start_xmit"),
    ("dropped", "kfree_skb"),
    ("consumed", "consume_skb"),
    ("queue", "net_dev_queue"),
    ("receive", "netif_receive_skb"),
];
const GROUPING: [(&str, &str); 1] = [("drops", "kfree_skb")];
const NAMESPACES: &str = "namespaces";

/// Entries of packets that have not been seen for so long go, in nanoseconds.
const FORGOTTEN: u64 = 2_000_000_000;

/// Why there is no tracing.
#[derive(Debug, thiserror::Error)]
pub enum ProbeError {
    /// Somebody else traces.
    #[error("another trace runs on this node; one at a time")]
    Busy,
    /// The lock cannot be taken.
    #[error("lock {path}")]
    Lock {
        /// What is locked.
        path: PathBuf,
        /// Why not.
        source: io::Error,
    },
    /// The object was refused.
    #[error("the kernel refused the probes; `trace doctor` tells what it lacks")]
    Object(#[source] Box<EbpfError>),
    /// A program was refused.
    #[error("probe {program}: the kernel refused it; `trace doctor` tells what it lacks")]
    Program {
        /// The program.
        program: &'static str,
        /// Why.
        source: Box<ProgramError>,
    },
    /// The kernel's types cannot be read.
    #[error("the kernel's types cannot be read")]
    Types(#[source] aya::BtfError),
    /// The object has no such map.
    #[error("the probes have no map {0}: the object was built from other sources")]
    NoMap(&'static str),
    /// A map operation failed.
    #[error("map {map}")]
    Map {
        /// The map.
        map: &'static str,
        /// Why.
        source: Box<aya::maps::MapError>,
    },
    /// The list of hooks cannot be read.
    #[error("read the iterator over tasks")]
    Iterator(#[source] io::Error),
    /// A program that is run by itself did not run.
    #[error("run {program}")]
    Run {
        /// The program.
        program: &'static str,
        /// Why not.
        source: io::Error,
    },
}

/// What is loaded.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Probing {
    /// Packets are followed.
    Packets,
    /// Drops are grouped.
    Drops,
    /// Nothing is watched: the list of hooks, and who listens.
    Hooks,
}

/// What a ring gave.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Told {
    /// A program of the dataplane decided.
    Decision(TraceDecision),
    /// A tracepoint.
    Event(TraceEvent),
}

/// What the probes cost: the sum of all programs.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Cost {
    /// Nanoseconds, while statistics are on.
    pub run_time: u64,
    /// Runs meanwhile.
    pub runs: u64,
    /// Runs that were left out because the program ran on that CPU already. Not of the one that sees packets end well:
    /// it is interrupted often, and says nothing that a packet's last step does not.
    pub misses: u64,
}

/// Loaded and attached probes.
pub struct Probes {
    ebpf: Ebpf,
    decisions: Option<RingBuf<MapData>>,
    events: RingBuf<MapData>,
    stacks: StackTraceMap<MapData>,
    shared: bool,
    head_offset: u32,
    lost_before: u64,
    programs: &'static [(&'static str, &'static str)],
    _lock: Option<Flock<File>>,
}

impl std::fmt::Debug for Probes {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Probes").field("programs", &self.programs).field("shared", &self.shared).finish_non_exhaustive()
    }
}

pub(super) fn map_error(map: &'static str) -> impl FnOnce(aya::maps::MapError) -> ProbeError {
    move |source| ProbeError::Map { map, source: Box::new(source) }
}

fn v6(ip: IpAddr) -> [u8; 16] {
    match ip {
        IpAddr::V4(ip) => ip.to_ipv6_mapped().octets(),
        IpAddr::V6(ip) => ip.octets(),
    }
}

/// Held by the one reader of this network namespace.
fn lock() -> Result<Flock<File>, ProbeError> {
    let path = Path::new("/proc/self/ns/net");
    let wrong = |source| ProbeError::Lock { path: path.to_owned(), source };
    let file = File::open(path).map_err(wrong)?;
    Flock::lock(file, FlockArg::LockExclusiveNonblock).map_err(|(_, errno)| {
        if errno == nix::errno::Errno::EWOULDBLOCK { ProbeError::Busy } else { wrong(errno.into()) }
    })
}

impl Probes {
    /// Loads and attaches. `offsets` are the constants of the object by name, `buffer` the bytes of the ring, a power of
    /// two. Nothing is followed before [`Probes::follow`].
    ///
    /// # Errors
    /// [`ProbeError::Busy`] while another reader runs in this network namespace, or what the kernel refused.
    pub fn open(
        pins: Option<&Pins>,
        offsets: &[(&'static str, u32)],
        buffer: u32,
        what: Probing,
    ) -> Result<Self, ProbeError> {
        // Who watches nothing is in nobody's way.
        let lock = if what == Probing::Hooks { None } else { Some(lock()?) };
        let types = Btf::from_sys_fs().map_err(ProbeError::Types)?;
        let shared = pins.map(Pins::maps).filter(|maps| trace::map::ALL.iter().all(|name| maps.join(name).exists()));
        let mut loader = EbpfLoader::new();
        for (name, value) in offsets {
            loader.override_global(name, value, true);
        }
        loader.map_max_entries("trace_event", buffer);
        if let Some(maps) = &shared {
            for name in [trace::map::TRACE, trace::map::TRACE_PACKET] {
                loader.map_pin_path(name, maps.join(name));
            }
        }
        let mut ebpf = loader.load(OBJECT).map_err(|e| ProbeError::Object(Box::new(e)))?;
        let programs: &'static [_] = match what {
            Probing::Packets => &FOLLOWING,
            Probing::Drops => &GROUPING,
            Probing::Hooks => &[],
        };
        for (program, tracepoint) in programs {
            let refused = |source| ProbeError::Program { program, source: Box::new(source) };
            let found: &mut BtfTracePoint =
                ebpf.program_mut(program).ok_or(ProbeError::NoMap(program))?.try_into().map_err(refused)?;
            found.load(tracepoint, &types).map_err(refused)?;
            found.attach().map_err(refused)?;
        }
        let take = |ebpf: &mut Ebpf, name| ebpf.take_map(name).ok_or(ProbeError::NoMap(name));
        let events = RingBuf::try_from(take(&mut ebpf, "trace_event")?).map_err(map_error("trace_event"))?;
        let stacks = StackTraceMap::try_from(take(&mut ebpf, "trace_stack")?).map_err(map_error("trace_stack"))?;
        let decisions = match &shared {
            Some(maps) => {
                let data = MapData::from_pin(maps.join(trace::map::TRACE_RING)).map_err(map_error("trace_ring"))?;
                let map = aya::maps::Map::RingBuf(data);
                Some(RingBuf::try_from(map).map_err(map_error("trace_ring"))?)
            }
            None => None,
        };
        let head_offset = offsets.iter().find(|(name, _)| *name == "SKB_HEAD").map_or(0, |(_, offset)| *offset);
        let mut probes = Self {
            ebpf,
            decisions,
            events,
            stacks,
            shared: shared.is_some(),
            head_offset,
            lost_before: 0,
            programs,
            _lock: lock,
        };
        if what == Probing::Packets {
            // Another reader may have left these when it was killed.
            probes.lost_before = probes.control()?.lost;
            probes.forget(u64::MAX)?;
            probes.read(&mut |_| ());
        }
        Ok(probes)
    }

    /// Are the decisions of the dataplane told as well?
    pub const fn has_decisions(&self) -> bool {
        self.shared
    }

    fn array<V: aya::Pod>(&mut self, name: &'static str) -> Result<Array<&mut MapData, V>, ProbeError> {
        let map = self.ebpf.map_mut(name).ok_or(ProbeError::NoMap(name))?;
        Array::try_from(map).map_err(map_error(name))
    }

    fn hash<K: aya::Pod, V: aya::Pod>(
        &mut self,
        name: &'static str,
    ) -> Result<HashMap<&mut MapData, K, V>, ProbeError> {
        let map = self.ebpf.map_mut(name).ok_or(ProbeError::NoMap(name))?;
        HashMap::try_from(map).map_err(map_error(name))
    }

    /// Begins to follow what matches, or something else from now on. [`TraceFilter::ends`] is filled in here.
    ///
    /// # Errors
    /// [`ProbeError::Map`], also when there are more ends than room.
    pub fn follow(
        &mut self,
        filter: &TraceFilter,
        ends: &[(TraceEnd, u32)],
        rows: &[TraceRow],
    ) -> Result<(), ProbeError> {
        let filter =
            TraceFilter { ends: ends.iter().fold(0, |bits, (end, _)| bits | TraceFilter::bit_of(&end.ip)), ..*filter };
        let off = TraceFilter { flags: 0, ..filter };
        self.array::<TraceFilter>("trace_filter")?.set(0, off, 0).map_err(map_error("trace_filter"))?;
        let mut map = self.hash::<TraceEnd, u32>("trace_end")?;
        for (end, sides) in ends {
            map.insert(end, sides, 0).map_err(map_error("trace_end"))?;
        }
        let mut map = self.array::<TraceRow>("trace_row")?;
        for (index, row) in (0..trace::ROWS).zip(rows) {
            map.set(index, row, 0).map_err(map_error("trace_row"))?;
        }
        // What is followed no more is nobody's.
        self.array::<TraceControl>("trace")?.set(trace::FOLLOWED, TraceControl::OFF, 0).map_err(map_error("trace"))?;
        self.array::<TraceFilter>("trace_filter")?.set(0, filter, 0).map_err(map_error("trace_filter"))
    }

    /// The programs of the dataplane tell their decisions until then (CLOCK_MONOTONIC, nanoseconds; 0 = no more).
    ///
    /// # Errors
    /// [`ProbeError::Map`].
    pub fn tell_until(&mut self, until: u64) -> Result<(), ProbeError> {
        let head_offset = self.head_offset;
        let now = self.control()?;
        let control = TraceControl { until, head_offset, ..now };
        self.array::<TraceControl>("trace")?.set(trace::CONTROL, control, 0).map_err(map_error("trace"))
    }

    fn control(&mut self) -> Result<TraceControl, ProbeError> {
        self.array("trace")?.get(&trace::CONTROL, 0).map_err(map_error("trace"))
    }

    /// Decisions that found no room since [`Probes::open`].
    ///
    /// # Errors
    /// [`ProbeError::Map`].
    pub fn lost_decisions(&mut self) -> Result<u64, ProbeError> {
        Ok(self.control()?.lost.saturating_sub(self.lost_before))
    }

    /// Counters of the probes, by [`trace::count`].
    ///
    /// # Errors
    /// [`ProbeError::Map`].
    pub fn counts(&mut self) -> Result<Vec<u64>, ProbeError> {
        let map = self.ebpf.map_mut("trace_count").ok_or(ProbeError::NoMap("trace_count"))?;
        let map: PerCpuArray<&mut MapData, u64> = PerCpuArray::try_from(map).map_err(map_error("trace_count"))?;
        let sum = |index| Ok(map.get(&index, 0).map_err(map_error("trace_count"))?.iter().sum());
        (0..trace::COUNTS).map(sum).collect()
    }

    /// Hands over all that the rings hold now.
    pub fn read(&mut self, each: &mut dyn FnMut(Told)) {
        while let Some(item) = self.events.next() {
            if let Some(event) = event(&item) {
                each(Told::Event(event));
            }
        }
        if let Some(decisions) = &mut self.decisions {
            while let Some(item) = decisions.next() {
                if let Some(decision) = decision(&item) {
                    each(Told::Decision(decision));
                }
            }
        }
    }

    /// The ring of events, to wait for: readable when it holds something.
    pub fn events_fd(&self) -> std::os::fd::RawFd {
        self.events.as_raw_fd()
    }

    /// Addresses of a stack, the innermost first.
    pub fn stack(&self, id: u32) -> Vec<u64> {
        self.stacks
            .get(&id, 0)
            .map_or_else(|_| Vec::new(), |stack| stack.frames().iter().map(|frame| frame.ip).collect())
    }

    /// Forgets packets that have not been seen for two seconds; with `u64::MAX` all.
    ///
    /// # Errors
    /// [`ProbeError::Map`].
    pub fn forget(&mut self, now: u64) -> Result<(), ProbeError> {
        let mut map = self.hash::<u64, TracePacket>("trace_packet")?;
        let old: Vec<u64> = map
            .iter()
            .flatten()
            .filter(|(_, packet)| now.saturating_sub(packet.last) > FORGOTTEN)
            .map(|(address, _)| address)
            .collect();
        for address in old {
            match map.remove(&address) {
                // A probe was faster.
                Ok(()) | Err(aya::maps::MapError::KeyNotFound) => {}
                Err(aya::maps::MapError::SyscallError(e)) if e.io_error.raw_os_error() == Some(libc::ENOENT) => {}
                Err(error) => return Err(map_error("trace_packet")(error)),
            }
        }
        Ok(())
    }

    /// The groups of drops.
    ///
    /// # Errors
    /// [`ProbeError::Map`].
    pub fn drops(&mut self) -> Result<Vec<(TraceDropKey, TraceDrops)>, ProbeError> {
        Ok(self.hash("trace_drop")?.iter().flatten().collect())
    }

    /// What is registered at netfilter's hooks, in every network namespace that a task lives in.
    ///
    /// # Errors
    /// [`ProbeError::Program`] without iterators, [`ProbeError::Iterator`].
    pub fn hooks(&mut self) -> Result<Vec<(TraceHookKey, TraceHookEntry)>, ProbeError> {
        let refused = |source| ProbeError::Program { program: NAMESPACES, source: Box::new(source) };
        let types = Btf::from_sys_fs().map_err(ProbeError::Types)?;
        let program: &mut Iter =
            self.ebpf.program_mut(NAMESPACES).ok_or(ProbeError::NoMap(NAMESPACES))?.try_into().map_err(refused)?;
        program.load("task", &types).map_err(refused)?;
        let link = program.attach().map_err(refused)?;
        let link = program.take_link(link).map_err(refused)?;
        let mut file = link.into_file().map_err(|e| ProbeError::Iterator(io::Error::other(e)))?;
        io::copy(&mut file, &mut io::sink()).map_err(ProbeError::Iterator)?;
        Ok(self.hash("trace_hook")?.iter().flatten().collect())
    }

    /// Would a packet that goes from one end to the other find a socket in a network namespace? `nsid`: its id in this
    /// one, negative for this one itself; `ifindex`: an interface of this namespace that the packet is taken to be at.
    ///
    /// # Errors
    /// [`ProbeError::Program`], [`ProbeError::Run`] when there is no such interface.
    pub fn listens(
        &mut self,
        (from, to): (SocketAddr, SocketAddr),
        is_tcp: bool,
        nsid: i32,
        ifindex: u32,
    ) -> Result<bool, ProbeError> {
        let name = if is_tcp { "listener_tcp" } else { "listener_udp" };
        let refused = |source| ProbeError::Program { program: name, source: Box::new(source) };
        let mut words = listener::Question::default();
        let (bytes, v4): (Vec<u8>, u32) = match (from.ip(), to.ip()) {
            (IpAddr::V4(from), IpAddr::V4(to)) => ([from.octets(), to.octets()].concat(), 1),
            (from, to) => ([v6(from), v6(to)].concat(), 0),
        };
        let ports = [from.port().to_be_bytes(), to.port().to_be_bytes()].concat();
        for (word, bytes) in words.iter_mut().zip([bytes, ports].concat().chunks_exact(4)) {
            *word = bytes.try_into().map_or(0, u32::from_ne_bytes);
        }
        words[listener::NAMESPACE] = nsid.cast_unsigned();
        words[listener::V4] = v4;
        self.array::<listener::Question>("trace_listener")?.set(0, words, 0).map_err(map_error("trace_listener"))?;
        let program: &mut SchedClassifier =
            self.ebpf.program_mut(name).ok_or(ProbeError::NoMap(name))?.try_into().map_err(refused)?;
        match program.load() {
            Ok(()) | Err(ProgramError::AlreadyLoaded) => {}
            Err(error) => return Err(refused(error)),
        }
        // The kernel wants a frame with a header of IP.
        let mut frame = [0_u8; 64];
        frame[12..14].copy_from_slice(&[0x08, 0x00]);
        let fd = program.fd().map_err(refused)?.as_fd();
        let run = super::sysbpf::test_run(fd, &frame, (ifindex, 0), 1);
        let run = run.map_err(|source| ProbeError::Run { program: name, source })?;
        Ok(run.verdict.cast_signed() == listener::FOUND)
    }

    /// Lets a frame arrive at an interface of this namespace, as if the other end of a veth had sent it.
    ///
    /// # Errors
    /// [`ProbeError::Program`], [`ProbeError::Run`] when there is no such interface.
    pub fn arrive(&mut self, frame: &[u8], ifindex: u32) -> Result<(), ProbeError> {
        const NAME: &str = "arrive";
        let refused = |source| ProbeError::Program { program: NAME, source: Box::new(source) };
        let program: &mut Xdp =
            self.ebpf.program_mut(NAME).ok_or(ProbeError::NoMap(NAME))?.try_into().map_err(refused)?;
        match program.load() {
            Ok(()) | Err(ProgramError::AlreadyLoaded) => {}
            Err(error) => return Err(refused(error)),
        }
        let fd = program.fd().map_err(refused)?.as_fd();
        super::sysbpf::arrive(fd, frame, ifindex).map_err(|source| ProbeError::Run { program: NAME, source })
    }

    /// What the probes have cost so far, by the kernel's account: times only while statistics are on.
    pub fn cost(&self) -> Cost {
        let mut cost = Cost::default();
        for (name, _) in self.programs {
            let Some(fd) = self.ebpf.program(name).and_then(|program| program.fd().ok()) else { continue };
            let path = format!("/proc/self/fdinfo/{}", fd.as_fd().as_raw_fd());
            let text = std::fs::read_to_string(path).unwrap_or_default();
            for line in text.lines() {
                let number = |field: &str| line.strip_prefix(field).and_then(|rest| rest.trim().parse::<u64>().ok());
                cost.run_time += number("run_time_ns:").unwrap_or(0);
                cost.runs += number("run_cnt:").unwrap_or(0);
                if *name != "consumed" {
                    cost.misses += number("recursion_misses:").unwrap_or(0);
                }
            }
        }
        cost
    }

    /// Lets the kernel measure its programs, for as long as what is returned lives. It costs every program of the node
    /// some tens of nanoseconds a run.
    pub fn measure() -> Option<std::os::fd::OwnedFd> {
        aya::sys::enable_stats(aya::sys::Stats::RunTime).ok()
    }
}

impl Drop for Probes {
    fn drop(&mut self) {
        // The programs of the dataplane look no further at once; without this they would until the time is over.
        drop(self.tell_until(0));
        drop(self.forget(u64::MAX));
    }
}

/// Fields from the bytes of a ring's entry, one after the other.
struct Fields<'a>(&'a [u8]);

impl Fields<'_> {
    fn bytes<const N: usize>(&mut self) -> Option<[u8; N]> {
        let (bytes, rest) = self.0.split_first_chunk::<N>()?;
        self.0 = rest;
        Some(*bytes)
    }

    fn word(&mut self) -> Option<u32> {
        self.bytes().map(u32::from_ne_bytes)
    }

    fn long(&mut self) -> Option<u64> {
        self.bytes().map(u64::from_ne_bytes)
    }
}

fn event(bytes: &[u8]) -> Option<TraceEvent> {
    let mut f = Fields(bytes);
    Some(TraceEvent {
        at: f.long()?,
        id: f.long()?,
        skb: f.long()?,
        head: f.long()?,
        location: f.long()?,
        nfct: f.long()?,
        cookie: f.long()?,
        netns: f.word()?,
        ifindex: f.word()?,
        device: f.bytes()?,
        peer: f.word()?,
        point: f.word()?,
        cpu: f.word()?,
        len: f.word()?,
        mark: f.word()?,
        reason: f.word()?,
        stack: f.word()?,
        hooks: f.word()?,
        extensions: f.word()?,
        captured: f.word()?,
        packet: f.bytes()?,
    })
}

pub(super) fn decision(bytes: &[u8]) -> Option<TraceDecision> {
    let mut f = Fields(bytes);
    Some(TraceDecision {
        at: f.long()?,
        id: f.long()?,
        skb: f.long()?,
        head: f.long()?,
        ifindex: f.word()?,
        len: f.word()?,
        hook: f.word()?,
        verdict: f.word()?,
        reason: f.word()?,
        service: f.word()?,
        backend: f.word()?,
        rule: f.word()?,
        cpu: f.word()?,
        reserved: [0; 7],
    })
}
