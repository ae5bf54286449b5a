//! What may depend on what: the pure crates' manifests, and the lock file against the bans of `deny.toml`.

use super::Finding;
use super::source::Repository;

/// Manifests whose dependencies are the architecture, and all that they may name. Development dependencies are free.
const PURE: [(&str, &[&str]); 3] = [
    ("proxy-ebpf/abi/Cargo.toml", &["aya"]),
    ("proxy-ebpf/Cargo.toml", &["proxy-abi", "aya-ebpf"]),
    ("proxy-agent/core/Cargo.toml", &["ipnet", "proxy-abi", "thiserror"]),
];

/// The only registry. In two halves, because no other file names it either.
const REGISTRY: &str = "registry+https://github.com/rust-lang/";

/// A crate that `deny.toml` bans, but for those that wrap it.
#[derive(Debug, PartialEq, Eq)]
struct Ban {
    name: String,
    wrappers: Vec<String>,
}

/// A package of the lock file.
#[derive(Debug, Default, PartialEq, Eq)]
struct Locked {
    line: usize,
    name: String,
    source: Option<String>,
    dependencies: Vec<String>,
}

pub(super) fn manifests(repository: &Repository) -> Vec<Finding> {
    let mut findings = Vec::new();
    for (path, allowed) in PURE {
        let Some(file) = repository.file(path) else { continue };
        for (line, name) in dependencies(&file.text) {
            if !allowed.contains(&name.as_str()) {
                let message = format!("`{name}` is not among {allowed:?}: this crate is pure, do it in another one");
                findings.push(Finding::new(path, line, message));
            }
        }
    }
    for file in repository.files().filter(|file| file.path.ends_with("Cargo.toml")) {
        let is_package = file.text.lines().any(|line| line.trim() == "[package]");
        let lints =
            file.text.split("[lints]").nth(1).is_some_and(|rest| rest.trim_start().starts_with("workspace = true"));
        if is_package && !lints {
            findings.push(Finding::new(&file.path, 0, "add `[lints]` with `workspace = true`"));
        }
    }
    findings
}

/// Names (and lines) in `[dependencies]`, `[build-dependencies]` and their forms for certain targets.
fn dependencies(manifest: &str) -> Vec<(usize, String)> {
    let mut found = Vec::new();
    let mut inside = false;
    for (number, line) in manifest.lines().enumerate() {
        let line = line.trim();
        if let Some(header) = line.strip_prefix('[').and_then(|line| line.strip_suffix(']')) {
            let table = header.rsplit('.').next().unwrap_or(header);
            inside = ["dependencies", "build-dependencies"].contains(&table);
            // `[dependencies.name]` is a dependency by itself.
            if let Some((parent, name)) = header.rsplit_once('.')
                && parent.ends_with("dependencies")
                && !parent.ends_with("dev-dependencies")
            {
                found.push((number + 1, name.to_owned()));
            }
        } else if inside && !line.is_empty() && !line.starts_with('#') {
            let name = line.split(['=', '.']).next().unwrap_or(line).trim();
            // Lines that continue a list or a table have no name of their own.
            if line.contains('=') {
                found.push((number + 1, name.trim_matches('"').to_owned()));
            }
        }
    }
    found
}

pub(super) fn lock_file(repository: &Repository) -> Vec<Finding> {
    let (Some(deny), Some(lock)) = (repository.file("deny.toml"), repository.file("Cargo.lock")) else {
        return vec![Finding::new("deny.toml", 0, "deny.toml and Cargo.lock are part of the repository")];
    };
    let (bans, packages) = (bans(&deny.text), packages(&lock.text));
    let mut findings = Vec::new();
    for package in &packages {
        if let Some(source) = package.source.as_deref().filter(|source| !source.starts_with(REGISTRY)) {
            let message =
                format!("`{}` comes from {source}: only published crates can be built everywhere", package.name);
            findings.push(Finding::new("Cargo.lock", package.line, message));
        }
        for ban in bans.iter().filter(|ban| package.dependencies.contains(&ban.name)) {
            if !ban.wrappers.contains(&package.name) {
                let message = format!(
                    "`{}` depends on `{}`, which deny.toml bans (see its reason there)",
                    package.name, ban.name
                );
                findings.push(Finding::new("Cargo.lock", package.line, message));
            }
        }
    }
    findings
}

/// The entries of `deny = [ … ]`, one a line: `{ crate = "x", wrappers = ["y"], reason = "…" },`.
fn bans(deny: &str) -> Vec<Ban> {
    let entries = deny.lines().filter_map(|line| line.trim().strip_prefix("{ crate = \""));
    entries
        .map(|entry| {
            let name = entry.split('"').next().unwrap_or_default();
            let wrappers =
                entry.split_once("wrappers = [").and_then(|(_, rest)| rest.split(']').next()).unwrap_or_default();
            Ban { name: name.to_owned(), wrappers: wrappers.split('"').skip(1).step_by(2).map(str::to_owned).collect() }
        })
        .collect()
}

/// The packages of a `Cargo.lock`, which cargo writes one value a line.
fn packages(lock: &str) -> Vec<Locked> {
    let mut packages: Vec<Locked> = Vec::new();
    for (number, line) in lock.lines().enumerate() {
        if line == "[[package]]" {
            packages.push(Locked { line: number + 1, ..Locked::default() });
            continue;
        }
        let Some(package) = packages.last_mut() else { continue };
        let value = line.split('"').nth(1).unwrap_or_default();
        if line.starts_with("name = ") {
            value.clone_into(&mut package.name);
        } else if line.starts_with("source = ") {
            package.source = Some(value.to_owned());
        } else if line.starts_with(" \"") {
            // `"name"`, or `"name version"` where there are several.
            package.dependencies.extend(value.split(' ').next().map(str::to_owned));
        }
    }
    packages
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dependencies_of_pure_crates_are_listed() {
        let manifest = "[package]\nname = \"proxy-core\"\n[dependencies]\nipnet.workspace = true\ntokio = { version = \"1\",\n\
                        features = [\"rt\"] }\n[dependencies.kube]\nversion = \"5\"\n[dev-dependencies]\nproptest = \"1\"\n\
                        [target.'cfg(unix)'.dependencies]\nlibc = \"0.2\"\n[lints]\nworkspace = true\n";
        let found = dependencies(manifest);
        let names: Vec<_> = found.iter().map(|(_, name)| name.as_str()).filter(|name| *name != "features").collect();
        assert_eq!(names, ["ipnet", "tokio", "kube", "libc"]);
        let findings = manifests(&Repository::of(&[("proxy-agent/core/Cargo.toml", manifest)]));
        let lines: Vec<_> = findings.iter().map(|finding| finding.line).collect();
        assert!(
            [5, 7, 12].iter().all(|line| lines.contains(line)) && !lines.contains(&4) && !lines.contains(&10),
            "{lines:?}"
        );
    }

    #[test]
    fn manifests_take_the_workspace_lints() {
        let without = Repository::of(&[("a/Cargo.toml", "[package]\nname = \"a\"\n"), ("Cargo.toml", "[workspace]\n")]);
        assert_eq!(manifests(&without).iter().map(|f| f.path.as_str()).collect::<Vec<_>>(), ["a/Cargo.toml"]);
    }

    #[test]
    fn lock_file_is_held_against_the_bans() {
        let deny = "[bans]\ndeny = [\n    { crate = \"openssl-sys\", reason = \"a\" },\n    \
                    { crate = \"aya\", wrappers = [\"proxy-abi\", \"proxy-agent\"], reason = \"b\" },\n]\n";
        let package = |name: &str, source: &str, dependency: &str| {
            let source = if source.is_empty() { String::new() } else { format!("source = \"{source}\"\n") };
            format!(
                "[[package]]\nname = \"{name}\"\nversion = \"1\"\n{source}dependencies = [\n \"{dependency}\",\n]\n\n"
            )
        };
        let registry = format!("{REGISTRY}x");
        let lock = package("proxy-agent", "", "aya 0.14.0")
            + &package("proxy-core", "", "aya")
            + &package("native-tls", &registry, "openssl-sys")
            + &package("fork", "git+https://example.org/fork#1", "libc");
        let findings = lock_file(&Repository::of(&[("deny.toml", deny), ("Cargo.lock", &lock)]));
        assert_eq!(findings.iter().map(|f| f.line).collect::<Vec<_>>(), [8, 15, 23]);
        assert_eq!(lock_file(&Repository::default()).len(), 1);
    }
}
