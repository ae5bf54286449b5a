//! Whose veth it is: the records of the CNI, read and followed by inotify.
//!
//! libcni writes a record when the CNI has answered, which is before anything of the pod runs, and removes it when the pod
//! is gone. It is the one source that says which interface of the node belongs to which pod (by UID), and it is written
//! by root, never by a pod.
//!
//! ```text
//!   /var/lib/cni/results/cbr0-<container>-eth0 ── record ──▶ Attachment ──▶ node: interface ↔ pod, trusted addresses
//! ```
//!
//! A folder that is not there yet is waited for. What a file said before it became unreadable stays; what a file that
//! is gone has said of an interface stays with the interface: see the parent module.

use std::collections::BTreeMap;
use std::ffi::OsStr;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use futures::StreamExt;
use inotify::{EventMask, EventStream, Inotify, WatchMask};
use proxy_core::diagnostic::{Diagnostic, Severity};
use proxy_core::event::Event;
use tokio::sync::{mpsc, watch};
use tokio::time::timeout;

pub mod record;

pub use record::{Attachment, HostInterface, RecordError};

/// Where libcni keeps its records, unless it is told otherwise.
pub const RESULTS: &str = "/var/lib/cni/results";
/// Between two attempts to read a folder that cannot be read or watched.
const RETRY: Duration = Duration::from_secs(1);
/// Room for one read of inotify events.
const BUFFER: usize = 64 * 1024;
/// Larger files are no records.
const LARGEST: u64 = 1 << 20;

/// What the records say.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Records {
    /// By file name.
    pub attachments: BTreeMap<Arc<OsStr>, Arc<Attachment>>,
    /// Why the folder cannot be read, when it cannot.
    pub problem: Option<Arc<str>>,
}

/// A folder of records.
struct Folder {
    path: PathBuf,
    records: Records,
    /// Files of no use, each with the reason.
    faults: BTreeMap<Arc<OsStr>, String>,
}

/// Reads the records and follows them in a task of the current runtime until nobody receives its findings any more. What
/// there is now has been read when this returns.
pub fn spawn(path: &Path, events: mpsc::Sender<Event>) -> io::Result<watch::Receiver<Records>> {
    let stream = Inotify::init()?.into_event_stream(vec![0; BUFFER])?;
    let mut follower = Follower {
        folder: Folder { path: path.to_owned(), records: Records::default(), faults: BTreeMap::new() },
        stream,
        told: BTreeMap::new(),
        events,
    };
    let complete = follower.begin();
    let (tx, rx) = watch::channel(follower.folder.records.clone());
    tokio::spawn(follower.run(complete, tx));
    Ok(rx)
}

// === impl Records ===

impl Records {
    /// The attachment that a record names this interface of the node for.
    pub fn of(&self, name: &str, mac: proxy_abi::MacBytes) -> Option<&Arc<Attachment>> {
        let is = |host: &HostInterface| *host.name == *name && host.mac.is_none_or(|is| is == mac);
        self.attachments.values().find(|attachment| attachment.host.iter().any(is))
    }
}

// === impl Folder ===

impl Folder {
    /// Reads every file. An error means that the folder itself cannot be read; what is known stays then.
    fn scan(&mut self) -> io::Result<()> {
        let entries = std::fs::read_dir(&self.path)?.collect::<io::Result<Vec<_>>>()?;
        let names: Vec<Arc<OsStr>> = entries.into_iter().map(|entry| entry.file_name().into()).collect();
        self.records.attachments.retain(|name, _| names.contains(name));
        self.faults.retain(|name, _| names.contains(name));
        for name in names {
            self.read(&name);
        }
        Ok(())
    }

    /// Reads one file, or notes that it is gone.
    fn read(&mut self, name: &Arc<OsStr>) {
        match load(&self.path.join(&**name)) {
            Ok(Some(bytes)) => match record::parse(&bytes) {
                Ok(Some(attachment)) => {
                    self.faults.remove(name);
                    self.records.attachments.insert(Arc::clone(name), Arc::new(attachment));
                }
                Ok(None) => self.forget(name),
                Err(error) => drop(self.faults.insert(Arc::clone(name), error.to_string())),
            },
            Ok(None) => self.forget(name),
            Err(error) => drop(self.faults.insert(Arc::clone(name), format!("cannot be read: {error}"))),
        }
    }

    fn forget(&mut self, name: &Arc<OsStr>) {
        self.faults.remove(name);
        self.records.attachments.remove(name);
    }
}

/// The content of a regular file; `None` when there is none.
fn load(path: &Path) -> io::Result<Option<Vec<u8>>> {
    let read = || {
        let metadata = std::fs::symlink_metadata(path)?;
        if !metadata.is_file() || metadata.len() > LARGEST {
            return Ok(None);
        }
        std::fs::read(path).map(Some)
    };
    match read() {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        result => result,
    }
}

// === Follower ===

struct Follower {
    folder: Folder,
    stream: EventStream<Vec<u8>>,
    /// What the receiver of findings was told.
    told: BTreeMap<Arc<OsStr>, String>,
    events: mpsc::Sender<Event>,
}

impl Follower {
    async fn run(mut self, mut complete: bool, records: watch::Sender<Records>) {
        let events = self.events.clone();
        let follow = async {
            loop {
                if !self.tell(&records).await {
                    return;
                }
                if complete {
                    complete = self.next().await || self.begin();
                } else {
                    // The nearest folder above is watched: something new in it may be what is waited for.
                    let waited = timeout(RETRY, self.stream.next()).await;
                    tracing::trace!(waited = waited.is_err(), "looking for the records of the CNI again");
                    complete = self.begin();
                }
            }
        };
        tokio::select! {
            () = follow => {}
            () = events.closed() => {}
        }
    }

    /// Watches the folder, then reads all of it. True when both could be done.
    fn begin(&mut self) -> bool {
        let changes = WatchMask::CLOSE_WRITE | WatchMask::MOVE | WatchMask::DELETE;
        let ended = WatchMask::DELETE_SELF | WatchMask::MOVE_SELF | WatchMask::ONLYDIR;
        let watched = self.stream.watches().add(&self.folder.path, changes | ended);
        let result = watched.map(drop).and_then(|()| self.folder.scan());
        let path = self.folder.path.display();
        self.folder.records.problem =
            result.as_ref().err().map(|error| format!("{path} cannot be read: {error}").into());
        if result.is_err() {
            let mut above = self.folder.path.ancestors().skip(1).filter(|above| !above.as_os_str().is_empty());
            let mask = WatchMask::CREATE | WatchMask::MOVED_TO | WatchMask::ONLYDIR;
            // Where none can be watched, the time between two attempts is all that there is.
            let watched = above.find(|above| self.stream.watches().add(above, mask).is_ok());
            tracing::trace!(?watched, "waiting for the folder of the CNI's records");
        }
        result.is_ok()
    }

    /// Waits for a change and takes it in. False when the folder must be begun anew.
    async fn next(&mut self) -> bool {
        match self.stream.next().await {
            Some(Ok(event)) if event.mask.contains(EventMask::Q_OVERFLOW) => false,
            Some(Ok(event)) => match &event.name {
                // A folder above, from when this one was waited for, tells of names, too: they lead to nothing here.
                Some(name) => {
                    self.folder.read(&name.as_os_str().into());
                    true
                }
                None => !event.mask.intersects(
                    EventMask::DELETE_SELF | EventMask::MOVE_SELF | EventMask::UNMOUNT | EventMask::IGNORED,
                ),
            },
            Some(Err(error)) => {
                tracing::warn!(%error, "reading changes of the CNI's records failed, reading them anew");
                false
            }
            None => false,
        }
    }

    /// Tells what has changed; false when nobody receives it.
    async fn tell(&mut self, records: &watch::Sender<Records>) -> bool {
        records.send_if_modified(|told| {
            let differs = *told != self.folder.records;
            if differs {
                told.clone_from(&self.folder.records);
            }
            differs
        });
        let told = std::mem::replace(&mut self.told, self.folder.faults.clone());
        let names = told.keys().filter(|name| !self.told.contains_key(*name)).chain(self.told.keys());
        let object = |name: &OsStr| format!("CNI record {}", self.folder.path.join(name).display());
        let news = names.filter(|name| told.get(*name) != self.told.get(*name));
        let events: Vec<Event> = news
            .map(|name| {
                let finding = self.told.get(name).map(|problem| Diagnostic {
                    severity: Severity::Warning,
                    object: object(name),
                    field: String::new(),
                    problem: problem.clone(),
                    fix: "without it nobody knows whose interface it tells of, and policies hold that pod".to_owned(),
                });
                Event::Diagnostics { object: object(name), findings: finding.into_iter().collect() }
            })
            .collect();
        for event in events {
            if self.events.send(event).await.is_err() {
                return false;
            }
        }
        true
    }
}
