//! What the agent tells over HTTP and in Events: kube-proxy's endpoints, byte for byte where somebody may rely on it.
//!
//! ```text
//!   :10256                /healthz /livez /readyz        health      load balancers, probes
//!   127.0.0.1:10249       /metrics /proxyMode /configz   status      Prometheus, people, e2e tests
//!   :healthCheckNodePort  anything                       service     load balancers, one server for each Service
//!   Events                                               notice      people
//! ```

pub mod clock;
pub mod exposition;
pub mod health;
pub mod hits;
pub mod listen;
pub mod metrics;
pub mod notice;
pub mod process;
pub mod service;
pub mod status;

pub use health::Health;
pub use metrics::Metrics;
pub use notice::{Notice, Notices};

use std::io;
use std::net::SocketAddr;
use std::sync::Arc;

/// Binds the address and serves the health endpoints from then on.
pub async fn spawn(address: SocketAddr, health: Arc<Health>) -> io::Result<()> {
    let listener = tokio::net::TcpListener::bind(address).await?;
    tokio::spawn(async move { axum::serve(listener, health::router(&health, &Arc::default())).await });
    Ok(())
}
