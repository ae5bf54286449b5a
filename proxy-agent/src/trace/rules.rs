//! What policy rules are called: the agent knows, the maps hold numbers.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::path::{Path, PathBuf};

use proxy_abi::Proto;

use super::journey::{Journey, Step};
use super::names::Names;
use super::packet::Packet;
use crate::ask::{Answer, Asked, Question, ReasonInfo, ask};

/// A number may belong to another rule so long after the maps have forgotten it.
const HOLDS: u64 = 500_000_000;
/// An agent that does not answer is left alone for so long.
const PAUSE: u64 = 1_000_000_000;

/// Names by rule and other end, as the agent last said.
#[derive(Clone, Debug)]
pub struct Rules {
    pin_root: PathBuf,
    known: BTreeMap<(u32, IpAddr), (u64, Option<String>)>,
    /// CLOCK_MONOTONIC, nanoseconds: nobody is asked before.
    not_before: u64,
}

/// `namespace/policy ingress[0]`, or whose rules all did not match; `None` where nothing is known of it.
pub fn name(reason: &ReasonInfo) -> Option<String> {
    if let Some(rule) = &reason.rule {
        return Some(format!("{} {}", rule.policy, rule.rule));
    }
    (!reason.isolated_by.is_empty()).then(|| format!("no rule of {}", reason.isolated_by.join(", ")))
}

/// What the agent says; `Err` when there is none to ask.
fn asked(pin_root: &Path, asked: Asked) -> Result<Option<String>, ()> {
    match ask(pin_root, &Question::Reason(asked)) {
        Ok(Answer::Reason(reason)) => Ok(name(&reason)),
        // It is of another version, or away: the number stays.
        Ok(_) | Err(_) => Err(()),
    }
}

/// What the agent calls a rule; `None` when it is away, or does not know it.
pub fn of(pin_root: &Path, rule: u32, peer: IpAddr, proto: Proto, port: Option<u16>) -> Option<String> {
    asked(pin_root, Asked { rule, peer, proto: proto.0, port }).ok().flatten()
}

/// The other end of a pod's flow, as its policies see it: behind a Service, and before masquerade.
fn other_end(own: &BTreeSet<IpAddr>, backend: Option<IpAddr>, seen: &[&Packet], names: &Names) -> Option<IpAddr> {
    let is_service = |ip: IpAddr| names.frontends.keys().any(|(known, ..)| *known == ip) && !names.own.contains(&ip);
    let ends = seen.iter().flat_map(|packet| [packet.src, packet.dst]);
    backend.into_iter().chain(ends.filter(|ip| !is_service(*ip))).find(|ip| !own.contains(ip))
}

impl Rules {
    /// Those of the agent of a pin directory.
    pub const fn new(pin_root: PathBuf) -> Self {
        Self { pin_root, known: BTreeMap::new(), not_before: 0 }
    }

    fn name(&mut self, about: Asked, now: u64) -> Option<String> {
        let key = (about.rule, about.peer);
        if let Some((at, name)) = self.known.get(&key)
            && now.saturating_sub(*at) < HOLDS
        {
            return name.clone();
        }
        if now < self.not_before {
            return None;
        }
        let Ok(name) = asked(&self.pin_root, about) else {
            self.not_before = now + PAUSE;
            return None;
        };
        self.known.insert(key, (now, name.clone()));
        name
    }

    /// Names the rules that decided on a packet's way.
    pub fn tell(&mut self, journey: &mut Journey, names: &Names, now: u64) {
        let ends: Vec<Packet> = [journey.first(), journey.last()].into_iter().flatten().cloned().collect();
        let seen: Vec<&Packet> = ends.iter().collect();
        let Some(first) = seen.first() else { return };
        for step in &mut journey.steps {
            let Step::Decision(decision) = step else { continue };
            let told = &decision.told;
            if told.rule == 0 {
                continue;
            }
            let own = names.pod_behind(told.ifindex).map(|pod| pod.addresses.clone()).unwrap_or_default();
            let backend =
                names.backends.get(&told.backend).filter(|_| told.service != 0).map(|backend| backend.address.ip());
            let Some(peer) = other_end(&own, backend, &seen, names) else { continue };
            let port = first.has_ports().then_some(first.dst_port);
            decision.rule = self.name(Asked { rule: told.rule, peer, proto: first.proto.0, port }, now);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::names::tests::names;
    use super::*;
    use crate::ask::RuleInfo;

    #[test]
    fn rules_have_names() {
        let rule = |policy: &str, rule: &str| RuleInfo {
            policy: policy.to_owned(),
            rule: rule.to_owned(),
            text: String::new(),
        };
        let by = ReasonInfo { rule: Some(rule("shop/web", "egress[1]")), ..ReasonInfo::default() };
        let isolated =
            ReasonInfo { isolated_by: vec!["shop/a".to_owned(), "shop/b".to_owned()], ..ReasonInfo::default() };
        assert_eq!(
            [by, isolated, ReasonInfo::default()].map(|reason| name(&reason)),
            [Some("shop/web egress[1]".to_owned()), Some("no rule of shop/a, shop/b".to_owned()), None]
        );
    }

    #[test]
    fn the_other_end_is_behind_the_service() {
        let names = names();
        let ip = |text: &str| text.parse::<IpAddr>().expect("an address");
        let packet = |src: &str, dst: &str| Packet {
            src: ip(src),
            dst: ip(dst),
            ..Packet::parse(&{
                let mut bytes = [0_u8; 40];
                bytes[0] = 0x45;
                bytes[9] = 6;
                bytes
            })
            .expect("headers")
        };
        let (client, server) = (BTreeSet::from([ip("10.1.0.2")]), BTreeSet::from([ip("10.1.0.3")]));
        let request = [&packet("10.1.0.2", "10.96.0.7"), &packet("10.1.0.2", "10.1.0.3")];
        let backend = Some(ip("10.1.0.3"));
        assert_eq!(other_end(&client, backend, &request, &names), backend);
        assert_eq!(other_end(&server, backend, &request, &names), Some(ip("10.1.0.2")));
        assert_eq!(other_end(&client, None, &request[..1], &names), None, "the Service is no end");
        assert_eq!(other_end(&client, None, &[&packet("192.0.2.1", "10.1.0.2")], &names), Some(ip("192.0.2.1")));
    }
}
