//! One real packet of a question.
//!
//! ```text
//!   sender         how it is sent                                     what ends it
//!   pod of here    a frame that arrives at the node's end of its      TCP: a reset of the same number, unless the pod's own
//!                  veth, where the pod's packets arrive               kernel has sent one
//!   node           a socket of the command                            it is closed, with a reset where it was established
//! ```
//!
//! Nobody enters the pod: what is inside of it (its routes, its own filter) is not tried. The frame needs no more rights than
//! the agent has, where to enter would need CAP_SYS_ADMIN and the host's processes.

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpStream, UdpSocket};
use std::os::fd::{AsRawFd as _, OwnedFd};

use nix::errno::Errno;
use nix::sys::socket::{
    AddressFamily, SockFlag, SockProtocol, SockType, SockaddrStorage, bind, connect, setsockopt, socket, sockopt,
};
use proxy_abi::{MacBytes, Proto};

use super::frame::{Frame, Part};
use super::ground::Ground;
use super::mark::Mark;
use super::question::{Kind, Question};
use crate::dataplane::probes::{ProbeError, Probes};
use crate::trace::TraceError;

/// A packet that is ready to be sent.
#[derive(Debug)]
pub enum Shot {
    /// At the node's end of a pod's veth.
    Pod {
        /// That interface.
        ifindex: u32,
        /// The packet.
        frame: Frame,
    },
    /// From a socket of the node that is bound to a port and connects when it is time.
    Connect {
        /// The socket.
        socket: TcpStream,
        /// Where to.
        to: SocketAddr,
    },
    /// From a connected socket of the node.
    Send {
        /// The socket; of an echo a raw one, or the kernel's own for echoes.
        socket: UdpSocket,
        /// What it sends.
        payload: Vec<u8>,
        /// How it is known.
        mark: Mark,
    },
}

/// Why none can be sent.
#[derive(Debug)]
pub enum Unsent {
    /// This is lacking, and what to do.
    Lacking(String),
    /// The sender's own kernel refuses, as it would any process.
    Refused(io::Error),
}

fn any(v4: bool) -> SocketAddr {
    let ip = if v4 { IpAddr::V4(Ipv4Addr::UNSPECIFIED) } else { IpAddr::V6(Ipv6Addr::UNSPECIFIED) };
    SocketAddr::new(ip, 0)
}

fn open(v4: bool, kind: SockType, proto: Option<SockProtocol>) -> Result<OwnedFd, Errno> {
    let family = if v4 { AddressFamily::Inet } else { AddressFamily::Inet6 };
    socket(family, kind, SockFlag::SOCK_NONBLOCK | SockFlag::SOCK_CLOEXEC, proto)
}

fn lacking(what: &str, error: &io::Error) -> Unsent {
    Unsent::Lacking(format!("{what}: {error}"))
}

impl Shot {
    /// Makes the packet of a question, and looks whether it can be sent.
    ///
    /// # Errors
    /// When a map cannot be read.
    pub fn new(question: &Question, ground: &Ground<'_>) -> Result<Result<Self, Unsent>, TraceError> {
        if !matches!(question.proto, Proto::TCP | Proto::UDP | Proto::ICMP | Proto::ICMPV6) {
            let text = format!(
                "a packet of {} would mean nothing to its receiver: TCP, UDP and echoes are sent",
                question.proto
            );
            return Ok(Err(Unsent::Lacking(text)));
        }
        match question.from.kind {
            Kind::Pod => Self::of_pod(question, ground),
            Kind::Node => Ok(Self::of_node(question)),
            Kind::Other => Ok(Err(Unsent::Lacking(format!("{} is not on this node", question.from.shown())))),
        }
    }

    fn of_pod(question: &Question, ground: &Ground<'_>) -> Result<Result<Self, Unsent>, TraceError> {
        let pod = question.from.shown();
        let wrong = |text: String| Ok(Err(Unsent::Lacking(text)));
        let Some((ifindex, frame)) = ground.frame(question, true, (question.to.ip, question.port))? else {
            return wrong(format!("the maps know no interface of {pod}; is the agent up? `proxy-agent device list`"));
        };
        match ground.link(ifindex) {
            None => wrong(format!("interface {ifindex} of {pod} is gone; is the agent up?")),
            Some(link) if !link.up => wrong(format!("{} of {pod} is down; ip link set {} up", link.name, link.name)),
            Some(link) if frame.bytes().len() > link.mtu as usize + ETHERNET => wrong(format!(
                "{} of {pod} carries {} bytes, so the pod sends nothing larger: give a smaller --size",
                link.name, link.mtu
            )),
            Some(_) => Ok(Ok(Self::Pod { ifindex, frame })),
        }
    }

    fn of_node(question: &Question) -> Result<Self, Unsent> {
        let v4 = question.to.ip.is_ipv4();
        let to = SocketAddr::new(question.to.ip, question.port.unwrap_or(0));
        if question.proto == Proto::TCP {
            let fd = open(v4, SockType::Stream, None).map_err(|errno| lacking("a socket", &errno.into()))?;
            // A port before there is a connection, so that the probes can be told of it.
            let bound = bind(fd.as_raw_fd(), &SockaddrStorage::from(any(v4)));
            bound.map_err(|errno| lacking("a port", &errno.into()))?;
            return Ok(Self::Connect { socket: TcpStream::from(fd), to });
        }
        let is_udp = question.proto == Proto::UDP;
        let (socket, is_raw) = if is_udp {
            (UdpSocket::bind(any(v4)).map_err(|error| lacking("a socket", &error))?, false)
        } else {
            let proto = Some(if v4 { SockProtocol::Icmp } else { SockProtocol::IcmpV6 });
            if let Ok(raw) = open(v4, SockType::Raw, proto) {
                (UdpSocket::from(raw), true)
            } else {
                let need = "an echo request of the node needs CAP_NET_RAW, or this group in net.ipv4.ping_group_range";
                let own = open(v4, SockType::Datagram, proto).map_err(|errno| lacking(need, &errno.into()))?;
                (UdpSocket::from(own), false)
            }
        };
        socket.connect(to).map_err(Unsent::Refused)?;
        let from = socket.local_addr().map_err(|error| lacking("its own address", &error))?;
        // Of a raw socket the identifier is its own business, of the kernel's own for echoes it is the port.
        let id = if is_raw { echo_of(question) } else { from.port() };
        let from = SocketAddr::new(from.ip(), id);
        let macs = (MacBytes::default(), MacBytes::default());
        let Question { proto, size, number, .. } = *question;
        let frame = Frame { macs, ends: (from, to), proto, size, part: Part::Opens, number };
        let behind_udp = frame.payload().get(UDP..).unwrap_or_default().to_vec();
        let payload = if is_udp { behind_udp } else { frame.payload() };
        Ok(Self::Send { socket, payload, mark: Mark { from, proto, sequence: None } })
    }

    /// The packet, its answers and errors about it, for the probes.
    ///
    /// # Errors
    /// [`Unsent`]: the socket has no port any more.
    pub fn expression(&self) -> Result<String, Unsent> {
        let of =
            |mark: &Mark| Mark::expression(mark.proto, Some(mark.from.ip()), mark.from.port(), mark.from.is_ipv4());
        Ok(match self {
            Self::Pod { frame, .. } => of(&mark(frame)),
            Self::Send { mark, .. } => of(mark),
            Self::Connect { socket, to } => {
                let from = socket.local_addr().map_err(|error| lacking("its own port", &error))?;
                Mark::expression(Proto::TCP, None, from.port(), to.is_ipv4())
            }
        })
    }

    /// Sends it. What is returned tells it from all others.
    ///
    /// # Errors
    /// [`Unsent`].
    pub fn send(&self, probes: &mut Probes) -> Result<Mark, Unsent> {
        match self {
            Self::Pod { ifindex, frame } => {
                probes.arrive(&frame.bytes(), *ifindex).map_err(arrives_not)?;
                Ok(mark(frame))
            }
            Self::Send { socket, payload, mark } => {
                socket.send(payload).map_err(Unsent::Refused)?;
                Ok(*mark)
            }
            Self::Connect { socket, to } => {
                match connect(socket.as_raw_fd(), &SockaddrStorage::from(*to)) {
                    Ok(()) | Err(Errno::EINPROGRESS) => {}
                    Err(errno) => return Err(Unsent::Refused(errno.into())),
                }
                // Whatever comes of it ends with a reset when it is closed.
                let reset = libc::linger { l_onoff: 1, l_linger: 0 };
                setsockopt(socket, sockopt::Linger, &reset).map_err(|errno| lacking("a socket", &errno.into()))?;
                let from = socket.local_addr().map_err(|error| lacking("its own address", &error))?;
                Ok(Mark { from, proto: Proto::TCP, sequence: None })
            }
        }
    }

    /// Ends the connection that a SYN of a pod began: only the pod's kernel could otherwise, and may not have been let.
    ///
    /// # Errors
    /// [`Unsent`].
    pub fn reset(&self, probes: &mut Probes) -> Result<(), Unsent> {
        let Self::Pod { ifindex, frame } = self else { return Ok(()) };
        let frame = Frame { part: Part::Resets, size: 0, ..*frame };
        probes.arrive(&frame.bytes(), *ifindex).map_err(arrives_not)
    }

    /// Is it of a pod?
    pub const fn is_of_pod(&self) -> bool {
        matches!(self, Self::Pod { .. })
    }
}

/// Bytes of an Ethernet header, and of UDP's.
const ETHERNET: usize = 14;
const UDP: usize = 8;

fn arrives_not(error: ProbeError) -> Unsent {
    let text = format!("{:#}", anyhow::Error::from(error));
    Unsent::Lacking(format!(
        "no frame can be brought to the pod's interface ({text}): live frames of BPF_PROG_TEST_RUN need Linux 5.18, CAP_BPF and CAP_NET_ADMIN"
    ))
}

/// An identifier that no other echo has at this time.
fn echo_of(question: &Question) -> u16 {
    let [_, _, high, low] = question.number.to_be_bytes();
    u16::from_be_bytes([high, low]).max(1)
}

/// How a pod's packet is known.
fn mark(frame: &Frame) -> Mark {
    let Frame { ends: (from, _), proto, number, .. } = *frame;
    let port = if matches!(proto, Proto::ICMP | Proto::ICMPV6) { frame.echo() } else { from.port() };
    Mark { from: SocketAddr::new(from.ip(), port), proto, sequence: (proto == Proto::TCP).then_some(number) }
}
