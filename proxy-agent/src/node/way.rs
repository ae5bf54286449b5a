//! Where the kernel would send a packet: its route, the neighbour that it would ask for, and the chains of nftables that
//! would look at it. Asked for by the command line alone; discovery needs none of it.
//!
//! ```text
//!   rtmsg:  family 1, bits of destination 1, of source 1, tos 1, table 1, protocol 1, scope 1, type 1, flags 4
//!           RTA_DST 1, RTA_SRC 2, RTA_IIF 3, RTA_OIF 4, RTA_GATEWAY 5, RTA_METRICS 8 ─ RTAX_MTU 2, RTA_VIA 18
//!   ndmsg:  family 1, 3 unused, interface 4, state 2, flags 1, type 1      NDA_DST 1
//!   nfgenmsg: family 1, version 1, resource 2
//!           NFTA_CHAIN_TABLE 1, NAME 3, HOOK 4 ─ HOOKNUM 1, POLICY 5, USE 6    (numbers in network order)
//! ```

use std::net::IpAddr;

use nix::errno::Errno;

use super::netlink::{NetlinkError, Requests};
use super::wire::{FLAG_DUMP, Message, Request, attribute, ip};

const RTA_DST: u16 = 1;
const RTA_SRC: u16 = 2;
const RTA_IIF: u16 = 3;
const RTA_OIF: u16 = 4;
const RTA_GATEWAY: u16 = 5;
const RTA_METRICS: u16 = 8;
const RTA_VIA: u16 = 18;
const RTAX_MTU: u16 = 2;
const NDA_DST: u16 = 1;

/// `NETLINK_NETFILTER`.
const NETLINK_NETFILTER: isize = 12;
/// `NFNL_SUBSYS_NFTABLES << 8 | NFT_MSG_GETCHAIN`, and its answers.
const GET_CHAIN: u16 = 0xa04;
const NEW_CHAIN: u16 = 0xa03;
const NFTA_CHAIN_TABLE: u16 = 1;
const NFTA_CHAIN_NAME: u16 = 3;
const NFTA_CHAIN_HOOK: u16 = 4;
const NFTA_CHAIN_POLICY: u16 = 5;
const NFTA_CHAIN_USE: u16 = 6;
const NFTA_HOOK_HOOKNUM: u16 = 1;

/// Where a route leads.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Hop {
    /// Interface; 0 where the packet goes nowhere.
    pub ifindex: u32,
    /// Next router; `None` when the destination is on the link.
    pub gateway: Option<IpAddr>,
    /// The destination is this host itself.
    pub is_local: bool,
    /// It is refused by the route itself: blackhole, unreachable, prohibit.
    pub is_refused: bool,
    /// MTU that the route sets; 0 where it sets none.
    pub mtu: u32,
}

/// What the kernel knows of a neighbour.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NeighbourState {
    /// Its MAC is known.
    Known,
    /// It has been asked for and has not answered.
    Asked,
    /// It did not answer.
    Failed,
}

/// A neighbour.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Neighbour {
    /// Address.
    pub ip: IpAddr,
    /// Interface.
    pub ifindex: u32,
    /// What is known.
    pub state: NeighbourState,
}

/// A chain of nftables that hangs on a hook.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BaseChain {
    /// `table/chain`.
    pub name: String,
    /// Number of its family, as in `linux/netfilter.h`: 1 inet, 2 IPv4, 10 IPv6.
    pub family: u8,
    /// Number of the hook.
    pub hook: u32,
    /// What no rule decides is dropped.
    pub drops: bool,
    /// Rules in it.
    pub rules: u32,
}

fn with(body: &mut Vec<u8>, kind: u16, value: &[u8]) {
    let length = u16::try_from(4 + value.len()).unwrap_or(u16::MAX);
    body.extend_from_slice(&length.to_ne_bytes());
    body.extend_from_slice(&kind.to_ne_bytes());
    body.extend_from_slice(value);
    body.resize(body.len().next_multiple_of(4), 0);
}

fn octets(ip: IpAddr) -> (u8, Vec<u8>) {
    match ip {
        IpAddr::V4(ip) => (libc::AF_INET.to_le_bytes()[0], ip.octets().to_vec()),
        IpAddr::V6(ip) => (libc::AF_INET6.to_le_bytes()[0], ip.octets().to_vec()),
    }
}

/// The body of a question for a route.
fn question(to: IpAddr, from: Option<(IpAddr, u32)>) -> Vec<u8> {
    let (family, to) = octets(to);
    let bits = u8::try_from(to.len() * 8).unwrap_or(0);
    let mut body = vec![family, bits, if from.is_some() { bits } else { 0 }, 0, 0, 0, 0, 0, 0, 0, 0, 0];
    with(&mut body, RTA_DST, &to);
    if let Some((source, ifindex)) = from {
        with(&mut body, RTA_SRC, &octets(source).1);
        with(&mut body, RTA_IIF, &ifindex.to_ne_bytes());
    }
    body
}

fn number(value: &[u8]) -> Option<u32> {
    value.try_into().ok().map(u32::from_ne_bytes)
}

fn network_number(value: &[u8]) -> Option<u32> {
    value.try_into().ok().map(u32::from_be_bytes)
}

fn hop(message: Message<'_>) -> Option<Hop> {
    if message.kind != libc::RTM_NEWROUTE {
        return None;
    }
    let kind = *message.body.get(7)?;
    let rest = message.body.get(12..)?;
    // RTA_VIA: family (2 bytes), then the address.
    let via = || attribute(rest, RTA_VIA).and_then(|value| ip(value.get(2..)?));
    let mtu = attribute(rest, RTA_METRICS).and_then(|metrics| attribute(metrics, RTAX_MTU)).and_then(number);
    Some(Hop {
        ifindex: attribute(rest, RTA_OIF).and_then(number).unwrap_or(0),
        gateway: attribute(rest, RTA_GATEWAY).and_then(ip).or_else(via),
        is_local: kind == libc::RTN_LOCAL,
        is_refused: matches!(kind, libc::RTN_BLACKHOLE | libc::RTN_UNREACHABLE | libc::RTN_PROHIBIT),
        mtu: mtu.unwrap_or(0),
    })
}

fn neighbour(message: Message<'_>) -> Option<Neighbour> {
    if message.kind != libc::RTM_NEWNEIGH {
        return None;
    }
    let ifindex = message.body.get(4..8).and_then(number)?;
    let state = u16::from_ne_bytes(message.body.get(8..10)?.try_into().ok()?);
    let state = if state & libc::NUD_FAILED != 0 {
        NeighbourState::Failed
    } else if state == libc::NUD_INCOMPLETE {
        NeighbourState::Asked
    } else if state == libc::NUD_NONE {
        return None;
    } else {
        NeighbourState::Known
    };
    Some(Neighbour { ip: attribute(message.body.get(12..)?, NDA_DST).and_then(ip)?, ifindex, state })
}

fn chain(message: Message<'_>) -> Option<BaseChain> {
    if message.kind != NEW_CHAIN {
        return None;
    }
    let family = *message.body.first()?;
    let rest = message.body.get(4..)?;
    let text = |kind| {
        let value = attribute(rest, kind)?;
        let end = value.iter().position(|byte| *byte == 0).unwrap_or(value.len());
        value.get(..end).map(|text| String::from_utf8_lossy(text).into_owned())
    };
    let hook = attribute(attribute(rest, NFTA_CHAIN_HOOK)?, NFTA_HOOK_HOOKNUM).and_then(network_number)?;
    Some(BaseChain {
        name: format!("{}/{}", text(NFTA_CHAIN_TABLE)?, text(NFTA_CHAIN_NAME)?),
        family,
        hook,
        // NF_DROP is 0.
        drops: attribute(rest, NFTA_CHAIN_POLICY).and_then(network_number) == Some(0),
        rules: attribute(rest, NFTA_CHAIN_USE).and_then(network_number).unwrap_or(0),
    })
}

impl Requests {
    /// Where a packet would go: sent by this host, or come in `from` a source by an interface. `Err` inside: the errno by
    /// which the kernel refuses it.
    ///
    /// # Errors
    /// When the kernel cannot be asked.
    pub fn way(&mut self, to: IpAddr, from: Option<(IpAddr, u32)>) -> Result<Result<Hop, Errno>, NetlinkError> {
        match self.list("look up a route", &Request::new(libc::RTM_GETROUTE, 0, &question(to, from)), hop) {
            Ok(hops) => Ok(hops.into_iter().next().ok_or(Errno::ENETUNREACH)),
            Err(NetlinkError::Refused { source, .. }) => Ok(Err(source)),
            Err(error) => Err(error),
        }
    }

    /// Neighbours of both families, on all interfaces.
    ///
    /// # Errors
    /// When the kernel refuses to tell.
    pub fn neighbours(&mut self) -> Result<Vec<Neighbour>, NetlinkError> {
        self.list("list neighbours", &Request::new(libc::RTM_GETNEIGH, FLAG_DUMP, &[0; 12]), neighbour)
    }
}

/// Chains of nftables on hooks of this network namespace. Empty on a kernel without nftables.
///
/// # Errors
/// When the kernel refuses to tell.
pub fn chains() -> Result<Vec<BaseChain>, NetlinkError> {
    let mut requests = match Requests::open_family(NETLINK_NETFILTER) {
        Err(NetlinkError::Socket { source, .. }) if source.raw_os_error() == Some(libc::EPROTONOSUPPORT) => {
            return Ok(Vec::new());
        }
        opened => opened?,
    };
    match requests.list("list chains", &Request::new(GET_CHAIN, FLAG_DUMP, &[0; 4]), chain) {
        Err(NetlinkError::Refused { source: Errno::EINVAL | Errno::EOPNOTSUPP, .. }) => Ok(Vec::new()),
        answer => answer,
    }
}

#[cfg(test)]
mod tests {
    use super::super::wire::nest;
    use super::*;

    fn message(kind: u16, body: &[u8]) -> Message<'_> {
        Message { kind, flags: 0, sequence: 1, body }
    }

    #[test]
    fn a_question_names_both_ends() {
        let to = "10.1.0.3".parse().expect("an address");
        let from = ("10.1.0.2".parse().expect("an address"), 7);
        let mut expected = vec![2, 32, 32, 0, 0, 0, 0, 0, 0, 0, 0, 0];
        expected.extend(nest(&[(1, &[10, 1, 0, 3]), (2, &[10, 1, 0, 2]), (3, &7_u32.to_ne_bytes())]));
        assert_eq!(question(to, Some(from)), expected);
        assert_eq!(question(to, None).get(..3), Some(&[2_u8, 32, 0][..]));
    }

    #[test]
    fn answers_are_read() {
        let mut route = vec![2, 32, 0, 0, 254, 0, 0, 1, 0, 0, 0, 0];
        route.extend(nest(&[
            (RTA_OIF, &3_u32.to_ne_bytes()),
            (RTA_GATEWAY, &[10, 0, 0, 1]),
            (RTA_METRICS, &nest(&[(RTAX_MTU, &1400_u32.to_ne_bytes())])),
        ]));
        let gateway = Some(IpAddr::from([10, 0, 0, 1]));
        let expected = Hop { ifindex: 3, gateway, is_local: false, is_refused: false, mtu: 1400 };
        assert_eq!(hop(message(libc::RTM_NEWROUTE, &route)), Some(expected));
        let mut entry = vec![2, 0, 0, 0, 3, 0, 0, 0, 0x20, 0, 0, 1];
        entry.extend(nest(&[(NDA_DST, &[10, 0, 0, 9])]));
        let failed = Neighbour { ip: [10, 0, 0, 9].into(), ifindex: 3, state: NeighbourState::Failed };
        assert_eq!(neighbour(message(libc::RTM_NEWNEIGH, &entry)), Some(failed));
        let mut base = vec![1, 0, 0, 0];
        base.extend(nest(&[
            (NFTA_CHAIN_TABLE, b"filter\0"),
            (NFTA_CHAIN_NAME, b"FORWARD\0"),
            (NFTA_CHAIN_HOOK, &nest(&[(NFTA_HOOK_HOOKNUM, &2_u32.to_be_bytes())])),
            (NFTA_CHAIN_POLICY, &0_u32.to_be_bytes()),
            (NFTA_CHAIN_USE, &3_u32.to_be_bytes()),
        ]));
        let expected = BaseChain { name: "filter/FORWARD".to_owned(), family: 1, hook: 2, drops: true, rules: 3 };
        assert_eq!(chain(message(NEW_CHAIN, &base)), Some(expected));
        assert_eq!(chain(message(NEW_CHAIN, &[1, 0, 0, 0])), None);
    }
}
