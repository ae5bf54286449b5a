//! What is counted of judgements, and what policies would refuse that are only audited.

use std::collections::BTreeMap;

use proxy_abi::policy::{PodHits, RuleRef};

use super::*;

/// The same policy, only audited.
fn audited(policy: Change) -> Change {
    match policy {
        Change::Policy(spec) => Change::Policy(PolicySpec { audit: Some("true".into()), ..spec }),
        other => other,
    }
}

/// The same policy under another name.
fn called(name: &str, policy: Change) -> Change {
    match policy {
        Change::Policy(spec) => Change::Policy(PolicySpec { name: ObjectName::new("default", name), ..spec }),
        other => other,
    }
}

/// How often rules decided, by policy, rule and direction; and what policies refused. All that is not 0.
fn counts(policed: &Policed<'_>, bench: &Bench) -> Result<BTreeMap<String, u64>> {
    let rows = bench.bpf().maps().policy.hits.read()?.into_iter().collect();
    let report = policed.reconciler().engine().hits(&rows);
    let rules =
        report.rules.iter().map(|((_, origin), hits)| (format!("{} {}", origin.policy.name, origin.rule), hits));
    let refused = report.refused.iter().map(|((_, policy), hits)| (format!("{} no", policy.name), hits));
    Ok(rules.chain(refused).filter(|(_, hits)| hits.count > 0).map(|(name, hits)| (name, hits.count)).collect())
}

fn is(found: &BTreeMap<String, u64>, wanted: &[(&str, u64)]) {
    let wanted: BTreeMap<String, u64> = wanted.iter().map(|(name, count)| ((*name).to_owned(), *count)).collect();
    assert_eq!(*found, wanted);
}

/// What was refused to a pod and would have been.
fn pod_hits(policed: &Policed<'_>, bench: &Bench, pod: &str) -> Result<PodHits> {
    let slot = policed.reconciler().slot(&format!("uid-{pod}")).context("a slot")?;
    bench.bpf().maps().policy.pod_hits.get(&slot.into())?.context("a row")
}

#[test]
fn each_judgement_counts_once() -> Result<()> {
    Bench::run(ROOMY, |bench| {
        for talk in TALKS {
            let rules: &[(&str, u16)] = &[("three", TARGET), ("one", TARGET)];
            let mut policed = policed(bench, [policy("two", Some(rules), None)])?;
            connect(&policed, talk)?;
            is(&counts(&policed, bench)?, &[("for-two 1", 1)]);
            // Not its packets.
            let (client, server) = ((&POD_ONE, CLIENT), (&POD_TWO, TARGET));
            let there = talk.frame(client, server, ACK);
            to(&policed, &POD_TWO, &there, Reason::Direct)?;
            is(&counts(&policed, bench)?, &[("for-two 1", 1)]);
            // What is refused leaves no flow: each packet is judged.
            let wrong = talk.frame((&POD_ONE, CLIENT), (&POD_TWO, 9), SYN);
            for _ in 0..3 {
                to(&policed, &POD_TWO, &wrong, Reason::PolicyIngress)?;
            }
            is(&counts(&policed, bench)?, &[("for-two 1", 1), ("for-two no", 3)]);
            let refused = |ingress, egress| PodHits { refused: [ingress, egress], audited: [0; 2] };
            assert_eq!(pod_hits(&policed, bench, "two")?, refused(3, 0));
            // Something else about the pod changes: the rule goes on counting, and the flow is judged anew.
            policed.change([called("more", policy("two", Some(&[("one", 9)]), None))])?;
            is(&counts(&policed, bench)?, &[("for-two 1", 1)]);
            to(&policed, &POD_TWO, &there, Reason::Direct)?;
            to(&policed, &POD_TWO, &wrong, Reason::DirectNew)?;
            is(&counts(&policed, bench)?, &[("for-two 1", 2), ("more 0", 1)]);
            assert_eq!(pod_hits(&policed, bench, "two")?, refused(3, 0));
            // A restart keeps it all.
            let more = called("more", policy("two", Some(&[("one", 9)]), None));
            let mut policed = super::policed(bench, [policy("two", Some(rules), None), more])?;
            is(&counts(&policed, bench)?, &[("for-two 1", 2), ("more 0", 1)]);
            // Cut by a rule that says something else: the live flow is refused, and counts for the rule no more.
            policed.change([policy("two", Some(&[("three", TARGET)]), None)])?;
            to(&policed, &POD_TWO, &there, Reason::PolicyCut)?;
            is(&counts(&policed, bench)?, &[("for-two no", 1), ("more 0", 1), ("more no", 1)]);
            // Numbers that are given away again begin at nothing, and so does another pod's slot.
            policed.change(["for-two", "more"].map(|name| Change::PolicyGone(ObjectName::new("default", name))))?;
            assert_eq!(bench.bpf().maps().policy.hits.read()?, []);
            policed.change([policy("one", Some(&[]), Some(&[("two", TARGET)]))])?;
            is(&counts(&policed, bench)?, &[]);
            let gone = Change::PodGone(ObjectName::new("default", "two"));
            policed.change([gone])?;
            policed.change([Change::Pod(pod("two", &POD_TWO, NODE))])?;
            policed.change([])?;
            assert_eq!(pod_hits(&policed, bench, "two")?, refused(0, 0));
            bench.forget_flows()?;
        }
        Ok(())
    })?
}

#[test]
fn an_audited_policy_refuses_nothing_and_tells() -> Result<()> {
    Bench::run(ROOMY, |bench| {
        for talk in TALKS {
            let tried = || audited(policy("two", Some(&[("three", TARGET)]), None));
            let mut policed = policed(bench, [tried()])?;
            policed.audit(&POD_TWO, true)?;
            let before = pod_hits(&policed, bench, "two")?;
            let (client, server) = ((&POD_ONE, CLIENT), (&POD_TWO, TARGET));
            let first = talk.frame(client, server, SYN);
            let told = |policed: &Policed<'_>, frame: &Frame, reason| -> Result<()> {
                let got = policed.feed(Hook::ToPod, &POD_TWO, &frame.build())?;
                let counts = [((Hook::ToPod, reason), 1), ((Hook::ToPod, Reason::PolicyAudit), 1)].into();
                assert_eq!((got.verdict, got.counts), (verdict::PASS, counts), "{frame:?}");
                Ok(())
            };
            told(&policed, &first, Reason::DirectNew)?;
            // Once for a flow, as all judgements.
            to(&policed, &POD_TWO, &first, Reason::Direct)?;
            from(&policed, &POD_TWO, &talk.frame(server, client, SYN_ACK), Reason::Direct)?;
            // What the audited policy allows is its hit, and no event.
            to(&policed, &POD_TWO, &talk.frame((&POD_THREE, CLIENT), server, SYN), Reason::DirectNew)?;
            is(&counts(&policed, bench)?, &[("for-two 0", 1), ("for-two no", 1)]);
            let since = |policed: &Policed<'_>| -> Result<[u64; 4]> {
                let all = |hits: PodHits| [hits.refused, hits.audited].concat();
                let (now, before) = (all(pod_hits(policed, bench, "two")?), all(before));
                Ok(std::array::from_fn(|at| now[at] - before[at]))
            };
            assert_eq!(since(&policed)?, [0, 0, 1, 0]);
            // The other way it says nothing.
            from(&policed, &POD_TWO, &talk.frame((&POD_TWO, 1), (&POD_ONE, 2), SYN), Reason::DirectNew)?;
            // Beside policies that are enforced: these decide, and what they refuse is not audited.
            policed.audit(&POD_TWO, false)?;
            policed.change([called("own", policy("two", Some(&[("one", TARGET)]), None))])?;
            to(&policed, &POD_TWO, &talk.frame(client, server, ACK), Reason::Direct)?;
            let other = talk.frame((&POD_ONE, CLIENT), (&POD_TWO, 9), SYN);
            to(&policed, &POD_TWO, &other, Reason::PolicyIngress)?;
            // The audited one is not about that pair, so together they allow what either does.
            assert_eq!(since(&policed)?, [1, 0, 1, 0]);
            // A live flow is told of when a policy comes that would cut it, and goes on.
            policed.change([Change::PolicyGone(ObjectName::new("default", "own"))])?;
            told(&policed, &talk.frame(client, server, ACK), Reason::Direct)?;
            assert_eq!(since(&policed)?, [1, 0, 2, 0]);
            // Enforced in the end, it cuts.
            policed.change([policy("two", Some(&[("three", TARGET)]), None)])?;
            to(&policed, &POD_TWO, &talk.frame(client, server, ACK), Reason::PolicyCut)?;
            policed.change([Change::PolicyGone(ObjectName::new("default", "for-two"))])?;
            bench.forget_flows()?;
        }
        Ok(())
    })?
}

/// Echo requests, fragments without ports and errors take other ways through the programs.
#[test]
fn what_has_no_ports_is_audited_too() -> Result<()> {
    Bench::run(ROOMY, |bench| {
        let policed = policed(bench, [audited(policy("two", Some(&[]), Some(&[])))])?;
        for family in Family::BOTH {
            let kind = if family == Family::V4 { 8 } else { 128 };
            let ping = POD_ONE.send(&POD_TWO, family, L4::Icmp(Icmp { kind, ..Icmp::default() }));
            let esp = POD_ONE.send(&POD_TWO, family, L4::Other { proto: 50, bytes: vec![1; 24] });
            for frame in [ping, esp] {
                let got = policed.feed(Hook::ToPod, &POD_TWO, &frame.build())?;
                let counts =
                    [((Hook::ToPod, Reason::OtherProtocol), 1), ((Hook::ToPod, Reason::PolicyAudit), 1)].into();
                assert_eq!((got.verdict, got.counts), (verdict::PASS, counts), "{frame:?}");
            }
        }
        assert_eq!(pod_hits(&policed, bench, "two")?, PodHits { refused: [0; 2], audited: [4, 0] });
        Ok(())
    })?
}

/// The row of a rule that nobody counts is not missed, and a broken one does no harm.
#[test]
fn a_rule_without_a_row_is_not_counted() -> Result<()> {
    Bench::run(ROOMY, |bench| {
        let policed = policed(bench, [policy("two", Some(&[("one", TARGET)]), None)])?;
        let rows = &bench.bpf().maps().policy.hits;
        let all = rows.read()?;
        assert_eq!(all.len(), 2, "{all:?}");
        for (rule, _) in &all {
            rows.delete(rule)?;
        }
        connect(&policed, TALKS[0])?;
        assert_eq!(rows.read()?, []);
        assert!(all.iter().any(|(rule, _)| RuleRef(*rule).is_isolated()));
        Ok(())
    })?
}
