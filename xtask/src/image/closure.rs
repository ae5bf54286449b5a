//! A program of this machine's with all that it needs to run elsewhere: its loader, its libraries, their licences.

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context as _, Result, bail};

use super::Files;
use crate::process;

/// The program and all that the loader would load for it, each at the place where it is here.
pub(super) fn of(program: &Path) -> Result<Files> {
    let listed = process::read(Command::new("ldd").arg(program))?;
    let libraries = libraries(&listed).with_context(|| format!("ldd cannot find all of {}", program.display()))?;
    if libraries.is_empty() {
        bail!("ldd lists no libraries of {}", program.display());
    }
    let mut files = Files::new();
    let mut licences = BTreeMap::new();
    for path in libraries.iter().map(PathBuf::as_path).chain([program]) {
        let context = || path.display().to_string();
        let mode = fs::metadata(path).with_context(context)?.permissions().mode() & 0o777;
        files.insert(inside(path)?, (mode, fs::read(path).with_context(context)?));
        if let Some(licence) = licence(path) {
            licences.insert(inside(&licence)?, (0o644, fs::read(&licence)?));
        }
    }
    files.extend(licences);
    Ok(files)
}

/// The files in what ldd prints; `None` when one was not found. The kernel's own library is no file.
///
/// ```text
///   linux-vdso.so.1 (0x…)
///   libmnl.so.0 => /lib/x86_64-linux-gnu/libmnl.so.0 (0x…)
///   /lib64/ld-linux-x86-64.so.2 (0x…)
/// ```
fn libraries(listed: &str) -> Option<Vec<PathBuf>> {
    let file = |line: &str| {
        let found = line.split_once(" => ").map_or(line, |(_, found)| found);
        let path = found.split(" (").next().unwrap_or(found).trim();
        if path == "not found" { None } else { Some(path.starts_with('/').then(|| PathBuf::from(path))) }
    };
    let files: Option<Vec<_>> = listed.lines().map(file).collect();
    Some(files?.into_iter().flatten().collect())
}

/// Where Debian keeps the licence of the package that has this file; `None` elsewhere.
fn licence(file: &Path) -> Option<PathBuf> {
    // A file may be in the package's list with or without the `/usr` that the two names share.
    let names = [Some(file.to_owned()), fs::canonicalize(file).ok()];
    let owner = |name: &PathBuf| process::read(Command::new("dpkg-query").arg("--search").arg(name)).ok();
    let owner = names.iter().flatten().find_map(owner)?;
    let package = owner.split([':', ',']).next()?.trim();
    let licence = Path::new("/usr/share/doc").join(package).join("copyright");
    licence.exists().then_some(licence)
}

/// The same path below the image's root.
fn inside(path: &Path) -> Result<PathBuf> {
    Ok(path.strip_prefix("/").with_context(|| format!("{} is not absolute", path.display()))?.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn files_are_read_from_what_ldd_prints() {
        let vdso = "\tlinux-vdso.so.1 (0x00007f0ce5e00000)\n";
        let found = format!(
            "{vdso}\tlibmnl.so.0 => /lib/x86_64-linux-gnu/libmnl.so.0 (0x00007f0ce5ae9000)\n\t/lib64/ld-linux-x86-64.so.2 \
             (0x00007f0ce5e02000)\n"
        );
        let lacking = format!("{vdso}\tlibmnl.so.0 => not found\n");
        let files = ["/lib/x86_64-linux-gnu/libmnl.so.0", "/lib64/ld-linux-x86-64.so.2"].map(PathBuf::from);
        assert_eq!([libraries(&found), libraries(&lacking)], [Some(files.to_vec()), None]);
    }

    #[test]
    fn a_program_finds_all_of_its_libraries_in_what_is_shipped() {
        let root = std::env::temp_dir().join(format!("xtask-closure-{}", std::process::id()));
        let shell = fs::canonicalize("/bin/sh").expect("a shell");
        let files = of(&shell).expect("a closure");
        super::super::unpack(&files, &root).expect("unpacked");
        let is_loader =
            |path: &&PathBuf| path.file_name().is_some_and(|name| name.to_string_lossy().starts_with("ld-"));
        let loader = files.keys().find(is_loader).expect("a loader");
        let directories: Vec<_> = files.keys().filter_map(|path| path.parent()).collect();
        let path = directories.iter().map(|directory| root.join(directory).display().to_string());
        let path = path.collect::<Vec<_>>().join(":");
        let run = |arguments: &[&str]| {
            let mut command = Command::new(root.join(loader));
            command.args(["--inhibit-cache", "--library-path", &path]).args(arguments);
            process::read(&mut command).expect("it runs")
        };
        let shell = root.join(inside(&shell).expect("absolute")).display().to_string();
        let said = run(&[&shell, "-c", "echo it runs"]);
        let listed = libraries(&run(&["--list", &shell])).expect("all found");
        fs::remove_dir_all(&root).expect("gone");
        assert_eq!(said, "it runs\n");
        assert_eq!(listed.iter().filter(|file| !file.starts_with(&root)).collect::<Vec<_>>(), Vec::<&PathBuf>::new());
    }
}
