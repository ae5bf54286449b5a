//! kube-apiserver, etcd and kube-proxy, for the tests against the real ones.
//!
//! They are found where `KUBEBUILDER_ASSETS` points (the convention of controller-runtime's envtest), else built from
//! the Go tool dependencies of `tests/kube/go.mod` into `$XDG_CACHE_HOME/proxy-agent/kube/VERSION/`.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Instant;
use std::{env, fs, process as own};

use anyhow::{Context as _, Result, bail};

use super::report::Row;
use crate::process;
use crate::workspace::Workspace;

/// The variable that names a directory with the programs.
pub(crate) const ASSETS: &str = "KUBEBUILDER_ASSETS";

/// How to get them, for whoever has neither them nor Go.
pub(crate) const ADVICE: &str = "install Go 1.21 or later (https://go.dev/dl), or set KUBEBUILDER_ASSETS to a directory with kube-apiserver and etcd";

/// Programs and the packages they are built from.
const TOOLS: [(&str, &str); 3] = [
    ("kube-apiserver", "k8s.io/kubernetes/cmd/kube-apiserver"),
    ("kube-proxy", "k8s.io/kubernetes/cmd/kube-proxy"),
    ("etcd", "go.etcd.io/etcd/server/v3"),
];

/// Without these there is no API server; kube-proxy is only for comparison.
const NEEDED: [&str; 2] = ["kube-apiserver", "etcd"];

/// Names what the programs in a directory were built from.
const STAMP: &str = "built-from";

const WHAT: &str = "kube-apiserver, etcd, kube-proxy";

/// The cache directory of one version of `go.mod`.
struct Cache {
    version: String,
    directory: PathBuf,
    stamp: String,
}

impl Cache {
    fn of(workspace: &Workspace) -> Result<Self> {
        let file = workspace.root().join("tests/kube/go.mod");
        let module = fs::read_to_string(&file).with_context(|| file.display().to_string())?;
        let version = kubernetes(&module).context("tests/kube/go.mod requires no k8s.io/kubernetes")?.to_owned();
        let directory = process::cache()?.join("proxy-agent/kube").join(&version);
        Ok(Self { version, directory, stamp: module })
    }

    fn complete(&self) -> bool {
        fs::read_to_string(self.directory.join(STAMP)).is_ok_and(|stamp| stamp == self.stamp)
            && TOOLS.iter().all(|(name, _)| process::executable(&self.directory.join(name)).is_some())
    }

    /// Builds beside the place and moves it there whole, so that nobody ever sees half of it.
    fn build(&self, workspace: &Workspace, go: &Path) -> Result<()> {
        let fresh = self.directory.with_file_name(format!("{}.new-{}", self.version, own::id()));
        fs::create_dir_all(&fresh)?;
        let built = TOOLS.iter().try_for_each(|(name, package)| {
            let mut command = workspace.command(go);
            command
                .current_dir(workspace.root().join("tests/kube"))
                .env("CGO_ENABLED", "0")
                .env("GOFLAGS", "-buildvcs=false");
            command.args(["build", "-trimpath", "-ldflags", &link_flags(&self.version), "-o"]);
            process::run(command.arg(fresh.join(name)).arg(package))
        });
        let moved = built.and_then(|()| {
            fs::write(fresh.join(STAMP), &self.stamp)?;
            if self.directory.exists() {
                fs::remove_dir_all(&self.directory)?;
            }
            Ok(fs::rename(&fresh, &self.directory)?)
        });
        if moved.is_err() {
            // The build's own error is the one to tell; what is left here is only disk space.
            let _ = fs::remove_dir_all(&fresh);
        }
        moved
    }
}

/// The version of k8s.io/kubernetes that a `go.mod` requires, with its `v`.
fn kubernetes(module: &str) -> Option<&str> {
    module.lines().find_map(|line| {
        let mut words = line.split_whitespace().skip_while(|word| *word == "require");
        (words.next() == Some("k8s.io/kubernetes")).then(|| words.next()).flatten()
    })
}

/// Small programs that know their own version, as Kubernetes' release build makes them.
fn link_flags(version: &str) -> String {
    const PACKAGE: &str = "k8s.io/component-base/version";
    let (major, minor) = process::version(version).unwrap_or_default();
    format!(
        "-s -w -X {PACKAGE}.gitVersion={version} -X {PACKAGE}.gitMajor={major} -X {PACKAGE}.gitMinor={minor} \
         -X {PACKAGE}.gitTreeState=clean"
    )
}

/// The Go tool, on `PATH` or where its installer puts it, if it knows tool dependencies' toolchain switching.
pub(crate) fn go() -> Option<PathBuf> {
    let file = process::find("go").or_else(|| process::executable(Path::new("/usr/local/go/bin/go")))?;
    let version = process::version(&process::read(Command::new(&file).arg("version")).ok()?)?;
    (version >= (1, 21)).then_some(file)
}

/// The directory that has them, without building anything.
pub(crate) fn locate(workspace: &Workspace) -> Result<PathBuf> {
    if let Some(named) = env::var_os(ASSETS).filter(|named| !named.is_empty()) {
        let named = PathBuf::from(named);
        if let Some(lacking) = NEEDED.iter().find(|name| process::executable(&named.join(name)).is_none()) {
            bail!("{ASSETS}={} has no {lacking}", named.display());
        }
        return Ok(named);
    }
    let cache = Cache::of(workspace)?;
    if !cache.complete() {
        bail!("{} is not there or was built from another go.mod", cache.directory.display());
    }
    Ok(cache.directory)
}

/// Finds them, or builds them when `build` says so and Go is there.
pub(crate) fn provide(workspace: &Workspace, build: bool) -> Row {
    match locate(workspace) {
        Ok(directory) => return Row::present(WHAT, &directory.display().to_string()),
        Err(error) if env::var_os(ASSETS).is_some_and(|named| !named.is_empty()) => {
            return Row::missing(WHAT, &format!("{error:#}"));
        }
        Err(_) => {}
    }
    let Some(go) = go().filter(|_| build) else { return Row::missing(WHAT, ADVICE) };
    println!("building {WHAT} from tests/kube/go.mod: about six minutes on two cores from an empty cache");
    let start = Instant::now();
    let built = Cache::of(workspace).and_then(|cache| cache.build(workspace, &go).map(|()| cache));
    match built {
        Ok(cache) => {
            let action = format!("built in {} s: {}", start.elapsed().as_secs(), cache.directory.display());
            Row::installed(WHAT, &action)
        }
        Err(error) => Row::missing(WHAT, &format!("{error:#}")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kubernetes_version_is_read_from_either_form_of_require() {
        let cases = [
            ("require k8s.io/kubernetes v1.36.3\n", Some("v1.36.3")),
            ("require (\n\tk8s.io/kubelet v0.36.3\n\tk8s.io/kubernetes v1.36.3 // indirect\n)\n", Some("v1.36.3")),
            ("tool k8s.io/kubernetes/cmd/kube-proxy\n", None),
        ];
        assert_eq!(cases.map(|(module, _)| kubernetes(module)), cases.map(|(_, version)| version));
    }

    #[test]
    fn go_mod_of_the_repository_pins_every_tool() {
        let module = fs::read_to_string(Workspace::find().root().join("tests/kube/go.mod")).expect("tests/kube/go.mod");
        assert!(kubernetes(&module).is_some());
        let (_, tools) = module.split_once("tool (").expect("a block of tools");
        let pinned: Vec<_> = TOOLS.iter().filter(|(_, package)| tools.contains(package)).collect();
        assert_eq!(pinned, TOOLS.iter().collect::<Vec<_>>());
    }
}
