//! What the running kernel calls things: drop reasons, extensions of a packet, code addresses.

use std::collections::BTreeMap;

use super::btf::Btf;
use super::symbols::Symbols;

/// Names by number, and functions by address.
#[derive(Clone, Debug, Default)]
pub struct Kernel {
    reasons: BTreeMap<u32, String>,
    bridge_nf: Option<u32>,
    /// Functions by address.
    pub symbols: Symbols,
}

/// What names of drop reasons begin with.
const PREFIX: &str = "SKB_DROP_REASON_";

/// Reasons that are not drops in anybody's eyes: routine that would hide the rest.
const ROUTINE: [&str; 8] = [
    "OTHERHOST",
    "TCP_OLD_DATA",
    "TCP_OLD_ACK",
    "TCP_OLD_SEQUENCE",
    "UNHANDLED_PROTO",
    "UNICAST_IN_L2_MULTICAST",
    "QUEUE_PURGE",
    "PACKET_SOCK_ERROR",
];

impl Kernel {
    /// Of the running kernel.
    pub fn new(btf: &Btf, symbols: Symbols) -> Self {
        let extensions = btf.enumeration("skb_ext_id");
        let bridge_nf = extensions.iter().find(|(_, name)| *name == "SKB_EXT_BRIDGE_NF").map(|(value, _)| *value);
        Self { reasons: btf.enumeration("skb_drop_reason"), bridge_nf, symbols }
    }

    /// With these names alone: for outputs that are read back.
    pub fn with_reasons(reasons: BTreeMap<u32, String>) -> Self {
        Self { reasons, bridge_nf: Some(0), symbols: Symbols::default() }
    }

    /// The bit of `skb->active_extensions` that br_netfilter sets; 0 on a kernel without it.
    pub fn bridge_nf_bit(&self) -> u32 {
        self.bridge_nf.and_then(|number| 1_u32.checked_shl(number)).unwrap_or(0)
    }

    /// Name of a drop reason, without what all of them begin with.
    pub fn reason(&self, number: u32) -> String {
        match self.reasons.get(&number) {
            Some(name) => name.strip_prefix(PREFIX).unwrap_or(name).to_owned(),
            // The upper half names a subsystem, whose enum is its own.
            None if number >> 16 != 0 => format!("SUBSYSTEM_{}_{}", number >> 16, number & 0xffff),
            None => format!("REASON_{number}"),
        }
    }

    /// The lowest number that means a drop: `NOT_SPECIFIED` is the first of them on every kernel.
    pub fn first_drop(&self) -> u32 {
        let found = self.reasons.iter().find(|(_, name)| name.as_str() == "SKB_DROP_REASON_NOT_SPECIFIED");
        found.map_or(2, |(number, _)| *number)
    }

    /// Does the number mean a drop?
    pub fn is_drop(&self, number: u32) -> bool {
        number >= self.first_drop()
    }

    /// Is the reason routine, not worth a look?
    pub fn is_routine(&self, number: u32) -> bool {
        ROUTINE.contains(&self.reason(number).as_str())
    }

    /// Number of known reasons.
    pub fn reasons(&self) -> usize {
        self.reasons.len()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reasons_are_named_as_this_kernel_numbers_them() {
        let names = ["SKB_NOT_DROPPED_YET", "SKB_DROP_REASON_NOT_SPECIFIED", "SKB_DROP_REASON_NO_SOCKET"];
        let kernel = Kernel::with_reasons((0..).zip(names.map(str::to_owned)).collect());
        assert_eq!(
            [1, 2, 9, 0x2_0003].map(|n| kernel.reason(n)),
            ["NOT_SPECIFIED", "NO_SOCKET", "REASON_9", "SUBSYSTEM_2_3"]
        );
        assert_eq!([0, 1, 2].map(|n| kernel.is_drop(n)), [false, true, true]);
    }
}
