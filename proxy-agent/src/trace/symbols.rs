//! Names of the kernel's code addresses: from `/proc/kallsyms`, or where it hides them, asked one by one.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};

use crate::dataplane::symbol::SymbolNames;

/// Functions by their first address.
#[derive(Clone, Debug, Default)]
pub struct Symbols {
    by_address: BTreeMap<u64, String>,
    /// Where there are no addresses to read.
    asked: Option<Arc<Mutex<Asked>>>,
}

/// A program that is asked, and what it said.
#[derive(Debug)]
struct Asked {
    program: SymbolNames,
    answers: BTreeMap<u64, Option<(String, u64)>>,
}

impl Symbols {
    /// Of the running kernel. Nothing is known when the kernel hides its addresses and refuses the program that asks.
    pub fn of_kernel() -> Self {
        let read = Self::parse(&std::fs::read_to_string("/proc/kallsyms").unwrap_or_default());
        if !read.by_address.is_empty() {
            return read;
        }
        let asked = SymbolNames::open().ok().map(|program| Asked { program, answers: BTreeMap::new() });
        Self { asked: asked.map(Mutex::new).map(Arc::new), ..read }
    }

    /// From lines of address, kind and name.
    pub fn parse(text: &str) -> Self {
        let mut by_address = BTreeMap::new();
        for line in text.lines() {
            let mut words = line.split_whitespace();
            let (Some(address), Some(kind), Some(name)) = (words.next(), words.next(), words.next()) else { continue };
            if let Ok(address) = u64::from_str_radix(address, 16)
                && address != 0
                && ["t", "T", "w", "W"].contains(&kind)
            {
                by_address.entry(address).or_insert_with(|| name.to_owned());
            }
        }
        Self { by_address, asked: None }
    }

    /// Nothing is known, and nobody can be asked.
    pub fn is_empty(&self) -> bool {
        self.by_address.is_empty() && self.asked.is_none()
    }

    /// Are names asked for one by one?
    pub const fn is_asking(&self) -> bool {
        self.asked.is_some()
    }

    /// The function that an address lies in, and how far.
    pub fn find(&self, address: u64) -> Option<(String, u64)> {
        if let Some(asked) = &self.asked {
            let mut asked = asked.lock().unwrap_or_else(PoisonError::into_inner);
            let Asked { program, answers } = &mut *asked;
            // One that cannot be asked now stays a number.
            return answers.entry(address).or_insert_with(|| program.name(address).ok().flatten()).clone();
        }
        let (start, name) = self.by_address.range(..=address).next_back()?;
        Some((name.clone(), address - start))
    }

    /// The function that an address lies in, without what the compiler appended.
    pub fn function(&self, address: u64) -> String {
        self.find(address)
            .map_or_else(|| format!("{address:#x}"), |(name, _)| name.split('.').next().unwrap_or(&name).to_owned())
    }

    /// Function and distance: `nf_hook_slow+0x7d`.
    pub fn place(&self, address: u64) -> String {
        self.find(address).map_or_else(|| format!("{address:#x}"), |(name, far)| format!("{name}+{far:#x}"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_are_named() {
        let symbols = Symbols::parse(
            "0000000000000000 T hidden\nffff000000001000 T ip_rcv\nffff000000001100 t ip_fragment.constprop.0\n\
             ffff000000001080 d data\n",
        );
        let found = [0xffff_0000_0000_1000, 0xffff_0000_0000_107d, 0xffff_0000_0000_1180, 5]
            .map(|address| (symbols.place(address), symbols.function(address)));
        let expected = [
            ("ip_rcv+0x0", "ip_rcv"),
            ("ip_rcv+0x7d", "ip_rcv"),
            ("ip_fragment.constprop.0+0x80", "ip_fragment"),
            ("0x5", "0x5"),
        ];
        assert_eq!(found, expected.map(|(place, function)| (place.to_owned(), function.to_owned())));
        assert!(Symbols::parse("").is_empty());
    }
}
