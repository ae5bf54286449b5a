//! `--source dir:PATH`: a folder of ordinary manifests, watched with inotify.
//!
//! ```text
//!   inotify ──▶ quiet for 2 ms, at most 20 ms ──┬─ files written, moved, removed ──▶ read those again
//!                                               └─ folders, links, overflow ───────▶ walk everything
//! ```
//!
//! A manifest is read when its writer closes it or moves it into place. `..data` links, as the volumes of ConfigMaps
//! use them, are switched as a whole.

use std::collections::{BTreeSet, HashMap};
use std::ffi::OsStr;
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use futures::StreamExt;
use inotify::{EventMask, EventOwned, EventStream, Inotify, WatchDescriptor, WatchMask, Watches};
use proxy_core::event::Event;
use tokio::sync::mpsc::Sender;
use tokio::time::{Instant, timeout, timeout_at};

use super::folder::{Folder, Place, is_manifest};
use super::{PodWatch, SourceError};

/// A batch of changes ends after this much quiet.
const QUIET: Duration = Duration::from_millis(2);
/// A batch of changes ends after this long in any case.
const BATCH: Duration = Duration::from_millis(20);
/// Between attempts to read what could not be read, or to watch what could not be watched.
const RETRY: Duration = Duration::from_secs(1);
/// More files than this are read off the event loop's thread.
const INLINE_FILES: usize = 64;
/// Room for one read of inotify events: about 200 of them.
const BUFFER: usize = 64 * 1024;

/// A watched folder.
pub(super) struct DirSource {
    folder: Folder,
    stream: EventStream<Vec<u8>>,
    watched: HashMap<WatchDescriptor, Watched>,
    /// Changes that wait for the end of their batch.
    pending: Dirty,
    tx: Sender<Event>,
}

/// What a watch descriptor stands for.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Watched {
    Folder(PathBuf),
    LinkedFile(PathBuf),
}

/// What a batch of changes asks for.
#[derive(Debug, Default, PartialEq, Eq)]
struct Dirty {
    files: BTreeSet<PathBuf>,
    /// Walk everything.
    walk: bool,
    /// Read everything, whether it looks changed or not: changes were lost.
    lost: bool,
}

impl DirSource {
    /// Fails when the folder is not there, or inotify is not to be had.
    pub(super) fn open(root: &Path, node_name: &str, pods: PodWatch, tx: Sender<Event>) -> Result<Self, SourceError> {
        let folder = |source| SourceError::Folder { path: root.to_owned(), source };
        if !fs::metadata(root).map_err(folder)?.is_dir() {
            return Err(SourceError::NotAFolder { path: root.to_owned() });
        }
        let stream = Inotify::init()
            .and_then(|inotify| inotify.into_event_stream(vec![0; BUFFER]))
            .map_err(|source| SourceError::Inotify { source })?;
        let folder = Folder::new(root.to_owned(), node_name.into(), pods);
        Ok(Self { folder, stream, watched: HashMap::new(), pending: Dirty::default(), tx })
    }

    /// Runs until the receiver is gone.
    pub(super) async fn run(self) {
        let tx = self.tx.clone();
        tokio::select! {
            () = self.follow() => {}
            () = tx.closed() => {}
        }
    }

    async fn follow(mut self) {
        let mut dirty = Dirty { walk: true, ..Dirty::default() };
        loop {
            let Ok(complete) = self.apply(dirty).await else { return };
            if complete {
                self.changes().await;
            } else {
                // What could not be watched or read is tried again in time, whatever else happens.
                self.pending.walk |= timeout(RETRY, self.changes()).await.is_err();
            }
            dirty = std::mem::take(&mut self.pending);
            dirty.walk |= !complete;
        }
    }

    /// Reads what changed and sends what follows. True when everything could be read and watched; an error when the
    /// receiver is gone.
    async fn apply(&mut self, dirty: Dirty) -> Result<bool, Stopped> {
        let mut watching = true;
        let mut events = Vec::new();
        if dirty.walk || dirty.lost {
            let (walked, stable) = self.walk(dirty.lost).await?;
            events.extend(walked);
            watching = stable;
        }
        if dirty.files.len() > INLINE_FILES {
            let files = dirty.files;
            events.extend(self.off_thread(move |folder| folder.refresh(&files)).await?);
        } else if !dirty.files.is_empty() {
            events.extend(self.folder.refresh(&dirty.files));
        }
        for event in events {
            self.tx.send(event).await.map_err(|_| Stopped)?;
        }
        Ok(watching && self.folder.is_complete())
    }

    /// Walks the folder and renews the watches. With the events: whether all watches could be set.
    async fn walk(&mut self, force: bool) -> Result<(Vec<Event>, bool), Stopped> {
        let mut watches = self.stream.watches();
        let scan = move |folder: &mut Folder| {
            let mut watched = HashMap::new();
            let mut failed = None;
            let events = folder.scan(force, &mut |place| {
                if let Err(error) = watch(&mut watches, &place, &mut watched) {
                    failed.get_or_insert(error);
                }
            });
            (events, watched, failed)
        };
        let (events, watched, failed) = self.off_thread(scan).await?;
        for old in self.watched.keys().filter(|old| !watched.contains_key(*old)) {
            // The kernel dropped it already when what it watched is gone.
            if let Err(error) = self.stream.watches().remove(old.clone()) {
                tracing::trace!(%error, "watch was gone already");
            }
        }
        self.watched = watched;
        if let Some(error) = &failed {
            tracing::warn!(
                %error,
                "a folder cannot be watched and is read every second instead; raise fs.inotify.max_user_watches"
            );
        }
        Ok((events, failed.is_none()))
    }

    /// Runs blocking work on the folder without holding up the runtime.
    async fn off_thread<T: Send + 'static>(
        &mut self,
        work: impl FnOnce(&mut Folder) -> T + Send + 'static,
    ) -> Result<T, Stopped> {
        let mut folder =
            std::mem::replace(&mut self.folder, Folder::new(PathBuf::new(), Arc::from(""), PodWatch::default()));
        let done = tokio::task::spawn_blocking(move || {
            let result = work(&mut folder);
            (folder, result)
        });
        // It is cancelled only with the runtime.
        let (folder, result) = done.await.map_err(|_| Stopped)?;
        self.folder = folder;
        Ok(result)
    }

    /// Collects the next batch of changes. What is collected stays when this is cancelled.
    async fn changes(&mut self) {
        while self.pending == Dirty::default() {
            let change = self.stream.next().await;
            self.note(change);
        }
        let end = Instant::now() + BATCH;
        while let Ok(change) = timeout_at(end.min(Instant::now() + QUIET), self.stream.next()).await {
            self.note(change);
        }
    }

    fn note(&mut self, change: Option<std::io::Result<EventOwned>>) {
        match change {
            Some(Ok(event)) if event.mask.contains(EventMask::Q_OVERFLOW) => self.pending.lost = true,
            Some(Ok(event)) => {
                if let Some(watched) = self.watched.get(&event.wd) {
                    note(watched, event.mask, event.name.as_deref(), &mut self.pending);
                }
            }
            Some(Err(error)) => {
                tracing::warn!(%error, "reading changes of the folder failed, reading it anew");
                self.pending.lost = true;
            }
            None => self.pending.lost = true,
        }
    }
}

/// The receiver is gone, or the runtime is.
struct Stopped;

fn watch(
    watches: &mut Watches,
    place: &Place<'_>,
    watched: &mut HashMap<WatchDescriptor, Watched>,
) -> std::io::Result<()> {
    let ended = WatchMask::DELETE_SELF | WatchMask::MOVE_SELF;
    let (path, mask, entry) = match *place {
        Place::Folder(path) => {
            let entries = WatchMask::CREATE | WatchMask::CLOSE_WRITE | WatchMask::DELETE | WatchMask::MOVE;
            (path, entries | WatchMask::ATTRIB | WatchMask::ONLYDIR | ended, Watched::Folder(path.to_owned()))
        }
        Place::LinkedFile(path) => (path, WatchMask::CLOSE_WRITE | ended, Watched::LinkedFile(path.to_owned())),
    };
    match watches.add(path, mask) {
        Ok(descriptor) => {
            watched.insert(descriptor, entry);
            Ok(())
        }
        // The walk finds out itself whether it is gone or forbidden.
        Err(error) if [std::io::ErrorKind::NotFound, std::io::ErrorKind::PermissionDenied].contains(&error.kind()) => {
            Ok(())
        }
        Err(error) => Err(error),
    }
}

/// What one change asks for.
fn note(watched: &Watched, mask: EventMask, name: Option<&OsStr>, dirty: &mut Dirty) {
    let ended = EventMask::DELETE_SELF | EventMask::MOVE_SELF | EventMask::UNMOUNT | EventMask::IGNORED;
    let folder = match watched {
        Watched::LinkedFile(path) => {
            dirty.files.insert(path.clone());
            // Other links may lead to the same file, and a file put in its place needs a watch of its own.
            dirty.walk = true;
            return;
        }
        Watched::Folder(folder) => folder,
    };
    let Some(name) = name else {
        dirty.walk |= mask.intersects(ended | EventMask::ATTRIB);
        return;
    };
    let path = folder.join(name);
    if name.as_encoded_bytes().starts_with(b".") {
        // Volumes switch `..data`; all other hidden names are nobody's business here.
        dirty.walk |= name.as_encoded_bytes().starts_with(b"..") && !mask.contains(EventMask::CLOSE_WRITE);
    } else if mask.contains(EventMask::ISDIR) {
        dirty.walk = true;
    } else if !mask.intersects(EventMask::CREATE | EventMask::MOVED_TO) {
        // Without a manifest's name it may have been a link to a folder.
        if is_manifest(&path) {
            dirty.files.insert(path);
        } else if mask.intersects(EventMask::DELETE | EventMask::MOVED_FROM) {
            dirty.walk = true;
        }
    } else {
        match fs::symlink_metadata(&path) {
            Ok(metadata) if metadata.is_symlink() => {
                dirty.walk = true;
                dirty.files.insert(path);
            }
            // A new file is yet to be written, and the end of that is told. A new link is complete.
            Ok(metadata) if mask.contains(EventMask::CREATE) && metadata.nlink() == 1 && metadata.len() == 0 => {}
            _ if is_manifest(&path) => {
                dirty.files.insert(path);
            }
            _ => {}
        }
    }
}
