//! bpf(2) where aya has no call for it: links by interface index, their update in place, batches, queries.
//!
//! The only module of the agent with `unsafe`. Every attribute struct is the prefix of `union bpf_attr`
//! (include/uapi/linux/bpf.h) that its command reads; the kernel takes the rest for zero.
#![expect(unsafe_code, reason = "system calls; the only module of the agent that has them")]

use std::ffi::CString;
use std::io;
use std::ops::ControlFlow;
use std::os::fd::{AsFd as _, AsRawFd as _, BorrowedFd, FromRawFd as _, OwnedFd};
use std::os::unix::ffi::OsStrExt as _;
use std::path::Path;

use aya::Pod;

mod run;

pub use run::{At, TestRun, arrive, test_run};

/// Commands of `enum bpf_cmd`.
mod command {
    pub(super) const MAP_CREATE: i32 = 0;
    pub(super) const MAP_LOOKUP_ELEM: i32 = 1;
    pub(super) const MAP_UPDATE_ELEM: i32 = 2;
    pub(super) const MAP_DELETE_ELEM: i32 = 3;
    pub(super) const OBJ_PIN: i32 = 6;
    pub(super) const OBJ_GET: i32 = 7;
    pub(super) const PROG_TEST_RUN: i32 = 10;
    pub(super) const OBJ_GET_INFO_BY_FD: i32 = 15;
    pub(super) const PROG_QUERY: i32 = 16;
    pub(super) const MAP_LOOKUP_BATCH: i32 = 24;
    pub(super) const MAP_UPDATE_BATCH: i32 = 26;
    pub(super) const LINK_CREATE: i32 = 28;
    pub(super) const LINK_UPDATE: i32 = 29;
}

/// Attach types of `enum bpf_attach_type`.
pub mod attach_type {
    /// tcx ingress.
    pub const TCX_INGRESS: u32 = 46;
    /// tcx egress.
    pub const TCX_EGRESS: u32 = 47;
}

/// # Safety
/// `attr` must be the attribute struct of `command`, with pointers that are valid for what the command does.
unsafe fn bpf<A>(command: i32, attr: &mut A) -> io::Result<i64> {
    // SAFETY: by the caller; the size is that of the struct.
    let result = unsafe { libc::syscall(libc::SYS_bpf, command, std::ptr::from_mut(attr), size_of::<A>()) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(result) }
}

fn own(fd: i64) -> io::Result<OwnedFd> {
    let fd = i32::try_from(fd).map_err(io::Error::other)?;
    // SAFETY: the kernel has just made this descriptor for us; nobody else has it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

fn raw(fd: BorrowedFd<'_>) -> u32 {
    // A descriptor is never negative.
    fd.as_raw_fd().unsigned_abs()
}

fn address<T>(value: &T) -> u64 {
    std::ptr::from_ref(value) as u64
}

fn address_mut<T>(value: &mut T) -> u64 {
    std::ptr::from_mut(value) as u64
}

fn c_path(path: &Path) -> io::Result<CString> {
    CString::new(path.as_os_str().as_bytes()).map_err(io::Error::other)
}

#[repr(C)]
struct ObjAttr {
    path: u64,
    fd: u32,
    flags: u32,
}

/// Opens a pinned object.
pub fn obj_get(path: &Path) -> io::Result<OwnedFd> {
    let path = c_path(path)?;
    let mut attr = ObjAttr { path: path.as_ptr() as u64, fd: 0, flags: 0 };
    // SAFETY: `path` lives until the call returns.
    own(unsafe { bpf(command::OBJ_GET, &mut attr) }?)
}

/// Pins an object.
pub fn obj_pin(fd: BorrowedFd<'_>, path: &Path) -> io::Result<()> {
    let path = c_path(path)?;
    let mut attr = ObjAttr { path: path.as_ptr() as u64, fd: raw(fd), flags: 0 };
    // SAFETY: `path` lives until the call returns.
    unsafe { bpf(command::OBJ_PIN, &mut attr) }.map(|_| ())
}

#[repr(C)]
struct LinkCreateAttr {
    program: u32,
    target: u32,
    attach_type: u32,
    flags: u32,
    relative: u32,
    reserved: u32,
    expected_revision: u64,
}

/// `BPF_F_BEFORE` without a relative: in front of all others.
const BEFORE: u32 = 1 << 3;

fn link_create(program: BorrowedFd<'_>, target: u32, attach_type: u32, flags: u32) -> io::Result<OwnedFd> {
    let program = raw(program);
    let mut attr =
        LinkCreateAttr { program, target, attach_type, flags, relative: 0, reserved: 0, expected_revision: 0 };
    // SAFETY: no pointers.
    own(unsafe { bpf(command::LINK_CREATE, &mut attr) }?)
}

/// Attaches a program to an interface with tcx (Linux 6.6), in front of all others.
pub fn link_create_tcx(program: BorrowedFd<'_>, ifindex: u32, attach_type: u32) -> io::Result<OwnedFd> {
    link_create(program, ifindex, attach_type, BEFORE)
}

/// Attaches a program to a cgroup.
pub fn link_create_cgroup(program: BorrowedFd<'_>, cgroup: BorrowedFd<'_>, attach_type: u32) -> io::Result<OwnedFd> {
    link_create(program, raw(cgroup), attach_type, 0)
}

/// Swaps the program behind a link; no packet sees neither. `ENOLINK`: the interface is gone.
pub fn link_update(link: BorrowedFd<'_>, program: BorrowedFd<'_>) -> io::Result<()> {
    #[repr(C)]
    struct Attr {
        link: u32,
        program: u32,
        flags: u32,
        old: u32,
    }
    let mut attr = Attr { link: raw(link), program: raw(program), flags: 0, old: 0 };
    // SAFETY: no pointers.
    unsafe { bpf(command::LINK_UPDATE, &mut attr) }.map(|_| ())
}

#[repr(C)]
struct InfoAttr {
    fd: u32,
    len: u32,
    info: u64,
}

/// What the kernel says of a link.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LinkInfo {
    /// Id of the program behind it.
    pub program: u32,
    /// Interface of a tcx link; 0 when it is gone, or for other links.
    pub ifindex: u32,
    /// Id of the cgroup of a cgroup link, which is its folder's inode number; 0 for other links.
    pub cgroup: u64,
}

/// Describes a link.
pub fn link_info(link: BorrowedFd<'_>) -> io::Result<LinkInfo> {
    /// `struct bpf_link_info`: type, id, program, then a union whose tcx member begins with the interface index, and whose
    /// cgroup member with the cgroup's id, eight bytes of the same place.
    #[repr(C)]
    #[derive(Default)]
    struct Info {
        kind: u32,
        id: u32,
        program: u32,
        pad: u32,
        ifindex: u32,
        attach_type: u32,
        rest: [u64; 8],
    }
    let mut info = Info::default();
    let len = u32::try_from(size_of::<Info>()).map_err(io::Error::other)?;
    let mut attr = InfoAttr { fd: raw(link), len, info: address_mut(&mut info) };
    // SAFETY: `info` is as long as said and lives until the call returns.
    unsafe { bpf(command::OBJ_GET_INFO_BY_FD, &mut attr) }?;
    let place = u64::from_ne_bytes(
        [info.ifindex.to_ne_bytes(), info.attach_type.to_ne_bytes()].concat().try_into().unwrap_or_default(),
    );
    // enum bpf_link_type: BPF_LINK_TYPE_TCX, BPF_LINK_TYPE_CGROUP.
    Ok(LinkInfo {
        program: info.program,
        ifindex: if info.kind == 11 { info.ifindex } else { 0 },
        cgroup: if info.kind == 3 { place } else { 0 },
    })
}

/// Ids of the programs that are attached to an interface with tcx, in their order. `EINVAL`: this kernel has no tcx.
pub fn query_tcx(ifindex: u32, attach_type: u32) -> io::Result<Vec<u32>> {
    #[repr(C)]
    struct Attr {
        target: u32,
        attach_type: u32,
        query_flags: u32,
        attach_flags: u32,
        programs: u64,
        count: u32,
        pad: u32,
        program_flags: u64,
        links: u64,
        link_flags: u64,
        revision: u64,
    }
    let mut programs = [0_u32; 64];
    let mut attr = Attr {
        target: ifindex,
        attach_type,
        query_flags: 0,
        attach_flags: 0,
        programs: programs.as_mut_ptr() as u64,
        count: 64,
        pad: 0,
        program_flags: 0,
        links: 0,
        link_flags: 0,
        revision: 0,
    };
    // SAFETY: the array has as many places as said and lives until the call returns.
    let result = unsafe { bpf(command::PROG_QUERY, &mut attr) };
    match result {
        Ok(_) => Ok(programs.into_iter().take(attr.count as usize).collect()),
        // No program yet: the device has no tcx entry.
        Err(e) if e.raw_os_error() == Some(libc::ENOENT) => Ok(Vec::new()),
        Err(e) => Err(e),
    }
}

#[repr(C)]
struct ElemAttr {
    map: u32,
    pad: u32,
    key: u64,
    value: u64,
    flags: u64,
}

/// Looks one entry up. `V` must be as large as the map's values, for all CPUs together in a per-CPU map.
pub fn map_lookup<K: Pod, V: Pod>(map: BorrowedFd<'_>, key: &K) -> io::Result<Option<V>> {
    let mut value = std::mem::MaybeUninit::<V>::zeroed();
    let mut attr = ElemAttr { map: raw(map), pad: 0, key: address(key), value: value.as_mut_ptr() as u64, flags: 0 };
    // SAFETY: `map.rs` checks the sizes of a map when it opens it; key and value live until the call returns.
    match unsafe { bpf(command::MAP_LOOKUP_ELEM, &mut attr) } {
        // SAFETY: `V` is plain data, zeroed before and filled by the kernel.
        Ok(_) => Ok(Some(unsafe { value.assume_init() })),
        Err(e) if e.raw_os_error() == Some(libc::ENOENT) => Ok(None),
        Err(e) => Err(e),
    }
}

/// Looks one entry of a per-CPU map up; one value for each possible CPU.
pub fn map_lookup_per_cpu<K: Pod, V: Pod>(map: BorrowedFd<'_>, key: &K, cpus: usize) -> io::Result<Vec<V>> {
    let mut values = Vec::<V>::with_capacity(cpus);
    let mut attr = ElemAttr { map: raw(map), pad: 0, key: address(key), value: values.as_mut_ptr() as u64, flags: 0 };
    // SAFETY: room for `cpus` values, whose size is a multiple of 8 (checked when the map is opened).
    unsafe {
        bpf(command::MAP_LOOKUP_ELEM, &mut attr)?;
        values.set_len(cpus);
    }
    Ok(values)
}

/// Writes one entry, whether it is there or not.
pub fn map_update<K: Pod, V: Pod>(map: BorrowedFd<'_>, key: &K, value: &V) -> io::Result<()> {
    let mut attr = ElemAttr { map: raw(map), pad: 0, key: address(key), value: address(value), flags: 0 };
    // SAFETY: as in `map_lookup`.
    unsafe { bpf(command::MAP_UPDATE_ELEM, &mut attr) }.map(|_| ())
}

/// Deletes one entry; false when it was not there.
pub fn map_delete<K: Pod>(map: BorrowedFd<'_>, key: &K) -> io::Result<bool> {
    let mut attr = ElemAttr { map: raw(map), pad: 0, key: address(key), value: 0, flags: 0 };
    // SAFETY: as in `map_lookup`.
    match unsafe { bpf(command::MAP_DELETE_ELEM, &mut attr) } {
        Ok(_) => Ok(true),
        Err(e) if e.raw_os_error() == Some(libc::ENOENT) => Ok(false),
        Err(e) => Err(e),
    }
}

#[repr(C)]
struct BatchAttr {
    in_batch: u64,
    out_batch: u64,
    keys: u64,
    values: u64,
    count: u32,
    map: u32,
    elem_flags: u64,
    flags: u64,
}

/// Writes many entries; returns how many were written, all of them unless there is an error.
pub fn map_update_batch<K: Pod, V: Pod>(
    map: BorrowedFd<'_>,
    keys: &[K],
    values: &[V],
) -> Result<(), (usize, io::Error)> {
    let count = u32::try_from(keys.len().min(values.len())).unwrap_or(u32::MAX);
    if count == 0 {
        return Ok(());
    }
    let mut attr = BatchAttr {
        in_batch: 0,
        out_batch: 0,
        keys: keys.as_ptr() as u64,
        values: values.as_ptr() as u64,
        count,
        map: raw(map),
        elem_flags: 0,
        flags: 0,
    };
    // SAFETY: both slices have `count` elements and live until the call returns; sizes as in `map_lookup`.
    match unsafe { bpf(command::MAP_UPDATE_BATCH, &mut attr) } {
        Ok(_) => Ok(()),
        Err(e) => Err((attr.count as usize, e)),
    }
}

/// Entries that are read at once where nobody asks for few.
const CHUNK: usize = 4096;

/// Reads a map batch by batch, until `each` has enough. Entries that come or go meanwhile may be in it or not.
pub fn map_scan<K: Pod, V: Pod>(
    map: BorrowedFd<'_>,
    mut each: impl FnMut(&[K], &[V]) -> ControlFlow<()>,
) -> io::Result<()> {
    let (mut keys, mut values) = (Vec::<K>::new(), Vec::<V>::new());
    let mut batches = Batches::new(map);
    loop {
        keys.clear();
        values.clear();
        keys.reserve(batches.chunk);
        values.reserve(batches.chunk);
        // SAFETY: room for `chunk` of both; the kernel fills as many as it says.
        unsafe {
            let Some(count) = batches.next(keys.as_mut_ptr() as u64, values.as_mut_ptr() as u64)? else { continue };
            keys.set_len(count);
            values.set_len(count);
        }
        if each(&keys, &values).is_break() || batches.done {
            return Ok(());
        }
    }
}

/// Where a reader of a whole map is.
struct Batches<'a> {
    map: BorrowedFd<'a>,
    chunk: usize,
    /// Larger than any key of ours.
    cursor: [u64; 16],
    first: bool,
    done: bool,
}

impl<'a> Batches<'a> {
    const fn new(map: BorrowedFd<'a>) -> Self {
        Self { map, chunk: CHUNK, cursor: [0; 16], first: true, done: false }
    }

    /// The next entries and their number; `None` when there must be more room, of `chunk` now.
    ///
    /// # Safety
    /// Both addresses must have room for `chunk` keys and values.
    unsafe fn next(&mut self, keys: u64, values: u64) -> io::Result<Option<usize>> {
        let mut after = [0_u64; 16];
        let mut attr = BatchAttr {
            in_batch: if self.first { 0 } else { self.cursor.as_ptr() as u64 },
            out_batch: after.as_mut_ptr() as u64,
            keys,
            values,
            count: u32::try_from(self.chunk).unwrap_or(u32::MAX),
            map: raw(self.map),
            elem_flags: 0,
            flags: 0,
        };
        // SAFETY: by the caller.
        match unsafe { bpf(command::MAP_LOOKUP_BATCH, &mut attr) } {
            Ok(_) => {}
            Err(e) if e.raw_os_error() == Some(libc::ENOENT) => self.done = true,
            // One bucket holds more than a chunk: ask for more at once.
            Err(e) if e.raw_os_error() == Some(libc::ENOSPC) && self.chunk < 1 << 20 => {
                self.chunk *= 2;
                return Ok(None);
            }
            Err(e) => return Err(e),
        }
        self.cursor = after;
        self.first = false;
        Ok(Some((attr.count as usize).min(self.chunk)))
    }
}

/// An open map whose keys and values are bytes: one that another version made, or one that is filled from such.
#[derive(Debug)]
pub struct Rows {
    fd: OwnedFd,
    key_size: usize,
    value_size: usize,
    capacity: u32,
}

/// When [`Rows::set`] may write.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Write {
    /// In any case.
    Any = 0,
    /// Where nothing is yet; otherwise `EEXIST`.
    New = 1,
}

impl Rows {
    /// Opens a pinned map. Not one with values for each CPU: `Unsupported`.
    pub fn open(path: &Path) -> io::Result<Self> {
        /// `struct bpf_map_info`, its beginning.
        #[repr(C)]
        #[derive(Default)]
        struct Info {
            kind: u32,
            id: u32,
            key_size: u32,
            value_size: u32,
            max_entries: u32,
            rest: [u32; 19],
        }
        let fd = obj_get(path)?;
        let mut info = Info::default();
        let len = u32::try_from(size_of::<Info>()).map_err(io::Error::other)?;
        let mut attr = InfoAttr { fd: raw(fd.as_fd()), len, info: address_mut(&mut info) };
        // SAFETY: `info` is as long as said and lives until the call returns.
        unsafe { bpf(command::OBJ_GET_INFO_BY_FD, &mut attr) }?;
        // BPF_MAP_TYPE_PERCPU_HASH, _PERCPU_ARRAY, _LRU_PERCPU_HASH; and keys must fit a cursor.
        if [5, 6, 10].contains(&info.kind) || info.key_size > 128 {
            return Err(io::ErrorKind::Unsupported.into());
        }
        Ok(Self {
            fd,
            key_size: info.key_size as usize,
            value_size: info.value_size as usize,
            capacity: info.max_entries,
        })
    }

    /// Bytes of a key and of a value.
    pub const fn sizes(&self) -> (usize, usize) {
        (self.key_size, self.value_size)
    }

    /// Entries that fit.
    pub const fn capacity(&self) -> u32 {
        self.capacity
    }

    /// Room that the kernel fills: an array's values are padded to 8 bytes in the kernel alone.
    fn attr(&self, key: &[u8], value: u64, flags: u64) -> io::Result<ElemAttr> {
        if key.len() != self.key_size {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        Ok(ElemAttr { map: raw(self.fd.as_fd()), pad: 0, key: key.as_ptr() as u64, value, flags })
    }

    /// One entry.
    pub fn get(&self, key: &[u8]) -> io::Result<Option<Vec<u8>>> {
        let mut value = vec![0_u8; self.value_size];
        let mut attr = self.attr(key, value.as_mut_ptr() as u64, 0)?;
        // SAFETY: key and value are as long as the map's, and live until the call returns.
        match unsafe { bpf(command::MAP_LOOKUP_ELEM, &mut attr) } {
            Ok(_) => Ok(Some(value)),
            Err(e) if e.raw_os_error() == Some(libc::ENOENT) => Ok(None),
            Err(e) => Err(e),
        }
    }

    /// Writes one entry.
    pub fn set(&self, key: &[u8], value: &[u8], when: Write) -> io::Result<()> {
        if value.len() != self.value_size {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        let mut attr = self.attr(key, value.as_ptr() as u64, when as u64)?;
        // SAFETY: as in `get`.
        unsafe { bpf(command::MAP_UPDATE_ELEM, &mut attr) }.map(|_| ())
    }

    /// Deletes one entry; false when it was not there.
    pub fn delete(&self, key: &[u8]) -> io::Result<bool> {
        let mut attr = self.attr(key, 0, 0)?;
        // SAFETY: as in `get`.
        match unsafe { bpf(command::MAP_DELETE_ELEM, &mut attr) } {
            Ok(_) => Ok(true),
            Err(e) if e.raw_os_error() == Some(libc::ENOENT) => Ok(false),
            Err(e) => Err(e),
        }
    }

    /// Reads all entries, batch by batch.
    pub fn scan(&self, mut each: impl FnMut(&[u8], &[u8])) -> io::Result<()> {
        let mut batches = Batches::new(self.fd.as_fd());
        while !batches.done {
            let mut keys = vec![0_u8; batches.chunk * self.key_size];
            let mut values = vec![0_u8; batches.chunk * self.value_size];
            // SAFETY: room for `chunk` of both.
            let count = unsafe { batches.next(keys.as_mut_ptr() as u64, values.as_mut_ptr() as u64) }?.unwrap_or(0);
            let rows = keys.chunks_exact(self.key_size).zip(values.chunks_exact(self.value_size));
            rows.take(count).for_each(|(key, value)| each(key, value));
        }
        Ok(())
    }
}

/// Makes an array map. Nobody has it but us until it is pinned.
pub fn map_create_array(name: &str, value_size: u32, entries: u32) -> io::Result<OwnedFd> {
    #[repr(C)]
    #[derive(Default)]
    struct Attr {
        kind: u32,
        key_size: u32,
        value_size: u32,
        max_entries: u32,
        flags: u32,
        inner: u32,
        numa_node: u32,
        name: [u8; 16],
    }
    // BPF_MAP_TYPE_ARRAY; BPF_OBJ_NAME_LEN counts a zero byte at the end.
    let mut attr = Attr { kind: 2, key_size: 4, value_size, max_entries: entries, ..Attr::default() };
    attr.name.iter_mut().take(15).zip(name.bytes()).for_each(|(to, from)| *to = from);
    // SAFETY: no pointers.
    own(unsafe { bpf(command::MAP_CREATE, &mut attr) }?)
}

/// Cookie of the network namespace of the calling thread: what `bpf_get_netns_cookie` returns there (Linux 5.14).
pub fn netns_cookie() -> io::Result<u64> {
    /// include/uapi/asm-generic/socket.h; not in libc.
    const SO_NETNS_COOKIE: i32 = 71;
    let socket = std::net::UdpSocket::bind("0.0.0.0:0").or_else(|_| std::net::UdpSocket::bind("[::]:0"))?;
    let (mut cookie, mut len) = (0_u64, 8_u32);
    // SAFETY: eight bytes for an option of eight bytes.
    let result = unsafe {
        libc::getsockopt(socket.as_raw_fd(), libc::SOL_SOCKET, SO_NETNS_COOKIE, (&raw mut cookie).cast(), &raw mut len)
    };
    if result == 0 { Ok(cookie) } else { Err(io::Error::last_os_error()) }
}
