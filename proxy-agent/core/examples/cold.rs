//! How long the first compilation takes, and one change after it: 10,000 Services with 2 backends each.
//!
//! `cargo run --release -p proxy-core --example cold`

use std::collections::BTreeSet;
use std::net::{IpAddr, Ipv4Addr};
use std::num::NonZeroU16;
use std::time::{Duration, Instant};

use proxy_core::compile::Capacity;
use proxy_core::dataplane::Dataplane;
use proxy_core::event::{Event, Listing, Node, Source};
use proxy_core::fake::FakeDataplane;
use proxy_core::name::ObjectName;
use proxy_core::reconcile::{Reconciler, Settings};
use proxy_core::service::{Endpoint, EndpointPort, EndpointSlice, Protocol, Service, ServicePort};
use proxy_core::tables::{Op, Tables};

/// A dataplane that takes everything in no time.
struct Nothing;

impl Dataplane for Nothing {
    type Error = std::convert::Infallible;

    fn load(&mut self) -> Result<Tables, Self::Error> {
        Ok(Tables::default())
    }

    fn apply(&mut self, _: &Op) -> Result<(), Self::Error> {
        Ok(())
    }
}

const SERVICES: u32 = 10_000;

fn main() {
    let events: Vec<Event> = (0..SERVICES)
        .flat_map(|n| [Event::Service(service(n)), Event::Slice(slice(n, 2))])
        .chain([
            Event::Node(Node { name: "node-a".into(), ..Node::default() }),
            listed(Source::Services, "svc"),
            listed(Source::EndpointSlices, "slice"),
            Event::Listed(Source::Node, Listing::Node),
            Event::Listed(Source::Links, Listing::Links(BTreeSet::new())),
            Event::Listed(Source::ServiceCidrs, Listing::ServiceCidrs(BTreeSet::new())),
        ])
        .collect();
    let mut reconciler = Reconciler::new(Settings::default());
    let start = Instant::now();
    for event in events.clone() {
        reconciler.handle(event);
    }
    println!("events     {:>10.3?}", start.elapsed());
    let start = Instant::now();
    let report = reconciler.sync(&mut Nothing, 0);
    println!("cold sync  {:>10.3?}  {} operations", start.elapsed(), report.applied);

    let mut times: Vec<Duration> = Vec::new();
    for round in 0..1_000_u32 {
        let changed = slice(round * 7 % SERVICES, 1 + round % 3);
        let start = Instant::now();
        reconciler.handle(Event::Slice(changed));
        reconciler.sync(&mut Nothing, u64::from(round));
        times.push(start.elapsed());
    }
    times.sort();
    let at = |share: usize| times.get(times.len() * share / 100).copied().unwrap_or_default();
    println!("one change {:>10.3?}  p50, {:.3?} p99, {:.3?} most", at(50), at(99), times.last());

    let mut fake = FakeDataplane::new(Capacity::default());
    let start = Instant::now();
    let mut first = Reconciler::new(Settings::default());
    for event in events.clone() {
        first.handle(event);
    }
    first.sync(&mut fake, 0);
    println!("fake       {:>10.3?}  cold", start.elapsed());
    let mut second = Reconciler::new(Settings::default());
    for event in events {
        second.handle(event);
    }
    let start = Instant::now();
    let report = second.sync(&mut fake, 0);
    println!("restart    {:>10.3?}  {} operations", start.elapsed(), report.applied);
}

fn service(n: u32) -> Service {
    Service {
        name: ObjectName::new("default", format!("svc-{n}")),
        cluster_ips: vec![IpAddr::V4(Ipv4Addr::from_bits(0x0a60_0001 + n))],
        ports: vec![ServicePort { name: "http".into(), protocol: Protocol::Tcp, port: port(80), node_port: None }],
        affinity_seconds: None,
        external_ips: Vec::new(),
        load_balancer_ips: Vec::new(),
        source_ranges: Vec::new(),
        internal_local: false,
        external_local: false,
        health_check_node_port: None,
    }
}

fn slice(n: u32, endpoints: u32) -> EndpointSlice {
    EndpointSlice {
        name: ObjectName::new("default", format!("slice-{n}")),
        service: ObjectName::new("default", format!("svc-{n}")),
        ports: vec![EndpointPort { name: "http".into(), protocol: Protocol::Tcp, port: port(8080) }],
        endpoints: (0..endpoints)
            .map(|e| Endpoint {
                address: IpAddr::V4(Ipv4Addr::from_bits(0x0af4_0001 + n * 4 + e)),
                ready: true,
                serving: true,
                terminating: false,
                node: Some("node-a".into()),
                for_zones: Vec::new(),
                for_nodes: Vec::new(),
            })
            .collect(),
        triggered: None,
    }
}

fn listed(source: Source, prefix: &str) -> Event {
    let names = (0..SERVICES).map(|n| ObjectName::new("default", format!("{prefix}-{n}")));
    Event::Listed(source, Listing::Objects(names.collect()))
}

const fn port(number: u16) -> NonZeroU16 {
    match NonZeroU16::new(number) {
        Some(port) => port,
        None => NonZeroU16::MIN,
    }
}
