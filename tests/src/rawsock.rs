//! Whole frames in and out of an interface, for what no IP socket can send or see.

use std::io::{IoSlice, IoSliceMut};
use std::os::fd::{AsRawFd as _, OwnedFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::ifaddrs::getifaddrs;
use nix::sys::socket::{
    AddressFamily, LinkAddr, MsgFlags, MultiHeaders, SockFlag, SockProtocol, SockType, bind, recvmsg, sendmmsg,
    sendmsg, setsockopt, socket, sockopt,
};
use nix::sys::time::TimeVal;

use crate::deadline::Deadline;
use crate::error::{Context as _, Error, Result};
use crate::netns::Netns;

/// Longest time that one receive call blocks.
const GLANCE: TimeVal = TimeVal::new(0, 20_000);
/// `PACKET_OUTGOING`: a frame that this host sent.
const OUTGOING: u8 = 4;
/// Frames that one system call of [`RawSocket::flood`] sends.
const BATCH: u32 = 64;

/// What a [`RawSocket::flood`] has sent.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Flooded {
    /// Frames.
    pub frames: u64,
    /// From the first to the last.
    pub took: Duration,
}

impl Flooded {
    /// Frames a second.
    pub fn rate(&self) -> u64 {
        let nanos = self.took.as_nanos().max(1);
        u64::try_from(u128::from(self.frames) * 1_000_000_000 / nanos).unwrap_or(u64::MAX)
    }
}

/// A packet socket on one interface of a namespace. It sees every frame that arrives there from its start on.
///
/// The kernel takes the outermost VLAN tag off a frame before a packet socket sees it; a second one stays.
#[derive(Debug)]
pub struct RawSocket {
    fd: OwnedFd,
    link: LinkAddr,
    what: String,
}

impl RawSocket {
    /// Opens it on `device`, in promiscuous mode as far as the device delivers.
    ///
    /// # Errors
    /// [`Error::Name`] when there is no such device, or what the socket said.
    pub fn open(netns: &Netns, device: &str) -> Result<Self> {
        let what = format!("packet socket on {device} in {}", netns.name());
        netns.run(|| -> Result<Self> {
            let link = link_address(device)?.ok_or_else(|| Error::Name(format!("no device {device}")))?;
            let protocol = SockProtocol::EthAll;
            let fd = socket(AddressFamily::Packet, SockType::Raw, SockFlag::SOCK_CLOEXEC, protocol);
            let fd = fd.context(|| what.clone())?;
            bind(fd.as_raw_fd(), &link).context(|| format!("bind {what}"))?;
            setsockopt(&fd, sockopt::ReceiveTimeout, &GLANCE).context(|| what.clone())?;
            setsockopt(&fd, sockopt::RcvBufForce, &(16 << 20)).context(|| what.clone())?;
            Ok(Self { fd, link, what: what.clone() })
        })?
    }

    /// Sends one frame, from its destination MAC to its last byte. It may not be longer than MTU and headers.
    pub fn send(&self, frame: &[u8]) -> Result<()> {
        let sent = sendmsg(self.fd.as_raw_fd(), &[IoSlice::new(frame)], &[], MsgFlags::empty(), Some(&self.link));
        sent.map(drop).context(|| format!("send {} bytes: {}", frame.len(), self.what))
    }

    /// Sends these frames one after the other and over again, many with each system call, as long as `go_on` says of
    /// the frames that were sent. With a `rate` no more than so many a second.
    pub fn flood(&self, frames: &[Vec<u8>], rate: Option<u32>, mut go_on: impl FnMut(u64) -> bool) -> Result<Flooded> {
        let batch = BATCH as usize;
        let parts: Vec<_> = frames.iter().cycle().take(frames.len() * batch).map(|one| [IoSlice::new(one)]).collect();
        let mut headers = MultiHeaders::<LinkAddr>::preallocate(batch, None);
        let to = vec![Some(self.link); batch];
        let (begin, mut sent) = (Instant::now(), 0);
        for chunk in parts.chunks(batch).cycle() {
            if !go_on(sent) {
                break;
            }
            let done = sendmmsg(self.fd.as_raw_fd(), &mut headers, chunk, &to, [], MsgFlags::empty());
            // What is left of a batch that was cut short is sent when its turn comes again.
            sent += done.context(|| format!("send many: {}", self.what))?.count() as u64;
            if let Some(rate) = rate {
                let due = Duration::from_nanos(sent * 1_000_000_000 / u64::from(rate));
                thread::park_timeout(due.saturating_sub(begin.elapsed()));
            }
        }
        Ok(Flooded { frames: sent, took: begin.elapsed() })
    }

    /// Looks at every frame that arrives, until `stop` is set and there is no more.
    pub fn watch(&self, stop: &AtomicBool, mut look: impl FnMut(&[u8])) -> Result<()> {
        let mut buffer = vec![0; 65_600];
        loop {
            let last = stop.load(Ordering::Relaxed);
            match self.fill(&mut buffer)? {
                Some((len, true)) => look(&buffer[..len]),
                None if last => return Ok(()),
                Some(_) | None => {}
            }
        }
    }

    /// The next frame that arrives and that `wanted` takes; frames that this host sends are not looked at.
    ///
    /// # Errors
    /// [`Error::Timeout`] when none comes.
    pub fn receive(&self, timeout: Duration, mut wanted: impl FnMut(&[u8]) -> bool) -> Result<Vec<u8>> {
        let deadline = Deadline::after(timeout);
        loop {
            match self.next()? {
                Some(frame) if wanted(&frame) => return Ok(frame),
                _ if deadline.left().is_none() => return Err(deadline.missed(format!("frame at {}", self.what))),
                _ => {}
            }
        }
    }

    /// Every frame that has arrived and that `wanted` takes, until `until` says that it is enough or `timeout` is
    /// over.
    pub fn collect(
        &self,
        timeout: Duration,
        mut wanted: impl FnMut(&[u8]) -> bool,
        mut until: impl FnMut(&[Vec<u8>]) -> bool,
    ) -> Result<Vec<Vec<u8>>> {
        let deadline = Deadline::after(timeout);
        let mut frames = Vec::new();
        while deadline.left().is_some() && !until(&frames) {
            frames.extend(self.next()?.filter(|frame| wanted(frame)));
        }
        Ok(frames)
    }

    /// The next arriving frame; `None` when there is none now.
    fn next(&self) -> Result<Option<Vec<u8>>> {
        let mut buffer = vec![0; 65_600];
        let Some((len, true)) = self.fill(&mut buffer)? else { return Ok(None) };
        buffer.truncate(len);
        Ok(Some(buffer))
    }

    /// Length of the next frame, and whether it has arrived here (or is one that this host sent).
    fn fill(&self, buffer: &mut [u8]) -> Result<Option<(usize, bool)>> {
        let mut parts = [IoSliceMut::new(buffer)];
        match recvmsg::<LinkAddr>(self.fd.as_raw_fd(), &mut parts, None, MsgFlags::empty()) {
            Ok(received) => {
                let kind = received.address.map(|from| from.pkttype());
                Ok(Some((received.bytes, kind != Some(OUTGOING))))
            }
            Err(Errno::EAGAIN | Errno::EINTR) => Ok(None),
            Err(errno) => Err(errno).context(|| format!("receive: {}", self.what)),
        }
    }
}

/// The link-layer address of a device, which names it to the kernel by its index.
fn link_address(device: &str) -> Result<Option<LinkAddr>> {
    let mut addresses = getifaddrs().context(|| "getifaddrs".to_owned())?;
    Ok(addresses.find_map(|address| {
        if address.interface_name != device {
            return None;
        }
        address.address?.as_link_addr().copied()
    }))
}
