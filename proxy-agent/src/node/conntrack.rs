//! Connections that the kernel's own connection tracking translates: kube-proxy's, when the agent takes over from it.
//!
//! ```text
//!   | nfgenmsg: family 1, version 1, resource 2 | attributes ...          include/uapi/linux/netfilter/nfnetlink_conntrack.h
//!   CTA_TUPLE_ORIG 1 ─ CTA_TUPLE_IP 1 ─ source, destination
//!                    └ CTA_TUPLE_PROTO 2 ─ number 1, source port 2, destination port 3 (network order)
//!   CTA_TUPLE_REPLY 2, the same, as the responder answers
//!   CTA_STATUS 3 (32 bits, network order)     CTA_PROTOINFO 4 ─ CTA_PROTOINFO_TCP 1 ─ state 1 (8 bits)
//! ```

use std::net::{IpAddr, SocketAddr};

use super::netlink::{NetlinkError, Requests};
use super::wire::{FLAG_DUMP, Message, Request, attribute, ip};

/// `NETLINK_NETFILTER`.
const NETLINK_NETFILTER: isize = 12;
/// `NFNL_SUBSYS_CTNETLINK << 8 | IPCTNL_MSG_CT_GET`, and its answers.
const GET: u16 = 0x101;
const NEW: u16 = 0x100;

const CTA_TUPLE_ORIG: u16 = 1;
const CTA_TUPLE_REPLY: u16 = 2;
const CTA_STATUS: u16 = 3;
const CTA_PROTOINFO: u16 = 4;
const CTA_TUPLE_IP: u16 = 1;
const CTA_TUPLE_PROTO: u16 = 2;
const CTA_PROTO_NUM: u16 = 1;
const CTA_PROTO_SRC_PORT: u16 = 2;
const CTA_PROTO_DST_PORT: u16 = 3;
const CTA_PROTOINFO_TCP: u16 = 1;
const CTA_PROTOINFO_TCP_STATE: u16 = 1;

/// `IPS_DST_NAT`: the destination is translated.
const DST_NAT: u32 = 1 << 5;
/// `TCP_CONNTRACK_ESTABLISHED` to `TCP_CONNTRACK_LAST_ACK`: data may still go at least one way.
const ALIVE: std::ops::RangeInclusive<u8> = 3..=6;
const TCP: u8 = 6;

/// A TCP connection whose destination conntrack translates.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Translated {
    /// The end that began it.
    pub from: SocketAddr,
    /// The address that it asked for: a Service's.
    pub to: SocketAddr,
    /// The end that began it as the backend sees it: another one when it is masqueraded.
    pub seen: SocketAddr,
    /// The backend.
    pub backend: SocketAddr,
}

/// All TCP connections of this network namespace whose destination conntrack translates. Empty on a kernel without it.
///
/// # Errors
/// When the kernel refuses to tell.
pub fn translated() -> Result<Vec<Translated>, NetlinkError> {
    let mut requests = match Requests::open_family(NETLINK_NETFILTER) {
        Ok(requests) => requests,
        // No netfilter netlink at all.
        Err(NetlinkError::Socket { source, .. }) if source.raw_os_error() == Some(libc::EPROTONOSUPPORT) => {
            return Ok(Vec::new());
        }
        Err(error) => return Err(error),
    };
    // Both families: AF_UNSPEC.
    let request = Request::new(GET, FLAG_DUMP, &[0; 4]);
    match requests.list("list connections", &request, read) {
        // The kernel has no conntrack, or no netlink for it.
        Err(NetlinkError::Refused { source: nix::errno::Errno::EINVAL | nix::errno::Errno::EOPNOTSUPP, .. }) => {
            Ok(Vec::new())
        }
        answer => answer,
    }
}

fn read(message: Message<'_>) -> Option<Translated> {
    if message.kind != NEW {
        return None;
    }
    let attributes = message.body.get(4..)?;
    let status = u32::from_be_bytes(attribute(attributes, CTA_STATUS)?.try_into().ok()?);
    let info = attribute(attribute(attributes, CTA_PROTOINFO)?, CTA_PROTOINFO_TCP)?;
    let &[state] = attribute(info, CTA_PROTOINFO_TCP_STATE)? else { return None };
    if status & DST_NAT == 0 || !ALIVE.contains(&state) {
        return None;
    }
    let (from, to) = tuple(attribute(attributes, CTA_TUPLE_ORIG)?)?;
    let (backend, seen) = tuple(attribute(attributes, CTA_TUPLE_REPLY)?)?;
    Some(Translated { from, to, seen, backend })
}

/// Source and destination of a tuple; `None` when it is none of TCP.
fn tuple(tuple: &[u8]) -> Option<(SocketAddr, SocketAddr)> {
    let (addresses, ports) = (attribute(tuple, CTA_TUPLE_IP)?, attribute(tuple, CTA_TUPLE_PROTO)?);
    if attribute(ports, CTA_PROTO_NUM)? != [TCP] {
        return None;
    }
    // CTA_IP_V4_SRC 1, CTA_IP_V4_DST 2, CTA_IP_V6_SRC 3, CTA_IP_V6_DST 4.
    let address = |v4, v6| -> Option<IpAddr> { ip(attribute(addresses, v4).or_else(|| attribute(addresses, v6))?) };
    let port = |kind| -> Option<u16> { Some(u16::from_be_bytes(attribute(ports, kind)?.try_into().ok()?)) };
    let source = SocketAddr::new(address(1, 3)?, port(CTA_PROTO_SRC_PORT)?);
    Some((source, SocketAddr::new(address(2, 4)?, port(CTA_PROTO_DST_PORT)?)))
}

#[cfg(test)]
mod tests {
    use super::super::wire::{messages, nest};
    use super::*;

    /// One end is the client, the other the Service in one tuple and the backend in the other.
    fn answer(ends: [&[u8]; 4], proto: u8, status: u32, state: u8) -> Vec<u8> {
        let tuple = |from: (&[u8], u16), to: (&[u8], u16)| {
            let ports = nest(&[(1, &[proto]), (2, &from.1.to_be_bytes()), (3, &to.1.to_be_bytes())]);
            let kind = if from.0.len() == 4 { 1 } else { 3 };
            let addresses = nest(&[(kind, from.0), (kind + 1, to.0)]);
            nest(&[(CTA_TUPLE_IP, &addresses), (CTA_TUPLE_PROTO | 0x8000, &ports)])
        };
        let [client, service, seen, backend] = ends;
        let original = tuple((client, 40_000), (service, 80));
        let reply = tuple((backend, 8080), (seen, 20_000));
        let info = nest(&[(CTA_PROTOINFO_TCP, &nest(&[(CTA_PROTOINFO_TCP_STATE, &[state])]))]);
        let attributes = nest(&[
            (CTA_TUPLE_ORIG | 0x8000, &original),
            (CTA_TUPLE_REPLY | 0x8000, &reply),
            (CTA_STATUS, &status.to_be_bytes()),
            (CTA_PROTOINFO | 0x8000, &info),
        ]);
        Request::new(NEW, 0, &[&[2, 0, 0, 0][..], &attributes].concat()).finish(1)
    }

    #[test]
    fn connections_with_a_translated_destination_are_read() {
        let v4: [&[u8]; 4] = [&[10, 244, 0, 2], &[10, 96, 0, 10], &[172, 18, 0, 2], &[10, 244, 1, 7]];
        let six = [1, 2, 3, 4].map(|last| [0xfd, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, last]);
        let v6 = six.each_ref().map(<[u8; 16]>::as_slice);
        let found = |ends: [&str; 4]| {
            let [from, to, seen, backend] = ends.map(|end| end.parse().unwrap());
            Some(Translated { from, to, seen, backend })
        };
        let four = || found(["10.244.0.2:40000", "10.96.0.10:80", "172.18.0.2:20000", "10.244.1.7:8080"]);
        let sixes = found(["[fd00::1]:40000", "[fd00::2]:80", "[fd00::3]:20000", "[fd00::4]:8080"]);
        let table = [
            ("IPv4", answer(v4, TCP, 0x1ae, 3), four()),
            ("IPv6", answer(v6, TCP, 0x1ae, 3), sixes),
            ("half closed", answer(v4, TCP, 0x1ae, 5), four()),
            ("not translated", answer(v4, TCP, 0x18e, 3), None),
            ("in its handshake", answer(v4, TCP, 0x1ae, 1), None),
            ("over", answer(v4, TCP, 0x1ae, 7), None),
            ("UDP", answer(v4, 17, 0x1ae, 3), None),
        ];
        for (name, bytes, expected) in table {
            let all: Vec<_> = messages(&bytes).filter_map(read).collect();
            assert_eq!(all, expected.into_iter().collect::<Vec<_>>(), "{name}");
        }
    }

    /// The kernel's answer, not a picture of it: a list for root, a refusal for others.
    #[test]
    fn the_kernel_answers() {
        let answer = translated();
        let root = nix::unistd::geteuid().is_root();
        assert!(answer.is_ok() || !root && matches!(answer, Err(NetlinkError::Refused { .. })), "{answer:?}");
    }
}
