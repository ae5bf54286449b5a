//! A Service's part: its endpoints, who may use it, which backend is taken.

use std::net::SocketAddr;

use proxy_abi::{BackendEntry, FrontendEntry};

use super::check::Check;

/// A frontend as the maps have it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Frontend {
    /// `namespace/name:port`.
    pub name: String,
    /// Where it is asked for.
    pub address: SocketAddr,
    /// What the map says.
    pub entry: FrontendEntry,
    /// Backends that its slots name, in their order; `None` where a slot names none that serves.
    pub backends: Vec<Option<BackendEntry>>,
    /// The backend that this client was sent to before.
    pub affinity: Option<SocketAddr>,
    /// Is the client in `loadBalancerSourceRanges`? `None` where there are none, or they do not count.
    pub allowed: Option<bool>,
}

/// Where a backend is.
pub fn address(backend: &BackendEntry) -> SocketAddr {
    SocketAddr::new(backend.ip.into(), backend.port.get())
}

impl Frontend {
    /// Backends that may be chosen: the one that affinity holds to, or all.
    pub fn candidates(&self) -> Vec<SocketAddr> {
        match self.affinity {
            Some(backend) => vec![backend],
            None => self.backends.iter().flatten().map(address).collect(),
        }
    }

    /// In the order of the program.
    pub fn checks(&self) -> Vec<Check> {
        let Self { name, address: at, entry, backends, affinity, allowed } = self;
        let mut checks = vec![Check::good("service", format!("{at} is of Service {name}"))];
        if *allowed == Some(false) {
            checks.push(Check::cause(
                "sources",
                "the client is in no range of loadBalancerSourceRanges",
                format!("add the client's range to spec.loadBalancerSourceRanges of Service {name}"),
            ));
        }
        if entry.count == 0 {
            checks.push(if entry.flags & FrontendEntry::DROP_EMPTY != 0 {
                Check::cause(
                    "endpoints",
                    format!("the traffic policy of Service {name} is Local, and no ready endpoint is on this node"),
                    "run an endpoint on this node, or set the traffic policy to Cluster",
                )
            } else {
                Check::cause(
                    "endpoints",
                    format!("Service {name} has no ready endpoint"),
                    "look at its EndpointSlices, its selector and the readiness of its pods",
                )
            });
            return checks;
        }
        let known = backends.iter().flatten().count();
        let many = if entry.count == 1 { "1 endpoint".to_owned() } else { format!("{} endpoints", entry.count) };
        if known < backends.len() {
            checks.push(Check::cause(
                "endpoints",
                format!("{many}, of which {} name no backend that serves", backends.len() - known),
                "the agent has not finished, or is stuck: look at its log and `proxy-agent status`",
            ));
            return checks;
        }
        let local = backends.iter().flatten().filter(|backend| backend.flags & BackendEntry::LOCAL != 0).count();
        checks.push(Check::good("endpoints", format!("{many}, {local} on this node")));
        let all: Vec<String> = self.candidates().iter().map(ToString::to_string).collect();
        checks.push(Check::good(
            "backend",
            match affinity {
                Some(backend) => format!("{backend}, to which session affinity holds"),
                None if known == 1 => all.join(""),
                None => format!("one of {}", all.join(", ")),
            },
        ));
        checks
    }
}

#[cfg(test)]
mod tests {
    use proxy_abi::{PortBe, Proto};

    use super::super::check::State;
    use super::*;

    fn frontend(flags: u32, backends: Vec<Option<BackendEntry>>) -> Frontend {
        let entry = FrontendEntry {
            first: 4,
            count: u32::try_from(backends.len()).expect("few"),
            service: 7,
            flags,
            affinity_seconds: 0,
            generation: 1,
        };
        let address = "10.96.0.7:80".parse().expect("an address");
        Frontend { name: "shop/api:http".to_owned(), address, entry, backends, affinity: None, allowed: None }
    }

    fn backend(ip: [u8; 4], flags: u32) -> BackendEntry {
        BackendEntry {
            ip: std::net::IpAddr::from(ip).into(),
            service: 7,
            generation: 1,
            port: PortBe::new(8080),
            proto: Proto::TCP,
            reserved: 0,
            flags,
        }
    }

    #[test]
    fn what_lacks_is_the_cause() {
        let causes = |frontend: &Frontend| -> Vec<(&'static str, State)> {
            frontend.checks().iter().map(|check| (check.what, check.state)).collect()
        };
        let service = ("service", State::Good);
        let none = ("endpoints", State::Cause);
        assert_eq!(causes(&frontend(0, vec![])), [service, none]);
        let local = frontend(FrontendEntry::DROP_EMPTY | FrontendEntry::LOCAL_SET, vec![]);
        assert_eq!(causes(&local), [service, none]);
        assert!(local.checks()[1].found.contains("Local") && !frontend(0, vec![]).checks()[1].found.contains("Local"));
        assert_eq!(causes(&frontend(0, vec![Some(backend([10, 1, 0, 3], 0)), None])), [service, none]);
        let two = [backend([10, 1, 0, 3], BackendEntry::LOCAL), backend([10, 2, 0, 3], 0)].map(Some);
        let two = frontend(0, two.to_vec());
        assert_eq!(
            two.checks(),
            [
                Check::good("service", "10.96.0.7:80 is of Service shop/api:http"),
                Check::good("endpoints", "2 endpoints, 1 on this node"),
                Check::good("backend", "one of 10.1.0.3:8080, 10.2.0.3:8080"),
            ]
        );
        let held = Frontend { affinity: Some("10.2.0.3:8080".parse().expect("an address")), ..two.clone() };
        assert_eq!(held.candidates(), ["10.2.0.3:8080".parse().expect("an address")]);
        let refused = Frontend { allowed: Some(false), ..two };
        assert_eq!(causes(&refused)[1], ("sources", State::Cause));
    }
}
