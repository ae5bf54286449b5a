//! Where the probes find what they read: the load-time constants of `proxy-ebpf/src/bin/trace`.

use super::btf::{Btf, BtfError};

/// Constants by name.
pub type Offsets = Vec<(&'static str, u32)>;

/// A driver's own part of a device begins at the next multiple of this (`NETDEV_ALIGN`).
const DEVICE_ALIGN: u32 = 32;

/// Constant, struct, field.
const FIELDS: [(&str, &str, &str); 20] = [
    ("SKB_HEAD", "sk_buff", "head"),
    ("SKB_DATA", "sk_buff", "data"),
    ("SKB_TAIL", "sk_buff", "tail"),
    ("SKB_NETWORK", "sk_buff", "network_header"),
    ("SKB_LEN", "sk_buff", "len"),
    ("SKB_DEV", "sk_buff", "dev"),
    ("SKB_MARK", "sk_buff", "mark"),
    ("DEV_NAME", "net_device", "name"),
    ("DEV_IFINDEX", "net_device", "ifindex"),
    ("DEV_NET", "net_device", "nd_net.net"),
    ("NET_INUM", "net", "ns.inum"),
    ("NET_HOOKS_V4", "net", "nf.hooks_ipv4"),
    ("NET_HOOKS_V6", "net", "nf.hooks_ipv6"),
    ("NET_HOOKS_ARP", "net", "nf.hooks_arp"),
    ("NET_HOOKS_BRIDGE", "net", "nf.hooks_bridge"),
    ("TASK_NSPROXY", "task_struct", "nsproxy"),
    ("TASK_PID", "task_struct", "tgid"),
    ("NSPROXY_NET", "nsproxy", "net_ns"),
    ("ENTRIES_HOOKS", "nf_hook_entries", "hooks"),
    ("OPS_PRIORITY", "nf_hook_ops", "priority"),
];

/// What some kernels lack, or have in a module whose types are elsewhere: the probes go without.
const OPTIONAL: [(&str, &str, &str); 10] = [
    ("SKB_NFCT", "sk_buff", "_nfct"),
    ("SKB_EXTENSIONS", "sk_buff", "active_extensions"),
    ("SKB_SK", "sk_buff", "sk"),
    ("SK_COOKIE", "sock", "__sk_common.skc_cookie"),
    ("VETH_PEER", "veth_priv", "peer"),
    ("OPS_KIND", "nf_hook_ops", "hook_ops_type"),
    ("CHAIN_NAME", "nft_chain", "name"),
    ("CHAIN_TABLE", "nft_chain", "table"),
    ("TABLE_NAME", "nft_table", "name"),
    // The tracepoint's arguments are in the typedef of its probe; what it writes down of them is in a struct.
    ("CONSUME_LOCATION", "trace_event_raw_consume_skb", "location"),
];

/// All constants of this kernel, and what it lacks.
///
/// # Errors
/// [`BtfError::Missing`] where nothing works without.
pub fn offsets(btf: &Btf) -> Result<(Offsets, Vec<String>), BtfError> {
    let mut offsets = Vec::new();
    let mut missing = Vec::new();
    for (name, structure, field) in FIELDS {
        offsets.push((name, btf.offset(structure, field)?));
    }
    for (name, structure, field) in OPTIONAL {
        match btf.offset(structure, field) {
            Ok(offset) => offsets.push((name, offset)),
            Err(_) => missing.push(format!("{structure}.{field}")),
        }
    }
    offsets.push(("DEV_PRIVATE", btf.size("net_device")?.next_multiple_of(DEVICE_ALIGN)));
    let kinds = btf.enumeration("nf_hook_ops_type");
    let nft = kinds.iter().find(|(_, name)| *name == "NF_HOOK_OP_NF_TABLES").map_or(0, |(value, _)| *value);
    offsets.push(("OPS_NFT", nft));
    Ok((offsets, missing))
}
