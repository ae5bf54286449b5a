//! `cargo xtask dist`: what is shipped: one static program, the manifests, the image, in which it has `nft` beside it.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context as _, Result, bail};

use crate::image;
use crate::process;
use crate::setup::compiler::rustup;
use crate::setup::{self, Purpose};
use crate::workspace::Workspace;

/// Program header type that names a dynamic loader (ELF specification, `PT_INTERP`).
const PT_INTERP: u32 = 3;

/// What to make.
#[derive(Debug, clap::Args)]
pub(crate) struct Arguments {
    /// Only the program and the image's root (`dist/root`): what the Dockerfile asks for.
    #[arg(long)]
    root_only: bool,
}

/// The command itself.
pub(crate) fn run(workspace: &Workspace, arguments: &Arguments) -> Result<()> {
    // Of what nodes are made with, nft is shipped.
    setup::ensure(workspace, Purpose::Node)?;
    let program = build(workspace)?;
    if !is_static(&fs::read(&program)?) {
        bail!("{} asks for a dynamic loader: the image has none", program.display());
    }
    let directory = workspace.target().join("dist");
    fs::create_dir_all(&directory)?;
    let shipped = directory.join("proxy-agent");
    fs::copy(&program, &shipped)?;
    println!("program: {}, {} KiB, static", shipped.display(), shipped.metadata()?.len() / 1024);
    let files = image::files(&shipped)?;
    let root = directory.join("root");
    image::unpack(&files, &root)?;
    println!("root of the image: {}, {} files", root.display(), files.len());
    if arguments.root_only {
        return Ok(());
    }
    manifests(workspace)?;
    let archive = directory.join("proxy-agent-image.tar");
    let tag = concat!("docker.io/library/proxy-agent:", env!("CARGO_PKG_VERSION"));
    image::write(&files, &[tag, "docker.io/library/proxy-agent:latest"], &archive)?;
    println!(
        "image: {}, {} KiB; `docker load -i` or `ctr -n k8s.io images import`",
        archive.display(),
        archive.metadata()?.len() / 1024
    );
    Ok(())
}

/// The agent for release, linked statically.
fn build(workspace: &Workspace) -> Result<PathBuf> {
    let verbose = process::read(workspace.command("rustc").arg("-vV"))?;
    let host = verbose.lines().find_map(|line| line.strip_prefix("host: ")).context("rustc -vV names no host")?;
    let architecture = host.split('-').next().unwrap_or(host);
    let musl = format!("{architecture}-unknown-linux-musl");
    let compile = |target: &str| {
        let mut command = workspace.cargo();
        command.args(["build", "--release", "--locked", "--package", "proxy-agent", "--target", target]);
        // Symbols are most of the file and none of the use: a panic still tells file and line.
        command.env("CARGO_PROFILE_RELEASE_STRIP", "symbols");
        command
    };
    let built = |target: &str| workspace.target().join(target).join("release/proxy-agent");
    if process::find("musl-gcc").is_some() && target_present(workspace, &musl) {
        process::run(&mut compile(&musl))?;
        return Ok(built(&musl));
    }
    println!("no musl (`apt install musl-tools`, `rustup target add {musl}`): linking glibc statically instead");
    println!("note: such a program resolves names only where the same glibc is installed; give API servers by address");
    let mut command = compile(host);
    let flags = std::env::var("RUSTFLAGS").unwrap_or_default();
    process::run(command.env("RUSTFLAGS", format!("{flags} -C target-feature=+crt-static").trim()))?;
    Ok(built(host))
}

/// Whether the standard library for `target` is there, or rustup can fetch it.
fn target_present(workspace: &Workspace, target: &str) -> bool {
    let present = || {
        let directory =
            process::read(workspace.command("rustc").args(["--print", "target-libdir", "--target", target]));
        directory.is_ok_and(|directory| Path::new(directory.trim()).exists())
    };
    present() || (process::run(&mut rustup(["target", "add", target])).is_ok() && present())
}

/// Whether a 64-bit little-endian ELF file can run without a dynamic loader.
fn is_static(elf: &[u8]) -> bool {
    let number = |at: usize, size: usize| {
        let bytes = elf.get(at..at + size)?;
        Some(bytes.iter().rev().fold(0_usize, |value, byte| value << 8 | usize::from(*byte)))
    };
    let loader = || {
        let (table, size, count) = (number(0x20, 8)?, number(0x36, 2)?, number(0x38, 2)?);
        (0..count)
            .map(|index| number(table + index * size, 4))
            .try_fold(false, |found, kind| Some(found || kind? == PT_INTERP as usize))
    };
    elf.starts_with(b"\x7fELF\x02\x01") && loader() == Some(false)
}

/// Every file that the kustomization names is there; with kubectl, it also renders.
fn manifests(workspace: &Workspace) -> Result<()> {
    let directory = workspace.root().join("deploy");
    let file = directory.join("kustomization.yaml");
    let text = fs::read_to_string(&file).with_context(|| file.display().to_string())?;
    let named = resources(&text);
    if named.is_empty() {
        bail!("{} names no resources", file.display());
    }
    if let Some(lacking) = named.iter().find(|name| !directory.join(name).exists()) {
        bail!("{} names {lacking}, which is not there", file.display());
    }
    println!("manifests: {} named in {}", named.len(), file.display());
    let Some(kubectl) = process::find("kubectl") else {
        println!("left out: kubectl is not there to render them; `cargo xtask test` parses and checks each");
        return Ok(());
    };
    process::read(Command::new(kubectl).arg("kustomize").arg(&directory)).map(drop)
}

/// The entries of `resources:` in a kustomization.
fn resources(kustomization: &str) -> Vec<&str> {
    let lines = kustomization.lines().skip_while(|line| line.trim_end() != "resources:").skip(1);
    let entries = lines.take_while(|line| line.starts_with([' ', '-', '#']));
    entries.filter_map(|line| line.trim().strip_prefix("- ")).map(str::trim).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// An ELF header and a program header table with these types.
    fn elf(types: &[u8]) -> Vec<u8> {
        let mut file = b"\x7fELF\x02\x01".to_vec();
        file.resize(64, 0);
        (file[0x20], file[0x36], file[0x38]) = (64, 56, u8::try_from(types.len()).expect("few"));
        for kind in types {
            file.push(*kind);
            file.extend([0; 55]);
        }
        file
    }

    #[test]
    fn programs_with_a_loader_are_not_static() {
        let truncated = &elf(&[1, 1])[..100];
        let cases = [(&*elf(&[1, 6]), true), (&*elf(&[6, 3, 1]), false), (truncated, false), (b"#!/bin/sh", false)];
        assert_eq!(cases.map(|(file, _)| is_static(file)), cases.map(|(_, expected)| expected));
    }

    #[test]
    fn resources_are_read_up_to_the_next_key() {
        let text = "kind: Kustomization\nresources:\n  - rbac.yaml\n# why\n- daemonset.yaml\nimages:\n  - name: x\n";
        assert_eq!(resources(text), ["rbac.yaml", "daemonset.yaml"]);
    }
}
