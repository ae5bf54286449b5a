//! The image, as an archive that `docker load` and `ctr images import` take: one layer with one program.
//!
//! ```text
//!   layer.tar      /proxy-agent                 times and owners are fixed: the same program gives the same image
//!   config.json    entry point, digest of the layer
//!   manifest.json  which is which, and the tags (Docker image specification v1.2)
//! ```

use std::fs::File;
use std::io::Write as _;
use std::path::Path;

use anyhow::{Context as _, Result, bail};
use serde_json::json;
use sha2::{Digest as _, Sha256};

/// Writes the archive.
pub(crate) fn write(program: &Path, tags: &[&str], archive: &Path) -> Result<()> {
    let layer = tarball(&[("proxy-agent", 0o755, &std::fs::read(program)?)])?;
    let architecture = match std::env::consts::ARCH {
        "x86_64" => "amd64",
        "aarch64" => "arm64",
        other => bail!("no image for {other}: its name in image manifests is not known here"),
    };
    let config = json!({
        "architecture": architecture,
        "os": "linux",
        "created": "1970-01-01T00:00:00Z",
        "config": { "Entrypoint": ["/proxy-agent"], "Cmd": ["run"] },
        "rootfs": { "type": "layers", "diff_ids": [format!("sha256:{:x}", Sha256::digest(&layer))] },
    });
    let manifest = json!([{ "Config": "config.json", "RepoTags": tags, "Layers": ["layer.tar"] }]);
    let image = tarball(&[
        ("layer.tar", 0o644, &layer),
        ("config.json", 0o644, config.to_string().as_bytes()),
        ("manifest.json", 0o644, manifest.to_string().as_bytes()),
    ])?;
    let context = || archive.display().to_string();
    File::create(archive).with_context(context)?.write_all(&image).with_context(context)
}

/// Files with their modes, owned by root, dated 1970.
fn tarball(files: &[(&str, u32, &[u8])]) -> Result<Vec<u8>> {
    let mut builder = tar::Builder::new(Vec::new());
    for (name, mode, bytes) in files {
        let mut header = tar::Header::new_gnu();
        header.set_size(u64::try_from(bytes.len())?);
        header.set_mode(*mode);
        header.set_cksum();
        builder.append_data(&mut header, name, *bytes)?;
    }
    Ok(builder.into_inner()?)
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;
    use std::io::Read as _;

    use super::*;

    fn read(archive: &[u8]) -> BTreeMap<String, (u32, Vec<u8>)> {
        let mut archive = tar::Archive::new(archive);
        let files = archive.entries().expect("an archive").map(|file| {
            let mut file = file.expect("a file");
            let (name, mode) =
                (file.path().expect("a name").display().to_string(), file.header().mode().expect("a mode"));
            let mut bytes = Vec::new();
            file.read_to_end(&mut bytes).expect("its bytes");
            (name, (mode, bytes))
        });
        files.collect()
    }

    #[test]
    fn the_digest_is_that_of_the_layer_and_the_program_is_in_it() {
        let directory = std::env::temp_dir().join(format!("xtask-image-{}", std::process::id()));
        std::fs::create_dir_all(&directory).expect("a directory");
        let (program, archive) = (directory.join("program"), directory.join("image.tar"));
        std::fs::write(&program, b"#!/bin/true").expect("a program");
        write(&program, &["x:1"], &archive).expect("an image");
        let first = std::fs::read(&archive).expect("an image");
        write(&program, &["x:1"], &archive).expect("an image");
        assert_eq!(first, std::fs::read(&archive).expect("an image"), "the same program gives the same image");
        std::fs::remove_dir_all(&directory).expect("gone");

        let files = read(&first);
        let text = |name: &str| serde_json::from_slice::<serde_json::Value>(&files[name].1).expect("JSON");
        let manifest = &text("manifest.json")[0];
        assert_eq!(manifest["RepoTags"], json!(["x:1"]));
        let layer = &files[manifest["Layers"][0].as_str().expect("a layer")].1;
        let config = text(manifest["Config"].as_str().expect("a configuration"));
        assert_eq!(config["rootfs"]["diff_ids"][0], format!("sha256:{:x}", Sha256::digest(layer)));
        assert_eq!(config["config"]["Entrypoint"], json!(["/proxy-agent"]));
        assert_eq!(read(layer), BTreeMap::from([("proxy-agent".to_owned(), (0o755, b"#!/bin/true".to_vec()))]));
    }
}
