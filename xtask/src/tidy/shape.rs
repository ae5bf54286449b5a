//! How files look: length, first lines, names, words.

use std::path::Path;

use super::Finding;
use super::source::Repository;

/// Lines of a Rust file without its tests.
const MAX_LINES: usize = 600;

/// Names that say nothing of what is in the file.
const EMPTY_NAMES: [&str; 10] =
    ["util", "utils", "helper", "helpers", "manager", "managers", "common", "misc", "shared", "stuff"];

/// Text that does not belong into the repository, in two halves so that this file has none of it; and why.
const WORDS: [(&str, &str, &str); 6] = [
    ("TO", "DO", "do it, or describe it in an issue"),
    ("FIX", "ME", "fix it, or describe it in an issue"),
    ("XX", "X:", "say what is wrong, or mend it"),
    ("/wo", "rk/", "a path of one machine: name files relative to the repository"),
    ("todo", "!(", "code that is not there must not compile"),
    ("unimple", "mented!(", "code that is not there must not compile"),
];

/// Made by tools, line by line.
const GENERATED: [&str; 2] = ["Cargo.lock", "go.sum"];

pub(super) fn file_length(repository: &Repository) -> Vec<Finding> {
    let measured = repository.rust().filter(|file| !file.is_test()).map(|file| (file, file.lines_without_tests()));
    let long = measured.filter(|(_, lines)| *lines > MAX_LINES);
    long.map(|(file, lines)| {
        let message = format!("{lines} lines without tests, more than {MAX_LINES}: split it by noun");
        Finding::new(&file.path, 0, message)
    })
    .collect()
}

pub(super) fn module_doc(repository: &Repository) -> Vec<Finding> {
    let undocumented = repository.rust().filter(|file| !file.text.lines().any(|line| line.starts_with("//!")));
    let message = "no module documentation: begin with `//!` and what this file is for";
    undocumented.map(|file| Finding::new(&file.path, 1, message)).collect()
}

pub(super) fn file_name(repository: &Repository) -> Vec<Finding> {
    let mut findings = Vec::new();
    for file in repository.rust() {
        for part in Path::new(&file.path).with_extension("").iter().map(|part| part.to_string_lossy()) {
            if EMPTY_NAMES.contains(&part.as_ref()) {
                findings.push(Finding::new(
                    &file.path,
                    0,
                    format!("`{part}` names nothing: name it after what is in it"),
                ));
            }
        }
    }
    findings
}

pub(super) fn words(repository: &Repository) -> Vec<Finding> {
    let mut findings = Vec::new();
    let written = repository.files().filter(|file| !GENERATED.iter().any(|name| file.path.ends_with(name)));
    for file in written {
        for (number, line) in file.text.lines().enumerate() {
            for (first, second, advice) in WORDS {
                let word = format!("{first}{second}");
                if line.contains(&word) {
                    findings.push(Finding::new(&file.path, number + 1, format!("`{word}`: {advice}")));
                }
            }
        }
    }
    findings
}

#[cfg(test)]
mod tests {
    use super::*;

    fn places(findings: &[Finding]) -> Vec<(&str, usize)> {
        findings.iter().map(|finding| (finding.path.as_str(), finding.line)).collect()
    }

    #[test]
    fn long_files_are_found_and_long_tests_are_not() {
        let (at_limit, long) = ("x();\n".repeat(MAX_LINES), "x();\n".repeat(MAX_LINES + 1));
        let tested = format!("{at_limit}#[cfg(test)]\nmod tests {{\n{long}}}\n");
        let files =
            [("a.rs", &*long), ("b.rs", &*at_limit), ("c.rs", &*tested), ("d/tests/e.rs", &*long), ("f.md", &*long)];
        assert_eq!(places(&file_length(&Repository::of(&files))), [("a.rs", 0)]);
    }

    #[test]
    fn files_without_documentation_are_found() {
        let files = [("a.rs", "fn a() {}\n"), ("b.rs", "#![no_std]\n//! B.\n"), ("c.rs", "// no\n/// A.\nfn a() {}\n")];
        assert_eq!(places(&module_doc(&Repository::of(&files))), [("a.rs", 1), ("c.rs", 1)]);
    }

    #[test]
    fn empty_names_are_found_in_files_and_directories() {
        let files = [("src/utils.rs", ""), ("src/common/x.rs", ""), ("src/commons.rs", ""), ("helpers.md", "")];
        assert_eq!(places(&file_name(&Repository::of(&files))), [("src/utils.rs", 0), ("src/common/x.rs", 0)]);
    }

    #[test]
    fn words_are_found_in_every_kind_of_file() {
        let bad: Vec<String> = WORDS.iter().map(|(first, second, _)| format!("ok\n// {first}{second} x\n")).collect();
        for text in &bad {
            let files = [("a.rs", text.as_str()), ("b.md", text), ("go.sum", text), ("c.rs", "// to do: nothing\n")];
            assert_eq!(places(&words(&Repository::of(&files))), [("a.rs", 2), ("b.md", 2)], "{text}");
        }
    }
}
