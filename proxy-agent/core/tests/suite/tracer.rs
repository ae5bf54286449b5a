//! What becomes of a packet by the tables alone, read as `proxy_abi::service` says.

use std::net::IpAddr;

use proxy_abi::{FrontendEntry, FrontendKey, IpBytes, PortBe, PrefixKey, Proto};
use proxy_core::tables::Tables;

/// Where a packet comes from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Origin {
    /// A pod of this node.
    Pod,
    /// A socket of this node.
    Node,
    /// Another machine.
    Outside,
}

impl Origin {
    pub(crate) const ALL: [Self; 3] = [Self::Pod, Self::Node, Self::Outside];
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Verdict {
    /// Not ours.
    Pass,
    Reject,
    Drop,
    /// To one of these. `masqueraded`: its source becomes an address of the node. Sockets of the node have one anyway.
    To {
        backends: Vec<IpAddr>,
        masqueraded: bool,
    },
}

/// A new flow.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Packet {
    pub(crate) origin: Origin,
    pub(crate) src: IpAddr,
    pub(crate) dst: IpAddr,
    pub(crate) port: u16,
    pub(crate) proto: Proto,
}

impl Packet {
    fn key(&self, ip: IpBytes) -> FrontendKey {
        FrontendKey { ip, port: PortBe::new(self.port), proto: self.proto, scope: FrontendKey::SCOPE_CLUSTER }
    }
}

pub(crate) fn trace(tables: &Tables, packet: Packet) -> Verdict {
    let dst = IpBytes::from(packet.dst);
    let mark = tables.frontends.get(&FrontendKey::address(dst)).map_or(0, |entry| entry.flags);
    let reachable = mark & FrontendEntry::ADDRESS_LOOPBACK == 0 || packet.origin == Origin::Node;
    let wildcard = packet.key(FrontendKey::wildcard(packet.dst.is_ipv4()));
    let named = packet.key(dst);
    let mut found = [named, wildcard]
        .into_iter()
        .filter(|key| *key == named || mark & FrontendEntry::ADDRESS_NODE_PORT != 0 && reachable);
    let Some((key, entry)) = found.find_map(|key| tables.frontends.get(&key).map(|entry| (key, entry))) else {
        return if mark & FrontendEntry::ADDRESS_REJECT != 0 {
            Verdict::Reject
        } else if mark == 0 && matches(tables, PrefixKey::SERVICE_CIDR, packet.dst) {
            Verdict::Drop
        } else {
            Verdict::Pass
        };
    };
    let outside = packet.origin == Origin::Outside && !matches(tables, PrefixKey::LOCAL_SOURCE, packet.src);
    let entry = if outside && entry.flags & FrontendEntry::EXTERNAL_SPLIT != 0 {
        let outer = FrontendKey { scope: FrontendKey::SCOPE_EXTERNAL, ..key };
        tables.frontends.get(&outer).expect("the frontend for traffic from outside")
    } else {
        entry
    };
    let flag = |flag: u32| entry.flags & flag != 0;
    let allowed = match packet.origin {
        _ if !flag(FrontendEntry::SOURCE_RANGES) => true,
        Origin::Node => flag(FrontendEntry::NODE_ALLOWED),
        Origin::Pod | Origin::Outside => matches(tables, entry.service, packet.src),
    };
    if !allowed {
        return Verdict::Drop;
    }
    if entry.count == 0 {
        return if flag(FrontendEntry::DROP_EMPTY) { Verdict::Drop } else { Verdict::Reject };
    }
    let slots = entry.first..entry.first + entry.count;
    let id = |slot| tables.slots.get(&slot).expect("the slot is written");
    let mut backends: Vec<IpAddr> =
        slots.map(|slot| tables.backends.get(id(slot)).expect("the backend is there").ip.into()).collect();
    backends.sort_unstable();
    let masqueraded = packet.origin != Origin::Node
        && (flag(FrontendEntry::MASQUERADE) || flag(FrontendEntry::MASQUERADE_OUTSIDE) && outside);
    Verdict::To { backends, masqueraded }
}

/// Is the address in a range of this scope?
fn matches(tables: &Tables, scope: u32, ip: IpAddr) -> bool {
    let bits = |ip: IpBytes| match IpAddr::from(ip) {
        IpAddr::V4(v4) => v4.to_ipv6_mapped().to_bits(),
        IpAddr::V6(v6) => v6.to_bits(),
    };
    let asked = bits(IpBytes::from(ip));
    tables.prefixes.keys().any(|key| {
        let shift = 160 - key.length;
        let differ = asked ^ bits(key.ip);
        key.scope == scope && (shift >= 128 || differ >> shift == 0)
    })
}
