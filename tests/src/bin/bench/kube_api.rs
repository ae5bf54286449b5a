//! As much of an API server as kube-proxy needs: lists and watches of three kinds, in JSON, that never change.
//!
//! ```text
//!   GET /api/v1/services, /api/v1/nodes, /apis/discovery.k8s.io/v1/endpointslices
//!     list                                 all objects
//!     watch=true                           nothing, and stays open
//!     watch=true&sendInitialEvents=true    every object as ADDED, a bookmark that says so, and stays open
//!   GET /api/v1/nodes/NAME                 one object
//!   POST …/events                          taken
//! ```

use std::io::{self, BufRead as _, BufReader, Read as _, Write as _};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::os::fd::AsRawFd as _;
use std::sync::Arc;
use std::thread::{self, JoinHandle};

use anyhow::{Context as _, Result};
use nix::sys::socket;
use proxy_tests::Netns;
use serde_json::{Value, json};

/// Version of everything.
const REVISION: &str = "1";

/// Listens until dropped.
#[derive(Debug)]
pub(crate) struct FakeApi {
    address: SocketAddr,
    listener: Arc<TcpListener>,
    acceptor: Option<JoinHandle<()>>,
}

/// One kind, as it is sent.
#[derive(Debug)]
struct Kind {
    path: &'static str,
    objects: Vec<Value>,
    list: String,
    /// The events of a watch that wants the objects first.
    initial: String,
}

impl Kind {
    fn new(path: &'static str, api: &str, kind: &str, mut objects: Vec<Value>) -> Self {
        for (number, object) in objects.iter_mut().enumerate() {
            object["metadata"]["uid"] = json!(format!("{kind}-{number}"));
            object["metadata"]["resourceVersion"] = json!(REVISION);
        }
        let list = json!({
            "apiVersion": api, "kind": format!("{kind}List"), "metadata": { "resourceVersion": REVISION },
            "items": objects,
        });
        let added = objects.iter().map(|object| json!({ "type": "ADDED", "object": object }).to_string() + "\n");
        let bookmark = json!({ "type": "BOOKMARK", "object": {
            "apiVersion": api, "kind": kind,
            "metadata": { "resourceVersion": REVISION, "annotations": { "k8s.io/initial-events-end": "true" } },
        }});
        let initial = added.collect::<String>() + &bookmark.to_string() + "\n";
        Self { path, objects, list: list.to_string(), initial }
    }
}

impl FakeApi {
    /// Serves these objects on a port of 127.0.0.1 in the namespace.
    pub(crate) fn start(netns: &Netns, services: Vec<Value>, slices: Vec<Value>, nodes: Vec<Value>) -> Result<Self> {
        let listener = Arc::new(netns.run(|| TcpListener::bind("127.0.0.1:0"))?.context("API server")?);
        let address = listener.local_addr()?;
        let kinds = Arc::new([
            Kind::new("/api/v1/services", "v1", "Service", services),
            Kind::new("/apis/discovery.k8s.io/v1/endpointslices", "discovery.k8s.io/v1", "EndpointSlice", slices),
            Kind::new("/api/v1/nodes", "v1", "Node", nodes),
        ]);
        let accepting = Arc::clone(&listener);
        let acceptor = thread::Builder::new().name("api".to_owned()).spawn(move || {
            for connection in accepting.incoming() {
                let Ok(connection) = connection else { return };
                let kinds = Arc::clone(&kinds);
                // A broken connection is kube-proxy's to mend: it connects again.
                let serve = move || drop(serve(&connection, kinds.as_slice()));
                drop(thread::Builder::new().name("api-connection".to_owned()).spawn(serve));
            }
        })?;
        Ok(Self { address, listener, acceptor: Some(acceptor) })
    }

    /// Where it listens.
    pub(crate) fn address(&self) -> SocketAddr {
        self.address
    }
}

impl Drop for FakeApi {
    fn drop(&mut self) {
        // Wakes the acceptor; connections end with their client.
        let _ = socket::shutdown(self.listener.as_raw_fd(), socket::Shutdown::Both);
        drop(self.acceptor.take().map(JoinHandle::join));
    }
}

/// Serves one connection until the client closes it.
fn serve(connection: &TcpStream, kinds: &[Kind]) -> io::Result<()> {
    let mut reader = BufReader::new(connection);
    loop {
        let mut line = String::new();
        if reader.read_line(&mut line)? == 0 {
            return Ok(());
        }
        let mut length = 0;
        loop {
            let mut header = String::new();
            if reader.read_line(&mut header)? <= 2 {
                break;
            }
            let (name, value) = header.split_once(':').unwrap_or_default();
            if name.eq_ignore_ascii_case("content-length") {
                length = value.trim().parse().unwrap_or_default();
            }
        }
        let mut body = vec![0; length];
        reader.read_exact(&mut body)?;
        let mut words = line.split(' ');
        let (method, target) = (words.next().unwrap_or_default(), words.next().unwrap_or_default());
        let (path, query) = target.split_once('?').unwrap_or((target, ""));
        let has =
            |name: &str| query.split('&').any(|part| part == format!("{name}=true") || part == format!("{name}=1"));
        match kinds.iter().find(|kind| kind.path == path) {
            Some(kind) if has("watch") => {
                watch(connection, if has("sendInitialEvents") { &kind.initial } else { "" })?;
                // Nothing changes: the rest is waiting for the client to go.
                return reader.read(&mut [0]).map(drop);
            }
            Some(kind) => answer(connection, "200 OK", &kind.list)?,
            None if method == "POST" => answer(connection, "201 Created", &String::from_utf8_lossy(&body))?,
            None => match named(kinds, path) {
                Some(object) => answer(connection, "200 OK", &object.to_string())?,
                None => answer(connection, "404 Not Found", NOT_FOUND)?,
            },
        }
    }
}

const NOT_FOUND: &str =
    r#"{"kind":"Status","apiVersion":"v1","metadata":{},"status":"Failure","reason":"NotFound","code":404}"#;

fn named<'a>(kinds: &'a [Kind], path: &str) -> Option<&'a Value> {
    let (parent, name) = path.rsplit_once('/')?;
    kinds.iter().find(|kind| kind.path == parent)?.objects.iter().find(|object| object["metadata"]["name"] == name)
}

fn answer(mut connection: &TcpStream, status: &str, body: &str) -> io::Result<()> {
    let head = format!("HTTP/1.1 {status}\r\nContent-Type: application/json\r\nContent-Length: {}\r\n\r\n", body.len());
    connection.write_all(head.as_bytes())?;
    connection.write_all(body.as_bytes())
}

/// Begins an endless answer.
fn watch(mut connection: &TcpStream, events: &str) -> io::Result<()> {
    let head = "HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\n";
    connection.write_all(head.as_bytes())?;
    if events.is_empty() {
        return Ok(());
    }
    connection.write_all(format!("{:x}\r\n", events.len()).as_bytes())?;
    connection.write_all(events.as_bytes())?;
    connection.write_all(b"\r\n")
}
