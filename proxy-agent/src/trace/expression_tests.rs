//! Expressions: what holds for which packet, that the kernel's rows are never stricter, and what is said of mistakes.

use super::*;

fn packet(text: &str) -> Packet {
    // protocol source:port destination:port flags
    let words: Vec<&str> = text.split(' ').collect();
    let [proto, source, destination, rest @ ..] = words.as_slice() else { panic!("{text}") };
    let (source, destination): (std::net::SocketAddr, std::net::SocketAddr) =
        (source.parse().expect("source"), destination.parse().expect("destination"));
    Packet {
        src: source.ip(),
        dst: destination.ip(),
        src_port: source.port(),
        dst_port: destination.port(),
        proto: match *proto {
            "tcp" => Proto::TCP,
            "udp" => Proto::UDP,
            _ => Proto::ICMP,
        },
        flags: rest.first().map_or(0, |flags| flags.parse().expect("flags")),
        ttl: 64,
        ident: 0,
        icmp: None,
        len: 60,
        is_rest: false,
    }
}

const PACKETS: [&str; 7] = [
    "tcp 10.0.0.1:4000 10.0.0.2:80 2",
    "tcp 10.0.0.2:80 10.0.0.1:4000 18",
    "udp 10.0.0.1:5000 10.1.0.9:53",
    "udp [fd00::1]:5000 [fd00::2]:53",
    "tcp [fd00::2]:81 [fd00::1]:90 16",
    "icmp 10.0.0.1:0 10.0.0.2:0",
    "tcp 192.168.0.1:1 10.0.0.1:65535 4",
];

/// Which of [`PACKETS`] an expression holds for.
const CASES: [(&str, &[usize]); 22] = [
    ("tcp", &[0, 1, 4, 6]),
    ("ip6", &[3, 4]),
    ("host 10.0.0.1", &[0, 1, 2, 5, 6]),
    ("10.0.0.1", &[0, 1, 2, 5, 6]),
    ("src 10.0.0.1", &[0, 2, 5]),
    ("dst net 10.1.0.0/16", &[2]),
    ("port 80", &[0, 1]),
    ("dst port 80", &[0]),
    ("portrange 53-80", &[0, 1, 2, 3]),
    ("tcp dst portrange 80-90", &[0, 4]),
    ("not tcp", &[2, 3, 5]),
    ("not host 10.0.0.1", &[3, 4]),
    ("host 10.0.0.1 and not port 80", &[2, 5, 6]),
    ("tcp[syn]", &[0, 1]),
    ("tcp[syn,ack]", &[1]),
    ("tcp[syn] and not tcp[ack]", &[0]),
    ("tcp or udp port 53 and ip6", &[0, 1, 3, 4, 6]),
    ("(tcp or udp port 53) && ip6", &[3, 4]),
    ("! (tcp || udp)", &[5]),
    ("tcp host 10.0.0.2 port 80", &[0, 1]),
    ("proto 1", &[5]),
    ("tcp and udp", &[]),
];

/// As the kernel judges, see `proxy-ebpf/src/bin/trace/filter.rs`.
fn row_holds(row: &TraceRow, packet: &Packet) -> bool {
    let within = |ip: std::net::IpAddr, net: IpBytes, mask: IpBytes| {
        IpBytes::from(ip).0.iter().zip(net.0).zip(mask.0).all(|((ip, net), mask)| ip & mask == net)
    };
    let family = if packet.src.is_ipv4() { 4 } else { 6 };
    let parts = [
        (within(packet.src, row.src, row.src_mask), TraceRow::NOT_SRC),
        (within(packet.dst, row.dst, row.dst_mask), TraceRow::NOT_DST),
        ((row.src_low..=row.src_high).contains(&packet.src_port), TraceRow::NOT_SRC_PORT),
        ((row.dst_low..=row.dst_high).contains(&packet.dst_port), TraceRow::NOT_DST_PORT),
        (row.proto == 0 || row.proto == u32::from(packet.proto.0), TraceRow::NOT_PROTO),
        (u32::from(packet.flags) & row.flags_mask == row.flags, TraceRow::NOT_FLAGS),
        (row.family == 0 || row.family == family, TraceRow::NOT_FAMILY),
    ];
    parts.iter().all(|(holds, part)| *holds == (row.negated & part == 0))
}

#[test]
fn expressions_hold_for_what_they_say() {
    for (text, expected) in CASES {
        let expression: Expression = text.parse().unwrap_or_else(|error| panic!("{text}: {error}"));
        let packets = PACKETS.map(packet);
        let found: Vec<usize> = (0..packets.len()).filter(|&i| expression.holds(&packets[i])).collect();
        assert_eq!(found, expected, "{text}");
        let rows = expression.rows();
        for i in found {
            assert!(
                rows.iter().any(|row| row_holds(row, &packets[i])),
                "{text}: the kernel would not tell {}",
                PACKETS[i]
            );
        }
    }
}

#[test]
fn rows_tell_apart_what_one_row_can() {
    // Not only never stricter, but strict where it can be.
    for text in ["tcp dst port 80", "not host 10.0.0.1", "udp port 53 and ip6", "tcp[syn,ack]", "icmp"] {
        let expression: Expression = text.parse().expect("an expression");
        let rows = expression.rows();
        for packet in PACKETS.map(packet) {
            assert_eq!(rows.iter().any(|row| row_holds(row, &packet)), expression.holds(&packet), "{text}: {packet}");
        }
    }
    // Too many for the kernel: it tells everything.
    let many = (0..40).map(|i| format!("host 10.0.0.{i}")).collect::<Vec<_>>().join(" or ");
    assert_eq!(many.parse::<Expression>().expect("an expression").rows(), []);
}

#[test]
fn mistakes_are_pointed_at() {
    let cases = [
        ("", 0, "the expression is empty"),
        ("tcp prot 80", 4, "`prot` is not understood here"),
        ("host", 4, "after `host` comes an address"),
        ("host 10.0.0", 5, "after `host` comes an address, `10.0.0` is none"),
        ("port 99999", 5, "a port is a number"),
        ("portrange 90-80", 10, "a port is a number"),
        ("(tcp or udp", 0, "this bracket is not closed"),
        ("tcp)", 3, "no bracket is open here"),
        ("tcp and", 7, "`the end` is not understood"),
        ("tcp[syn;]", 4, "flags of TCP"),
        ("src", 3, "`the end` is not understood"),
        ("ü host", 0, "`ü` is not understood"),
    ];
    for (text, at, message) in cases {
        let error = text.parse::<Expression>().expect_err(text);
        assert_eq!(error.at, at, "{text}: {error}");
        assert!(error.message.starts_with(message), "{text}: {error}");
    }
    let shown = "tcp prot 80".parse::<Expression>().expect_err("a mistake").to_string();
    assert_eq!(shown.lines().nth(2), Some("      ^"));
}
