//! A pod's place on this node: its interface, the programs there, its slot.

use std::net::IpAddr;

use proxy_abi::{DeviceEntry, IpBytes};

use super::check::Check;

/// A pod of this node as interfaces and maps show it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Seat {
    /// Name or address.
    pub pod: String,
    /// Host-side interface by the maps; 0 where they know none.
    pub ifindex: u32,
    /// Its name; `None` when there is no such interface.
    pub interface: Option<String>,
    /// Is it up?
    pub up: bool,
    /// Row of the interface.
    pub device: Option<DeviceEntry>,
    /// Slot under the pod's address.
    pub slot: Option<u16>,
    /// Programs that are attached, by their pins.
    pub programs: Vec<String>,
    /// Slot that the agent has for it; `None` when it is away, or no policy is in force.
    pub told: Option<u16>,
}

/// The two programs of a pod's interface.
const PROGRAMS: [&str; 2] = ["from_pod", "to_pod"];

impl Seat {
    /// `translated`: a Service is asked for, so that the programs must do their part.
    pub fn checks(&self, translated: bool) -> Vec<Check> {
        let Self { pod, ifindex, interface, up, device, slot, programs, told } = self;
        let matters = |what, found: String, fix: &str| {
            if translated { Check::cause(what, found, fix) } else { Check::note(what, found, fix) }
        };
        let mut checks = Vec::new();
        let name = interface.clone().unwrap_or_else(|| format!("interface {ifindex}"));
        checks.push(if *ifindex == 0 {
            matters(
                "interface",
                format!("the maps know no interface of {pod}: Services are not translated for it"),
                "is the agent up, and is the pod's veth on a bridge that it serves? `proxy-agent device list`",
            )
        } else if interface.is_none() {
            Check::cause(
                "interface",
                format!("{name} of {pod} is gone"),
                "the maps are older than the node: is the agent up?",
            )
        } else if !up {
            Check::cause("interface", format!("{name} of {pod} is down"), format!("ip link set {name} up"))
        } else if device.is_none() {
            matters(
                "interface",
                format!("the maps have no row for {name} of {pod}"),
                "the table of interfaces may be full: `proxy-agent status`",
            )
        } else {
            Check::good("interface", format!("{pod} is behind {name}"))
        });
        if *ifindex != 0 && interface.is_some() {
            let lacking: Vec<&str> =
                PROGRAMS.into_iter().filter(|name| !programs.iter().any(|found| found == name)).collect();
            checks.push(if lacking.is_empty() {
                Check::good("programs", format!("from_pod and to_pod are attached to {name}"))
            } else {
                matters(
                    "programs",
                    format!("{} not attached to {name}", lacking.join(" and ")),
                    "is the agent up? It attaches them again; its log says why it cannot",
                )
            });
        }
        let row = device.map(|device| device.slot);
        let differs = match told {
            _ if slot.is_some() && row.is_some() && *slot != row => {
                format!(
                    "the maps name two policy slots for {pod}: {} by address, {} by interface",
                    shown(*slot),
                    shown(row)
                )
            }
            Some(wanted) if slot.is_some_and(|found| found != *wanted) => {
                format!("the agent has slot {wanted} for {pod}, the maps have {}", shown(*slot))
            }
            _ => return checks,
        };
        checks.push(Check::note("slot", differs, "a change is on its way; if it stays so, look at the agent's log"));
        checks
    }
}

/// May the pod send with this source? It is asked where policies are in force.
pub fn source(pod: &str, claims: IpAddr, device: Option<&DeviceEntry>, slot: u16) -> Check {
    let what = "source";
    let own = |device: &DeviceEntry| {
        let all = [device.ip4, device.ip6].into_iter().filter(|ip| *ip != IpBytes::UNSPECIFIED);
        all.map(|ip| IpAddr::from(ip).to_string()).collect::<Vec<_>>()
    };
    let Some(device) = device else {
        return Check::unknown(what, format!("the addresses of {pod} are not known"), "`proxy-agent device list`");
    };
    if own(device).contains(&claims.to_string()) {
        return Check::good(what, format!("{claims} is an address of {pod}"));
    }
    let own = own(device).join(", ");
    if slot == 0 {
        return Check::note(
            what,
            format!("{claims} is no address of {pod} ({own}); while there is no NetworkPolicy, nobody asks for that"),
            "answers will not find their way",
        );
    }
    Check::cause(
        what,
        format!("{claims} is no address of {pod}, which has {own}: from_pod drops it (frame_source)"),
        "let the pod send with its own address; one that it is to have more must come from the CNI, which records it",
    )
}

fn shown(slot: Option<u16>) -> String {
    match slot {
        Some(DeviceEntry::HELD) => "held".to_owned(),
        Some(slot) => format!("slot {slot}"),
        None => "none".to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::super::check::State;
    use super::*;

    fn device(slot: u16) -> DeviceEntry {
        let ip = proxy_abi::IpBytes::UNSPECIFIED;
        let mac = proxy_abi::MacBytes::default();
        DeviceEntry {
            ip4: ip,
            ip6: ip,
            gateway_ip4: ip,
            gateway_ip6: ip,
            pod_mac: mac,
            gateway_mac: mac,
            bridge: 3,
            flags: 0,
            slot,
            reserved: 0,
            since: 0,
            mtu: 1500,
        }
    }

    #[test]
    fn a_seat_has_an_interface_programs_and_an_agent() {
        let good = Seat {
            pod: "shop/web-0".to_owned(),
            ifindex: 7,
            interface: Some("veth7".to_owned()),
            up: true,
            device: Some(device(4)),
            slot: Some(4),
            programs: PROGRAMS.map(str::to_owned).to_vec(),
            told: Some(4),
        };
        let states = |seat: &Seat, translated| -> Vec<(&'static str, State)> {
            seat.checks(translated).iter().map(|check| (check.what, check.state)).collect()
        };
        let all = |interface, programs| vec![("interface", interface), ("programs", programs)];
        let (ok, cause, note) = (State::Good, State::Cause, State::Note);
        let moving = || vec![("interface", ok), ("programs", ok), ("slot", note)];
        assert_eq!(states(&good, true), all(ok, ok));
        let cases = [
            (Seat { up: false, ..good.clone() }, true, all(cause, ok)),
            (Seat { device: None, ..good.clone() }, true, all(cause, ok)),
            (Seat { device: None, ..good.clone() }, false, all(note, ok)),
            (Seat { programs: vec!["to_pod".to_owned()], ..good.clone() }, true, all(ok, cause)),
            (Seat { programs: vec![], ..good.clone() }, false, all(ok, note)),
            (Seat { told: Some(5), ..good.clone() }, true, moving()),
            (Seat { slot: Some(DeviceEntry::HELD), ..good.clone() }, true, moving()),
            (Seat { told: None, ..good.clone() }, true, all(ok, ok)),
        ];
        for (n, (seat, translated, expected)) in cases.into_iter().enumerate() {
            assert_eq!(states(&seat, translated), expected, "case {n}");
        }
        let away = |slot| {
            let row = DeviceEntry { ip4: IpAddr::from([10, 1, 0, 2]).into(), ..device(slot) };
            ["10.1.0.2", "10.1.0.9"]
                .map(|ip| source("shop/web-0", ip.parse().expect("an address"), Some(&row), slot).state)
        };
        assert_eq!((away(0), away(4)), ([ok, note], [ok, cause]));
        let unknown = Seat { ifindex: 0, interface: None, ..good };
        assert_eq!(states(&unknown, true), [("interface", cause)]);
    }
}
