//! `--where`: a condition on what a packet's story says, in the Common Expression Language (<https://cel.dev>), which
//! Kubernetes' users know.
//!
//! ```text
//!   drop.reason == "NETFILTER_DROP" && hops.exists(hop, hop.dev == "br0")
//!   end.ns_total > 100000 && decisions.exists(d, d.service.name == "api")
//! ```
//!
//! Names are those of `-o ndjson` (`trace schema` lists them): `pkt`, `drop` and `end` are objects, `hops`, `decisions`
//! and `hooks` lists. What a packet does not have is null, so that a comparison with it is false and no error.

use std::collections::{BTreeMap, HashMap};
use std::sync::LazyLock;

use cel::{Context, Program, Value as Cel};
use serde_json::{Map, Value};

/// What lines of `-o ndjson` look like, as a JSON Schema (draft 2020-12).
pub const SCHEMA: &str = include_str!("schema.json");

/// Variables of a condition: the kind of line that they are made of, the name, and whether a packet has several.
const VARIABLES: [(&str, &str, bool); 6] = [
    ("pkt", "pkt", false),
    ("hop", "hops", true),
    ("decision", "decisions", true),
    ("hook", "hooks", true),
    ("drop", "drop", false),
    ("end", "end", false),
];

/// What stands in a field that a packet does not have.
#[derive(Clone, Copy)]
enum Blank {
    /// Null.
    Null,
    /// A value of the field's type: what a condition is tried on before there is a packet.
    Typed,
}

/// The kinds of lines with all their fields.
type Shapes = BTreeMap<&'static str, Value>;

fn shapes(blank: Blank) -> Shapes {
    let schema: Value = serde_json::from_str(SCHEMA).unwrap_or_default();
    VARIABLES.into_iter().map(|(kind, ..)| (kind, blank.shape(&schema, &schema["$defs"][kind]))).collect()
}

static NULL: LazyLock<Shapes> = LazyLock::new(|| shapes(Blank::Null));

/// Why a condition is none.
#[derive(Debug, thiserror::Error)]
pub enum ConditionError {
    /// It cannot be read.
    #[error("`{text}` is no condition: {message}")]
    Unreadable {
        /// It.
        text: String,
        /// Where, and what was expected there.
        message: String,
    },
    /// It says something of what is not there.
    #[error("`{text}`: there is no {name}; there is {known}")]
    Unknown {
        /// The condition.
        text: String,
        /// What it names.
        name: String,
        /// What it could name.
        known: String,
    },
    /// It cannot be answered.
    #[error("`{text}` cannot be answered: {message}")]
    Unanswered {
        /// The condition.
        text: String,
        /// Why.
        message: String,
    },
}

/// A condition.
#[derive(Debug)]
pub struct Condition {
    text: String,
    program: Program,
}

impl Blank {
    /// What the schema describes, blank.
    fn shape(self, schema: &Value, of: &Value) -> Value {
        let reference = of["anyOf"].as_array().and_then(|ways| ways.iter().find_map(|way| way["$ref"].as_str()));
        if let Some(name) = reference.and_then(|path| path.strip_prefix("#/$defs/")) {
            // It has one of several shapes: the fields of all.
            let ways = schema["$defs"][name]["oneOf"].as_array().into_iter().flatten();
            let fields = ways.filter_map(|way| self.shape(schema, way).as_object().cloned());
            return Value::Object(fields.flatten().collect());
        }
        if let Some(fields) = of["properties"].as_object() {
            let blank = |(name, field): (&String, &Value)| (name.clone(), self.shape(schema, field));
            return Value::Object(fields.iter().map(blank).collect());
        }
        let kind = of["type"].as_str().or_else(|| of["type"][0].as_str());
        match (self, kind) {
            (Self::Null, _) => Value::Null,
            (Self::Typed, Some("integer")) => 0.into(),
            (Self::Typed, Some("boolean")) => false.into(),
            (Self::Typed, Some("array")) => Value::Array(vec![self.shape(schema, &of["items"])]),
            (Self::Typed, Some(_)) => "".into(),
            (Self::Typed, None) if of["const"].is_null() => of["enum"][0].clone(),
            (Self::Typed, None) => of["const"].clone(),
        }
    }
}

/// The line with what it lacks.
fn complete(empty: &Value, line: &Value) -> Value {
    match (empty, line) {
        (Value::Object(fields), Value::Object(line)) => {
            let mut whole: Map<String, Value> = line.clone();
            for (name, field) in fields {
                let found = complete(field, line.get(name).unwrap_or(&Value::Null));
                whole.insert(name.clone(), found);
            }
            Value::Object(whole)
        }
        (Value::Object(_), Value::Null) => empty.clone(),
        _ => line.clone(),
    }
}

/// Every whole number is an `int`, which CEL's literals are, too.
fn cel(value: &Value) -> Cel {
    match value {
        Value::Null => Cel::Null,
        Value::Bool(is) => Cel::Bool(*is),
        Value::Number(number) => match (number.as_i64(), number.as_u64()) {
            (Some(whole), _) => Cel::Int(whole),
            (None, Some(whole)) => Cel::UInt(whole),
            (None, None) => Cel::Float(number.as_f64().unwrap_or(f64::NAN)),
        },
        Value::String(text) => text.as_str().into(),
        Value::Array(all) => all.iter().map(cel).collect::<Vec<_>>().into(),
        Value::Object(fields) => {
            fields.iter().map(|(name, field)| (name.as_str(), cel(field))).collect::<HashMap<_, _>>().into()
        }
    }
}

/// The variables for a packet's lines.
fn variables(lines: &[&Value]) -> impl Iterator<Item = (&'static str, Cel)> {
    VARIABLES.into_iter().map(move |(kind, name, is_list)| {
        let blank = &NULL[kind];
        let mut found = lines.iter().filter(|line| line["t"] == kind).map(|line| cel(&complete(blank, line)));
        let value = if is_list { found.collect::<Vec<_>>().into() } else { found.next().unwrap_or_else(|| cel(blank)) };
        (name, value)
    })
}

impl std::str::FromStr for Condition {
    type Err = ConditionError;

    fn from_str(text: &str) -> Result<Self, ConditionError> {
        let text = text.to_owned();
        let program = match Program::compile(&text) {
            Ok(program) => program,
            Err(e) => {
                // The first line tells line, column and what was expected; the others draw it.
                let told = e.to_string();
                let message = told.lines().next().unwrap_or_default().trim_start_matches("ERROR: <input>:").to_owned();
                return Err(ConditionError::Unreadable { text, message });
            }
        };
        let condition = Self { text, program };
        // Mistakes are told of before anything is followed: by a packet that has one line of each kind.
        let tried = shapes(Blank::Typed);
        match condition.answer(&tried.values().collect::<Vec<_>>()) {
            Ok(_) => Ok(condition),
            Err(Unanswered::NoField(name)) => {
                let fields = |(_, kind): (_, &Value)| kind.as_object().map(fields_of).unwrap_or_default();
                let known = tried.iter().map(|(kind, shape)| format!("{kind}: {}", fields((kind, shape))));
                let (name, known) = (format!("field {name}"), known.collect::<Vec<_>>().join("; "));
                Err(ConditionError::Unknown { text: condition.text, name, known })
            }
            Err(Unanswered::NoName(name)) => {
                let known = VARIABLES.map(|(_, name, _)| name).join(", ");
                Err(ConditionError::Unknown { text: condition.text, name, known })
            }
            Err(Unanswered::Other(message)) => Err(ConditionError::Unanswered { text: condition.text, message }),
        }
    }
}

/// Names of the fields, but for the one that tells the kind.
fn fields_of(shape: &Map<String, Value>) -> String {
    shape.keys().map(String::as_str).filter(|name| *name != "t").collect::<Vec<_>>().join(" ")
}

/// Why there is no answer.
enum Unanswered {
    /// No line has this field.
    NoField(String),
    /// Neither a variable nor a function.
    NoName(String),
    /// Another kind of value than it takes.
    Other(String),
}

impl Condition {
    fn answer(&self, lines: &[&Value]) -> Result<bool, Unanswered> {
        let mut context = Context::default();
        for (name, value) in variables(lines) {
            context.add_variable_from_value(name, value);
        }
        match self.program.execute(&context) {
            Ok(Cel::Bool(holds)) => Ok(holds),
            Ok(_) => Err(Unanswered::Other("it is neither true nor false".to_owned())),
            Err(cel::ExecutionError::NoSuchKey(name)) => Err(Unanswered::NoField((*name).clone())),
            Err(cel::ExecutionError::UndeclaredReference(name)) => Err(Unanswered::NoName((*name).clone())),
            Err(other) => Err(Unanswered::Other(other.to_string())),
        }
    }

    /// Does it hold for the packet that these lines tell of? What has no answer, like `drop.reason.startsWith("IP")` of a
    /// packet that was not dropped, does not hold.
    pub fn holds(&self, lines: &[&Value]) -> bool {
        self.answer(lines).unwrap_or(false)
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn packet() -> Vec<Value> {
        vec![
            json!({ "t": "pkt", "proto": "tcp", "dport": 80, "src_ref": { "kind": "pod", "ns": "shop", "name": "web-0" } }),
            json!({ "t": "hop", "n": 0, "dev": "veth7", "ttl": 64, "mark": u64::MAX }),
            json!({ "t": "hop", "n": 2, "dev": "br0", "tuple": null }),
            json!({ "t": "decision", "n": 1, "reason": "service_new", "service": { "ns": "shop", "name": "api" } }),
            json!({ "t": "drop", "reason": "NETFILTER_DROP", "ours": false }),
            json!({ "t": "end", "ns_total": 12_000, "result": "dropped", "split": { "own": 900 } }),
        ]
    }

    #[test]
    fn conditions_hold_or_not() {
        let whole = packet();
        let delivered: Vec<Value> = packet().into_iter().filter(|line| line["t"] != "drop").collect();
        // Of the dropped packet, and of the same without the line that says so.
        let cases = [
            (r#"drop.reason == "NETFILTER_DROP" && hops.exists(hop, hop.dev == "br0")"#, [true, false]),
            ("drop.reason == null", [false, true]),
            (r#"drop.reason.startsWith("NET")"#, [true, false]),
            (r#"drop.reason.startsWith("NET") || pkt.dport == 80"#, [true, true]),
            ("end.ns_total > 10000 && end.split.own < 1000", [true, true]),
            ("end.ns_total > 12000", [false, false]),
            ("hops.size() == 2 && hooks.size() == 0", [true, true]),
            ("hops.exists(h, h.ttl < 64)", [false, false]),
            ("hops.exists(h, h.tuple.dport == 80)", [false, false]),
            ("hops.exists(h, h.mark == 18446744073709551615u)", [true, true]),
            (r#"hops[0].dev == "veth7""#, [true, true]),
            (r#"decisions.exists(d, d.service.name == "api" && d.policy == null)"#, [true, true]),
            (r#"pkt.src_ref.ns == "shop" && pkt.dst_ref.ns != "shop""#, [true, true]),
            (r#"pkt.proto in ["tcp", "sctp"] && !(pkt.dport in [443, 8443])"#, [true, true]),
        ];
        for (text, expected) in cases {
            let condition: Condition = text.parse().unwrap_or_else(|e| panic!("{text}: {e}"));
            let found = [&whole, &delivered].map(|lines| condition.holds(&lines.iter().collect::<Vec<_>>()));
            assert_eq!(found, expected, "{text}");
        }
    }

    #[test]
    fn what_is_no_condition_is_told_of() {
        let told = |text: &str| text.parse::<Condition>().map(|_| ()).expect_err(text).to_string();
        assert!(
            told("drop.reason ==").starts_with("`drop.reason ==` is no condition: 1:15: "),
            "{}",
            told("drop.reason ==")
        );
        assert_eq!(told("dropped"), "`dropped`: there is no dropped; there is pkt, hops, decisions, hooks, drop, end");
        let field = told(r#"drop.cause == "X""#);
        assert!(field.starts_with("`drop.cause == \"X\"`: there is no field cause; there is decision: "), "{field}");
        assert!(field.contains("; drop: advice class id location ours reason reason_code; "), "{field}");
        for text in ["pkt.dport", r#"pkt.dport > "80""#, r#"hops.exists(h, h.device == "br0")"#, "pkt.dport.frob()", ""]
        {
            assert!(text.parse::<Condition>().is_err(), "{text}");
        }
    }
}
