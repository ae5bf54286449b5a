//! The types of the running kernel, as it describes them itself (`/sys/kernel/btf/vmlinux`): where fields lie, what the
//! values of enums are called.
//!
//! Neither is the same from kernel to kernel, so both are asked for by name.

use std::collections::BTreeMap;
use std::path::Path;

/// A kernel's types.
#[derive(Debug)]
pub struct Btf {
    raw: Vec<u8>,
    strings: usize,
    /// Where each type begins; the first is `void`, which is nowhere.
    types: Vec<usize>,
    /// Structs, enums, functions and typedefs by kind and name.
    named: BTreeMap<(u32, String), u32>,
}

/// What is not as it should be.
#[derive(Debug, thiserror::Error)]
pub enum BtfError {
    /// The file cannot be read.
    #[error("{path}: this kernel does not describe its types (CONFIG_DEBUG_INFO_BTF)")]
    Unreadable {
        /// The file.
        path: String,
        /// Why.
        source: std::io::Error,
    },
    /// The file is something else.
    #[error("these are not the types of a kernel: {0}")]
    Malformed(&'static str),
    /// A type or field is not there.
    #[error("this kernel has no {0}")]
    Missing(String),
}

/// Kinds of types, as `BTF_KIND_*` numbers them.
mod kind {
    pub(super) const INT: u32 = 1;
    pub(super) const ARRAY: u32 = 3;
    pub(super) const STRUCT: u32 = 4;
    pub(super) const UNION: u32 = 5;
    pub(super) const ENUM: u32 = 6;
    pub(super) const TYPEDEF: u32 = 8;
    pub(super) const VOLATILE: u32 = 9;
    pub(super) const CONST: u32 = 10;
    pub(super) const RESTRICT: u32 = 11;
    pub(super) const FUNC: u32 = 12;
    pub(super) const FUNC_PROTO: u32 = 13;
    pub(super) const VAR: u32 = 14;
    pub(super) const DATASEC: u32 = 15;
    pub(super) const DECL_TAG: u32 = 17;
    pub(super) const TYPE_TAG: u32 = 18;
    pub(super) const ENUM64: u32 = 19;
}

/// Bytes of the part that all types have.
const HEAD: usize = 12;

impl Btf {
    /// Of the running kernel.
    ///
    /// # Errors
    /// [`BtfError::Unreadable`], [`BtfError::Malformed`].
    pub fn of_kernel() -> Result<Self, BtfError> {
        let path = Path::new("/sys/kernel/btf/vmlinux");
        let raw =
            std::fs::read(path).map_err(|source| BtfError::Unreadable { path: path.display().to_string(), source })?;
        Self::parse(raw)
    }

    /// From the bytes of a `.BTF` section.
    ///
    /// # Errors
    /// [`BtfError::Malformed`].
    pub fn parse(raw: Vec<u8>) -> Result<Self, BtfError> {
        let short = BtfError::Malformed("the file ends early");
        if raw.get(..2) != Some(&0xeb9f_u16.to_ne_bytes()) {
            return Err(BtfError::Malformed("another magic number"));
        }
        let mut btf = Self { raw, strings: 0, types: vec![0], named: BTreeMap::new() };
        let word = |btf: &Self, at| btf.word(at).map(|word| word as usize);
        let parts = (word(&btf, 4), word(&btf, 8), word(&btf, 12), word(&btf, 16));
        let (Some(header), Some(from), Some(length), Some(strings)) = parts else { return Err(short) };
        btf.strings = header + strings;
        let (mut at, end) = (header + from, header + from + length);
        while at < end {
            let Some(info) = btf.word(at + 4) else { return Err(short) };
            let members = (info & 0xffff) as usize;
            let kind = info >> 24 & 0x1f;
            btf.types.push(at);
            if [kind::STRUCT, kind::ENUM, kind::FUNC, kind::TYPEDEF].contains(&kind) {
                let id = u32::try_from(btf.types.len() - 1).unwrap_or(u32::MAX);
                let name = btf.name_at(at).to_owned();
                btf.named.entry((kind, name)).or_insert(id);
            }
            at += HEAD
                + match kind {
                    kind::INT | kind::VAR | kind::DECL_TAG => 4,
                    kind::ARRAY => 12,
                    kind::STRUCT | kind::UNION | kind::DATASEC | kind::ENUM64 => 12 * members,
                    kind::ENUM | kind::FUNC_PROTO => 8 * members,
                    _ => 0,
                };
        }
        Ok(btf)
    }

    fn word(&self, at: usize) -> Option<u32> {
        let bytes = self.raw.get(at..at + 4)?;
        Some(u32::from_ne_bytes(bytes.try_into().ok()?))
    }

    fn name_at(&self, at: usize) -> &str {
        let start = self.strings + self.word(at).unwrap_or(0) as usize;
        let text = self.raw.get(start..).unwrap_or_default();
        let end = text.iter().position(|byte| *byte == 0).unwrap_or(0);
        std::str::from_utf8(text.get(..end).unwrap_or_default()).unwrap_or_default()
    }

    fn place(&self, id: u32) -> Option<(usize, u32, usize)> {
        let at = *self.types.get(id as usize)?;
        let info = self.word(at + 4)?;
        Some((at, info >> 24 & 0x1f, (info & 0xffff) as usize))
    }

    /// The type behind names and qualifiers.
    fn strip(&self, mut id: u32) -> u32 {
        let names = [kind::TYPEDEF, kind::VOLATILE, kind::CONST, kind::RESTRICT, kind::TYPE_TAG];
        while let Some((at, kind, _)) = self.place(id) {
            if !names.contains(&kind) {
                break;
            }
            let Some(inner) = self.word(at + 8) else { break };
            id = inner;
        }
        id
    }

    fn find(&self, kind: u32, name: &str) -> Option<u32> {
        self.named.get(&(kind, name.to_owned())).copied()
    }

    /// Offset of a field in bytes, and its type; looked for in nameless structs and unions as well.
    fn member(&self, id: u32, name: &str) -> Option<(u32, u32)> {
        let (at, kind, members) = self.place(self.strip(id))?;
        if kind != kind::STRUCT && kind != kind::UNION {
            return None;
        }
        let has_bit_fields = self.word(at + 4)? >> 31 == 1;
        for i in 0..members {
            let member = at + HEAD + i * 12;
            let (inner, offset) = (self.word(member + 4)?, self.word(member + 8)?);
            let bytes = if has_bit_fields { offset & 0x00ff_ffff } else { offset } / 8;
            let found = self.name_at(member);
            if found == name {
                return Some((bytes, inner));
            }
            if found.is_empty()
                && let Some((more, inner)) = self.member(inner, name)
            {
                return Some((bytes + more, inner));
            }
        }
        None
    }

    /// Bytes before a field of a struct: `offset("net_device", "nd_net.net")`, fields of fields after a dot.
    ///
    /// # Errors
    /// [`BtfError::Missing`].
    pub fn offset(&self, structure: &str, path: &str) -> Result<u32, BtfError> {
        let missing = || BtfError::Missing(format!("{structure}.{path}"));
        let mut id = self.find(kind::STRUCT, structure).ok_or_else(missing)?;
        let mut offset = 0;
        for name in path.split('.') {
            let (more, inner) = self.member(id, name).ok_or_else(missing)?;
            offset += more;
            id = inner;
        }
        Ok(offset)
    }

    /// Bytes of a struct.
    ///
    /// # Errors
    /// [`BtfError::Missing`].
    pub fn size(&self, structure: &str) -> Result<u32, BtfError> {
        let found = self.find(kind::STRUCT, structure).and_then(|id| self.place(id));
        let size = found.and_then(|(at, _, _)| self.word(at + 8));
        size.ok_or_else(|| BtfError::Missing(format!("struct {structure}")))
    }

    /// Names of an enum's values; empty when there is no such enum.
    pub fn enumeration(&self, name: &str) -> BTreeMap<u32, String> {
        let mut names = BTreeMap::new();
        if let Some((at, _, members)) = self.find(kind::ENUM, name).and_then(|id| self.place(id)) {
            for i in 0..members {
                let member = at + HEAD + i * 8;
                if let Some(value) = self.word(member + 4) {
                    names.entry(value).or_insert_with(|| self.name_at(member).to_owned());
                }
            }
        }
        names
    }

    /// Is there a tracepoint of this name whose arguments are typed?
    pub fn has_tracepoint(&self, name: &str) -> bool {
        self.find(kind::TYPEDEF, &format!("btf_trace_{name}")).is_some()
    }

    /// Is there an iterator over this?
    pub fn has_iterator(&self, over: &str) -> bool {
        self.find(kind::FUNC, &format!("bpf_iter_{over}")).is_some()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_running_kernel_is_understood() {
        let btf = Btf::of_kernel().expect("types of this kernel");
        // Fixed by the kernel's own interface: the name is the first field of a device in no version.
        assert!(btf.offset("sk_buff", "head").expect("head") > btf.offset("sk_buff", "dev").expect("dev"));
        assert!(btf.offset("net_device", "nd_net.net").expect("namespace") > 0);
        let reasons = btf.enumeration("skb_drop_reason");
        assert_eq!(reasons.get(&0).map(String::as_str), Some("SKB_NOT_DROPPED_YET"));
        assert!(reasons.values().any(|name| name == "SKB_DROP_REASON_NO_SOCKET"), "{reasons:?}");
        assert!(btf.has_tracepoint("kfree_skb") && !btf.has_tracepoint("no_such_tracepoint"));
        assert!(btf.has_iterator("task") && !btf.has_iterator("nothing"));
        let missing = btf.offset("sk_buff", "nothing").expect_err("no such field").to_string();
        assert_eq!(missing, "this kernel has no sk_buff.nothing");
        assert!(btf.enumeration("nothing").is_empty());
    }

    #[test]
    fn other_files_are_refused() {
        for bytes in [
            &b""[..],
            b"\x7fELF",
            &[0x9f, 0xeb, 1],
            &[0x9f, 0xeb, 1, 0, 24, 0, 0, 0, 0, 0, 0, 0, 9, 0, 0, 0, 9, 0, 0, 0],
        ] {
            assert!(Btf::parse(bytes.to_vec()).is_err(), "{bytes:?}");
        }
    }
}
