//! The CNI's records on a real folder: what is said of them as they come, change and go.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;
use std::time::Duration;

use proxy_agent::node::cni::{Records, spawn};
use proxy_core::event::Event;
use serde_json::json;
use tokio::sync::mpsc::{Receiver, channel};
use tokio::sync::watch;
use tokio::time::timeout;

const DEADLINE: Duration = Duration::from_mins(1);

struct Fixture {
    records: watch::Receiver<Records>,
    events: Receiver<Event>,
}

impl Fixture {
    fn new(folder: &Path) -> Self {
        let (tx, events) = channel(64);
        Self { records: spawn(folder, tx).unwrap(), events }
    }

    /// UID by file name, once it is as wanted.
    async fn until(&mut self, want: &[(&str, &str)]) {
        let want: BTreeMap<String, String> = want.iter().map(|(a, b)| ((*a).to_owned(), (*b).to_owned())).collect();
        let reached = self.records.wait_for(|records| uids(records) == want);
        let reached = timeout(DEADLINE, reached).await.map(|records| records.map(|_| ()));
        assert!(matches!(reached, Ok(Ok(()))), "{want:?} is not reached");
    }

    async fn finding(&mut self) -> String {
        match timeout(DEADLINE, self.events.recv()).await.expect("an event").expect("a source") {
            Event::Diagnostics { object, findings } if findings.is_empty() => format!("well {object}"),
            Event::Diagnostics { findings, .. } => findings[0].to_string(),
            other => panic!("{other:?}"),
        }
    }
}

fn uids(records: &Records) -> BTreeMap<String, String> {
    let one = |(name, attachment): (
        &std::sync::Arc<std::ffi::OsStr>,
        &std::sync::Arc<proxy_agent::node::cni::Attachment>,
    )| { (name.to_string_lossy().into_owned(), attachment.uid.to_string()) };
    records.attachments.iter().map(one).collect()
}

fn record(uid: &str) -> String {
    json!({
        "kind": "cniCacheV1", "ifName": "eth0",
        "cniArgs": [["K8S_POD_NAMESPACE", "default"], ["K8S_POD_NAME", "a"], ["K8S_POD_UID", uid]],
        "result": {
            "interfaces": [{"name": "veth1"}, {"name": "eth0", "sandbox": "/x"}],
            "ips": [{"interface": 1, "address": "10.0.0.1/24"}],
        },
    })
    .to_string()
}

#[tokio::test]
async fn records_come_change_and_go() {
    let folder = tempfile::tempdir().unwrap();
    let at = folder.path();
    fs::write(at.join("a"), record("u-a")).unwrap();
    fs::create_dir(at.join("no-file")).unwrap();
    let mut fixture = Fixture::new(at);
    assert_eq!(uids(&fixture.records.borrow()), [("a".to_owned(), "u-a".to_owned())].into(), "read before it returns");
    assert_eq!(fixture.records.borrow().problem, None);

    fs::write(at.join("b"), record("u-b")).unwrap();
    fixture.until(&[("a", "u-a"), ("b", "u-b")]).await;
    fs::write(at.join("b"), record("u-c")).unwrap();
    fixture.until(&[("a", "u-a"), ("b", "u-c")]).await;
    fs::write(at.join(".draft"), record("u-d")).unwrap();
    fs::rename(at.join(".draft"), at.join("d")).unwrap();
    fixture.until(&[("a", "u-a"), ("b", "u-c"), ("d", "u-d")]).await;
    fs::rename(at.join("d"), folder.path().with_extension("away")).unwrap();
    fs::remove_file(folder.path().with_extension("away")).unwrap();
    fs::remove_file(at.join("a")).unwrap();
    fixture.until(&[("b", "u-c")]).await;

    // What is broken stays as it was, and is told of.
    let name = |file: &str| format!("CNI record {}", at.join(file).display());
    fs::write(at.join("b"), "{").unwrap();
    let said = fixture.finding().await;
    assert!(said.starts_with(&format!("{}: is no record of libcni: ", name("b"))), "{said}");
    assert_eq!(uids(&fixture.records.borrow())["b"], "u-c");
    fs::remove_file(at.join("b")).unwrap();
    assert_eq!(fixture.finding().await, format!("well {}", name("b")));
    fixture.until(&[]).await;
}

#[tokio::test]
async fn a_folder_that_is_not_there_is_waited_for() {
    let folder = tempfile::tempdir().unwrap();
    let at = folder.path().join("cni/results");
    let mut fixture = Fixture::new(&at);
    let problem = fixture.records.borrow().problem.clone().expect("a problem");
    assert!(problem.starts_with(&format!("{} cannot be read: ", at.display())), "{problem}");
    fs::create_dir_all(&at).unwrap();
    fs::write(at.join("a"), record("u-a")).unwrap();
    fixture.until(&[("a", "u-a")]).await;
    assert_eq!(fixture.records.borrow().problem, None);
    // It goes and comes again: what it said stays until it can be read.
    fs::remove_dir_all(&at).unwrap();
    let gone = timeout(DEADLINE, fixture.records.wait_for(|records| records.problem.is_some())).await;
    drop(gone.expect("told").expect("a source"));
    fs::create_dir_all(&at).unwrap();
    fs::write(at.join("b"), record("u-b")).unwrap();
    fixture.until(&[("b", "u-b")]).await;
}

#[tokio::test]
async fn a_thousand_at_once() {
    let folder = tempfile::tempdir().unwrap();
    let mut fixture = Fixture::new(folder.path());
    for n in 0..1_000 {
        fs::write(folder.path().join(format!("r{n}")), record(&format!("u-{n}"))).unwrap();
    }
    let all = timeout(DEADLINE, fixture.records.wait_for(|records| records.attachments.len() == 1_000)).await;
    drop(all.expect("all of them").expect("a source"));
}
