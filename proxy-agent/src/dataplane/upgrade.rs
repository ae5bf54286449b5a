//! From one version of the layouts to another, newer or older, while packets go on.
//!
//! ```text
//!   v3/ found beside our own v4/                                              who translates
//!     1 share   maps that look the same in both: their pins move to v4/       v3's programs
//!     2 load    v4's programs, over v4/'s maps
//!     3 copy    all other maps, field by field, by name; flows again and
//!               again until hardly any changes between two rounds
//!     4 swap    v4's programs in v3's links; the links' pins move to v4/      v4's programs
//!     5 finish  what changed since the last round; v3/ is removed
//! ```
//!
//! Fields that only the old version has are dropped, those that only the new one has are zero, and integers that became
//! wider or narrower keep their value. What a version cannot say in these terms it must read into its fields itself,
//! where zero means "written by another version".
//!
//! Ids are copied along, so flows go on naming the same backends; the agent then restores its tables as after a restart.
//!
//! An agent that is killed at any point is continued by the next one, of either version: as long as both directories
//! are there, everything is done again, and a flow that is there already is only replaced by one that was seen later.
//!
//! Flows of before the last round of 3 are in both versions' maps, whatever programs they meet. One that is made from
//! there to the swap is known to our programs only when it has been copied, which takes as long as reading the flow
//! tables once; the time is logged as `window`. A packet that comes in between finds no flow: the client's is dropped and
//! repeated, a backend's reaches the client untranslated, and such a connection may be reset. Where the layout of flows
//! did not change there is no such time, because both versions' programs use one map.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::fs;
use std::hash::{BuildHasher as _, RandomState};
use std::io;
use std::os::fd::{AsFd as _, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use aya::Ebpf;
use aya::maps::MapType;
use proxy_abi::policy::{self, capacity as policy_capacity, map as policy_map};
use proxy_abi::{capacity, map};

use super::Error;
use super::describe::Description;
use super::map::Layout;
use super::pins::{LAYOUTS, LinkPin, Pins};
use super::sysbpf::{self, Rows, Write};

mod row;

use row::Convert;

/// Rounds of copying before the swap, at most: a node whose flows change faster than they are read is swapped anyhow.
const ROUNDS: usize = 6;
/// So few changes in a round are hardly any.
const FEW: usize = 64;

/// Another version's directory, on its way into ours.
#[derive(Debug)]
pub struct Upgrade {
    from: Pins,
    description: Option<Description>,
    copies: Vec<Copy>,
    /// From the first swap until all that the other version's programs had made was in our maps.
    window: Duration,
}

/// One map that is copied.
#[derive(Debug)]
struct Copy {
    layout: Layout,
    path: PathBuf,
    source: Rows,
    target: Rows,
    convert: Convert,
    /// What was written, by hashes: key → value there, value here.
    written: HashMap<u64, (u64, u64)>,
    hasher: RandomState,
    /// Entries that could not be written, by hashes of their keys.
    lost: HashSet<u64>,
}

/// What one round of copying did.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Round {
    read: usize,
    written: usize,
}

/// Finds other versions' directories, and takes over those of their maps that look like ours. Before anything is loaded.
///
/// # Errors
/// When a directory cannot be read.
pub fn find(pins: &Pins) -> Result<Vec<Upgrade>, Error> {
    let own = Description::own(&[]);
    let mut found = Vec::new();
    for from in pins.others()? {
        let description = Description::read(&from.maps())?;
        if let Some(description) = &description {
            for layout in LAYOUTS {
                if description.maps.get(layout.name) == own.maps.get(layout.name) {
                    share(&from, pins, &layout)?;
                }
            }
        }
        found.push(Upgrade { from, description, copies: Vec::new(), window: Duration::ZERO });
    }
    Ok(found)
}

/// Moves the pin of a map that looks the same, unless there is one already.
fn share(from: &Pins, to: &Pins, layout: &Layout) -> Result<(), Error> {
    let (old, new) = (from.maps().join(layout.name), to.maps().join(layout.name));
    if !old.exists() || new.exists() {
        return Ok(());
    }
    let info = match layout.check(&old) {
        Ok(info) => info,
        // Of another type: it is copied.
        Err(Error::Layout { .. }) => return Ok(()),
        Err(other) => return Err(other),
    };
    if fixed_capacity(layout.name).is_some_and(|capacity| capacity != info.max_entries()) {
        return Ok(());
    }
    fs::rename(&old, &new).map_err(|source| Error::pin(&old, source))
}

/// Entries of a map that every agent of this version has as many of.
fn fixed_capacity(name: &str) -> Option<u32> {
    Some(match name {
        map::SERVICE => capacity::SERVICE,
        map::BACKEND => capacity::BACKEND,
        map::BACKEND_SLOT => capacity::BACKEND_SLOT,
        map::FRONTEND => capacity::FRONTEND,
        map::DEVICE | map::POD_FLOWS => capacity::DEVICE,
        map::LOCAL_POD => capacity::LOCAL_POD,
        map::FRAGMENT => capacity::FRAGMENT,
        map::SOCKET => capacity::SOCKET,
        map::CGROUP_POD => capacity::CGROUP_POD,
        map::PREFIX => capacity::PREFIX,
        map::AFFINITY => capacity::AFFINITY,
        map::COUNTER => proxy_abi::verdict::COUNTERS,
        policy_map::EPOCH => 1,
        policy_map::SLOT => 2 * policy_capacity::SLOT,
        policy_map::POD | policy_map::POD_HITS => policy_capacity::SLOT,
        policy_map::BLOCK => policy_capacity::BLOCK,
        policy_map::SET => policy_capacity::SET,
        policy_map::IP => policy_capacity::IP,
        policy_map::PREFIX => policy_capacity::PREFIX,
        policy_map::PAGE => 2 * policy::PAGES,
        policy_map::CELL => policy_capacity::CELL,
        policy_map::BITS => policy_capacity::BITS,
        policy_map::HITS => policy_capacity::HITS,
        _ => return None,
    })
}

/// Is it a map whose entries the programs change all the while?
fn is_of_flows(name: &str) -> bool {
    [map::FLOW_LIVE, map::FLOW_BRIEF].contains(&name)
}

impl Upgrade {
    /// Entries of a map in the other version, so that ours has room for all.
    pub fn capacity(&self, name: &str) -> Option<u32> {
        Rows::open(&self.from.maps().join(name)).ok().map(|rows| rows.capacity())
    }

    /// Copies what is not shared, puts our programs into the links, and moves the links' pins. After the load.
    ///
    /// # Errors
    /// When the other version's maps cannot be read or ours not be written: then nothing is swapped, and the other
    /// version's programs go on.
    pub fn carry(&mut self, ebpf: &Ebpf, pins: &Pins) -> Result<(), Error> {
        let start = Instant::now();
        let version = self.from.version_number();
        self.open(pins)?;
        // Somebody was here before: what our own programs have written is not older than what is copied.
        let careful = !pins.list_links()?.is_empty();
        for copy in &mut self.copies {
            copy.round(careful)?;
        }
        for _ in 1..ROUNDS {
            let mut changed = 0;
            for copy in self.copies.iter_mut().filter(|copy| is_of_flows(copy.layout.name)) {
                changed += copy.round(careful)?.written;
            }
            if changed <= FEW {
                break;
            }
        }
        let copied = start.elapsed();
        let swapped = Instant::now();
        let links = self.swap(ebpf, pins)?;
        self.catch_up()?;
        self.window = swapped.elapsed();
        tracing::info!(version, links, ?copied, window = ?self.window, "programs of another version are replaced");
        Ok(())
    }

    /// Copies what changed until the last program was swapped, and removes the other version's directory.
    ///
    /// # Errors
    /// When it cannot be read or removed; the next start does it again.
    pub fn finish(mut self) -> Result<(), Error> {
        self.catch_up()?;
        let mut carried = BTreeMap::new();
        for copy in &mut self.copies {
            if copy.layout.name == map::FLOW_LIVE {
                copy.remove_ended()?;
            }
            carried.insert(copy.layout.name, copy.written.len());
            if !copy.lost.is_empty() {
                tracing::error!(map = copy.layout.name, entries = copy.lost.len(), "could not be carried over");
            }
        }
        self.from.remove_version()?;
        tracing::info!(
            version = self.from.version_number(),
            ?carried,
            window = ?self.window,
            "flows of another version are carried over"
        );
        Ok(())
    }

    fn open(&mut self, pins: &Pins) -> Result<(), Error> {
        let Some(description) = &self.description else {
            tracing::error!(
                version = self.from.version_number(),
                "the maps of another version are not described: its flows cannot be carried over, and connections \
                 through Services end"
            );
            return Ok(());
        };
        let own = Description::own(&[]);
        for layout in LAYOUTS {
            let old = self.from.maps().join(layout.name);
            let (Some(theirs), Some(ours)) = (description.maps.get(layout.name), own.maps.get(layout.name)) else {
                continue;
            };
            if !old.exists() {
                continue;
            }
            if layout.kind == MapType::PerCpuArray {
                tracing::info!(map = layout.name, "begins anew: another version counted otherwise");
                continue;
            }
            let new = pins.maps().join(layout.name);
            let open = |path: &Path| Rows::open(path).map_err(|source| Error::pin(path, source));
            let (source, target) = (open(&old)?, open(&new)?);
            let Some(convert) = Convert::new(theirs, ours, source.sizes(), target.sizes()) else {
                let source = io::Error::other("the map is not as it is described");
                return Err(Error::Pin { path: old, source });
            };
            self.copies.push(Copy {
                layout,
                path: new,
                source,
                target,
                convert,
                written: HashMap::new(),
                hasher: RandomState::new(),
                lost: HashSet::new(),
            });
        }
        Ok(())
    }

    /// Puts our programs into the links in one go, then moves the pins.
    fn swap(&self, ebpf: &Ebpf, pins: &Pins) -> Result<usize, Error> {
        let mut links: Vec<(LinkPin, PathBuf, Option<OwnedFd>, Option<BorrowedFd<'_>>)> = Vec::new();
        for pin in self.from.list_links()? {
            let path = self.from.link(&pin);
            let (link, program) = match &pin {
                LinkPin::Tcx(program, _) | LinkPin::Cgroup(program) => {
                    let link = sysbpf::obj_get(&path).map_err(|source| Error::pin(&path, source))?;
                    let program = ebpf.program(program).and_then(|program| program.fd().ok()).map(|fd| fd.as_fd());
                    (Some(link), program)
                }
                // Its filters are replaced when our programs are attached.
                LinkPin::Clsact(_) => (None, None),
            };
            links.push((pin, path, link, program));
        }
        let mut severed = HashSet::new();
        for (at, (_, _, link, program)) in links.iter().enumerate() {
            if let (Some(link), Some(program)) = (link, program)
                && sysbpf::link_update(link.as_fd(), *program).is_err()
            {
                severed.insert(at);
            }
        }
        for (at, (pin, path, link, program)) in links.iter().enumerate() {
            let new = pins.link(pin);
            let is_ours = link.is_none() || program.is_some() && !severed.contains(&at);
            if is_ours && !new.exists() {
                fs::rename(path, &new).map_err(|source| Error::pin(path, source))?;
            } else {
                // Of an interface that has gone; of a program that we have no counterpart of; or attached by us already.
                self.from.remove_link(pin)?;
            }
        }
        Ok(links.len())
    }

    /// What changed in the other version's maps since they were last read, where our programs do not know better.
    fn catch_up(&mut self) -> Result<(), Error> {
        for copy in &mut self.copies {
            copy.round(true)?;
        }
        Ok(())
    }
}

impl Copy {
    fn failed(&self, operation: &'static str, source: io::Error) -> Error {
        Error::Map { path: self.path.clone(), operation, key: "all".to_owned(), source }
    }

    /// Copies what is new or changed since the last round. `careful`: our programs may have written, too.
    fn round(&mut self, careful: bool) -> Result<Round, Error> {
        let Self { layout, source, target, convert, written, hasher, lost, .. } = self;
        let mut round = Round::default();
        let is_array = layout.kind == MapType::Array;
        // A map that the agent owns: nobody writes while it starts.
        let careful = careful && !is_array;
        let mut problem = None;
        let read = source.scan(|old_key, old_value| {
            // A row of an array that is zero says "nothing here".
            if is_array && old_value.iter().all(|byte| *byte == 0) {
                return;
            }
            round.read += 1;
            let Some((key, value)) = convert.row(old_key, old_value) else {
                lost.insert(hasher.hash_one(old_key));
                return;
            };
            let (id, there, here) = (hasher.hash_one(&key), hasher.hash_one(old_value), hasher.hash_one(&value));
            let before = written.get(&id).copied();
            if before.is_some_and(|(was, _)| was == there) {
                return;
            }
            let done = if careful {
                let mine = before.map(|(_, mine)| mine);
                let is_worth_less = |now: &[u8]| mine == Some(hasher.hash_one(now)) || convert.is_better(&value, now);
                write_carefully(target, &key, &value, is_worth_less)
            } else {
                target.set(&key, &value, Write::Any).map(|()| true)
            };
            match done {
                Ok(true) => {
                    round.written += 1;
                    lost.remove(&id);
                    written.insert(id, (there, here));
                }
                Ok(false) => {
                    written.insert(id, (there, here));
                }
                Err(error) => {
                    lost.insert(id);
                    problem.get_or_insert(error);
                }
            }
        });
        if let Some(error) = problem {
            tracing::warn!(map = layout.name, %error, "an entry of another version cannot be written");
        }
        read.map_err(|source| self.failed("read", source))?;
        Ok(round)
    }

    /// Removes what was copied and has ended in the other version's map before the swap.
    fn remove_ended(&mut self) -> Result<(), Error> {
        let mut alive = HashSet::new();
        let Self { source, target, convert, written, hasher, .. } = &*self;
        let read = source.scan(|key, value| {
            alive.extend(convert.row(key, value).map(|(key, _)| hasher.hash_one(&key)));
        });
        let mut ended = Vec::new();
        let read = read.and_then(|()| {
            target.scan(|key, value| {
                let id = hasher.hash_one(key);
                let untouched = written.get(&id).is_some_and(|(_, here)| *here == hasher.hash_one(value));
                if untouched && !alive.contains(&id) {
                    ended.push(key.to_vec());
                }
            })
        });
        let done = read.and_then(|()| ended.iter().try_for_each(|key| target.delete(key).map(drop)));
        done.map_err(|source| self.failed("remove what has ended from", source))
    }
}

/// Writes where nothing is, or what is worth less; false when something else is there.
fn write_carefully(target: &Rows, key: &[u8], value: &[u8], is_worth_less: impl Fn(&[u8]) -> bool) -> io::Result<bool> {
    match target.get(key)? {
        None => match target.set(key, value, Write::New) {
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => Ok(false),
            done => done.map(|()| true),
        },
        Some(now) if is_worth_less(&now) => target.set(key, value, Write::Any).map(|()| true),
        Some(_) => Ok(false),
    }
}
