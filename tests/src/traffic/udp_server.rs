//! The UDP server.

use std::net::{SocketAddr, UdpSocket};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use super::socket::{bind_patiently, canonical, widen};
use super::wire::UdpReply;
use crate::error::{Context as _, Result};
use crate::netns::Netns;

/// How long it takes at most to see that it has to end.
const GLANCE: Duration = Duration::from_millis(50);

/// Answers every datagram until dropped.
#[derive(Debug)]
pub struct UdpServer {
    address: SocketAddr,
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

#[derive(Debug, Default)]
struct Shared {
    stop: AtomicBool,
    answered: AtomicU64,
}

impl UdpServer {
    /// Answers on every address of the namespace, both families. The kernel picks the address of an answer by its
    /// route; a host with several addresses takes [`UdpServer::start_on`].
    pub fn start(netns: &Netns, name: &str, port: u16) -> Result<Self> {
        Self::start_on(netns, name, SocketAddr::from(([0_u16; 8], port)))
    }

    /// Answers on one address.
    pub fn start_on(netns: &Netns, name: &str, address: SocketAddr) -> Result<Self> {
        let what = || format!("UDP server {name} on {address} in {}", netns.name());
        let socket = netns.run(|| bind_patiently(|| UdpSocket::bind(address)))?.context(what)?;
        socket.set_read_timeout(Some(GLANCE)).context(what)?;
        widen(&socket).context(what)?;
        let address = socket.local_addr().context(what)?;
        let shared = Arc::new(Shared::default());
        let (name, worker) = (name.to_owned(), Arc::clone(&shared));
        let builder = thread::Builder::new().name(format!("udp-{name}"));
        let thread = builder.spawn(move || answer_all(&socket, &name, &worker));
        Ok(Self { address, shared, thread: Some(thread.context(|| format!("UDP server on {address}"))?) })
    }

    /// The address it answers on.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Datagrams answered so far.
    pub fn answered(&self) -> u64 {
        self.shared.answered.load(Ordering::Relaxed)
    }
}

impl Drop for UdpServer {
    fn drop(&mut self) {
        self.shared.stop.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

fn answer_all(socket: &UdpSocket, name: &str, shared: &Shared) {
    let mut buffer = vec![0; usize::from(u16::MAX)];
    while !shared.stop.load(Ordering::Relaxed) {
        // Besides its timeout a socket also reports errors of earlier answers here (a client that is gone).
        let Ok((len, peer)) = socket.recv_from(&mut buffer) else { continue };
        let request = &buffer[..len];
        let reply = UdpReply {
            server: name.to_owned(),
            peer: canonical(peer),
            tag: UdpReply::tag(request),
            request_len: u16::try_from(len).unwrap_or(u16::MAX),
            request_crc: crc32fast::hash(request),
        };
        // Counted first: whoever has the answer finds it in the count.
        shared.answered.fetch_add(1, Ordering::Relaxed);
        if socket.send_to(&reply.datagram(request), peer).is_err() {
            shared.answered.fetch_sub(1, Ordering::Relaxed);
        }
    }
}
