//! What a journey amounts to: the ways between its steps, netfilter's part in them, and where its time went.

use std::collections::BTreeSet;

use proxy_abi::Hook;
use serde_json::json;

use super::drops::{self, Cause};
use super::hooks::{Family, Hooks, Passed, number};
use super::journey::{Decision, Ending, Journey, Place, Point, Sight, Step};
use super::kernel::Kernel;
use super::names::{Names, Owner};
use super::packet::Packet;

/// How a packet came from one step to the next.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Way {
    /// It began here.
    Begin,
    /// A program of the dataplane.
    Own,
    /// Through a queueing discipline to the driver.
    Queue,
    /// Over a veth pair, or out of one device into another.
    Wire,
    /// Sent from device to device by a program, past bridge and IP stack.
    Redirect,
    /// Switched by a bridge.
    Switch,
    /// From a bridge's port up to the IP stack.
    UpCall,
    /// From the IP stack out of a bridge's port.
    BridgeOut,
    /// Routed.
    Forward,
    /// From a socket of the node.
    LocalOut,
    /// To its end.
    End,
}

impl Way {
    /// The word in outputs.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Begin => "begin",
            Self::Own => "own",
            Self::Queue => "queue",
            Self::Wire => "wire",
            Self::Redirect => "redirect",
            Self::Switch => "switch",
            Self::UpCall => "up-call",
            Self::BridgeOut => "bridge-out",
            Self::Forward => "forward",
            Self::LocalOut => "local-out",
            Self::End => "end",
        }
    }
}

/// Nanoseconds by what they were spent on.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Split {
    /// Programs of the dataplane.
    pub own: u64,
    /// The kernel's bridge, IP stack and drivers.
    pub kernel: u64,
    /// Stretches of the kernel with netfilter entries on them: they and what is around them.
    pub netfilter: u64,
    /// Queues: of devices and of CPUs.
    pub queue: u64,
}

/// A step with how it was reached.
#[derive(Clone, Copy, Debug)]
pub struct Leg<'a> {
    /// The step.
    pub step: &'a Step,
    /// How it was reached.
    pub way: Way,
    /// Nanoseconds since the step before.
    pub took: u64,
}

/// What a journey amounts to.
#[derive(Debug)]
pub struct Story<'a> {
    /// The journey.
    pub journey: &'a Journey,
    /// The answer to another packet.
    pub is_reply: bool,
    /// Its steps on this node.
    pub legs: Vec<Leg<'a>>,
    /// How it ended.
    pub ending: Ending,
    /// Why it was dropped.
    pub cause: Option<Cause>,
    /// Hooks that it passed.
    pub passed: Passed,
    /// br_netfilter handed it to the hooks of IP.
    pub bridge_nf: bool,
    /// The kernel's conntrack has seen it.
    pub conntrack: bool,
    /// Where its time went.
    pub split: Split,
}

/// What is needed to tell a story.
#[derive(Clone, Copy, Debug)]
pub struct Context<'a> {
    /// Names.
    pub names: &'a Names,
    /// The kernel.
    pub kernel: &'a Kernel,
    /// What is registered in the node's namespace; `None` = not known.
    pub hooks: Option<&'a Hooks>,
}

/// State of a walk over the steps.
#[derive(Default)]
struct Walk {
    /// TTL when the stack last took it from a device of the node.
    ttl: Option<u8>,
    received: bool,
    redirected: bool,
    queued_on_bridge: bool,
}

impl Walk {
    fn way(&mut self, step: &Step) -> Way {
        let sight = match step {
            Step::Decision(decision) => return self.decided(decision),
            Step::Sight(sight) => sight,
        };
        let ttl = sight.packet.as_ref().map(|packet| packet.ttl);
        match (sight.point, sight.is_on_host()) {
            (Point::Transmit, _) => Way::Queue,
            (Point::Drop | Point::Consume, _) => Way::End,
            (Point::Receive, false) => Way::Wire,
            (Point::Queue, false) => Way::Begin,
            (Point::Receive, true) => {
                let way = if self.received && !self.redirected { Way::UpCall } else { Way::Wire };
                *self = Self { ttl, received: true, ..Self::default() };
                way
            }
            (Point::Queue, true) => {
                let way = self.out(ttl);
                *self = Self { queued_on_bridge: true, ..Self::default() };
                way
            }
        }
    }

    /// How it came to be sent out of a device of the node.
    fn out(&self, ttl: Option<u8>) -> Way {
        if self.redirected {
            Way::Redirect
        } else if self.received {
            if self.ttl.zip(ttl).is_some_and(|(before, after)| after < before) { Way::Forward } else { Way::Switch }
        } else if self.queued_on_bridge {
            Way::BridgeOut
        } else {
            Way::LocalOut
        }
    }

    fn decided(&mut self, decision: &Decision) -> Way {
        self.redirected |= decision.is_redirect();
        Way::Own
    }
}

impl<'a> Story<'a> {
    /// Of a journey.
    pub fn new(journey: &'a Journey, is_reply: bool, context: Context<'_>) -> Self {
        let mut walk = Walk::default();
        let mut legs = Vec::new();
        let mut before = journey.began();
        for step in &journey.steps {
            if step.sight().is_some_and(|sight| matches!(sight.place, Place::Beyond(_))) {
                continue;
            }
            let way = if legs.is_empty() && step.sight().is_some_and(|sight| sight.point == Point::Receive) {
                walk.way(step);
                Way::Begin
            } else {
                walk.way(step)
            };
            legs.push(Leg { step, way, took: step.at().saturating_sub(before) });
            before = step.at();
        }
        let ending = journey.ending(context.names, context.kernel);
        let on_host = |sight: &&Sight| sight.is_on_host();
        let mut story = Self {
            journey,
            is_reply,
            legs,
            ending,
            cause: (ending == Ending::Dropped).then(|| drops::cause(journey, context.kernel)),
            passed: Passed::default(),
            bridge_nf: journey.sights().filter(on_host).any(|sight| sight.bridge_nf)
                || journey
                    .sights()
                    .filter(on_host)
                    .any(|sight| sight.stack.iter().any(|name| name.starts_with("br_nf_"))),
            conntrack: journey.sights().filter(on_host).any(|sight| sight.nfct != 0),
            split: Split::default(),
        };
        story.passed = story.passed();
        story.split = story.split(context.hooks);
        story
    }

    /// Hooks on the ways that it took through the node's namespace.
    fn passed(&self) -> Passed {
        let mut passed = Passed::default();
        let family =
            if self.journey.first().is_some_and(|packet| packet.src.is_ipv6()) { Family::Ip6 } else { Family::Ip };
        for leg in &self.legs {
            let bridged =
                leg.step.sight().is_some_and(|sight| sight.bridge_nf) || self.bridge_nf && leg.way == Way::Switch;
            let (ip, bridge): (&[u32], &[u32]) = match leg.way {
                Way::Forward => (&[number::PRE, number::FWD, number::POST], &[]),
                Way::LocalOut => (&[number::OUT, number::POST], &[]),
                Way::Switch => (&[], &[number::PRE, number::FWD, number::POST]),
                Way::UpCall => (&[], &[number::PRE, number::IN]),
                Way::BridgeOut => (&[], &[number::OUT, number::POST]),
                _ => (&[], &[]),
            };
            passed.hooks.extend(ip.iter().map(|number| (family, *number)));
            passed.hooks.extend(bridge.iter().map(|number| (Family::Bridge, *number)));
            if bridged {
                // From a bridge's hooks to those of IP; what comes out of a bridge is let through at once.
                let called: &[u32] = match leg.way {
                    Way::Switch => &[number::PRE, number::FWD, number::POST],
                    Way::UpCall => &[number::PRE],
                    _ => &[],
                };
                passed.by_bridge.extend(called);
                passed.hooks.extend(called.iter().map(|number| (family, *number)));
            }
        }
        let moved = self.journey.sights().rev().find(|sight| sight.point == Point::Receive);
        if self.ending == Ending::Delivered && moved.is_some_and(Sight::is_on_host) {
            passed.hooks.extend([(family, number::PRE), (family, number::IN)]);
        }
        passed
    }

    fn split(&self, hooks: Option<&Hooks>) -> Split {
        let mut split = Split::default();
        for leg in &self.legs {
            let busy = |family: Family, numbers: &[u32]| {
                numbers.iter().any(|number| {
                    let entries = hooks.and_then(|hooks| hooks.get(&(family, *number)));
                    entries.is_some_and(|entries| entries.iter().any(|entry| !entry.is_passing()))
                })
            };
            let ip =
                if self.journey.first().is_some_and(|packet| packet.src.is_ipv6()) { Family::Ip6 } else { Family::Ip };
            let part = match leg.way {
                Way::Own if is_from(leg.step) => &mut split.own,
                Way::Queue | Way::Wire => &mut split.queue,
                Way::Forward if busy(ip, &[number::PRE, number::FWD, number::POST]) => &mut split.netfilter,
                Way::LocalOut if busy(ip, &[number::OUT, number::POST]) => &mut split.netfilter,
                Way::Switch | Way::UpCall if self.bridge_nf => &mut split.netfilter,
                _ => &mut split.kernel,
            };
            *part += leg.took;
        }
        split
    }

    /// Entries of netfilter that may have looked at it, by name; empty = none was on its way.
    pub fn touched(&self, hooks: Option<&Hooks>) -> Vec<String> {
        let Some(hooks) = hooks else { return Vec::new() };
        let all = self.passed.touched(hooks, self.bridge_nf);
        all.iter()
            .map(|(family, number, entry)| format!("{} {}: {}", family.name(), family.hook(*number), entry.name()))
            .collect()
    }

    /// Did netfilter look at it? Where the list of hooks is not known, as far as the packet shows.
    pub fn is_touched(&self, hooks: Option<&Hooks>) -> bool {
        self.bridge_nf
            || match hooks {
                Some(hooks) => !self.passed.touched(hooks, self.bridge_nf).is_empty(),
                None => self.journey.sights().any(|sight| {
                    sight.is_on_host()
                        && self
                            .passed
                            .hooks
                            .iter()
                            .any(|(family, number)| *family != Family::Bridge && sight.hooks >> number & 1 == 1)
                }),
            }
    }

    /// The steps as words that do not change from packet to packet: `receive veth`, `from_pod service_new redirect`, …
    pub fn signature(&self) -> Vec<String> {
        self.legs.iter().map(|leg| step_label(leg.step)).collect()
    }

    /// Things that one would not expect.
    pub fn surprises(&self) -> Vec<String> {
        let mut all = Vec::new();
        if self.bridge_nf {
            all.push("br_netfilter handed a bridged frame to the IP hooks".to_owned());
        }
        let flooded = self.journey.flooded();
        if !flooded.is_empty() {
            let devices: Vec<&str> = flooded.iter().map(|place| device(place)).collect();
            all.push(format!("flooded to {}: the bridge does not know the receiver", devices.join(", ")));
        }
        let cpus: BTreeSet<u32> =
            self.journey.sights().filter(|sight| sight.is_on_host()).map(|sight| sight.cpu).collect();
        if cpus.len() > 1 {
            all.push(format!("changed the CPU on its way through the node: {cpus:?}"));
        }
        if self.is_foreign_translation() {
            all.push("its addresses changed without a program of ours: somebody else translates".to_owned());
        }
        all
    }

    /// Changed between two sights with no decision of ours in between that translates.
    fn is_foreign_translation(&self) -> bool {
        let ends = |packet: &Packet| (packet.source(), packet.destination());
        let mut last: Option<&Packet> = None;
        let mut decided = self.journey.decisions().next().is_none();
        for leg in &self.legs {
            match leg.step {
                Step::Decision(_) => decided = true,
                Step::Sight(sight) => {
                    let Some(packet) = &sight.packet else { continue };
                    if !decided && last.is_some_and(|before| ends(before) != ends(packet)) {
                        return true;
                    }
                    last = Some(packet);
                    decided = self.journey.decisions().next().is_none();
                }
            }
        }
        false
    }
}

/// Is it the decision of a program that packets come in by? The time before it is that program's.
fn is_from(step: &Step) -> bool {
    matches!(step, Step::Decision(decision) if matches!(decision.hook, Some(Hook::FromPod | Hook::FromNetdev)))
}

/// Device of a place.
pub fn device(place: &Place) -> &str {
    match place {
        Place::Host(device) | Place::Pod(_, device) | Place::Beyond(device) => device,
        Place::Nowhere => "-",
    }
}

/// Name of a step that is the same for every packet that takes the same path.
pub fn step_label(step: &Step) -> String {
    match step {
        Step::Decision(decision) => {
            let hook = decision.hook.map_or("program", Hook::name);
            let verdict = ["pass", "redirect", "drop"].get(decision.told.verdict as usize).copied().unwrap_or("?");
            format!("{hook} {} {verdict} @{}", decision.reason_name(), decision.device)
        }
        Step::Sight(sight) => {
            let place = match &sight.place {
                Place::Host(device) | Place::Beyond(device) => device.clone(),
                Place::Pod(pod, device) => format!("{pod}/{device}"),
                Place::Nowhere => "-".to_owned(),
            };
            format!("{} @{place}", sight.point.name())
        }
    }
}

/// An address with its owner: `shop/web-0 (10.1.0.2:4000)`, `svc shop/api:http (10.96.0.7:80)`.
pub fn named(packet: &Packet, source: bool, names: &Names) -> String {
    let address = if source { packet.source() } else { packet.destination() };
    let shown = if packet.has_ports() { address.to_string() } else { address.ip().to_string() };
    match names.owner(address, packet.proto) {
        Owner::Pod(name) => format!("{name} ({shown})"),
        Owner::Service(name) => format!("svc {name} ({shown})"),
        Owner::Backend(name) => format!("backend of {name} ({shown})"),
        Owner::Node => format!("node ({shown})"),
        Owner::Other => shown,
    }
}

/// An address's owner for programs.
pub fn reference(packet: &Packet, source: bool, names: &Names) -> serde_json::Value {
    let address = if source { packet.source() } else { packet.destination() };
    let split = |kind: &str, name: &str| {
        let (namespace, name) = name.split_once('/').unwrap_or(("", name));
        let (name, port) = name.rsplit_once(':').map_or((name, None), |(name, port)| (name, Some(port)));
        json!({ "kind": kind, "ns": namespace, "name": name, "port": port })
    };
    match names.owner(address, packet.proto) {
        Owner::Pod(name) => split("pod", &name),
        Owner::Service(name) => split("service", &name),
        Owner::Backend(name) => split("backend", &name),
        Owner::Node => json!({ "kind": "node" }),
        Owner::Other => serde_json::Value::Null,
    }
}
