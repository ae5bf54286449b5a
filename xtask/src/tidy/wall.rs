//! What may be named where. The walls are drawn in ARCHITECTURE.md.

use super::Finding;
use super::source::{Repository, SourceFile, word_starts};

/// A word that may be used as code only in certain places.
struct Wall {
    /// The word; a crate's name, or a keyword.
    word: &'static str,
    how: Use,
    /// Beginnings of the paths where it may stand.
    allowed: &'static [&'static str],
    /// What to do instead.
    advice: &'static str,
}

/// In which role a word counts.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Use {
    /// As any word.
    Word,
    /// As the name of a crate: the first segment of a path.
    Crate,
    /// As an argument of `repr(…)`.
    Representation,
}

const KUBE: (&[&str], &str) = (
    &["proxy-agent/src/k8s", "proxy-agent/tests/", "tests/"],
    "Kubernetes' types end in proxy-agent/src/k8s: convert there, use core types here",
);
const AYA: (&[&str], &str) = (
    &["proxy-agent/src/dataplane", "proxy-agent/tests/", "tests/"],
    "aya stays behind the trait in proxy-agent/src/dataplane: extend that",
);

const WALLS: &[Wall] = &[
    Wall { word: "kube", how: Use::Crate, allowed: KUBE.0, advice: KUBE.1 },
    Wall { word: "k8s_openapi", how: Use::Word, allowed: KUBE.0, advice: KUBE.1 },
    // `impl aya::Pod` of the `user` feature is made by the one macro in abi's lib.rs.
    Wall {
        word: "aya",
        how: Use::Crate,
        allowed: &[
            "proxy-agent/src/dataplane",
            "proxy-agent/tests/",
            "tests/",
            "proxy-ebpf/abi/src/lib.rs",
            "proxy-ebpf/abi/src/addr.rs",
        ],
        advice: AYA.1,
    },
    Wall { word: "aya_obj", how: Use::Word, allowed: AYA.0, advice: AYA.1 },
    Wall {
        word: "aya_ebpf",
        how: Use::Word,
        allowed: &["proxy-ebpf/src/bin/dataplane/", "proxy-ebpf/src/bin/trace/"],
        advice: "the library is pure: helpers are called in proxy-ebpf/src/bin/dataplane, on values it has looked up",
    },
    Wall {
        word: "C",
        how: Use::Representation,
        allowed: &["proxy-ebpf/abi/src/", "proxy-agent/src/dataplane/sysbpf.rs", "proxy-agent/src/dataplane/sysbpf/"],
        advice: "types that lie in maps are made by the `abi!` macro in proxy-ebpf/abi",
    },
    Wall {
        word: "unsafe",
        how: Use::Word,
        allowed: UNSAFE,
        advice: "unsafe code has fixed addresses: use what they offer, or argue for a new one in xtask/src/tidy/wall.rs",
    },
];

/// Where unsafe code lives, and for what.
const UNSAFE: &[&str] = &[
    // Marks the map types as plain old data.
    "proxy-ebpf/abi/src/lib.rs",
    "proxy-ebpf/abi/src/addr.rs",
    // Helper calls, packet access, map pointers; also the attributes that name sections.
    "proxy-ebpf/src/bin/dataplane/",
    // The same, of the probes at the kernel's tracepoints.
    "proxy-ebpf/src/bin/trace/",
    // bpf(2) calls that aya lacks.
    "proxy-agent/src/dataplane/sysbpf.rs",
    "proxy-agent/src/dataplane/sysbpf/",
    // Lends a socket to the runtime for as long as it lives.
    "proxy-agent/src/node/netlink.rs",
];

/// Who may let time pass instead of waiting for a condition. Both have a deadline.
const SLEEPERS: [&str; 2] = ["proxy-agent/src/backoff.rs", "tests/src/deadline.rs"];

impl Wall {
    fn breaches<'a>(&'a self, file: &'a SourceFile) -> impl Iterator<Item = usize> + 'a {
        file.lines_with_word(self.word).filter(move |&number| {
            let line = file.code.lines().nth(number - 1).unwrap_or_default();
            word_starts(line, self.word).any(|at| self.how.holds(&line[..at], &line[at + self.word.len()..]))
        })
    }
}

impl Use {
    /// Whether a word between `before` and `after` on its line has this role.
    fn holds(self, before: &str, after: &str) -> bool {
        let (before, after) = (before.trim_end(), after.trim_start());
        match self {
            Self::Word => true,
            Self::Crate => {
                let imported = before.ends_with("use") || before.ends_with("extern crate");
                !before.ends_with("::") && !before.ends_with("mod") && (after.starts_with("::") || imported)
            }
            Self::Representation => before.contains("repr("),
        }
    }
}

pub(super) fn walls(repository: &Repository) -> Vec<Finding> {
    let mut findings = Vec::new();
    for file in repository.rust() {
        for wall in WALLS.iter().filter(|wall| !wall.allowed.iter().any(|place| file.path.starts_with(place))) {
            let breach =
                |line| Finding::new(&file.path, line, format!("`{}` may not stand here: {}", wall.word, wall.advice));
            findings.extend(wall.breaches(file).map(breach));
        }
    }
    findings
}

pub(super) fn sleep(repository: &Repository) -> Vec<Finding> {
    let message = "sleeping hides a race: wait for a condition with a deadline";
    let awake = repository.rust().filter(|file| !SLEEPERS.contains(&file.path.as_str()));
    awake
        .flat_map(|file| {
            let naps = file.lines_with_word("sleep").filter(|number| {
                let line = file.code.lines().nth(number - 1).unwrap_or_default();
                ["thread::sleep", "time::sleep", "thread::{sleep", "time::{sleep"]
                    .iter()
                    .any(|call| line.contains(call))
            });
            naps.map(|line| Finding::new(&file.path, line, message)).collect::<Vec<_>>()
        })
        .collect()
}

pub(super) fn ignored_tests(repository: &Repository) -> Vec<Finding> {
    let message = "a test that does not run proves nothing: mend it or remove it";
    repository
        .rust()
        .flat_map(|file| {
            let attributes = file.code.lines().enumerate().filter(|(_, line)| {
                word_starts(line, "ignore").any(|at| {
                    let before = line[..at].trim_end();
                    before.ends_with("#[") || (before.contains("cfg_attr(") && before.ends_with(','))
                })
            });
            attributes.map(|(number, _)| Finding::new(&file.path, number + 1, message)).collect::<Vec<_>>()
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Lines of `text` that `rule` finds when it lies at `path`.
    fn lines(rule: fn(&Repository) -> Vec<Finding>, path: &str, text: &str) -> Vec<usize> {
        rule(&Repository::of(&[(path, text)])).iter().map(|finding| finding.line).collect()
    }

    #[test]
    fn every_wall_stands_where_it_should_and_nowhere_else() {
        let cases: [(&str, &str, &[&str]); 7] = [
            ("use kube::Api;", "proxy-agent/src/node.rs", &["proxy-agent/src/k8s.rs", "proxy-agent/src/k8s/watch.rs"]),
            (
                "x: k8s_openapi::api::core::v1::Pod,",
                "proxy-agent/src/dataplane/x.rs",
                &["proxy-agent/src/k8s/convert.rs"],
            ),
            ("let map: aya::maps::Array<u32>;", "proxy-agent/src/reconciler.rs", &["proxy-agent/src/dataplane.rs"]),
            ("use aya_obj::Object;", "proxy-agent/core/src/x.rs", &["proxy-agent/src/dataplane/x.rs"]),
            ("use aya_ebpf::macros::map;", "proxy-ebpf/src/lib.rs", &["proxy-ebpf/src/bin/dataplane/maps.rs"]),
            (
                "#[repr(C)]",
                "proxy-agent/core/src/x.rs",
                &["proxy-ebpf/abi/src/flow.rs", "proxy-agent/src/dataplane/sysbpf.rs"],
            ),
            ("unsafe { f() }", "proxy-agent/src/dataplane/bpf.rs", &["proxy-agent/src/dataplane/sysbpf.rs"]),
        ];
        for (code, wrong, right) in cases {
            assert_eq!(lines(walls, wrong, &format!("//! A.\n{code}\n")), [2], "{code} in {wrong}");
            for place in right {
                assert_eq!(lines(walls, place, code), Vec::<usize>::new(), "{code} in {place}");
            }
        }
    }

    #[test]
    fn words_that_only_look_alike_pass() {
        let fine = "
            // unsafe, aya::Pod, kube::Api
            use crate::kube::Cluster;
            mod kube;
            #![forbid(unsafe_code)]
            let x = \"k8s_openapi\";
            #[repr(u8)]
        ";
        assert_eq!(lines(walls, "proxy-agent/core/src/x.rs", fine), Vec::<usize>::new());
    }

    #[test]
    fn sleeping_is_found() {
        for code in ["std::thread::sleep(x);", "tokio::time::sleep(x).await;", "use std::thread::{sleep, spawn};"] {
            assert_eq!(lines(sleep, "proxy-agent/src/x.rs", code), [1], "{code}");
            assert_eq!(lines(sleep, "tests/src/deadline.rs", code), Vec::<usize>::new(), "{code}");
        }
        assert_eq!(lines(sleep, "a.rs", "time::sleep_until(x); // thread::sleep"), Vec::<usize>::new());
    }

    #[test]
    fn ignored_tests_are_found() {
        let code = "#[ignore]\n#[ignore = \"slow\"]\n#[cfg_attr(miri, ignore)]\nlet ignore = 1;\n// #[ignore]\n";
        assert_eq!(lines(ignored_tests, "a.rs", code), [1, 2, 3]);
    }
}
