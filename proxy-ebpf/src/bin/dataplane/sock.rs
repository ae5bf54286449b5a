//! Sockets of the node's own network namespace: the address is replaced before a packet exists.
//!
//! Pods are left to the packet path, even though their cgroups lie below: a runtime with its own kernel would not be
//! seen here, and policy is at the veth.

use aya_ebpf::bindings::{BPF_ANY, bpf_sock_addr};
use aya_ebpf::helpers;
use core::ffi::c_void;
use proxy_abi::{FrontendEntry, FrontendKey, Hook, IpBytes, PortBe, PrefixKey, Proto, Reason, SocketEntry, SocketKey};
use proxy_ebpf::balance;
use proxy_ebpf::packet::Family;

use crate::exit::{self, Outcome};
use crate::frontend;
use crate::maps::{NETNS_COOKIE, SET_RETVAL, SOCKET};

const ECONNREFUSED: i32 = -111;

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
fn translate<F: Family>(call: Call, remember: bool) -> Outcome {
    if !call.is_of_this_node() {
        return Outcome::pass(Reason::NotThisNode);
    }
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
    if remember && let Some(known) = SOCKET.get_ptr(&forward) {
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
                    reserved: 0,
                    backend: id,
                    generation: backend.generation,
                    service: frontend.service,
                };
                if remember {
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
        let key = SocketKey {
            cookie: call.cookie(),
            ip: call.ip::<F>(),
            port: call.port(),
            direction: SocketKey::REVERSE,
            reserved: 0,
        };
        match SOCKET.get_ptr(&key) {
            Some(entry) => {
                // SAFETY: a pointer into a map that was just found.
                let entry = unsafe { *entry };
                call.set::<F>(&entry.ip, entry.port);
                Outcome::pass(Reason::SocketReply).of(entry.service, entry.backend)
            }
            None => Outcome::pass(Reason::NotService),
        }
    } else {
        Outcome::pass(Reason::NotThisNode)
    };
    exit::socket(hook, &outcome)
}
