//! `trace hooks`: who may touch packets, by namespace and hook.

use serde_json::{Value, json};

use super::hooks::{Family, Inventory, Namespace};
use super::kernel::Kernel;
use super::symbols::Symbols;
use super::{TraceError, layout, own_namespace};
use crate::dataplane::probes::{Probes, Probing};

/// Which namespaces.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum Which {
    /// Of the command itself: the node's.
    #[default]
    Own,
    /// All that a task lives in.
    All,
    /// By inode number.
    Number(u32),
}

impl std::str::FromStr for Which {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "own" => Ok(Self::Own),
            "all" => Ok(Self::All),
            number => {
                number.parse().map(Self::Number).map_err(|_| format!("`{text}`: expected own, all or an inode number"))
            }
        }
    }
}

/// The probes that watch nothing, and what the kernel calls things.
///
/// # Errors
/// [`TraceError::Types`], [`TraceError::Probes`].
pub fn open() -> Result<(Probes, Kernel), TraceError> {
    let btf = super::btf::Btf::of_kernel()?;
    let (offsets, _) = layout::offsets(&btf)?;
    let kernel = Kernel::new(&btf, Symbols::of_kernel());
    Ok((Probes::open(None, &offsets, 4096, Probing::Hooks)?, kernel))
}

/// What is registered, as the kernel says.
///
/// # Errors
/// [`TraceError::Probes`] without iterators.
pub fn read() -> Result<Inventory, TraceError> {
    let (mut probes, kernel) = open()?;
    Ok(Inventory::new(&probes.hooks()?, &kernel.symbols))
}

/// The chosen namespaces; of a number that nobody lives in nothing.
pub fn choose(inventory: &Inventory, which: &Which) -> Vec<(u32, Namespace)> {
    let own = own_namespace();
    let wanted = |number: u32| match which {
        Which::Own => number == own,
        Which::All => true,
        Which::Number(wanted) => number == *wanted,
    };
    inventory
        .0
        .iter()
        .filter(|(number, _)| wanted(**number))
        .map(|(number, namespace)| (*number, namespace.clone()))
        .collect()
}

/// For people.
pub fn text(namespaces: &[(u32, Namespace)]) -> String {
    let mut lines = Vec::new();
    for (number, namespace) in namespaces {
        lines.push(format!("namespace {number}, in which task {} lives", namespace.pid));
        let working = namespace.hooks.values().flatten().filter(|entry| !entry.is_passing()).count();
        if working == 0 {
            lines.push("  no hook has an entry that looks at packets: netfilter touches none here".to_owned());
        }
        for ((family, hook), entries) in &namespace.hooks {
            for entry in entries {
                let passing =
                    if entry.is_passing() { "  (br_netfilter's; passes on while bridge-nf-call-* is 0)" } else { "" };
                let chain = entry.chain.as_ref().map(|chain| format!("  nft {chain}")).unwrap_or_default();
                lines.push(format!(
                    "  {:<7}{:<5}{:>7}  {}{chain}{passing}",
                    family.name(),
                    family.hook(*hook),
                    entry.priority,
                    entry.function
                ));
            }
        }
    }
    lines.join("\n")
}

/// For programs.
pub fn json(namespaces: &[(u32, Namespace)]) -> Value {
    let all: Vec<Value> = namespaces
        .iter()
        .map(|(number, namespace)| {
            let hooks: Vec<Value> = namespace
                .hooks
                .iter()
                .flat_map(|((family, hook), entries)| entries.iter().map(move |entry| row(*family, *hook, entry)))
                .collect();
            json!({ "netns": number, "pid": namespace.pid, "hooks": hooks })
        })
        .collect();
    json!({ "version": 1, "items": all })
}

fn row(family: Family, hook: u32, entry: &super::hooks::HookEntry) -> Value {
    json!({
        "family": family.name(), "hook": family.hook(hook), "priority": entry.priority, "function": entry.function,
        "chain": entry.chain, "passing": entry.is_passing(),
    })
}
