//! `flow list` and `flow flush`.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::ops::ControlFlow;
use std::path::Path;

use anyhow::{Result, bail};
use clap::Args;
use ipnet::IpNet;
use proxy_abi::flow::state;
use proxy_abi::{FlowEntry, FlowKey, Proto, Tuple};
use serde_json::{Value, json};

use super::{Format, VERSION, endpoint, name, names, open, print, write};
use crate::dataplane::map::Map;
use crate::dataplane::pins::Maps;
use crate::dataplane::sweep::monotonic;

/// Which flows: all that every given option is true of.
#[derive(Clone, Debug, Default, Args)]
pub struct FlowFilter {
    /// Begun or served by this pod of the node: its address, or its interface on the host side (name or index).
    #[arg(long, value_name = "ADDRESS|INTERFACE")]
    pod: Option<String>,
    /// Through this Service, or this port of it.
    #[arg(long, value_name = "NAMESPACE/NAME[:PORT]")]
    service: Option<String>,
    /// With this address or range at either end, before or after translation.
    #[arg(long, value_name = "IP|CIDR", value_parser = range)]
    address: Option<IpNet>,
    /// With this port at either end, before or after translation.
    #[arg(long)]
    port: Option<u16>,
    /// With this protocol: tcp, udp, sctp, icmp, icmpv6 or a number.
    #[arg(long, value_name = "PROTOCOL", value_parser = protocol)]
    proto: Option<Proto>,
    /// In this state, as `flow list` shows it.
    #[arg(long, value_name = "STATE", value_parser = state_number)]
    state: Option<u8>,
}

/// A flow, found by its original tuple.
#[derive(Clone, Copy, Debug)]
struct Found {
    entry: FlowEntry,
    table: &'static str,
}

fn range(text: &str) -> Result<IpNet, String> {
    let single = text.parse::<IpAddr>().map(IpNet::from);
    single.or_else(|_| text.parse::<IpNet>().map(|net| net.trunc())).map_err(|_| "not an address or range".to_owned())
}

fn protocol(text: &str) -> Result<Proto, String> {
    let named = [Proto::TCP, Proto::UDP, Proto::SCTP, Proto::ICMP, Proto::ICMPV6];
    let named = named.into_iter().find(|proto| proto.to_string().eq_ignore_ascii_case(text));
    named.or_else(|| text.parse().ok().map(Proto)).ok_or_else(|| "not a protocol".to_owned())
}

fn state_number(text: &str) -> Result<u8, String> {
    let found = (1..=u8::MAX).find(|number| state::name(*number).eq_ignore_ascii_case(text));
    found.filter(|number| state::name(*number) != state::name(0)).ok_or_else(|| {
        let all: BTreeSet<_> = (1..=u8::MAX).map(state::name).filter(|name| *name != state::name(0)).collect();
        format!("states are {}", all.into_iter().collect::<Vec<_>>().join(", "))
    })
}

impl FlowFilter {
    fn is_empty(&self) -> bool {
        let Self { pod, service, address, port, proto, state } = self;
        pod.is_none() && service.is_none() && address.is_none() && port.is_none() && proto.is_none() && state.is_none()
    }

    /// With names replaced by numbers.
    fn resolve(&self, maps: &Maps, names: &BTreeMap<u32, String>) -> Result<Wanted<'_>> {
        let services = self.service.as_ref().map(|wanted| {
            let is = |name: &str| name == wanted || name.rsplit_once(':').is_some_and(|(service, _)| service == wanted);
            names.iter().filter(|(_, name)| is(name)).map(|(id, _)| *id).collect::<BTreeSet<u32>>()
        });
        if services.as_ref().is_some_and(BTreeSet::is_empty) {
            bail!("no Service {:?} here; `service list` names them all", self.service.as_deref().unwrap_or_default());
        }
        let pod = self.pod.as_deref().map(|pod| interface(pod, maps)).transpose()?;
        Ok(Wanted { filter: self, services, pod })
    }
}

/// The host-side interface of a pod.
fn interface(pod: &str, maps: &Maps) -> Result<u32> {
    if let Ok(ip) = pod.parse::<IpAddr>() {
        let Some(entry) = maps.local_pod.get(&ip.into())? else { bail!("{ip} is no pod of this node") };
        return Ok(entry.ifindex);
    }
    let index = pod.parse().or_else(|_| nix::net::if_::if_nametoindex(pod));
    match index {
        Ok(index) if maps.device.get(&index)?.is_some() => Ok(index),
        _ => bail!("{pod:?} is neither a pod's address nor its interface on this node; `device list` names them all"),
    }
}

/// A filter that needs no names any more.
#[derive(Debug)]
struct Wanted<'a> {
    filter: &'a FlowFilter,
    services: Option<BTreeSet<u32>>,
    pod: Option<u32>,
}

impl Wanted<'_> {
    fn is(&self, key: &FlowKey, entry: &FlowEntry) -> bool {
        let tuples = [&entry.original, &entry.translated];
        let within = |net: &IpNet| {
            tuples.iter().any(|tuple| [tuple.src, tuple.dst].into_iter().any(|ip| net.contains(&IpAddr::from(ip))))
        };
        let has_port = |port| tuples.iter().any(|tuple| [tuple.src_port.get(), tuple.dst_port.get()].contains(&port));
        let FlowFilter { address, port, proto, state, pod: _, service: _ } = self.filter;
        self.services.as_ref().is_none_or(|ids| ids.contains(&entry.service))
            && self.pod.is_none_or(|index| [entry.initiator_ifindex, entry.responder_ifindex].contains(&index))
            && address.as_ref().is_none_or(within)
            && port.is_none_or(has_port)
            && proto.is_none_or(|proto| key.proto == proto)
            && state.is_none_or(|state| entry.state == state)
    }
}

/// Flows that are wanted, at most so many, by the keys of their original tuples. Neither table is ever in memory whole.
fn find(maps: &Maps, wanted: &Wanted<'_>, limit: usize) -> Result<BTreeMap<FlowKey, Found>> {
    let mut found = BTreeMap::new();
    let mut take = |flows: &Map<FlowKey, FlowEntry>, table: &'static str| {
        flows.scan(|key, entry| {
            if entry.flags & FlowEntry::KEY_ORIGINAL == 0 || !wanted.is(key, entry) {
                return ControlFlow::Continue(());
            }
            // What was promoted left its rows in `flow_brief` behind: those of `flow_live`, which come first, are right.
            if table == "brief" && maps.flow_live.get(key).is_ok_and(|live| live.is_some()) {
                return ControlFlow::Continue(());
            }
            if found.len() >= limit {
                return ControlFlow::Break(());
            }
            found.insert(*key, Found { entry: *entry, table });
            ControlFlow::Continue(())
        })
    };
    take(&maps.flow_live, "live")?;
    take(&maps.flow_brief, "brief")?;
    Ok(found)
}

/// Flows, once each.
pub fn list(pin_root: &Path, format: Format, filter: &FlowFilter, limit: Option<usize>) -> Result<()> {
    let maps = open(pin_root)?;
    let names = names(&maps)?;
    let now = monotonic();
    let all = find(&maps, &filter.resolve(&maps, &names)?, limit.unwrap_or(usize::MAX))?;
    let rows = all.iter().map(|(key, Found { entry, table })| {
        let (from, to) = (&entry.original, &entry.translated);
        let path = if entry.flags & FlowEntry::REDIRECT != 0 {
            "redirect"
        } else if entry.flags & FlowEntry::SWITCH != 0 {
            "switch"
        } else {
            "stack"
        };
        let idle = now.saturating_sub(entry.last_seen) / 1_000_000_000;
        vec![
            json!(key.proto.to_string()),
            json!(endpoint(from.src, from.src_port.get())),
            json!(endpoint(from.dst, from.dst_port.get())),
            if entry.is_translated() { json!(endpoint(to.dst, to.dst_port.get())) } else { Value::Null },
            if to.src == from.src && to.src_port == from.src_port {
                Value::Null
            } else {
                json!(endpoint(to.src, to.src_port.get()))
            },
            name(&names, entry.service),
            json!(path),
            json!(state::name(entry.state)),
            json!(idle),
            json!(table),
        ]
    });
    let columns =
        ["protocol", "source", "destination", "backend", "seen as", "service", "path", "state", "idle", "table"];
    print(format, &columns, rows.collect())
}

/// Forgets flows. `all` must be said where nothing else chooses.
pub fn flush(pin_root: &Path, format: Format, filter: &FlowFilter, all: bool) -> Result<()> {
    if filter.is_empty() && !all {
        bail!("nothing says which flows: give --pod, --service, --address, --port, --proto or --state, or --all");
    }
    let maps = open(pin_root)?;
    let names = names(&maps)?;
    let found = find(&maps, &filter.resolve(&maps, &names)?, usize::MAX)?;
    let mut entries = 0_usize;
    let mut ended: BTreeMap<u32, u64> = BTreeMap::new();
    for (key, Found { entry, table }) in &found {
        let translated: &Tuple = &entry.translated;
        let other = translated.key(key.proto, translated.dst.family(), FlowKey::SIDE_COMMON);
        // A direct flow has one key for both.
        let keys: BTreeSet<FlowKey> = [*key, other].into();
        for key in &keys {
            let (live, brief) = (maps.flow_live.delete(key)?, maps.flow_brief.delete(key)?);
            entries += usize::from(live) + usize::from(brief);
        }
        if *table == "live"
            && let Some(pod) = entry.charged_to()
        {
            *ended.entry(pod).or_default() += 1;
        }
    }
    // What a pod may have open is counted anew each minute; until then it is not to be refused for what is gone.
    for (pod, ended) in ended {
        if let Some(count) = maps.pod_flows.get(&pod)? {
            maps.pod_flows.set(&pod, &count.saturating_sub(ended))?;
        }
    }
    match format {
        Format::Json => {
            let said = json!({ "version": VERSION, "flows": found.len(), "entries": entries });
            write(&serde_json::to_string_pretty(&said)?)
        }
        Format::Table => write(&format!("flows: {}, entries: {entries}", found.len())),
    }
}

#[cfg(test)]
mod tests {
    use proxy_abi::PortBe;

    use super::*;

    fn flow() -> (FlowKey, FlowEntry) {
        let ip = |text: &str| text.parse::<IpAddr>().expect("an address").into();
        let original = Tuple {
            src: ip("10.244.0.2"),
            dst: ip("10.96.0.10"),
            src_port: PortBe::new(40_000),
            dst_port: PortBe::new(80),
        };
        let translated = Tuple { dst: ip("10.244.1.3"), dst_port: PortBe::new(8080), ..original };
        let entry = FlowEntry {
            original,
            translated,
            service: 7,
            initiator_ifindex: 5,
            state: state::ESTABLISHED,
            ..FlowEntry::NONE
        };
        (original.key(Proto::TCP, proxy_abi::FAMILY_IPV4, FlowKey::SIDE_COMMON), entry)
    }

    #[test]
    fn every_option_must_be_true() {
        let any = FlowFilter::default;
        let address = |text: &str| FlowFilter { address: Some(range(text).expect("a range")), ..any() };
        let proto = |text: &str| FlowFilter { proto: Some(protocol(text).expect("a protocol")), ..any() };
        let state = |text: &str| FlowFilter { state: Some(state_number(text).expect("a state")), ..any() };
        let port = |port| FlowFilter { port: Some(port), ..any() };
        let table = [
            ("nothing", any(), true),
            ("source", address("10.244.0.2"), true),
            ("backend", address("10.244.1.0/24"), true),
            ("another range", address("10.244.2.0/24"), false),
            ("another family", address("::/0"), false),
            ("frontend's port", port(80), true),
            ("backend's port", port(8080), true),
            ("no port of it", port(81), false),
            ("tcp", proto("tcp"), true),
            ("6", proto("6"), true),
            ("udp", proto("UDP"), false),
            ("established", state("established"), true),
            ("closed", state("CLOSED"), false),
            ("one of two", FlowFilter { port: Some(80), ..address("10.1.0.0/16") }, false),
        ];
        let (key, entry) = flow();
        for (name, filter, expected) in &table {
            let wanted = Wanted { filter, services: None, pod: None };
            assert_eq!(wanted.is(&key, &entry), *expected, "{name}");
        }
        let filter = any();
        for (services, pod, expected) in [
            (Some([7, 8].into()), None, true),
            (Some([8].into()), None, false),
            (None, Some(5), true),
            (None, Some(6), false),
        ] {
            assert_eq!(Wanted { filter: &filter, services, pod }.is(&key, &entry), expected);
        }
    }

    #[test]
    fn what_cannot_be_meant_is_refused() {
        assert_eq!(range("10.0.0.0/33").unwrap_err(), "not an address or range");
        assert_eq!(protocol("tpc").unwrap_err(), "not a protocol");
        let said = state_number("open").unwrap_err();
        assert!(said.contains("SYN_SENT") && !said.contains("UNKNOWN"), "{said}");
    }
}
