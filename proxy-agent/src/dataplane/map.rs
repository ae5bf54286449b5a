//! A pinned map with the types of its keys and values.

use std::fmt::Debug;
use std::io;
use std::marker::PhantomData;
use std::ops::ControlFlow;
use std::os::fd::{AsFd as _, AsRawFd as _, OwnedFd};
use std::path::{Path, PathBuf};

use aya::Pod;
use aya::maps::{MapInfo, MapType};

use super::Error;
use super::sysbpf;

/// What a map must be.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Layout {
    /// Name, which is also the name of its pin.
    pub name: &'static str,
    /// Type.
    pub kind: MapType,
    /// Bytes of a key.
    pub key: u32,
    /// Bytes of a value.
    pub value: u32,
}

impl Layout {
    /// Compares a pinned map with it. aya takes over any pinned map of the right name, whatever is in it.
    pub fn check(&self, path: &Path) -> Result<MapInfo, Error> {
        let pin = |source| Error::Pin { path: path.to_owned(), source };
        let info = MapInfo::from_pin(path).map_err(|e| pin(io::Error::other(e)))?;
        let found = Self {
            name: self.name,
            kind: info.map_type().map_err(|e| pin(io::Error::other(e)))?,
            key: info.key_size(),
            value: info.value_size(),
        };
        if found == *self { Ok(info) } else { Err(Error::Layout { path: path.to_owned(), expected: *self, found }) }
    }
}

/// An open map.
#[derive(Debug)]
pub struct Map<K, V> {
    fd: OwnedFd,
    path: PathBuf,
    layout: Layout,
    capacity: u32,
    types: PhantomData<fn() -> (K, V)>,
}

impl<K: Pod + Debug, V: Pod> Map<K, V> {
    /// Opens the map that is pinned in a directory.
    pub fn open(directory: &Path, layout: Layout) -> Result<Self, Error> {
        let path = directory.join(layout.name);
        let info = layout.check(&path)?;
        let fd = sysbpf::obj_get(&path).map_err(|source| Error::Pin { path: path.clone(), source })?;
        // The sizes that every call below relies on: of the types here, not only of the table of layouts.
        let types = Layout { key: size_u32::<K>(), value: size_u32::<V>(), ..layout };
        if types != layout {
            return Err(Error::Layout { path, expected: layout, found: types });
        }
        Ok(Self { fd, path, layout, capacity: info.max_entries(), types: PhantomData })
    }

    fn error(&self, operation: &'static str, key: &K, source: io::Error) -> Error {
        Error::Map { path: self.path.clone(), operation, key: format!("{key:?}"), source }
    }

    /// What it is.
    pub const fn layout(&self) -> &Layout {
        &self.layout
    }

    /// Entries that fit.
    pub const fn capacity(&self) -> u32 {
        self.capacity
    }

    /// One entry.
    pub fn get(&self, key: &K) -> Result<Option<V>, Error> {
        sysbpf::map_lookup(self.fd.as_fd(), key).map_err(|e| self.error("look up", key, e))
    }

    /// One entry of a per-CPU map: a value for each possible CPU.
    pub fn get_per_cpu(&self, key: &K) -> Result<Vec<V>, Error> {
        let cpus = aya::util::nr_cpus().map_err(|(_, e)| self.error("count the CPUs for", key, e))?;
        sysbpf::map_lookup_per_cpu(self.fd.as_fd(), key, cpus).map_err(|e| self.error("look up", key, e))
    }

    /// Writes one entry.
    pub fn set(&self, key: &K, value: &V) -> Result<(), Error> {
        sysbpf::map_update(self.fd.as_fd(), key, value).map_err(|e| self.error("write", key, e))
    }

    /// Deletes one entry; it need not be there.
    pub fn delete(&self, key: &K) -> Result<bool, Error> {
        sysbpf::map_delete(self.fd.as_fd(), key).map_err(|e| self.error("delete", key, e))
    }

    /// Writes many entries in one call, and one result for each. Without batches (Linux < 5.6) one by one.
    pub fn set_all(&self, keys: &[K], values: &[V]) -> Vec<Result<(), Error>> {
        let mut results: Vec<Result<(), Error>> = Vec::with_capacity(keys.len());
        while results.len() < keys.len() {
            let start = results.len();
            let (Some(k), Some(v)) = (keys.get(start..), values.get(start..)) else { break };
            match sysbpf::map_update_batch(self.fd.as_fd(), k, v) {
                Ok(()) => results.extend(k.iter().map(|_| Ok(()))),
                Err((done, _)) => {
                    // The kernel stopped at an entry: write that one alone for its own error, then go on after it.
                    results.extend(k.iter().take(done).map(|_| Ok(())));
                    let (Some(key), Some(value)) = (k.get(done), v.get(done)) else { break };
                    results.push(self.set(key, value));
                }
            }
        }
        results
    }

    /// Hands every entry to `each`, batch by batch, until that has enough. The map is never in memory as a whole.
    pub fn scan(&self, mut each: impl FnMut(&K, &V) -> ControlFlow<()>) -> Result<(), Error> {
        let batch = |keys: &[K], values: &[V]| keys.iter().zip(values).try_for_each(|(key, value)| each(key, value));
        sysbpf::map_scan(self.fd.as_fd(), batch).map_err(|source| self.unreadable(source))
    }

    /// How many entries `wanted` says yes to.
    pub fn count(&self, mut wanted: impl FnMut(&K, &V) -> bool) -> Result<usize, Error> {
        let mut count = 0;
        self.scan(|key, value| {
            count += usize::from(wanted(key, value));
            ControlFlow::Continue(())
        })?;
        Ok(count)
    }

    /// Bytes that the kernel holds for it now (Linux 6.4; before that, what it would hold when full), by its own account
    /// in `fdinfo`.
    pub fn memory(&self) -> Option<u64> {
        let text = std::fs::read_to_string(format!("/proc/self/fdinfo/{}", self.fd.as_raw_fd())).ok()?;
        text.lines().find_map(|line| line.strip_prefix("memlock:"))?.trim().parse().ok()
    }

    fn unreadable(&self, source: io::Error) -> Error {
        Error::Map { path: self.path.clone(), operation: "read", key: "all".to_owned(), source }
    }

    /// The whole map.
    pub fn read(&self) -> Result<Vec<(K, V)>, Error> {
        let mut all = Vec::new();
        let batch = |keys: &[K], values: &[V]| {
            all.extend(keys.iter().copied().zip(values.iter().copied()));
            ControlFlow::Continue(())
        };
        sysbpf::map_scan(self.fd.as_fd(), batch).map_err(|source| self.unreadable(source))?;
        Ok(all)
    }
}

/// Size of a type, which is never beyond 32 bits.
pub(super) const fn size_u32<T>() -> u32 {
    let size = size_of::<T>();
    assert!(size <= 4096, "map keys and values are small");
    #[expect(clippy::cast_possible_truncation, reason = "asserted above")]
    let size = size as u32;
    size
}
