//! The configuration file while the agent runs.
//!
//! A file that is valid and means something else ends the agent, to be started again with it: the state is in the
//! kernel. One that is wrong, half-written or gone changes nothing. A ConfigMap's volume is switched by its `..data`
//! link, which shows in the folder of the file.

use std::path::{Path, PathBuf};
use std::time::Duration;

use futures::StreamExt as _;
use inotify::{EventStream, Inotify, WatchMask};
use proxy_core::policy::ExternalIps;
use tokio::time::timeout;

use super::config::{ConfigError, ConfigFile};
use super::flags::Flags;
use super::settings::Settings;

/// A writer is taken to be done after this much quiet.
const QUIET: Duration = Duration::from_millis(50);
/// The file is read again after this long in any case: a folder may be replaced, and its watch with it.
const ANYWAY: Duration = Duration::from_secs(30);
/// Room for inotify events.
const BUFFER: usize = 16 * 1024;

/// A file that is watched.
#[derive(Debug)]
pub struct Reload {
    path: PathBuf,
    flags: Flags,
    external_ips: Option<ExternalIps>,
    /// What is in force.
    settings: Settings,
    /// The last text that was looked at.
    text: String,
}

/// What became of one look at the file.
#[derive(Debug)]
pub enum Look {
    /// Nothing that matters.
    Same,
    /// Another configuration: field, what it was, what it is.
    Changed(Vec<(String, String, String)>),
    /// It cannot be used.
    Wrong(ConfigError),
}

impl Reload {
    /// `settings` is what `file`, `flags` and `external_ips` gave at the start.
    pub fn new(file: ConfigFile, flags: Flags, external_ips: Option<ExternalIps>, settings: Settings) -> Self {
        Self { path: file.path, flags, external_ips, settings, text: file.text }
    }

    /// Ends when the agent is to be started again with what the file says now.
    pub async fn changed(mut self) {
        let mut watch = None;
        loop {
            if watch.is_none() {
                watch = self.watch();
            }
            match self.look() {
                Look::Same => {}
                Look::Changed(fields) => {
                    for (field, was, is) in fields {
                        tracing::info!(field, was, is, "configuration changed");
                    }
                    tracing::info!(file = %self.path.display(), "ends to be started with it; the kernel goes on");
                    return;
                }
                Look::Wrong(error) => tracing::error!("{error}; the configuration in force stays"),
            }
            match timeout(ANYWAY, told(&mut watch)).await {
                Ok(Some(Ok(_))) => while let Ok(Some(Ok(_))) = timeout(QUIET, told(&mut watch)).await {},
                // Its target may be in another folder by now, or the folder be another one.
                Ok(_) | Err(_) => watch = None,
            }
        }
    }

    /// Reads the file and compares.
    pub fn look(&mut self) -> Look {
        let file = match ConfigFile::read(&self.path) {
            Ok(file) if file.text == self.text => return Look::Same,
            Ok(file) => file,
            Err(ConfigError::Wrong { place, problem }) => {
                // Told once for each text that is wrong.
                let text = std::fs::read_to_string(&self.path).unwrap_or_default();
                let news = std::mem::replace(&mut self.text, text.clone()) != text;
                return if news { Look::Wrong(ConfigError::Wrong { place, problem }) } else { Look::Same };
            }
            Err(error) => {
                let news = !std::mem::take(&mut self.text).is_empty();
                return if news { Look::Wrong(error) } else { Look::Same };
            }
        };
        self.text.clone_from(&file.text);
        match Settings::new(Some(&file), &self.flags, self.external_ips.as_ref()) {
            Ok((settings, _)) if settings == self.settings => Look::Same,
            Ok((settings, _)) => Look::Changed(self.settings.changes(&settings)),
            Err(error) => Look::Wrong(error),
        }
    }

    /// Watches the folder of the file, and that of what it links to.
    fn watch(&self) -> Option<EventStream<Vec<u8>>> {
        let watched = || {
            let inotify = Inotify::init()?;
            let mask = WatchMask::CLOSE_WRITE
                | WatchMask::MOVED_TO
                | WatchMask::CREATE
                | WatchMask::DELETE
                | WatchMask::DELETE_SELF
                | WatchMask::MOVE_SELF;
            let target = self.path.canonicalize().ok();
            for path in [Some(self.path.as_path()), target.as_deref()].into_iter().flatten() {
                let folder = path.parent().filter(|folder| !folder.as_os_str().is_empty());
                inotify.watches().add(folder.unwrap_or(Path::new(".")), mask)?;
            }
            inotify.into_event_stream(vec![0; BUFFER])
        };
        match watched() {
            Ok(stream) => Some(stream),
            Err(error) => {
                tracing::warn!(%error, file = %self.path.display(), "cannot be watched; it is read now and then");
                None
            }
        }
    }
}

/// What the watch tells next; nothing, for ever, when there is none.
async fn told(watch: &mut Option<EventStream<Vec<u8>>>) -> Option<std::io::Result<inotify::EventOwned>> {
    match watch {
        Some(stream) => stream.next().await,
        None => std::future::pending().await,
    }
}
