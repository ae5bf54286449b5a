//! What a folder of manifests says, and how that changes: state without a watch.
//!
//! Each file holds entries; the first file in path order that can read an object decides what it is. A file or a
//! document that cannot be read leaves what it said before; a file that is gone takes its objects with it. What cannot be
//! read when the agent starts has said nothing before: then `Unreadable` comes before the first `Listed`, until all of it
//! can be read or is gone.
//!
//! Pods and Namespaces are told of from when there is a NetworkPolicy, or Pods always, where that is asked for. A NetworkPolicy that is named and has never been
//! readable isolates its namespace: nobody knows what it was going to say.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, File, Metadata};
use std::io::{self, Read};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use proxy_core::diagnostic::{Diagnostic, Severity};
use proxy_core::event::{Event, Listing, Node, Source};
use proxy_core::name::ObjectName;
use proxy_core::netpol::reconcile::PolicyListing;
use proxy_core::netpol::spec::{Change, PolicySpec};

use super::PodWatch;
use super::convert::unreadable_policy;
use super::manifest::{self, Found, Kind, Object, ObjectKey};

/// A folder as last read.
pub(super) struct Folder {
    root: PathBuf,
    node_name: Arc<str>,
    files: BTreeMap<PathBuf, FileState>,
    /// Which entries describe an object: file and index in it.
    holders: BTreeMap<ObjectKey, BTreeSet<(PathBuf, usize)>>,
    /// What the receiver was told of each object that has a holder.
    published: BTreeMap<ObjectKey, Published>,
    /// What the receiver was told of each file or folder.
    reported: BTreeMap<String, Vec<Diagnostic>>,
    /// Folders that the last scan could not read.
    unreadable: BTreeMap<PathBuf, Diagnostic>,
    listed: bool,
    /// There has been a NetworkPolicy.
    policies: bool,
    pods: PodWatch,
    /// Files that could not be read in full when the agent started, and cannot yet; the receiver was told that there are
    /// some. What breaks later has a last good version, or was never in the maps.
    lacking: BTreeSet<PathBuf>,
}

/// A place of which the watch must hear.
pub(super) enum Place<'a> {
    /// A folder: entries come and go in it.
    Folder(&'a Path),
    /// A file that is reached by a symbolic link: its changes do not show in the folder.
    LinkedFile(&'a Path),
}

struct FileState {
    stamp: Option<Stamp>,
    entries: Vec<Entry>,
    /// Findings that belong to no object.
    problems: Vec<Diagnostic>,
}

#[derive(Clone)]
struct Entry {
    key: ObjectKey,
    /// Whether it was ever read: else it does not take part.
    readable: bool,
    outcome: Option<Arc<Object>>,
    findings: Vec<Diagnostic>,
}

#[derive(Default, PartialEq)]
struct Published {
    outcome: Option<Arc<Object>>,
    findings: Vec<Diagnostic>,
}

/// Tells one content of a path from another, as far as that can be told without reading it.
#[derive(Clone, Copy, PartialEq, Eq)]
struct Stamp {
    device: u64,
    inode: u64,
    size: u64,
    modified: (i64, i64),
    changed: (i64, i64),
}

impl Stamp {
    fn of(metadata: &Metadata) -> Self {
        Self {
            device: metadata.dev(),
            inode: metadata.ino(),
            size: metadata.size(),
            modified: (metadata.mtime(), metadata.mtime_nsec()),
            changed: (metadata.ctime(), metadata.ctime_nsec()),
        }
    }
}

/// Whether a file's name says that it is a manifest. Hidden names are editors' and volumes' own.
pub(super) fn is_manifest(path: &Path) -> bool {
    let extension = path.extension().and_then(|extension| extension.to_str());
    !is_hidden(path) && extension.is_some_and(|extension| ["yaml", "yml", "json"].contains(&extension))
}

/// Is it a kind that says nothing of Services?
const fn of_policies(kind: Kind) -> bool {
    matches!(kind, Kind::NetworkPolicy) || kind.is_for_policies()
}

fn is_hidden(path: &Path) -> bool {
    path.file_name().is_none_or(|name| name.as_encoded_bytes().starts_with(b"."))
}

/// The NetworkPolicies of a folder, and what is wrong with its manifests.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Manifests {
    /// Policies, as written.
    pub policies: Vec<PolicySpec>,
    /// What cannot be read, of any kind.
    pub problems: Vec<Diagnostic>,
}

/// Reads a folder once.
pub fn read_policies(root: &Path) -> Manifests {
    let mut read = Manifests::default();
    for event in Folder::new(root.to_owned(), "".into(), PodWatch::default()).scan(true, &mut |_| {}) {
        match event {
            Event::NetworkPolicy(Change::Policy(policy)) => read.policies.push(policy),
            Event::Diagnostics { findings, .. } => read.problems.extend(findings),
            _ => {}
        }
    }
    read
}

// === impl Folder ===

impl Folder {
    pub(super) fn new(root: PathBuf, node_name: Arc<str>, pods: PodWatch) -> Self {
        Self {
            root,
            node_name,
            files: BTreeMap::new(),
            holders: BTreeMap::new(),
            published: BTreeMap::new(),
            reported: BTreeMap::new(),
            unreadable: BTreeMap::new(),
            listed: false,
            policies: false,
            pods,
            lacking: BTreeSet::new(),
        }
    }

    /// Walks the whole folder, reads what changed (everything with `force`), and returns what follows from it. `watch`
    /// is called for each folder before it is read, so that no change falls between. The first scan that saw
    /// everything ends in `Listed` for each source.
    pub(super) fn scan(&mut self, force: bool, watch: &mut dyn FnMut(Place<'_>)) -> Vec<Event> {
        let mut walk = Walk { found: BTreeMap::new(), unreadable: BTreeMap::new(), visited: BTreeSet::new(), watch };
        walk.enter(&self.root);
        let Walk { found, unreadable, .. } = walk;
        let gone = |path: &Path| !found.contains_key(path) && !unreadable.keys().any(|lost| path.starts_with(lost));
        let mut dirty: BTreeSet<PathBuf> = self.files.keys().filter(|path| gone(path)).cloned().collect();
        dirty.extend(found.into_iter().filter_map(|(path, stamp)| {
            let known = self.files.get(&path).and_then(|file| file.stamp);
            (force || known != Some(stamp)).then_some(path)
        }));
        self.unreadable = unreadable
            .into_iter()
            .map(|(path, error)| {
                let object = self.label(&path);
                let finding = Diagnostic {
                    severity: Severity::Error,
                    object,
                    field: String::new(),
                    problem: format!("cannot be read: {error}; what it held before stays in effect"),
                    fix: "make the folder exist and readable for the agent".to_owned(),
                };
                (path, finding)
            })
            .collect();
        let mut events = self.refresh(&dirty);
        if self.unreadable.is_empty() && !self.listed {
            self.listed = true;
            let lacking = self.files.keys().filter(|path| self.lacks(path)).cloned().collect();
            self.lacking = lacking;
            if !self.lacking.is_empty() {
                events.push(Event::Unreadable(true));
            }
            events.extend(self.listing());
        }
        events
    }

    /// Is there something in a file that has not been read in any version, and may be of Services?
    fn lacks(&self, path: &Path) -> bool {
        let unread = |entry: &Entry| !entry.readable && !of_policies(entry.key.kind);
        let lacks = |file: &FileState| !file.problems.is_empty() || file.entries.iter().any(unread);
        self.files.get(path).is_some_and(lacks)
    }

    /// Whether the last scan saw everything.
    pub(super) fn is_complete(&self) -> bool {
        self.unreadable.is_empty()
    }

    /// Reads the given files again, whatever their stamps say, and returns what follows from it.
    pub(super) fn refresh(&mut self, paths: &BTreeSet<PathBuf>) -> Vec<Event> {
        let mut touched = BTreeSet::new();
        for path in paths {
            let before = self.files.remove(path);
            for (at, entry) in before.iter().flat_map(|file| file.entries.iter().enumerate()) {
                touched.insert(entry.key.clone());
                if let Some(holders) = self.holders.get_mut(&entry.key) {
                    holders.remove(&(path.clone(), at));
                    if holders.is_empty() {
                        self.holders.remove(&entry.key);
                    }
                }
            }
            let Some(file) = self.read(path, before) else { continue };
            for (at, entry) in file.entries.iter().enumerate() {
                touched.insert(entry.key.clone());
                self.holders.entry(entry.key.clone()).or_default().insert((path.clone(), at));
            }
            self.files.insert(path.clone(), file);
        }
        let mut events = Vec::new();
        for key in touched {
            self.settle(&key, &mut events);
        }
        self.begin_policies(&mut events);
        self.report(&mut events);
        if !self.lacking.is_empty() {
            let mut lacking = std::mem::take(&mut self.lacking);
            lacking.retain(|path| self.lacks(path));
            self.lacking = lacking;
            if self.lacking.is_empty() {
                events.push(Event::Unreadable(false));
            }
        }
        events
    }

    /// `None` when the file is gone.
    fn read(&self, path: &Path, before: Option<FileState>) -> Option<FileState> {
        let label = self.label(path);
        let json = path.extension().is_some_and(|extension| extension == "json");
        let (stamp, found) = match load(path) {
            Ok(Some((stamp, bytes))) => (Some(stamp), manifest::parse(&label, &bytes, json)),
            Ok(None) => return None,
            Err(error) => {
                let problem = format!("cannot be read: {error}; what it held before stays in effect");
                let fix = "make the file readable for the agent".to_owned();
                let finding =
                    Diagnostic { severity: Severity::Error, object: label, field: String::new(), problem, fix };
                (None, vec![Found::Unknown { finding }])
            }
        };
        let before = before.map(|file| file.entries).unwrap_or_default();
        let mut file = FileState { stamp, entries: Vec::new(), problems: Vec::new() };
        for found in found {
            match found {
                Found::Object { key, outcome, findings } if self.concerns(&key) => {
                    let outcome = outcome.map(Arc::new);
                    file.entries.push(Entry { key, readable: true, outcome, findings });
                }
                Found::Broken { key, finding } if self.concerns(&key) => {
                    let last = before.iter().find(|entry| entry.key == key && entry.readable);
                    file.entries.push(Entry {
                        key,
                        readable: last.is_some(),
                        outcome: last.and_then(|last| last.outcome.clone()),
                        findings: vec![finding],
                    });
                }
                Found::Object { .. } | Found::Broken { .. } => {}
                Found::Unknown { finding } => file.problems.push(finding),
            }
        }
        if !file.problems.is_empty() {
            // What cannot be read may be any of the objects that are missing now.
            let named: BTreeSet<ObjectKey> = file.entries.iter().map(|entry| entry.key.clone()).collect();
            file.entries.extend(before.into_iter().filter(|entry| !named.contains(&entry.key)));
        }
        Some(file)
    }

    /// Other nodes' Nodes do not concern this agent.
    fn concerns(&self, key: &ObjectKey) -> bool {
        key.kind != Kind::Node || key.name.name == self.node_name
    }

    /// With the first NetworkPolicy, what was of no interest before is told.
    fn begin_policies(&mut self, events: &mut Vec<Event>) {
        let is_policy = |key: &ObjectKey| key.kind == Kind::NetworkPolicy;
        if self.policies || !self.published.iter().any(|(key, known)| is_policy(key) && known.outcome.is_some()) {
            return;
        }
        self.policies = true;
        let awaited: Vec<_> = self.holders.keys().filter(|key| key.kind.is_for_policies()).cloned().collect();
        for key in awaited {
            self.settle(&key, events);
        }
        if self.listed {
            events.extend(self.listing_for_policies());
        }
    }

    /// Tells the receiver what an object is now, if that is news.
    fn settle(&mut self, key: &ObjectKey, events: &mut Vec<Event>) {
        if key.kind.is_for_policies() && !self.policies && !(key.kind == Kind::Pod && self.pods == PodWatch::Always) {
            return;
        }
        let mut now = Published::default();
        let mut winner: Option<&Path> = None;
        for (path, at) in self.holders.get(key).into_iter().flatten() {
            let Some(entry) = self.files.get(path).and_then(|file| file.entries.get(*at)) else { continue };
            if let Some(first) = winner {
                now.findings.push(Diagnostic {
                    severity: Severity::Warning,
                    object: format!("{} {}", self.label(path), key.subject()),
                    field: String::new(),
                    problem: format!("is defined in {} already, and is ignored here", self.label(first)),
                    fix: "define each object once".to_owned(),
                });
                continue;
            }
            now.findings.extend(entry.findings.iter().cloned());
            if entry.readable {
                winner = Some(path);
                now.outcome.clone_from(&entry.outcome);
            }
        }
        let broken = winner.is_none() && self.holders.contains_key(key);
        if broken && key.kind == Kind::NetworkPolicy {
            now.outcome = Some(Arc::new(Object::NetworkPolicy(unreadable_policy(key.name.clone()))));
        }
        let before = self.published.remove(key).unwrap_or_default();
        if before.outcome != now.outcome {
            match now.outcome.as_deref() {
                Some(Object::Service(service)) => events.push(Event::Service(service.clone())),
                Some(Object::Slice(slice)) => events.push(Event::Slice(slice.clone())),
                Some(Object::Node(node)) => events.push(Event::Node(node.clone())),
                Some(Object::ServiceCidr(ranges)) => {
                    events.push(Event::ServiceCidr(Arc::clone(&key.name.name), ranges.clone()));
                }
                Some(Object::NetworkPolicy(policy)) => {
                    events.push(Event::NetworkPolicy(Change::Policy(policy.clone())));
                }
                Some(Object::Pod(pod)) => events.push(Event::NetworkPolicy(Change::Pod(pod.clone()))),
                Some(Object::Namespace(namespace)) => {
                    events.push(Event::NetworkPolicy(Change::Namespace(namespace.clone())));
                }
                None => events.push(match key.kind {
                    Kind::Service => Event::ServiceGone(key.name.clone()),
                    Kind::EndpointSlice => Event::SliceGone(key.name.clone()),
                    Kind::Node => Event::Node(self.plain_node()),
                    Kind::ServiceCidr => Event::ServiceCidrGone(Arc::clone(&key.name.name)),
                    Kind::NetworkPolicy => Event::NetworkPolicy(Change::PolicyGone(key.name.clone())),
                    Kind::Pod => Event::NetworkPolicy(Change::PodGone(key.name.clone())),
                    Kind::Namespace => Event::NetworkPolicy(Change::NamespaceGone(Arc::clone(&key.name.name))),
                }),
            }
        }
        if before.findings != now.findings {
            events.push(Event::Diagnostics { object: key.subject(), findings: now.findings.clone() });
        }
        if now != Published::default() {
            self.published.insert(key.clone(), now);
        }
    }

    /// Tells the receiver what is wrong with files and folders, if that is news.
    fn report(&mut self, events: &mut Vec<Event>) {
        let files = self.files.iter().filter(|(_, file)| !file.problems.is_empty());
        let mut now: BTreeMap<String, Vec<Diagnostic>> =
            files.map(|(path, file)| (self.label(path), file.problems.clone())).collect();
        now.extend(self.unreadable.values().map(|finding| (finding.object.clone(), vec![finding.clone()])));
        for object in self.reported.keys().filter(|object| !now.contains_key(*object)) {
            events.push(Event::Diagnostics { object: object.clone(), findings: Vec::new() });
        }
        for (object, findings) in &now {
            if self.reported.get(object) != Some(findings) {
                events.push(Event::Diagnostics { object: object.clone(), findings: findings.clone() });
            }
        }
        self.reported = now;
    }

    /// Names of the objects of a kind that the receiver knows.
    fn named(&self, kind: Kind) -> impl Iterator<Item = ObjectName> {
        let known = self.published.iter().filter(move |(key, known)| key.kind == kind && known.outcome.is_some());
        known.map(|(key, _)| key.name.clone())
    }

    fn listing_for_policies(&self) -> Vec<Event> {
        let namespaces = self.named(Kind::Namespace).map(|name| name.name).collect();
        let pods = self.named(Kind::Pod).collect();
        [PolicyListing::Namespaces(namespaces), PolicyListing::Pods(pods)].map(Event::NetworkPolicyListed).into()
    }

    fn listing(&self) -> Vec<Event> {
        let named = |kind| self.named(kind);
        let mut events = Vec::new();
        let node = |(key, known): (&ObjectKey, &Published)| key.kind == Kind::Node && known.outcome.is_some();
        if !self.published.iter().any(node) {
            events.push(Event::Node(self.plain_node()));
        }
        let ranges = named(Kind::ServiceCidr).map(|name| name.name).collect();
        events.push(Event::Listed(Source::Services, Listing::Objects(named(Kind::Service).collect())));
        events.push(Event::Listed(Source::EndpointSlices, Listing::Objects(named(Kind::EndpointSlice).collect())));
        events.push(Event::Listed(Source::ServiceCidrs, Listing::ServiceCidrs(ranges)));
        let policies = PolicyListing::Policies(named(Kind::NetworkPolicy).collect());
        events.push(Event::NetworkPolicyListed(policies));
        if self.policies {
            events.extend(self.listing_for_policies());
        } else if self.pods == PodWatch::Always {
            events.push(Event::NetworkPolicyListed(PolicyListing::Pods(named(Kind::Pod).collect())));
        }
        events.push(Event::Listed(Source::Node, Listing::Node));
        events
    }

    /// This node, where the folder says nothing of it.
    fn plain_node(&self) -> Node {
        Node { name: Arc::clone(&self.node_name), ..Node::default() }
    }

    /// Name of a path in diagnostics: within the folder.
    fn label(&self, path: &Path) -> String {
        let inner = path.strip_prefix(&self.root).ok().filter(|inner| !inner.as_os_str().is_empty());
        inner.unwrap_or(path).display().to_string()
    }
}

/// Content of a regular file; `None` when there is none.
fn load(path: &Path) -> io::Result<Option<(Stamp, Vec<u8>)>> {
    let absent = |error: io::Error| if error.kind() == io::ErrorKind::NotFound { Ok(None) } else { Err(error) };
    // Never open what is no regular file: a FIFO would block.
    match fs::metadata(path) {
        Ok(metadata) if metadata.is_file() => {}
        Ok(_) => return Ok(None),
        Err(error) => return absent(error),
    }
    let mut file = match File::open(path) {
        Ok(file) => file,
        Err(error) => return absent(error),
    };
    // The stamp is taken first: a write during the read makes it stale, and the file is read again.
    let stamp = Stamp::of(&file.metadata()?);
    let mut bytes = Vec::new();
    file.read_to_end(&mut bytes)?;
    Ok(Some((stamp, bytes)))
}

// === Walk ===

struct Walk<'a> {
    found: BTreeMap<PathBuf, Stamp>,
    unreadable: BTreeMap<PathBuf, io::Error>,
    /// Device and inode of the folders entered: links may make circles.
    visited: BTreeSet<(u64, u64)>,
    watch: &'a mut dyn FnMut(Place<'_>),
}

impl Walk<'_> {
    fn enter(&mut self, folder: &Path) {
        (self.watch)(Place::Folder(folder));
        if let Err(error) = self.list(folder) {
            self.unreadable.insert(folder.to_owned(), error);
        }
    }

    fn list(&mut self, folder: &Path) -> io::Result<()> {
        let metadata = fs::metadata(folder)?;
        if !self.visited.insert((metadata.dev(), metadata.ino())) {
            return Ok(());
        }
        let mut paths = Vec::new();
        for entry in fs::read_dir(folder)? {
            let entry = entry?;
            let path = entry.path();
            if !is_hidden(&path) {
                paths.push((path, entry.file_type()?.is_symlink()));
            }
        }
        paths.sort_unstable();
        for (path, linked) in paths {
            // Gone since, or a link to nowhere: either way it is not there.
            let Ok(metadata) = fs::metadata(&path) else { continue };
            if metadata.is_dir() {
                self.enter_inner(&path);
            } else if metadata.is_file() && is_manifest(&path) {
                if linked {
                    (self.watch)(Place::LinkedFile(&path));
                }
                self.found.insert(path, Stamp::of(&metadata));
            }
        }
        Ok(())
    }

    /// A folder within: one that vanished since it was seen is not there, rather than unreadable.
    fn enter_inner(&mut self, folder: &Path) {
        (self.watch)(Place::Folder(folder));
        match self.list(folder) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                self.unreadable.insert(folder.to_owned(), error);
            }
            Ok(()) | Err(_) => {}
        }
    }
}
