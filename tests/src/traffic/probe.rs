//! One request, and what became of it: answered, refused, or nothing at all.

use std::fmt;
use std::io::{self, ErrorKind, Write as _};
use std::net::{IpAddr, SocketAddr};
use std::sync::atomic::{AtomicU16, Ordering};
use std::thread;
use std::time::Duration;

use super::socket::{tcp_connect, timed_out, udp_client};
use super::wire::{Greeting, Mode, UdpReply};
use crate::deadline::Deadline;
use crate::error::Result;
use crate::netns::Netns;

/// TCP or UDP.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Transport {
    /// A connection.
    Tcp,
    /// A datagram on a connected socket, which hears of ICMP errors.
    Udp,
}

/// What became of a request.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Answer {
    /// A server of the simulator answered.
    From {
        /// Its name.
        server: String,
        /// The client's address as it saw it.
        seen: IpAddr,
    },
    /// `ECONNREFUSED`.
    Refused,
    /// `EPERM`: the system call itself was not let through.
    Denied,
    /// Nothing came in time.
    Silent,
    /// Anything else.
    Failed(ErrorKind),
}

impl Transport {
    /// Both.
    pub const BOTH: [Self; 2] = [Self::Tcp, Self::Udp];
}

/// Asks once from `netns`. With a patience below a second a TCP answer is one to the first SYN.
///
/// # Errors
/// When the namespace cannot be entered; how the request ends is never an error.
pub fn probe(netns: &Netns, target: SocketAddr, transport: Transport, patience: Duration) -> Result<Answer> {
    netns.run(|| ask(target, transport, patience))
}

/// Asks all of them at once from `netns`, and gives the answers in their order.
///
/// # Errors
/// When the namespace cannot be entered.
pub fn probe_all(netns: &Netns, targets: &[(SocketAddr, Transport)], patience: Duration) -> Result<Vec<Answer>> {
    // Threads are made inside the namespace, so they are in it.
    netns.run(|| {
        thread::scope(|scope| {
            let asked: Vec<_> = targets
                .iter()
                .map(|&(target, transport)| scope.spawn(move || ask(target, transport, patience)))
                .collect();
            asked.into_iter().map(|one| one.join().unwrap_or(Answer::Failed(ErrorKind::Other))).collect()
        })
    })
}

fn ask(target: SocketAddr, transport: Transport, patience: Duration) -> Answer {
    let asked = match transport {
        Transport::Tcp => ask_tcp(target, patience),
        Transport::Udp => ask_udp(target, patience),
    };
    match asked {
        Ok((server, peer)) => Answer::From { server, seen: peer.ip() },
        Err(error) if timed_out(&error) => Answer::Silent,
        Err(error) => match error.kind() {
            ErrorKind::ConnectionRefused => Answer::Refused,
            ErrorKind::PermissionDenied => Answer::Denied,
            kind => Answer::Failed(kind),
        },
    }
}

fn ask_tcp(target: SocketAddr, patience: Duration) -> io::Result<(String, SocketAddr)> {
    let mut connection = tcp_connect(target, 0, patience)?;
    connection.write_all(&Mode::Echo.encode())?;
    let greeting = Greeting::read(&connection)?;
    Ok((greeting.server, greeting.peer))
}

/// A port that no question before came from, as long as they last: a flow of UDP outlives its socket, and keeps its
/// backend. Above the ports that the kernel chooses (to 60,999) and those that flows are masqueraded with (to 32,767).
fn fresh_port() -> u16 {
    const FIRST: u16 = 61_000;
    const END: u16 = 65_535;
    static ASKED: AtomicU16 = AtomicU16::new(0);
    FIRST + ASKED.fetch_add(1, Ordering::Relaxed) % (END - FIRST)
}

fn ask_udp(target: SocketAddr, patience: Duration) -> io::Result<(String, SocketAddr)> {
    let socket = udp_client(target, fresh_port(), patience)?;
    socket.connect(target)?;
    socket.send(&fastrand::u128(..).to_be_bytes())?;
    let deadline = Deadline::after(patience);
    let mut buffer = [0; 2048];
    loop {
        let left = deadline.left().ok_or(ErrorKind::TimedOut)?;
        socket.set_read_timeout(Some(left))?;
        match socket.recv(&mut buffer) {
            Err(error) if error.kind() == ErrorKind::Interrupted => {}
            received => {
                let (reply, ..) = UdpReply::read(&buffer[..received?]).ok_or(ErrorKind::InvalidData)?;
                return Ok((reply.server, reply.peer));
            }
        }
    }
}

impl fmt::Display for Transport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Tcp => "TCP",
            Self::Udp => "UDP",
        })
    }
}

impl fmt::Display for Answer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::From { server, seen } => write!(f, "{server} saw {seen}"),
            Self::Refused => f.write_str("refused"),
            Self::Denied => f.write_str("denied"),
            Self::Silent => f.write_str("silence"),
            Self::Failed(kind) => write!(f, "{kind:?}"),
        }
    }
}
