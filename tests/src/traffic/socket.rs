//! Sockets with the options that std has no call for. They belong to the namespace of the calling thread.

use std::fs;
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpStream, UdpSocket};
use std::os::fd::AsRawFd as _;
use std::time::Duration;

use nix::errno::Errno;
use nix::sys::socket::{
    AddressFamily, SockFlag, SockType, SockaddrStorage, bind, connect, setsockopt, socket, sockopt,
};
use nix::sys::time::TimeVal;

use crate::deadline::Deadline;
use crate::error::{Context as _, Result};
use crate::netns::Netns;

/// The address that stands for all of a family's.
pub fn unspecified(family_of: SocketAddr) -> IpAddr {
    if family_of.is_ipv4() { Ipv4Addr::UNSPECIFIED.into() } else { Ipv6Addr::UNSPECIFIED.into() }
}

/// An address of a dual-stack socket as what it stands for: `::ffff:10.0.0.1` is `10.0.0.1`.
pub fn canonical(address: SocketAddr) -> SocketAddr {
    SocketAddr::new(address.ip().to_canonical(), address.port())
}

/// Binds, and tries again for a moment while the address is taken: a program that another thread starts holds copies
/// of all sockets until its exec, so an address can outlive its socket by that much.
pub fn bind_patiently<S>(mut bind: impl FnMut() -> io::Result<S>) -> io::Result<S> {
    let mut last = None;
    let bound = Deadline::secs(2).poll("the address is free", || match bind() {
        Err(error) if error.kind() == io::ErrorKind::AddrInUse => {
            last = Some(error);
            Ok(None)
        }
        done => Ok(Some(done)),
    });
    bound.unwrap_or_else(|_| Err(last.unwrap_or_else(|| io::ErrorKind::AddrInUse.into())))
}

/// A TCP connection, from a source port of choice (0: any).
///
/// # Errors
/// As connect(2); [`io::ErrorKind::TimedOut`] after `timeout`. The timeout also holds for every later read and write.
pub fn tcp_connect(target: SocketAddr, source_port: u16, timeout: Duration) -> io::Result<TcpStream> {
    let family = if target.is_ipv4() { AddressFamily::Inet } else { AddressFamily::Inet6 };
    let fd = socket(family, SockType::Stream, SockFlag::SOCK_CLOEXEC, None)?;
    let limit = TimeVal::new(i64::try_from(timeout.as_secs()).unwrap_or(i64::MAX), i64::from(timeout.subsec_micros()));
    setsockopt(&fd, sockopt::SendTimeout, &limit)?;
    setsockopt(&fd, sockopt::ReceiveTimeout, &limit)?;
    setsockopt(&fd, sockopt::TcpNoDelay, &true)?;
    if source_port != 0 {
        setsockopt(&fd, sockopt::ReuseAddr, &true)?;
        let source = SocketAddr::new(unspecified(target), source_port);
        bind(fd.as_raw_fd(), &SockaddrStorage::from(source))?;
    }
    loop {
        match connect(fd.as_raw_fd(), &SockaddrStorage::from(target)) {
            Ok(()) | Err(Errno::EISCONN) => return Ok(TcpStream::from(fd)),
            // The connect goes on meanwhile; a second call waits for the same one.
            Err(Errno::EINTR) => {}
            // A blocking connect says so when SO_SNDTIMEO ends it.
            Err(Errno::EINPROGRESS | Errno::EAGAIN) => return Err(io::ErrorKind::TimedOut.into()),
            Err(errno) => return Err(errno.into()),
        }
    }
}

/// A UDP socket for talking to `target`, from a source port of choice (0: any).
pub fn udp_client(target: SocketAddr, source_port: u16, timeout: Duration) -> io::Result<UdpSocket> {
    let source = SocketAddr::new(unspecified(target), source_port);
    let socket = bind_patiently(|| UdpSocket::bind(source))?;
    socket.set_read_timeout(Some(timeout))?;
    widen(&socket)?;
    Ok(socket)
}

/// Makes room for what arrives while its thread does not run: a datagram that the socket itself drops is no loss of
/// the network. Needs root, as all here does.
pub fn widen(socket: &UdpSocket) -> io::Result<()> {
    Ok(setsockopt(socket, sockopt::RcvBufForce, &(8 << 20))?)
}

/// TCP sockets of a namespace, from this port to that one, that the kernel has more than a memory of (TIME_WAIT).
pub fn tcp_sockets(netns: &Netns, port: u16, peer: u16) -> Result<usize> {
    let read = |file: &str| fs::read_to_string(format!("/proc/thread-self/net/{file}"));
    let tables = netns.run(|| Ok::<_, io::Error>(read("tcp")? + &read("tcp6")?))?;
    let tables = tables.context(|| format!("sockets of {}", netns.name()))?;
    Ok(tables.lines().filter(|row| is_socket(row, port, peer)).count())
}

/// Is a row of `/proc/net/tcp` (number, own address, the peer's, state) from this port to that one, and not in
/// TIME_WAIT?
fn is_socket(row: &str, port: u16, peer: u16) -> bool {
    let mut fields = row.split_whitespace().skip(1);
    let mut port_is = |wanted: u16| {
        let port = fields.next().and_then(|address| address.rsplit(':').next());
        port.is_some_and(|port| port == format!("{wanted:04X}"))
    };
    port_is(port) && port_is(peer) && fields.next() != Some("06")
}

/// Did a read or write end because of the socket's timeout? A call with a timeout is also interrupted where others
/// are restarted, when the process is stopped and continued; that is for the caller's deadline to judge too.
pub fn timed_out(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut | io::ErrorKind::Interrupted)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_of_sockets_are_told_by_ports_and_state() {
        let row = |state: &str| {
            format!("   1: 0100007F:1F90 0200007F:4E21 {state} 00000000:00000000 00:00000000 00000000 0 0 9 1")
        };
        assert!(is_socket(&row("09"), 8080, 20_001));
        assert!(!is_socket(&row("06"), 8080, 20_001));
        assert!(!is_socket(&row("09"), 8080, 20_002));
        assert!(!is_socket("  sl  local_address rem_address   st tx_queue", 8080, 20_001));
    }
}
