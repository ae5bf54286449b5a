//! The TCP server.

use std::collections::BTreeMap;
use std::io::{self, ErrorKind, Read as _, Write as _};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::os::fd::AsRawFd as _;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use crc32fast::Hasher;
use nix::sys::socket;

use super::payload::{PIECE, Payload};
use super::socket::{bind_patiently, canonical};
use super::wire::{FRAME_LEN, Greeting, HEADER_LEN, Mode, Receipt};
use crate::error::{Context as _, Result};
use crate::netns::Netns;

/// How long a connection may take to say what it wants, and [`TcpServer`] to end its connections.
const PATIENCE: Duration = Duration::from_secs(10);

/// Who serves a connection.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Serving {
    /// A thread of its own: any number of connections at once.
    #[default]
    Threads,
    /// One of so many threads, which accepts the next when it has ended: cheapest for short connections.
    Inline(u8),
}

/// Serves every mode of [`Mode`] until dropped. Its name is in every answer.
#[derive(Debug)]
pub struct TcpServer {
    address: SocketAddr,
    listener: Arc<TcpListener>,
    shared: Arc<Shared>,
    acceptors: Vec<JoinHandle<()>>,
}

#[derive(Debug)]
struct Shared {
    name: String,
    accepted: AtomicU64,
    open: Mutex<Open>,
    ended: Condvar,
}

#[derive(Debug, Default)]
struct Open {
    closing: bool,
    next: u64,
    connections: BTreeMap<u64, Arc<TcpStream>>,
}

impl TcpServer {
    /// Listens on every address of the namespace, both families.
    pub fn start(netns: &Netns, name: &str, port: u16) -> Result<Self> {
        Self::start_on(netns, name, SocketAddr::from(([0_u16; 8], port)), Serving::Threads)
    }

    /// Listens on one address (`[::]:PORT` is every address of both families).
    pub fn start_on(netns: &Netns, name: &str, address: SocketAddr, serving: Serving) -> Result<Self> {
        let what = || format!("TCP server {name} on {address} in {}", netns.name());
        let listener = Arc::new(netns.run(|| bind_patiently(|| TcpListener::bind(address)))?.context(what)?);
        let address = listener.local_addr().context(what)?;
        let open = Mutex::new(Open::default());
        let shared = Shared { name: name.to_owned(), accepted: AtomicU64::new(0), open, ended: Condvar::new() };
        let mut server = Self { address, listener, shared: Arc::new(shared), acceptors: Vec::new() };
        let count = if let Serving::Inline(count) = serving { count } else { 1 };
        for _ in 0..count {
            let (listener, shared) = (Arc::clone(&server.listener), Arc::clone(&server.shared));
            let builder = thread::Builder::new().name(format!("tcp-{name}"));
            server.acceptors.push(builder.spawn(move || accept_all(&listener, &shared, serving)).context(what)?);
        }
        Ok(server)
    }

    /// The address it listens on.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Connections accepted so far.
    pub fn accepted(&self) -> u64 {
        self.shared.accepted.load(Ordering::Relaxed)
    }

    /// Connections open now.
    pub fn open(&self) -> usize {
        self.shared.lock().connections.len()
    }
}

impl Drop for TcpServer {
    fn drop(&mut self) {
        let mut open = self.shared.lock();
        open.closing = true;
        // Both wake whoever is blocked in the call; an error means that the other side was faster.
        let _ = socket::shutdown(self.listener.as_raw_fd(), socket::Shutdown::Both);
        for connection in open.connections.values() {
            let _ = connection.shutdown(Shutdown::Both);
        }
        let wait = self.shared.ended.wait_timeout_while(open, PATIENCE, |open| !open.connections.is_empty());
        drop(wait);
        for acceptor in self.acceptors.drain(..) {
            let _ = acceptor.join();
        }
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, Open> {
        self.open.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Notes a connection; `None` when the server is closing.
    fn enter(&self, connection: TcpStream) -> Option<(u64, Arc<TcpStream>)> {
        let mut open = self.lock();
        if open.closing {
            return None;
        }
        self.accepted.fetch_add(1, Ordering::Relaxed);
        let id = open.next;
        open.next += 1;
        let connection = Arc::new(connection);
        open.connections.insert(id, Arc::clone(&connection));
        Some((id, connection))
    }

    fn serve(&self, id: u64, connection: &TcpStream) {
        // How a connection ends is the client's to judge: it sees the same end.
        let _ = serve(&self.name, connection);
        self.lock().connections.remove(&id);
        self.ended.notify_all();
    }
}

fn accept_all(listener: &TcpListener, shared: &Arc<Shared>, serving: Serving) {
    loop {
        let connection = match listener.accept() {
            Ok((connection, _)) => connection,
            // The client was gone before it was served.
            Err(error) if error.kind() == ErrorKind::ConnectionAborted && !shared.lock().closing => continue,
            Err(_) => return,
        };
        let Some((id, connection)) = shared.enter(connection) else { return };
        match serving {
            Serving::Inline(_) => shared.serve(id, &connection),
            Serving::Threads => {
                let worker = Arc::clone(shared);
                let spawned = thread::Builder::new()
                    .name(format!("tcp-{}-{id}", shared.name))
                    .stack_size(256 * 1024)
                    .spawn(move || worker.serve(id, &connection));
                if spawned.is_err() {
                    shared.lock().connections.remove(&id);
                }
            }
        }
    }
}

fn serve(name: &str, mut connection: &TcpStream) -> io::Result<()> {
    connection.set_nodelay(true)?;
    connection.set_read_timeout(Some(PATIENCE))?;
    let mut header = [0; HEADER_LEN];
    connection.read_exact(&mut header)?;
    let mode = Mode::decode(&header).ok_or(ErrorKind::InvalidData)?;
    Greeting { server: name.to_owned(), peer: canonical(connection.peer_addr()?) }.write(connection)?;
    // From here on a client may be idle for as long as it likes.
    connection.set_read_timeout(None)?;
    match mode {
        Mode::Exchange { up, down, seed } => exchange(connection, up, down, seed),
        Mode::Echo => echo(connection),
        Mode::Sink => sink(connection),
        Mode::Farewell => Ok(()),
    }
}

fn exchange(mut connection: &TcpStream, up: u64, down: u64, seed: u64) -> io::Result<()> {
    let mut piece = vec![0; PIECE];
    let mut hasher = Hasher::new();
    let mut received = 0;
    while received < up {
        let room = usize::try_from(up - received).map_or(PIECE, |left| left.min(PIECE));
        let len = connection.read(&mut piece[..room])?;
        if len == 0 {
            return Ok(());
        }
        hasher.update(&piece[..len]);
        received += len as u64;
    }
    Receipt { len: received, crc: hasher.finalize() }.write(connection)?;
    let mut payload = Payload::new(!seed, down);
    while let Some(piece) = payload.next_piece() {
        connection.write_all(piece)?;
    }
    wait_for_end(connection)
}

fn echo(mut connection: &TcpStream) -> io::Result<()> {
    let mut frame = [0; FRAME_LEN];
    loop {
        // A client may end between two frames, which a bare request-response does at once.
        match connection.read(&mut frame)? {
            0 => return Ok(()),
            len => connection.read_exact(&mut frame[len..])?,
        }
        connection.write_all(&frame)?;
    }
}

fn sink(mut connection: &TcpStream) -> io::Result<()> {
    let mut piece = vec![0; PIECE * 4];
    let mut received = 0;
    loop {
        match connection.read(&mut piece)? {
            0 => break,
            len => received += len as u64,
        }
    }
    Receipt { len: received, crc: 0 }.write(connection)?;
    wait_for_end(connection)
}

/// Lets the client close first, so that it and not the server's port waits in TIME_WAIT.
fn wait_for_end(mut connection: &TcpStream) -> io::Result<()> {
    let mut more = [0; 64];
    while connection.read(&mut more)? > 0 {}
    Ok(())
}
