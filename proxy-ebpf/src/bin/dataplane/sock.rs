//! Sockets: the address is replaced before a packet exists.
//!
//! ```text
//!   socket of                        with --socket-lb=node     with --socket-lb=all
//!   the node's network namespace     here                      here
//!   a pod that is in `cgroup_pod`    packets                   here; what only packets can do: packets
//!   anybody else                     packets                   packets
//! ```
//!
//! The packet programs serve every pod whatever is done here, so whatever is not certain is left to them. Policy is at the
//! veth for both: the packets of a socket that was led to a backend are a direct flow to it.

use aya_ebpf::bindings::{BPF_ANY, bpf_sock_addr};
use aya_ebpf::helpers;
use aya_ebpf::maps::LruHashMap;
use core::ffi::c_void;
use proxy_abi::{
    BackendEntry, CgroupPodEntry, DeviceEntry, FrontendEntry, FrontendKey, Hook, IpBytes, PortBe, PrefixKey, Proto,
    Reason, SocketEntry, SocketKey,
};
use proxy_ebpf::balance;
use proxy_ebpf::packet::Family;

use crate::exit::{self, Outcome};
use crate::frontend;
use crate::maps::{CGROUP_POD, LOCAL_POD, NETNS_COOKIE, POD_SOCKET, SET_RETVAL, SOCKET, SOCKET_LB};

const ECONNREFUSED: i32 = -111;
/// State of a connected socket, UDP's too (`TCP_ESTABLISHED`).
const CONNECTED: u32 = 1;

/// How deep below the root the cgroup of a pod may lie. kubelet's own are at 2 to 4, plus what its machine puts above.
const CGROUP_LEVELS: i32 = 8;

/// The address argument of a system call.
#[derive(Clone, Copy)]
struct Call(*mut bpf_sock_addr);

impl Call {
    #[inline(always)]
    fn is_of_this_node(self) -> bool {
        // SAFETY: the context is valid.
        unsafe { helpers::bpf_get_netns_cookie(self.0.cast::<c_void>()) == NETNS_COOKIE.load() }
    }

    #[inline(always)]
    fn cookie(self) -> u64 {
        // SAFETY: the context is valid.
        unsafe { helpers::bpf_get_socket_cookie(self.0.cast::<c_void>()) }
    }

    #[inline(always)]
    fn proto(self) -> Proto {
        // SAFETY: the context is valid; the field is readable.
        Proto(unsafe { (*self.0).protocol } as u8)
    }

    /// Has the socket been connected before this call?
    #[inline(always)]
    fn is_connected(self) -> bool {
        // SAFETY: the context is valid, and every call is one of a socket.
        unsafe {
            let socket = core::ptr::read_volatile(&raw const (*self.0).__bindgen_anon_1.sk);
            core::ptr::read_volatile(&raw const (*socket).state) == CONNECTED
        }
    }

    /// The address: a mapped one (`::ffff:a.b.c.d`) of an IPv6 socket is the IPv4 address.
    #[inline(always)]
    fn ip<F: Family>(self) -> IpBytes {
        // SAFETY: as above; four single reads, as the verifier asks for.
        unsafe {
            if F::HEADER_CHECKSUM.is_some() {
                return IpBytes::from_v4_word(core::ptr::read_volatile(&raw const (*self.0).user_ip4));
            }
            let ip = &raw const (*self.0).user_ip6;
            let word = ip.cast::<u32>();
            IpBytes([
                core::ptr::read_volatile(word),
                core::ptr::read_volatile(word.add(1)),
                core::ptr::read_volatile(word.add(2)),
                core::ptr::read_volatile(word.add(3)),
            ])
        }
    }

    #[inline(always)]
    fn port(self) -> PortBe {
        // SAFETY: as above. The field is a 16-bit port in memory order in 32 bits.
        PortBe(unsafe { core::ptr::read_volatile(&raw const (*self.0).user_port) } as u16)
    }

    #[inline(always)]
    fn set<F: Family>(self, ip: &IpBytes, port: PortBe) {
        // SAFETY: as above; these fields are writable.
        unsafe {
            if F::HEADER_CHECKSUM.is_some() {
                core::ptr::write_volatile(&raw mut (*self.0).user_ip4, ip.v4_word());
            } else {
                let word = (&raw mut (*self.0).user_ip6).cast::<u32>();
                core::ptr::write_volatile(word, ip.0[0]);
                core::ptr::write_volatile(word.add(1), ip.0[1]);
                core::ptr::write_volatile(word.add(2), ip.0[2]);
                core::ptr::write_volatile(word.add(3), ip.0[3]);
            }
            core::ptr::write_volatile(&raw mut (*self.0).user_port, u32::from(port.0));
        }
    }
}

/// `connect()`: TCP and UDP. The choice holds for the life of the connection.
#[inline(always)]
pub(crate) fn connect<F: Family>(call: *mut bpf_sock_addr) -> i32 {
    exit::socket(Hook::Connect, &translate::<F>(Call(call), false))
}

/// `sendmsg()` with an address: UDP. The choice is remembered, so that one socket's packets stay on one backend.
#[inline(always)]
pub(crate) fn sendmsg<F: Family>(call: *mut bpf_sock_addr) -> i32 {
    exit::socket(Hook::Sendmsg, &translate::<F>(Call(call), true))
}

#[inline(always)]
fn translate<F: Family>(call: Call, datagram: bool) -> Outcome {
    if call.is_of_this_node() {
        return of_node::<F>(call, datagram);
    }
    if SOCKET_LB.load() == 0 {
        return Outcome::pass(Reason::NotThisNode);
    }
    of_pod::<F>(call, datagram)
}

#[inline(always)]
fn of_node<F: Family>(call: Call, datagram: bool) -> Outcome {
    let (ip, port, proto) = (call.ip::<F>(), call.port(), call.proto());
    let frontend = match frontend::look_up(&ip, port, proto) {
        Ok(frontend) => frontend,
        Err(mark) => {
            if mark & FrontendEntry::ADDRESS_REJECT != 0 {
                return refuse::<F>(call, Reason::NoSuchPort);
            }
            if mark == 0 && frontend::is_within(&ip, PrefixKey::SERVICE_CIDR) {
                return Outcome::drop(Reason::Unallocated);
            }
            return Outcome::pass(Reason::NotService);
        }
    };
    // SAFETY: a pointer into a map that was just found.
    let frontend = unsafe { *frontend };
    if frontend.flags & (FrontendEntry::SOURCE_RANGES | FrontendEntry::NODE_ALLOWED) == FrontendEntry::SOURCE_RANGES {
        return Outcome::drop(Reason::SourceNotAllowed).of(frontend.service, 0);
    }
    if frontend.count == 0 {
        if frontend.flags & FrontendEntry::DROP_EMPTY != 0 {
            return Outcome::drop(Reason::NoLocalBackend).of(frontend.service, 0);
        }
        return refuse::<F>(call, Reason::NoBackend).of(frontend.service, 0);
    }
    // One client among all: the node.
    let client = FrontendKey::wildcard(F::HEADER_CHECKSUM.is_some());
    let cookie = call.cookie();
    let forward = SocketKey { cookie, ip, port, direction: SocketKey::FORWARD, reserved: 0 };
    if datagram && let Some(known) = SOCKET.get_ptr(&forward) {
        // SAFETY: a pointer into a map that was just found.
        let known = unsafe { *known };
        if frontend::serves(known.backend, known.generation) {
            call.set::<F>(&known.ip, known.port);
            return Outcome::pass(Reason::Socket).of(known.service, known.backend);
        }
    }
    let mut why = Reason::NoBackend;
    for _ in 0..balance::BACKEND_TRIES {
        match frontend::choose(&frontend, &client) {
            Ok((id, backend)) => {
                let mut other = SocketEntry {
                    ip: backend.ip,
                    port: backend.port,
                    flags: if datagram { 0 } else { SocketEntry::CONNECTED },
                    backend: id,
                    generation: backend.generation,
                    service: frontend.service,
                };
                // A connected socket hears its backend alone, so `sendto` with the Service's address must not choose another.
                if proto == Proto::UDP {
                    let _ = SOCKET.insert(&forward, &other, u64::from(BPF_ANY));
                }
                let reverse = SocketKey {
                    cookie,
                    ip: backend.ip,
                    port: backend.port,
                    direction: SocketKey::REVERSE,
                    reserved: 0,
                };
                call.set::<F>(&other.ip, other.port);
                other.ip = ip;
                other.port = port;
                let _ = SOCKET.insert(&reverse, &other, u64::from(BPF_ANY));
                return Outcome::pass(Reason::Socket).of(frontend.service, id);
            }
            Err(reason) => why = reason,
        }
    }
    Outcome::drop(why).of(frontend.service, 0)
}

/// The pod that the calling process is of, by its cgroup: the outermost that has an entry, because a pod may make cgroups in
/// its own, of whatever name.
#[inline(always)]
fn calling_pod() -> Option<&'static CgroupPodEntry> {
    for level in 1..=CGROUP_LEVELS {
        // SAFETY: takes no memory.
        let id = unsafe { helpers::bpf_get_current_ancestor_cgroup_id(level) };
        if id == 0 {
            return None;
        }
        if let Some(found) = CGROUP_POD.get_ptr(&id) {
            // SAFETY: a pointer into a map that was just found; entries of maps outlive the program's run.
            return Some(unsafe { &*found });
        }
    }
    None
}

/// An address that means whoever asks, in the asker's own network namespace: loopback, or none.
#[inline(always)]
fn means_itself(ip: &IpBytes) -> bool {
    let [a, b, c, d] = ip.0;
    if ip.is_v4() {
        let first = d.to_ne_bytes()[0];
        return first == 127 || first == 0;
    }
    a | b | c == 0 && (d == 0 || d == u32::from_be(1))
}

#[inline(always)]
fn is_same(a: (&IpBytes, PortBe), b: (&IpBytes, PortBe)) -> bool {
    let (x, y) = (a.0.halves(), b.0.halves());
    (x.0 ^ y.0) | (x.1 ^ y.1) | u64::from(a.1.0 ^ b.1.0) == 0
}

/// Is a backend reached by this pod only as its packets take it? The pod itself would see its own address in place of the
/// bridge's; and where the bridge keeps ports apart, packets are led around it.
#[inline(always)]
fn needs_packets(pod: &CgroupPodEntry, backend: &BackendEntry) -> bool {
    match LOCAL_POD.get_ptr(&backend.ip) {
        Some(local) => {
            // SAFETY: a pointer into a map that was just found.
            let local = unsafe { &*local };
            local.ifindex == pod.ifindex || local.flags & (DeviceEntry::REDIRECT | DeviceEntry::SWITCH) == 0
        }
        None => false,
    }
}

/// A socket of a pod. It gets what its packets would get, as far as that can be had here.
///
/// Left to its packets: connected UDP, because such a socket would keep its backend when that is gone, and from outside of its
/// namespace nobody can end it; frontends that masquerade; silence, in place of a refusal; a backend that is the pod itself.
#[inline(always)]
fn of_pod<F: Family>(call: Call, datagram: bool) -> Outcome {
    let (ip, port, proto) = (call.ip::<F>(), call.port(), call.proto());
    if proto != if datagram { Proto::UDP } else { Proto::TCP } || means_itself(&ip) {
        return Outcome::pass(Reason::NotThisNode);
    }
    let found = frontend::look_up(&ip, port, proto);
    if matches!(found, Err(mark) if mark & FrontendEntry::ADDRESS_REJECT == 0) {
        return Outcome::pass(Reason::NotService);
    }
    // Asked only where a Service is meant: it takes a look at each level.
    let Some(pod) = calling_pod() else {
        return Outcome::pass(Reason::NotThisNode);
    };
    let Ok(found) = found else {
        return refuse::<F>(call, Reason::NoSuchPort);
    };
    // SAFETY: a pointer into a map that was just found.
    let frontend = unsafe { *found };
    let left = Outcome::pass(Reason::PacketPath).of(frontend.service, 0);
    if datagram && call.is_connected() {
        // It hears only whom it is connected to, and that was left to packets.
        return left;
    }
    let client = if ip.is_v4() { &pod.ip4 } else { &pod.ip6 };
    let (high, low) = client.halves();
    if frontend.flags & FrontendEntry::MASQUERADE != 0
        || high | low == 0
        || frontend.flags & FrontendEntry::SOURCE_RANGES != 0 && !frontend::is_within(client, frontend.service)
    {
        return left;
    }
    if frontend.count == 0 {
        if frontend.flags & FrontendEntry::DROP_EMPTY != 0 {
            return left;
        }
        return refuse::<F>(call, Reason::NoBackend).of(frontend.service, 0);
    }
    let cookie = call.cookie();
    let forward = SocketKey { cookie, ip, port, direction: SocketKey::FORWARD, reserved: 0 };
    if datagram && let Some(known) = POD_SOCKET.get_ptr(&forward) {
        // SAFETY: a pointer into a map that was just found.
        let known = unsafe { *known };
        if frontend::serves(known.backend, known.generation) {
            if is_same((&known.ip, known.port), (&ip, port)) {
                return left;
            }
            // Its row for answers may have been forgotten, among many sockets.
            if show(cookie, &known, (&ip, port), true) {
                call.set::<F>(&known.ip, known.port);
                return Outcome::pass(Reason::Socket).of(known.service, known.backend);
            }
            return left;
        }
    }
    for _ in 0..balance::BACKEND_TRIES {
        let Ok((id, backend)) = frontend::choose(&frontend, client) else { continue };
        let mut chosen = SocketEntry {
            ip: backend.ip,
            port: backend.port,
            flags: 0,
            backend: id,
            generation: backend.generation,
            service: frontend.service,
        };
        let shown = !needs_packets(pod, backend) && show(cookie, &chosen, (&ip, port), datagram);
        if !shown {
            // The Service's own address: this socket's packets choose for themselves, all of them.
            chosen.ip = ip;
            chosen.port = port;
        }
        if datagram && POD_SOCKET.insert(&forward, &chosen, u64::from(BPF_ANY)).is_err() || !shown {
            return left;
        }
        call.set::<F>(&chosen.ip, chosen.port);
        return Outcome::pass(Reason::Socket).of(frontend.service, id);
    }
    left
}

/// Makes what comes from a backend look as if it came from the Service. False when it cannot: there is no room, or the
/// same backend is shown to this socket as another Service (of a socket that may talk to several at a time).
#[inline(always)]
fn show(cookie: u64, chosen: &SocketEntry, service: (&IpBytes, PortBe), several: bool) -> bool {
    let key = SocketKey { cookie, ip: chosen.ip, port: chosen.port, direction: SocketKey::REVERSE, reserved: 0 };
    if several && let Some(shown) = POD_SOCKET.get_ptr(&key) {
        // SAFETY: a pointer into a map that was just found.
        let shown = unsafe { &*shown };
        if !is_same((&shown.ip, shown.port), service) {
            if frontend::serves(shown.backend, shown.generation) {
                return false;
            }
        } else if shown.generation == chosen.generation {
            return true;
        }
    }
    let row = SocketEntry { ip: *service.0, port: service.1, ..*chosen };
    POD_SOCKET.insert(&key, &row, u64::from(BPF_ANY)).is_ok()
}

/// What a connection to a closed port gets. Without `bpf_set_retval` a program can only say EPERM; then the address becomes
/// one where nobody answers but the kernel, which refuses: port 0 of this node.
#[inline(always)]
fn refuse<F: Family>(call: Call, reason: Reason) -> Outcome {
    if SET_RETVAL.load() != 0 {
        // SAFETY: sets what the system call returns.
        unsafe { helpers::bpf_set_retval(ECONNREFUSED) };
        return Outcome::drop(reason);
    }
    let loopback = if F::HEADER_CHECKSUM.is_some() {
        IpBytes::from_v4_word(u32::from_be(0x7f00_0001))
    } else {
        IpBytes([0, 0, 0, u32::from_be(1)])
    };
    call.set::<F>(&loopback, PortBe(0));
    Outcome::pass(reason)
}

/// `recvmsg()` and `getpeername()`: the Service's address in place of the backend's.
#[inline(always)]
pub(crate) fn peer<F: Family>(call: *mut bpf_sock_addr, hook: Hook) -> i32 {
    let call = Call(call);
    let outcome = if call.is_of_this_node() {
        shown::<F>(call, &SOCKET)
    } else if SOCKET_LB.load() != 0 {
        shown::<F>(call, &POD_SOCKET)
    } else {
        Outcome::pass(Reason::NotThisNode)
    };
    exit::socket(hook, &outcome)
}

#[inline(always)]
fn shown<F: Family>(call: Call, rows: &LruHashMap<SocketKey, SocketEntry>) -> Outcome {
    let key = SocketKey {
        cookie: call.cookie(),
        ip: call.ip::<F>(),
        port: call.port(),
        direction: SocketKey::REVERSE,
        reserved: 0,
    };
    let Some(entry) = rows.get_ptr(&key) else {
        return Outcome::pass(Reason::NotService);
    };
    // SAFETY: a pointer into a map that was just found.
    let entry = unsafe { *entry };
    call.set::<F>(&entry.ip, entry.port);
    Outcome::pass(Reason::SocketReply).of(entry.service, entry.backend)
}
