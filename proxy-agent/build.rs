//! Builds the eBPF objects with the first toolchain that has the sources of `core`, and leaves them in `OUT_DIR`.
//!
//! The BPF target is tier 3: `core` must be built for it (`-Z build-std=core`), which a stable compiler does under
//! `RUSTC_BOOTSTRAP=1`. That variable is set for the inner build alone; no other crate of the agent sees it.
//!
//! | variable | meaning |
//! | --- | --- |
//! | `BPF_TOOLCHAIN` | a directory with `rustc` (and perhaps `cargo`), or the name of a rustup toolchain |
//! | `BPF_LINKER` | path of bpf-linker |
//! | `BPF_OBJECT` | path of an object `dataplane` that is already built, with `trace` beside it; nothing else is looked for |

use std::path::{Path, PathBuf};
use std::process::Command;
use std::{env, fs};

use anyhow::{Context as _, Result, bail};

/// The compiler, and the cargo to run it with.
struct Toolchain {
    cargo: Vec<String>,
    rustc: Vec<String>,
}

fn words(words: &[&str]) -> Vec<String> {
    words.iter().map(ToString::to_string).collect()
}

impl Toolchain {
    /// In the order of preference: named, the one that builds the agent, nightly, the distribution's.
    fn candidates() -> Result<Vec<Self>> {
        let (cargo, rustc) = (env::var("CARGO")?, env::var("RUSTC")?);
        if let Ok(named) = env::var("BPF_TOOLCHAIN") {
            if !named.starts_with('/') {
                let rustup = |tool| words(&["rustup", "run", &named, tool]);
                return Ok(vec![Self { cargo: rustup("cargo"), rustc: rustup("rustc") }]);
            }
            let own = format!("{named}/cargo");
            let cargo = if Path::new(&own).exists() { own } else { cargo };
            return Ok(vec![Self { cargo: vec![cargo], rustc: vec![format!("{named}/rustc")] }]);
        }
        let nightly = |tool| words(&["rustup", "run", "nightly", tool]);
        Ok(vec![
            Self { cargo: vec![cargo.clone()], rustc: vec![rustc] },
            Self { cargo: nightly("cargo"), rustc: nightly("rustc") },
            // Debian's compiler comes without a cargo of its own in some releases: ours drives it.
            Self { cargo: vec![cargo], rustc: words(&["/usr/bin/rustc"]) },
        ])
    }

    fn has_core_sources(&self) -> bool {
        let Some((program, arguments)) = self.rustc.split_first() else { return false };
        let output =
            Command::new(program).args(arguments).args(["--print", "sysroot"]).env_remove("RUSTUP_TOOLCHAIN").output();
        output.is_ok_and(|o| {
            let sysroot = String::from_utf8_lossy(&o.stdout);
            o.status.success()
                && Path::new(sysroot.trim()).join("lib/rustlib/src/rust/library/core/src/lib.rs").exists()
        })
    }
}

/// `$BPF_LINKER`, or the first on the path, or where `cargo install` puts it.
fn linker() -> Result<PathBuf> {
    if let Some(named) = env::var_os("BPF_LINKER") {
        return Ok(named.into());
    }
    let home = || Some(PathBuf::from(env::var_os("HOME")?).join(".cargo"));
    let installed = env::var_os("CARGO_HOME").map(PathBuf::from).or_else(home).map(|c| c.join("bin"));
    let path = env::var_os("PATH").unwrap_or_default();
    env::split_paths(&path)
        .chain(installed)
        .map(|dir| dir.join("bpf-linker"))
        .find(|file| file.exists())
        .context("bpf-linker not found: run `cargo xtask setup`, or set BPF_LINKER")
}

fn main() -> Result<()> {
    let out = PathBuf::from(env::var("OUT_DIR")?);
    let root = PathBuf::from(env::var("CARGO_MANIFEST_DIR")?).join("../proxy-ebpf");
    for watched in ["src", "Cargo.toml", "abi/src", "abi/Cargo.toml"] {
        println!("cargo::rerun-if-changed={}", root.join(watched).display());
    }
    for variable in ["BPF_TOOLCHAIN", "BPF_OBJECT", "BPF_LINKER"] {
        println!("cargo::rerun-if-env-changed={variable}");
    }
    let (object, trace) = (out.join("dataplane.o"), out.join("trace.o"));
    if let Ok(built) = env::var("BPF_OBJECT") {
        fs::copy(&built, &object).with_context(|| format!("BPF_OBJECT={built}"))?;
        let beside = Path::new(&built).with_file_name("trace");
        fs::copy(&beside, &trace).with_context(|| format!("{}, beside BPF_OBJECT", beside.display()))?;
        return Ok(());
    }
    let Some(toolchain) = Toolchain::candidates()?.into_iter().find(Toolchain::has_core_sources) else {
        bail!("no Rust toolchain with the sources of `core`: run `cargo xtask setup`, or set BPF_TOOLCHAIN");
    };
    let arch = env::var("CARGO_CFG_TARGET_ARCH")?;
    let endian = env::var("CARGO_CFG_TARGET_ENDIAN")?;
    let target = if endian == "big" { "bpfeb-unknown-none" } else { "bpfel-unknown-none" };
    let flags = [
        format!("--cfg=bpf_target_arch=\"{arch}\""),
        format!("-Clinker={}", linker()?.display()),
        "-Cdebuginfo=2".to_owned(),
        "-Clink-arg=--btf".to_owned(),
    ]
    .join("\x1f");
    let (program, arguments) = toolchain.cargo.split_first().context("empty BPF toolchain")?;
    let mut command = Command::new(program);
    // Cargo tells us of its own compiler and flags in the environment; the inner build must not see them.
    for (name, _) in env::vars_os() {
        let name = name.to_string_lossy().into_owned();
        if name.starts_with("CARGO") && name != "CARGO_HOME" || name.starts_with("RUST") && name != "RUSTUP_HOME" {
            command.env_remove(name);
        }
    }
    if let [rustc] = toolchain.rustc.as_slice() {
        command.env("RUSTC", rustc);
    }
    command
        .args(arguments)
        .args(["build", "--release", "--package", "proxy-ebpf", "--bins", "--target", target])
        .args(["-Z", "build-std=core", "--target-dir"])
        .arg(out.join("bpf"))
        .current_dir(&root)
        .env("RUSTC_BOOTSTRAP", "1")
        .env("CARGO_ENCODED_RUSTFLAGS", flags);
    if env::var_os("CARGO_FEATURE_LAYOUT_NEXT").is_some() {
        command.args(["--features", "layout-next"]);
    }
    let output = command.output().with_context(|| format!("{command:?}"))?;
    if !output.status.success() {
        bail!("{command:?}\n{}", String::from_utf8_lossy(&output.stderr));
    }
    let built = out.join("bpf").join(target).join("release");
    fs::copy(built.join("dataplane"), &object)?;
    fs::copy(built.join("trace"), &trace)?;
    Ok(())
}
