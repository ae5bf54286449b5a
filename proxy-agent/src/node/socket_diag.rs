//! Connected UDP sockets of this network namespace, and their end.
//!
//! `connect()` to a Service over UDP puts the backend's address into the socket, once. When that backend goes, nothing
//! tells the application: its datagrams go to an address where nobody is. So the agent ends the socket as `ss --kill`
//! does: receiving on it fails with ECONNABORTED, sending with EDESTADDRREQ, and the application connects again, to another
//! backend.
//!
//! ```text
//!   inet_diag_req_v2: | family 1 | protocol 1 | extensions 1 | 0 | states 4 | id 48 |        include/uapi/linux/inet_diag.h
//!   inet_diag_msg:    | family 1 | state 1 | timer 1 | retransmissions 1 | id 48 | ... |
//!   id:               | source port 2 | destination port 2 | source 16 | destination 16 | interface 4 | cookie 8 |
//! ```

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use nix::errno::Errno;

use super::netlink::{NetlinkError, Requests};
use super::wire::{FLAG_ACK, FLAG_DUMP, Message, Request};

/// `NETLINK_SOCK_DIAG`.
const NETLINK_SOCK_DIAG: isize = 4;
/// `SOCK_DIAG_BY_FAMILY`, and its answers.
const LIST: u16 = 20;
/// `SOCK_DESTROY`.
const DESTROY: u16 = 21;

const FAMILIES: [u8; 2] = [2, 10];
const UDP: u8 = 17;
/// A bit for each state; a connected UDP socket is in `TCP_ESTABLISHED`.
const CONNECTED: u32 = 1 << 1;

/// A connected UDP socket.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Connected {
    /// Kernel's cookie of the socket.
    pub cookie: u64,
    /// Whom it is connected to.
    pub peer: SocketAddr,
    family: u8,
    id: [u8; 48],
}

/// Asks the kernel about sockets.
#[derive(Debug)]
pub struct Sockets {
    requests: Requests,
}

impl Sockets {
    /// Of the network namespace of the calling thread.
    ///
    /// # Errors
    /// When the socket cannot be made.
    pub fn open() -> Result<Self, NetlinkError> {
        Ok(Self { requests: Requests::open_family(NETLINK_SOCK_DIAG)? })
    }

    /// All connected UDP sockets.
    ///
    /// # Errors
    /// When the kernel does not tell: see [`is_unsupported`].
    pub fn connected_udp(&mut self) -> Result<Vec<Connected>, NetlinkError> {
        let mut all = Vec::new();
        for family in FAMILIES {
            let request = Request::new(LIST, FLAG_DUMP, &body(family, CONNECTED, &[0; 48]));
            all.extend(self.requests.list("list UDP sockets", &request, read)?);
        }
        Ok(all)
    }

    /// Ends a socket; false when it is gone already. Needs CAP_NET_ADMIN.
    ///
    /// # Errors
    /// When the kernel refuses: see [`is_unsupported`].
    pub fn destroy(&mut self, socket: &Connected) -> Result<bool, NetlinkError> {
        let request = Request::new(DESTROY, FLAG_ACK, &body(socket.family, u32::MAX, &socket.id));
        match self.requests.list("end a UDP socket", &request, |_| None::<()>) {
            Ok(_) => Ok(true),
            // Gone; or another socket has its place: the cookie differs.
            Err(NetlinkError::Refused { source: Errno::ENOENT | Errno::ESTALE, .. }) => Ok(false),
            Err(other) => Err(other),
        }
    }
}

/// Does this error say that the kernel has no such thing (`CONFIG_INET_DIAG_DESTROY`, `CONFIG_INET_UDP_DIAG`)?
pub fn is_unsupported(error: &NetlinkError) -> bool {
    match error {
        NetlinkError::Refused { source, .. } => {
            matches!(source, Errno::EOPNOTSUPP | Errno::ENOENT | Errno::EINVAL | Errno::EPERM)
        }
        NetlinkError::Socket { source, .. } => source.raw_os_error() == Some(libc::EPROTONOSUPPORT),
    }
}

fn body(family: u8, states: u32, id: &[u8; 48]) -> [u8; 56] {
    let mut body = [0; 56];
    body[0] = family;
    body[1] = UDP;
    body[4..8].copy_from_slice(&states.to_ne_bytes());
    body[8..].copy_from_slice(id);
    body
}

fn read(message: Message<'_>) -> Option<Connected> {
    if message.kind != LIST {
        return None;
    }
    let family = *message.body.first()?;
    let id: [u8; 48] = message.body.get(4..52)?.try_into().ok()?;
    let port = u16::from_be_bytes([id[2], id[3]]);
    let ip: [u8; 16] = id[20..36].try_into().ok()?;
    let peer = if family == FAMILIES[0] {
        IpAddr::V4(Ipv4Addr::new(ip[0], ip[1], ip[2], ip[3]))
    } else {
        // An IPv6 socket may talk IPv4.
        Ipv6Addr::from(ip).to_canonical()
    };
    let half = |at: usize| Some(u64::from(u32::from_ne_bytes(id.get(at..at + 4)?.try_into().ok()?)));
    Some(Connected { cookie: half(40)? | half(44)? << 32, peer: SocketAddr::new(peer, port), family, id })
}

#[cfg(test)]
mod tests {
    use std::net::UdpSocket;

    use super::super::wire::messages;
    use super::*;

    #[test]
    fn a_socket_is_read_from_its_message() {
        let mut id = [0; 48];
        id[..4].copy_from_slice(&[0x9c, 0x40, 0x00, 0x35]);
        id[20..24].copy_from_slice(&[10, 244, 0, 3]);
        id[40..].copy_from_slice(&[1_u32.to_ne_bytes(), 2_u32.to_ne_bytes()].concat());
        let message = |kind, family| Request::new(kind, 0, &[&[family, 1, 0, 0][..], &id, &[0; 20]].concat()).finish(1);
        let v4: Vec<_> = messages(&message(LIST, 2)).filter_map(read).collect();
        let peer = "10.244.0.3:53".parse().expect("an address");
        assert_eq!(v4, [Connected { cookie: 2 << 32 | 1, peer, family: 2, id }]);
        id[20..36].copy_from_slice(&Ipv4Addr::new(10, 244, 0, 3).to_ipv6_mapped().octets());
        let message = |kind, family| Request::new(kind, 0, &[&[family, 1, 0, 0][..], &id, &[0; 20]].concat()).finish(1);
        let mapped: Vec<_> = messages(&message(LIST, 10)).filter_map(read).map(|socket| socket.peer).collect();
        assert_eq!(mapped, [peer]);
        assert_eq!(messages(&message(DESTROY, 2)).filter_map(read).count(), 0);
    }

    /// The kernel's answer, not a picture of it. Without the right to end sockets this ends before that.
    #[test]
    fn a_connected_socket_is_found() {
        let server = UdpSocket::bind("127.0.0.1:0").expect("bound");
        let client = UdpSocket::bind("127.0.0.1:0").expect("bound");
        client.connect(server.local_addr().expect("an address")).expect("connected");
        let mut sockets = Sockets::open().expect("a socket");
        let all = match sockets.connected_udp() {
            Err(error) if is_unsupported(&error) => return,
            all => all.expect("a list"),
        };
        let port = client.local_addr().expect("an address").port().to_be_bytes();
        let found = all.iter().find(|socket| socket.id[..2] == port).expect("it is there");
        assert_eq!(found.peer, server.local_addr().expect("an address"));
        assert_ne!(found.cookie, 0);
    }
}
