//! One checked UDP request and its reply.

use std::net::{SocketAddr, UdpSocket};
use std::time::Duration;

use super::payload;
use super::socket::{timed_out, udp_client};
use super::wire::{TAG_LEN, UdpReply};
use crate::deadline::Deadline;
use crate::error::{Context as _, Error, Result};
use crate::netns::Netns;

/// What to send, and how.
#[derive(Clone, Copy, Debug)]
pub struct UdpOptions {
    /// Bytes of the request.
    pub size: usize,
    /// Source port; 0 takes any.
    pub source_port: u16,
    /// With `connect`, so that the kernel refuses answers from other addresses; else the client itself compares.
    pub connected: bool,
    /// For the reply.
    pub timeout: Duration,
}

impl Default for UdpOptions {
    fn default() -> Self {
        Self { size: 64, source_port: 0, connected: false, timeout: Duration::from_secs(3) }
    }
}

/// A reply that came through whole, from the address that was asked.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct UdpReport {
    /// Who answered.
    pub server_name: String,
    /// The client's address as the server saw it.
    pub peer_seen_by_server: SocketAddr,
    /// The client's address as it saw itself; without `connect`, an unspecified address with its port.
    pub local: SocketAddr,
    /// Where the reply came from.
    pub reply_from: SocketAddr,
    /// Bytes of the request.
    pub size: usize,
}

/// Sends one request from `netns` to `target` and checks its reply.
///
/// # Errors
/// [`Error::Timeout`] without a reply, [`Error::Mismatch`] for one from another address or with other bytes,
/// [`Error::Io`] with what the socket said.
pub fn udp_exchange(netns: &Netns, target: SocketAddr, options: &UdpOptions) -> Result<UdpReport> {
    let what = format!("UDP {} bytes from {} to {target}", options.size, netns.name());
    let socket = netns.run(|| -> std::io::Result<UdpSocket> {
        let socket = udp_client(target, options.source_port, options.timeout)?;
        if options.connected {
            socket.connect(target)?;
        }
        Ok(socket)
    })?;
    let socket = socket.context(|| what.clone())?;
    let request = payload::bytes(fastrand::u64(..), options.size);
    let sent = if options.connected { socket.send(&request) } else { socket.send_to(&request, target) };
    sent.context(|| what.clone())?;
    let deadline = Deadline::after(options.timeout);
    let mut buffer = vec![0; usize::from(u16::MAX)];
    loop {
        let left = deadline.left().ok_or_else(|| deadline.missed(format!("reply to {what}")))?;
        socket.set_read_timeout(Some(left)).context(|| what.clone())?;
        let (len, from) = match socket.recv_from(&mut buffer) {
            Err(error) if timed_out(&error) => continue,
            received => received.context(|| format!("reply to {what}"))?,
        };
        if from != target {
            return Err(Error::mismatch(format!("sender of the reply to {what}"), target, from));
        }
        let (reply, tail, at) = UdpReply::read(&buffer[..len])
            .ok_or_else(|| Error::mismatch(format!("reply to {what}"), "a server's reply", format!("{len} bytes")))?;
        if request.len() >= TAG_LEN && reply.tag != UdpReply::tag(&request) {
            continue; // the answer to an earlier request from the same port
        }
        let got = (usize::from(reply.request_len), reply.request_crc, tail);
        let expected = (request.len(), crc32fast::hash(&request), request.get(at..).unwrap_or_default());
        if got != expected {
            let lengths = |(request, crc, tail): (usize, u32, &[u8])| format!("{request} ({crc:08x}), {}", tail.len());
            return Err(Error::mismatch(format!("bytes of {what}"), lengths(expected), lengths(got)));
        }
        let local = socket.local_addr().context(|| what.clone())?;
        return Ok(UdpReport {
            server_name: reply.server,
            peer_seen_by_server: reply.peer,
            local,
            reply_from: from,
            size: options.size,
        });
    }
}
