//! The layouts of the maps outlive a process: a changed one needs another version, so that old pins are not misread.

use std::fs;

use anyhow::{Context as _, Result};

use super::Finding;
use super::source::{Repository, blank_non_code};
use crate::workspace::Workspace;

/// Where the accepted fingerprint is kept: the version and the hash.
const FILE: &str = "proxy-ebpf/abi/fingerprint";

const SOURCES: &str = "proxy-ebpf/abi/src/";

/// FNV-1a with 64 bits: offset basis and prime. It need not resist anybody, only notice changes.
const FNV: (u64, u64) = (0xcbf2_9ce4_8422_2325, 0x0000_0100_0000_01b3);

/// `ABI_VERSION` and the hash of what the sources say, comments and white space aside.
fn fingerprint(repository: &Repository) -> Option<(String, String)> {
    let mut hash = FNV.0;
    let mut version = None;
    for file in repository.rust().filter(|file| file.path.starts_with(SOURCES)) {
        let product = file.code.split("#[cfg(test)]").next().unwrap_or_default();
        if let Some((_, rest)) = product.split_once("pub const ABI_VERSION: u32 =") {
            version = Some(rest.split(';').next().unwrap_or_default().trim().to_owned());
        }
        // Strings are blanked in `code`, so names of maps count by their literals.
        let literals = literals(&file.text);
        for word in product.split_whitespace().chain(literals.iter().map(String::as_str)) {
            for byte in word.bytes().chain([b' ']) {
                hash = (hash ^ u64::from(byte)).wrapping_mul(FNV.1);
            }
        }
    }
    Some((version?, format!("{hash:016x}")))
}

/// String literals of the code, in their order: the stretches of a line that are blank as code, yet quoted.
fn literals(text: &str) -> Vec<String> {
    let code = blank_non_code(text);
    let mut found = Vec::new();
    for (line, code) in text.lines().zip(code.lines()) {
        let comment = line.find("//").filter(|&at| code.is_char_boundary(at) && code[at..].trim().is_empty());
        let line = comment.map_or(line, |at| &line[..at]);
        found.extend(line.split('"').skip(1).step_by(2).map(str::to_owned));
    }
    found
}

pub(super) fn abi(repository: &Repository) -> Vec<Finding> {
    let Some((version, hash)) = fingerprint(repository) else {
        return vec![Finding::new(SOURCES, 0, "`pub const ABI_VERSION: u32 = …;` is not there")];
    };
    let accepted =
        repository.file(FILE).map(|file| file.text.split_whitespace().collect::<Vec<_>>()).unwrap_or_default();
    let message = match accepted.as_slice() {
        [v, h] if *v == version && *h == hash => return Vec::new(),
        [v, _] if *v != version => format!("ABI_VERSION is {version} now: accept it with `cargo xtask tidy --bless`"),
        [_, _] => "the map layouts changed: raise ABI_VERSION; or, if no layout and no meaning did, confirm that with \
                   `cargo xtask tidy --bless`"
            .to_owned(),
        _ => "no fingerprint: write it with `cargo xtask tidy --bless`".to_owned(),
    };
    vec![Finding::new(FILE, 0, message)]
}

/// Accepts the present layouts.
pub(super) fn bless(workspace: &Workspace) -> Result<()> {
    let repository = Repository::read(workspace.root())?;
    let (version, hash) = fingerprint(&repository).context("ABI_VERSION not found")?;
    let file = workspace.root().join(FILE);
    fs::write(&file, format!("{version} {hash}\n")).with_context(|| file.display().to_string())?;
    println!("{FILE}: {version} {hash}");
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    const SOURCE: &str = "//! A.\npub const ABI_VERSION: u32 = 7;\npub struct Key { pub port: u16 }\nconst NAME: &str = \"flow\"; // x\n";

    fn accepted(source: &str, fingerprint: &str) -> Vec<String> {
        let files = [("proxy-ebpf/abi/src/lib.rs", source), (FILE, fingerprint)];
        abi(&Repository::of(&files)).into_iter().map(|finding| finding.message).collect()
    }

    #[test]
    fn only_what_the_layouts_are_made_of_counts() {
        let (version, hash) =
            fingerprint(&Repository::of(&[("proxy-ebpf/abi/src/lib.rs", SOURCE)])).expect("versioned");
        let committed = format!("{version} {hash}\n");
        assert_eq!(version, "7");
        let same = [
            SOURCE.to_owned(),
            SOURCE.replace("A.", "Another \"sentence\"."),
            SOURCE.replace("// x", "// \"y\""),
            SOURCE.replace("{ ", "{\n    "),
            SOURCE.to_owned() + "#[cfg(test)]\nmod tests {}\n",
        ];
        for source in &same {
            assert_eq!(accepted(source, &committed), Vec::<String>::new(), "{source}");
        }
        for source in [SOURCE.replace("u16", "u32"), SOURCE.replace("flow", "flows")] {
            assert!(accepted(&source, &committed)[0].contains("raise ABI_VERSION"), "{source}");
        }
        assert!(accepted(&SOURCE.replace('7', "8"), &committed)[0].starts_with("ABI_VERSION is 8 now"));
        assert!(accepted(SOURCE, "")[0].starts_with("no fingerprint"));
    }
}
