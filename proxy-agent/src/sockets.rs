//! Ends connected UDP sockets of the node whose backend has gone.

use std::collections::{BTreeMap, BTreeSet};
use std::net::SocketAddr;
use std::ops::ControlFlow;

use proxy_abi::{BackendEntry, SocketKey};

use crate::dataplane;
use crate::dataplane::pins::Maps;
use crate::node::netlink::NetlinkError;
use crate::node::socket_diag::{Sockets, is_unsupported};

/// What may be done about sockets of ended backends on this kernel.
#[derive(Debug, Default)]
pub struct StaleSockets {
    sockets: Option<Sockets>,
    /// Found out once, and said once.
    unsupported: bool,
}

/// Why sockets could not be ended.
#[derive(Debug, thiserror::Error)]
enum Error {
    #[error("who uses an ended backend")]
    Map(#[from] dataplane::Error),
    #[error("sockets of ended backends")]
    Netlink(#[from] NetlinkError),
}

impl StaleSockets {
    /// Ends those that our socket programs connected to one of these backends, given by id and generation. What cannot be
    /// done is logged.
    pub fn end(&mut self, ended: &BTreeMap<(u32, u32), BackendEntry>, maps: &Maps) {
        if ended.is_empty() || self.unsupported {
            return;
        }
        match self.try_end(ended, maps) {
            Ok(0) => {}
            Ok(sockets) => tracing::info!(sockets, "ended: connected over UDP to backends that are gone"),
            Err(Error::Netlink(error)) if is_unsupported(&error) => {
                self.unsupported = true;
                let error = &error as &dyn std::error::Error;
                tracing::warn!(
                    error,
                    "processes of the node keep connected UDP sockets whose backend is gone: this kernel does not let the \
                     agent end them (CONFIG_INET_DIAG_DESTROY, CONFIG_INET_UDP_DIAG, CAP_NET_ADMIN)"
                );
            }
            Err(error) => {
                self.sockets = None;
                tracing::warn!(error = &error as &dyn std::error::Error, "sockets of ended backends stay");
            }
        }
    }

    fn try_end(&mut self, ended: &BTreeMap<(u32, u32), BackendEntry>, maps: &Maps) -> Result<usize, Error> {
        let users = users(ended, maps)?;
        if users.is_empty() {
            return Ok(0);
        }
        let sockets = match self.sockets.take() {
            Some(sockets) => sockets,
            None => Sockets::open()?,
        };
        let sockets = self.sockets.insert(sockets);
        let mut count = 0;
        for socket in sockets.connected_udp()? {
            if users.contains(&(socket.cookie, socket.peer)) && sockets.destroy(&socket)? {
                count += 1;
            }
        }
        Ok(count)
    }
}

/// Sockets that our programs led to one of these backends, by cookie, with its address.
fn users(
    ended: &BTreeMap<(u32, u32), BackendEntry>,
    maps: &Maps,
) -> Result<BTreeSet<(u64, SocketAddr)>, dataplane::Error> {
    let mut users = BTreeSet::new();
    maps.socket.scan(|key, entry| {
        if key.direction == SocketKey::REVERSE && ended.contains_key(&(entry.backend, entry.generation)) {
            users.insert((key.cookie, SocketAddr::new(key.ip.into(), key.port.get())));
        }
        ControlFlow::Continue(())
    })?;
    Ok(users)
}
