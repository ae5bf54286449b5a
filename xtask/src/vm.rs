//! `cargo xtask vm -- COMMAND…`: one command on another kernel, with everything else as it is here.
//!
//! ```text
//!   Debian's kernel in qemu          kernel.rs      fetched and unpacked once, never installed
//!     initramfs                      initramfs.rs   busybox, the modules up to the root, two scripts
//!     /         overlay              this machine's root by 9p, read-only; what is written is in memory and gone
//!     ttyS0     the kernel's words, and at last the exit code: shown when there is none
//!     ttyS1     what the command says: our stdout
//! ```
//!
//! The command runs as root, in the current directory and with the environment that this was called in. There is no network but
//! `lo`. Where the processor can run machines, and `/dev/kvm` can be opened, they are used; else it is emulated, ten to twenty
//! times slower.

mod initramfs;
mod kernel;

use std::ffi::OsString;
use std::fs::{self, File};
use std::io::{Read as _, Seek as _, Write as _};
use std::os::fd::AsRawFd as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;
use std::{env, process as own};

use anyhow::{Context as _, Result, bail};

use crate::process;
use crate::setup;
use initramfs::{EXIT, Initramfs};
use kernel::Kernel;

const QEMU: &str = "qemu-system-x86_64";
/// What the machine is made of, whatever its kernel. `-no-reboot` makes a kernel that panics end.
const MACHINE: [&str; 12] = [
    "-nodefaults",
    "-no-user-config",
    "-no-reboot",
    "-display",
    "none",
    "-cpu",
    "max",
    "-smp",
    "2",
    "-m",
    "3072",
    "-virtfs",
];
/// This machine's root, under the name that the initramfs mounts it by.
const ROOT: &str = "local,path=/,mount_tag=root,security_model=none,readonly=on,multidevs=remap";
/// Mitigations cost much where the processor is emulated, and nobody else is in there.
const BOOT: &str = "console=ttyS0 quiet panic=-1 mitigations=off nosoftlockup random.trust_cpu=on";
/// What `timeout` of coreutils returns when it had to end what it ran.
const TIMED_OUT: i32 = 124;
/// How much of the kernel's words is shown when it gave no exit code.
const LAST_LINES: usize = 40;

/// Options of `vm`.
#[derive(clap::Args, Debug)]
pub(crate) struct Arguments {
    /// The Debian package of the kernel, or one that depends on it (`apt-cache search ^linux-image-`).
    #[arg(long, value_name = "PACKAGE", default_value = "linux-image-amd64")]
    kernel: String,
    /// The machine is stopped after this many minutes.
    #[arg(long, value_name = "MINUTES", default_value_t = 15)]
    limit: u64,
    /// Shows on stderr, at the end, what the kernel said.
    #[arg(long)]
    console: bool,
    /// What is run there, with its arguments.
    #[arg(trailing_var_arg = true, allow_hyphen_values = true, required = true)]
    command: Vec<String>,
}

/// The command itself: the exit code of what was run.
pub(crate) fn run(arguments: &Arguments) -> Result<u8> {
    if env::consts::ARCH != "x86_64" {
        bail!("this makes machines for x86-64 only, and runs this machine's programs in them");
    }
    setup::ensure_machine()?;
    let kernel = Kernel::provide(&arguments.kernel)?;
    let mut archive = nameless()?;
    archive.write_all(&Initramfs::new(&kernel, &arguments.command)?.archive())?;
    let mut console = nameless()?;
    let limit = Duration::from_secs(60 * arguments.limit);
    let ended = observe(&kernel, &archive, &console, limit)?;
    let mut said = Vec::new();
    console.rewind()?;
    console.read_to_end(&mut said)?;
    let said = String::from_utf8_lossy(&said);
    if arguments.console {
        eprint!("{said}");
    }
    if let Some(code) = exit_code(&said) {
        return Ok(code);
    }
    let lines: Vec<_> = said.lines().collect();
    let last = lines[lines.len().saturating_sub(LAST_LINES)..].join("\n");
    if ended {
        bail!("Linux {} ended before the command did; its last words:\n{last}", kernel.version);
    }
    bail!("stopped after {} minutes (--limit); the kernel's last words:\n{last}", arguments.limit)
}

/// Runs a machine until it ends; false when it was stopped at the limit.
fn observe(kernel: &Kernel, archive: &File, console: &File, limit: Duration) -> Result<bool> {
    // When we are killed `timeout` is, and with it the machine.
    let dies_with_us = ["setpriv", "--pdeathsig", "KILL"];
    let mut command = Command::new(dies_with_us[0]);
    command.args(&dies_with_us[1..]).args(["timeout", "--kill-after=10"]).arg(limit.as_secs().to_string());
    command.args(dies_with_us).arg(QEMU).args(MACHINE).arg(ROOT);
    command.args(["-accel", if is_accelerated() { "kvm" } else { "tcg,thread=multi" }]);
    command.arg("-kernel").arg(&kernel.image).arg("-initrd").arg(by_descriptor(archive)).args(["-append", BOOT]);
    let mut serial = OsString::from("file:");
    serial.push(by_descriptor(console));
    command.arg("-serial").arg(serial);
    command.args(["-chardev", "stdio,id=said,signal=off", "-serial", "chardev:said"]);
    let status = command.stdin(Stdio::null()).status();
    let status = status.with_context(|| format!("cannot start `{}`", process::shown(&command)))?;
    match status.code() {
        Some(0) => Ok(true),
        Some(TIMED_OUT) => Ok(false),
        _ => bail!("{QEMU}: {status}"),
    }
}

/// Can the processor run any kernel in a machine, and may we ask it to? The device alone does not say: it is also there
/// where only kernels that were made for it run.
fn is_accelerated() -> bool {
    let processor = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    processor.split_ascii_whitespace().any(|word| ["vmx", "svm"].contains(&word))
        && File::options().read(true).write(true).open("/dev/kvm").is_ok()
}

/// A file that nothing names, so that none is left however we end.
fn nameless() -> Result<File> {
    let path = env::temp_dir().join(format!("xtask-vm-{}", own::id()));
    let file = File::options().read(true).write(true).create_new(true).open(&path);
    let file = file.with_context(|| path.display().to_string())?;
    fs::remove_file(&path)?;
    Ok(file)
}

/// How another program of this user opens a file of ours.
fn by_descriptor(file: &File) -> PathBuf {
    Path::new("/proc").join(own::id().to_string()).join("fd").join(file.as_raw_fd().to_string())
}

/// The last exit code that the machine's init told on its console.
fn exit_code(console: &str) -> Option<u8> {
    console.lines().rev().find_map(|line| line.trim().strip_prefix(EXIT)?.parse().ok())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_exit_code_is_found_among_the_kernel_s_words() {
        let told = format!("[    1.2] loop\r\n{EXIT}7\r\n[    9.1] reboot: Power down\r\n");
        let cases = [(told.as_str(), Some(7)), ("[    1.2] Kernel panic", None), (EXIT, None)];
        assert_eq!(cases.map(|(console, _)| exit_code(console)), cases.map(|(_, expected)| expected));
    }
}
