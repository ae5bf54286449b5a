//! NetworkPolicies: what is absent, null, empty and filled stays apart, and reads on to what it means.

use k8s_openapi::api::networking::v1 as networking_v1;
use proxy_agent::k8s::convert::{convert_policy, unreadable_policy};
use proxy_core::name::ObjectName;
use proxy_core::netpol::parse;
use proxy_core::netpol::spec::{
    BlockSpec, ExpressionSpec, PeerSpec, PolicySpec, PortNumber, PortSpec, RuleSpec, SelectorSpec,
};
use serde_json::{Value, json};

use crate::findings;

fn policy(spec: &Value) -> networking_v1::NetworkPolicy {
    serde_json::from_value(json!({"metadata": {"name": "p", "namespace": "shop"}, "spec": spec})).unwrap()
}

fn none() -> PolicySpec {
    PolicySpec {
        name: ObjectName::new("shop", "p"),
        audit: None,
        pod_selector: None,
        policy_types: None,
        ingress: None,
        egress: None,
    }
}

fn selector(labels: &[(&str, &str)], expressions: &[(&str, &str, &[&str])]) -> SelectorSpec {
    SelectorSpec {
        labels: labels.iter().map(|(key, value)| ((*key).into(), (*value).into())).collect(),
        expressions: expressions
            .iter()
            .map(|(key, operator, values)| ExpressionSpec {
                key: (*key).into(),
                operator: (*operator).into(),
                values: values.iter().map(|value| (*value).into()).collect(),
            })
            .collect(),
    }
}

fn peers(peers: Vec<PeerSpec>) -> RuleSpec {
    RuleSpec { peers: Some(peers), ports: None }
}

fn ports(ports: Vec<PortSpec>) -> RuleSpec {
    RuleSpec { peers: None, ports: Some(ports) }
}

fn block(cidr: &str, except: &[&str]) -> PeerSpec {
    let except = except.iter().map(|text| (*text).into()).collect();
    PeerSpec { block: Some(BlockSpec { cidr: cidr.into(), except }), ..PeerSpec::default() }
}

fn port(protocol: Option<&str>, port: Option<PortNumber>, end_port: Option<i32>) -> PortSpec {
    PortSpec { protocol: protocol.map(Into::into), port, end_port }
}

/// Each with the directions in which it isolates, and how many rules it then has there.
#[test]
fn absent_null_empty_and_filled() {
    let empty = || Some(SelectorSpec::default());
    let types = |types: &[&str]| Some(types.iter().map(|text| (*text).into()).collect::<Vec<_>>());
    let any = RuleSpec::default();
    let rows = [
        (json!({}), none(), "in 0"),
        (json!({"podSelector": null, "policyTypes": null, "ingress": null, "egress": null}), none(), "in 0"),
        (json!({"podSelector": {}}), PolicySpec { pod_selector: empty(), ..none() }, "in 0"),
        (
            json!({"podSelector": {"matchLabels": null, "matchExpressions": null}}),
            PolicySpec { pod_selector: empty(), ..none() },
            "in 0",
        ),
        (
            json!({"podSelector": {"matchLabels": {}, "matchExpressions": []}}),
            PolicySpec { pod_selector: empty(), ..none() },
            "in 0",
        ),
        (json!({"policyTypes": []}), PolicySpec { policy_types: types(&[]), ..none() }, "in 0"),
        (json!({"ingress": []}), PolicySpec { ingress: Some(vec![]), ..none() }, "in 0"),
        (json!({"egress": []}), PolicySpec { egress: Some(vec![]), ..none() }, "in 0"),
        (json!({"egress": [{}]}), PolicySpec { egress: Some(vec![any.clone()]), ..none() }, "in 0 out 1"),
        (json!({"policyTypes": ["Egress"]}), PolicySpec { policy_types: types(&["Egress"]), ..none() }, "out 0"),
        (
            json!({"policyTypes": ["Egress"], "ingress": [{}]}),
            PolicySpec { policy_types: types(&["Egress"]), ingress: Some(vec![any.clone()]), ..none() },
            "out 0",
        ),
        (
            json!({"policyTypes": ["Ingress", "Egress"], "ingress": [{"from": null, "ports": null}]}),
            PolicySpec { policy_types: types(&["Ingress", "Egress"]), ingress: Some(vec![any.clone()]), ..none() },
            "in 1 out 0",
        ),
        (
            json!({"ingress": [{"from": []}, {"ports": []}]}),
            PolicySpec { ingress: Some(vec![peers(vec![]), ports(vec![])]), ..none() },
            "in 2",
        ),
        (
            json!({"ingress": [{"from": [{}]}], "egress": [{"to": []}]}),
            PolicySpec {
                ingress: Some(vec![peers(vec![PeerSpec::default()])]),
                egress: Some(vec![peers(vec![])]),
                ..none()
            },
            "in 1 out 1",
        ),
    ];
    for (spec, want, meaning) in rows {
        let got = convert_policy(&policy(&spec), None);
        assert_eq!((got.outcome.as_ref(), got.diagnostics.as_slice()), (Some(&want), &[][..]), "{spec}");
        let (parsed, _) = parse::policy(&want);
        let count =
            |name, rules: &Option<Vec<_>>| rules.as_ref().map(|rules: &Vec<_>| format!("{name} {}", rules.len()));
        let sides = [count("in", &parsed.ingress), count("out", &parsed.egress)];
        assert_eq!(sides.into_iter().flatten().collect::<Vec<_>>().join(" "), meaning, "{spec}");
    }
}

#[test]
fn peers_and_ports() {
    let some = |one: Vec<PeerSpec>| PolicySpec { ingress: Some(vec![peers(one)]), ..none() };
    let to = |one: Vec<PortSpec>| PolicySpec { egress: Some(vec![ports(one)]), ..none() };
    let from = |one: Value| json!({"ingress": [{"from": [one]}]});
    let at = |one: Value| json!({"egress": [{"ports": [one]}]});
    let web = || selector(&[("app", "web")], &[]);
    let number = |number| Some(PortNumber::Number(number));
    let rows = [
        (
            from(json!({"podSelector": {}})),
            some(vec![PeerSpec { pods: Some(selector(&[], &[])), ..PeerSpec::default() }]),
        ),
        (
            from(json!({"namespaceSelector": {}, "podSelector": {"matchLabels": {"app": "web"}}})),
            some(vec![PeerSpec { pods: Some(web()), namespaces: Some(selector(&[], &[])), block: None }]),
        ),
        (
            from(json!({"namespaceSelector": {"matchExpressions": [
                {"key": "a", "operator": "In", "values": ["x", "y"]},
                {"key": "b", "operator": "DoesNotExist"},
                {"key": "c", "operator": "Sideways", "values": null},
            ]}})),
            some(vec![PeerSpec {
                namespaces: Some(selector(
                    &[],
                    &[("a", "In", &["x", "y"]), ("b", "DoesNotExist", &[]), ("c", "Sideways", &[])],
                )),
                ..PeerSpec::default()
            }]),
        ),
        // As the API server once let them in: they are read on with the same leniency.
        (
            from(json!({"ipBlock": {"cidr": "10.1.2.3/8", "except": ["010.001.0.0/16", "nonsense"]}})),
            some(vec![block("10.1.2.3/8", &["010.001.0.0/16", "nonsense"])]),
        ),
        (from(json!({"ipBlock": {"cidr": "fd00::1/64", "except": null}})), some(vec![block("fd00::1/64", &[])])),
        (at(json!({})), to(vec![port(None, None, None)])),
        (at(json!({"port": 80})), to(vec![port(None, number(80), None)])),
        (at(json!({"port": "80"})), to(vec![port(None, Some(PortNumber::Name("80".into())), None)])),
        (at(json!({"port": 0, "protocol": ""})), to(vec![port(Some(""), number(0), None)])),
        (
            at(json!({"port": "web", "endPort": 90, "protocol": "SCTP"})),
            to(vec![port(Some("SCTP"), Some(PortNumber::Name("web".into())), Some(90))]),
        ),
        (at(json!({"port": 80, "endPort": 90, "protocol": "UDP"})), to(vec![port(Some("UDP"), number(80), Some(90))])),
        (at(json!({"port": 80, "fancy": true})), to(vec![port(None, number(80), None)])),
    ];
    for (spec, want) in rows {
        let got = convert_policy(&policy(&spec), None);
        assert_eq!((got.outcome, got.diagnostics), (Some(want), vec![]), "{spec}");
    }
}

#[test]
fn ranges_that_are_not_canonical_mean_what_they_contain() {
    let spec = json!({"ingress": [{"from": [{"ipBlock": {"cidr": "10.1.2.3/8", "except": ["010.001.0.9/16"]}}]}]});
    let (parsed, found) = parse::policy(&convert_policy(&policy(&spec), None).outcome.unwrap());
    assert_eq!(found, []);
    let shown = format!("{:?}", parsed.ingress.unwrap()[0].peers);
    assert!(shown.contains("10.0.0.0/8") && shown.contains("10.1.0.0/16"), "{shown}");
}

#[test]
fn without_a_name_or_a_spec() {
    let read = |value: Value| -> networking_v1::NetworkPolicy { serde_json::from_value(value).unwrap() };
    let nameless = convert_policy(&read(json!({"metadata": {}, "spec": {}})), None);
    assert_eq!(
        (nameless.outcome, findings(&nameless.diagnostics)),
        (None, vec!["error metadata.name: is missing, so the object is ignored".to_owned()])
    );
    let bare = convert_policy(&read(json!({"metadata": {"name": "p", "namespace": "shop"}})), Some("f.yaml:1"));
    let said = "warning spec: is missing, so the policy isolates every pod of its namespace from what would reach it";
    assert_eq!((bare.outcome, findings(&bare.diagnostics)), (Some(none()), vec![said.to_owned()]));
    assert_eq!(bare.diagnostics[0].object, "f.yaml:1 NetworkPolicy shop/p");
}

#[test]
fn what_stands_in_for_the_unreadable_isolates_both_ways() {
    let (parsed, found) = parse::policy(&unreadable_policy(ObjectName::new("shop", "p")));
    assert_eq!((found, parsed.subject.is_empty()), (vec![], true));
    assert_eq!((parsed.ingress, parsed.egress), (Some(vec![]), Some(vec![])));
}

/// Only `true` audits. What is neither true nor false is told, and the policy is enforced.
#[test]
fn the_annotation_that_audits() {
    let rows = [
        (json!({}), None, false, None),
        (json!({"other/audit": "true"}), None, false, None),
        (json!({"proxy-agent.io/audit": "true"}), Some("true"), true, None),
        (json!({"proxy-agent.io/audit": "false"}), Some("false"), false, None),
        (json!({"proxy-agent.io/audit": "True"}), Some("True"), false, Some("\"True\" is neither true nor false")),
        (json!({"proxy-agent.io/audit": ""}), Some(""), false, Some("\"\" is neither true nor false")),
    ];
    for (annotations, written, audited, problem) in rows {
        let object = json!({"metadata": {"name": "p", "namespace": "shop", "annotations": annotations}, "spec": {}});
        let outcome = convert_policy(&serde_json::from_value(object).unwrap(), None).outcome.unwrap();
        let (parsed, found) = parse::policy(&outcome);
        let found: Vec<_> = found.iter().map(|finding| finding.problem.as_str()).collect();
        assert_eq!(
            (outcome.audit.as_deref(), parsed.audited, found),
            (written, audited, Vec::from_iter(problem)),
            "{annotations}"
        );
    }
}
