//! Echo requests (RFC 792, RFC 4443), from the kernel's own sockets for them.

use std::io;
use std::net::{IpAddr, SocketAddr};
use std::os::fd::AsRawFd as _;
use std::time::Duration;

use nix::sys::socket::{
    AddressFamily, MsgFlags, SockFlag, SockProtocol, SockType, SockaddrStorage, connect, recv, send, setsockopt,
    socket, sockopt,
};
use nix::sys::time::TimeVal;

use super::payload;
use super::socket::timed_out;
use crate::deadline::Deadline;
use crate::error::{Context as _, Result};
use crate::netns::Netns;

/// Sends one echo request with so many bytes of data, and tells whether the answer came in time and whole. Needs
/// `net.ipv4.ping_group_range` to have group 0.
///
/// # Errors
/// When the namespace cannot be entered or the socket cannot be made; no answer is none.
pub fn echo(netns: &Netns, target: IpAddr, size: usize, timeout: Duration) -> Result<bool> {
    let what = || format!("echo of {size} bytes from {} to {target}", netns.name());
    netns.run(|| ask(target, size, timeout))?.context(what)
}

fn ask(target: IpAddr, size: usize, timeout: Duration) -> io::Result<bool> {
    let (family, protocol, kind) = match target {
        IpAddr::V4(_) => (AddressFamily::Inet, SockProtocol::Icmp, 8),
        IpAddr::V6(_) => (AddressFamily::Inet6, SockProtocol::IcmpV6, 128),
    };
    let fd = socket(family, SockType::Datagram, SockFlag::SOCK_CLOEXEC, protocol)?;
    setsockopt(&fd, sockopt::ReceiveTimeout, &TimeVal::new(0, 20_000))?;
    connect(fd.as_raw_fd(), &SockaddrStorage::from(SocketAddr::new(target, 0)))?;
    let data = payload::bytes(fastrand::u64(..), size);
    // Type, code, checksum and identifier (both the kernel's), sequence number 1.
    let request = [&[kind, 0, 0, 0, 0, 0, 0, 1], data.as_slice()].concat();
    send(fd.as_raw_fd(), &request, MsgFlags::empty())?;
    let deadline = Deadline::after(timeout);
    let mut buffer = vec![0; 8 + size + 1];
    loop {
        match recv(fd.as_raw_fd(), &mut buffer, MsgFlags::empty()).map_err(io::Error::from) {
            Ok(len) if buffer[8..len.max(8)] == data[..] => return Ok(true),
            Ok(_) => {}
            Err(error) if timed_out(&error) => {}
            // What an ICMP error said: no answer.
            Err(_) => return Ok(false),
        }
        if deadline.left().is_none() {
            return Ok(false);
        }
    }
}
