//! Building release programs with a progress bar, and becoming one of them.

use std::collections::{BTreeMap, BTreeSet};
use std::io::{BufRead as _, BufReader};
use std::os::unix::process::CommandExt as _;
use std::path::Path;
use std::process::{Command, Stdio};
use std::thread;

use anyhow::{Context as _, Result, bail};
use indicatif::{ProgressBar, ProgressStyle};
use serde_json::Value;

use crate::privilege::Privilege;
use crate::process;
use crate::setup::kubernetes;
use crate::test::AGENT;
use crate::workspace::Workspace;

/// Packages whose programs the demo and the bench consist of.
const PACKAGES: [&str; 2] = ["proxy-agent", "proxy-tests"];

/// Builds the agent and `program` for release, then becomes `program` as root. `assets` is where the Kubernetes programs
/// are, for those that use them.
pub(crate) fn run(workspace: &Workspace, program: &str, arguments: &[String], assets: Option<&Path>) -> Result<()> {
    build(workspace, program)?;
    let directory = workspace.target().join("release");
    let mut command: Command = Privilege::detect().command(directory.join(program)).with_context(|| {
        format!("`{program}` makes network namespaces: run it as root, or as a user who may use sudo")
    })?;
    command.args(arguments).current_dir(workspace.root()).env(AGENT, directory.join("proxy-agent"));
    if let Some(assets) = assets {
        command.env(kubernetes::ASSETS, assets);
    }
    Err(command.exec()).with_context(|| format!("cannot start `{}`", process::shown(&command)))
}

/// Builds, with a bar that counts packages.
fn build(workspace: &Workspace, program: &str) -> Result<()> {
    let packages = closure(&workspace.metadata(true)?).context("cargo metadata has another form")?;
    let style = "building {wide_bar} {pos}/{len} {msg:24!}";
    let bar = ProgressBar::new(packages.len() as u64).with_style(ProgressStyle::with_template(style)?);
    if bar.is_hidden() {
        println!("building {} packages for release", packages.len());
    }
    let mut command = workspace.cargo();
    command.args(["build", "--release", "--locked", "--quiet", "--message-format=json-render-diagnostics"]);
    command.args(["--bin", "proxy-agent", "--bin", program]);
    command.args(PACKAGES.iter().flat_map(|package| ["--package", package]));
    let mut child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn()?;
    let (messages, diagnostics) = (child.stdout.take(), child.stderr.take());
    thread::scope(|scope| {
        scope.spawn(|| {
            for line in diagnostics.into_iter().flat_map(|d| BufReader::new(d).lines()).map_while(Result::ok) {
                bar.suspend(|| eprintln!("{line}"));
            }
        });
        let mut built = BTreeSet::new();
        for line in messages.into_iter().flat_map(|m| BufReader::new(m).lines()).map_while(Result::ok) {
            let message: Value = serde_json::from_str(&line).unwrap_or_default();
            let Some(package) = message["package_id"].as_str().filter(|id| packages.contains(*id)) else { continue };
            bar.set_message(message["target"]["name"].as_str().unwrap_or_default().to_owned());
            // A package says several things: its build script, its library, its programs.
            if built.insert(package.to_owned()) {
                bar.inc(1);
            }
        }
    });
    let status = child.wait()?;
    bar.finish_and_clear();
    if !status.success() {
        bail!("`{}`: {status}", process::shown(&command));
    }
    Ok(())
}

/// Ids of all packages that the programs are made of, development dependencies aside.
fn closure(metadata: &Value) -> Option<BTreeSet<String>> {
    let nodes = metadata["resolve"]["nodes"].as_array()?;
    let by_id: BTreeMap<&str, &Value> = nodes.iter().filter_map(|node| Some((node["id"].as_str()?, node))).collect();
    let ours = metadata["packages"].as_array()?.iter().filter(|package| {
        let name = package["name"].as_str().unwrap_or_default();
        PACKAGES.contains(&name)
    });
    let mut open: Vec<&str> = ours.filter_map(|package| package["id"].as_str()).collect();
    let mut found = BTreeSet::new();
    while let Some(id) = open.pop() {
        if !found.insert(id.to_owned()) {
            continue;
        }
        for dependency in by_id.get(id).into_iter().filter_map(|node| node["deps"].as_array()).flatten() {
            if dependency["dep_kinds"].as_array().is_some_and(|kinds| kinds.iter().any(|kind| kind["kind"] != "dev")) {
                open.extend(dependency["pkg"].as_str());
            }
        }
    }
    Some(found)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn closure_follows_all_but_development_dependencies() {
        let dependency = |id: &str, kind: Value| json!({"pkg": id, "dep_kinds": [{"kind": kind}]});
        let metadata = json!({
            "packages": [{"name": "proxy-agent", "id": "agent"}, {"name": "xtask", "id": "xtask"}],
            "resolve": {"nodes": [
                {"id": "agent", "deps": [dependency("kube", Value::Null), dependency("rstest", json!("dev"))]},
                {"id": "kube", "deps": [dependency("cc", json!("build"))]},
                {"id": "cc", "deps": []},
                {"id": "xtask", "deps": []},
            ]},
        });
        let expected = ["agent", "cc", "kube"].map(str::to_owned).into();
        assert_eq!(closure(&metadata), Some(expected));
    }
}
