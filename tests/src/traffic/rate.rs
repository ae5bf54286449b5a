//! Clients that work as fast as they can for a while: for measurements.

use std::fmt;
use std::io::{self, Write as _};
use std::net::{Shutdown, SocketAddr, TcpStream};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Barrier};
use std::thread;
use std::time::{Duration, Instant};

use hdrhistogram::Histogram;

use super::flow::{Flow, Ping};
use super::socket::{tcp_connect, udp_client};
use super::wire::{Greeting, Mode, Receipt, UdpReply};
use crate::error::{Context as _, Error, Result};
use crate::netns::Netns;

/// For a single operation; longer counts as an error.
const PATIENCE: Duration = Duration::from_secs(5);

/// What some workers did in some time.
#[derive(Clone, Debug)]
pub struct RateReport {
    /// Operations that succeeded.
    pub operations: u64,
    /// Operations that failed.
    pub errors: u64,
    /// How the first one failed.
    pub first_error: Option<String>,
    /// From the first operation's start to the last one's end.
    pub duration: Duration,
    /// Nanoseconds per operation.
    pub latency: Histogram<u64>,
}

/// Bytes moved in some time.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BulkReport {
    /// Bytes that the server received.
    pub bytes: u64,
    /// From the first write to the server's receipt.
    pub duration: Duration,
}

impl RateReport {
    fn empty() -> Self {
        // Fixed bounds, because recording saturates at them: up to a minute, which no operation lasts.
        let latency = Histogram::new_with_bounds(1, 60_000_000_000, 3).expect("bounds and digits are within its range");
        Self { operations: 0, errors: 0, first_error: None, duration: Duration::ZERO, latency }
    }

    /// Operations per second.
    pub fn per_second(&self) -> f64 {
        #[expect(clippy::cast_precision_loss, reason = "counts stay far below 2^52")]
        let operations = self.operations as f64;
        operations / self.duration.as_secs_f64()
    }

    /// The latency that this share (0 to 1) of the operations did not exceed.
    pub fn quantile(&self, share: f64) -> Duration {
        Duration::from_nanos(self.latency.value_at_quantile(share))
    }

    /// Median latency.
    pub fn p50(&self) -> Duration {
        self.quantile(0.5)
    }

    /// Latency of the slowest hundredth.
    pub fn p99(&self) -> Duration {
        self.quantile(0.99)
    }

    fn count(&mut self, started: Instant, outcome: io::Result<()>) {
        match outcome {
            Ok(()) => {
                self.operations += 1;
                let nanos = u64::try_from(started.elapsed().as_nanos()).unwrap_or(u64::MAX);
                self.latency.saturating_record(nanos);
            }
            Err(error) => {
                self.errors += 1;
                self.first_error.get_or_insert_with(|| error.to_string());
            }
        }
    }

    fn add(&mut self, other: Self) {
        self.operations += other.operations;
        self.errors += other.errors;
        self.first_error = self.first_error.take().or(other.first_error);
        self.duration = self.duration.max(other.duration);
        self.latency += &other.latency;
    }
}

impl fmt::Display for RateReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:.0}/s, p50 {:?}, p99 {:?}, {} errors", self.per_second(), self.p50(), self.p99(), self.errors)
    }
}

/// Which end closes a connection first, and so holds it in TIME_WAIT.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Closer {
    /// The client.
    Client,
    /// The server.
    Server,
}

/// Connect, request, response, close, over and over: every connection is a new flow.
pub fn connect_rate(
    netns: &Netns,
    target: SocketAddr,
    workers: usize,
    duration: Duration,
    closer: Closer,
) -> Result<RateReport> {
    work(netns, workers, lasting(duration), move || {
        let request = if closer == Closer::Client { Mode::Echo } else { Mode::Farewell }.encode();
        Ok(move || {
            let mut connection = tcp_connect(target, 0, PATIENCE)?;
            connection.write_all(&request)?;
            Greeting::read(&connection)?;
            match closer {
                Closer::Client => Ok(()),
                Closer::Server => io::copy(&mut connection, &mut io::sink()).map(drop),
            }
        })
    })
}

/// [`connect_rate`] at a steady rate: each worker makes its share, begins each at its time, and catches up when it was
/// held up.
pub fn connect_steadily(
    netns: &Netns,
    target: SocketAddr,
    workers: u32,
    per_second: u32,
    duration: Duration,
) -> Result<RateReport> {
    connect_at_rate(netns, target, workers, per_second, lasting(duration))
}

/// [`connect_steadily`] as long as `go_on` says of the number of connections that were made: a slow machine takes longer,
/// and does the same work.
pub fn connect_steadily_while(
    netns: &Netns,
    target: SocketAddr,
    workers: u32,
    per_second: u32,
    go_on: impl Fn(u64) -> bool + Clone + Send + 'static,
) -> Result<RateReport> {
    connect_at_rate(netns, target, workers, per_second, move |made, _| go_on(made))
}

fn connect_at_rate(
    netns: &Netns,
    target: SocketAddr,
    workers: u32,
    per_second: u32,
    go_on: impl Fn(u64, Duration) -> bool + Clone + Send + 'static,
) -> Result<RateReport> {
    let interval = Duration::from_secs(1) * workers / per_second.max(1);
    work(netns, workers as usize, go_on, move || {
        let request = Mode::Echo.encode();
        let mut due = Instant::now();
        Ok(move || {
            while let Some(early) = due.checked_duration_since(Instant::now()).filter(|early| !early.is_zero()) {
                thread::park_timeout(early);
            }
            due += interval;
            let mut connection = tcp_connect(target, 0, PATIENCE)?;
            connection.write_all(&request)?;
            Greeting::read(&connection).map(drop)
        })
    })
}

/// Request and response on one TCP connection per worker.
pub fn tcp_rr(netns: &Netns, target: SocketAddr, workers: usize, duration: Duration) -> Result<RateReport> {
    work(netns, workers, lasting(duration), move || {
        let mut flow = Flow::connect(target, 0, PATIENCE)?;
        Ok(move || match flow.ping(PATIENCE) {
            Ping::Echoed(_) => Ok(()),
            failed => Err(io::Error::other(format!("{failed:?}"))),
        })
    })
}

/// Request and response on one UDP socket per worker, `size` bytes (at least 16) each way.
pub fn udp_rr(
    netns: &Netns,
    target: SocketAddr,
    workers: usize,
    size: usize,
    duration: Duration,
) -> Result<RateReport> {
    work(netns, workers, lasting(duration), move || {
        let socket = udp_client(target, 0, PATIENCE)?;
        socket.connect(target)?;
        let mut request = vec![0; size.max(16)];
        let mut reply = vec![0; usize::from(u16::MAX)];
        let mut number = 0_u64;
        Ok(move || {
            number += 1;
            request[..8].copy_from_slice(&number.to_be_bytes());
            socket.send(&request)?;
            loop {
                let len = match socket.recv(&mut reply) {
                    Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                    received => received?,
                };
                let answered = UdpReply::read(&reply[..len]).ok_or(io::ErrorKind::InvalidData)?.0;
                if answered.tag == UdpReply::tag(&request) {
                    return Ok(());
                }
            }
        })
    })
}

/// Bytes as fast as they go, over so many connections, unchecked but counted at the server.
pub fn tcp_bulk(netns: &Netns, target: SocketAddr, connections: usize, duration: Duration) -> Result<BulkReport> {
    let barrier = Arc::new(Barrier::new(connections));
    let senders = (0..connections)
        .map(|_| {
            let barrier = Arc::clone(&barrier);
            netns.spawn("bulk", move || {
                let connection = tcp_connect(target, 0, PATIENCE);
                barrier.wait();
                connection.and_then(|connection| send_until(&connection, duration))
            })
        })
        .collect::<Result<Vec<_>>>()?;
    let mut total = BulkReport { bytes: 0, duration: Duration::ZERO };
    for sender in senders {
        let one = sender.join().context(|| format!("bulk from {} to {target}", netns.name()))?;
        total.bytes += one.bytes;
        total.duration = total.duration.max(one.duration);
    }
    Ok(total)
}

fn send_until(mut connection: &TcpStream, duration: Duration) -> io::Result<BulkReport> {
    connection.write_all(&Mode::Sink.encode())?;
    Greeting::read(connection)?;
    let piece = vec![0x5a; 256 * 1024];
    let start = Instant::now();
    let mut sent = 0;
    while start.elapsed() < duration {
        connection.write_all(&piece)?;
        sent += piece.len() as u64;
    }
    connection.shutdown(Shutdown::Write)?;
    let receipt = Receipt::read(connection)?;
    if receipt.len != sent {
        return Err(io::Error::other(format!("sent {sent} bytes, the server has {}", receipt.len)));
    }
    let report = BulkReport { bytes: sent, duration: start.elapsed() };
    // The server waits for this end.
    io::copy(&mut connection, &mut io::sink())?;
    Ok(report)
}

/// Goes on for this time.
fn lasting(duration: Duration) -> impl Fn(u64, Duration) -> bool + Clone + Send + 'static {
    move |_, passed| passed < duration
}

/// Runs `workers` threads in the namespace. Each prepares itself, waits for the others, and then repeats its operation
/// as long as `go_on` says: of the operations of all that succeeded, and of the time since it began.
fn work<G, P, O>(netns: &Netns, workers: usize, go_on: G, prepare: P) -> Result<RateReport>
where
    G: Fn(u64, Duration) -> bool + Clone + Send + 'static,
    P: Fn() -> io::Result<O> + Clone + Send + 'static,
    O: FnMut() -> io::Result<()>,
{
    let (barrier, succeeded) = (Arc::new(Barrier::new(workers)), Arc::new(AtomicU64::new(0)));
    let threads = (0..workers)
        .map(|_| {
            let (prepare, go_on) = (prepare.clone(), go_on.clone());
            let (barrier, succeeded) = (Arc::clone(&barrier), Arc::clone(&succeeded));
            netns.spawn("rate", move || {
                let operation = prepare();
                barrier.wait();
                operation.map(|operation| repeat(operation, &succeeded, go_on))
            })
        })
        .collect::<Result<Vec<_>>>()?;
    let mut total = RateReport::empty();
    for thread in threads {
        total.add(thread.join().context(|| format!("client in {}", netns.name()))?);
    }
    if total.operations == 0 {
        let first = total.first_error.unwrap_or_else(|| "no time".to_owned());
        return Err(Error::mismatch(format!("clients in {}", netns.name()), "answers", first));
    }
    Ok(total)
}

fn repeat(
    mut operation: impl FnMut() -> io::Result<()>,
    succeeded: &AtomicU64,
    go_on: impl Fn(u64, Duration) -> bool,
) -> RateReport {
    let mut report = RateReport::empty();
    let start = Instant::now();
    while go_on(succeeded.load(Ordering::Relaxed), start.elapsed()) {
        let started = Instant::now();
        let outcome = operation();
        succeeded.fetch_add(u64::from(outcome.is_ok()), Ordering::Relaxed);
        report.count(started, outcome);
    }
    report.duration = start.elapsed();
    report
}
