//! The probes while they follow packets, and what they tell, put together to journeys.

use std::collections::BTreeMap;

use proxy_abi::trace::{TraceEnd, TraceEvent, TraceFilter, TraceRow, count};

use super::hooks::{Hooks, Inventory};
use super::journey::{Assembly, Decision, Journey, Sight, Step, id_of, own_frames};
use super::kernel::Kernel;
use super::names::Names;
use super::{TraceError, layout, monotonic, own_namespace};
use crate::dataplane::pins::Pins;
use crate::dataplane::probes::{Probes, Probing, Told};

/// The programs of the dataplane stop to tell so long after the reader's last word.
const HEARTBEAT: u64 = 3_000_000_000;

/// Follows every packet of the reader's namespace.
pub const EVERY: TraceFilter = TraceFilter {
    netns: 0,
    flags: 0,
    ifindex: 0,
    proto: 0,
    rows: 0,
    sample: 0,
    rate: 0,
    begun: 0,
    second: 0,
    most: 0,
    total: 0,
    first_drop: 0,
    ends: 0,
};

/// Probes with everything that is needed to understand them.
#[derive(Debug)]
pub struct Reader {
    /// What the kernel calls things.
    pub kernel: Kernel,
    /// What is registered at netfilter's hooks of this namespace; `None` = not known.
    pub hooks: Option<Hooks>,
    /// The probes.
    pub probes: Probes,
    home: u32,
    assembly: Assembly,
    stacks: BTreeMap<u32, Vec<String>>,
}

/// What was lost, by name, the last of them by request.
pub type Lost = [(&'static str, u64); 5];

impl Reader {
    /// Loads the probes, with a buffer of so many mebibytes. Nothing is followed yet.
    ///
    /// # Errors
    /// [`TraceError::Types`], [`TraceError::Probes`]: also while another reader runs in this network namespace.
    pub fn open(pins: Option<&Pins>, mebibytes: u32) -> Result<Self, TraceError> {
        let btf = super::btf::Btf::of_kernel()?;
        let (offsets, _) = layout::offsets(&btf)?;
        let kernel = Kernel::new(&btf, super::symbols::Symbols::of_kernel());
        drop(btf);
        let bytes = mebibytes.clamp(1, 1024).next_power_of_two() << 20;
        let mut probes = Probes::open(pins, &offsets, bytes, Probing::Packets)?;
        let home = own_namespace();
        let hooks = probes.hooks().ok().map(|rows| {
            let mut inventory = Inventory::new(&rows, &kernel.symbols);
            inventory.0.remove(&home).unwrap_or_default().hooks
        });
        Ok(Self { kernel, hooks, probes, home, assembly: Assembly::default(), stacks: BTreeMap::new() })
    }

    /// Begins to follow what both the filter and one of the rows let through, and joins the ends. What the filter says of
    /// namespaces, rows and drops is filled in.
    ///
    /// # Errors
    /// [`TraceError::Probes`].
    pub fn follow(
        &mut self,
        filter: &TraceFilter,
        ends: &[(TraceEnd, u32)],
        rows: &[TraceRow],
    ) -> Result<(), TraceError> {
        let filter = TraceFilter {
            netns: self.home,
            // Stacks tell what br_netfilter leaves no other trace of.
            flags: filter.flags | TraceFilter::ACTIVE | TraceFilter::STACKS,
            rows: u32::try_from(rows.len()).unwrap_or(0),
            first_drop: self.kernel.first_drop(),
            ..*filter
        };
        self.probes.tell_until(monotonic() + HEARTBEAT)?;
        Ok(self.probes.follow(&filter, ends, rows)?)
    }

    /// Takes in what the probes have told since.
    pub fn read(&mut self, names: &Names, now: u64) {
        let Self { probes, assembly, kernel, stacks, home, .. } = self;
        let mut told = Vec::new();
        probes.read(&mut |each| told.push(each));
        for each in told {
            let id = id_of(&each);
            let step = match each {
                Told::Decision(decision) => Step::Decision(Decision::new(decision, names)),
                Told::Event(event) => {
                    let mut sight = Sight::new(&event, names, *home, kernel);
                    if event.stack != TraceEvent::NO_STACK {
                        let functions = stacks.entry(event.stack).or_insert_with(|| {
                            let all = probes.stack(event.stack);
                            own_frames(all.iter().map(|address| kernel.symbols.function(*address)))
                        });
                        sight.stack.clone_from(functions);
                    }
                    Step::Sight(sight)
                }
            };
            assembly.add(id, step, now);
        }
    }

    /// Takes out the journeys of which nothing was seen for `quiet` nanoseconds, in the order of beginning.
    pub fn take_quiet(&mut self, now: u64, quiet: u64) -> Vec<Journey> {
        self.assembly.take_quiet(now, quiet)
    }

    /// Says that somebody still reads, and forgets packets that have long gone; once a second.
    ///
    /// # Errors
    /// [`TraceError::Probes`].
    pub fn keep(&mut self, now: u64) -> Result<(), TraceError> {
        self.probes.tell_until(now + HEARTBEAT)?;
        Ok(self.probes.forget(now)?)
    }

    /// What was lost since [`Reader::open`], and whether what was seen may therefore be incomplete.
    ///
    /// # Errors
    /// [`TraceError::Probes`].
    pub fn lost(&mut self) -> Result<(Lost, bool), TraceError> {
        let counts = self.probes.counts()?;
        let counted = |which: u32| counts.get(which as usize).copied().unwrap_or(0);
        let lost = [
            ("ringbuf", counted(count::RING_FULL)),
            ("decisions", self.probes.lost_decisions()?),
            ("recursion", self.probes.cost().misses),
            ("map_full", counted(count::TABLE_FULL)),
            ("rate_limited", counted(count::RATE_LIMITED)),
        ];
        // That some were left out was asked for.
        let missing = lost.iter().take(4).any(|(_, count)| *count > 0);
        Ok((lost, missing))
    }
}
