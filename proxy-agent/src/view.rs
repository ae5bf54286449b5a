//! What the pinned maps hold, for people and for programs. The agent need not run.

use std::collections::{BTreeMap, BTreeSet};
use std::io::Write as _;
use std::path::Path;

use anyhow::Result;
use clap::ValueEnum;
use comfy_table::presets::NOTHING;
use comfy_table::{Cell, ContentArrangement, Table};
use serde_json::{Map as Object, Value, json};

use crate::dataplane::pins::{Maps, Pins};
use crate::node::check::{Finding, Level};

pub mod explain;
pub mod flow;
mod policy;
mod status;

pub use policy::{endpoints, lint, policies, unused};
pub use status::status;

/// How to show something.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub enum Format {
    /// Columns for people.
    #[default]
    Table,
    /// `{"version": 1, "items": [...]}`; fields are added, never changed, under one version.
    Json,
}

/// Version of the JSON output.
const VERSION: u32 = 1;

fn write(text: &str) -> Result<()> {
    let mut out = std::io::stdout().lock();
    match out.write_all(text.as_bytes()).and_then(|()| out.write_all(b"\n")).and_then(|()| out.flush()) {
        // Somebody closed the pipe (`| head`): there is nobody left to tell.
        Err(e) if e.kind() == std::io::ErrorKind::BrokenPipe => Ok(()),
        other => Ok(other?),
    }
}

/// Rows under these columns.
fn print(format: Format, columns: &[&str], rows: Vec<Vec<Value>>) -> Result<()> {
    let text = match format {
        Format::Json => {
            let items: Vec<Value> = rows
                .into_iter()
                .map(|row| {
                    let fields = columns.iter().map(|c| c.to_lowercase().replace(' ', "_")).zip(row);
                    Value::Object(fields.collect::<Object<_, _>>())
                })
                .collect();
            serde_json::to_string_pretty(&json!({ "version": VERSION, "items": items }))?
        }
        Format::Table => {
            let mut table = Table::new();
            table.load_preset(NOTHING).set_content_arrangement(ContentArrangement::Disabled);
            table.set_header(columns.iter().map(|c| c.to_uppercase()));
            for row in rows {
                table.add_row(row.into_iter().map(|value| Cell::new(plain(&value))));
            }
            table.trim_fmt()
        }
    };
    write(&text)
}

fn plain(value: &Value) -> String {
    match value {
        Value::String(text) => text.clone(),
        Value::Array(all) => all.iter().map(plain).collect::<Vec<_>>().join(", "),
        Value::Null => "-".to_owned(),
        other => other.to_string(),
    }
}

fn open(pin_root: &Path) -> Result<Maps> {
    Ok(Pins::new(pin_root).open()?)
}

fn names(maps: &Maps) -> Result<BTreeMap<u32, String>> {
    Ok(maps.service.read()?.into_iter().map(|(id, entry)| (id, entry.name.as_str().to_owned())).collect())
}

fn name(names: &BTreeMap<u32, String>, service: u32) -> Value {
    match names.get(&service) {
        Some(name) => json!(name),
        None if service == 0 => Value::Null,
        None => json!(format!("#{service}")),
    }
}

fn endpoint(ip: impl Into<std::net::IpAddr>, port: u16) -> String {
    std::net::SocketAddr::new(ip.into(), port).to_string()
}

/// Services with their frontends.
pub fn services(pin_root: &Path, format: Format) -> Result<()> {
    let maps = open(pin_root)?;
    let names = names(&maps)?;
    let tables = maps.tables()?;
    let mut rows = Vec::new();
    for (key, entry) in &tables.frontends {
        if key.port.get() == 0 {
            // The mark that says "this address belongs to a Service".
            continue;
        }
        let backends: Vec<Value> = (entry.first..entry.first.saturating_add(entry.count))
            .filter_map(|slot| tables.backends.get(tables.slots.get(&slot)?))
            .map(|backend| json!(endpoint(backend.ip, backend.port.get())))
            .collect();
        rows.push((
            name(&names, entry.service).to_string(),
            vec![
                name(&names, entry.service),
                json!(endpoint(key.ip, key.port.get())),
                json!(key.proto.to_string()),
                json!(entry.count),
                Value::Array(backends),
            ],
        ));
    }
    rows.sort_by(|a, b| a.0.cmp(&b.0));
    let rows = rows.into_iter().map(|(_, row)| row).collect();
    print(format, &["service", "address", "protocol", "selected", "backends"], rows)
}

/// Backends: selected or only still serving.
pub fn backends(pin_root: &Path, format: Format) -> Result<()> {
    let maps = open(pin_root)?;
    let names = names(&maps)?;
    let tables = maps.tables()?;
    let selected: BTreeSet<u32> = tables
        .frontends
        .values()
        .flat_map(|entry| entry.first..entry.first.saturating_add(entry.count))
        .filter_map(|slot| tables.slots.get(&slot).copied())
        .collect();
    let rows = tables.backends.iter().map(|(id, backend)| {
        vec![
            json!(id),
            name(&names, backend.service),
            json!(endpoint(backend.ip, backend.port.get())),
            json!(backend.proto.to_string()),
            json!(backend.generation),
            json!(backend.flags & proxy_abi::BackendEntry::LOCAL != 0),
            json!(selected.contains(id)),
        ]
    });
    print(format, &["id", "service", "address", "protocol", "generation", "local", "selected"], rows.collect())
}

/// Pod interfaces.
pub fn devices(pin_root: &Path, format: Format) -> Result<()> {
    let maps = open(pin_root)?;
    let ip = |ip: proxy_abi::IpBytes| {
        if ip == proxy_abi::IpBytes::UNSPECIFIED { Value::Null } else { json!(ip.to_string()) }
    };
    let mut devices = maps.device.read()?;
    devices.sort();
    let rows = devices.into_iter().map(|(ifindex, device)| {
        let name = nix::net::if_::if_indextoname(ifindex).map_or(Value::Null, |n| json!(n.to_string_lossy()));
        let path = match device.flags & (proxy_abi::DeviceEntry::REDIRECT | proxy_abi::DeviceEntry::SWITCH) {
            0 => "stack",
            proxy_abi::DeviceEntry::SWITCH => "switch",
            _ => "redirect",
        };
        vec![
            json!(ifindex),
            name,
            ip(device.ip4),
            ip(device.ip6),
            json!(device.pod_mac.to_string()),
            json!(device.bridge),
            json!(path),
        ]
    });
    print(format, &["ifindex", "name", "ipv4", "ipv6", "pod mac", "bridge", "path"], rows.collect())
}

/// Findings of `check`.
pub fn check(report: &[Finding]) {
    for finding in report {
        let mark = match finding.level {
            Level::Good => "ok  ",
            Level::Warning => "warn",
            Level::Problem => "FAIL",
        };
        let fix = if finding.fix.is_empty() { String::new() } else { format!("\n     → {}", finding.fix) };
        // A closed pipe ends it; there is nothing to mend.
        if write(&format!("{mark} {}: {}{fix}", finding.subject, finding.state)).is_err() {
            return;
        }
    }
}

/// Lines, or one line in their absence.
pub fn lines(all: &[String], none: &str) {
    let text = if all.is_empty() { none.to_owned() } else { all.join("\n") };
    drop(write(&text));
}
