//! Whole frames in and out of an interface, for what no IP socket can send or see.

use std::io::{IoSlice, IoSliceMut};
use std::os::fd::{AsRawFd as _, OwnedFd};
use std::time::Duration;

use nix::errno::Errno;
use nix::ifaddrs::getifaddrs;
use nix::sys::socket::{
    AddressFamily, LinkAddr, MsgFlags, SockFlag, SockProtocol, SockType, bind, recvmsg, sendmsg, setsockopt, socket,
    sockopt,
};
use nix::sys::time::TimeVal;

use crate::deadline::Deadline;
use crate::error::{Context as _, Error, Result};
use crate::netns::Netns;

/// Longest time that one receive call blocks.
const GLANCE: TimeVal = TimeVal::new(0, 20_000);
/// `PACKET_OUTGOING`: a frame that this host sent.
const OUTGOING: u8 = 4;

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
            setsockopt(&fd, sockopt::RcvBuf, &(4 << 20)).context(|| what.clone())?;
            Ok(Self { fd, link, what: what.clone() })
        })?
    }

    /// Sends one frame, from its destination MAC to its last byte. It may not be longer than MTU and headers.
    pub fn send(&self, frame: &[u8]) -> Result<()> {
        let sent = sendmsg(self.fd.as_raw_fd(), &[IoSlice::new(frame)], &[], MsgFlags::empty(), Some(&self.link));
        sent.map(drop).context(|| format!("send {} bytes: {}", frame.len(), self.what))
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
        let mut parts = [IoSliceMut::new(&mut buffer)];
        let received = match recvmsg::<LinkAddr>(self.fd.as_raw_fd(), &mut parts, None, MsgFlags::empty()) {
            Ok(received) => received,
            Err(Errno::EAGAIN | Errno::EINTR) => return Ok(None),
            Err(errno) => return Err(errno).context(|| format!("receive: {}", self.what)),
        };
        let (len, kind) = (received.bytes, received.address.map(|from| from.pkttype()));
        buffer.truncate(len);
        Ok((kind != Some(OUTGOING)).then_some(buffer))
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
