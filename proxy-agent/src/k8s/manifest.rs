//! The text of one manifest file as objects: YAML or JSON, several documents, `List` kinds unrolled.
//!
//! ```text
//!   bytes ──▶ documents ──▶ values ──▶ items of lists ──┬─▶ Service, EndpointSlice, Node, ServiceCIDR ──┬─▶ convert
//!             split at ---                              └─▶ NetworkPolicy, Pod, Namespace ──────────────┘
//!             one broken document does not hide the others
//! ```

use std::cell::RefCell;

use ipnet::IpNet;
use k8s_openapi::api::core::v1 as core_v1;
use k8s_openapi::api::discovery::v1 as discovery_v1;
use k8s_openapi::api::networking::v1 as networking_v1;
use proxy_core::diagnostic::{Diagnostic, Severity};
use proxy_core::event::Node;
use proxy_core::name::ObjectName;
use proxy_core::netpol::spec::{Namespace, Pod, PolicySpec};
use proxy_core::service::{EndpointSlice, Service};
use serde::de::DeserializeOwned;
use serde_json::Value;

use super::convert::{
    Converted, convert_namespace, convert_node, convert_pod, convert_policy, convert_service, convert_service_cidr,
    convert_slice, object_name, subject,
};

/// Kinds that are read.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(super) enum Kind {
    Service,
    EndpointSlice,
    Node,
    ServiceCidr,
    NetworkPolicy,
    Pod,
    Namespace,
}

impl Kind {
    const ALL: [Self; 7] = [
        Self::Service,
        Self::EndpointSlice,
        Self::Node,
        Self::ServiceCidr,
        Self::NetworkPolicy,
        Self::Pod,
        Self::Namespace,
    ];

    pub(super) const fn name(self) -> &'static str {
        match self {
            Self::Service => "Service",
            Self::EndpointSlice => "EndpointSlice",
            Self::Node => "Node",
            Self::ServiceCidr => "ServiceCIDR",
            Self::NetworkPolicy => "NetworkPolicy",
            Self::Pod => "Pod",
            Self::Namespace => "Namespace",
        }
    }

    const fn api_version(self) -> &'static str {
        match self {
            Self::Service | Self::Node | Self::Pod | Self::Namespace => "v1",
            Self::EndpointSlice => "discovery.k8s.io/v1",
            Self::ServiceCidr | Self::NetworkPolicy => "networking.k8s.io/v1",
        }
    }

    const fn is_namespaced(self) -> bool {
        match self {
            Self::Service | Self::EndpointSlice | Self::NetworkPolicy | Self::Pod => true,
            Self::Node | Self::ServiceCidr | Self::Namespace => false,
        }
    }

    /// Is it of no interest before there is a NetworkPolicy?
    pub(super) const fn is_for_policies(self) -> bool {
        matches!(self, Self::Pod | Self::Namespace)
    }

    /// `None` for kinds that are somebody else's. Groups are compared, so that a wrong version can be told from
    /// another group's kind of the same name.
    fn of(api_version: &str, kind: &str) -> Option<Self> {
        let group = api_version.split_once('/').map_or("", |(group, _)| group);
        Self::ALL.into_iter().find(|ours| {
            let our_group = ours.api_version().split_once('/').map_or("", |(group, _)| group);
            ours.name() == kind && our_group == group
        })
    }
}

/// What identifies an object among all files. The namespace of a kind that has none is empty.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(super) struct ObjectKey {
    pub(super) kind: Kind,
    pub(super) name: ObjectName,
}

impl ObjectKey {
    /// Key of its diagnostics.
    pub(super) fn subject(&self) -> String {
        if self.kind.is_namespaced() {
            subject(self.kind.name(), &self.name)
        } else {
            format!("{} {}", self.kind.name(), self.name.name)
        }
    }
}

/// A converted object of any kind.
#[derive(Clone, Debug, PartialEq)]
pub(super) enum Object {
    Service(Service),
    Slice(EndpointSlice),
    Node(Node),
    ServiceCidr(Vec<IpNet>),
    NetworkPolicy(PolicySpec),
    Pod(Pod),
    Namespace(Namespace),
}

/// One thing found in a file.
#[derive(Clone, Debug, PartialEq)]
pub(super) enum Found {
    /// An object; `None` when it is none of ours or nothing of it is valid.
    Object { key: ObjectKey, outcome: Option<Object>, findings: Vec<Diagnostic> },
    /// An object that is known by name and cannot be read.
    Broken { key: ObjectKey, finding: Diagnostic },
    /// Something that cannot be read and may be any object.
    Unknown { finding: Diagnostic },
}

/// Reads one file. `label` is its name in diagnostics, `json` whether to read it as JSON rather than YAML.
pub(super) fn parse(label: &str, bytes: &[u8], json: bool) -> Vec<Found> {
    let text = match std::str::from_utf8(bytes) {
        Ok(text) => text.strip_prefix('\u{feff}').unwrap_or(text),
        Err(error) => {
            let problem =
                format!("is not UTF-8 from byte {} on; what it held before stays in effect", error.valid_up_to());
            return vec![Found::Unknown { finding: finding(label, problem, "save the file as UTF-8") }];
        }
    };
    let mut found = Vec::new();
    if json {
        parse_json(label, text, &mut found);
    } else {
        for document in documents(text) {
            parse_yaml(label, &document, &mut found);
        }
    }
    found
}

// === Documents ===

/// One document of a YAML stream.
struct Document<'a> {
    /// Counted from 1, empty ones included.
    number: usize,
    /// Line of the file in which `text` begins, counted from 1.
    line: usize,
    text: &'a str,
}

/// Splits a YAML stream. `---` and `...` at the start of a line always end a document, even inside a scalar, so this
/// needs no parser, and a syntax error ends with its document.
fn documents(text: &str) -> Vec<Document<'_>> {
    let mut documents: Vec<Document<'_>> = Vec::new();
    let (mut begin, mut begin_line) = (0, 1);
    let mut at = 0;
    for (index, line) in text.split_inclusive('\n').enumerate() {
        let marks =
            |marker: &str| line.strip_prefix(marker).is_some_and(|rest| rest.trim_start() != rest || rest.is_empty());
        let begun = || text[begin..at].lines().any(|line| !blank(line) && !line.starts_with('%'));
        // Directives and comments belong to the document whose `---` follows them.
        if marks("---") && begun() {
            documents.push(Document { number: documents.len() + 1, line: begin_line, text: &text[begin..at] });
            (begin, begin_line) = (at, index + 1);
        }
        at += line.len();
        if marks("...") {
            documents.push(Document { number: documents.len() + 1, line: begin_line, text: &text[begin..at] });
            (begin, begin_line) = (at, index + 2);
        }
    }
    if !text[begin..].lines().all(blank) {
        documents.push(Document { number: documents.len() + 1, line: begin_line, text: &text[begin..] });
    }
    documents
}

fn blank(line: &str) -> bool {
    let line = line.trim_start();
    line.is_empty() || line.starts_with('#')
}

fn parse_yaml(label: &str, document: &Document<'_>, found: &mut Vec<Found>) {
    let options = serde_saphyr::options! {
        // YAML 1.2 as most writers mean it: `no` is a word.
        strict_booleans: true,
        leading_zero_numbers_as_strings: true,
        with_snippet: false,
        // A list of all objects of a cluster is one document. Bombs of aliases stay refused.
        budget: serde_saphyr::budget! {
            max_events: 100_000_000,
            max_nodes: 50_000_000,
            max_total_scalar_bytes: 1 << 30,
        },
    };
    let place = format!("{label}:{}", first_line(document));
    match serde_saphyr::from_str_with_options::<Value>(document.text, options) {
        Ok(value) => read(&place, &value, "", found),
        Err(error) => {
            let at = error.location().map_or(document.line, |at| {
                usize::try_from(at.line()).unwrap_or(usize::MAX).saturating_add(document.line).saturating_sub(1)
            });
            let before = u64::try_from(document.line - 1).unwrap_or(u64::MAX);
            let render = serde_saphyr::render_options! { line_offset: before };
            let message = error.without_snippet().render_with_options(render);
            let problem = format!("document {} is broken near line {at}: {}", document.number, one_line(&message));
            found.push(broken(label, &place, problem, guess(document.text)));
        }
    }
}

fn parse_json(label: &str, text: &str, found: &mut Vec<Found>) {
    let mut stream = serde_json::Deserializer::from_str(text).into_iter::<Value>();
    let mut number = 0;
    loop {
        let rest = &text[stream.byte_offset()..];
        let begin = stream.byte_offset() + (rest.len() - rest.trim_start().len());
        let line = 1 + text[..begin].matches('\n').count();
        number += 1;
        match stream.next() {
            None => return,
            Some(Ok(value)) => read(&format!("{label}:{line}"), &value, "", found),
            Some(Err(error)) => {
                let problem = format!("document {number} is broken: {error}");
                let finding = finding(&format!("{label}:{line}"), problem, "mend the JSON; what it held before stays");
                found.push(Found::Unknown { finding });
                return;
            }
        }
    }
}

/// Line of the first word of a document, so that a message points at it and not at the comment above it.
fn first_line(document: &Document<'_>) -> usize {
    let skip = |line: &str| blank(line) || line.trim_end() == "---";
    document.line + document.text.lines().take_while(|line| skip(line)).count()
}

fn broken(label: &str, place: &str, problem: String, key: Option<ObjectKey>) -> Found {
    match key {
        Some(key) => {
            let object = format!("{place} {}", key.subject());
            let fix = "mend it; its last good version stays in effect";
            Found::Broken { key, finding: finding(&object, problem, fix) }
        }
        None => Found::Unknown {
            finding: finding(
                label,
                problem,
                "mend it; what the file held before stays in effect where it is not named",
            ),
        },
    }
}

/// Which object a broken document was going to be: what a person sees at a glance, from the lines that usually say so.
fn guess(text: &str) -> Option<ObjectKey> {
    fn value<'a>(line: &'a str, key: &str) -> Option<&'a str> {
        let value = line.strip_prefix(key)?.strip_prefix(':')?;
        let value = value.split(" #").next().unwrap_or(value).trim().trim_matches(['"', '\'']);
        (!value.is_empty() && !value.contains([' ', '{', '[', '"', '\''])).then_some(value)
    }
    let top = |key| text.lines().find_map(|line| value(line, key));
    let kind = Kind::of(top("apiVersion")?, top("kind")?)?;
    let metadata = text.lines().skip_while(|line| line.trim_end() != "metadata:").skip(1);
    let block: Vec<&str> = metadata.take_while(|line| blank(line) || line.starts_with(' ')).collect();
    let indent = block.iter().find(|line| !blank(line)).map(|line| line.len() - line.trim_start().len())?;
    let within = |key| {
        block
            .iter()
            .filter(|line| line.len() - line.trim_start().len() == indent)
            .find_map(|line| value(line.trim_start(), key))
    };
    let namespace = if kind.is_namespaced() { within("namespace").unwrap_or("default") } else { "" };
    Some(ObjectKey { kind, name: ObjectName::new(namespace, within("name")?) })
}

// === Objects ===

/// Reads one value: an object, a list of objects, or nothing. `path` is its place in the document.
fn read(place: &str, value: &Value, path: &str, found: &mut Vec<Found>) {
    let unknown = |field: &str, problem: &str, fix: &str| Found::Unknown {
        finding: Diagnostic {
            severity: Severity::Error,
            object: place.to_owned(),
            field: join(path, field),
            problem: problem.to_owned(),
            fix: fix.to_owned(),
        },
    };
    let fields = match value {
        Value::Null => return,
        Value::Object(fields) => fields,
        Value::Bool(_) | Value::Number(_) | Value::String(_) | Value::Array(_) => {
            found.push(unknown("", "is not a Kubernetes object", "begin it with apiVersion and kind"));
            return;
        }
    };
    let (Some(api_version), Some(kind)) = (text(value, "apiVersion"), text(value, "kind")) else {
        let missing = if text(value, "kind").is_none() { "kind" } else { "apiVersion" };
        found.push(unknown(missing, "is missing or not text", "begin the object with apiVersion and kind"));
        return;
    };
    if kind.ends_with("List") && (fields.contains_key("items") || kind == "List") {
        match fields.get("items") {
            None | Some(Value::Null) => {}
            Some(Value::Array(items)) => {
                for (at, item) in items.iter().enumerate() {
                    read_item(place, item, &join(path, &format!("items[{at}]")), api_version, kind, found);
                }
            }
            Some(_) => found.push(unknown("items", "is not a list", "write a list of objects")),
        }
        return;
    }
    if let Some(ours) = Kind::of(api_version, kind) {
        read_object(place, value, path, ours, api_version, found);
    } else {
        tracing::debug!(place, api_version, kind, "kind is not used, object ignored");
    }
}

/// An item of a list. Items of a typed list (`ServiceList`, as the API server writes it) do not repeat their type.
fn read_item(place: &str, item: &Value, path: &str, api_version: &str, list_kind: &str, found: &mut Vec<Found>) {
    let typed = list_kind.strip_suffix("List").filter(|kind| !kind.is_empty());
    match (typed, item) {
        (Some(kind), Value::Object(fields)) if !fields.contains_key("kind") => {
            let mut fields = fields.clone();
            fields.insert("kind".to_owned(), kind.into());
            fields.insert("apiVersion".to_owned(), api_version.into());
            read(place, &Value::Object(fields), path, found);
        }
        _ => read(place, item, path, found),
    }
}

fn read_object(place: &str, value: &Value, path: &str, kind: Kind, api_version: &str, found: &mut Vec<Found>) {
    let metadata = value.get("metadata").unwrap_or(&Value::Null);
    let named = text(metadata, "namespace").filter(|namespace| !namespace.is_empty());
    let namespace = if kind.is_namespaced() { named.unwrap_or("default") } else { "" };
    let key = text(metadata, "name")
        .filter(|name| !name.is_empty())
        .map(|name| ObjectKey { kind, name: ObjectName::new(namespace, name) });
    let object =
        key.as_ref().map_or_else(|| format!("{place} {}", kind.name()), |key| format!("{place} {}", key.subject()));
    let mut fail = |field: &str, problem: String, fix: &str| {
        let finding = Diagnostic {
            severity: Severity::Error,
            object: object.clone(),
            field: join(path, field),
            problem,
            fix: fix.to_owned(),
        };
        found.push(match &key {
            Some(key) => Found::Broken { key: key.clone(), finding },
            None => Found::Unknown { finding },
        });
    };
    if api_version != kind.api_version() {
        let fix = format!("write {}", kind.api_version());
        return fail("apiVersion", format!("{api_version:?} is not supported"), &fix);
    }
    if key.is_none() {
        return fail("metadata.name", "is missing, empty or not text".to_owned(), "give the object a name");
    }
    let outcome = match kind {
        Kind::Service => typed::<core_v1::Service>(value).map(|(object, unused)| {
            (generic(convert_service(&object, Some(place)), Object::Service), object_name(&object.metadata), unused)
        }),
        Kind::EndpointSlice => typed::<discovery_v1::EndpointSlice>(value).map(|(object, unused)| {
            (generic(convert_slice(&object, Some(place)), Object::Slice), object_name(&object.metadata), unused)
        }),
        Kind::Node => typed::<core_v1::Node>(value).map(|(object, unused)| {
            (generic(convert_node(&object, Some(place)), Object::Node), object_name(&object.metadata), unused)
        }),
        Kind::ServiceCidr => typed::<networking_v1::ServiceCIDR>(value).map(|(object, unused)| {
            let ranges = |(_, ranges)| Object::ServiceCidr(ranges);
            (generic(convert_service_cidr(&object, Some(place)), ranges), object_name(&object.metadata), unused)
        }),
        Kind::NetworkPolicy => typed::<networking_v1::NetworkPolicy>(value).map(|(object, unused)| {
            let converted = generic(convert_policy(&object, Some(place)), Object::NetworkPolicy);
            (converted, object_name(&object.metadata), unused)
        }),
        Kind::Pod => typed::<core_v1::Pod>(value).map(|(object, unused)| {
            (generic(convert_pod(&object, Some(place)), Object::Pod), object_name(&object.metadata), unused)
        }),
        Kind::Namespace => typed::<core_v1::Namespace>(value).map(|(object, unused)| {
            (generic(convert_namespace(&object, Some(place)), Object::Namespace), object_name(&object.metadata), unused)
        }),
    };
    match (outcome, key.clone()) {
        (Ok((converted, Some(_), unused)), Some(key)) => {
            let mut findings = converted.diagnostics;
            findings.extend(unused.into_iter().map(|field| Diagnostic {
                severity: Severity::Warning,
                object: object.clone(),
                field,
                problem: "is not a field of this kind, and is ignored".to_owned(),
                fix: "check its spelling and indentation".to_owned(),
            }));
            if !path.is_empty() {
                for finding in &mut findings {
                    finding.field = join(path, &finding.field);
                }
            }
            found.push(Found::Object { key, outcome: converted.outcome, findings });
        }
        (Err((field, message)), _) => fail(&field, message, "mend the field; the object's last good version stays"),
        (Ok(_), _) => fail("metadata.name", "is not usable".to_owned(), "give the object a name"),
    }
}

/// The value as its type, with the fields that the type does not have; or the place and kind of the first misfit.
fn typed<T: DeserializeOwned>(value: &Value) -> Result<(T, Vec<String>), (String, String)> {
    let unused = RefCell::new(Vec::new());
    let mut track = serde_path_to_error::Track::new();
    let tracked = serde_path_to_error::Deserializer::new(value, &mut track);
    let mut note = |path: serde_ignored::Path<'_>| {
        let mut field = String::new();
        render(&path, &mut field);
        unused.borrow_mut().push(field);
    };
    match T::deserialize(serde_ignored::Deserializer::new(tracked, &mut note)) {
        Ok(object) => Ok((object, unused.into_inner())),
        Err(error) => {
            let path = track.path().to_string();
            Err((if path == "." { String::new() } else { path }, error.to_string()))
        }
    }
}

fn render(path: &serde_ignored::Path<'_>, field: &mut String) {
    use serde_ignored::Path;
    match path {
        Path::Root => {}
        Path::Seq { parent, index } => {
            render(parent, field);
            field.push_str(&["[", &index.to_string(), "]"].concat());
        }
        Path::Map { parent, key } => {
            render(parent, field);
            if !field.is_empty() {
                field.push('.');
            }
            *field += key;
        }
        Path::Some { parent } | Path::NewtypeStruct { parent } | Path::NewtypeVariant { parent } => {
            render(parent, field);
        }
    }
}

fn generic<T>(converted: Converted<T>, wrap: impl FnOnce(T) -> Object) -> Converted<Object> {
    Converted { outcome: converted.outcome.map(wrap), diagnostics: converted.diagnostics }
}

fn text<'a>(value: &'a Value, key: &str) -> Option<&'a str> {
    value.get(key)?.as_str()
}

fn join(path: &str, field: &str) -> String {
    if path.is_empty() || field.is_empty() { format!("{path}{field}") } else { format!("{path}.{field}") }
}

fn one_line(message: &str) -> String {
    message.split_whitespace().collect::<Vec<_>>().join(" ")
}

fn finding(object: &str, problem: String, fix: &str) -> Diagnostic {
    let object = object.to_owned();
    Diagnostic { severity: Severity::Error, object, field: String::new(), problem, fix: fix.to_owned() }
}
