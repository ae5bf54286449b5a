//! Policies in words, for people who ask which rule it was.

use std::fmt;

use super::policy::{Namespaces, Peer, Peers, Port, PortRange, Ports, Rule};

impl fmt::Display for Rule {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}, {}", self.peers, self.ports)
    }
}

impl fmt::Display for Peers {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Any => f.write_str("anyone"),
            Self::Some(peers) if peers.is_empty() => f.write_str("nobody"),
            Self::Some(peers) => join(f, peers, " or "),
        }
    }
}

impl fmt::Display for Peer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Pods { namespaces, pods } => {
                if pods.is_empty() {
                    f.write_str("all pods")?;
                } else {
                    write!(f, "pods with {pods}")?;
                }
                match namespaces {
                    Namespaces::Named(name) => write!(f, " of namespace {name}"),
                    Namespaces::Matching(selector) if selector.is_empty() => f.write_str(" of all namespaces"),
                    Namespaces::Matching(selector) => write!(f, " of namespaces with {selector}"),
                }
            }
            Self::Block(block) => {
                write!(f, "addresses in {}", block.net)?;
                if !block.except.is_empty() {
                    f.write_str(" but not in ")?;
                    join(f, &block.except, ", ")?;
                }
                Ok(())
            }
        }
    }
}

impl fmt::Display for Ports {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Any => f.write_str("any port"),
            Self::Some(ports) if ports.is_empty() => f.write_str("no port"),
            Self::Some(ports) => join(f, ports, ", "),
        }
    }
}

impl fmt::Display for Port {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Range(range) => range.fmt(f),
            Self::Named(name) => write!(f, "{} port {:?}", name.proto, name.name),
        }
    }
}

impl fmt::Display for PortRange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { proto, first, last } = *self;
        match (first, last) {
            (0 | 1, u16::MAX) => write!(f, "any {proto} port"),
            _ if first == last => write!(f, "{proto} {first}"),
            _ => write!(f, "{proto} {first}-{last}"),
        }
    }
}

fn join<T: fmt::Display>(f: &mut fmt::Formatter<'_>, items: impl IntoIterator<Item = T>, between: &str) -> fmt::Result {
    for (at, item) in items.into_iter().enumerate() {
        if at > 0 {
            f.write_str(between)?;
        }
        item.fmt(f)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::super::parse;
    use super::super::spec::{
        BlockSpec, ExpressionSpec, PeerSpec, PolicySpec, PortNumber, PortSpec, RuleSpec, SelectorSpec,
    };
    use crate::name::ObjectName;

    fn selector(label: &str, expressions: &[(&str, &str, &[&str])]) -> SelectorSpec {
        let labels = label.split_once('=').map(|(key, value)| (Arc::from(key), Arc::from(value)));
        let expression = |(key, operator, values): &(&str, &str, &[&str])| ExpressionSpec {
            key: (*key).into(),
            operator: (*operator).into(),
            values: values.iter().map(|value| (*value).into()).collect(),
        };
        SelectorSpec { labels: labels.into_iter().collect(), expressions: expressions.iter().map(expression).collect() }
    }

    fn peer(pods: Option<SelectorSpec>, namespaces: Option<SelectorSpec>) -> PeerSpec {
        PeerSpec { pods, namespaces, block: None }
    }

    fn port(protocol: Option<&str>, port: Option<PortNumber>, end_port: Option<i32>) -> PortSpec {
        PortSpec { protocol: protocol.map(Into::into), port, end_port }
    }

    #[test]
    fn rules_in_words() {
        let all = || Some(SelectorSpec::default());
        let set =
            [("a", "In", &["x", "y"][..]), ("b", "NotIn", &["z"]), ("c", "Exists", &[]), ("d", "DoesNotExist", &[])];
        let block = |except: &[&str]| PeerSpec {
            block: Some(BlockSpec { cidr: "10.0.0.0/8".into(), except: except.iter().map(|e| (*e).into()).collect() }),
            ..PeerSpec::default()
        };
        let number = |number| Some(PortNumber::Number(number));
        let rows = [
            (None, None, "anyone, any port"),
            (Some(vec![peer(all(), None)]), None, "all pods of namespace shop, any port"),
            (Some(vec![peer(None, all())]), None, "all pods of all namespaces, any port"),
            (
                Some(vec![peer(Some(selector("app=web", &set)), Some(selector("team=a", &[]))), block(&[])]),
                Some(vec![port(None, number(80), None), port(Some("UDP"), number(1), Some(9))]),
                "pods with a in (x,y),app=web,b notin (z),c,!d of namespaces with team=a or addresses in 10.0.0.0/8, \
                 TCP 80, UDP 1-9",
            ),
            (
                Some(vec![block(&["10.1.0.0/16", "10.2.0.0/16"])]),
                Some(vec![port(Some("SCTP"), None, None), port(None, Some(PortNumber::Name("http".into())), None)]),
                "addresses in 10.0.0.0/8 but not in 10.1.0.0/16, 10.2.0.0/16, any SCTP port, TCP port \"http\"",
            ),
            (Some(vec![PeerSpec::default()]), Some(vec![port(Some("ICMP"), None, None)]), "nobody, no port"),
        ];
        for (peers, ports, want) in rows {
            let rule = RuleSpec { peers, ports };
            let spec = PolicySpec {
                name: ObjectName::new("shop", "p"),
                audit: None,
                pod_selector: None,
                policy_types: None,
                ingress: Some(vec![rule]),
                egress: None,
            };
            let rules = parse::policy(&spec).0.ingress.unwrap();
            assert_eq!(rules[0].to_string(), want);
        }
    }
}
