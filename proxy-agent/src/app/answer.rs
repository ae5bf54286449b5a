//! Answers to what the command line asks.

use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

use proxy_abi::policy::{Direction, RuleRef};
use proxy_abi::{FrontendKey, PortBe, Proto};
use proxy_core::name::ObjectName;
use proxy_core::netpol::engine::Engine;
use proxy_core::netpol::explain::Reason;
use proxy_core::netpol::hits::Counts;
use proxy_core::netpol::lint::{findings, rule_name};
use proxy_core::netpol::policy::{Policy, Rule};
use proxy_core::netpol::reconcile::{PolicyReconciler, Regime};
use proxy_core::netpol::rules::Origin;
use proxy_core::netpol::spec::Pod;
use proxy_core::reconcile::Reconciler;

use crate::ask::{
    Answer, Asked, FrontendInfo, FrontendName, HitsInfo, LintInfo, ModelInfo, NearInfo, PodInfo, PolicyInfo, Question,
    ReasonInfo, RuleInfo,
};
use crate::dataplane::policy::PolicyMaps;

/// Similar names that are told.
const SIMILAR: usize = 5;

/// Answers from what the reconciler knows at this moment.
pub(super) fn answer(
    question: &Question,
    services: &Reconciler,
    reconciler: &PolicyReconciler,
    maps: &PolicyMaps,
) -> Answer {
    let engine = reconciler.engine();
    match question {
        Question::Pods { names, ips } => pods(reconciler, names, ips),
        Question::Labelled(labels) => Answer::Pods { found: labelled(reconciler, labels), similar: Vec::new() },
        Question::Endpoints => {
            let local = engine.subjects().keys().filter_map(|name| engine.world().member(name));
            let found = local.map(|member| pod_info(reconciler, &member.pod)).collect();
            Answer::Pods { found, similar: Vec::new() }
        }
        Question::Policies => Answer::Policies(policies(engine, &counts(maps))),
        Question::Lint { policy } => Answer::Lint(lint(engine, policy.as_deref())),
        Question::Reason(asked) => Answer::Reason(reason(engine, *asked)),
        Question::Model(keys) => Answer::Model(model(keys, services, reconciler)),
    }
}

fn model(keys: &[FrontendName], services: &Reconciler, policies: &PolicyReconciler) -> ModelInfo {
    let of_services = services.missing().map(|source| format!("{source:?}").to_lowercase());
    let of_policies = policies.missing().filter(|_| policies.enforces());
    let of_policies = of_policies.map(|source| format!("{source:?}").to_lowercase());
    let found = keys.iter().find_map(|FrontendName { ip, port, proto, scope }| {
        let key = FrontendKey { ip: (*ip).into(), port: PortBe::new(*port), proto: Proto(*proto), scope: *scope };
        services.frontend(&key)
    });
    ModelInfo {
        missing: of_services.chain(of_policies).collect(),
        settled: services.settled() && policies.settled(),
        epoch: policies.epoch(),
        frontend: found.map(|(entry, backends)| FrontendInfo {
            generation: entry.generation,
            endpoints: backends.iter().map(|found| SocketAddr::new(found.ip.into(), found.port.get())).collect(),
        }),
    }
}

fn pods(reconciler: &PolicyReconciler, names: &[String], ips: &[IpAddr]) -> Answer {
    let world = reconciler.engine().world();
    let (mut found, mut similar) = (Vec::new(), Vec::new());
    for text in names {
        let (namespace, name) = text.split_once('/').unwrap_or(("default", text));
        match world.member(&ObjectName::new(namespace, name)) {
            Some(member) => found.push(pod_info(reconciler, &member.pod)),
            None => similar.push((text.clone(), similar_to(world.members().map(|(name, _)| name), namespace, name))),
        }
    }
    for ip in ips {
        found.extend(world.owner(*ip).map(|member| pod_info(reconciler, &member.pod)));
    }
    found.sort_by(|a, b| a.name.cmp(&b.name));
    found.dedup();
    Answer::Pods { found, similar }
}

/// Those that run. A pod of the host's network has the node's addresses, and nothing tells its packets from the node's.
fn labelled(reconciler: &PolicyReconciler, labels: &[(String, String)]) -> Vec<PodInfo> {
    let pods = reconciler.engine().world().members().map(|(_, member)| &member.pod);
    let has = |pod: &Pod| {
        let equal =
            |(key, value): &(String, String)| pod.labels.get(key.as_str()).is_some_and(|found| **found == **value);
        !pod.host_network && !pod.finished && labels.iter().all(equal)
    };
    pods.filter(|pod| has(pod)).map(|pod| pod_info(reconciler, pod)).collect()
}

/// The names that differ least.
fn similar_to<'a>(all: impl Iterator<Item = &'a ObjectName>, namespace: &str, name: &str) -> Vec<String> {
    let mut ranked: Vec<(usize, &ObjectName)> = all
        .map(|other| {
            let elsewhere = usize::from(*other.namespace != *namespace);
            (distance(&other.name, name) + elsewhere, other)
        })
        .filter(|(distance, other)| *distance <= other.name.len().max(name.len()).div_ceil(2))
        .collect();
    ranked.sort();
    ranked.into_iter().take(SIMILAR).map(|(_, name)| name.to_string()).collect()
}

/// Insertions, deletions and substitutions that lead from one text to the other.
fn distance(a: &str, b: &str) -> usize {
    let mut row: Vec<usize> = (0..=b.chars().count()).collect();
    for (i, x) in a.chars().enumerate() {
        let mut diagonal = std::mem::replace(&mut row[0], i + 1);
        for (j, y) in b.chars().enumerate() {
            let cheapest = (diagonal + usize::from(x != y)).min(row[j] + 1).min(row[j + 1] + 1);
            diagonal = std::mem::replace(&mut row[j + 1], cheapest);
        }
    }
    row[row.len() - 1]
}

fn pod_info(reconciler: &PolicyReconciler, pod: &Pod) -> PodInfo {
    let engine = reconciler.engine();
    let world = engine.world();
    let local = world.is_local(pod);
    let policies = if local { world.policies(&pod.name.namespace, &pod.labels) } else { Vec::new() };
    let subject = engine.subjects().get(&pod.name);
    PodInfo {
        name: pod.name.to_string(),
        uid: pod.uid.to_string(),
        node: pod.node.as_deref().map(str::to_owned),
        local,
        ips: pod.ips.clone(),
        slot: reconciler.slot(&pod.uid).filter(|_| local && reconciler.regime() != Regime::Off),
        policies: policies.iter().map(|policy| policy.name.to_string()).collect(),
        locked: subject.and_then(|subject| subject.locked).map(|cause| cause.to_string()),
    }
}

fn lint(engine: &Engine, policy: Option<&str>) -> Option<Vec<LintInfo>> {
    let only = policy.map(|text| {
        let (namespace, name) = text.split_once('/').unwrap_or(("default", text));
        ObjectName::new(namespace, name)
    });
    if only.as_ref().is_some_and(|name| engine.world().policy(name).is_none()) {
        return None;
    }
    Some(findings(engine, only.as_ref()).into_iter().map(LintInfo::from).collect())
}

/// What rules have decided. Nothing where that cannot be read: then nothing is counted.
fn counts(maps: &PolicyMaps) -> Counts {
    match maps.hits.read() {
        Ok(rows) => rows.into_iter().collect(),
        Err(error) => {
            tracing::warn!(error = &error as &dyn std::error::Error, "hits of policies cannot be read");
            Counts::new()
        }
    }
}

fn policies(engine: &Engine, counts: &Counts) -> Vec<PolicyInfo> {
    let hits = engine.hits(counts);
    let world = engine.world();
    let mut lint: BTreeMap<ObjectName, usize> = BTreeMap::new();
    for finding in findings(engine, None) {
        *lint.entry(finding.policy).or_default() += 1;
    }
    let info = |policy: &Arc<Policy>| {
        let name = &policy.name;
        let is_subject = |pod: &ObjectName| {
            let member = world.member(pod);
            pod.namespace == name.namespace && member.is_some_and(|m| policy.subject.matches(&m.pod.labels))
        };
        let problems = world.findings_of(name).iter();
        let words =
            |rules: &Option<Vec<Rule>>| rules.as_ref().map(|rules| rules.iter().map(ToString::to_string).collect());
        let of_rules = |direction, rules: &Option<Vec<Rule>>| {
            let count = rules.as_ref().map_or(0, Vec::len);
            let key = |rule| (direction, Origin { policy: name.clone(), rule });
            (0..count).map(|rule| hits.rules.get(&key(rule)).copied().map(HitsInfo::from)).collect()
        };
        let refused = [Direction::Ingress, Direction::Egress].map(|way| hits.refused.get(&(way, name.clone())));
        let refused = refused.into_iter().flatten().copied().map(HitsInfo::from);
        PolicyInfo {
            name: name.to_string(),
            subject: if policy.subject.is_empty() { "all pods".to_owned() } else { policy.subject.to_string() },
            ingress: words(&policy.ingress),
            egress: words(&policy.egress),
            pods: engine.subjects().keys().filter(|pod| is_subject(pod)).count(),
            problems: problems.map(ToString::to_string).collect(),
            lint: lint.get(name).copied().unwrap_or_default(),
            audited: policy.audited,
            ingress_hits: of_rules(Direction::Ingress, &policy.ingress),
            egress_hits: of_rules(Direction::Egress, &policy.egress),
            refused: refused.reduce(|a, b| HitsInfo { count: a.count + b.count, since: a.since.min(b.since) }),
        }
    };
    world.policy_names().filter_map(|name| world.policy(&name).map(info)).collect()
}

fn reason(engine: &Engine, asked: Asked) -> ReasonInfo {
    let rule = RuleRef(asked.rule);
    let Some(direction) = engine.direction(rule) else { return ReasonInfo::default() };
    let info = |origin: &Origin| rule_info(engine, direction, origin);
    let mut reason = ReasonInfo::default();
    match engine.reason(rule, asked.peer) {
        Some(Reason::Rule(origin)) => reason.rule = Some(info(&origin)),
        Some(Reason::Isolated(policies)) => {
            let is_audited = |name: &&ObjectName| engine.world().policy(name).is_some_and(|policy| policy.audited);
            reason.audited = policies.iter().filter(is_audited).map(ToString::to_string).collect();
            reason.isolated_by = policies.iter().map(ToString::to_string).collect();
        }
        None => {}
    }
    let matches = engine.matches(rule, asked.peer, Proto(asked.proto), asked.port);
    let near = matches.into_iter().filter(|found| found.peer != found.port);
    reason.near = near.map(|f| NearInfo { rule: info(&f.origin), peer: f.peer, port: f.port }).collect();
    reason
}

fn rule_info(engine: &Engine, direction: Direction, origin: &Origin) -> RuleInfo {
    let policy = engine.world().policy(&origin.policy);
    let rules = match direction {
        Direction::Ingress => policy.and_then(|policy| policy.ingress.as_ref()),
        Direction::Egress => policy.and_then(|policy| policy.egress.as_ref()),
    };
    let text = rules.and_then(|rules| rules.get(origin.rule)).map(ToString::to_string);
    RuleInfo {
        policy: origin.policy.to_string(),
        rule: rule_name(direction, origin.rule),
        text: text.unwrap_or_else(|| "not there any more".to_owned()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn distances() {
        for (a, b, want) in [("", "", 0), ("web", "web", 0), ("web", "wbe", 2), ("web", "", 3), ("db-0", "db-10", 1)] {
            assert_eq!(distance(a, b), want, "{a} {b}");
        }
    }

    #[test]
    fn similar_names() {
        let all = ["shop/web", "shop/web-0", "shop/db", "other/web", "other/zebra"];
        let all: Vec<_> =
            all.iter().filter_map(|name| name.split_once('/')).map(|(a, b)| ObjectName::new(a, b)).collect();
        let similar = |namespace, name| similar_to(all.iter(), namespace, name);
        assert_eq!(similar("shop", "xyzzy"), [""; 0]);
        assert_eq!(similar("shop", "wep"), ["shop/web", "other/web", "shop/web-0"]);
        assert_eq!(similar("shop", "web-1"), ["shop/web-0", "shop/web", "other/web"]);
        assert_eq!(similar("default", "web"), ["other/web", "shop/web", "shop/web-0"]);
    }
}
