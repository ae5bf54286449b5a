//! What policies decided, as metrics: for each policy and pod of this node, not for each rule.

use std::collections::BTreeMap;
use std::fmt;

use proxy_abi::policy::PodHits;
use proxy_core::name::ObjectName;
use proxy_core::netpol::hits::{Counts, Names};

use super::exposition::{Exposition, Kind, float};

/// Whom the numbers in the maps are about.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Counted {
    /// Rows of `policy_hits`.
    pub rules: Names,
    /// Rows of `policy_pod_hits`: slot → pod.
    pub pods: BTreeMap<u32, ObjectName>,
}

/// What the maps hold.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Numbers {
    /// `policy_hits`.
    pub rules: Counts,
    /// `policy_pod_hits`, by slot; those that are zero are not needed.
    pub pods: BTreeMap<u32, PodHits>,
}

/// Reads them.
pub type ReadNumbers = Box<dyn Fn() -> Numbers + Send + Sync>;

pub(super) struct NumbersOf(pub(super) ReadNumbers);

impl fmt::Debug for NumbersOf {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("NumbersOf")
    }
}

impl Counted {
    /// All of it.
    pub(super) fn write(&self, out: &mut Exposition, numbers: &Numbers) {
        let mut sums: BTreeMap<(&ObjectName, bool), u64> = BTreeMap::new();
        for (rule, (allows, policies)) in &self.rules {
            let Some(hits) = numbers.rules.get(rule) else { continue };
            for policy in policies {
                *sums.entry((policy, *allows)).or_default() += hits.count;
            }
        }
        let name = "proxy_agent_policy_hits_total";
        let help = "Judgements of flows by a policy: its rules allowed, or none of its pod's matched";
        out.family(name, Kind::Counter, help);
        for ((policy, allows), count) in sums {
            let outcome = if allows { "allowed" } else { "refused" };
            let labels = [("namespace", &*policy.namespace), ("policy", &*policy.name), ("outcome", outcome)];
            out.sample(name, &labels, float(count));
        }
        for (name, help, of) in [
            (
                "proxy_agent_policy_pod_refused_total",
                "Judgements that refused a flow of a pod of this node",
                (|hits| hits.refused) as fn(&PodHits) -> [u64; 2],
            ),
            (
                "proxy_agent_policy_pod_audited_total",
                "Judgements that let a flow pass which audited policies would refuse",
                |hits| hits.audited,
            ),
        ] {
            out.family(name, Kind::Counter, help);
            for (slot, pod) in &self.pods {
                let counts = numbers.pods.get(slot).map(of).unwrap_or_default();
                for (direction, count) in ["ingress", "egress"].into_iter().zip(counts).filter(|(_, count)| *count > 0)
                {
                    let labels = [("namespace", &*pod.namespace), ("pod", &*pod.name), ("direction", direction)];
                    out.sample(name, &labels, float(count));
                }
            }
        }
    }
}
