//! NetworkPolicies, as written: nothing is defaulted or judged here, and what is absent stays apart from what is empty.
//! What they mean is for `proxy_core::netpol::parse` to say.

use std::sync::Arc;

use k8s_openapi::api::networking::v1 as networking_v1;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::LabelSelector;
use k8s_openapi::apimachinery::pkg::util::intstr::IntOrString;
use proxy_core::name::ObjectName;
use proxy_core::netpol::spec::{
    AUDIT, BlockSpec, ExpressionSpec, PeerSpec, PolicySpec, PortNumber, PortSpec, RuleSpec, SelectorSpec,
};

use super::report::Report;

pub(super) fn policy_outcome(
    policy: &networking_v1::NetworkPolicy,
    name: ObjectName,
    report: &mut Report,
) -> PolicySpec {
    let annotations = policy.metadata.annotations.as_ref();
    let audit = annotations.and_then(|all| all.get(AUDIT)).map(|text| text.as_str().into());
    let Some(spec) = &policy.spec else {
        let problem = "is missing, so the policy isolates every pod of its namespace from what would reach it";
        report.warning("spec", problem, "say in it which pods are meant and what may reach them");
        return PolicySpec { name, audit, pod_selector: None, policy_types: None, ingress: None, egress: None };
    };
    PolicySpec {
        name,
        audit,
        pod_selector: spec.pod_selector.as_ref().map(selector),
        policy_types: spec.policy_types.as_deref().map(texts),
        ingress: spec.ingress.as_deref().map(|rules| rules.iter().map(ingress).collect()),
        egress: spec.egress.as_deref().map(|rules| rules.iter().map(egress).collect()),
    }
}

/// What stands in for a policy that cannot be read and never could be: nobody knows which pods it is for and what it
/// would allow, so it isolates all of its namespace, both ways.
pub fn unreadable_policy(name: ObjectName) -> PolicySpec {
    let types = ["Ingress", "Egress"].map(Arc::from);
    PolicySpec { name, audit: None, pod_selector: None, policy_types: Some(types.into()), ingress: None, egress: None }
}

fn ingress(rule: &networking_v1::NetworkPolicyIngressRule) -> RuleSpec {
    RuleSpec { peers: rule.from.as_deref().map(peers), ports: rule.ports.as_deref().map(ports) }
}

fn egress(rule: &networking_v1::NetworkPolicyEgressRule) -> RuleSpec {
    RuleSpec { peers: rule.to.as_deref().map(peers), ports: rule.ports.as_deref().map(ports) }
}

fn peers(peers: &[networking_v1::NetworkPolicyPeer]) -> Vec<PeerSpec> {
    let peer = |peer: &networking_v1::NetworkPolicyPeer| PeerSpec {
        pods: peer.pod_selector.as_ref().map(selector),
        namespaces: peer.namespace_selector.as_ref().map(selector),
        block: peer.ip_block.as_ref().map(|block| BlockSpec {
            cidr: block.cidr.as_str().into(),
            except: texts(block.except.as_deref().unwrap_or_default()),
        }),
    };
    peers.iter().map(peer).collect()
}

fn ports(ports: &[networking_v1::NetworkPolicyPort]) -> Vec<PortSpec> {
    let port = |port: &networking_v1::NetworkPolicyPort| PortSpec {
        protocol: port.protocol.as_deref().map(Arc::from),
        port: port.port.as_ref().map(|number| match number {
            IntOrString::Int(number) => PortNumber::Number(*number),
            IntOrString::String(name) => PortNumber::Name(name.as_str().into()),
        }),
        end_port: port.end_port,
    };
    ports.iter().map(port).collect()
}

fn selector(selector: &LabelSelector) -> SelectorSpec {
    let labels = selector.match_labels.iter().flatten();
    let expressions = selector.match_expressions.iter().flatten();
    SelectorSpec {
        labels: labels.map(|(key, value)| (key.as_str().into(), value.as_str().into())).collect(),
        expressions: expressions
            .map(|expression| ExpressionSpec {
                key: expression.key.as_str().into(),
                operator: expression.operator.as_str().into(),
                values: texts(expression.values.as_deref().unwrap_or_default()),
            })
            .collect(),
    }
}

fn texts(texts: &[String]) -> Vec<Arc<str>> {
    texts.iter().map(|text| text.as_str().into()).collect()
}
