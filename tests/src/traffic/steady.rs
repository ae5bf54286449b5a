//! A UDP sender with a steady rate, for what happens over time: losses while an agent restarts, and which server
//! answers after an endpoint went away.

use std::collections::BTreeMap;
use std::io;
use std::net::{SocketAddr, UdpSocket};
use std::sync::mpsc::{self, RecvTimeoutError, Sender};
use std::sync::{Arc, OnceLock};
use std::thread;
use std::time::{Duration, Instant};

use super::socket::{timed_out, udp_client};
use super::wire::UdpReply;
use crate::error::{Context as _, Result};
use crate::netns::{Inside, Netns};

/// How long is listened after the last request in any case: a second answer to one may come.
const TAIL: Duration = Duration::from_millis(500);
/// How long an answer that is missing is waited for: what a busy machine has kept lying is not lost.
const LATE: Duration = Duration::from_secs(10);

/// Rate and shape.
#[derive(Clone, Copy, Debug)]
pub struct SteadyOptions {
    /// Requests per second.
    pub rate: u32,
    /// Bytes of a request, at least 16.
    pub size: usize,
    /// Source port; 0 takes any.
    pub source_port: u16,
    /// With `connect`.
    pub connected: bool,
}

impl Default for SteadyOptions {
    fn default() -> Self {
        Self { rate: 1000, size: 64, source_port: 0, connected: false }
    }
}

/// A running sender.
#[derive(Debug)]
pub struct Steady {
    start: Instant,
    stop: Option<Sender<()>>,
    ending: Arc<OnceLock<Ending>>,
    sender: Option<Inside<Sent>>,
    receiver: Option<thread::JoinHandle<Received>>,
}

/// One request, by its number.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Sample {
    /// When it was sent, since the start.
    pub sent: Duration,
    /// Which server answered (an index into [`SteadyReport::servers`]) and after which time.
    pub answer: Option<(usize, Duration)>,
}

/// What became of every request.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct SteadyReport {
    /// Names of the servers that answered.
    pub servers: Vec<String>,
    /// The requests, in order.
    pub samples: Vec<Sample>,
    /// Second answers to one request.
    pub duplicates: u64,
    /// Answers from an address that was not asked.
    pub strangers: u64,
    /// Answers that were damaged.
    pub damaged: u64,
    /// Requests that the socket refused to send, or errors it reported (ICMP), by kind.
    pub errors: BTreeMap<String, u64>,
}

/// What the receiver still waits for.
#[derive(Clone, Copy, Debug)]
struct Ending {
    /// When the last request was sent.
    since: Instant,
    /// Requests that are to be answered.
    wanted: usize,
}

#[derive(Debug, Default)]
struct Sent {
    times: Vec<Duration>,
    errors: BTreeMap<String, u64>,
}

#[derive(Debug, Default)]
struct Received {
    servers: Vec<String>,
    answers: BTreeMap<u64, (usize, Duration)>,
    report: SteadyReport,
}

impl Steady {
    /// Starts to send from `netns` to `target`.
    pub fn start(netns: &Netns, target: SocketAddr, options: SteadyOptions) -> Result<Self> {
        let what = || format!("steady UDP from {} to {target}", netns.name());
        let socket = netns.run(|| -> io::Result<UdpSocket> {
            let socket = udp_client(target, options.source_port, Duration::from_millis(20))?;
            if options.connected {
                socket.connect(target)?;
            }
            Ok(socket)
        })?;
        let socket = socket.context(what)?;
        let incoming = socket.try_clone().context(what)?;
        let ending = Arc::new(OnceLock::new());
        let (stop, stopped) = mpsc::channel();
        let start = Instant::now();
        let worker = Arc::clone(&ending);
        let receiver = thread::Builder::new()
            .name("steady-receive".to_owned())
            .spawn(move || receive(&incoming, target, start, &worker))
            .context(what)?;
        let sender = netns.spawn("steady-send", move || {
            let mut sent = Sent::default();
            loop {
                send_due(&socket, target, start, options, &mut sent);
                let next = due_at(sent.times.len(), options.rate);
                match stopped.recv_timeout(next.saturating_sub(start.elapsed())) {
                    Err(RecvTimeoutError::Timeout) => {}
                    Ok(()) | Err(RecvTimeoutError::Disconnected) => return sent,
                }
            }
        })?;
        Ok(Self { start, stop: Some(stop), ending, sender: Some(sender), receiver: Some(receiver) })
    }

    /// The moment that the report's times count from.
    pub fn started(&self) -> Instant {
        self.start
    }

    /// Ends it, waits until every request is answered or will not be, and reports.
    pub fn stop(mut self) -> SteadyReport {
        self.finish(true)
    }

    /// The same where requests without an answer are expected: they are not waited for.
    pub fn stop_unanswered(mut self) -> SteadyReport {
        self.finish(false)
    }

    fn finish(&mut self, all_answered: bool) -> SteadyReport {
        drop(self.stop.take());
        let sent = self.sender.take().map(Inside::join).unwrap_or_default();
        let wanted = if all_answered { sent.times.len() } else { 0 };
        self.ending.get_or_init(|| Ending { since: Instant::now(), wanted });
        let received = self.receiver.take().map(|thread| thread.join().unwrap_or_default()).unwrap_or_default();
        let samples = (0..).zip(sent.times).map(|(number, sent)| {
            let answer = received.answers.get(&number).map(|&(server, at)| (server, at.saturating_sub(sent)));
            Sample { sent, answer }
        });
        let mut report = SteadyReport { servers: received.servers, samples: samples.collect(), ..received.report };
        for (error, count) in sent.errors {
            *report.errors.entry(error).or_default() += count;
        }
        report
    }
}

impl Drop for Steady {
    fn drop(&mut self) {
        if self.stop.is_some() {
            self.finish(false);
        }
    }
}

impl SteadyReport {
    /// Every request was answered, once, by who was asked, undamaged; and there were some.
    ///
    /// # Panics
    /// Otherwise.
    pub fn assert_whole(&self) {
        eprintln!("UDP: {} sent, {} lost", self.sent(), self.lost());
        let wrong = (self.lost(), self.duplicates, self.strangers, self.damaged, self.errors.len());
        assert_eq!(wrong, (0, 0, 0, 0, 0), "{:?}", self.errors);
        assert!(self.sent() > 100, "{}", self.sent());
    }

    /// Requests sent.
    pub fn sent(&self) -> usize {
        self.samples.len()
    }

    /// Requests answered.
    pub fn answered(&self) -> usize {
        self.samples.iter().filter(|sample| sample.answer.is_some()).count()
    }

    /// Requests never answered.
    pub fn lost(&self) -> usize {
        self.sent() - self.answered()
    }

    /// Requests that each server answered.
    pub fn by_server(&self) -> BTreeMap<&str, usize> {
        let mut counts = BTreeMap::new();
        for (server, _) in self.samples.iter().filter_map(|sample| sample.answer) {
            *counts.entry(self.servers[server].as_str()).or_default() += 1;
        }
        counts
    }

    /// When the first request was sent that `server` answered, not counting those before `since`.
    pub fn first_answered_by(&self, server: &str, since: Duration) -> Option<Duration> {
        self.of(server).find(|&sent| sent >= since)
    }

    /// When the last request was sent that `server` answered.
    pub fn last_answered_by(&self, server: &str) -> Option<Duration> {
        self.of(server).last()
    }

    fn of(&self, server: &str) -> impl Iterator<Item = Duration> {
        let index = self.servers.iter().position(|name| name == server);
        self.samples
            .iter()
            .filter(move |sample| index.is_some() && sample.answer.map(|(server, _)| server) == index)
            .map(|sample| sample.sent)
    }
}

/// When request `number` is due.
fn due_at(number: usize, rate: u32) -> Duration {
    let nanos = number as u128 * 1_000_000_000 / u128::from(rate.max(1));
    Duration::from_nanos(u64::try_from(nanos).unwrap_or(u64::MAX))
}

/// Sends every request that is due. A sender that was held up catches up, so that the rate is kept.
fn send_due(socket: &UdpSocket, target: SocketAddr, start: Instant, options: SteadyOptions, sent: &mut Sent) {
    let mut request = vec![0; options.size.max(16)];
    loop {
        let now = start.elapsed();
        let number = sent.times.len();
        if due_at(number, options.rate) > now {
            return;
        }
        request[..8].copy_from_slice(&(number as u64).to_be_bytes());
        let outcome = if options.connected { socket.send(&request) } else { socket.send_to(&request, target) };
        if let Err(error) = outcome {
            *sent.errors.entry(error.kind().to_string()).or_default() += 1;
        }
        sent.times.push(now);
    }
}

impl Ending {
    /// Is there nothing more to wait for, with so many requests answered?
    fn is_reached(&self, answered: usize) -> bool {
        let passed = self.since.elapsed();
        passed >= LATE || passed >= TAIL && answered >= self.wanted
    }
}

fn receive(socket: &UdpSocket, target: SocketAddr, start: Instant, ending: &OnceLock<Ending>) -> Received {
    let mut received = Received::default();
    let mut buffer = vec![0; usize::from(u16::MAX)];
    loop {
        if ending.get().is_some_and(|ending| ending.is_reached(received.answers.len())) {
            return received;
        }
        let (len, from) = match socket.recv_from(&mut buffer) {
            Ok(datagram) => datagram,
            Err(error) if timed_out(&error) => continue,
            Err(error) => {
                *received.report.errors.entry(error.kind().to_string()).or_default() += 1;
                continue;
            }
        };
        let at = start.elapsed();
        if from != target {
            received.report.strangers += 1;
            continue;
        }
        let Some((reply, ..)) = UdpReply::read(&buffer[..len]) else {
            received.report.damaged += 1;
            continue;
        };
        let number = reply.tag[..8].iter().fold(0, |n, &byte| n << 8 | u64::from(byte));
        let server = received.servers.iter().position(|name| *name == reply.server).unwrap_or_else(|| {
            received.servers.push(reply.server.clone());
            received.servers.len() - 1
        });
        if received.answers.insert(number, (server, at)).is_some() {
            received.report.duplicates += 1;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn report_counts_by_server_and_time() {
        let sample = |sent, server: Option<usize>| Sample {
            sent: Duration::from_millis(sent),
            answer: server.map(|server| (server, Duration::from_millis(1))),
        };
        let report = SteadyReport {
            servers: vec!["a".into(), "b".into()],
            samples: vec![sample(0, Some(0)), sample(1, None), sample(2, Some(0)), sample(3, Some(1))],
            ..SteadyReport::default()
        };
        assert_eq!((report.sent(), report.answered(), report.lost()), (4, 3, 1));
        assert_eq!(report.by_server(), BTreeMap::from([("a", 2), ("b", 1)]));
        assert_eq!(report.last_answered_by("a"), Some(Duration::from_millis(2)));
        assert_eq!(report.first_answered_by("a", Duration::from_millis(1)), Some(Duration::from_millis(2)));
        assert_eq!(report.first_answered_by("c", Duration::ZERO), None);
        assert_eq!(due_at(4000, 4000), Duration::from_secs(1));
    }
}
