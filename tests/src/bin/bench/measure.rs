//! One measurement of one contender.

use std::fs;
use std::sync::OnceLock;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use nix::time::{ClockId, clock_gettime};
use proxy_tests::traffic::{Closer, RateReport, busy_during, connect_rate, tcp_bulk, tcp_rr, udp_rr};
use serde::Serialize;

use crate::contender::Site;
use crate::objects::Port;

/// What is measured.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Kind {
    /// TCP connect, request, response, close, by one client.
    Connect1,
    /// The same by sixteen.
    Connect16,
    /// Request and response of 64 bytes on one open TCP connection.
    TcpRequest,
    /// Request and response of 64 bytes by UDP from one socket.
    UdpRequest,
    /// Bytes on one TCP connection.
    Bulk,
}

/// One value of everything.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub(crate) struct Sample {
    /// Operations per second; for [`Kind::Bulk`], Gbit/s.
    pub(crate) rate: f64,
    /// Median latency of an operation, µs; 0 for [`Kind::Bulk`].
    pub(crate) p50: f64,
    /// Latency of the slowest hundredth, µs.
    pub(crate) p99: f64,
    /// CPU time of the whole machine by `/proc/stat`, softirq included, for one operation, µs; for [`Kind::Bulk`], for a
    /// MiB.
    pub(crate) cpu: f64,
    /// CPU time of this process, which is both client and server, and of ksoftirqd, likewise. Softirqs run mostly in
    /// the context of whoever sends, so this has nearly all of them too (not with `CONFIG_IRQ_TIME_ACCOUNTING`); unlike
    /// `cpu` it has nothing of other programs on a busy machine.
    pub(crate) own: f64,
}

/// Bytes of a datagram.
const DATAGRAM: usize = 64;

impl Kind {
    /// All of them.
    pub(crate) const ALL: [Self; 5] = [Self::Connect1, Self::Connect16, Self::TcpRequest, Self::UdpRequest, Self::Bulk];

    /// For a heading.
    pub(crate) const fn title(self) -> &'static str {
        match self {
            Self::Connect1 => "TCP connect-request-response-close, 1 client",
            Self::Connect16 => "TCP connect-request-response-close, 16 clients",
            Self::TcpRequest => "TCP request-response, 64 bytes, 1 connection",
            Self::UdpRequest => "UDP request-response, 64 bytes, 1 socket",
            Self::Bulk => "TCP bulk, 1 connection",
        }
    }

    /// Unit of the rate.
    pub(crate) const fn unit(self) -> &'static str {
        match self {
            Self::Bulk => "Gbit/s",
            _ => "per second",
        }
    }
}

/// Measures for about `time`.
pub(crate) fn measure(site: &Site, kind: Kind, time: Duration) -> Result<Sample> {
    let client = site.client();
    let (short, long, datagram) = (site.target(Port::Short), site.target(Port::Long), site.target(Port::Datagram));
    let rate = |report: proxy_tests::Result<RateReport>, cpu: f64, own: f64| -> Result<Sample> {
        let report = report?;
        let why = report.first_error.clone().unwrap_or_default();
        ensure!(report.errors == 0, "{}: {} of {} failed: {why}", site.contender, report.errors, report.operations);
        let us = |latency: Duration| latency.as_secs_f64() * 1e6;
        #[expect(clippy::cast_precision_loss, reason = "counts are far below 2^52")]
        let operations = report.operations as f64;
        let (p50, p99) = (us(report.p50()), us(report.p99()));
        Ok(Sample { rate: report.per_second(), p50, p99, cpu: cpu / operations, own: own / operations })
    };
    let before = own_cpu()?;
    if kind == Kind::Bulk {
        let (report, cpu) = busy_during(|| tcp_bulk(client, long, 1, time))?;
        let report = report?;
        #[expect(clippy::cast_precision_loss, reason = "bytes are far below 2^52")]
        let bytes = report.bytes as f64;
        let mib = bytes / f64::from(1 << 20);
        let (cpu, own) = (cpu.busy().as_secs_f64() * 1e6 / mib, (own_cpu()? - before) / mib);
        return Ok(Sample { rate: bytes * 8e-9 / report.duration.as_secs_f64(), p50: 0.0, p99: 0.0, cpu, own });
    }
    let (report, cpu) = busy_during(|| match kind {
        Kind::Connect1 => connect_rate(client, short, 1, time, Closer::Client),
        Kind::Connect16 => connect_rate(client, short, 16, time, Closer::Client),
        Kind::TcpRequest => tcp_rr(client, long, 1, time),
        Kind::UdpRequest | Kind::Bulk => udp_rr(client, datagram, 1, DATAGRAM, time),
    })?;
    rate(report, cpu.busy().as_secs_f64() * 1e6, own_cpu()? - before)
}

/// µs that this process and ksoftirqd have run.
fn own_cpu() -> Result<f64> {
    let own = Duration::from(clock_gettime(ClockId::CLOCK_PROCESS_CPUTIME_ID)?);
    let mut softirqd = 0;
    for pid in softirqd_pids() {
        let path = format!("/proc/{pid}/schedstat");
        let text = fs::read_to_string(&path).with_context(|| path.clone())?;
        // Nanoseconds on a CPU, waiting for one, and how often.
        let ran = text.split(' ').next().and_then(|number| number.parse::<u64>().ok());
        softirqd += ran.with_context(|| format!("{path}: {text}"))?;
    }
    Ok((own + Duration::from_nanos(softirqd)).as_secs_f64() * 1e6)
}

/// One for each CPU; they live as long as the machine.
fn softirqd_pids() -> &'static [u32] {
    static PIDS: OnceLock<Vec<u32>> = OnceLock::new();
    PIDS.get_or_init(|| {
        let pids = fs::read_dir("/proc").into_iter().flatten().flatten();
        let pids = pids.filter_map(|entry| entry.file_name().to_str()?.parse().ok());
        let softirqd =
            |pid: &u32| fs::read_to_string(format!("/proc/{pid}/comm")).is_ok_and(|n| n.starts_with("ksoftirqd/"));
        pids.filter(softirqd).collect()
    })
}
