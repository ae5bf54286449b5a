//! The test binaries of the workspace.

use std::path::{Path, PathBuf};
use std::process::Stdio;

use anyhow::{Context as _, Result};
use serde_json::Value;

use super::level::Level;
use crate::process;
use crate::workspace::Workspace;

/// Packages that have tests: none of them may silently run nothing. The layouts of proxy-abi are asserted when it is
/// compiled.
pub(crate) const WITH_TESTS: [&str; 5] = ["proxy-ebpf", "proxy-core", "proxy-agent", "proxy-tests", "xtask"];

/// One executable with tests in it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct TestBinary {
    /// Its package.
    pub(crate) package: String,
    /// Package and target, as it is shown.
    pub(crate) name: String,
    /// What it needs.
    pub(crate) level: Level,
    /// Whether it is a file of its own, which must have tests in it.
    pub(crate) is_test_file: bool,
    /// What is run.
    pub(crate) executable: PathBuf,
    /// The package's directory, in which cargo runs tests.
    pub(crate) directory: PathBuf,
}

/// Builds all programs and all tests.
pub(crate) fn build(workspace: &Workspace) -> Result<Vec<TestBinary>> {
    // The tests of one package start the programs of another; `cargo test` would not build those.
    process::run(workspace.cargo().args(["build", "--workspace", "--bins", "--locked"]))?;
    // What the test of upgrades upgrades to. It shares all dependencies with the agent itself.
    let next =
        ["build", "--package", "proxy-agent", "--bin", "proxy-agent-next", "--features", "layout-next", "--locked"];
    process::run(workspace.cargo().args(next))?;
    let mut command = workspace.cargo();
    command.args(["test", "--workspace", "--all-targets", "--no-run", "--locked"]);
    command.arg("--message-format=json-render-diagnostics").stderr(Stdio::inherit());
    println!("$ {}", process::shown(&command));
    let mut binaries: Vec<_> = process::read(&mut command)?
        .lines()
        .filter_map(|line| TestBinary::parse(line).transpose())
        .collect::<Result<_>>()?;
    binaries.sort_by(|a, b| (a.level, &a.name).cmp(&(b.level, &b.name)));
    Ok(binaries)
}

impl TestBinary {
    /// From a line of cargo's messages; `None` for lines about anything but a test executable.
    fn parse(line: &str) -> Result<Option<Self>> {
        if !line.starts_with('{') {
            return Ok(None);
        }
        let message: Value = serde_json::from_str(line).context("cargo's messages are JSON")?;
        let (Some(executable), Some(true)) = (message["executable"].as_str(), message["profile"]["test"].as_bool())
        else {
            return Ok(None);
        };
        let kind = message["target"]["kind"][0].as_str().unwrap_or_default();
        // Benches and examples are built to see that they build.
        if !["lib", "bin", "test"].contains(&kind) {
            return Ok(None);
        }
        let text = |value: &Value| value.as_str().map(str::to_owned).context("cargo's messages have another form");
        let target = text(&message["target"]["name"])?;
        let package = package_name(&text(&message["package_id"])?).to_owned();
        let manifest = PathBuf::from(text(&message["manifest_path"])?);
        let level = if kind == "test" { Level::of_file(&package, &target) } else { Level::of_library(&package) };
        Ok(Some(Self {
            name: format!("{package}: {kind} {target}"),
            package,
            level,
            is_test_file: kind == "test",
            executable: executable.into(),
            directory: manifest.parent().map_or_else(PathBuf::new, Path::to_path_buf),
        }))
    }
}

/// The name in a package id: `path+file:///src/core#proxy-core@0.1.0`, or `path+file:///src/xtask#0.1.0` where the
/// directory has the package's name.
fn package_name(id: &str) -> &str {
    let (url, fragment) = id.split_once('#').unwrap_or((id, ""));
    match fragment.split_once('@') {
        Some((name, _)) => name,
        None => url.rsplit('/').next().unwrap_or(url),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn test_executables_are_read_from_messages() {
        let line = |kind: &str, test: bool| {
            format!(
                r#"{{"reason":"compiler-artifact","package_id":"path+file:///src/tests#proxy-tests@0.1.0",
                "manifest_path":"/src/tests/Cargo.toml","target":{{"kind":["{kind}"],"name":"packets"}},
                "profile":{{"test":{test}}},"executable":"/target/packets-1"}}"#
            )
        };
        let expected = TestBinary {
            package: "proxy-tests".to_owned(),
            name: "proxy-tests: test packets".to_owned(),
            level: Level::Packet,
            is_test_file: true,
            executable: "/target/packets-1".into(),
            directory: "/src/tests".into(),
        };
        assert_eq!(TestBinary::parse(&line("test", true)).expect("valid"), Some(expected));
        assert_eq!(TestBinary::parse(&line("bin", false)).expect("valid"), None);
        assert_eq!(TestBinary::parse(&line("bench", true)).expect("valid"), None);
        assert_eq!(TestBinary::parse("   Compiling").expect("not a message"), None);
        assert_eq!(package_name("path+file:///src/xtask#0.1.0"), "xtask");
    }
}
