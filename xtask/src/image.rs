//! The image, as an archive that `docker load` and `ctr images import` take: one layer with two programs.
//!
//! ```text
//!   layer.tar      /proxy-agent                 static
//!                  nft, its loader, libraries   this machine's: what `--bridge-guard` needs
//!                  licences                     times and owners are fixed: the same files give the same image
//!   config.json    entry point, digest of the layer
//!   manifest.json  which is which, and the tags (Docker image specification v1.2)
//! ```

mod closure;

use std::collections::BTreeMap;
use std::fs::{self, File, Permissions};
use std::io::Write as _;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result, bail};
use serde_json::json;
use sha2::{Digest as _, Sha256};

use crate::process;

/// Files by their path below the root, with their modes and bytes.
pub(crate) type Files = BTreeMap<PathBuf, (u32, Vec<u8>)>;

/// Where container runtimes look for programs that are called by name.
const PATH: &str = "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// All that is in the image.
pub(crate) fn files(program: &Path) -> Result<Files> {
    let nft = process::find("nft").context("nft is not there: install nftables")?;
    let mut files = closure::of(&nft)?;
    files.insert("proxy-agent".into(), (0o755, fs::read(program)?));
    Ok(files)
}

/// Writes them below a directory, which is made anew.
pub(crate) fn unpack(files: &Files, root: &Path) -> Result<()> {
    if root.exists() {
        fs::remove_dir_all(root)?;
    }
    for (path, (mode, bytes)) in files {
        let path = root.join(path);
        let context = || path.display().to_string();
        fs::create_dir_all(path.parent().unwrap_or(root)).with_context(context)?;
        fs::write(&path, bytes).with_context(context)?;
        fs::set_permissions(&path, Permissions::from_mode(*mode)).with_context(context)?;
    }
    Ok(())
}

/// Writes the archive.
pub(crate) fn write(files: &Files, tags: &[&str], archive: &Path) -> Result<()> {
    let layer = tarball(files)?;
    let architecture = match std::env::consts::ARCH {
        "x86_64" => "amd64",
        "aarch64" => "arm64",
        other => bail!("no image for {other}: its name in image manifests is not known here"),
    };
    let config = json!({
        "architecture": architecture,
        "os": "linux",
        "created": "1970-01-01T00:00:00Z",
        "config": { "Entrypoint": ["/proxy-agent"], "Cmd": ["run"], "Env": [PATH] },
        "rootfs": { "type": "layers", "diff_ids": [format!("sha256:{:x}", Sha256::digest(&layer))] },
    });
    let manifest = json!([{ "Config": "config.json", "RepoTags": tags, "Layers": ["layer.tar"] }]);
    let parts = [
        ("layer.tar", layer),
        ("config.json", config.to_string().into_bytes()),
        ("manifest.json", manifest.to_string().into_bytes()),
    ];
    let image = tarball(&parts.into_iter().map(|(name, bytes)| (name.into(), (0o644, bytes))).collect())?;
    let context = || archive.display().to_string();
    File::create(archive).with_context(context)?.write_all(&image).with_context(context)
}

/// Files with their modes, owned by root, dated 1970.
fn tarball(files: &Files) -> Result<Vec<u8>> {
    let mut builder = tar::Builder::new(Vec::new());
    for (name, (mode, bytes)) in files {
        let mut header = tar::Header::new_gnu();
        header.set_size(u64::try_from(bytes.len())?);
        header.set_mode(*mode);
        header.set_cksum();
        builder.append_data(&mut header, name, bytes.as_slice())?;
    }
    Ok(builder.into_inner()?)
}

#[cfg(test)]
mod tests {
    use std::io::Read as _;

    use super::*;

    fn read(archive: &[u8]) -> Files {
        let mut archive = tar::Archive::new(archive);
        let files = archive.entries().expect("an archive").map(|file| {
            let mut file = file.expect("a file");
            let (name, mode) = (file.path().expect("a name").into_owned(), file.header().mode().expect("a mode"));
            let mut bytes = Vec::new();
            file.read_to_end(&mut bytes).expect("its bytes");
            (name, (mode, bytes))
        });
        files.collect()
    }

    #[test]
    fn the_digest_is_that_of_the_layer_and_the_programs_are_in_it() {
        let archive = std::env::temp_dir().join(format!("xtask-image-{}.tar", std::process::id()));
        let (program, library) = (("proxy-agent", 0o755, b"#!/bin/true"), ("lib/x.so", 0o644, b"not a lib.."));
        let files: Files = [program, library].map(|(name, mode, bytes)| (name.into(), (mode, bytes.to_vec()))).into();
        write(&files, &["x:1"], &archive).expect("an image");
        let first = fs::read(&archive).expect("an image");
        write(&files, &["x:1"], &archive).expect("an image");
        assert_eq!(first, fs::read(&archive).expect("an image"), "the same files give the same image");
        fs::remove_file(&archive).expect("gone");

        let parts = read(&first);
        let text = |name: &str| serde_json::from_slice::<serde_json::Value>(&parts[Path::new(name)].1).expect("JSON");
        let manifest = &text("manifest.json")[0];
        assert_eq!(manifest["RepoTags"], json!(["x:1"]));
        let layer = &parts[Path::new(manifest["Layers"][0].as_str().expect("a layer"))].1;
        let config = text(manifest["Config"].as_str().expect("a configuration"));
        assert_eq!(config["rootfs"]["diff_ids"][0], format!("sha256:{:x}", Sha256::digest(layer)));
        assert_eq!(config["config"], json!({ "Entrypoint": ["/proxy-agent"], "Cmd": ["run"], "Env": [PATH] }));
        assert_eq!(read(layer), files);
    }
}
