//! A trace as a capture file (pcapng): an interface for each place a packet was seen at, so that Wireshark shows the hop as
//! the interface. A packet is in it once for each hop, with the same packet id.
//!
//! ```text
//!   Section Header · Interface Description × places · Name Resolution · Enhanced Packet × hops · Interface Statistics
//! ```
//!
//! Blocks and options: draft-ietf-opsawg-pcapng. Packets begin with the IP header (LINKTYPE_RAW).

use std::collections::BTreeMap;
use std::net::IpAddr;

use super::recorded::{Recorded, RecordedPacket};

/// Types of blocks.
mod block {
    pub(super) const SECTION: u32 = 0x0a0d_0d0a;
    pub(super) const INTERFACE: u32 = 1;
    pub(super) const NAMES: u32 = 4;
    pub(super) const STATISTICS: u32 = 5;
    pub(super) const PACKET: u32 = 6;
}

/// Codes of options.
mod option {
    pub(super) const END: u16 = 0;
    pub(super) const COMMENT: u16 = 1;
    pub(super) const IF_NAME: u16 = 2;
    pub(super) const IF_DESCRIPTION: u16 = 3;
    pub(super) const SECTION_APPLICATION: u16 = 4;
    pub(super) const PACKET_ID: u16 = 5;
    pub(super) const PACKET_VERDICT: u16 = 7;
    pub(super) const IF_RESOLUTION: u16 = 9;
    pub(super) const STATISTICS_DROPPED: u16 = 5;
}

/// LINKTYPE_RAW: an IP header, of either version.
const RAW: u16 = 101;
/// Verdict of a Linux eBPF program at tc.
const VERDICT_TC: u8 = 1;

/// A file or a part of it, in this machine's byte order, which its first block tells.
#[derive(Debug, Default)]
struct Bytes(Vec<u8>);

impl Bytes {
    fn half(&mut self, number: u16) {
        self.0.extend(number.to_ne_bytes());
    }

    fn word(&mut self, number: u32) {
        self.0.extend(number.to_ne_bytes());
    }

    fn padded(&mut self, bytes: &[u8]) {
        self.0.extend(bytes);
        self.0.resize(self.0.len().next_multiple_of(4), 0);
    }

    fn option(&mut self, code: u16, value: &[u8]) {
        // Longer than any option of ours.
        let value = value.get(..value.len().min(60_000)).unwrap_or_default();
        self.half(code);
        self.half(u16::try_from(value.len()).unwrap_or(0));
        self.padded(value);
    }

    fn end_options(&mut self) {
        self.half(option::END);
        self.half(0);
    }

    /// Adds a block with this body.
    fn block(&mut self, kind: u32, body: &Self) {
        let length = u32::try_from(body.0.len() + 12).unwrap_or(u32::MAX);
        self.word(kind);
        self.word(length);
        self.0.extend(&body.0);
        self.word(length);
    }
}

/// The whole file.
pub fn file(recorded: &Recorded) -> Vec<u8> {
    let mut file = Bytes::default();
    file.block(block::SECTION, &section());
    let mut interfaces: BTreeMap<String, u32> = BTreeMap::new();
    for step in recorded.packets.iter().flat_map(|packet| &packet.steps).filter(|step| !step.data.is_empty()) {
        let name = format!("{} {}", step.place, step.point);
        let next = u32::try_from(interfaces.len()).unwrap_or(0);
        interfaces.entry(name.clone()).or_insert_with(|| {
            file.block(block::INTERFACE, &interface(&name, &step.netns));
            next
        });
    }
    file.block(block::NAMES, &names(&recorded.names));
    let boot = recorded.meta["boot_epoch_ns"].as_u64().unwrap_or(0);
    let mut hops: Vec<(u64, Bytes)> = Vec::new();
    for packet in &recorded.packets {
        hops.extend(packet_blocks(packet, boot, &interfaces));
    }
    hops.sort_by_key(|(at, _)| *at);
    for (_, hop) in &hops {
        file.block(block::PACKET, hop);
    }
    if recorded.lost > 0 {
        file.block(block::STATISTICS, &statistics(recorded.lost, hops.last().map_or(boot, |(at, _)| *at)));
    }
    file.0
}

fn section() -> Bytes {
    let mut body = Bytes::default();
    body.word(0x1a2b_3c4d);
    body.half(1);
    body.half(0);
    // Length not said.
    body.word(u32::MAX);
    body.word(u32::MAX);
    body.option(option::SECTION_APPLICATION, concat!("proxy-agent trace ", env!("CARGO_PKG_VERSION")).as_bytes());
    body.option(
        option::COMMENT,
        "Every packet is here once for each hop, with the same packet id: switch TCP sequence analysis off.".as_bytes(),
    );
    body.end_options();
    body
}

fn interface(name: &str, netns: &str) -> Bytes {
    let mut body = Bytes::default();
    body.half(RAW);
    body.half(0);
    body.word(0);
    body.option(option::IF_NAME, name.as_bytes());
    body.option(option::IF_DESCRIPTION, netns.as_bytes());
    // Nanoseconds.
    body.option(option::IF_RESOLUTION, &[9]);
    body.end_options();
    body
}

fn names(names: &BTreeMap<IpAddr, String>) -> Bytes {
    let mut body = Bytes::default();
    for (ip, name) in names {
        // Names of hosts have no spaces: Wireshark cuts there.
        let name = name.replace(' ', "-");
        let (kind, mut value) = match ip {
            IpAddr::V4(ip) => (1, ip.octets().to_vec()),
            IpAddr::V6(ip) => (2, ip.octets().to_vec()),
        };
        value.extend(name.bytes().take(255));
        value.push(0);
        body.half(kind);
        body.half(u16::try_from(value.len()).unwrap_or(0));
        body.padded(&value);
    }
    body.half(0);
    body.half(0);
    body
}

/// The packet's id as a number of 64 bits.
fn id(packet: &RecordedPacket) -> u64 {
    u64::from_str_radix(&packet.id, 16).unwrap_or(0)
}

fn packet_blocks(packet: &RecordedPacket, boot: u64, interfaces: &BTreeMap<String, u32>) -> Vec<(u64, Bytes)> {
    let mut blocks = Vec::new();
    // Decisions go with the sight that follows, or at the end with the one before.
    let mut pending: Vec<(String, u64)> = Vec::new();
    let last = packet.steps.iter().rposition(|step| !step.data.is_empty());
    for (index, step) in packet.steps.iter().enumerate() {
        if let Some((_, verdict)) = &step.decision {
            let action = match verdict.as_str() {
                "drop" => 2,
                "redirect" => 7,
                // TC_ACT_UNSPEC, -1 in 64 bits.
                _ => u64::MAX,
            };
            pending.push((step.comment.clone(), action));
            continue;
        }
        let Some(interface) = interfaces.get(&format!("{} {}", step.place, step.point)) else { continue };
        let at = boot + step.ns;
        let mut body = Bytes::default();
        body.word(*interface);
        body.word(u32::try_from(at >> 32).unwrap_or(0));
        body.word(u32::try_from(at & 0xffff_ffff).unwrap_or(0));
        body.word(u32::try_from(step.data.len()).unwrap_or(0));
        let captured = u32::try_from(step.data.len()).unwrap_or(0);
        body.word(captured.max(ip_length(&step.data)));
        body.padded(&step.data);
        body.option(option::COMMENT, step.comment.as_bytes());
        body.option(option::PACKET_ID, &id(packet).to_ne_bytes());
        for (comment, action) in pending.drain(..) {
            body.option(option::COMMENT, comment.as_bytes());
            let verdict: Vec<u8> = std::iter::once(VERDICT_TC).chain(action.to_ne_bytes()).collect();
            body.option(option::PACKET_VERDICT, &verdict);
        }
        if Some(index) == last
            && let Some(drop) = &packet.drop
        {
            body.option(option::COMMENT, format!("dropped: {drop}").as_bytes());
        }
        body.end_options();
        blocks.push((at, body));
    }
    blocks
}

/// Bytes of the packet by its own header: what the kernel counts has the Ethernet header at some places.
fn ip_length(bytes: &[u8]) -> u32 {
    super::packet::Packet::parse(bytes).map_or(0, |packet| packet.len)
}

fn statistics(lost: u64, at: u64) -> Bytes {
    let mut body = Bytes::default();
    body.word(0);
    body.word(u32::try_from(at >> 32).unwrap_or(0));
    body.word(u32::try_from(at & 0xffff_ffff).unwrap_or(0));
    body.option(option::STATISTICS_DROPPED, &lost.to_ne_bytes());
    body.end_options();
    body
}

#[cfg(test)]
mod tests {
    use super::super::recorded::tests::lines;
    use super::*;

    /// Types of the blocks; every length must be told the same before and after.
    fn blocks(file: &[u8]) -> Vec<u32> {
        let word = |at: usize| u32::from_ne_bytes(file[at..at + 4].try_into().expect("four bytes"));
        let (mut at, mut kinds) = (0, Vec::new());
        while at < file.len() {
            let length = word(at + 4) as usize;
            assert!(length.is_multiple_of(4) && word(at + length - 4) as usize == length, "block at {at}");
            kinds.push(word(at));
            at += length;
        }
        kinds
    }

    #[test]
    fn a_capture_has_an_interface_for_each_place_and_a_packet_for_each_hop() {
        let mut recorded = Recorded::new([lines("a1", 500, false), lines("a2", 700, true)].concat().iter());
        recorded.lost = 3;
        let file = file(&recorded);
        let (i, p) = (block::INTERFACE, block::PACKET);
        assert_eq!(blocks(&file), [block::SECTION, i, i, block::NAMES, p, p, p, block::STATISTICS]);
        let has = |text: &str| file.windows(text.len()).any(|part| part == text.as_bytes());
        for text in [
            "shop/web-0 eth0 net_dev_queue",
            "service-shop/api:http",
            "#1 from_pod at veth7: service_new redirect svc shop/api:http → 10.1.0.3:8080",
            "dropped: no_backend at from_pod at veth7",
        ] {
            assert!(has(text), "{text}");
        }
    }

    #[test]
    fn nothing_is_a_capture_too() {
        assert_eq!(blocks(&file(&Recorded::default())), [block::SECTION, block::NAMES]);
    }
}
