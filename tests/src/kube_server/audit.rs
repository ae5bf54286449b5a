//! What the API server was asked, from its audit log.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use serde_json::Value;

use crate::error::{Context as _, Result};

/// One request that was answered, or a watch that was begun.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Request {
    /// Who asked.
    pub user: String,
    /// `list`, `watch`, …
    pub verb: String,
    /// `services`, …
    pub resource: String,
    /// Parameters of the query, as they were sent.
    pub query: BTreeMap<String, String>,
    /// Status of the answer.
    pub code: u64,
}

impl Request {
    /// A parameter; empty when it was not sent.
    pub fn parameter(&self, name: &str) -> &str {
        self.query.get(name).map_or("", String::as_str)
    }
}

/// Reads the log; the last line may be written just now, and is then left out.
pub(super) fn read(path: &Path) -> Result<Vec<Request>> {
    let log = fs::read_to_string(path).context(|| format!("read {}", path.display()))?;
    let events = log.lines().filter_map(|line| serde_json::from_str::<Value>(line).ok());
    Ok(events.filter_map(|event| request(&event)).collect())
}

/// `None` for the second line about a watch, which says that it has ended.
fn request(event: &Value) -> Option<Request> {
    let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
    let (verb, stage) = (text(&event["verb"]), text(&event["stage"]));
    let code = event["responseStatus"]["code"].as_u64().unwrap_or_default();
    // Who is not let in is told so in one stage.
    let first_stage = (verb == "watch" && code == 200) || code == 401;
    if first_stage != (stage == "ResponseStarted") {
        return None;
    }
    let uri = text(&event["requestURI"]);
    let pairs = uri.split_once('?').map_or("", |(_, query)| query).split('&');
    let query = pairs.filter_map(|pair| pair.split_once('=')).map(|(key, value)| (key.to_owned(), value.to_owned()));
    Some(Request {
        user: text(&event["user"]["username"]),
        verb,
        resource: text(&event["objectRef"]["resource"]),
        query: query.collect(),
        code,
    })
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn a_watch_counts_once_and_a_list_when_it_is_answered() {
        let event = |stage: &str, verb: &str, code: u16| {
            json!({
                "stage": stage, "verb": verb, "user": { "username": "u" }, "objectRef": { "resource": "services" },
                "requestURI": "/api/v1/services?limit=500&continue=x", "responseStatus": { "code": code },
            })
        };
        let rows = [
            ("ResponseComplete", "list", 200, true),
            ("ResponseStarted", "watch", 200, true),
            ("ResponseComplete", "watch", 200, false),
            ("ResponseComplete", "watch", 403, true),
            ("ResponseStarted", "list", 401, true),
            ("Panic", "list", 500, true),
        ];
        for (stage, verb, code, counts) in rows {
            let request = request(&event(stage, verb, code));
            assert_eq!(request.is_some(), counts, "{stage} {verb} {code}");
            if let Some(request) = request {
                let query = ["limit", "continue", "watch"].map(|name| request.parameter(name).to_owned());
                assert_eq!((query, request.code), (["500", "x", ""].map(str::to_owned), u64::from(code)));
            }
        }
    }
}
