//! Routing netlink sockets: one that asks, and those that are told.
//!
//! Notifications are taken as hints only: they say *which* interface to look at, and its state is then asked for.
//! So nothing depends on the order of a notification and a listing, and a lost notification costs a new listing, never
//! a wrong state.

use std::collections::{BTreeMap, BTreeSet};
use std::io::{self, IoSliceMut};
use std::os::fd::AsRawFd;

use netlink_sys::protocols::NETLINK_ROUTE;
use netlink_sys::{Socket, SocketAddr};
use nix::errno::Errno;
use nix::sys::socket::{ControlMessageOwned, MsgFlags, NetlinkAddr, recvmsg, setsockopt, sockopt};
use nix::sys::time::TimeVal;
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

use super::wire::{
    Address, FILTER_LISTS, FLAG_DUMP, FLAG_DUMP_INTERRUPTED, Filter, KIND_DONE, KIND_ERROR, Link, Message, Request,
    Route, errno, filtered_link, messages, subject,
};

/// Larger than what the kernel puts into one datagram of a listing (32 KiB).
const DATAGRAM: usize = 65_536;
/// How often a listing is begun anew when the table changed meanwhile. After that it is taken as it is: what changed
/// has sent a notification, and is asked for by itself.
const LISTING_TRIES: usize = 5;
/// Attempts to empty a socket in one go; what is left is read the next time.
const DRAIN: usize = 16_384;

/// What goes wrong between us and the kernel.
#[derive(Debug, thiserror::Error)]
pub enum NetlinkError {
    /// A socket could not be made or used.
    #[error("netlink socket: {operation}")]
    Socket {
        /// What was tried.
        operation: &'static str,
        /// Why it failed.
        #[source]
        source: io::Error,
    },
    /// The kernel refused a request.
    #[error("the kernel refuses to {operation}")]
    Refused {
        /// What was asked for.
        operation: &'static str,
        /// Its answer.
        #[source]
        source: Errno,
    },
}

/// The socket that asks. Every answer of the kernel is there when the request returns, so this never waits.
#[derive(Debug)]
pub struct Requests {
    socket: Socket,
    sequence: u32,
    datagram: Vec<u8>,
}

/// A socket that is told of changes.
#[derive(Debug)]
pub struct Notifications {
    socket: AsyncFd<Socket>,
    datagram: Vec<u8>,
}

/// Which notifications, and of which namespaces.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Scope {
    /// Links, addresses and traffic control of the own namespace.
    Node,
    /// Links and addresses of every namespace that has an id in ours. Needs `CAP_NET_BROADCAST`.
    Peers,
}

/// What has to be looked at.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Hints {
    /// Notifications were lost: everything.
    pub lost: bool,
    /// Interfaces of the node.
    pub links: BTreeSet<u32>,
    /// Interfaces of the node whose addresses changed.
    pub addresses: BTreeSet<u32>,
    /// Interfaces of the node whose traffic control changed.
    pub filters: BTreeSet<u32>,
    /// Interfaces of other namespaces: namespace id and index there.
    pub peers: BTreeSet<(i32, u32)>,
}

fn open(operation: &'static str) -> Result<Socket, NetlinkError> {
    let mut socket = Socket::new(NETLINK_ROUTE).map_err(|source| NetlinkError::Socket { operation, source })?;
    socket.bind_auto().map_err(|source| NetlinkError::Socket { operation: "bind", source })?;
    Ok(socket)
}

// === impl Requests ===

impl Requests {
    /// A socket in the network namespace of the calling thread.
    pub fn open() -> Result<Self, NetlinkError> {
        let failed = |operation| move |source| NetlinkError::Socket { operation, source };
        let socket = open("open")?;
        // Without it the kernel ignores IFA_TARGET_NETNSID and would list our own addresses as the pod's.
        socket.set_netlink_get_strict_chk(true).map_err(failed("ask for strict checking"))?;
        setsockopt(&socket, sockopt::ReceiveTimeout, &TimeVal::new(5, 0))
            .map_err(|errno| failed("set a deadline")(errno.into()))?;
        Ok(Self { socket, sequence: 0, datagram: Vec::with_capacity(DATAGRAM) })
    }

    /// All interfaces of the node.
    pub fn links(&mut self) -> Result<BTreeMap<u32, Link>, NetlinkError> {
        let links = self.list("list interfaces", &Request::links(), Link::read)?;
        Ok(links.into_iter().map(|link| (link.index, link)).collect())
    }

    /// One interface of the node, or of the namespace with an id of ours. `None` when it or the namespace is gone.
    pub fn link(&mut self, index: u32, nsid: Option<i32>) -> Result<Option<Link>, NetlinkError> {
        let found = self.ask("look at an interface", Request::link(index, nsid), Link::read);
        Ok(unless_gone(found, nsid)?.and_then(|(links, _)| links.into_iter().find(|link| link.index == index)))
    }

    /// Addresses of one interface, or of all when it is 0, of the node or of the namespace with an id of ours. `None`
    /// when it or the namespace is gone.
    pub fn addresses(&mut self, index: u32, nsid: Option<i32>) -> Result<Option<Vec<Address>>, NetlinkError> {
        let mut all = Vec::new();
        for family in [libc::AF_INET, libc::AF_INET6] {
            let request = Request::addresses(family.to_le_bytes()[0], index, nsid);
            match unless_gone(self.list("list addresses", &request, Address::read), nsid)? {
                Some(addresses) => all.extend(addresses),
                None => return Ok(None),
            }
        }
        all.retain(|address| index == 0 || address.index == index);
        // A kernel without IPv6 answers both questions with the same list.
        let mut seen = BTreeSet::new();
        all.retain(|address| seen.insert((address.index, address.net)));
        Ok(Some(all))
    }

    /// Routes of the main table that lead out of an interface.
    pub fn routes(&mut self, index: u32) -> Result<Vec<Route>, NetlinkError> {
        let mut all = Vec::new();
        for family in [libc::AF_INET, libc::AF_INET6] {
            let request = Request::routes(family.to_le_bytes()[0], index);
            all.extend(unless_gone(self.list("list routes", &request, Route::read), None)?.unwrap_or_default());
        }
        all.retain(|route| route.via == index);
        all.sort_unstable();
        all.dedup();
        Ok(all)
    }

    /// Interfaces that have an `ingress` or `clsact` queueing discipline.
    pub fn filtered_links(&mut self) -> Result<BTreeSet<u32>, NetlinkError> {
        let links = self.list("list queueing disciplines", &Request::qdiscs(), filtered_link)?;
        Ok(links.into_iter().collect())
    }

    /// Filters of an interface's `ingress` or `clsact` queueing discipline; none when it has no such.
    pub fn filters(&mut self, index: u32) -> Result<Vec<Filter>, NetlinkError> {
        let mut all = Vec::new();
        for list in FILTER_LISTS {
            let filters = self.list("list filters", &Request::filters(index, list), Filter::read);
            all.extend(unless_gone(filters, None)?.unwrap_or_default());
        }
        Ok(all)
    }

    /// Removes the `clsact` queueing discipline of an interface if no filter is left in it. An absent one is removed
    /// already.
    pub fn remove_unused_clsact(&mut self, index: u32) -> Result<(), NetlinkError> {
        // Handle 0 is the head of a list, not a filter.
        if self.filters(index)?.iter().any(|filter| filter.handle != 0) {
            return Ok(());
        }
        let done = self.ask("remove a queueing discipline", Request::delete_clsact(index), |_| None::<()>);
        unless_gone(done, None).map(drop)
    }

    pub(super) fn list<T>(
        &mut self,
        operation: &'static str,
        request: &Request,
        read: fn(Message<'_>) -> Option<T>,
    ) -> Result<Vec<T>, NetlinkError> {
        let mut tries = 0;
        loop {
            let (list, interrupted) = self.ask(operation, request.clone(), read)?;
            tries += 1;
            if !interrupted || tries == LISTING_TRIES {
                return Ok(list);
            }
        }
    }

    /// The answers to one request, and whether the table changed under them.
    fn ask<T>(
        &mut self,
        operation: &'static str,
        request: Request,
        read: fn(Message<'_>) -> Option<T>,
    ) -> Result<(Vec<T>, bool), NetlinkError> {
        let failed = |source| NetlinkError::Socket { operation, source };
        self.sequence = self.sequence.wrapping_add(1);
        let request = request.finish(self.sequence);
        let whole = messages(&request).any(|message| message.flags & FLAG_DUMP != 0);
        self.socket.send_to(&request, &SocketAddr::new(0, 0), 0).map_err(failed)?;
        let (mut answers, mut interrupted) = (Vec::new(), false);
        loop {
            self.datagram.clear();
            match self.socket.recv(&mut self.datagram, 0) {
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                received => received.map_err(failed)?,
            };
            for message in messages(&self.datagram).filter(|message| message.sequence == self.sequence) {
                interrupted |= message.flags & FLAG_DUMP_INTERRUPTED != 0;
                match message.kind {
                    KIND_ERROR | KIND_DONE => {
                        return match errno(message.body) {
                            0 => Ok((answers, interrupted)),
                            errno => Err(NetlinkError::Refused { operation, source: Errno::from_raw(errno) }),
                        };
                    }
                    _ => answers.extend(read(message)),
                }
                if !whole {
                    return Ok((answers, interrupted));
                }
            }
        }
    }
}

impl Requests {
    /// A socket for another family of netlink than routing.
    pub(super) fn open_family(protocol: isize) -> Result<Self, NetlinkError> {
        let failed = |operation| move |source| NetlinkError::Socket { operation, source };
        let mut socket = Socket::new(protocol).map_err(failed("open"))?;
        socket.bind_auto().map_err(failed("bind"))?;
        setsockopt(&socket, sockopt::ReceiveTimeout, &TimeVal::new(5, 0))
            .map_err(|errno| failed("set a deadline")(errno.into()))?;
        Ok(Self { socket, sequence: 0, datagram: Vec::with_capacity(DATAGRAM) })
    }
}

/// Turns the ways in which the kernel says "no such interface", "no such table" and, when one was named, "no such
/// namespace" into `None`.
fn unless_gone<T>(answer: Result<T, NetlinkError>, nsid: Option<i32>) -> Result<Option<T>, NetlinkError> {
    match answer {
        Err(NetlinkError::Refused { source: Errno::ENODEV | Errno::ENOENT, .. }) => Ok(None),
        Err(NetlinkError::Refused { source: Errno::EINVAL, .. }) if nsid.is_some() => Ok(None),
        answer => answer.map(Some),
    }
}

// === impl Notifications ===

impl Notifications {
    /// A socket in the network namespace of the calling thread, with a receive buffer of `buffer` bytes. Must be called
    /// within a tokio runtime. `None` when notifications of other namespaces are not permitted.
    pub fn open(scope: Scope, buffer: usize) -> Result<Option<Self>, NetlinkError> {
        let failed = |operation| move |source| NetlinkError::Socket { operation, source };
        let socket = open("open for notifications")?;
        let groups: &[u32] = match scope {
            Scope::Node => {
                &[libc::RTNLGRP_LINK, libc::RTNLGRP_TC, libc::RTNLGRP_IPV4_IFADDR, libc::RTNLGRP_IPV6_IFADDR]
            }
            Scope::Peers => &[libc::RTNLGRP_LINK, libc::RTNLGRP_IPV4_IFADDR, libc::RTNLGRP_IPV6_IFADDR],
        };
        if scope == Scope::Peers {
            match socket.set_listen_all_namespaces(true) {
                Err(error) if error.kind() == io::ErrorKind::PermissionDenied => return Ok(None),
                answer => answer.map_err(failed("listen to all namespaces"))?,
            }
        }
        // The forced size is not bounded by net.core.rmem_max, but needs CAP_NET_ADMIN.
        setsockopt(&socket, sockopt::RcvBufForce, &buffer)
            .or_else(|_| setsockopt(&socket, sockopt::RcvBuf, &buffer))
            .map_err(|errno| failed("set the receive buffer")(errno.into()))?;
        socket.set_non_blocking(true).map_err(failed("make non-blocking"))?;
        for group in groups {
            socket.add_membership(*group).map_err(failed("subscribe"))?;
        }
        // SAFETY: the socket owns its descriptor, and nothing replaces or closes it before the `AsyncFd` is dropped.
        let registered = unsafe { AsyncFd::register_with_interest(socket, Interest::READABLE) };
        let socket = registered.map_err(|error| failed("register")(error.into()))?;
        Ok(Some(Self { socket, datagram: vec![0; DATAGRAM] }))
    }

    /// Waits for notifications and takes all that are there. May be dropped at any time without loss.
    pub async fn next(&mut self) -> Result<Hints, NetlinkError> {
        loop {
            let mut guard = self
                .socket
                .readable()
                .await
                .map_err(|source| NetlinkError::Socket { operation: "wait for notifications", source })?;
            let mut hints = Hints::default();
            for _ in 0..DRAIN {
                match receive(guard.get_inner().as_raw_fd(), &mut self.datagram) {
                    Ok((length, nsid)) => messages(&self.datagram[..length]).for_each(|m| hints.add(m, nsid)),
                    Err(Errno::ENOBUFS) => hints.lost = true,
                    Err(Errno::EINTR) => {}
                    Err(Errno::EAGAIN) => {
                        guard.clear_ready();
                        break;
                    }
                    Err(errno) => {
                        return Err(NetlinkError::Socket { operation: "read notifications", source: errno.into() });
                    }
                }
            }
            if hints != Hints::default() {
                return Ok(hints);
            }
        }
    }
}

/// One datagram: its length, and the id of the namespace that it tells of, when it is not ours.
fn receive(fd: i32, datagram: &mut [u8]) -> Result<(usize, Option<i32>), Errno> {
    let mut control = nix::cmsg_space!(i32);
    let mut parts = [IoSliceMut::new(datagram)];
    let received = recvmsg::<NetlinkAddr>(fd, &mut parts, Some(&mut control), MsgFlags::MSG_DONTWAIT)?;
    let nsid = received.cmsgs()?.find_map(|message| match message {
        ControlMessageOwned::Unknown(unknown)
            if unknown.cmsg_header.cmsg_level == libc::SOL_NETLINK
                && unknown.cmsg_header.cmsg_type == libc::NETLINK_LISTEN_ALL_NSID =>
        {
            unknown.data_bytes.get(..4)?.try_into().ok().map(i32::from_ne_bytes)
        }
        _ => None,
    });
    Ok((received.bytes, nsid))
}

// === impl Hints ===

impl Hints {
    fn add(&mut self, message: Message<'_>, nsid: Option<i32>) {
        let Some(index) = subject(message) else { return };
        if let Some(nsid) = nsid.filter(|nsid| *nsid >= 0) {
            self.peers.insert((nsid, index));
            return;
        }
        match message.kind {
            libc::RTM_NEWLINK | libc::RTM_DELLINK => self.links.insert(index),
            libc::RTM_NEWADDR | libc::RTM_DELADDR => self.addresses.insert(index),
            _ => self.filters.insert(index),
        };
    }
}
