//! Small, real servers and clients.
//!
//! A server is listening when its constructor returns, and has ended when its `Drop` returns; no client waits longer
//! than its options say. Servers and clients are given the namespace to work in; everything they learn is in the
//! report that they return: who answered, and which addresses each side saw.

pub mod cpu;
pub mod echo;
pub mod flow;
pub mod payload;
pub mod probe;
pub mod rate;
pub mod socket;
pub mod steady;
pub mod tcp_exchange;
pub mod tcp_server;
pub mod udp_exchange;
pub mod udp_server;
pub mod wire;

use std::time::Duration;

/// For an answer that is expected, from one who is there: on a busy machine a thread may wait for seconds until it runs.
/// Silence that is expected is waited for less.
pub const ANSWERED_WITHIN: Duration = Duration::from_secs(10);

pub use cpu::{CpuTime, busy_during};
pub use flow::{BusyFlows, Flow, FlowReport};
pub use probe::{Answer, Transport, probe, probe_all};
pub use rate::{
    BulkReport, Closer, RateReport, connect_rate, connect_steadily, connect_steadily_while, tcp_bulk, tcp_rr, udp_rr,
};
pub use steady::{Steady, SteadyOptions, SteadyReport};
pub use tcp_exchange::{TcpOptions, TcpReport, tcp_exchange, tcp_exchange_with};
pub use tcp_server::{Serving, TcpServer};
pub use udp_exchange::{UdpOptions, UdpReport, udp_exchange};
pub use udp_server::UdpServer;
