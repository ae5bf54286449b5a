//! A kernel of Debian's: image and modules, fetched and unpacked into the cache, never installed.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{self as own, Command};

use anyhow::{Context as _, Result, bail};

use crate::process;

/// What the names of packages with kernels, and of those that depend on them, begin with.
const PREFIX: &str = "linux-image-";
/// What has to be loaded before the root can be mounted. What a kernel has built in is not in its list of modules.
const BOOT: [&str; 4] = ["virtio_pci", "9pnet_virtio", "9p", "overlay"];
/// Most of the modules, and none that a machine without devices asks for.
const UNUSED: [&str; 6] =
    ["sound", "drivers/gpu", "drivers/media", "drivers/infiniband", "drivers/iio", "drivers/net/wireless"];

/// A kernel that is ready to be started.
pub(super) struct Kernel {
    /// As `uname -r` says it.
    pub(super) version: String,
    /// What is booted.
    pub(super) image: PathBuf,
    /// `lib/modules/VERSION`, with the lists that depmod makes.
    pub(super) modules: PathBuf,
}

impl Kernel {
    /// The kernel that a package has or depends on. It is fetched once; newer ones replace it only in name.
    pub(super) fn provide(package: &str) -> Result<Self> {
        let package = resolve(package)?;
        let directory = process::cache()?.join("proxy-agent/kernels").join(&package);
        if !directory.exists() {
            // Unpacked beside the place and moved there whole, so that nobody ever sees half of it.
            let fresh = directory.with_file_name(format!("{package}.new-{}", own::id()));
            let moved =
                fetch(&package, &fresh).and_then(|()| fs::rename(&fresh, &directory).context("cannot move the kernel"));
            if moved.is_err() {
                // The error is the one to tell; what is left here is only disk space.
                let _ = fs::remove_dir_all(&fresh);
            }
            moved?;
        }
        Self::read(&directory)
    }

    fn read(directory: &Path) -> Result<Self> {
        let version = version(directory)?;
        let image = directory.join("boot").join(format!("vmlinuz-{version}"));
        let modules = directory.join("lib/modules").join(&version);
        for path in [&image, &modules.join("modules.dep")] {
            if !path.exists() {
                bail!("{} is not there: remove {} and try again", path.display(), directory.display());
            }
        }
        Ok(Self { version, image, modules })
    }

    /// The modules that are loaded before there is a root, uncompressed, in their order.
    pub(super) fn boot_modules(&self) -> Result<Vec<Vec<u8>>> {
        let list = self.modules.join("modules.dep");
        let list = fs::read_to_string(&list).with_context(|| list.display().to_string())?;
        in_order(&list, &BOOT).into_iter().map(|file| plain(&self.modules.join(file))).collect()
    }
}

/// The package that has the kernel: what a package of Debian's that only depends on one leads to.
fn resolve(package: &str) -> Result<String> {
    if !package.starts_with(PREFIX) {
        bail!("{package}: the names of Debian's kernels begin with {PREFIX} (apt-cache search ^{PREFIX})");
    }
    let depends = process::read(Command::new("apt-cache").args(["depends", "--important", package]))
        .with_context(|| format!("{package}: apt knows no such package (apt-cache search ^{PREFIX})"))?;
    match depends_on(&depends) {
        Some(next) => resolve(next),
        None => Ok(package.to_owned()),
    }
}

/// The kernel package among what `apt-cache depends` lists.
fn depends_on(listed: &str) -> Option<&str> {
    listed.lines().filter_map(|line| line.trim().strip_prefix("Depends: ")).find(|name| name.starts_with(PREFIX))
}

/// Downloads and unpacks it.
fn fetch(package: &str, into: &Path) -> Result<()> {
    fs::create_dir_all(into)?;
    // Downloaded as who we are: apt's own user may not write here.
    let mut download = Command::new("apt-get");
    download.args(["--quiet", "-o", "APT::Sandbox::User=root", "download", package]).current_dir(into);
    process::run(&mut download).context("cannot fetch the kernel; are the package lists of today (apt-get update)?")?;
    let archive = fs::read_dir(into)?.next().context("apt-get downloaded nothing")??.path();
    process::run(Command::new("dpkg-deb").arg("--extract").arg(&archive).arg(into))?;
    fs::remove_file(archive)?;
    let version = version(into)?;
    for name in UNUSED {
        let directory = into.join("lib/modules").join(&version).join("kernel").join(name);
        if directory.exists() {
            fs::remove_dir_all(directory)?;
        }
    }
    // Debian makes these lists when it installs a kernel.
    let depmod = process::find("depmod").context("depmod is not there: install kmod")?;
    process::run(Command::new(depmod).arg("--basedir").arg(into).arg(version))
}

/// The one version whose modules are in an unpacked package.
fn version(directory: &Path) -> Result<String> {
    let modules = directory.join("lib/modules");
    let entry = fs::read_dir(&modules).with_context(|| modules.display().to_string())?.next();
    let entry = entry.with_context(|| format!("{} is empty", modules.display()))??;
    Ok(entry.file_name().to_string_lossy().into_owned())
}

/// Files of the modules with these names, each after what it needs. In `modules.dep` a line is `FILE: FILE…`, with all
/// that the first needs, the nearest first.
fn in_order<'l>(list: &'l str, names: &[&str]) -> Vec<&'l str> {
    let mut files: Vec<&str> = Vec::new();
    for name in names {
        let line = list.lines().filter_map(|line| line.split_once(':')).find(|(file, _)| {
            let file = file.rsplit('/').next().unwrap_or(file);
            file.split('.').next().is_some_and(|stem| stem.replace('-', "_") == *name)
        });
        let Some((file, needed)) = line else { continue };
        for file in needed.split_whitespace().rev().chain([file]) {
            if !files.contains(&file) {
                files.push(file);
            }
        }
    }
    files
}

/// A module's bytes; newer kernels' are compressed.
fn plain(file: &Path) -> Result<Vec<u8>> {
    let context = || file.display().to_string();
    if file.extension().is_none_or(|extension| extension != "xz") {
        return fs::read(file).with_context(context);
    }
    let output = Command::new("xz").args(["--decompress", "--stdout"]).arg(file).output().with_context(context)?;
    if !output.status.success() {
        bail!("xz: {}: {}", file.display(), String::from_utf8_lossy(&output.stderr).trim());
    }
    Ok(output.stdout)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_package_leads_to_its_kernel() {
        let meta = "linux-image-amd64\n  Depends: linux-image-6.1.0-50-amd64\n";
        let kernel = "linux-image-6.1.0-50-amd64\n  Depends: kmod\n  Depends: linux-base\n |Depends: initramfs-tools\n";
        assert_eq!([meta, kernel].map(depends_on), [Some("linux-image-6.1.0-50-amd64"), None]);
    }

    #[test]
    fn modules_come_after_what_they_need_and_once() {
        let list = "kernel/net/9p/9pnet.ko:\n\
                    kernel/fs/9p/9p.ko.xz: kernel/net/9p/9pnet.ko kernel/fs/netfs/netfs.ko.xz kernel/fs/fscache.ko\n\
                    kernel/net/9p/9pnet_virtio.ko: kernel/net/9p/9pnet.ko kernel/drivers/virtio/virtio.ko\n\
                    kernel/fs/overlay-fs.ko:\n";
        let expected = [
            "kernel/drivers/virtio/virtio.ko",
            "kernel/net/9p/9pnet.ko",
            "kernel/net/9p/9pnet_virtio.ko",
            "kernel/fs/fscache.ko",
            "kernel/fs/netfs/netfs.ko.xz",
            "kernel/fs/9p/9p.ko.xz",
            "kernel/fs/overlay-fs.ko",
        ];
        assert_eq!(in_order(list, &["virtio_pci", "9pnet_virtio", "9p", "overlay_fs"]), expected);
    }
}
