//! Routing netlink messages: what discovery asks and what it reads of the answers, and nothing else.
//!
//! ```text
//!   | length 4 | kind 2 | flags 2 | sequence 4 | port 4 |  header of the family's message  |  attributes ...
//!                                                          link 16, address 8, route 12, tc 20
//!   attribute:  | length 2 | kind 2 | value ... | padding to 4 |
//! ```
//!
//! A typed decoder of whole messages refuses a message as soon as one attribute has a size that it does not expect,
//! and attributes grow with kernels. Here an attribute that is not used is never looked at, and one that cannot be
//! read counts as absent. All integers are in host order (rtnetlink(7)), addresses in network order.

use std::net::IpAddr;
use std::sync::Arc;

use ipnet::IpNet;
use proxy_abi::MacBytes;

const HEADER: usize = 16;
/// Asks for a whole listing; the value of `NLM_F_ROOT | NLM_F_MATCH`.
pub(super) const FLAG_DUMP: u16 = 0x300;
/// The table changed while it was listed.
pub(super) const FLAG_DUMP_INTERRUPTED: u16 = 0x10;
const FLAG_REQUEST: u16 = 1;
/// Asks for an answer even where there is nothing to tell.
pub(super) const FLAG_ACK: u16 = 4;

/// An answer of the kernel to a request: its errno, or 0.
pub(super) const KIND_ERROR: u16 = 2;
/// The end of a listing.
pub(super) const KIND_DONE: u16 = 3;

const IFLA_ADDRESS: u16 = 1;
const IFLA_IFNAME: u16 = 3;
const IFLA_MTU: u16 = 4;
const IFLA_LINK: u16 = 5;
const IFLA_MASTER: u16 = 10;
const IFLA_LINKINFO: u16 = 18;
const IFLA_EXT_MASK: u16 = 29;
const IFLA_LINK_NETNSID: u16 = 37;
const IFLA_TARGET_NETNSID: u16 = 46;
const IFLA_INFO_KIND: u16 = 1;
const IFLA_INFO_DATA: u16 = 2;
const IFLA_INFO_SLAVE_KIND: u16 = 4;
const IFLA_INFO_SLAVE_DATA: u16 = 5;
const IFLA_BR_VLAN_FILTERING: u16 = 7;
const IFLA_BRPORT_ISOLATED: u16 = 33;
const RTEXT_FILTER_SKIP_STATS: u32 = 1 << 3;

const IFA_ADDRESS: u16 = 1;
const IFA_LOCAL: u16 = 2;
const IFA_CACHEINFO: u16 = 6;
const IFA_FLAGS: u16 = 8;
const IFA_TARGET_NETNSID: u16 = 10;
const IFA_F_DADFAILED: u32 = 0x08;

const RTA_DST: u16 = 1;
const RTA_OIF: u16 = 4;

const TCA_KIND: u16 = 1;
const TCA_OPTIONS: u16 = 2;
const TCA_BPF_NAME: u16 = 7;
/// The parent that `ingress` and `clsact` queueing disciplines have.
const TC_PARENT_CLSACT: u32 = 0xffff_fff1;
/// Their handle.
const TC_HANDLE_CLSACT: u32 = 0xffff_0000;
/// The two filter lists of a `clsact` queueing discipline: what comes in from the interface, and what goes out to it.
/// The older `ingress` one answers to the first.
pub(super) const FILTER_LISTS: [u32; 2] = [0xffff_fff2, 0xffff_fff3];

/// A network interface.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[expect(clippy::struct_excessive_bools, reason = "independent flags, as the kernel has them")]
pub struct Link {
    /// Index in its own namespace.
    pub index: u32,
    /// Name.
    pub name: Arc<str>,
    /// Kind as drivers call it (`veth`, `bridge`, `vxlan`), empty for hardware.
    pub kind: Arc<str>,
    /// Has the flag `IFF_LOOPBACK`.
    pub loopback: bool,
    /// Has the flag `IFF_UP`.
    pub up: bool,
    /// Ethernet address; zero where there is none.
    pub mac: MacBytes,
    /// MTU in bytes.
    pub mtu: u32,
    /// `IFLA_LINK`: index of the other end of a veth, of the parent of a VLAN.
    pub peer: Option<u32>,
    /// `IFLA_LINK_NETNSID`: the namespace of `peer`, when it is another one that has an id.
    pub peer_nsid: Option<i32>,
    /// Index of the bridge, bond or VRF that it belongs to.
    pub master: Option<u32>,
    /// Is a port of a bridge.
    pub bridge_port: bool,
    /// Is a bridge port with the flag `isolated`.
    pub isolated: bool,
    /// Is a bridge with VLAN filtering.
    pub vlan_filtering: bool,
}

/// An address of an interface.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Address {
    /// Index of the interface.
    pub index: u32,
    /// The address with its prefix.
    pub net: IpNet,
    /// Has global scope, and duplicate address detection did not fail.
    pub global: bool,
    /// When it was created, in 1/100 s since boot.
    pub created: u32,
}

/// A route of the main table.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Route {
    /// Destination; of prefix length 0 for the default route.
    pub to: IpNet,
    /// Index of the interface that it leads out of.
    pub via: u32,
}

/// A traffic control filter.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Filter {
    /// 0 for the list's head, which is no filter.
    pub handle: u32,
    /// Kind: `bpf`, `matchall`, `u32`.
    pub kind: String,
    /// Name of a `bpf` filter.
    pub name: Option<String>,
}

/// One message as received.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Message<'a> {
    pub(super) kind: u16,
    pub(super) flags: u16,
    pub(super) sequence: u32,
    pub(super) body: &'a [u8],
}

/// A request under construction.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Request(Vec<u8>);

/// Messages of a datagram. Ends at the first that is cut short.
pub(super) fn messages(mut datagram: &[u8]) -> impl Iterator<Item = Message<'_>> {
    std::iter::from_fn(move || {
        let length = usize::try_from(u32_at(datagram, 0)?).ok()?;
        let message = Message {
            kind: u16_at(datagram, 4)?,
            flags: u16_at(datagram, 6)?,
            sequence: u32_at(datagram, 8)?,
            body: datagram.get(HEADER..length)?,
        };
        datagram = datagram.get(length.next_multiple_of(4)..).unwrap_or_default();
        Some(message)
    })
}

pub(super) fn attributes(mut bytes: &[u8]) -> impl Iterator<Item = (u16, &[u8])> {
    std::iter::from_fn(move || {
        let length = usize::from(u16_at(bytes, 0)?);
        // The upper two bits say "nested" and "network order"; both are known from the kind.
        let kind = u16_at(bytes, 2)? & 0x3fff;
        let value = bytes.get(4..length)?;
        bytes = bytes.get(length.next_multiple_of(4)..).unwrap_or_default();
        Some((kind, value))
    })
}

pub(super) fn attribute(bytes: &[u8], wanted: u16) -> Option<&[u8]> {
    attributes(bytes).find(|(kind, _)| *kind == wanted).map(|(_, value)| value)
}

fn u16_at(bytes: &[u8], at: usize) -> Option<u16> {
    bytes.get(at..at + 2)?.try_into().ok().map(u16::from_ne_bytes)
}

fn u32_at(bytes: &[u8], at: usize) -> Option<u32> {
    bytes.get(at..at + 4)?.try_into().ok().map(u32::from_ne_bytes)
}

fn i32_at(bytes: &[u8], at: usize) -> Option<i32> {
    bytes.get(at..at + 4)?.try_into().ok().map(i32::from_ne_bytes)
}

fn text(value: &[u8]) -> String {
    let end = value.iter().position(|b| *b == 0).unwrap_or(value.len());
    String::from_utf8_lossy(&value[..end]).into_owned()
}

pub(super) fn ip(value: &[u8]) -> Option<IpAddr> {
    <[u8; 4]>::try_from(value).map(IpAddr::from).or_else(|_| <[u8; 16]>::try_from(value).map(IpAddr::from)).ok()
}

/// The errno of an answer of [`KIND_ERROR`] or [`KIND_DONE`]; 0 when all is well.
pub(super) fn errno(body: &[u8]) -> i32 {
    i32_at(body, 0).unwrap_or(0).saturating_neg()
}

// === impl Link ===

impl Link {
    /// Reads a message of kind `RTM_NEWLINK`. Absent when it names no interface, as the partial messages about
    /// bridge ports and wireless events do not always.
    pub(super) fn read(message: Message<'_>) -> Option<Self> {
        if message.kind != libc::RTM_NEWLINK {
            return None;
        }
        let flags = u32_at(message.body, 8)?;
        let has = |flag: libc::c_int| u32::try_from(flag).is_ok_and(|flag| flags & flag != 0);
        let mut link = Self {
            index: u32_at(message.body, 4)?,
            loopback: has(libc::IFF_LOOPBACK),
            up: has(libc::IFF_UP),
            ..Self::default()
        };
        for (kind, value) in attributes(message.body.get(16..)?) {
            match kind {
                IFLA_IFNAME => link.name = text(value).into(),
                IFLA_ADDRESS => link.mac = value.try_into().map(MacBytes).unwrap_or_default(),
                IFLA_MTU => link.mtu = u32_at(value, 0).unwrap_or(0),
                IFLA_LINK => link.peer = u32_at(value, 0).filter(|index| *index != 0),
                IFLA_LINK_NETNSID => link.peer_nsid = i32_at(value, 0).filter(|id| *id >= 0),
                IFLA_MASTER => link.master = u32_at(value, 0).filter(|index| *index != 0),
                IFLA_LINKINFO => link.read_info(value),
                _ => {}
            }
        }
        (!link.name.is_empty()).then_some(link)
    }

    fn read_info(&mut self, info: &[u8]) {
        self.kind = attribute(info, IFLA_INFO_KIND).map(text).unwrap_or_default().into();
        self.bridge_port = attribute(info, IFLA_INFO_SLAVE_KIND).is_some_and(|kind| text(kind) == "bridge");
        let is_set = |data: u16, flag: u16| {
            attribute(info, data).and_then(|data| attribute(data, flag)).is_some_and(|value| value.first() == Some(&1))
        };
        self.vlan_filtering = &*self.kind == "bridge" && is_set(IFLA_INFO_DATA, IFLA_BR_VLAN_FILTERING);
        self.isolated = self.bridge_port && is_set(IFLA_INFO_SLAVE_DATA, IFLA_BRPORT_ISOLATED);
    }
}

// === impl Address ===

impl Address {
    /// Reads a message of kind `RTM_NEWADDR`.
    pub(super) fn read(message: Message<'_>) -> Option<Self> {
        if message.kind != libc::RTM_NEWADDR {
            return None;
        }
        let [_, prefix, flags, scope] = message.body.get(..4)?.try_into().ok()?;
        let rest = message.body.get(8..)?;
        // On a point-to-point interface IFA_ADDRESS is the other side's.
        let ip = attribute(rest, IFA_LOCAL).or_else(|| attribute(rest, IFA_ADDRESS)).and_then(ip)?;
        let flags = attribute(rest, IFA_FLAGS).and_then(|value| u32_at(value, 0)).unwrap_or_else(|| u32::from(flags));
        Some(Self {
            index: u32_at(message.body, 4)?,
            net: IpNet::new(ip, prefix).ok()?,
            global: scope == libc::RT_SCOPE_UNIVERSE && flags & IFA_F_DADFAILED == 0,
            created: attribute(rest, IFA_CACHEINFO).and_then(|value| u32_at(value, 8)).unwrap_or(0),
        })
    }
}

// === impl Route ===

impl Route {
    /// Reads a message of kind `RTM_NEWROUTE`. Only unicast routes of the main table count.
    pub(super) fn read(message: Message<'_>) -> Option<Self> {
        if message.kind != libc::RTM_NEWROUTE {
            return None;
        }
        let [family, prefix, _, _, table, _, _, kind] = message.body.get(..8)?.try_into().ok()?;
        if table != libc::RT_TABLE_MAIN || kind != libc::RTN_UNICAST {
            return None;
        }
        let rest = message.body.get(12..)?;
        let any = if i32::from(family) == libc::AF_INET6 { IpAddr::from([0; 16]) } else { IpAddr::from([0; 4]) };
        let to = attribute(rest, RTA_DST).map_or(Some(any), ip)?;
        Some(Self { to: IpNet::new(to, prefix).ok()?, via: attribute(rest, RTA_OIF).and_then(|v| u32_at(v, 0))? })
    }
}

// === impl Filter ===

impl Filter {
    /// Reads a message of kind `RTM_NEWTFILTER`.
    pub(super) fn read(message: Message<'_>) -> Option<Self> {
        if message.kind != libc::RTM_NEWTFILTER {
            return None;
        }
        let rest = message.body.get(20..)?;
        Some(Self {
            handle: u32_at(message.body, 8)?,
            kind: attribute(rest, TCA_KIND).map(text).unwrap_or_default(),
            name: attribute(rest, TCA_OPTIONS).and_then(|options| attribute(options, TCA_BPF_NAME)).map(text),
        })
    }
}

/// Index of the interface that a notification about links, addresses or traffic control speaks of.
pub(super) fn subject(message: Message<'_>) -> Option<u32> {
    u32_at(message.body, 4)
}

/// Index of the interface whose `ingress` or `clsact` queueing discipline a message of kind `RTM_NEWQDISC` describes.
pub(super) fn filtered_link(message: Message<'_>) -> Option<u32> {
    let parent = u32_at(message.body, 12)?;
    (message.kind == libc::RTM_NEWQDISC && parent == TC_PARENT_CLSACT).then(|| subject(message)).flatten()
}

// === impl Request ===

impl Request {
    pub(super) fn new(kind: u16, flags: u16, body: &[u8]) -> Self {
        let mut bytes = vec![0; HEADER];
        bytes[4..6].copy_from_slice(&kind.to_ne_bytes());
        bytes[6..8].copy_from_slice(&(FLAG_REQUEST | flags).to_ne_bytes());
        bytes.extend_from_slice(body);
        Self(bytes)
    }

    fn with(mut self, kind: u16, value: u32) -> Self {
        self.0.extend_from_slice(&8_u16.to_ne_bytes());
        self.0.extend_from_slice(&kind.to_ne_bytes());
        self.0.extend_from_slice(&value.to_ne_bytes());
        self
    }

    /// All interfaces, without their counters.
    pub(super) fn links() -> Self {
        Self::new(libc::RTM_GETLINK, FLAG_DUMP, &[0; 16]).with(IFLA_EXT_MASK, RTEXT_FILTER_SKIP_STATS)
    }

    /// One interface; of another namespace when an id is given.
    pub(super) fn link(index: u32, nsid: Option<i32>) -> Self {
        let mut body = [0; 16];
        body[4..8].copy_from_slice(&index.to_ne_bytes());
        let request = Self::new(libc::RTM_GETLINK, 0, &body).with(IFLA_EXT_MASK, RTEXT_FILTER_SKIP_STATS);
        match nsid {
            Some(id) => request.with(IFLA_TARGET_NETNSID, id.cast_unsigned()),
            None => request,
        }
    }

    /// Addresses of one family; of one interface unless `index` is 0; of another namespace when an id is given.
    pub(super) fn addresses(family: u8, index: u32, nsid: Option<i32>) -> Self {
        let mut body = [0; 8];
        body[0] = family;
        body[4..8].copy_from_slice(&index.to_ne_bytes());
        let request = Self::new(libc::RTM_GETADDR, FLAG_DUMP, &body);
        match nsid {
            Some(id) => request.with(IFA_TARGET_NETNSID, id.cast_unsigned()),
            None => request,
        }
    }

    /// Routes of the main table of one family out of one interface.
    pub(super) fn routes(family: u8, index: u32) -> Self {
        let mut body = [0; 12];
        body[0] = family;
        body[4] = libc::RT_TABLE_MAIN;
        Self::new(libc::RTM_GETROUTE, FLAG_DUMP, &body).with(RTA_OIF, index)
    }

    /// All queueing disciplines.
    pub(super) fn qdiscs() -> Self {
        Self::new(libc::RTM_GETQDISC, FLAG_DUMP, &[0; 20])
    }

    /// Filters of one of the [`FILTER_LISTS`] of an interface.
    pub(super) fn filters(index: u32, list: u32) -> Self {
        let mut body = [0; 20];
        body[4..8].copy_from_slice(&index.to_ne_bytes());
        body[12..16].copy_from_slice(&list.to_ne_bytes());
        Self::new(libc::RTM_GETTFILTER, FLAG_DUMP, &body)
    }

    /// Removes the `clsact` queueing discipline of an interface, with whatever filters are in it.
    pub(super) fn delete_clsact(index: u32) -> Self {
        let mut body = [0; 20];
        body[4..8].copy_from_slice(&index.to_ne_bytes());
        body[8..12].copy_from_slice(&TC_HANDLE_CLSACT.to_ne_bytes());
        body[12..16].copy_from_slice(&TC_PARENT_CLSACT.to_ne_bytes());
        Self::new(libc::RTM_DELQDISC, FLAG_ACK, &body)
    }

    /// The bytes to send.
    pub(super) fn finish(mut self, sequence: u32) -> Vec<u8> {
        let length = u32::try_from(self.0.len()).unwrap_or(u32::MAX);
        self.0[..4].copy_from_slice(&length.to_ne_bytes());
        self.0[8..12].copy_from_slice(&sequence.to_ne_bytes());
        self.0
    }
}

/// Attributes, as the kernel lays them out.
#[cfg(test)]
pub(super) fn nest(attributes: &[(u16, &[u8])]) -> Vec<u8> {
    let mut bytes = Vec::new();
    for (kind, value) in attributes {
        bytes.extend_from_slice(&u16::try_from(4 + value.len()).unwrap().to_ne_bytes());
        bytes.extend_from_slice(&kind.to_ne_bytes());
        bytes.extend_from_slice(value);
        bytes.resize(bytes.len().next_multiple_of(4), 0);
    }
    bytes
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A message with a body and attributes, as the kernel lays it out.
    fn message(kind: u16, body: &[u8], attributes: &[(u16, &[u8])]) -> Vec<u8> {
        let mut bytes = Request::new(kind, 0, body).0;
        bytes.extend(nest(attributes));
        Request(bytes).finish(7)
    }

    fn only(bytes: &[u8]) -> Message<'_> {
        let all: Vec<_> = messages(bytes).collect();
        assert_eq!(all.len(), 1);
        all[0]
    }

    fn link_body(index: u32, flags: u32) -> Vec<u8> {
        [&[0; 4][..], &index.to_ne_bytes(), &flags.to_ne_bytes(), &[0; 4]].concat()
    }

    #[test]
    fn a_bridge_port_is_read() {
        let info = nest(&[
            (IFLA_INFO_KIND, b"veth\0"),
            (IFLA_INFO_SLAVE_KIND, b"bridge\0"),
            (IFLA_INFO_SLAVE_DATA, &nest(&[(1, &[3]), (IFLA_BRPORT_ISOLATED, &[1])])),
        ]);
        let bytes = message(
            libc::RTM_NEWLINK,
            &link_body(9, 1),
            &[
                (IFLA_IFNAME, b"veth1234\0"),
                (IFLA_ADDRESS, &[2, 0, 0, 0, 0, 1]),
                (IFLA_MTU, &1450_u32.to_ne_bytes()),
                (IFLA_LINK, &2_u32.to_ne_bytes()),
                (IFLA_MASTER, &4_u32.to_ne_bytes()),
                (IFLA_LINKINFO, &info),
                (IFLA_LINK_NETNSID, &0_i32.to_ne_bytes()),
                // Of a newer kernel, and of a size nobody knows.
                (999, &[1, 2, 3]),
            ],
        );
        let expected = Link {
            index: 9,
            name: "veth1234".into(),
            kind: "veth".into(),
            up: true,
            mac: MacBytes([2, 0, 0, 0, 0, 1]),
            mtu: 1450,
            peer: Some(2),
            peer_nsid: Some(0),
            master: Some(4),
            bridge_port: true,
            isolated: true,
            ..Link::default()
        };
        assert_eq!(Link::read(only(&bytes)), Some(expected));
    }

    #[test]
    fn a_filtering_bridge_is_read() {
        let data = nest(&[(IFLA_BR_VLAN_FILTERING, &[1])]);
        let info = nest(&[(IFLA_INFO_KIND, b"bridge\0"), (IFLA_INFO_DATA, &data)]);
        let bytes = message(libc::RTM_NEWLINK, &link_body(4, 0), &[(IFLA_IFNAME, b"cni0\0"), (IFLA_LINKINFO, &info)]);
        let expected =
            Link { index: 4, name: "cni0".into(), kind: "bridge".into(), vlan_filtering: true, ..Link::default() };
        assert_eq!(Link::read(only(&bytes)), Some(expected));
    }

    #[test]
    fn addresses_are_read() {
        let cache = [&[0; 8][..], &77_u32.to_ne_bytes(), &[0; 4]].concat();
        let read = |family: u8, prefix: u8, flags: u8, scope: u8, attributes: &[(u16, &[u8])]| {
            let body = [&[family, prefix, flags, scope][..], &5_u32.to_ne_bytes()].concat();
            Address::read(only(&message(libc::RTM_NEWADDR, &body, attributes)))
        };
        let expect =
            |net: &str, global: bool| Some(Address { index: 5, net: net.parse().unwrap(), global, created: 77 });
        let v6 = [0xfd, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 2];
        assert_eq!(
            read(2, 24, 0, 0, &[(IFA_ADDRESS, &[10, 0, 0, 1]), (IFA_LOCAL, &[10, 0, 0, 2]), (IFA_CACHEINFO, &cache)]),
            expect("10.0.0.2/24", true),
            "the local side of a point-to-point address"
        );
        assert_eq!(read(10, 64, 0, 0, &[(IFA_ADDRESS, &v6), (IFA_CACHEINFO, &cache)]), expect("fd00::2/64", true));
        assert_eq!(
            read(10, 64, 0, 253, &[(IFA_ADDRESS, &v6), (IFA_CACHEINFO, &cache)]),
            expect("fd00::2/64", false),
            "link scope"
        );
        assert_eq!(
            read(
                10,
                64,
                0,
                0,
                &[(IFA_ADDRESS, &v6), (IFA_CACHEINFO, &cache), (IFA_FLAGS, &IFA_F_DADFAILED.to_ne_bytes())]
            ),
            expect("fd00::2/64", false),
            "another host has it"
        );
        assert_eq!(read(2, 24, 0, 0, &[(IFA_ADDRESS, &[10, 0])]), None, "half an address");
    }

    #[test]
    fn routes_are_read() {
        let read = |table: u8, kind: u8, prefix: u8, attributes: &[(u16, &[u8])]| {
            let body = [2, prefix, 0, 0, table, 0, 0, kind, 0, 0, 0, 0];
            Route::read(only(&message(libc::RTM_NEWROUTE, &body, attributes)))
        };
        let via = 3_u32.to_ne_bytes();
        assert_eq!(
            read(254, 1, 32, &[(RTA_DST, &[10, 0, 0, 9]), (RTA_OIF, &via)]),
            Some(Route { to: "10.0.0.9/32".parse().unwrap(), via: 3 })
        );
        assert_eq!(read(254, 1, 0, &[(RTA_OIF, &via)]), Some(Route { to: "0.0.0.0/0".parse().unwrap(), via: 3 }));
        assert_eq!(read(255, 2, 32, &[(RTA_DST, &[10, 0, 0, 9]), (RTA_OIF, &via)]), None, "local table");
    }

    #[test]
    fn filters_are_read() {
        let body = [&[0; 8][..], &1_u32.to_ne_bytes(), &[0; 8]].concat();
        let options = nest(&[(TCA_BPF_NAME, b"from_pod\0")]);
        let bytes = message(libc::RTM_NEWTFILTER, &body, &[(TCA_KIND, b"bpf\0"), (TCA_OPTIONS, &options)]);
        assert_eq!(
            Filter::read(only(&bytes)),
            Some(Filter { handle: 1, kind: "bpf".into(), name: Some("from_pod".into()) })
        );
    }

    #[test]
    fn a_cut_datagram_ends_the_iteration() {
        let whole = message(libc::RTM_NEWLINK, &link_body(1, 0), &[(IFLA_IFNAME, b"lo\0")]);
        let two = [&whole[..], &whole[..]].concat();
        assert_eq!(messages(&two).count(), 2);
        for cut in 0..whole.len() {
            assert_eq!(messages(&two[..whole.len() + cut]).count(), 1, "cut at {cut}");
        }
    }

    proptest::proptest! {
        #[test]
        fn no_bytes_upset_the_decoder(bytes: Vec<u8>) {
            let most = bytes.len() / HEADER;
            let read = messages(&bytes).inspect(|message| {
                let _: (Option<Link>, Option<Address>) = (Link::read(*message), Address::read(*message));
                let _: (Option<Route>, Option<Filter>) = (Route::read(*message), Filter::read(*message));
            });
            proptest::prop_assert!(read.count() <= most);
        }
    }
}
