//! The whole exposition, line by line.

use std::num::NonZeroU16;

use proxy_abi::policy::{HitsEntry, PodHits};
use proxy_core::facts::HealthCheck;
use proxy_core::name::ObjectName;
use proxy_core::service::EndpointSlice;

use super::*;

/// The whole text, as a scrape gives it. After a wanted change: run with `BLESS=1`, then read the difference.
#[test]
fn the_whole_exposition() {
    let metrics = Metrics::default();
    let name = ObjectName::new("ns", "web");
    let slice =
        EndpointSlice { name: name.clone(), service: name.clone(), ports: vec![], endpoints: vec![], triggered: None };
    for event in [Event::ServiceGone(name.clone()), Event::SliceGone(name.clone()), Event::Slice(slice)] {
        metrics.event(&event);
    }
    let ms = Duration::from_millis;
    metrics.round(Round { took: ms(250), applied: 7, failed: 0, settled: true, full: true });
    metrics.event(&Event::ServiceGone(name.clone()));
    metrics.round(Round { took: ms(3), applied: 1, failed: 2, settled: false, full: false });
    metrics.programmed(ms(1_500));
    let check = HealthCheck { port: NonZeroU16::MIN, local_endpoints: 1 };
    metrics.facts(&Facts { health_checks: [(name.clone(), check)].into(), no_local_internal: 2, no_local_external: 3 });
    metrics.map("backend", Usage { entries: 3, capacity: 12 });
    metrics.map("service", Usage { entries: 1, capacity: 0 });
    metrics.policy(PolicyRound {
        took: ms(3),
        applied: 12,
        failed: 1,
        policies: 4,
        pods: 5,
        locked: 1,
        held: 2,
        revision: 9,
        settled: true,
    });
    let [p, q] = ["p", "q"].map(|policy| ObjectName::new("ns", policy));
    metrics.counted(Counted {
        // A rule of both, one of one, and what neither allows; a row that nobody has counted yet.
        rules: [
            (1, (true, vec![p.clone(), q.clone()])),
            (2, (true, vec![q.clone()])),
            (3, (false, vec![p.clone(), q])),
            (4, (true, vec![p])),
        ]
        .into(),
        pods: [(7, ObjectName::new("ns", "web"))].into(),
    });
    metrics.sweep(Sweep { took: ms(2), removed: Some(5) });
    metrics.sweep(Sweep { took: ms(40_000), removed: None });
    for code in [200, 503, 200] {
        metrics.healthz(code);
    }
    metrics.livez(200);
    let watches = Arc::new(SourceMetrics::default());
    watches.services.listings.store(1, Ordering::Relaxed);
    watches.services.events.store(4, Ordering::Relaxed);
    watches.services.last_event_ms.store(1_700_000_000_500, Ordering::Relaxed);
    let status = |code| http::StatusCode::from_u16(code).ok();
    for (status, took) in [(status(200), 4), (status(200), 300), (status(410), 20), (None, 70_000)] {
        watches.requests.count("10.0.0.1:6443", &http::Method::GET, status, ms(took));
    }
    metrics.watches(watches);
    {
        let mut state = metrics.state.lock().expect("one thread");
        let at = SystemTime::UNIX_EPOCH + Duration::from_millis(1_700_000_000_250);
        assert!(state.queued.is_some() && state.synced.is_some());
        (state.queued, state.synced) = (Some(at), Some(at));
    }
    let row = |hook, reason, packets| Packets { hook, reason, packets, bytes: packets * 100 };
    let seen = Seen {
        process: Process {
            cpu: 1.25,
            start: 1_700_000_000.5,
            resident: 4_096.0,
            virt: 8_192.0,
            open_fds: 9.0,
            max_fds: 1_024.0,
        },
        tasks: 11,
        packets: vec![
            row(Hook::FromPod, Reason::ServiceNew, 5),
            row(Hook::FromPod, Reason::NoFlow, 2),
            row(Hook::ToPod, Reason::NoFlow, 0),
        ],
        numbers: Numbers {
            rules: [(1, 4), (2, 5), (3, 6), (9, 100)].map(|(rule, count)| (rule, HitsEntry { count, since: 1 })).into(),
            pods: [
                (7, PodHits { refused: [8, 0], audited: [0, 9] }),
                (8, PodHits { refused: [1; 2], audited: [1; 2] }),
            ]
            .into(),
        },
    };
    let text = metrics.text(&seen);
    let golden = concat!(env!("CARGO_MANIFEST_DIR"), "/src/serve/metrics.golden");
    if std::env::var_os("BLESS").is_some() {
        std::fs::write(golden, &text).expect("written");
    }
    let want = std::fs::read_to_string(golden).expect("the golden text");
    for (number, (got, want)) in text.lines().zip(want.lines()).enumerate() {
        assert_eq!(got, want, "line {}", number + 1);
    }
    assert_eq!(text.len(), want.len());
}

/// Each family once, with its samples right behind it, named as text format 0.0.4 wants it.
#[test]
fn the_exposition_is_well_formed() {
    let metrics = Metrics::default();
    metrics.watches(Arc::default());
    let text = metrics.text(&Seen::default());
    let mut families = std::collections::BTreeSet::new();
    let (mut family, mut kind) = (String::new(), String::new());
    for line in text.lines() {
        if let Some(rest) = line.strip_prefix("# TYPE ") {
            let (name, of) = rest.split_once(' ').expect("a kind");
            assert!(families.insert(name.to_owned()), "{name} twice");
            assert!(!name.contains("_total_total"), "{name}");
            (family, kind) = (name.to_owned(), of.to_owned());
            continue;
        }
        if line.starts_with("# HELP ") {
            continue;
        }
        let (sample, value) = line.rsplit_once(' ').expect("a value");
        let name = sample.split('{').next().expect("a name");
        let suffix = name.strip_prefix(family.as_str()).unwrap_or_else(|| panic!("{line} is not of {family}"));
        let allowed: &[&str] = if kind == "histogram" { &["_bucket", "_sum", "_count"] } else { &[""] };
        assert!(allowed.contains(&suffix), "{line}");
        assert!(value.parse::<f64>().is_ok(), "{line}");
    }
    let kept = [
        "kubeproxy_sync_proxy_rules_duration_seconds",
        "kubeproxy_sync_full_proxy_rules_duration_seconds",
        "kubeproxy_sync_partial_proxy_rules_duration_seconds",
        "kubeproxy_sync_proxy_rules_last_timestamp_seconds",
        "kubeproxy_sync_proxy_rules_last_queued_timestamp_seconds",
        "kubeproxy_sync_proxy_rules_endpoint_changes_pending",
        "kubeproxy_sync_proxy_rules_endpoint_changes_total",
        "kubeproxy_sync_proxy_rules_service_changes_pending",
        "kubeproxy_sync_proxy_rules_service_changes_total",
        "kubeproxy_sync_proxy_rules_no_local_endpoints_total",
        "kubeproxy_sync_proxy_rules_nftables_sync_failures_total",
        "kubeproxy_sync_proxy_rules_iptables_restore_failures_total",
        "kubeproxy_network_programming_duration_seconds",
        "kubeproxy_conntrack_reconciler_sync_duration_seconds",
        "kubeproxy_iptables_ct_state_invalid_dropped_packets_total",
        "kubeproxy_proxy_healthz_total",
        "kubeproxy_proxy_livez_total",
        "process_resident_memory_bytes",
        "process_cpu_seconds_total",
        "process_open_fds",
        "process_start_time_seconds",
        "go_goroutines",
        "rest_client_requests_total",
        "rest_client_request_duration_seconds",
    ];
    let missing: Vec<_> = kept.into_iter().filter(|name| !families.contains(*name)).collect();
    assert_eq!(missing, [""; 0]);
}
