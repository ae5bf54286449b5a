//! bpf-linker: turns the bitcode of the kernel programs into one eBPF object with BTF.
//!
//! It is linked to an LLVM that must be no older than the one of the compiler whose bitcode it reads.

use std::path::PathBuf;
use std::process::Command;
use std::{env, fs};

use anyhow::{Context as _, Result};

use super::apt::Apt;
use super::compiler::Compiler;
use super::report::Row;
use crate::process;
use crate::workspace::Workspace;

const VERSION: &str = "0.13.0";

/// LLVM releases that this version can be linked to, the one we test with first.
const LLVM: [u32; 3] = [22, 23, 21];

const WHAT: &str = "bpf-linker";

/// An installed LLVM with its headers.
struct Llvm {
    major: u32,
    prefix: PathBuf,
}

impl Llvm {
    /// The first usable one that is not older than `oldest`.
    fn find(oldest: u32) -> Option<Self> {
        LLVM.into_iter().filter(|major| *major >= oldest).find_map(|major| {
            let programs = [
                format!("/usr/lib/llvm-{major}/bin/llvm-config"),
                format!("llvm-config-{major}"),
                "llvm-config".to_owned(),
            ];
            programs.iter().find_map(|program| {
                let ask = |question| process::read(Command::new(program).arg(question)).ok();
                let prefix = PathBuf::from(ask("--prefix")?.trim());
                let right = process::version(&ask("--version")?)?.0 == major;
                (right && prefix.join("include/llvm-c/Core.h").exists()).then_some(Self { major, prefix })
            })
        })
    }
}

/// Finds or installs it.
pub(super) fn provide(workspace: &Workspace, apt: Option<&Apt>) -> Row {
    if env::var_os("BPF_OBJECT").is_some() {
        return Row::present(WHAT, "not needed: BPF_OBJECT names an object that is already built");
    }
    if let Some(found) = installed() {
        return Row::present(WHAT, &found);
    }
    if env::var_os("BPF_LINKER").is_some() {
        return Row::missing(WHAT, &format!("BPF_LINKER names no bpf-linker {VERSION} or later: mend or unset it"));
    }
    let oldest = Compiler::chosen().map_or(LLVM[0], |compiler| compiler.llvm);
    match (install(workspace, apt, oldest), installed()) {
        (Ok(how), Some(_)) => Row::installed(WHAT, &how),
        (Ok(_), None) => Row::missing(WHAT, "installed, but neither on PATH nor in cargo's bin directory"),
        (Err(error), _) => Row::missing(
            WHAT,
            &format!(
                "{error:#}\ninstall LLVM {oldest} or later with headers (Debian: llvm-22-dev libpolly-22-dev libzstd-dev \
                 g++), then run this again; or set BPF_LINKER"
            ),
        ),
    }
}

/// Path and version, if the build script would find one that is new enough.
fn installed() -> Option<String> {
    let named = env::var_os("BPF_LINKER").map(PathBuf::from);
    let file =
        named.or_else(|| process::find(WHAT)).or_else(|| process::executable(&process::cargo_bin()?.join(WHAT)))?;
    let version = process::version(&process::read(Command::new(&file).arg("--version")).ok()?)?;
    (version >= process::version(VERSION)?).then(|| format!("{} {}.{}", file.display(), version.0, version.1))
}

/// Builds it, and says how.
fn install(workspace: &Workspace, apt: Option<&Apt>, oldest: u32) -> Result<String> {
    let from_apt = || {
        let apt = apt?;
        let name = |major| format!("llvm-{major}-dev");
        let major = LLVM.into_iter().find(|&major| major >= oldest && apt.candidate(&name(major)).is_some())?;
        let (llvm, polly) = (name(major), format!("libpolly-{major}-dev"));
        apt.install(&[&llvm, &polly, "libzstd-dev", "zlib1g-dev", "g++"]).ok()?;
        Llvm::find(oldest)
    };
    let mut command = workspace.cargo();
    command.args(["install", WHAT, "--version", VERSION, "--locked", "--force"]);
    let Some(llvm) = Llvm::find(oldest).or_else(from_apt) else { return prebuilt(workspace, apt) };
    let Llvm { major, prefix } = &llvm;
    // LLVM_PREFIX: otherwise its build script asks the first `llvm-config` on PATH, which may be another release.
    command.env("LLVM_PREFIX", prefix).env(format!("LLVM_SYS_{major}1_PREFIX"), prefix);
    process::run(command.arg("--no-default-features").arg(format!("--features=llvm-{major}")))?;
    Ok(format!("cargo install {WHAT} {VERSION}, with LLVM {major} of {}", prefix.display()))
}

/// Takes the program that its project publishes, which has its LLVM inside, and says so.
fn prebuilt(workspace: &Workspace, apt: Option<&Apt>) -> Result<String> {
    println!("no LLVM that fits, here or in the package lists: taking the program that its project publishes");
    let directory = process::cargo_bin().context("neither CARGO_HOME nor HOME is set")?;
    let lacking: Vec<_> = ["curl", "tar", "zstd"].into_iter().filter(|tool| process::find(tool).is_none()).collect();
    if !lacking.is_empty() {
        apt.with_context(|| format!("install {}", lacking.join(" ")))?.install(&lacking)?;
    }
    let name = format!("{WHAT}-{}-unknown-linux-musl.tar.zst", env::consts::ARCH);
    let archive = env::temp_dir().join(format!("{}-{name}", std::process::id()));
    let url = format!("https://github.com/aya-rs/{WHAT}/releases/download/v{VERSION}/{name}");
    let fetched = process::run(
        workspace
            .command("curl")
            .args(["--fail", "--location", "--max-time", "120", "--output"])
            .arg(&archive)
            .arg(&url),
    );
    let unpacked = fetched.and_then(|()| {
        fs::create_dir_all(&directory)?;
        process::run(
            workspace.command("tar").arg("--zstd").arg("-xf").arg(&archive).arg("-C").arg(&directory).arg(WHAT),
        )
    });
    // It may not exist; what it leaves is only a file in the directory for such.
    let _ = fs::remove_file(&archive);
    unpacked.map(|()| format!("{url} in {}", directory.display()))
}
