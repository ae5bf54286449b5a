//! What is told of the pod interfaces: only differences from what was told before.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use proxy_core::diagnostic::{Diagnostic, Severity};
use proxy_core::event::{Event, Listing, NetDevice, PodLink, Source};

use super::binding::Refusal;

/// What has been told so far.
#[derive(Clone, Debug, Default, PartialEq)]
pub(super) struct Report {
    links: BTreeMap<u32, PodLink>,
    devices: BTreeMap<u32, NetDevice>,
    findings: BTreeMap<String, Vec<Diagnostic>>,
}

// === impl Report ===

impl Report {
    /// The events that lead from what was told before to what is now. Every event in the sequence leaves each address
    /// on one interface at most: what is gone or given up goes first.
    pub(super) fn update(
        &mut self,
        links: BTreeMap<u32, PodLink>,
        devices: BTreeMap<u32, NetDevice>,
        findings: BTreeMap<String, Vec<Diagnostic>>,
    ) -> Vec<Event> {
        let mut events = Vec::new();
        events.extend(self.devices.keys().filter(|index| !devices.contains_key(index)).copied().map(Event::DeviceGone));
        events.extend(self.links.keys().filter(|index| !links.contains_key(index)).copied().map(Event::LinkGone));
        let mut told: BTreeMap<u32, PodLink> = BTreeMap::new();
        for (index, old) in &self.links {
            let Some(new) = links.get(index) else { continue };
            let kept: Vec<IpAddr> = old.addresses.iter().filter(|ip| new.addresses.contains(ip)).copied().collect();
            if kept.len() < old.addresses.len() {
                let given_up = PodLink { addresses: kept, ..new.clone() };
                events.push(Event::Link(given_up.clone()));
                told.insert(*index, given_up);
            }
        }
        for (index, new) in &links {
            if told.get(index).or_else(|| self.links.get(index)) != Some(new) {
                events.push(Event::Link(new.clone()));
            }
        }
        let changed = devices.iter().filter(|(index, device)| self.devices.get(index) != Some(device));
        events.extend(changed.map(|(_, device)| Event::Device(device.clone())));
        let objects: BTreeSet<_> = self.findings.keys().chain(findings.keys()).collect();
        for object in objects {
            let new = findings.get(object);
            if new != self.findings.get(object) {
                let findings = new.cloned().unwrap_or_default();
                events.push(Event::Diagnostics { object: object.clone(), findings });
            }
        }
        (self.links, self.devices, self.findings) = (links, devices, findings);
        events
    }

    /// The event that ends a full listing.
    pub(super) fn listed(&self) -> Event {
        Event::Listed(Source::Links, Listing::Links(self.links.keys().chain(self.devices.keys()).copied().collect()))
    }
}

/// The name under which findings about an interface are reported.
pub(super) fn object(link: &str) -> String {
    format!("Link {link}")
}

/// What is to be said about an address that is not bound.
pub(super) fn diagnostic(link: &str, ip: IpAddr, why: &Refusal) -> Diagnostic {
    let (severity, problem, fix) = match why {
        Refusal::Taken(other) => (
            Severity::Error,
            format!("{ip} is also on {other}, which had it first and keeps it"),
            "find out which pod the CNI gave it to, and restart the other one",
        ),
        Refusal::Node => (
            Severity::Error,
            format!("{ip} is an address of the node"),
            "remove it from the pod, or exclude it from the CNI's address range",
        ),
        Refusal::OutOfRange => (
            Severity::Warning,
            format!("{ip} is not within the pod address ranges of this node"),
            "if it is a pod address, correct spec.podCIDRs of the Node or name the bridge with --pod-bridge",
        ),
        Refusal::Second => (
            Severity::Warning,
            format!("{ip} was added after another address of the same family"),
            "a pod has one address of a family; Services and policies do not know this one",
        ),
        Refusal::Late => (
            Severity::Warning,
            format!("{ip} was added long after the pod had its address"),
            "if the CNI adds addresses later, recreate the pod once it has both",
        ),
        Refusal::NotOfCni => (
            Severity::Error,
            format!("{ip} was not given to this pod by the CNI"),
            "remove it from the pod, or find out who added it",
        ),
    };
    Diagnostic { severity, object: object(link), field: String::new(), problem, fix: fix.to_owned() }
}

#[cfg(test)]
mod tests {
    use proxy_abi::MacBytes;
    use proxy_core::event::LinkPath;

    use super::*;

    fn link(ifindex: u32, addresses: &[&str]) -> PodLink {
        PodLink {
            ifindex,
            name: format!("veth{ifindex}").into(),
            pod_mac: MacBytes([2, 0, 0, 0, 0, 1]),
            gateway_mac: MacBytes([2, 0, 0, 0, 0, 2]),
            bridge: 4,
            addresses: addresses.iter().map(|ip| ip.parse().unwrap()).collect(),
            gateways: vec![],
            path: LinkPath::Redirect,
            mtu: 1500,
            pod: None,
        }
    }

    fn links(links: &[(u32, &[&str])]) -> BTreeMap<u32, PodLink> {
        links.iter().map(|(index, addresses)| (*index, link(*index, addresses))).collect()
    }

    #[test]
    fn only_differences_are_told() {
        let mut report = Report::default();
        let now = links(&[(5, &["10.0.0.5"]), (6, &[])]);
        assert_eq!(
            report.update(now.clone(), BTreeMap::new(), BTreeMap::new()),
            [Event::Link(link(5, &["10.0.0.5"])), Event::Link(link(6, &[]))]
        );
        assert_eq!(report.update(now, BTreeMap::new(), BTreeMap::new()), []);
        assert_eq!(report.listed(), Event::Listed(Source::Links, Listing::Links(BTreeSet::from([5, 6]))));
        let switched = PodLink { path: LinkPath::Switch, ..link(5, &["10.0.0.5"]) };
        assert_eq!(
            report.update(BTreeMap::from([(5, switched.clone())]), BTreeMap::new(), BTreeMap::new()),
            [Event::LinkGone(6), Event::Link(switched)]
        );
    }

    #[test]
    fn what_is_given_up_goes_before_what_is_taken() {
        let mut report = Report::default();
        report.update(links(&[(5, &["10.0.0.5", "fd00::5"]), (6, &["10.0.0.6"])]), BTreeMap::new(), BTreeMap::new());
        assert_eq!(
            report.update(
                links(&[(5, &["10.0.0.6", "fd00::5"]), (6, &["10.0.0.5"])]),
                BTreeMap::new(),
                BTreeMap::new()
            ),
            [
                Event::Link(link(5, &["fd00::5"])),
                Event::Link(link(6, &[])),
                Event::Link(link(5, &["10.0.0.6", "fd00::5"])),
                Event::Link(link(6, &["10.0.0.5"])),
            ]
        );
        assert_eq!(
            report.update(
                links(&[(5, &["fd00::5"]), (6, &["10.0.0.5", "10.0.0.6"])]),
                BTreeMap::new(),
                BTreeMap::new()
            ),
            [Event::Link(link(5, &["fd00::5"])), Event::Link(link(6, &["10.0.0.5", "10.0.0.6"]))]
        );
    }

    #[test]
    fn other_interfaces_come_change_and_go() {
        let device = |ifindex: u32, addresses: &[&str]| NetDevice {
            ifindex,
            name: format!("eth{ifindex}").into(),
            mac: MacBytes([2, 0, 0, 0, 0, 9]),
            mtu: 1500,
            addresses: addresses.iter().map(|ip| ip.parse().unwrap()).collect(),
            attach: true,
            pod_bridge: false,
        };
        let mut report = Report::default();
        let mut update = |devices: &[NetDevice], links: &[(u32, &[&str])]| {
            let devices = devices.iter().map(|device| (device.ifindex, device.clone())).collect();
            let links: BTreeMap<u32, PodLink> = links.iter().map(|(i, a)| (*i, link(*i, a))).collect();
            (report.update(links, devices, BTreeMap::new()), report.listed())
        };
        let listed = |indices: &[u32]| Event::Listed(Source::Links, Listing::Links(indices.iter().copied().collect()));
        let (two, three) = (device(2, &["192.0.2.2"]), device(3, &[]));
        let both = vec![Event::Device(two.clone()), Event::Device(three.clone())];
        assert_eq!(update(&[two.clone(), three.clone()], &[]), (both, listed(&[2, 3])));
        assert_eq!(update(&[two.clone(), three.clone()], &[]), (vec![], listed(&[2, 3])));
        let moved = device(2, &["192.0.2.3"]);
        let events = vec![Event::DeviceGone(3), Event::Link(link(3, &[])), Event::Device(moved.clone())];
        assert_eq!(update(&[moved], &[(3, &[])]), (events, listed(&[2, 3])), "3 has become a pod's");
    }

    #[test]
    fn findings_come_and_go() {
        let mut report = Report::default();
        let ip = "10.0.0.6".parse().unwrap();
        let finding = diagnostic("veth5", ip, &Refusal::Taken("veth6".into()));
        assert_eq!(
            finding.to_string(),
            "Link veth5: 10.0.0.6 is also on veth6, which had it first and keeps it; find out which pod the CNI gave \
             it to, and restart the other one"
        );
        let findings = BTreeMap::from([(object("veth5"), vec![finding.clone()])]);
        let told = Event::Diagnostics { object: "Link veth5".into(), findings: vec![finding] };
        assert_eq!(report.update(BTreeMap::new(), BTreeMap::new(), findings.clone()), [told]);
        assert_eq!(report.update(BTreeMap::new(), BTreeMap::new(), findings), []);
        let well = Event::Diagnostics { object: "Link veth5".into(), findings: vec![] };
        assert_eq!(report.update(BTreeMap::new(), BTreeMap::new(), BTreeMap::new()), [well]);
    }
}
