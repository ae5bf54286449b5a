//! The first files that the kernel of a machine sees, and what its first process does.

use std::env;
use std::ffi::OsStr;
use std::fs;
use std::os::unix::ffi::OsStrExt as _;

use anyhow::{Context as _, Result};

use super::kernel::Kernel;
use crate::process;
use crate::workspace::is_of_cargo;

/// What precedes the exit code in the last line of the console.
pub(super) const EXIT: &str = "the command ended with exit code ";

/// The first process: it makes a root of this machine's, and goes on there.
const INIT: &str = "#!/bin/busybox sh
busybox=/bin/busybox
$busybox mkdir -p /proc /lower /upper /root
for module in /modules/*; do $busybox insmod \"$module\"; done
$busybox mount -t 9p -o ro,trans=virtio,version=9p2000.L,msize=512000,cache=loose root /lower
$busybox mount -t tmpfs -o mode=755 upper /upper
$busybox mkdir /upper/root /upper/work
$busybox mount -t overlay -o lowerdir=/lower,upperdir=/upper/root,workdir=/upper/work overlay /root
$busybox mount -t tmpfs -o mode=755 run /root/run
$busybox cp -r /bin /vm /root/run
exec $busybox switch_root /root /run/vm/init
";

/// The same process, in that root. Modules are looked for when somebody asks for what they give, as on any node; but for
/// those whose settings are written without asking. busybox is named by its path: its shell takes the bare name for itself.
const SECOND: &str = "#!/run/bin/busybox sh
busybox=/run/bin/busybox
PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin
mount() { $busybox mount \"$@\"; }
mount -t proc proc /proc
mount -t sysfs sysfs /sys
mount -t devtmpfs dev /dev
$busybox mkdir -p /dev/pts /dev/shm \"/lib/modules/@VERSION@\"
mount -t devpts devpts /dev/pts
mount -t tmpfs shm /dev/shm
mount -t cgroup2 cgroup2 /sys/fs/cgroup
mount -t bpf bpf /sys/fs/bpf
mount -t tracefs tracefs /sys/kernel/tracing
mount --bind @MODULES@ \"/lib/modules/@VERSION@\"
echo /run/vm/modprobe > /proc/sys/kernel/modprobe
/run/vm/modprobe -a br_netfilter nf_conntrack
$busybox ifconfig lo up
$busybox stty -F /dev/ttyS1 -opost
ulimit -n 65536
$busybox setsid /bin/sh /run/vm/command < /dev/null > /dev/ttyS1 2>&1
echo \"@EXIT@$?\" > /dev/ttyS0
$busybox poweroff -f
";

/// What the kernel calls when it wants a module. It asks for many that there are none of.
const MODPROBE: &str = "#!/run/bin/busybox sh
exec @MODPROBE@ \"$@\" 2> /dev/null
";

/// Files with their modes, in the order in which they are unpacked.
pub(super) struct Initramfs(Vec<(String, u32, Vec<u8>)>);

impl Initramfs {
    /// For a command, which runs with this process' environment in its directory.
    pub(super) fn new(kernel: &Kernel, command: &[String]) -> Result<Self> {
        const DIRECTORY: u32 = 0o40_755;
        const PROGRAM: u32 = 0o100_755;
        const FILE: u32 = 0o100_644;
        let tool = |name: &str| process::find(name).with_context(|| format!("{name} is not there"));
        let busybox = fs::read(tool("busybox")?)?;
        let modprobe = tool("modprobe")?;
        let modules = quoted(kernel.modules.as_os_str());
        let second = SECOND.replace("@VERSION@", &kernel.version).replace("@EXIT@", EXIT);
        let second = second.replace("@MODULES@", &String::from_utf8_lossy(&modules));
        let modprobe = MODPROBE.replace("@MODPROBE@", &modprobe.to_string_lossy());
        let mut files: Vec<_> =
            ["bin", "vm", "modules"].map(|directory| (directory.to_owned(), DIRECTORY, vec![])).into();
        files.extend([
            ("init".to_owned(), PROGRAM, INIT.into()),
            ("bin/busybox".to_owned(), PROGRAM, busybox),
            ("vm/init".to_owned(), PROGRAM, second.into_bytes()),
            ("vm/modprobe".to_owned(), PROGRAM, modprobe.into_bytes()),
            ("vm/command".to_owned(), FILE, script(command)?),
        ]);
        let modules = kernel.boot_modules()?.into_iter().enumerate();
        files.extend(modules.map(|(n, bytes)| (format!("modules/{n:02}.ko"), FILE, bytes)));
        Ok(Self(files))
    }

    /// As the kernel unpacks it (cpio of the SVR4 form, `Documentation/driver-api/early-userspace/buffer-format.rst`).
    pub(super) fn archive(&self) -> Vec<u8> {
        let mut archive = Vec::new();
        let end = ("TRAILER!!!".to_owned(), 0, vec![]);
        for (number, (name, mode, bytes)) in self.0.iter().chain([&end]).enumerate() {
            // inode, mode, uid, gid, links, time, size, device (major, minor), what it is a device of, name, checksum
            let fields = [number + 1, *mode as usize, 0, 0, 1, 0, bytes.len(), 0, 0, 0, 0, name.len() + 1, 0];
            archive.extend(b"070701");
            archive.extend(fields.iter().flat_map(|field| format!("{field:08x}").into_bytes()));
            archive.extend(name.bytes().chain([0]));
            archive.resize(archive.len().next_multiple_of(4), 0);
            archive.extend(bytes);
            archive.resize(archive.len().next_multiple_of(4), 0);
        }
        archive
    }
}

/// A shell script that runs `command` with our environment in our directory.
fn script(command: &[String]) -> Result<Vec<u8>> {
    let mut script = Vec::new();
    for (name, value) in env::vars_os() {
        let is_name = |name: &str| name.chars().all(|c| c.is_ascii_alphanumeric() || c == '_');
        if let Some(name) = name.to_str().filter(|name| is_name(name) && !is_of_cargo(name)) {
            script.extend(format!("export {name}=").into_bytes());
            script.extend(quoted(&value));
            script.push(b'\n');
        }
    }
    script.extend(b"cd ");
    script.extend(quoted(env::current_dir()?.as_os_str()));
    script.extend(b"\nexec");
    for word in command {
        script.push(b' ');
        script.extend(quoted(OsStr::new(word)));
    }
    script.push(b'\n');
    Ok(script)
}

/// One word of a shell, whatever is in it.
fn quoted(word: &OsStr) -> Vec<u8> {
    let mut quoted = vec![b'\''];
    for byte in word.as_bytes() {
        match byte {
            b'\'' => quoted.extend(br"'\''"),
            byte => quoted.push(*byte),
        }
    }
    quoted.push(b'\'');
    quoted
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_survive_the_shell() {
        let word = "it's $HOME; `rm`\n\"";
        let script = [b"printf %s ".to_vec(), quoted(OsStr::new(word))].concat();
        let output = std::process::Command::new("sh").arg("-c").arg(OsStr::from_bytes(&script)).output();
        assert_eq!(String::from_utf8(output.expect("a shell").stdout).expect("text"), word);
    }

    #[test]
    fn an_archive_has_each_file_and_an_end() {
        let archive = Initramfs(vec![("bin".to_owned(), 0o40_755, vec![]), ("x".to_owned(), 0o100_644, b"abc".into())]);
        let entry = |number: u32, mode: u32, size: u32, name: &str, padding: usize, bytes: &str| {
            let head = format!("070701{number:08x}{mode:08x}{:024x}{:08x}{size:08x}", 1, 0);
            format!("{head}{:032x}{:08x}{:08x}{name}\0{}{bytes}", 0, name.len() + 1, 0, "\0".repeat(padding))
        };
        // Names end where the head and they are a multiple of four, and so does what follows.
        let expected = [
            entry(1, 0o40_755, 0, "bin", 2, ""),
            entry(2, 0o100_644, 3, "x", 0, "abc\0"),
            entry(3, 0, 0, "TRAILER!!!", 3, ""),
        ];
        assert_eq!(String::from_utf8(archive.archive()).expect("text"), expected.concat());
    }
}
