//! TCP connections that live long: over a restart of the agent, a change of endpoints, a flood.

use std::io::{ErrorKind, Read as _, Write as _};
use std::net::{SocketAddr, TcpStream};
use std::sync::mpsc::{self, RecvTimeoutError, Sender};
use std::time::{Duration, Instant};

use super::socket::{tcp_connect, timed_out};
use super::wire::{FRAME_LEN, Greeting, Mode, frame, frame_number};
use crate::error::{Context as _, Error, Result};
use crate::netns::{Inside, Netns};

/// One open connection to a [`super::TcpServer`].
#[derive(Debug)]
pub struct Flow {
    connection: TcpStream,
    greeting: Greeting,
    local: SocketAddr,
    peer: SocketAddr,
    next: u64,
}

/// How a message on a [`Flow`] went.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ping {
    /// Its echo came, after this time.
    Echoed(Duration),
    /// No echo in time; a later one may still find it.
    Late,
    /// The connection was reset.
    Reset,
    /// The connection was closed by the other side, or broke in another way.
    Closed,
    /// An echo came damaged, or one that was not asked for.
    Damaged,
}

impl Flow {
    /// Connects from `netns`; returns when the server has answered.
    pub fn open(netns: &Netns, target: SocketAddr, source_port: u16, timeout: Duration) -> Result<Self> {
        let what = || format!("TCP flow from {} to {target}", netns.name());
        let opened = netns.run(|| Self::connect(target, source_port, timeout))?;
        opened.context(what)
    }

    /// Connects from the namespace of the calling thread.
    pub(crate) fn connect(target: SocketAddr, source_port: u16, timeout: Duration) -> std::io::Result<Self> {
        let mut connection = tcp_connect(target, source_port, timeout)?;
        let (local, peer) = (connection.local_addr()?, connection.peer_addr()?);
        connection.write_all(&Mode::Echo.encode())?;
        let greeting = Greeting::read(&connection)?;
        Ok(Self { connection, greeting, local, peer, next: 1 })
    }

    /// Who answered.
    pub fn server_name(&self) -> &str {
        &self.greeting.server
    }

    /// The client's address as the server saw it.
    pub fn peer_seen_by_server(&self) -> SocketAddr {
        self.greeting.peer
    }

    /// The client's own address.
    pub fn local(&self) -> SocketAddr {
        self.local
    }

    /// The server's address as the client sees it.
    pub fn peer(&self) -> SocketAddr {
        self.peer
    }

    /// Sends the next numbered message and waits for its echo. Echoes of earlier messages that were late are read
    /// over.
    pub fn ping(&mut self, timeout: Duration) -> Ping {
        let start = Instant::now();
        let number = self.next;
        self.next += 1;
        self.try_ping(number, timeout).map_or_else(
            |error| match error.kind() {
                ErrorKind::ConnectionReset | ErrorKind::BrokenPipe => Ping::Reset,
                ErrorKind::InvalidData => Ping::Damaged,
                _ if timed_out(&error) => Ping::Late,
                _ => Ping::Closed,
            },
            |()| Ping::Echoed(start.elapsed()),
        )
    }

    fn try_ping(&mut self, number: u64, timeout: Duration) -> std::io::Result<()> {
        self.connection.set_read_timeout(Some(timeout))?;
        self.connection.set_write_timeout(Some(timeout))?;
        self.connection.write_all(&frame(number))?;
        loop {
            let mut echo = [0; FRAME_LEN];
            self.connection.read_exact(&mut echo)?;
            match frame_number(&echo) {
                Some(echoed) if echoed == number => return Ok(()),
                Some(echoed) if echoed < number => {}
                _ => return Err(ErrorKind::InvalidData.into()),
            }
        }
    }
}

/// Flows that send all the time, each on a thread of its own.
#[derive(Debug)]
pub struct BusyFlows {
    stops: Vec<Sender<()>>,
    flows: Vec<Inside<FlowReport>>,
}

/// What became of some flows.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct FlowReport {
    /// Flows.
    pub flows: u64,
    /// Messages sent.
    pub sent: u64,
    /// Echoes received in time.
    pub echoed: u64,
    /// Messages whose echo was not there in time.
    pub late: u64,
    /// Flows that ended by a reset.
    pub reset: u64,
    /// Flows that ended in another way, or with damaged bytes.
    pub broken: u64,
    /// The longest wait for an echo.
    pub slowest: Duration,
}

impl FlowReport {
    /// Did every message come back and every flow live?
    pub fn is_whole(&self) -> bool {
        self.flows > 0 && self.echoed == self.sent && self.late + self.reset + self.broken == 0
    }

    fn add(&mut self, other: &Self) {
        self.flows += other.flows;
        self.sent += other.sent;
        self.echoed += other.echoed;
        self.late += other.late;
        self.reset += other.reset;
        self.broken += other.broken;
        self.slowest = self.slowest.max(other.slowest);
    }

    /// Counts one message; `false` when the flow has ended.
    fn count(&mut self, ping: Ping) -> bool {
        self.sent += 1;
        match ping {
            Ping::Echoed(wait) => {
                self.echoed += 1;
                self.slowest = self.slowest.max(wait);
            }
            Ping::Late => self.late += 1,
            Ping::Reset => self.reset += 1,
            Ping::Closed | Ping::Damaged => self.broken += 1,
        }
        matches!(ping, Ping::Echoed(_) | Ping::Late)
    }
}

/// Sends one message on each flow.
pub fn ping_all(flows: &mut [Flow], timeout: Duration) -> FlowReport {
    let mut report = FlowReport { flows: flows.len() as u64, ..FlowReport::default() };
    for flow in flows {
        report.count(flow.ping(timeout));
    }
    report
}

impl BusyFlows {
    /// Opens `count` flows and sends a message on each every `interval` (zero: as fast as echoes come). An echo is
    /// late after `timeout`.
    pub fn start(
        netns: &Netns,
        target: SocketAddr,
        count: usize,
        interval: Duration,
        timeout: Duration,
    ) -> Result<Self> {
        let flows = (0..count).map(|_| Flow::open(netns, target, 0, timeout)).collect::<Result<Vec<_>>>()?;
        let mut busy = Self { stops: Vec::new(), flows: Vec::new() };
        for mut flow in flows {
            let (stop, stopped) = mpsc::channel();
            let inside = netns.spawn("busy-flow", move || {
                let mut report = FlowReport { flows: 1, ..FlowReport::default() };
                while report.count(flow.ping(timeout)) {
                    match stopped.recv_timeout(interval) {
                        Err(RecvTimeoutError::Timeout) => {}
                        Ok(()) | Err(RecvTimeoutError::Disconnected) => break,
                    }
                }
                report
            });
            busy.flows.push(inside?);
            busy.stops.push(stop);
        }
        Ok(busy)
    }

    /// Ends them and says how they went.
    ///
    /// # Errors
    /// None of its own: a flow that ended early is in the report.
    pub fn stop(mut self) -> FlowReport {
        self.stops.clear();
        let mut report = FlowReport::default();
        for flow in self.flows.drain(..) {
            report.add(&flow.join());
        }
        report
    }
}

impl FlowReport {
    /// The report as an error, unless it [`is_whole`](Self::is_whole).
    pub fn check(self, what: &str) -> Result<Self> {
        if self.is_whole() { Ok(self) } else { Err(Error::mismatch(what, "every message echoed", format!("{self:?}"))) }
    }
}
