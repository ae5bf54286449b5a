//! Sockets to serve on.

use std::io;
use std::net::{IpAddr, Ipv6Addr, SocketAddr};
use std::time::Duration;

use axum::Router;
use nix::sys::socket::{setsockopt, sockopt};
use tokio::net::{TcpListener, TcpSocket};
use tokio::sync::watch;

use super::notice::{Notice, Notices};

/// Between two attempts to bind: kube-proxy's.
pub const RETRY: Duration = Duration::from_secs(5);
/// Connections that may wait to be accepted.
const BACKLOG: u32 = 1_024;

/// Binds an address. An unspecified one of either family is every address of both, as in Go.
pub fn bind(address: SocketAddr) -> io::Result<TcpListener> {
    if address.ip().is_unspecified() {
        match bind_one(SocketAddr::new(IpAddr::V6(Ipv6Addr::UNSPECIFIED), address.port())) {
            // A node without IPv6.
            Err(error) if matches!(error.raw_os_error(), Some(libc::EAFNOSUPPORT | libc::EADDRNOTAVAIL)) => {}
            other => return other,
        }
    }
    bind_one(address)
}

fn bind_one(address: SocketAddr) -> io::Result<TcpListener> {
    let socket = if address.is_ipv6() { TcpSocket::new_v6()? } else { TcpSocket::new_v4()? };
    if address.is_ipv6() {
        setsockopt(&socket, sockopt::Ipv6V6Only, &!address.ip().is_unspecified())?;
    }
    // A restart finds connections of its predecessor in TIME_WAIT.
    socket.set_reuseaddr(true)?;
    socket.bind(address)?;
    socket.listen(BACKLOG)
}

/// A server that runs until this is dropped. Then its port is closed, and so are connections that wait for a request.
#[derive(Debug)]
pub struct Server {
    _stop: watch::Sender<()>,
}

/// Serves on a bound socket.
pub fn serve(listener: TcpListener, router: Router) -> Server {
    let (stop, mut stopped) = watch::channel(());
    tokio::spawn(async move {
        let end = async move { while stopped.changed().await.is_ok() {} };
        if let Err(error) = axum::serve(listener, router).with_graceful_shutdown(end).await {
            tracing::error!(%error, "HTTP server");
        }
    });
    Server { _stop: stop }
}

/// One of the agent's own two servers.
#[derive(Clone, Copy, Debug)]
pub struct Own {
    /// What it is, for people: `health server`.
    pub what: &'static str,
    /// The flag that sets its address.
    pub flag: &'static str,
    /// Reason of the Event when the port is taken.
    pub reason: &'static str,
}

/// Binds and serves for as long as the process lives. A port that is taken is tried again until it is free, with an
/// Event on the Node; with `hard_fail` it is an error.
pub fn keep(
    own: Own,
    address: SocketAddr,
    router: Router,
    hard_fail: bool,
    node: &str,
    notices: &Notices,
) -> io::Result<()> {
    let listener = match bind(address) {
        Ok(listener) => Some(listener),
        Err(error) if hard_fail => return Err(error),
        Err(error) => {
            let (what, flag) = (own.what, own.flag);
            tracing::error!(%error, %address, flag, "{what} cannot listen; tried again");
            let text = format!("cannot start {what} at {address}: {error}; free the port or set {flag}");
            notices.send(Notice::node(node, own.reason, text));
            None
        }
    };
    let what = own.what;
    tokio::spawn(async move {
        let mut tries = tokio::time::interval_at(tokio::time::Instant::now() + RETRY, RETRY);
        let listener = match listener {
            Some(listener) => listener,
            // Nobody tells when a port is free: it is tried at intervals.
            None => loop {
                tries.tick().await;
                if let Ok(listener) = bind(address) {
                    tracing::info!(%address, "{what} listens now");
                    break listener;
                }
            },
        };
        if let Err(error) = axum::serve(listener, router).await {
            tracing::error!(%error, "{what}");
        }
    });
    Ok(())
}
