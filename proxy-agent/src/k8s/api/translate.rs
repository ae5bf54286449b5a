//! What a watch says, as events.

use std::collections::{BTreeMap, BTreeSet};
use std::marker::PhantomData;
use std::sync::Arc;

use kube::Resource as _;
use kube::core::DeserializeGuard;
use kube::runtime::watcher;
use proxy_core::diagnostic::{Diagnostic, Severity};
use proxy_core::event::Event;
use proxy_core::name::ObjectName;

use super::super::convert::object_name;
use super::super::trouble::Trouble;
use super::kind::Watched;

/// Turns what a watch says into events.
pub(super) struct Translator<K> {
    node_name: Arc<str>,
    /// Names in the listing that is under way.
    listing: Option<Names>,
    /// Findings that the receiver was told.
    findings: BTreeMap<ObjectName, Vec<Diagnostic>>,
    /// The one object of a kind of which there is one, as the receiver was told: the kubelet updates its Node often, and
    /// seldom in what matters here.
    only: Option<Event>,
    /// Objects that have a last good version, of kinds where that matters.
    good: BTreeSet<ObjectName>,
    /// The server has given a full listing.
    pub(super) listed: bool,
    /// The receiver was told that the server does not have the kind.
    pub(super) absent: bool,
    /// The receiver was told that the kind may not be watched.
    forbidden: bool,
    kind: PhantomData<K>,
}

#[derive(Default)]
struct Names {
    ours: BTreeSet<ObjectName>,
    with_findings: BTreeSet<ObjectName>,
}

impl<K: Watched> Translator<K> {
    pub(super) fn new(node_name: Arc<str>) -> Self {
        Self {
            node_name,
            listing: None,
            findings: BTreeMap::new(),
            only: None,
            good: BTreeSet::new(),
            listed: false,
            absent: false,
            forbidden: false,
            kind: PhantomData,
        }
    }

    pub(super) fn translate(&mut self, event: watcher::Event<DeserializeGuard<K>>) -> Vec<Event> {
        let mut events = Vec::new();
        if !matches!(event, watcher::Event::Init) && std::mem::take(&mut self.forbidden) {
            events.push(Event::Diagnostics { object: K::KIND.to_owned(), findings: Vec::new() });
        }
        match event {
            watcher::Event::Init => self.listing = Some(Names::default()),
            watcher::Event::InitApply(object) | watcher::Event::Apply(object) => self.apply(&object, &mut events),
            watcher::Event::Delete(object) => {
                if let Some(name) = object_name(object.meta()) {
                    self.good.remove(&name);
                    self.note(&name, Vec::new(), &mut events);
                    events.extend(K::gone(name));
                }
            }
            watcher::Event::InitDone => self.finish(&mut events),
        }
        events
    }

    fn apply(&mut self, object: &DeserializeGuard<K>, events: &mut Vec<Event>) {
        let Some(name) = object_name(object.meta()) else { return };
        let (outcome, diagnostics, keep) = match &object.0 {
            Ok(object) => {
                let converted = object.convert();
                let keep = converted.outcome.is_some();
                if keep && K::unreadable(&name).is_some() {
                    self.good.insert(name.clone());
                }
                (converted.outcome, converted.diagnostics, keep)
            }
            Err(invalid) => {
                let stand_in = K::unreadable(&name).filter(|_| !self.good.contains(&name));
                let fix = match stand_in {
                    Some(_) => "mend the object; until then it isolates every pod of its namespace",
                    None => "mend the object; its last good version stays in effect",
                };
                let finding = Diagnostic {
                    severity: Severity::Error,
                    object: K::subject(&name),
                    field: String::new(),
                    problem: format!("cannot be read: {}", invalid.error),
                    fix: fix.to_owned(),
                };
                (stand_in, vec![finding], true)
            }
        };
        if let Some(listing) = &mut self.listing {
            if keep {
                listing.ours.insert(name.clone());
            }
            if !diagnostics.is_empty() {
                listing.with_findings.insert(name.clone());
            }
        }
        match outcome {
            Some(event) if self.only.as_ref() == Some(&event) => {}
            Some(event) => {
                if K::only(&self.node_name).is_some() {
                    self.only = Some(event.clone());
                }
                events.push(event);
            }
            // In a listing, its end says so.
            None if !keep && self.listing.is_none() => events.extend(K::gone(name.clone())),
            None => {}
        }
        self.note(&name, diagnostics, events);
    }

    /// The server does not have the kind: as after an empty listing. Told once.
    pub(super) fn none(&mut self) -> Vec<Event> {
        let mut events = Vec::new();
        if !std::mem::replace(&mut self.absent, true) {
            self.listing = None;
            self.finish(&mut events);
            self.listed = false;
            self.absent = true;
        }
        events
    }

    /// The kind may not be watched: told once, where it means something to others than those who read the log.
    pub(super) fn forbidden(&mut self) -> Option<Event> {
        let problem = K::FORBIDDEN.filter(|_| !self.forbidden)?;
        self.forbidden = true;
        let finding = Diagnostic {
            severity: Severity::Error,
            object: K::KIND.to_owned(),
            field: String::new(),
            problem: problem.to_owned(),
            fix: Trouble::Forbidden.fix().to_owned(),
        };
        Some(Event::Diagnostics { object: K::KIND.to_owned(), findings: vec![finding] })
    }

    fn finish(&mut self, events: &mut Vec<Event>) {
        (self.listed, self.absent) = (true, false);
        let Names { ours, with_findings } = self.listing.take().unwrap_or_default();
        let mended: Vec<ObjectName> =
            self.findings.keys().filter(|name| !with_findings.contains(*name)).cloned().collect();
        for name in mended {
            self.note(&name, Vec::new(), events);
        }
        self.good.retain(|name| ours.contains(name));
        if self.only.is_none()
            && let Some(only) = K::only(&self.node_name)
        {
            self.only = Some(only.clone());
            events.push(only);
        }
        events.push(K::listed(ours));
    }

    /// Tells the findings about an object, if they are news.
    fn note(&mut self, name: &ObjectName, findings: Vec<Diagnostic>, events: &mut Vec<Event>) {
        if self.findings.get(name).map_or(&[][..], Vec::as_slice) == findings {
            return;
        }
        events.push(Event::Diagnostics { object: K::subject(name), findings: findings.clone() });
        if findings.is_empty() {
            self.findings.remove(name);
        } else {
            self.findings.insert(name.clone(), findings);
        }
    }
}
