//! A trace read back from its lines: what graphs, pictures, captures and comparisons are made of.

use std::collections::BTreeMap;
use std::net::IpAddr;

use serde_json::Value;

use super::TraceError;
use super::condition::Condition;
use super::record::unhex;

/// All packets of a trace.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Recorded {
    /// The first line.
    pub meta: Value,
    /// By their ids, in the order of beginning.
    pub packets: Vec<RecordedPacket>,
    /// Names of addresses.
    pub names: BTreeMap<IpAddr, String>,
    /// Events that were lost.
    pub lost: u64,
}

/// A packet.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct RecordedPacket {
    /// Its id.
    pub id: String,
    /// Its number, with `r` for a reply.
    pub flow: String,
    /// Who to whom.
    pub who: String,
    /// In their order.
    pub steps: Vec<RecordedStep>,
    /// How it ended.
    pub result: String,
    /// Why it was dropped.
    pub drop: Option<String>,
    /// Nanoseconds.
    pub total: u64,
}

/// A sight or a decision.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct RecordedStep {
    /// CLOCK_MONOTONIC, nanoseconds.
    pub ns: u64,
    /// Nanoseconds since the step before.
    pub took: u64,
    /// Device, or the pod and its device.
    pub place: String,
    /// Tracepoint or program.
    pub point: String,
    /// `host`, `pod NS/NAME`, …
    pub netns: String,
    /// How it was reached.
    pub way: String,
    /// Of a decision: reason and verdict; of a sight nothing.
    pub decision: Option<(String, String)>,
    /// What to say of it.
    pub comment: String,
    /// From the IP header on; empty for decisions.
    pub data: Vec<u8>,
    /// Bytes of the packet.
    pub len: u32,
}

fn text(value: &Value) -> String {
    value.as_str().unwrap_or_default().to_owned()
}

/// An address's owner in words.
fn owner(reference: &Value, address: &Value) -> String {
    let name = text(&reference["name"]);
    match (reference["kind"].as_str(), reference["port"].as_str()) {
        (Some("node"), _) => "node".to_owned(),
        (Some("pod"), _) => format!("{}/{name}", text(&reference["ns"])).trim_start_matches('/').to_owned(),
        (Some(kind), port) => format!(
            "{kind} {}/{name}{}",
            text(&reference["ns"]),
            port.map(|port| format!(":{port}")).unwrap_or_default()
        ),
        (None, _) => text(address),
    }
}

impl Recorded {
    /// From the lines of a trace.
    pub fn new<'a>(lines: impl Iterator<Item = &'a Value>) -> Self {
        let mut recorded = Self::default();
        let mut places: BTreeMap<String, usize> = BTreeMap::new();
        for line in lines {
            let id = text(&line["id"]);
            let kind = line["t"].as_str().unwrap_or_default();
            match kind {
                "meta" => recorded.meta = line.clone(),
                "lost" => {
                    recorded.lost = ["ringbuf", "decisions", "recursion", "map_full"]
                        .iter()
                        .filter_map(|name| line[*name].as_u64())
                        .sum();
                }
                _ => {}
            }
            if id.is_empty() {
                continue;
            }
            let index = *places.entry(id.clone()).or_insert_with(|| {
                recorded.packets.push(RecordedPacket { id, ..RecordedPacket::default() });
                recorded.packets.len() - 1
            });
            if kind == "pkt" {
                for (address, reference) in [("src", "src_ref"), ("dst", "dst_ref")] {
                    if let Some(ip) = line[address].as_str().and_then(|ip| ip.parse().ok())
                        && !line[reference].is_null()
                    {
                        recorded.names.insert(ip, owner(&line[reference], &line[address]));
                    }
                }
            }
            if let Some(packet) = recorded.packets.get_mut(index) {
                packet.take(kind, line);
            }
        }
        recorded
    }

    /// From a file of lines: the packets that fulfil the condition.
    ///
    /// # Errors
    /// [`TraceError::File`], [`TraceError::Malformed`].
    pub fn read(path: &std::path::Path, condition: Option<&Condition>) -> Result<Self, TraceError> {
        let shown = path.display().to_string();
        let content =
            std::fs::read_to_string(path).map_err(|source| TraceError::File { path: shown.clone(), source })?;
        let mut lines = Vec::new();
        for (number, line) in (1..).zip(content.lines()).filter(|(_, line)| !line.trim().is_empty()) {
            let wrong = |message: String| TraceError::Malformed { path: shown.clone(), line: number, message };
            let value: Value = serde_json::from_str(line).map_err(|e| wrong(e.to_string()))?;
            if number == 1 && (value["t"] != "meta" || value["v"] != super::record::VERSION) {
                return Err(wrong("not a trace of this version; `trace live -o ndjson` writes them".to_owned()));
            }
            lines.push(value);
        }
        if lines.is_empty() {
            return Err(TraceError::Malformed { path: shown, line: 1, message: "the file is empty".to_owned() });
        }
        let mut packets: BTreeMap<&str, Vec<&Value>> = BTreeMap::new();
        for (id, line) in lines.iter().filter_map(|line| Some((line["id"].as_str()?, line))) {
            packets.entry(id).or_default().push(line);
        }
        let holds = |lines: &Vec<&Value>| condition.is_none_or(|condition| condition.holds(lines));
        packets.retain(|_, lines| holds(lines));
        Ok(Self::new(lines.iter().filter(|line| line["id"].as_str().is_none_or(|id| packets.contains_key(id)))))
    }
}

impl RecordedPacket {
    fn take(&mut self, kind: &str, line: &Value) {
        let number = |name: &str| line[name].as_u64().unwrap_or(0);
        match kind {
            "pkt" => {
                self.flow = text(&line["flow"]);
                self.who =
                    format!("{} → {}", owner(&line["src_ref"], &line["src"]), owner(&line["dst_ref"], &line["dst"]));
            }
            "hop" => {
                let netns = text(&line["netns_ref"]);
                let device = text(&line["dev"]);
                let pod = netns.strip_prefix("pod ");
                let place = pod.map_or_else(|| device.clone(), |pod| format!("{pod} {device}"));
                let point = text(&line["point"]);
                let tuple = &line["tuple"];
                let ends = if tuple.is_null() {
                    String::new()
                } else {
                    format!(" {}:{} > {}:{}", text(&tuple["src"]), tuple["sport"], text(&tuple["dst"]), tuple["dport"])
                };
                self.steps.push(RecordedStep {
                    ns: number("ns"),
                    took: number("d_ns"),
                    comment: format!("#{} {point} at {place}{ends}", self.flow),
                    place,
                    point,
                    netns,
                    way: text(&line["way"]),
                    decision: None,
                    data: line["data"].as_str().and_then(unhex).unwrap_or_default(),
                    len: u32::try_from(number("len")).unwrap_or(0),
                });
            }
            "decision" => {
                let (reason, verdict, hook) = (text(&line["reason"]), text(&line["verdict"]), text(&line["hook"]));
                let service = &line["service"];
                let service = if service.is_null() {
                    String::new()
                } else {
                    format!(
                        " svc {}/{}:{} → {}",
                        text(&service["ns"]),
                        text(&service["name"]),
                        text(&service["port"]),
                        text(&service["backend"])
                    )
                };
                self.steps.push(RecordedStep {
                    ns: number("ns"),
                    took: number("d_ns"),
                    comment: format!("#{} {hook} at {}: {reason} {verdict}{service}", self.flow, text(&line["dev"])),
                    place: text(&line["dev"]),
                    point: hook,
                    netns: "host".to_owned(),
                    way: "own".to_owned(),
                    decision: Some((reason, verdict)),
                    data: Vec::new(),
                    len: 0,
                });
            }
            "drop" => self.drop = Some(format!("{} at {}", text(&line["reason"]), text(&line["location"]))),
            "end" => {
                self.result = text(&line["result"]);
                self.total = number("ns_total");
            }
            _ => {}
        }
    }

    /// The steps as words that are the same for packets that take the same path.
    pub fn signature(&self) -> Vec<String> {
        self.steps.iter().map(RecordedStep::label).collect()
    }
}

impl RecordedStep {
    /// Name of the step: where, and what.
    pub fn label(&self) -> String {
        match &self.decision {
            Some((reason, verdict)) => format!("{} {}: {reason} {verdict}", self.place, self.point),
            None => format!("{} {}", self.place, self.point),
        }
    }
}

#[cfg(test)]
pub(super) mod tests {
    use serde_json::json;

    use super::*;

    /// Lines of one packet from pod to pod, `ns` long, dropped or not.
    pub(crate) fn lines(id: &str, ns: u64, dropped: bool) -> Vec<Value> {
        let hop = |n: u64, netns: &str, dev: &str, point: &str, way: &str| {
            json!({"t": "hop", "id": id, "n": n, "ns": 1000 + n * ns, "d_ns": ns, "way": way, "point": point, "dev": dev,
                   "netns_ref": netns, "tuple": {"src": "10.1.0.2", "sport": 4, "dst": "10.1.0.3", "dport": 80},
                   "len": 74, "data": "45000014"})
        };
        let mut lines = vec![
            json!({"t": "pkt", "id": id, "flow": "1", "src": "10.1.0.2", "dst": "10.96.0.7",
                   "src_ref": {"kind": "pod", "ns": "shop", "name": "web-0"},
                   "dst_ref": {"kind": "service", "ns": "shop", "name": "api", "port": "http"}}),
            hop(0, "pod shop/web-0", "eth0", "net_dev_queue", "begin"),
            json!({"t": "decision", "id": id, "n": 1, "ns": 1000 + ns, "d_ns": ns, "hook": "from_pod", "dev": "veth7",
                   "verdict": if dropped { "drop" } else { "redirect" }, "reason": "service_new",
                   "service": {"ns": "shop", "name": "api", "port": "http", "backend": "10.1.0.3:8080"}}),
        ];
        if dropped {
            lines.push(json!({"t": "drop", "id": id, "reason": "no_backend", "location": "from_pod at veth7"}));
        } else {
            lines.push(hop(2, "pod shop/api-0", "eth0", "netif_receive_skb", "wire"));
        }
        lines.push(
            json!({"t": "end", "id": id, "result": if dropped { "dropped" } else { "delivered" }, "ns_total": 2 * ns}),
        );
        lines
    }

    #[test]
    fn lines_are_read_back() {
        let recorded = Recorded::new(lines("a", 500, false).iter());
        let packet = &recorded.packets[0];
        assert_eq!(
            (packet.who.as_str(), packet.result.as_str(), packet.total),
            ("shop/web-0 → service shop/api:http", "delivered", 1000)
        );
        assert_eq!(
            packet.signature(),
            [
                "shop/web-0 eth0 net_dev_queue",
                "veth7 from_pod: service_new redirect",
                "shop/api-0 eth0 netif_receive_skb"
            ]
        );
        assert_eq!(recorded.names[&"10.1.0.2".parse::<IpAddr>().expect("an address")], "shop/web-0");
        assert_eq!(
            packet.steps[1].comment,
            "#1 from_pod at veth7: service_new redirect svc shop/api:http → 10.1.0.3:8080"
        );
    }

    #[test]
    fn packets_are_chosen_by_a_condition() {
        let directory = tempfile::tempdir().expect("a directory");
        let path = directory.path().join("trace");
        let meta = json!({"t": "meta", "v": 1});
        let all = [vec![meta], lines("a", 500, false), lines("b", 500, true), vec![json!({"t": "lost", "ringbuf": 3})]];
        let content: Vec<String> = all.concat().iter().map(Value::to_string).collect();
        std::fs::write(&path, content.join("\n")).expect("written");
        let read = |condition: Option<&str>| {
            let condition = condition.map(|text| text.parse().expect("a condition"));
            let recorded = Recorded::read(&path, condition.as_ref()).expect("a trace");
            assert_eq!((&recorded.meta["v"], recorded.lost), (&json!(1), 3));
            recorded.packets.into_iter().map(|packet| packet.id).collect::<Vec<_>>()
        };
        assert_eq!(read(None), ["a", "b"]);
        assert_eq!(read(Some(r#"drop.reason == "no_backend""#)), ["b"]);
        assert_eq!(read(Some(r#"hops.exists(hop, hop.netns_ref == "pod shop/api-0")"#)), ["a"]);
        assert_eq!(read(Some("pkt.dport == 81")), [""; 0]);
    }

    #[test]
    fn other_files_are_refused() {
        let directory = tempfile::tempdir().expect("a directory");
        let path = directory.path().join("trace");
        for (content, line) in
            [("", 1), ("{}\n", 1), ("x\n", 1), ("{\"t\":\"meta\",\"v\":1}\n{\n", 2), ("{\"t\":\"meta\",\"v\":99}\n", 1)]
        {
            std::fs::write(&path, content).expect("written");
            let error = Recorded::read(&path, None).expect_err(content);
            assert!(
                matches!(error, TraceError::Malformed { line: found, .. } if found == line),
                "{content:?}: {error}"
            );
        }
        assert!(matches!(Recorded::read(&directory.path().join("none"), None), Err(TraceError::File { .. })));
    }
}
