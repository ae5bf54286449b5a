//! Which cgroup is which pod's: by the names that kubelet gives.
//!
//! ```text
//!   /sys/fs/cgroup/                                          root of the cgroup v2 hierarchy
//!     kubepods.slice/kubepods-burstable.slice/
//!       kubepods-burstable-pod0f3c…_9a2b.slice               systemd driver: dashes of the UID as underscores
//!         cri-containerd-….scope                             the pod's own from here on: nobody looks
//!     kubepods/burstable/pod0f3c…-9a2b                       cgroupfs driver
//! ```
//!
//! What lies above `kubepods` differs (kubelet's `--cgroup-root`, a machine in a container), so all of it is looked through.
//! Not what is below a pod's: a pod that has a cgroup namespace makes folders there, of whatever name.
//!
//! kubelet makes a pod's cgroup before its sandbox, so it is there when the CNI has answered. The number of the folder is
//! the id of the cgroup, which the kernel uses once.

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// Folders are looked for so deep: as deep as the programs look.
const LEVELS: usize = 8;

/// Cgroups of pods, as they were found.
#[derive(Clone, Debug)]
pub struct Cgroups {
    root: PathBuf,
    found: BTreeMap<Arc<str>, Found>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
struct Found {
    path: PathBuf,
    id: u64,
}

impl Cgroups {
    /// Of the hierarchy that is mounted there.
    pub const fn new(root: PathBuf) -> Self {
        Self { root, found: BTreeMap::new() }
    }

    /// Where the hierarchy is mounted.
    pub fn root(&self) -> &Path {
        &self.root
    }

    /// Ids of the cgroups of these pods, by UID. Those that have none are left out; they may have one later.
    pub fn ids<'a>(&mut self, pods: impl IntoIterator<Item = &'a Arc<str>>) -> BTreeMap<Arc<str>, u64> {
        let mut lacking: BTreeMap<String, Arc<str>> = BTreeMap::new();
        let mut known = std::mem::take(&mut self.found);
        for uid in pods {
            match known.remove(uid).filter(|found| id_of(&found.path) == Some(found.id)) {
                Some(found) => drop(self.found.insert(Arc::clone(uid), found)),
                None => drop(lacking.insert(uid.to_lowercase(), Arc::clone(uid))),
            }
        }
        if !lacking.is_empty() {
            let root = self.root.clone();
            self.look(&root, 1, &mut lacking);
        }
        self.found.iter().map(|(uid, found)| (Arc::clone(uid), found.id)).collect()
    }

    /// Looks for pods in a folder. What cannot be read has gone meanwhile.
    fn look(&mut self, folder: &Path, level: usize, lacking: &mut BTreeMap<String, Arc<str>>) {
        for entry in fs::read_dir(folder).into_iter().flatten().flatten() {
            if lacking.is_empty() {
                return;
            }
            if !entry.file_type().is_ok_and(|kind| kind.is_dir()) {
                continue;
            }
            let path = entry.path();
            match entry.file_name().to_str().and_then(uid_of) {
                Some(uid) => {
                    if let Some(uid) = lacking.remove(&uid)
                        && let Some(id) = id_of(&path)
                    {
                        self.found.insert(uid, Found { path, id });
                    }
                }
                None if level < LEVELS => self.look(&path, level + 1, lacking),
                None => {}
            }
        }
    }
}

fn id_of(path: &Path) -> Option<u64> {
    fs::metadata(path).ok().map(|metadata| metadata.ino())
}

/// The UID in the name of a pod's cgroup; the hash in that of a static pod's.
fn uid_of(name: &str) -> Option<String> {
    let name = name.strip_suffix(".slice").unwrap_or(name);
    let uid = name.strip_prefix("pod").or_else(|| name.rsplit_once("-pod").map(|(_, uid)| uid))?;
    let uid = uid.replace('_', "-").to_lowercase();
    let is_uid = (32..=36).contains(&uid.len()) && uid.bytes().all(|byte| byte == b'-' || byte.is_ascii_hexdigit());
    is_uid.then_some(uid)
}

#[cfg(test)]
mod tests {
    use super::*;

    const UID: &str = "0f3c8a52-11aa-4b6e-9d10-5a0d5d1c9a2b";

    #[test]
    fn names() {
        let rows = [
            ("kubepods-burstable-pod0f3c8a52_11aa_4b6e_9d10_5a0d5d1c9a2b.slice", Some(UID)),
            ("kubepods-pod0f3c8a52_11aa_4b6e_9d10_5a0d5d1c9a2b.slice", Some(UID)),
            ("kubelet-kubepods-besteffort-pod0F3C8A52_11AA_4B6E_9D10_5A0D5D1C9A2B.slice", Some(UID)),
            ("pod0f3c8a52-11aa-4b6e-9d10-5a0d5d1c9a2b", Some(UID)),
            ("pod5f0c1d2e3f405162738495a6b7c8d9e0", Some("5f0c1d2e3f405162738495a6b7c8d9e0")),
            ("kubepods.slice", None),
            ("kubepods-besteffort.slice", None),
            ("podman-42.scope", None),
            ("libpod-5f0c1d2e3f405162738495a6b7c8d9e05f0c1d2e3f405162738495a6b7c8d9e0.scope", None),
            ("cri-containerd-5f0c1d2e3f405162738495a6b7c8d9e05f0c1d2e3f405162738495a6b7c8d9e0.scope", None),
            ("pod", None),
        ];
        for (name, uid) in rows {
            assert_eq!(uid_of(name).as_deref(), uid, "{name}");
        }
    }

    #[test]
    fn a_pod_is_found_by_its_folder_and_not_below_another() {
        let root = tempfile::tempdir().expect("a folder");
        let uids: Vec<Arc<str>> = (0..4).map(|n| Arc::from(format!("{n}{}", &UID[1..]))).collect();
        let systemd = |uid: &str| format!("a/kubepods.slice/kubepods-pod{}.slice", uid.replace('-', "_"));
        let make = |path: &str| {
            let path = root.path().join(path);
            fs::create_dir_all(&path).expect("made");
            id_of(&path).expect("an id")
        };
        let first = make(&systemd(&uids[0]));
        let second = make(&format!("b/kubepods/burstable/pod{}", uids[1]));
        // A pod that makes a folder with another's name.
        make(&format!("{}/own/pod{}", systemd(&uids[0]), uids[2]));
        let mut cgroups = Cgroups::new(root.path().to_owned());
        let expected = BTreeMap::from([(Arc::clone(&uids[0]), first), (Arc::clone(&uids[1]), second)]);
        assert_eq!(cgroups.ids(&uids), expected);
        // Gone, made again under another number, and come.
        fs::remove_dir_all(root.path().join(systemd(&uids[0]))).expect("removed");
        make("something-else");
        let first = make(&systemd(&uids[0]));
        let third = make(&format!("b/kubepods/burstable/pod{}", uids[3]));
        let expected = BTreeMap::from([(Arc::clone(&uids[0]), first), (Arc::clone(&uids[3]), third)]);
        assert_eq!(cgroups.ids([&uids[0], &uids[3]]), expected);
        assert_eq!(Cgroups::new(root.path().join("absent")).ids(&uids), BTreeMap::new());
    }
}
