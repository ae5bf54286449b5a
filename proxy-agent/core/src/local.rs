//! Pods of this node, with the addresses that their interfaces have: the API server learns them last.
//!
//! ```text
//!   Pod as the API has it ──┐
//!                           ├─▶ Pod with every address that is its own ──▶ policy
//!   interface, pod by UID ──┘
//! ```
//!
//! A pod's address reaches its `status` only after its first hooks have run (kubernetes/kubernetes#85966), and a hook may
//! need the network: the interface has it before any container starts.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::sync::Arc;

use crate::event::{Event, Listing, PodLink, Source};
use crate::name::ObjectName;
use crate::netpol::reconcile::PolicyListing;
use crate::netpol::spec::{Change, Pod};

/// What is known of the pods of this node.
#[derive(Clone, Debug)]
pub struct LocalPods {
    node: Arc<str>,
    /// As the API has them.
    pods: BTreeMap<ObjectName, Pod>,
    names: BTreeMap<Arc<str>, ObjectName>,
    /// Interface → UID and addresses.
    links: BTreeMap<u32, (Arc<str>, Vec<IpAddr>)>,
}

impl LocalPods {
    /// None known yet.
    pub fn new(node: impl Into<Arc<str>>) -> Self {
        Self { node: node.into(), pods: BTreeMap::new(), names: BTreeMap::new(), links: BTreeMap::new() }
    }

    /// Takes an event in; gives what policy is to be told instead of it, or because of it.
    pub fn handle(&mut self, event: &Event) -> Vec<Change> {
        match event {
            Event::NetworkPolicy(Change::Pod(pod)) => {
                self.forget(&pod.name);
                if pod.node.as_ref() != Some(&self.node) {
                    return vec![Change::Pod(pod.clone())];
                }
                self.names.insert(Arc::clone(&pod.uid), pod.name.clone());
                self.pods.insert(pod.name.clone(), pod.clone());
                vec![Change::Pod(self.joined(pod))]
            }
            Event::NetworkPolicy(change) => {
                if let Change::PodGone(name) = change {
                    self.forget(name);
                }
                vec![change.clone()]
            }
            Event::NetworkPolicyListed(PolicyListing::Pods(names)) => {
                let gone: Vec<_> = self.pods.keys().filter(|name| !names.contains(*name)).cloned().collect();
                for name in gone {
                    self.forget(&name);
                }
                Vec::new()
            }
            Event::Link(link) => self.set_link(link),
            Event::LinkGone(ifindex) => self.remove_links(&BTreeSet::from([*ifindex])),
            Event::Listed(Source::Links, Listing::Links(all)) => {
                let gone = self.links.keys().filter(|ifindex| !all.contains(ifindex)).copied().collect();
                self.remove_links(&gone)
            }
            _ => Vec::new(),
        }
    }

    /// The pod of this node that has this UID.
    pub fn pod(&self, uid: &str) -> Option<&Pod> {
        self.names.get(uid).and_then(|name| self.pods.get(name))
    }

    fn forget(&mut self, name: &ObjectName) {
        if let Some(old) = self.pods.remove(name) {
            self.names.remove(&old.uid);
        }
    }

    fn set_link(&mut self, link: &PodLink) -> Vec<Change> {
        let new = link.pod.as_ref().map(|uid| (Arc::clone(uid), link.addresses.clone()));
        let old = match &new {
            Some(new) => self.links.insert(link.ifindex, new.clone()),
            None => self.links.remove(&link.ifindex),
        };
        if old == new { Vec::new() } else { self.tell([old, new].into_iter().flatten().map(|(uid, _)| uid)) }
    }

    fn remove_links(&mut self, gone: &BTreeSet<u32>) -> Vec<Change> {
        let uids: Vec<_> = gone.iter().filter_map(|ifindex| self.links.remove(ifindex)).map(|(uid, _)| uid).collect();
        self.tell(uids)
    }

    fn tell(&self, uids: impl IntoIterator<Item = Arc<str>>) -> Vec<Change> {
        let uids: BTreeSet<_> = uids.into_iter().collect();
        uids.iter().filter_map(|uid| self.pod(uid)).map(|pod| Change::Pod(self.joined(pod))).collect()
    }

    fn joined(&self, pod: &Pod) -> Pod {
        let of_links = self.links.values().filter(|(uid, _)| *uid == pod.uid).flat_map(|(_, addresses)| addresses);
        let ips: BTreeSet<IpAddr> = pod.ips.iter().chain(of_links).copied().collect();
        Pod { ips: ips.into_iter().collect(), ..pod.clone() }
    }
}
