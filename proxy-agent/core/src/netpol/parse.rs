//! From the object as written to what it means. Nothing here fails: what cannot be read narrows what is allowed and
//! gives a diagnostic.

use std::sync::Arc;

use proxy_abi::Proto;

use super::block::{self, IpBlock};
use super::policy::{Namespaces, Peer, Peers, Policy, Port, PortName, PortRange, Ports, Rule};
use super::selector::Selector;
use super::spec::{AUDIT, PeerSpec, PolicySpec, PortNumber, PortSpec, RuleSpec, SelectorSpec};
use crate::diagnostic::{Diagnostic, Severity};

/// Reads a policy.
pub fn policy(spec: &PolicySpec) -> (Policy, Vec<Diagnostic>) {
    let mut reader = Reader { object: format!("NetworkPolicy {}", spec.name), findings: Vec::new() };
    let (ingress, egress) = reader.directions(spec);
    let namespace = &spec.name.namespace;
    let rules = |reader: &mut Reader, list: &Option<Vec<RuleSpec>>, field: &str| {
        let rules = list.iter().flatten().enumerate();
        rules.map(|(i, rule)| reader.rule(rule, namespace, &format!("spec.{field}[{i}]"), field)).collect()
    };
    let subject = match spec.pod_selector.as_ref().map(Selector::parse) {
        None => Selector::default(),
        Some(Ok(selector)) => selector,
        Some(Err(fault)) => {
            reader.report("spec.podSelector", &fault, "it isolates every pod of its namespace until mended");
            Selector::default()
        }
    };
    let policy = Policy {
        name: spec.name.clone(),
        audited: reader.audited(spec.audit.as_deref()),
        subject,
        ingress: ingress.then(|| rules(&mut reader, &spec.ingress, "ingress")),
        egress: egress.then(|| rules(&mut reader, &spec.egress, "egress")),
    };
    (policy, reader.findings)
}

/// The protocol that a text names; absent = TCP.
pub fn protocol(text: Option<&str>) -> Option<Proto> {
    match text {
        None | Some("TCP") => Some(Proto::TCP),
        Some("UDP") => Some(Proto::UDP),
        Some("SCTP") => Some(Proto::SCTP),
        Some(_) => None,
    }
}

struct Reader {
    object: String,
    findings: Vec<Diagnostic>,
}

impl Reader {
    fn report(&mut self, field: &str, problem: &dyn std::fmt::Display, fix: &str) {
        self.findings.push(Diagnostic {
            severity: Severity::Error,
            object: self.object.clone(),
            field: field.to_owned(),
            problem: problem.to_string(),
            fix: fix.to_owned(),
        });
    }

    /// Is it only audited?
    fn audited(&mut self, text: Option<&str>) -> bool {
        match text {
            None | Some("false") => false,
            Some("true") => true,
            Some(other) => {
                let problem = format!("{other:?} is neither true nor false");
                self.report(&format!("metadata.annotations[{AUDIT}]"), &problem, "it is enforced until mended");
                false
            }
        }
    }

    /// Which directions it isolates.
    fn directions(&mut self, spec: &PolicySpec) -> (bool, bool) {
        let types = spec.policy_types.as_deref().unwrap_or_default();
        if types.is_empty() {
            return (true, spec.egress.as_ref().is_some_and(|rules| !rules.is_empty()));
        }
        let (mut ingress, mut egress) = (false, false);
        for (i, kind) in types.iter().enumerate() {
            match &**kind {
                "Ingress" => ingress = true,
                "Egress" => egress = true,
                _ => {
                    let problem = format!("{kind:?} is neither Ingress nor Egress");
                    self.report(
                        &format!("spec.policyTypes[{i}]"),
                        &problem,
                        "it isolates in both directions until mended",
                    );
                    (ingress, egress) = (true, true);
                }
            }
        }
        (ingress, egress)
    }

    fn rule(&mut self, rule: &RuleSpec, namespace: &Arc<str>, field: &str, direction: &str) -> Rule {
        let list = if direction == "ingress" { "from" } else { "to" };
        let peers = match rule.peers.as_deref() {
            None | Some([]) => Peers::Any,
            Some(peers) => {
                let read = peers.iter().enumerate();
                Peers::Some(
                    read.filter_map(|(i, peer)| self.peer(peer, namespace, &format!("{field}.{list}[{i}]"))).collect(),
                )
            }
        };
        let ports = match rule.ports.as_deref() {
            None | Some([]) => Ports::Any,
            Some(ports) => {
                let read = ports.iter().enumerate();
                Ports::Some(read.filter_map(|(i, port)| self.port(port, &format!("{field}.ports[{i}]"))).collect())
            }
        };
        Rule { peers, ports }
    }

    fn peer(&mut self, peer: &PeerSpec, namespace: &Arc<str>, field: &str) -> Option<Peer> {
        const FIX: &str = "this peer matches nothing until mended";
        let PeerSpec { pods, namespaces, block } = peer;
        match (pods, namespaces, block) {
            (None, None, None) => self.report(field, &"names no peer", FIX),
            (None, None, Some(spec)) => {
                let net = match block::cidr(&spec.cidr) {
                    Ok(net) => net,
                    Err(fault) => {
                        self.report(&format!("{field}.ipBlock.cidr"), &format!("{:?}: {fault}", spec.cidr), FIX);
                        return None;
                    }
                };
                let mut except = std::collections::BTreeSet::new();
                for (i, text) in spec.except.iter().enumerate() {
                    match block::cidr(text) {
                        // What lies outside of the range takes nothing from it.
                        Ok(part) if net.contains(&part) => drop(except.insert(part)),
                        Ok(part) if part.contains(&net) => {
                            // A range may not be excepted from itself; nothing is left of it then.
                            self.report(&format!("{field}.ipBlock.except[{i}]"), &"takes the whole range", FIX);
                            return None;
                        }
                        Ok(_) => {}
                        Err(fault) => {
                            self.report(&format!("{field}.ipBlock.except[{i}]"), &format!("{text:?}: {fault}"), FIX);
                            return None;
                        }
                    }
                }
                return Some(Peer::Block(IpBlock { net, except }));
            }
            (_, _, Some(_)) => self.report(field, &"has both ipBlock and selectors", FIX),
            (pods, namespaces, None) => {
                let pods = self.selector(pods.as_ref(), &format!("{field}.podSelector"))?;
                let namespaces = match namespaces {
                    None => Namespaces::Named(Arc::clone(namespace)),
                    spec => Namespaces::Matching(self.selector(spec.as_ref(), &format!("{field}.namespaceSelector"))?),
                };
                return Some(Peer::Pods { namespaces, pods });
            }
        }
        None
    }

    /// Absent = everything, as the caller wants it.
    fn selector(&mut self, spec: Option<&SelectorSpec>, field: &str) -> Option<Selector> {
        match spec.map(Selector::parse) {
            None => Some(Selector::default()),
            Some(Ok(selector)) => Some(selector),
            Some(Err(fault)) => {
                self.report(field, &fault, "this peer matches nothing until mended");
                None
            }
        }
    }

    fn port(&mut self, port: &PortSpec, field: &str) -> Option<Port> {
        const FIX: &str = "this item matches nothing until mended";
        let Some(proto) = protocol(port.protocol.as_deref()) else {
            let problem = format!("{:?} is none of TCP, UDP, SCTP", port.protocol.as_deref().unwrap_or_default());
            self.report(&format!("{field}.protocol"), &problem, FIX);
            return None;
        };
        let number = |number: i32| u16::try_from(number).ok().filter(|number| *number != 0);
        match (&port.port, port.end_port) {
            (None, None) => return Some(Port::Range(PortRange::all(proto))),
            (Some(PortNumber::Name(name)), None) if !name.is_empty() => {
                return Some(Port::Named(PortName { name: Arc::clone(name), proto }));
            }
            (Some(PortNumber::Name(_)), None) => self.report(&format!("{field}.port"), &"empty name", FIX),
            (Some(PortNumber::Name(_)) | None, Some(_)) => {
                self.report(&format!("{field}.endPort"), &"needs a port that is a number", FIX);
            }
            (Some(PortNumber::Number(first)), last) => match (number(*first), number(last.unwrap_or(*first))) {
                (Some(first), Some(last)) if first <= last => {
                    return Some(Port::Range(PortRange { proto, first, last }));
                }
                (Some(_), Some(_)) => self.report(&format!("{field}.endPort"), &"is less than port", FIX),
                _ => self.report(&format!("{field}.port"), &"not between 1 and 65535", FIX),
            },
        }
        None
    }
}
