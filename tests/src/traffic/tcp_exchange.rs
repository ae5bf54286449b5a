//! One checked TCP transfer, both ways.

use std::io::{self, Read as _, Write as _};
use std::net::{SocketAddr, TcpStream};
use std::time::{Duration, Instant};

use crc32fast::Hasher;

use super::payload::{PIECE, Payload};
use super::socket::tcp_connect;
use super::wire::{Greeting, Mode, Receipt};
use crate::deadline::Deadline;
use crate::error::{Context as _, Error, Result};
use crate::netns::Netns;

/// What to transfer, and from where.
#[derive(Clone, Copy, Debug)]
pub struct TcpOptions {
    /// Bytes to the server.
    pub up: u64,
    /// Bytes from the server.
    pub down: u64,
    /// Source port; 0 takes any.
    pub source_port: u16,
    /// For the whole exchange.
    pub timeout: Duration,
}

impl Default for TcpOptions {
    fn default() -> Self {
        Self { up: 0, down: 0, source_port: 0, timeout: Duration::from_secs(10) }
    }
}

/// A transfer that came through whole.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TcpReport {
    /// Who answered.
    pub server_name: String,
    /// The client's address as the server saw it.
    pub peer_seen_by_server: SocketAddr,
    /// The client's address as it saw itself.
    pub local: SocketAddr,
    /// The server's address as the client's `getpeername` says.
    pub peer: SocketAddr,
    /// Bytes to the server.
    pub up: u64,
    /// Bytes from the server.
    pub down: u64,
    /// From connect to the last byte.
    pub duration: Duration,
}

/// Connects from `netns` to `target` and moves so many bytes up, then down; both are checked.
pub fn tcp_exchange(netns: &Netns, target: SocketAddr, up: u64, down: u64) -> Result<TcpReport> {
    tcp_exchange_with(netns, target, &TcpOptions { up, down, ..TcpOptions::default() })
}

/// [`tcp_exchange`] with options.
///
/// # Errors
/// [`Error::Io`] with what the socket said, [`Error::Timeout`], or [`Error::Mismatch`] for damaged bytes.
pub fn tcp_exchange_with(netns: &Netns, target: SocketAddr, options: &TcpOptions) -> Result<TcpReport> {
    let what = |step: &str| format!("{step}: TCP from {} to {target}", netns.name());
    let start = Instant::now();
    let deadline = Deadline::after(options.timeout);
    let connection = netns.run(|| tcp_connect(target, options.source_port, options.timeout))?;
    let mut connection = connection.context(|| what("connect"))?;
    let local = connection.local_addr().context(|| what("getsockname"))?;
    let peer = connection.peer_addr().context(|| what("getpeername"))?;
    let TcpOptions { up, down, .. } = *options;
    let seed = fastrand::u64(..);
    connection.write_all(&Mode::Exchange { up, down, seed }.encode()).context(|| what("request"))?;
    let greeting = Greeting::read(&connection).context(|| what("greeting"))?;

    let sent = send(&connection, up, seed, &deadline, &what("upload"))?;
    let receipt = Receipt::read(&connection).context(|| what("receipt"))?;
    if receipt != sent {
        return Err(Error::mismatch(what("upload"), format!("{sent:?}"), format!("{receipt:?}")));
    }
    receive(&connection, down, seed, &deadline, &what("download"))?;
    Ok(TcpReport {
        server_name: greeting.server,
        peer_seen_by_server: greeting.peer,
        local,
        peer,
        up,
        down,
        duration: start.elapsed(),
    })
}

fn send(mut connection: &TcpStream, len: u64, seed: u64, deadline: &Deadline, what: &str) -> Result<Receipt> {
    let mut payload = Payload::new(seed, len);
    let mut hasher = Hasher::new();
    while let Some(piece) = payload.next_piece() {
        hasher.update(piece);
        within(&mut connection, deadline, what)?;
        connection.write_all(piece).context(|| what.to_owned())?;
    }
    within(&mut connection, deadline, what)?;
    Ok(Receipt { len, crc: hasher.finalize() })
}

fn receive(mut connection: &TcpStream, len: u64, seed: u64, deadline: &Deadline, what: &str) -> Result<()> {
    let mut expected = Payload::new(!seed, len);
    let mut got = vec![0; PIECE];
    let mut at = 0_u64;
    while let Some(piece) = expected.next_piece() {
        within(&mut connection, deadline, what)?;
        let got = &mut got[..piece.len()];
        connection.read_exact(got).context(|| format!("{what}, after {at} bytes"))?;
        if got != piece {
            let wrong = got.iter().zip(piece).position(|(a, b)| a != b).unwrap_or_default();
            return Err(Error::mismatch(what, "the server's bytes", format!("a difference at {}", at + wrong as u64)));
        }
        at += piece.len() as u64;
    }
    Ok(())
}

/// Limits the next read and write to the time left.
fn within(connection: &mut &TcpStream, deadline: &Deadline, what: &str) -> Result<()> {
    let left = deadline.left().ok_or_else(|| deadline.missed(what))?;
    let set = || -> io::Result<()> {
        connection.set_read_timeout(Some(left))?;
        connection.set_write_timeout(Some(left))
    };
    set().context(|| what.to_owned())
}
