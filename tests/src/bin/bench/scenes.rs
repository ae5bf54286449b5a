//! Services that are reached in other ways than from pod to pod of one node, many Services against few, and whether
//! masqueraded connections of one client can go on for long.

use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result};
use proxy_tests::traffic::{Closer, connect_rate};
use serde_json::{Value, json};

use crate::contender::{Contender, NFTABLES, OURS, Scene, Site, Way};
use crate::measure::{Kind, Sample, measure};
use crate::objects::Port;
use crate::stats::{Budget, Estimate, median};
use crate::traffic::{Comparison, print_comparisons, right_aligned, table};

/// What is measured of each.
const KINDS: [Kind; 2] = [Kind::Connect1, Kind::Connect16];

/// One site and what was measured there.
struct Series {
    name: String,
    site: Site,
    samples: [Vec<Sample>; 2],
}

impl Series {
    fn new(name: String, site: Site) -> Self {
        Self { name, site, samples: [Vec::new(), Vec::new()] }
    }

    fn column(&self, kind: usize, field: fn(&Sample) -> f64) -> Vec<f64> {
        self.samples[kind].iter().map(field).collect()
    }
}

/// Interleaved rounds over the series; the first does not count.
fn rounds(all: &mut [Series], rounds: usize, time: Duration) -> Result<()> {
    for round in 0..=rounds {
        for (index, kind) in KINDS.into_iter().enumerate() {
            for at in 0..all.len() {
                let which = (at + round) % all.len();
                let before = all[which].site.served();
                let sample = measure(&all[which].site, kind, time).with_context(|| all[which].name.clone())?;
                anyhow::ensure!(all[which].site.served() > before, "{}: another server answered", all[which].name);
                if round > 0 {
                    all[which].samples[index].push(sample);
                }
            }
        }
        eprint!("\rround {round} of {rounds}");
    }
    eprintln!();
    Ok(())
}

fn show(title: &str, all: &[Series], compare: impl Fn(usize) -> Vec<Comparison>) -> Value {
    let mut kinds = Vec::new();
    for (index, kind) in KINDS.into_iter().enumerate() {
        println!("\n{title}: {} (medians of the rounds)", kind.title());
        let mut table = table();
        table.set_header(["", "per second", "p50 µs", "p99 µs", "machine CPU µs each", "own CPU µs each"]);
        let mut rows = Vec::new();
        for series in all {
            let middle = |field| median(&series.column(index, field));
            let sample = Sample {
                rate: middle(|s| s.rate),
                p50: middle(|s| s.p50),
                p99: middle(|s| s.p99),
                cpu: middle(|s| s.cpu),
                own: middle(|s| s.own),
            };
            let cells = [sample.p50, sample.p99, sample.cpu, sample.own].map(|value| format!("{value:.1}"));
            table.add_row([series.name.clone(), format!("{:.0}", sample.rate)].into_iter().chain(cells));
            rows.push(json!({ "contender": series.name, "median": sample, "rounds": series.samples[index] }));
        }
        right_aligned(&mut table);
        println!("{table}");
        let comparisons = compare(index);
        print_comparisons(&comparisons);
        let comparisons: Vec<Value> = comparisons.iter().map(Comparison::json).collect();
        kinds.push(json!({ "kind": kind, "contenders": rows, "comparisons": comparisons }));
    }
    json!({ "title": title, "measurements": kinds })
}

/// Ours against kube-proxy (and plain, across nodes) in one scene.
pub(crate) fn scene(
    scene: Scene,
    contenders: &[Contender],
    count: usize,
    time: Duration,
    kube_proxy: Option<&Path>,
) -> Result<Value> {
    println!("\n== {}: {count} rounds of {time:?}", scene.title());
    let takes_part = |contender: &&Contender| match contender.way {
        // A host outside has no way to a pod's own address.
        Way::Plain => !scene.is_outside() && !contender.br_netfilter,
        Way::Ours => **contender == OURS,
        Way::KubeProxy(_) => true,
    };
    let mut all = Vec::new();
    for contender in contenders.iter().filter(takes_part) {
        let site = Site::build(*contender, scene, 10, kube_proxy).with_context(|| contender.to_string())?;
        all.push(Series::new(contender.to_string(), site));
    }
    rounds(&mut all, count, time)?;
    let ours = all.iter().position(|series| series.site.contender == OURS).context("ours is always there")?;
    let budget = if scene == Scene::CrossNode { Budget::AtLeast(1.2) } else { Budget::AtLeast(1.5) };
    Ok(show(scene.title(), &all, |kind| {
        let others = all.iter().enumerate().filter(|(index, _)| *index != ours);
        others
            .map(|(_, other)| Comparison {
                text: format!("per second: {} ÷ {}", all[ours].name, other.name),
                estimate: Estimate::of_ratios(&all[ours].column(kind, |s| s.rate), &other.column(kind, |s| s.rate)),
                budget: (other.site.contender == NFTABLES).then_some(budget),
            })
            .collect()
    }))
}

/// Many Services against ten, pods of one node.
pub(crate) fn scale(many: u16, count: usize, time: Duration) -> Result<Value> {
    println!("\n== {many} Services against 10: {count} rounds of {time:?}");
    let mut all = Vec::new();
    for services in [10, many] {
        let site = Site::build(OURS, Scene::SameNode, services, None)?;
        all.push(Series::new(format!("{services} Services"), site));
    }
    rounds(&mut all, count, time)?;
    Ok(show("ClusterIP", &all, |kind| {
        let [few, many] = [&all[0], &all[1]];
        let rate = |series: &Series| series.column(kind, |s| s.rate);
        let cpu = |series: &Series| series.column(kind, |s| s.own);
        vec![
            Comparison {
                text: format!("per second: {} ÷ {}", many.name, few.name),
                estimate: Estimate::of_ratios(&rate(many), &rate(few)),
                budget: Some(Budget::AtLeast(0.95)),
            },
            Comparison {
                text: format!("own CPU µs: {} ÷ {}", few.name, many.name),
                estimate: Estimate::of_ratios(&cpu(few), &cpu(many)),
                budget: Some(Budget::AtLeast(0.95)),
            },
        ]
    }))
}

/// Connections of one client address through a masquerading NodePort, for `whole`, and as many beside them through one
/// that keeps the source and through kube-proxy's, in turns: the rate of each, and how many failed.
///
/// A backend holds a connection that it has closed for a minute, kube-proxy's conntrack one for two: what goes on at its
/// rate has taken ports over.
pub(crate) fn sustain(whole: Duration, kube_proxy: Option<&Path>) -> Result<Value> {
    println!("\n== one client address, NodePort, 16 clients, in turns, {whole:?} each");
    println!("   The backend closes first, so that it holds each connection in TIME_WAIT.");
    let mut sides = vec![
        Side::new(Site::build(OURS, Scene::OutsideCluster, 10, None)?),
        Side::new(Site::build(OURS, Scene::OutsideLocal, 10, None)?),
    ];
    if kube_proxy.is_some() {
        sides.push(Side::new(Site::build(NFTABLES, Scene::OutsideCluster, 10, kube_proxy)?));
    }
    let turn = whole / TURNS;
    for _ in 0..TURNS {
        for side in &mut sides {
            side.go_on(turn)?;
        }
    }
    let [ours, others @ ..] = &*sides else { anyhow::bail!("ours is always there") };
    let comparisons: Vec<Comparison> = others
        .iter()
        .map(|other| Comparison {
            text: format!("per second, sustained: {} ÷ {}", ours.name(), other.name()),
            estimate: Estimate::of_ratios(&ours.rates, &other.rates),
            budget: (other.site.contender == NFTABLES).then_some(Budget::AtLeast(1.5)),
        })
        .collect();
    print_comparisons(&comparisons);
    Ok(json!({
        "sides": sides.iter().map(Side::json).collect::<Vec<_>>(),
        "comparisons": comparisons.iter().map(Comparison::json).collect::<Vec<_>>(),
    }))
}

/// How often each of those who take turns comes in a sustained run.
const TURNS: u32 = 10;

/// One of those who take turns in a sustained run, and what came of it.
struct Side {
    site: Site,
    rates: Vec<f64>,
    operations: u64,
    errors: u64,
    first_error: Option<String>,
}

impl Side {
    const fn new(site: Site) -> Self {
        Self { site, rates: Vec::new(), operations: 0, errors: 0, first_error: None }
    }

    fn name(&self) -> String {
        format!("{} {}", self.site.contender, self.site.title())
    }

    fn go_on(&mut self, turn: Duration) -> Result<()> {
        let begin = Instant::now();
        let report = connect_rate(self.site.client(), self.site.target(Port::Short), 16, turn, Closer::Server)?;
        println!(
            "  {}: {:>6.0} per second, {} of {}",
            self.name(),
            report.per_second(),
            report.errors,
            report.operations
        );
        self.rates.push(report.per_second());
        self.errors += report.errors;
        self.operations += report.operations;
        if self.first_error.is_none() {
            self.first_error = report.first_error;
        }
        anyhow::ensure!(begin.elapsed() < turn * 3, "{}: clients did not come to their end", self.name());
        Ok(())
    }

    fn json(&self) -> Value {
        let Self { rates, operations, errors, first_error, .. } = self;
        json!({
            "side": self.name(), "per_second": rates, "operations": operations, "errors": errors,
            "first_error": first_error,
        })
    }
}
