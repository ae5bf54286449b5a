//! Interleaved rounds over all contenders, and what they say about the budgets.

use std::collections::BTreeMap;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context as _, Result};
use comfy_table::{CellAlignment, Table, presets};
use serde_json::{Value, json};

use crate::contender::{Contender, NFTABLES, OURS, PLAIN, Scene, Site, Way};
use crate::measure::{Kind, Sample, measure};
use crate::stats::{Budget, Estimate, Verdict, median};

/// What to run.
#[derive(Clone, Debug)]
pub(crate) struct Plan<'a> {
    pub(crate) contenders: Vec<Contender>,
    pub(crate) kinds: Vec<Kind>,
    pub(crate) rounds: usize,
    pub(crate) time: Duration,
    pub(crate) kube_proxy: Option<&'a Path>,
}

type Samples = BTreeMap<(Kind, Contender), Vec<Sample>>;

/// Two contenders compared in one quantity.
pub(crate) struct Comparison {
    pub(crate) text: String,
    pub(crate) estimate: Estimate,
    pub(crate) budget: Option<Budget>,
}

/// Measures with so many Services, prints tables, and returns everything as JSON.
pub(crate) fn run(plan: &Plan<'_>, services: u16) -> Result<Value> {
    let (contenders, rounds, time) = (plan.contenders.len(), plan.rounds, plan.time);
    println!("\n== {services} Services: {contenders} contenders, {rounds} rounds of {time:?}; /0 and /1: br_netfilter");
    let mut sites = Vec::new();
    for &contender in &plan.contenders {
        sites.push(
            Site::build(contender, Scene::SameNode, services, plan.kube_proxy)
                .with_context(|| contender.to_string())?,
        );
    }
    let mut samples = Samples::new();
    // One round to warm up, which does not count.
    for round in 0..=plan.rounds {
        for &kind in &plan.kinds {
            // Each round begins with another one: nobody always runs after the same neighbour's leftovers.
            for at in 0..sites.len() {
                let site = &sites[(at + round) % sites.len()];
                let before = site.served();
                let sample = measure(site, kind, plan.time).with_context(|| site.contender.to_string())?;
                anyhow::ensure!(site.served() > before, "{}: another server answered", site.contender);
                if round > 0 {
                    samples.entry((kind, site.contender)).or_default().push(sample);
                }
            }
        }
        eprint!("\rround {round} of {}", plan.rounds);
    }
    eprintln!();
    let mut kinds = Vec::new();
    for &kind in &plan.kinds {
        kinds.push(report(kind, &plan.contenders, &samples, services));
    }
    Ok(json!({ "services": services, "measurements": kinds }))
}

fn column(samples: &Samples, kind: Kind, contender: Contender, field: fn(&Sample) -> f64) -> Vec<f64> {
    samples.get(&(kind, contender)).map(|all| all.iter().map(field).collect()).unwrap_or_default()
}

fn report(kind: Kind, contenders: &[Contender], samples: &Samples, services: u16) -> Value {
    println!("\n{}, {services} Services (medians of the rounds)", kind.title());
    let mut table = table();
    let each = if kind == Kind::Bulk { "per MiB" } else { "each" };
    let (machine, own) = (format!("machine CPU µs {each}"), format!("own CPU µs {each}"));
    table.set_header(["", kind.unit(), "p50 µs", "p99 µs", &machine, &own]);
    let mut rows = Vec::new();
    for &contender in contenders {
        let middle = |field| median(&column(samples, kind, contender, field));
        let sample = Sample {
            rate: middle(|s| s.rate),
            p50: middle(|s| s.p50),
            p99: middle(|s| s.p99),
            cpu: middle(|s| s.cpu),
            own: middle(|s| s.own),
        };
        let digits = usize::from(kind == Kind::Bulk);
        let mut cells = vec![contender.to_string(), format!("{:.digits$}", sample.rate)];
        cells.extend(match kind {
            Kind::Bulk => ["–".to_owned(), "–".to_owned()],
            _ => [sample.p50, sample.p99].map(|latency| format!("{latency:.1}")),
        });
        cells.extend([sample.cpu, sample.own].map(|cpu| format!("{cpu:.1}")));
        table.add_row(cells);
        rows.push(json!({
            "contender": contender.to_string(), "median": sample, "rounds": samples.get(&(kind, contender)),
        }));
    }
    right_aligned(&mut table);
    println!("{table}");
    let comparisons = compare(kind, contenders, samples);
    print_comparisons(&comparisons);
    let comparisons: Vec<Value> = comparisons.iter().map(Comparison::json).collect();
    json!({ "kind": kind, "unit": kind.unit(), "contenders": rows, "comparisons": comparisons })
}

/// Ours against the others, where both were measured.
fn compare(kind: Kind, contenders: &[Contender], samples: &Samples) -> Vec<Comparison> {
    let connects = matches!(kind, Kind::Connect1 | Kind::Connect16);
    let mut found = Vec::new();
    let rates = |contender| column(samples, kind, contender, |s| s.rate);
    let latencies = |contender| column(samples, kind, contender, |s| s.p50);
    for &other in contenders.iter().filter(|other| other.way != Way::Ours) {
        // Plain bridging is compared on equal terms; kube-proxy has only the one.
        let ours = match other.way {
            Way::Plain => Contender { br_netfilter: other.br_netfilter, ..OURS },
            _ => OURS,
        };
        if !contenders.contains(&ours) {
            continue;
        }
        let budget = match other {
            PLAIN if kind != Kind::Bulk => Some(Budget::AtLeast(1.0)),
            NFTABLES if connects => Some(Budget::AtLeast(1.7)),
            _ => None,
        };
        let estimate = Estimate::of_ratios(&rates(ours), &rates(other));
        found.push(Comparison { text: format!("{}: {ours} ÷ {other}", kind.unit()), estimate, budget });
        if kind != Kind::Bulk {
            let budget = budget.filter(|_| other == PLAIN);
            let estimate = Estimate::of_ratios(&latencies(other), &latencies(ours));
            found.push(Comparison { text: format!("p50: {other} ÷ {ours}"), estimate, budget });
        }
    }
    if contenders.contains(&PLAIN) && kind != Kind::Bulk {
        for &other in contenders.iter().filter(|other| other.way != Way::Plain) {
            let budget = (other == OURS && connects).then_some(Budget::AtMost(10.0));
            for (whose, field) in [("machine", (|s| s.cpu) as fn(&Sample) -> f64), ("own", |s| s.own)] {
                let cpu = |contender| column(samples, kind, contender, field);
                let estimate = Estimate::of_differences(&cpu(other), &cpu(PLAIN));
                found.push(Comparison { text: format!("{whose} CPU µs: {other} − {PLAIN}"), estimate, budget });
            }
        }
    }
    found
}

impl Comparison {
    fn verdict(&self) -> Option<Verdict> {
        self.budget.map(|budget| self.estimate.against(budget))
    }

    pub(crate) fn json(&self) -> Value {
        json!({
            "what": self.text, "estimate": self.estimate, "budget": self.budget, "verdict": self.verdict(),
        })
    }
}

pub(crate) fn print_comparisons(comparisons: &[Comparison]) {
    let mut table = table();
    table.set_header(["", "mean", "95 % interval", "budget", "verdict"]);
    for comparison in comparisons {
        let Estimate { mean, low, high, .. } = comparison.estimate;
        table.add_row([
            comparison.text.clone(),
            format!("{mean:.3}"),
            format!("{low:.3} to {high:.3}"),
            comparison.budget.map_or(String::new(), |budget| budget.to_string()),
            comparison.verdict().map_or(String::new(), |verdict| verdict.to_string()),
        ]);
    }
    right_aligned(&mut table);
    println!("{table}");
}

/// Without lines: it is to fit 100 columns.
pub(crate) fn table() -> Table {
    let mut table = Table::new();
    table.load_preset(presets::NOTHING);
    table
}

/// All columns but the first.
pub(crate) fn right_aligned(table: &mut Table) {
    for column in table.column_iter_mut().skip(1) {
        column.set_cell_alignment(CellAlignment::Right);
    }
}
