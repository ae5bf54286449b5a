//! Documents tell the truth about the files they name.

use super::Finding;
use super::source::{Repository, has_extension};

const ARCHITECTURE: &str = "ARCHITECTURE.md";

/// Endings by which a word in a document is known as a file's name.
const ENDINGS: [&str; 9] = ["rs", "toml", "md", "yaml", "yml", "json", "txt", "sh", "lock"];

/// Files named in ARCHITECTURE.md exist: by their path from the root, or by the end of it.
pub(super) fn architecture(repository: &Repository) -> Vec<Finding> {
    let Some(document) = repository.file(ARCHITECTURE) else {
        return vec![Finding::new(
            ARCHITECTURE,
            0,
            "is not there: it says what the parts are and what may cross between them",
        )];
    };
    let mut findings = Vec::new();
    for (number, line) in document.text.lines().enumerate() {
        for name in line.split('`').skip(1).step_by(2).filter(|name| is_file_name(name)) {
            let there = repository.files().any(|file| {
                file.path == name
                    || file.path.strip_suffix(name).is_some_and(|rest| rest.ends_with('/'))
                    || (name.ends_with('/') && (file.path.starts_with(name) || file.path.contains(&format!("/{name}"))))
            });
            if !there {
                findings.push(Finding::new(
                    ARCHITECTURE,
                    number + 1,
                    format!("there is no `{name}`: say what is there now"),
                ));
            }
        }
    }
    findings
}

/// Whether a word in backticks is meant as a file or directory of the repository.
fn is_file_name(word: &str) -> bool {
    let plain = word.chars().all(|c| c.is_ascii_alphanumeric() || "_-./".contains(c));
    let file = ENDINGS.iter().any(|ending| has_extension(word, ending));
    let directory = word.ends_with('/') && word.len() > 1;
    plain && !word.starts_with('/') && (file || directory)
}

/// Relative links of every document lead to a file.
pub(super) fn links(repository: &Repository) -> Vec<Finding> {
    let mut findings = Vec::new();
    for document in repository.files().filter(|file| has_extension(&file.path, "md")) {
        let directory = document.path.rsplit_once('/').map_or("", |(directory, _)| directory);
        let mut fenced = false;
        for (number, line) in document.text.lines().enumerate() {
            fenced ^= line.trim_start().starts_with("```");
            if fenced {
                continue;
            }
            for target in line.split("](").skip(1).filter_map(|rest| rest.split(')').next()) {
                let path = target.split(['#', ' ']).next().unwrap_or_default();
                if path.is_empty() || path.contains(':') {
                    continue;
                }
                let path = resolve(directory, path);
                if !repository.files().any(|file| file.path == path || file.path.starts_with(&format!("{path}/"))) {
                    findings.push(Finding::new(
                        &document.path,
                        number + 1,
                        format!("the link leads to `{path}`, which is not there"),
                    ));
                }
            }
        }
    }
    findings
}

/// `path`, as seen from `directory`, as seen from the root.
fn resolve(directory: &str, path: &str) -> String {
    let mut parts: Vec<&str> = Vec::new();
    for part in directory.split('/').chain(path.split('/')) {
        match part {
            "" | "." => {}
            ".." => {
                parts.pop();
            }
            part => parts.push(part),
        }
    }
    parts.join("/")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn lines(findings: &[Finding]) -> Vec<usize> {
        findings.iter().map(|finding| finding.line).collect()
    }

    #[test]
    fn files_named_in_the_architecture_exist() {
        let text = "\
`proxy-agent/src/k8s.rs`, `k8s.rs`, `src/k8s.rs`, `proxy-agent/`, `src/`
`gone.rs`
`proxy-agent/gone/`
`/sys/fs/bpf/x.rs`, `flow_*.rs`, `Tables`, `bpf(2)`, `discovery.k8s.io/v1`, gone.rs
`8s.rs`
";
        let files = [(ARCHITECTURE, text), ("proxy-agent/src/k8s.rs", "")];
        assert_eq!(lines(&architecture(&Repository::of(&files))), [2, 3, 5]);
        assert_eq!(lines(&architecture(&Repository::default())), [0]);
    }

    #[test]
    fn relative_links_lead_somewhere() {
        let text = "[a](../README.md#top) [b](https://example.org/x) [c](#here)\n[d](gone.md)\n```\n[e](gone.md)\n```\n[f](x)\n";
        let files = [("docs/a.md", text), ("README.md", ""), ("docs/x/y.md", "")];
        assert_eq!(lines(&links(&Repository::of(&files))), [2]);
    }
}
