//! The loop of NetworkPolicy without its I/O: changes of objects in, operations out.
//!
//! ```text
//!   start ─▶ load: what the maps hold goes on to hold
//!     policies listed, none            nothing is enforced, nothing is written
//!     policies, pods, namespaces       commit ─▶ operations in their order ─▶ after the switch: slots as told
//!   an operation fails                 the same again after a pause; after a few times: load, and commit anew
//! ```

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use proxy_abi::policy::{BlockEntry, PodDigest, SlotWord};

use super::dataplane::PolicyDataplane;
use super::digest;
use super::engine::{Engine, Limits};
use super::spec::Change;
use super::tables::{Op, PolicyTables};
use crate::name::ObjectName;

/// What the reconciler lives by; times in milliseconds.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PolicySettings {
    /// This node.
    pub node: Arc<str>,
    /// Room in the maps.
    pub limits: Limits,
    /// How long a number that the maps have forgotten rests before it is used again: nobody may name it any more.
    pub grace: u64,
    /// Pause after the first failure; doubled with each further one.
    pub first_retry: u64,
    /// The longest pause.
    pub last_retry: u64,
    /// After so many failures in a row the maps are read again, and what is to be done is worked out anew.
    pub patience: u32,
}

impl PolicySettings {
    /// With everything but the node by default.
    pub fn new(node: impl Into<Arc<str>>) -> Self {
        Self {
            node: node.into(),
            limits: Limits::default(),
            grace: 500,
            first_retry: 50,
            last_retry: 10_000,
            patience: 3,
        }
    }
}

/// What a source has now, by name. What it does not name is gone.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum PolicyListing {
    /// NetworkPolicies.
    Policies(BTreeSet<ObjectName>),
    /// Pods.
    Pods(BTreeSet<ObjectName>),
    /// Namespaces.
    Namespaces(BTreeSet<Arc<str>>),
}

/// Kinds of objects that NetworkPolicy needs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum PolicySource {
    /// NetworkPolicies.
    Policies,
    /// Pods.
    Pods,
    /// Namespaces.
    Namespaces,
}

impl PolicySource {
    /// All of them.
    pub const ALL: [Self; 3] = [Self::Policies, Self::Pods, Self::Namespaces];
}

/// What one [`PolicyReconciler::sync`] did.
#[derive(Debug)]
pub struct PolicyReport<E> {
    /// Operations that succeeded.
    pub applied: usize,
    /// The operation that failed, with its error. It is tried again before all others.
    pub failed: Option<(Op, E)>,
    /// Why the maps could not be read; nothing else was done then.
    pub load_error: Option<E>,
    /// Operations that are left.
    pub pending: usize,
    /// When to call again if no change comes before; `None` = nothing is left to do.
    pub retry_at: Option<u64>,
    /// [`PolicyReconciler::slot`] or [`PolicyReconciler::regime`] give other answers than before this call.
    pub slots_changed: bool,
    /// The policy of the maps is another one than before this call.
    pub switched: bool,
}

/// How far policies reach on this node.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Regime {
    /// There are none.
    #[default]
    Off,
    /// All that there are, are audited: flows are judged, and nothing is refused.
    Audited,
    /// They are enforced.
    Enforced,
}

/// Commits of one call, at most: room that one makes is used by the next.
const COMMITS: usize = 8;

/// What is known of the maps.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Knowledge {
    /// Nothing: they are read before anything else is done.
    None,
    /// What the engine takes them for, but for what is pending.
    Certain,
}

/// Operations on their way into the maps.
#[derive(Clone, Debug, Default)]
struct Pending {
    ops: Vec<Op>,
    done: usize,
    /// After so many of them the new policy counts.
    switch: usize,
}

/// What the maps are certain to hold.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct Realised {
    /// UID → slot. Empty as long as `found` counts.
    slots: BTreeMap<Arc<str>, u16>,
    /// Slots that were found in the maps at the start, until the first commit is done.
    found: BTreeMap<PodDigest, u16>,
    regime: Regime,
    epoch: u32,
}

/// Owns the engine, and knows what the maps hold of it.
#[derive(Clone, Debug)]
pub struct PolicyReconciler {
    settings: PolicySettings,
    engine: Engine,
    listed: BTreeSet<PolicySource>,
    knowledge: Knowledge,
    /// Something of ours is in the maps: from now on they are kept up to date, whether there are policies or not.
    begun: bool,
    pending: Pending,
    realised: Realised,
    failures: u32,
    retry_at: Option<u64>,
}

impl PolicyReconciler {
    /// Knows nothing yet.
    pub fn new(settings: PolicySettings) -> Self {
        let engine = Engine::new(Arc::clone(&settings.node), settings.limits, PolicyTables::default());
        Self {
            settings,
            engine,
            listed: BTreeSet::new(),
            knowledge: Knowledge::None,
            begun: false,
            pending: Pending::default(),
            realised: Realised::default(),
            failures: 0,
            retry_at: None,
        }
    }

    /// Takes a change in: one object is as given, or gone.
    pub fn handle(&mut self, change: Change) {
        self.engine.apply(change);
    }

    /// Takes a listing in: what it does not name is gone, and its source is known.
    pub fn listed(&mut self, listing: PolicyListing) {
        let world = self.engine.world();
        let (source, gone): (_, Vec<Change>) = match listing {
            PolicyListing::Policies(names) => {
                let gone = world.policy_names().filter(|name| !names.contains(name));
                (PolicySource::Policies, gone.map(Change::PolicyGone).collect())
            }
            PolicyListing::Pods(names) => {
                let gone = world.pod_names().filter(|name| !names.contains(name));
                (PolicySource::Pods, gone.map(Change::PodGone).collect())
            }
            PolicyListing::Namespaces(names) => {
                let known = world.namespaces().filter(|(_, object)| object.is_some()).map(|(name, _)| name);
                let gone = known.filter(|name| !names.contains(*name));
                (PolicySource::Namespaces, gone.cloned().map(Change::NamespaceGone).collect())
            }
        };
        for change in gone {
            self.engine.apply(change);
        }
        self.listed.insert(source);
    }

    /// Reads the maps again before the next operation: somebody else may have written to them.
    pub fn reload(&mut self) {
        self.knowledge = Knowledge::None;
    }

    /// Brings the maps nearer to what the objects mean. `now` is in milliseconds and never goes back.
    pub fn sync<D: PolicyDataplane>(&mut self, dataplane: &mut D, now: u64) -> PolicyReport<D::Error> {
        let mut report = PolicyReport {
            applied: 0,
            failed: None,
            load_error: None,
            pending: 0,
            retry_at: None,
            slots_changed: false,
            switched: false,
        };
        if let Some(at) = self.retry_at.filter(|at| now < *at) {
            report.retry_at = Some(at);
            report.pending = self.pending.left();
            return report;
        }
        let before = self.realised.clone();
        self.advance(dataplane, now, &mut report);
        report.pending = self.pending.left();
        report.retry_at = self.retry_at.or_else(|| self.engine.next_release(self.settings.grace));
        report.switched = before.epoch != self.realised.epoch;
        report.slots_changed = before.slots != self.realised.slots
            || before.found != self.realised.found
            || before.regime != self.realised.regime;
        report
    }

    fn advance<D: PolicyDataplane>(&mut self, dataplane: &mut D, now: u64, report: &mut PolicyReport<D::Error>) {
        self.retry_at = None;
        if self.knowledge == Knowledge::None {
            match dataplane.load_policy().and_then(|tables| Ok((tables, dataplane.enforced()?))) {
                Ok((tables, enforced)) => self.adopt(tables, enforced),
                Err(error) => {
                    report.load_error = Some(error);
                    self.put_off(now);
                    return;
                }
            }
        }
        if !self.listed.contains(&PolicySource::Policies) {
            return;
        }
        if !self.begun && !self.engine.world().has_policies() {
            // Whatever the maps hold, nobody asks them.
            self.realised = Realised { epoch: self.realised.epoch, ..Realised::default() };
            return;
        }
        if !self.begun && !self.realised.found.is_empty() {
            // What the maps hold is that of policies which are known now.
            self.realised.regime = self.wanted();
        }
        if self.missing().next().is_some() {
            return;
        }
        self.begun = true;
        for _ in 0..COMMITS {
            if self.pending.left() == 0 {
                let transition = self.engine.commit_at(now, self.settings.grace);
                let ops: Vec<Op> = transition.ops().cloned().collect();
                let switch = transition.prepare.len() + usize::from(transition.switch.is_some());
                self.pending = Pending { ops, done: 0, switch };
                if switch == 0 {
                    self.realise();
                }
                if self.pending.left() == 0 {
                    return;
                }
            }
            let (done, error) = dataplane.apply_policies(self.pending.rest());
            let was = self.pending.done;
            self.pending.done = (was + done).min(self.pending.ops.len());
            report.applied += done;
            if was < self.pending.switch && self.pending.done >= self.pending.switch {
                self.realise();
            }
            if done > 0 {
                self.failures = 0;
            }
            if let Some(error) = error {
                report.failed = self.pending.rest().first().cloned().map(|op| (op, error));
                self.put_off(now);
                return;
            }
            if done == 0 {
                // A dataplane that does nothing and says nothing: as good as a failure.
                self.put_off(now);
                return;
            }
        }
        if self.pending.left() > 0 || self.engine.is_dirty() {
            self.retry_at = Some(now.saturating_add(self.settings.first_retry));
        }
    }

    fn adopt(&mut self, tables: PolicyTables, enforced: bool) {
        if !self.begun {
            let counts = |slot: &u16| {
                let word = tables.slots.get(&SlotWord::index(*slot, tables.epoch));
                word.is_some_and(|word| word.block != 0)
            };
            let slots = tables.pods.iter().filter_map(|(slot, pod)| Some((*pod, u16::try_from(*slot).ok()?)));
            let found: BTreeMap<_, _> = slots.filter(|(_, slot)| counts(slot)).collect();
            // A policy that is enforced may be about pods of other nodes alone: the blocks of this one do not show it then,
            // its interfaces do.
            let regime = match (enforced, found.is_empty()) {
                (true, _) => Regime::Enforced,
                (false, true) => Regime::Off,
                (false, false) => held(&tables),
            };
            self.realised = Realised { regime, found, epoch: tables.epoch, ..Realised::default() };
        }
        self.engine.adopt(tables);
        self.pending = Pending::default();
        self.knowledge = Knowledge::Certain;
    }

    /// The policy that was worked out last counts.
    fn realise(&mut self) {
        let slots = self.engine.subjects().values().map(|subject| (Arc::clone(&subject.uid), subject.slot));
        self.realised = Realised {
            slots: slots.collect(),
            found: BTreeMap::new(),
            regime: self.wanted(),
            epoch: self.engine.tables().epoch,
        };
    }

    fn wanted(&self) -> Regime {
        let world = self.engine.world();
        match (world.enforces(), world.has_policies()) {
            (true, _) => Regime::Enforced,
            (false, true) => Regime::Audited,
            (false, false) => Regime::Off,
        }
    }

    fn put_off(&mut self, now: u64) {
        let factor = 1_u64.checked_shl(self.failures).unwrap_or(u64::MAX);
        let pause = self.settings.first_retry.saturating_mul(factor).min(self.settings.last_retry);
        self.failures = self.failures.saturating_add(1);
        self.retry_at = Some(now.saturating_add(pause));
        if self.failures.is_multiple_of(self.settings.patience.max(1)) {
            self.knowledge = Knowledge::None;
        }
    }

    /// How far the policies of the maps reach.
    pub const fn regime(&self) -> Regime {
        self.realised.regime
    }

    /// Are pods isolated? Policies are enforced and the maps hold them: an interface whose pod has no slot is held.
    pub const fn enforces(&self) -> bool {
        matches!(self.realised.regime, Regime::Enforced)
    }

    /// The slot of a pod of this node, once the maps hold its policy.
    pub fn slot(&self, uid: &str) -> Option<u16> {
        let found = || self.realised.found.get(&PodDigest { digest: digest::of(&uid) });
        self.realised.slots.get(uid).or_else(found).copied()
    }

    /// The epoch of the policy that the maps are certain to hold.
    pub const fn epoch(&self) -> u32 {
        self.realised.epoch
    }

    /// Sources that have not been listed yet.
    pub fn missing(&self) -> impl Iterator<Item = PolicySource> + '_ {
        PolicySource::ALL.into_iter().filter(|source| !self.listed.contains(source))
    }

    /// Nothing is left to be done.
    pub fn settled(&self) -> bool {
        let idle = !self.begun && !self.engine.world().has_policies();
        let known = self.listed.contains(&PolicySource::Policies) && (idle || self.missing().next().is_none());
        known && self.knowledge == Knowledge::Certain && self.pending.left() == 0 && (idle || !self.engine.is_dirty())
    }

    /// The engine: objects, slots, explanations, diagnostics.
    pub const fn engine(&self) -> &Engine {
        &self.engine
    }
}

/// What maps show of it that were found at the start: audits alone, where no block isolates and one has a shadow.
fn held(tables: &PolicyTables) -> Regime {
    let words = tables.slots.iter().filter(|(index, _)| *index & 1 == tables.epoch & 1);
    let blocks: BTreeSet<u32> = words.map(|(_, word)| word.block).collect();
    let blocks = || blocks.iter().filter_map(|id| tables.blocks.get(id));
    let enforces = |block: &BlockEntry| BlockEntry { shadow: 0, ..*block } != BlockEntry::OPEN;
    if blocks().any(|block| block.shadow != 0) && !blocks().any(enforces) { Regime::Audited } else { Regime::Enforced }
}

impl Pending {
    const fn left(&self) -> usize {
        self.ops.len().saturating_sub(self.done)
    }

    fn rest(&self) -> &[Op] {
        self.ops.get(self.done..).unwrap_or_default()
    }
}
