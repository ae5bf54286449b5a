//! `--source dir:PATH` on real folders: what is sent, in which order, for each kind of change.

use std::collections::BTreeSet;
use std::fmt::Write as _;
use std::fs;
use std::os::unix::fs::symlink;
use std::path::Path;
use std::time::{Duration, Instant};

use proxy_agent::k8s::{self, SourceConfig, SourceError, SourceHandle};
use proxy_core::event::{Event, Listing, Node, Source};
use proxy_core::name::ObjectName;
use proxy_core::netpol::reconcile::PolicyListing;
use tempfile::TempDir;
use tokio::sync::mpsc::{Receiver, channel};
use tokio::time::timeout;

/// Longest wait for an event that must come, on a busy machine and without optimisation.
const DEADLINE: Duration = Duration::from_mins(2);

struct Fixture {
    folder: TempDir,
    events: Receiver<Event>,
    _source: SourceHandle,
    marks: usize,
}

impl Fixture {
    async fn new(files: &[(&str, &str)]) -> Self {
        let folder = tempfile::tempdir().unwrap();
        for (name, text) in files {
            write(folder.path(), name, text);
        }
        Self::watching(folder).await
    }

    async fn watching(folder: TempDir) -> Self {
        let (tx, events) = channel(64);
        let source = k8s::spawn(SourceConfig::Dir(folder.path().to_owned()), "n1", tx).await.unwrap();
        Self { folder, events, _source: source, marks: 0 }
    }

    fn path(&self) -> &Path {
        self.folder.path()
    }

    fn write(&self, name: &str, text: &str) {
        write(self.path(), name, text);
    }

    async fn next(&mut self) -> Event {
        timeout(DEADLINE, self.events.recv()).await.expect("an event").expect("a source")
    }

    /// The first listing: what comes up to `Listed` of the Node.
    async fn listing(&mut self) -> Vec<String> {
        let mut shown = Vec::new();
        loop {
            let event = self.next().await;
            let end = event == Event::Listed(Source::Node, Listing::Node);
            shown.push(show(&event));
            if end {
                return shown;
            }
        }
    }

    /// The next events are these, and no more come of what was done before. One that ends in `…` is a beginning.
    async fn expect(&mut self, want: &[&str]) {
        for want in want {
            let event = show(&self.next().await);
            match want.strip_suffix('…') {
                Some(begin) => assert!(event.starts_with(begin), "{event:?} does not begin with {begin:?}"),
                None => assert_eq!(event, *want),
            }
        }
        // Findings about files come last of what one change gives, in the order of their names.
        self.marks += 1;
        self.write("zz-mark.yaml", &format!("{}- no object\n", "\n".repeat(self.marks)));
        let begin = format!("ill zz-mark.yaml: zz-mark.yaml:{}:", self.marks + 1);
        let event = show(&self.next().await);
        assert!(event.starts_with(&begin), "{event:?} after {want:?}");
    }
}

fn write(folder: &Path, name: &str, text: &str) {
    let path = folder.join(name);
    fs::create_dir_all(path.parent().unwrap()).unwrap();
    fs::write(path, text).unwrap();
}

fn service(name: &str, address: &str) -> String {
    format!(
        "apiVersion: v1\nkind: Service\nmetadata:\n  name: {name}\nspec:\n  clusterIP: {address}\n  ports:\n  - port: 80\n"
    )
}

fn slice(name: &str, service: &str, addresses: &[&str]) -> String {
    let endpoints = addresses.iter().fold(String::new(), |mut text, address| {
        write!(text, "\n- addresses: [{address}]").unwrap();
        text
    });
    format!(
        "apiVersion: discovery.k8s.io/v1\nkind: EndpointSlice\nmetadata:\n  name: {name}\n  labels: \
         {{kubernetes.io/service-name: {service}}}\naddressType: IPv4\nports:\n- port: 8080\nendpoints:{endpoints}\n"
    )
}

/// An event in a line.
fn show(event: &Event) -> String {
    match event {
        Event::Service(service) => format!("service {} {:?}", service.name.name, service.cluster_ips),
        Event::ServiceGone(name) => format!("gone {}", name.name),
        Event::Slice(slice) => {
            let addresses: Vec<_> = slice.endpoints.iter().map(|endpoint| endpoint.address.to_string()).collect();
            format!("slice {} of {} {addresses:?}", slice.name.name, slice.service.name)
        }
        Event::SliceGone(name) => format!("gone slice {}", name.name),
        Event::Node(node) => format!("node {} {:?}", node.name, node.addresses),
        Event::Diagnostics { object, findings } if findings.is_empty() => format!("well {object}"),
        Event::Diagnostics { object, findings } => {
            let findings: Vec<String> = findings.iter().map(ToString::to_string).collect();
            format!("ill {object}: {}", findings.join(" & "))
        }
        Event::Listed(source, Listing::Objects(names)) => {
            format!("listed {source:?} {:?}", names.iter().map(|name| &*name.name).collect::<Vec<_>>())
        }
        other => format!("{other:?}"),
    }
}

const EMPTY: [&str; 6] = [
    "node n1 []",
    "listed Services []",
    "listed EndpointSlices []",
    "Listed(ServiceCidrs, ServiceCidrs({}))",
    "NetworkPolicyListed(Policies({}))",
    "Listed(Node, Node)",
];

#[tokio::test]
async fn first_listing_in_full() {
    let node = "apiVersion: v1\nkind: Node\nmetadata: {name: n1}\nstatus:\n  addresses: [{type: InternalIP, address: 192.168.0.1}]\n";
    let other = node.replace("n1", "n2");
    let list = "{\"apiVersion\": \"v1\", \"kind\": \"List\", \"items\": [{\"apiVersion\": \"v1\", \"kind\": \"Service\", \
                \"metadata\": {\"name\": \"d\"}, \"spec\": {\"clusterIP\": \"10.0.0.4\", \"ports\": [{\"port\": 1}]}}]}";
    let typed = "apiVersion: v1\nkind: ServiceList\nitems:\n- metadata: {name: e}\n  spec: {clusterIP: 10.0.0.5, ports: [{port: 1}]}\n";
    let two =
        format!("# two of them\n---\n{}---\n{}...\n", service("a", "10.0.0.1"), slice("a-1", "a", &["10.244.0.1"]));
    let foreign = "apiVersion: serving.knative.dev/v1\nkind: Service\nmetadata: {name: k}\n---\napiVersion: apps/v1\nkind: Deployment\nmetadata: {name: d}\nspec: 7\n";
    let mut fixture = Fixture::new(&[
        ("a.yaml", &two),
        ("deep/er/b.yml", &service("b", "10.0.0.2")),
        ("deep/c.yaml", &service("c", "011.022.033.044")),
        ("deep/list.json", list),
        ("e.yaml", typed),
        ("foreign.yaml", foreign),
        ("node.yaml", &format!("{other}---\n{node}")),
        ("headless.yaml", &service("h", "None")),
        ("notes.txt", "kind: {"),
        (".hidden.yaml", "kind: {"),
        ("backup.yaml~", "kind: {"),
        ("empty.yaml", "# nothing\n---\n---\n"),
        (
            "ranges.yaml",
            "apiVersion: networking.k8s.io/v1\nkind: ServiceCIDR\nmetadata: {name: kubernetes}\nspec: {cidrs: [010.0.0.0/16]}\n",
        ),
    ])
    .await;
    assert_eq!(
        fixture.listing().await,
        [
            "service a [10.0.0.1]",
            "service b [10.0.0.2]",
            "service c [11.22.33.44]",
            "service d [10.0.0.4]",
            "service e [10.0.0.5]",
            "slice a-1 of a [\"10.244.0.1\"]",
            "node n1 [192.168.0.1]",
            "ServiceCidr(\"kubernetes\", [10.0.0.0/16])",
            "listed Services [\"a\", \"b\", \"c\", \"d\", \"e\"]",
            "listed EndpointSlices [\"a-1\"]",
            "Listed(ServiceCidrs, ServiceCidrs({\"kubernetes\"}))",
            "NetworkPolicyListed(Policies({}))",
            "Listed(Node, Node)",
        ]
    );
}

#[tokio::test]
async fn ranges_of_services_come_change_and_go() {
    let mut fixture = Fixture::new(&[]).await;
    assert_eq!(fixture.listing().await, EMPTY);
    let range = |ranges: &str| {
        format!(
            "apiVersion: networking.k8s.io/v1\nkind: ServiceCIDR\nmetadata: {{name: x}}\nspec: {{cidrs: [{ranges}]}}\n"
        )
    };
    fixture.write("x.yaml", &range("10.96.0.0/16, \"fd00:96::/112\""));
    fixture.expect(&["ServiceCidr(\"x\", [10.96.0.0/16, fd00:96::/112])"]).await;
    fixture.write("x.yaml", &range("10.96.0.0/16, all"));
    let ill = "ill ServiceCIDR x: x.yaml:1 ServiceCIDR x spec.cidrs[1]: \"all\" is no network in CIDR notation, and is \
               left out; write it like 10.96.0.0/16";
    fixture.expect(&["ServiceCidr(\"x\", [10.96.0.0/16])", ill]).await;
    fs::remove_file(fixture.path().join("x.yaml")).unwrap();
    fixture.expect(&["ServiceCidrGone(\"x\")", "well ServiceCIDR x"]).await;
}

#[tokio::test]
async fn files_come_change_and_go() {
    let mut fixture = Fixture::new(&[]).await;
    assert_eq!(fixture.listing().await, EMPTY);

    fixture.write("a.yaml", &service("a", "10.0.0.1"));
    fixture.expect(&["service a [10.0.0.1]"]).await;
    // Unchanged content, and a comment, are no news.
    fixture.write("a.yaml", &service("a", "10.0.0.1"));
    fixture.write("a.yaml", &format!("# why\n{}", service("a", "10.0.0.1")));
    fixture.expect(&[]).await;
    fixture.write("a.yaml", &service("a", "10.0.0.9"));
    fixture.expect(&["service a [10.0.0.9]"]).await;

    // An atomic replacement, as editors and kubectl-like tools do it.
    fixture.write(".a.tmp", &service("a", "10.0.0.3"));
    fs::rename(fixture.path().join(".a.tmp"), fixture.path().join("a.yaml")).unwrap();
    fixture.expect(&["service a [10.0.0.3]"]).await;
    // Renaming moves the object with the file; nothing is said of it.
    fs::rename(fixture.path().join("a.yaml"), fixture.path().join("b.yaml")).unwrap();
    fixture.expect(&[]).await;
    fs::rename(fixture.path().join("b.yaml"), fixture.path().join("b.off")).unwrap();
    fixture.expect(&["gone a"]).await;

    // Folders, with what was written before the watch was on them.
    fixture.write("x/y/z/c.yaml", &service("c", "10.0.0.4"));
    fixture.expect(&["service c [10.0.0.4]"]).await;
    fixture.write("x/y/z/d.yaml", &service("d", "10.0.0.5"));
    fixture.expect(&["service d [10.0.0.5]"]).await;
    fs::rename(fixture.path().join("x/y"), fixture.path().join("w")).unwrap();
    fixture.expect(&[]).await;
    fixture.write("w/z/d.yaml", &service("d", "10.0.0.6"));
    fixture.expect(&["service d [10.0.0.6]"]).await;
    fs::remove_dir_all(fixture.path().join("w")).unwrap();
    let gone = BTreeSet::from([show(&fixture.next().await), show(&fixture.next().await)]);
    assert_eq!(gone, BTreeSet::from(["gone c".to_owned(), "gone d".to_owned()]));
    fixture.expect(&[]).await;
}

#[tokio::test]
async fn a_volume_is_switched_as_a_whole() {
    let folder = tempfile::tempdir().unwrap();
    write(folder.path(), "..1/a.yaml", &service("a", "10.0.0.1"));
    write(folder.path(), "..1/b.yaml", &service("b", "10.0.0.2"));
    symlink("..1", folder.path().join("..data")).unwrap();
    symlink("..data/a.yaml", folder.path().join("a.yaml")).unwrap();
    symlink("..data/b.yaml", folder.path().join("b.yaml")).unwrap();
    let mut fixture = Fixture::watching(folder).await;
    assert_eq!(fixture.listing().await[..2], ["service a [10.0.0.1]", "service b [10.0.0.2]"]);

    fixture.write("..2/a.yaml", &service("a", "10.0.0.9"));
    fixture.write("..2/b.yaml", &service("b", "10.0.0.2"));
    symlink("..2", fixture.path().join("..data_tmp")).unwrap();
    fs::rename(fixture.path().join("..data_tmp"), fixture.path().join("..data")).unwrap();
    fs::remove_dir_all(fixture.path().join("..1")).unwrap();
    fixture.expect(&["service a [10.0.0.9]"]).await;

    fixture.write("..3/a.yaml", &service("a", "10.0.0.9"));
    symlink("..3", fixture.path().join("..data_tmp")).unwrap();
    fs::rename(fixture.path().join("..data_tmp"), fixture.path().join("..data")).unwrap();
    fixture.expect(&["gone b"]).await;
}

#[tokio::test]
async fn a_linked_file_is_followed() {
    let outside = tempfile::tempdir().unwrap();
    write(outside.path(), "a.yaml", &service("a", "10.0.0.1"));
    let folder = tempfile::tempdir().unwrap();
    symlink(outside.path().join("a.yaml"), folder.path().join("a.yaml")).unwrap();
    symlink(folder.path(), folder.path().join("circle")).unwrap();
    let mut fixture = Fixture::watching(folder).await;
    assert_eq!(fixture.listing().await[0], "service a [10.0.0.1]");
    write(outside.path(), "a.yaml", &service("a", "10.0.0.2"));
    loop {
        if show(&fixture.next().await) == "service a [10.0.0.2]" {
            break;
        }
    }
}

#[tokio::test]
async fn what_is_broken_stays_as_it_was() {
    let three = |middle: &str| format!("{}---\n{middle}---\n{}", service("a", "10.0.0.1"), service("c", "10.0.0.3"));
    let mut fixture = Fixture::new(&[("f.yaml", &three(&service("b", "10.0.0.2")))]).await;
    fixture.listing().await;

    // A wrong type: the field, the object, the line. The rest goes on.
    let wrong = service("b", "10.0.0.2").replace("port: 80", "port: eighty");
    fixture.write("f.yaml", &three(&wrong).replace("10.0.0.3", "10.0.0.33"));
    fixture
        .expect(&[
            "ill Service default/b: f.yaml:10 Service default/b spec.ports[0].port: invalid type: string \"eighty\", \
             expected i32; mend the field; the object's last good version stays",
            "service c [10.0.0.33]",
        ])
        .await;
    fixture.write("f.yaml", &three(&service("b", "10.0.0.22")));
    fixture.expect(&["service b [10.0.0.22]", "well Service default/b", "service c [10.0.0.3]"]).await;

    // A syntax error in a document that still says whose it is.
    fixture.write("f.yaml", &three(&service("b", "[10.0.0.2")));
    fixture.expect(&["ill Service default/b: f.yaml:10 Service default/b: document 2 is broken near line 1…"]).await;
    // And one removed beside it goes.
    fixture.write("f.yaml", &format!("---\n{}", service("b", "[10.0.0.2")));
    fixture
        .expect(&["gone a", "ill Service default/b: f.yaml:2 Service default/b: document 1 is broken…", "gone c"])
        .await;

    // One that does not: all that is missing stays.
    fixture.write("f.yaml", "kind: {\n");
    fixture.expect(&["ill f.yaml: f.yaml: document 1 is broken near line …"]).await;
    fs::write(fixture.path().join("f.yaml"), b"kind: Service\nmetadata: {name: \xff}\n").unwrap();
    fixture.expect(&["ill f.yaml: f.yaml: is not UTF-8 from byte 31 on; what it held before stays in effect; save the file as UTF-8"]).await;
    // The file removed takes it with it.
    fs::remove_file(fixture.path().join("f.yaml")).unwrap();
    fixture.expect(&["gone b", "well Service default/b", "well f.yaml"]).await;
}

#[tokio::test]
async fn findings_name_file_object_and_field() {
    let rows: &[(&str, &str, &[&str])] = &[
        ("a.yaml", "- 1\n", &["ill a.yaml: a.yaml:1: is not a Kubernetes object; begin it with apiVersion and kind"]),
        (
            "a.yaml",
            "\nmetadata: {}\n",
            &["ill a.yaml: a.yaml:2 kind: is missing or not text; begin the object with apiVersion and kind"],
        ),
        (
            "a.yaml",
            "apiVersion: v1\nkind: Service\nmetadata: {}\n",
            &["ill a.yaml: a.yaml:1 Service metadata.name: is missing, empty or not text; give the object a name"],
        ),
        (
            "a.yaml",
            "apiVersion: discovery.k8s.io/v1beta1\nkind: EndpointSlice\nmetadata: {name: s}\n",
            &[
                "ill EndpointSlice default/s: a.yaml:1 EndpointSlice default/s apiVersion: \"discovery.k8s.io/v1beta1\" is not \
               supported; write discovery.k8s.io/v1",
            ],
        ),
        (
            "a.yaml",
            "apiVersion: v1\nkind: List\nitems:\n- apiVersion: v1\n  kind: Service\n  metadata: {name: s}\n  spec: {clusterIP: 7}\n",
            &[
                "ill Service default/s: a.yaml:1 Service default/s items[0].spec.clusterIP: invalid type: integer `7`, expected \
               a string; mend the field; the object's last good version stays",
            ],
        ),
        (
            "a.yaml",
            "apiVersion: v1\nkind: Service\nmetadata: {name: s, namespace: x}\nspec: {clusterIp: 10.0.0.1, clusterIP: 10.0.0.1, ports: [{port: 1, prot: UDP}]}\n",
            &[
                "service s [10.0.0.1]",
                "ill Service x/s: a.yaml:1 Service x/s spec.clusterIp: is not a field of this kind, and is ignored; check its \
                 spelling and indentation & a.yaml:1 Service x/s spec.ports[0].prot: is not a field of this kind, and is \
                 ignored; check its spelling and indentation",
            ],
        ),
        (
            "a.json",
            "{\"kind\": \"Secret\", \"apiVersion\": \"v1\"}\n{\"kind\": 1,",
            &[
                "ill a.json: a.json:2: document 2 is broken: EOF while parsing a value at line 2 column 11; mend the JSON; what \
               it held before stays",
            ],
        ),
    ];
    for (file, text, want) in rows {
        let mut fixture = Fixture::new(&[(file, text)]).await;
        let got = fixture.listing().await;
        let got: Vec<&str> = got.iter().map(String::as_str).take_while(|event| *event != EMPTY[0]).collect();
        // Of what could not be read in any version the receiver is told before the listing.
        let unread = if want[0].starts_with("ill") { &["Unreadable(true)"][..] } else { &[] };
        assert_eq!(got, [want, unread].concat(), "{text}");
    }
}

#[tokio::test]
async fn what_could_never_be_read_is_told_until_it_can_be_or_is_gone() {
    let broken = service("b", "10.0.0.2").replace("port: 80", "port: eighty");
    let files = [("a.yaml", service("a", "10.0.0.1")), ("b.yaml", broken.clone()), ("c.yaml", "kind: {\n".to_owned())];
    let mut fixture = Fixture::new(&files.each_ref().map(|(name, text)| (*name, text.as_str()))).await;
    let listing = fixture.listing().await;
    let told = listing.iter().position(|event| event == "Unreadable(true)");
    let listed = listing.iter().position(|event| event == "listed Services [\"a\"]");
    assert!(told.is_some() && told < listed, "{listing:?}");

    fixture.write("b.yaml", &service("b", "10.0.0.2"));
    fixture.expect(&["service b [10.0.0.2]", "well Service default/b"]).await;
    fs::remove_file(fixture.path().join("c.yaml")).unwrap();
    fixture.expect(&["well c.yaml", "Unreadable(false)"]).await;
    // What breaks from now on has a last good version.
    fixture.write("b.yaml", &broken);
    fixture
        .expect(&[
            "ill Service default/b: b.yaml:1 Service default/b spec.ports[0].port: invalid type: string \"eighty\", expected \
             i32; mend the field; the object's last good version stays",
        ])
        .await;
}

#[tokio::test]
async fn the_first_file_decides() {
    let mut fixture =
        Fixture::new(&[("a.yaml", &service("s", "10.0.0.1")), ("b.yaml", &service("s", "10.0.0.2"))]).await;
    assert_eq!(
        fixture.listing().await[..2],
        [
            "service s [10.0.0.1]",
            "ill Service default/s: b.yaml Service default/s: is defined in a.yaml already, and is ignored here; define each \
             object once",
        ]
    );
    fs::remove_file(fixture.path().join("a.yaml")).unwrap();
    fixture.expect(&["service s [10.0.0.2]", "well Service default/s"]).await;
    // A broken one that never was good does not hide a good one.
    fixture.write("a.yaml", &service("s", "[10.0.0.1"));
    fixture.expect(&["ill Service default/s: a.yaml:1 …"]).await;
}

#[tokio::test]
async fn headless_is_toggled_live() {
    let labelled =
        |text: String| text.replace("  name: s", "  name: s\n  labels: {service.kubernetes.io/headless: \"\"}");
    let mut fixture = Fixture::new(&[("s.yaml", &service("s", "10.0.0.1"))]).await;
    fixture.listing().await;
    for (text, want) in [
        (labelled(service("s", "10.0.0.1")), "gone s"),
        (service("s", "10.0.0.1"), "service s [10.0.0.1]"),
        (service("s", "None"), "gone s"),
        (service("s", "10.0.0.2"), "service s [10.0.0.2]"),
        (service("s", "10.0.0.2").replace("spec:", "spec:\n  type: ExternalName"), "gone s"),
    ] {
        fixture.write("s.yaml", &text);
        fixture.expect(&[want]).await;
    }
}

#[tokio::test]
async fn the_node_comes_and_goes() {
    let node = "apiVersion: v1\nkind: Node\nmetadata: {name: n1}\nstatus: {addresses: [{type: InternalIP, address: 10.1.1.1}]}\n";
    let mut fixture = Fixture::new(&[]).await;
    fixture.listing().await;
    fixture.write("n.yaml", node);
    fixture.expect(&["node n1 [10.1.1.1]"]).await;
    fs::remove_file(fixture.path().join("n.yaml")).unwrap();
    fixture.expect(&["node n1 []"]).await;
}

#[tokio::test]
async fn a_folder_that_vanishes_leaves_its_state() {
    let mut fixture = Fixture::new(&[("s.yaml", &service("s", "10.0.0.1"))]).await;
    fixture.listing().await;
    let away = fixture.path().with_extension("away");
    fs::rename(fixture.path(), &away).unwrap();
    let event = show(&fixture.next().await);
    assert!(event.contains("cannot be read") && event.contains("what it held before stays"), "{event}");
    fs::rename(&away, fixture.path()).unwrap();
    let event = show(&fixture.next().await);
    assert!(event.starts_with("well "), "{event}");
    fixture.expect(&[]).await;
}

#[tokio::test]
async fn folders_that_cannot_be_used() {
    let folder = tempfile::tempdir().unwrap();
    write(folder.path(), "file", "");
    let start = async |path: &Path| k8s::spawn(SourceConfig::Dir(path.to_owned()), "n1", channel(1).0).await.err();
    assert!(matches!(start(&folder.path().join("absent")).await, Some(SourceError::Folder { .. })));
    assert!(matches!(start(&folder.path().join("file")).await, Some(SourceError::NotAFolder { .. })));
}

#[tokio::test]
async fn ten_thousand_objects() {
    let folder = tempfile::tempdir().unwrap();
    for at in 0..5000 {
        let name = format!("s{at:04}");
        let text = format!(
            "{}---\n{}",
            service(&name, &format!("10.96.{}.{}", at / 250, at % 250 + 1)),
            slice(&name, &name, &[&format!("10.244.{}.{}", at / 250, at % 250 + 1)]),
        );
        write(folder.path(), &format!("{}/{name}.yaml", at % 10), &text);
    }
    let begin = Instant::now();
    let mut fixture = Fixture::watching(folder).await;
    let mut counts = (0, 0);
    loop {
        match fixture.next().await {
            Event::Service(_) => counts.0 += 1,
            Event::Slice(_) => counts.1 += 1,
            Event::Listed(Source::Services, Listing::Objects(names)) => assert_eq!(names.len(), 5000),
            Event::Listed(Source::EndpointSlices, Listing::Objects(names)) => {
                assert!(names.contains(&ObjectName::new("default", "s4999")));
                assert_eq!(names.len(), 5000);
            }
            Event::Node(node) => assert_eq!(node, Node { name: "n1".into(), ..Node::default() }),
            Event::Listed(Source::ServiceCidrs, Listing::ServiceCidrs(names)) => assert_eq!(names.len(), 0),
            Event::NetworkPolicyListed(PolicyListing::Policies(names)) => assert_eq!(names.len(), 0),
            Event::Listed(Source::Node, Listing::Node) => break,
            other => panic!("unexpected {other:?}"),
        }
    }
    assert_eq!(counts, (5000, 5000));
    println!("10,000 objects in 5,000 files: {:?}", begin.elapsed());

    // One change among them.
    let mut waits = Vec::new();
    for round in 0..50 {
        let text = service("s0007", &format!("10.97.0.{}", round + 1));
        let begin = Instant::now();
        fixture.write("7/s0007.yaml", &format!("{text}---\n{}", slice("s0007", "s0007", &["10.244.0.8"])));
        assert_eq!(show(&fixture.next().await), format!("service s0007 [10.97.0.{}]", round + 1));
        waits.push(begin.elapsed());
    }
    waits.sort_unstable();
    println!("change of a file to event: median {:?}, worst {:?}", waits[25], waits[49]);
}
