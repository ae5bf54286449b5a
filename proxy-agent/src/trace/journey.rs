//! A packet on its way through the node: sights and decisions under one id, and what they amount to.

use std::collections::{BTreeMap, BTreeSet};

use proxy_abi::trace::{SNAP, TraceDecision, TraceEvent, point};
use proxy_abi::{Hook, Reason};

use super::kernel::Kernel;
use super::names::Names;
use super::packet::Packet;
use crate::dataplane::probes::Told;

/// A tracepoint.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Point {
    /// `netif_receive_skb`.
    Receive,
    /// `net_dev_queue`.
    Queue,
    /// `net_dev_start_xmit`.
    Transmit,
    /// `kfree_skb`.
    Drop,
    /// `consume_skb`.
    Consume,
}

impl Point {
    /// Name of the tracepoint.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Receive => "netif_receive_skb",
            Self::Queue => "net_dev_queue",
            Self::Transmit => "net_dev_start_xmit",
            Self::Drop => "kfree_skb",
            Self::Consume => "consume_skb",
        }
    }
}

/// Where a sight was.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Place {
    /// In the node's namespace, at a device.
    Host(String),
    /// In the namespace of a pod of this node: pod and device.
    Pod(String, String),
    /// In another namespace: beyond the node, where nodes are simulated.
    Beyond(String),
    /// At no device.
    Nowhere,
}

/// A packet at a tracepoint.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Sight {
    /// CLOCK_MONOTONIC, nanoseconds.
    pub at: u64,
    /// Which.
    pub point: Point,
    /// Where.
    pub place: Place,
    /// Device there.
    pub ifindex: u32,
    /// Namespace.
    pub netns: u32,
    /// CPU.
    pub cpu: u32,
    /// Address of the `sk_buff`.
    pub skb: u64,
    /// Bytes, as the kernel counts them there.
    pub len: u32,
    /// `skb->mark`.
    pub mark: u32,
    /// Number of the drop reason.
    pub reason: u32,
    /// Where in the kernel it was dropped or consumed.
    pub location: u64,
    /// The kernel's connection; 0 = conntrack has not seen the packet.
    pub nfct: u64,
    /// Cookie of its socket; 0 = none that is known.
    pub cookie: u64,
    /// Hooks with entries, as [`TraceEvent::hooks`].
    pub hooks: u32,
    /// br_netfilter holds the packet.
    pub bridge_nf: bool,
    /// Headers, where they could be read.
    pub packet: Option<Packet>,
    /// From the IP header on.
    pub bytes: Vec<u8>,
    /// Functions that led there, the innermost first.
    pub stack: Vec<String>,
}

/// A decision of a program of the dataplane.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Decision {
    /// As it was told.
    pub told: TraceDecision,
    /// Where.
    pub hook: Option<Hook>,
    /// Why.
    pub reason: Option<Reason>,
    /// Device, and the pod behind it.
    pub device: String,
    /// Pod behind the device.
    pub pod: Option<String>,
    /// What the policy rule that decided is called, where somebody knows it.
    pub rule: Option<String>,
}

/// What is known of a packet at one moment.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Step {
    /// A tracepoint.
    Sight(Sight),
    /// A decision.
    Decision(Decision),
}

/// All steps of a packet.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Journey {
    /// The probes' number of it.
    pub id: u64,
    /// In their order.
    pub steps: Vec<Step>,
}

/// How it ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Ending {
    /// A pod's or the node's stack has it.
    Delivered,
    /// It went out.
    LeftNode,
    /// It was dropped.
    Dropped,
    /// It was used up on its way, for example by a reply that was made of it.
    Consumed,
    /// Nothing more was seen.
    Unknown,
}

impl Ending {
    /// The word in outputs.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Delivered => "delivered",
            Self::LeftNode => "left-node",
            Self::Dropped => "dropped",
            Self::Consumed => "consumed",
            Self::Unknown => "unknown",
        }
    }
}

impl Step {
    /// When.
    pub const fn at(&self) -> u64 {
        match self {
            Self::Sight(sight) => sight.at,
            Self::Decision(decision) => decision.told.at,
        }
    }

    /// The sight, if it is one.
    pub const fn sight(&self) -> Option<&Sight> {
        match self {
            Self::Sight(sight) => Some(sight),
            Self::Decision(_) => None,
        }
    }
}

impl Sight {
    /// From what a probe told. The stack is added by whoever can read it.
    pub fn new(event: &TraceEvent, names: &Names, home: u32, kernel: &Kernel) -> Self {
        let text = |bytes: &[u8]| {
            let end = bytes.iter().position(|byte| *byte == 0).unwrap_or(bytes.len());
            String::from_utf8_lossy(bytes.get(..end).unwrap_or_default()).into_owned()
        };
        let device = text(&event.device);
        let place = if event.ifindex == 0 {
            Place::Nowhere
        } else if event.netns == home {
            Place::Host(device)
        } else if let Some(pod) = names.pod_behind(event.peer) {
            Place::Pod(names.pod_name(pod), device)
        } else {
            Place::Beyond(device)
        };
        let captured = (event.captured as usize).min(SNAP);
        let bytes = event.packet.get(..captured).unwrap_or_default().to_vec();
        Self {
            at: event.at,
            point: match event.point {
                point::RECEIVE => Point::Receive,
                point::QUEUE => Point::Queue,
                point::TRANSMIT => Point::Transmit,
                point::DROP => Point::Drop,
                _ => Point::Consume,
            },
            place,
            ifindex: event.ifindex,
            netns: event.netns,
            cpu: event.cpu,
            skb: event.skb,
            len: event.len,
            mark: event.mark,
            reason: event.reason,
            location: event.location,
            nfct: event.nfct & !7,
            cookie: event.cookie,
            hooks: event.hooks,
            bridge_nf: event.extensions & kernel.bridge_nf_bit() != 0,
            packet: Packet::parse(&bytes),
            bytes,
            stack: Vec::new(),
        }
    }

    /// In the node's own namespace?
    pub const fn is_on_host(&self) -> bool {
        matches!(self.place, Place::Host(_))
    }
}

impl Decision {
    /// With names.
    pub fn new(told: TraceDecision, names: &Names) -> Self {
        let hook = Hook::ALL.iter().find(|hook| **hook as u32 == told.hook).copied();
        let reason = Reason::ALL.iter().find(|reason| **reason as u32 == told.reason).copied();
        let device = names.interfaces.get(&told.ifindex).cloned().unwrap_or_else(|| format!("#{}", told.ifindex));
        let pod = names.pod_behind(told.ifindex).map(|pod| names.pod_name(pod));
        Self { told, hook, reason, device, pod, rule: None }
    }

    /// Dropped or refused here? What is refused goes back as the answer that it was made into.
    pub fn is_drop(&self) -> bool {
        self.told.verdict == 2 || self.reason.is_some_and(Reason::is_drop)
    }

    /// Sent on past the stack?
    pub const fn is_redirect(&self) -> bool {
        self.told.verdict == 1
    }

    /// The reason's name, or its number where this agent does not know it.
    pub fn reason_name(&self) -> String {
        self.reason.map_or_else(|| format!("#{}", self.told.reason), |reason| reason.name().to_owned())
    }
}

impl Journey {
    /// Sights, in their order.
    pub fn sights(&self) -> impl DoubleEndedIterator<Item = &Sight> {
        self.steps.iter().filter_map(Step::sight)
    }

    /// Decisions, in their order.
    pub fn decisions(&self) -> impl DoubleEndedIterator<Item = &Decision> {
        self.steps.iter().filter_map(|step| match step {
            Step::Decision(decision) => Some(decision),
            Step::Sight(_) => None,
        })
    }

    /// As it was first seen on this node.
    pub fn first(&self) -> Option<&Packet> {
        self.sights().filter(|sight| !matches!(sight.place, Place::Beyond(_))).find_map(|sight| sight.packet.as_ref())
    }

    /// A sight at no device is where the one before was: a packet that has left is used up elsewhere.
    fn settle(&mut self) {
        let mut beyond = None;
        for step in &mut self.steps {
            let Step::Sight(sight) = step else { continue };
            match (&sight.place, &beyond) {
                (Place::Beyond(_), _) => beyond = Some(sight.place.clone()),
                (Place::Nowhere, Some(place)) => sight.place = place.clone(),
                (Place::Nowhere, None) => {}
                _ => beyond = None,
            }
        }
    }

    /// As it was last seen on this node.
    pub fn last(&self) -> Option<&Packet> {
        self.sights()
            .rev()
            .filter(|sight| !matches!(sight.place, Place::Beyond(_)))
            .find_map(|sight| sight.packet.as_ref())
    }

    /// Steps on this node.
    pub fn here(&self) -> impl DoubleEndedIterator<Item = &Step> {
        self.steps.iter().filter(|step| step.sight().is_none_or(|sight| !matches!(sight.place, Place::Beyond(_))))
    }

    /// When it began on this node.
    pub fn began(&self) -> u64 {
        self.here().next().or(self.steps.first()).map_or(0, Step::at)
    }

    /// Nanoseconds from the first step to the last on this node.
    pub fn total(&self) -> u64 {
        self.here().next_back().map_or(0, Step::at).saturating_sub(self.began())
    }

    /// The service port that decided, and the backend; 0 and 0 where none did.
    pub fn service(&self) -> (u32, u32) {
        let found = self.decisions().find(|decision| decision.told.service != 0);
        found.map_or((0, 0), |decision| (decision.told.service, decision.told.backend))
    }

    /// The sight at which the kernel dropped it.
    pub fn drop_sight(&self, kernel: &Kernel) -> Option<&Sight> {
        let not_beyond = |sight: &&Sight| !matches!(sight.place, Place::Beyond(_));
        self.sights().filter(not_beyond).find(|sight| sight.point == Point::Drop && kernel.is_drop(sight.reason))
    }

    /// How it ended.
    pub fn ending(&self, names: &Names, kernel: &Kernel) -> Ending {
        if self.drop_sight(kernel).is_some() || self.decisions().any(Decision::is_drop) {
            return Ending::Dropped;
        }
        let Some(last) = self.sights().rev().find(|sight| !matches!(sight.place, Place::Beyond(_))) else {
            return Ending::Unknown;
        };
        let went_beyond = self.sights().any(|sight| matches!(sight.place, Place::Beyond(_)) && sight.at >= last.at);
        let moved =
            self.sights().rev().find(|sight| matches!(sight.point, Point::Receive | Point::Queue | Point::Transmit));
        let arrived = |sight: &Sight| match &sight.place {
            Place::Pod(..) => sight.point == Point::Receive,
            Place::Host(_) => {
                sight.point == Point::Receive
                    && sight.packet.as_ref().is_some_and(|packet| names.own.contains(&packet.dst))
            }
            Place::Beyond(_) | Place::Nowhere => false,
        };
        if went_beyond {
            return Ending::LeftNode;
        }
        match moved {
            Some(sight) if arrived(sight) => Ending::Delivered,
            Some(sight)
                if sight.point == Point::Transmit && sight.is_on_host() && !names.veths.contains(&sight.ifindex) =>
            {
                Ending::LeftNode
            }
            _ if last.point == Point::Consume => Ending::Consumed,
            _ => Ending::Unknown,
        }
    }

    /// Was the source translated? Of a reply: was it that of its request?
    pub fn has_new_source(&self, is_reply: bool) -> bool {
        let ends = self.first().zip(self.last());
        ends.is_some_and(|(first, last)| if is_reply { first.dst != last.dst } else { first.src != last.src })
    }

    /// Devices that got the packet at once, because the bridge did not know where its receiver is.
    pub fn flooded(&self) -> BTreeSet<&Place> {
        let mut by_skb: BTreeMap<&Place, BTreeSet<u64>> = BTreeMap::new();
        for sight in self.sights().filter(|sight| sight.point == Point::Queue && sight.is_on_host()) {
            by_skb.entry(&sight.place).or_default().insert(sight.skb);
        }
        let copies: BTreeSet<u64> = by_skb.values().flatten().copied().collect();
        if copies.len() > 1 && by_skb.len() > 1 { by_skb.into_keys().collect() } else { BTreeSet::new() }
    }
}

/// Is this the beginning of another packet, in the memory of one that has just arrived? UDP frees packets past every
/// tracepoint, and an answer of IPv6 that is as long as its request has nothing else that tells it apart.
fn begins_anew(before: Option<&Step>, step: &Step) -> bool {
    let (Some(Step::Sight(before)), Step::Sight(sight)) = (before, step) else { return false };
    let (Some(old), Some(new)) = (&before.packet, &sight.packet) else { return false };
    before.point == Point::Receive
        && sight.point == Point::Queue
        && before.netns == sight.netns
        && (old.source(), old.destination()) == (new.destination(), new.source())
}

/// One journey for each packet that took its memory.
fn apart(journey: Journey) -> Vec<Journey> {
    let mut all = Vec::new();
    let mut current = Journey { id: journey.id, steps: Vec::new() };
    for step in journey.steps {
        if begins_anew(current.steps.last(), &step) {
            // As a probe would have numbered it.
            let cpu = step.sight().map_or(0, |sight| u64::from(sight.cpu & 63));
            let next = Journey { id: step.at() << 6 | cpu, steps: Vec::new() };
            all.push(std::mem::replace(&mut current, next));
        }
        current.steps.push(step);
    }
    all.push(current);
    all
}

/// Puts steps together.
#[derive(Debug, Default)]
pub struct Assembly {
    open: BTreeMap<u64, Journey>,
    /// When something was last added, by id: of the reader's clock.
    touched: BTreeMap<u64, u64>,
}

impl Assembly {
    /// Takes in a step; `now` is when it was read.
    pub fn add(&mut self, id: u64, step: Step, now: u64) {
        let journey = self.open.entry(id).or_insert_with(|| Journey { id, steps: Vec::new() });
        let place = journey.steps.partition_point(|other| other.at() <= step.at());
        journey.steps.insert(place, step);
        self.touched.insert(id, now);
    }

    /// Takes out what has been quiet for `quiet` nanoseconds, in the order of beginning.
    pub fn take_quiet(&mut self, now: u64, quiet: u64) -> Vec<Journey> {
        let ready: Vec<u64> =
            self.touched.iter().filter(|(_, at)| now.saturating_sub(**at) >= quiet).map(|(id, _)| *id).collect();
        let mut done: Vec<Journey> = Vec::new();
        for id in ready {
            self.touched.remove(&id);
            done.extend(self.open.remove(&id).into_iter().flat_map(apart).map(|mut journey| {
                journey.settle();
                journey
            }));
        }
        done.sort_by_key(Journey::began);
        done
    }

    /// Packets that are not at their end.
    pub fn len(&self) -> usize {
        self.open.len()
    }

    /// None?
    pub fn is_empty(&self) -> bool {
        self.open.is_empty()
    }
}

/// Functions that work on packets of a queue: what called them is about something else.
const WORKERS: [&str; 6] =
    ["process_backlog", "__napi_poll", "napi_poll", "net_rx_action", "handle_softirqs", "do_softirq"];

/// The functions of a stack that have to do with the packet, the innermost first.
pub fn own_frames(stack: impl Iterator<Item = String>) -> Vec<String> {
    let probe = |name: &String| name.starts_with("bpf_prog_") || name.starts_with("bpf_trace_run");
    stack.skip_while(probe).take_while(|name| !WORKERS.contains(&name.as_str())).collect()
}

/// The name of a told thing's journey.
pub const fn id_of(told: &Told) -> u64 {
    match told {
        Told::Decision(decision) => decision.id,
        Told::Event(event) => event.id,
    }
}

#[cfg(test)]
mod tests {
    use super::super::why::frame::{Frame, Part};
    use super::*;

    #[test]
    fn an_answer_in_the_same_memory_is_another_packet() {
        let sight = |at, point, place: Place, netns, (from, to): (&str, &str)| {
            let ends = (from.parse().expect("an end"), to.parse().expect("an end"));
            let macs = Default::default();
            let frame = Frame { macs, ends, proto: proxy_abi::Proto::UDP, size: 0, part: Part::Opens, number: 1 };
            let bytes = frame.bytes().split_off(14);
            Step::Sight(Sight {
                at,
                point,
                place,
                ifindex: 2,
                netns,
                cpu: 1,
                skb: 8,
                len: 48,
                mark: 0,
                reason: 0,
                location: 0,
                nfct: 0,
                cookie: 0,
                hooks: 0,
                bridge_nf: false,
                packet: Packet::parse(&bytes),
                bytes,
                stack: Vec::new(),
            })
        };
        let (host, pod) = (|| Place::Host("veth7".to_owned()), || Place::Pod("b".to_owned(), "eth0".to_owned()));
        let (forth, back) = (("[fd01::2]:9", "[fd01::3]:53"), ("[fd01::3]:53", "[fd01::2]:9"));
        let steps = [
            sight(10, Point::Receive, host(), 1, forth),
            sight(20, Point::Queue, host(), 1, forth),
            sight(30, Point::Receive, pod(), 2, forth),
            sight(40, Point::Queue, pod(), 2, back),
            sight(50, Point::Receive, host(), 1, back),
        ];
        let mut assembly = Assembly::default();
        for step in &steps {
            assembly.add(5, step.clone(), 0);
        }
        let [first, second] = assembly.take_quiet(1, 0).try_into().expect("two packets");
        assert_eq!((first.id, &first.steps[..]), (5, &steps[..3]));
        assert_eq!((second.id, &second.steps[..]), (40 << 6 | 1, &steps[3..]));
        // What a program has turned round is the same packet: it decided in between.
        let told =
            Decision { told: decision(15), hook: None, reason: None, device: String::new(), pod: None, rule: None };
        let refused = [steps[0].clone(), Step::Decision(told), sight(20, Point::Queue, host(), 1, back)];
        for step in &refused {
            assembly.add(6, step.clone(), 0);
        }
        assert_eq!(assembly.take_quiet(1, 0), [Journey { id: 6, steps: refused.to_vec() }]);
    }

    fn decision(at: u64) -> TraceDecision {
        TraceDecision {
            at,
            id: 6,
            skb: 8,
            head: 9,
            ifindex: 2,
            len: 62,
            hook: 0,
            verdict: 1,
            reason: 32,
            service: 0,
            backend: 0,
            rule: 0,
            cpu: 1,
            reserved: [0; 7],
        }
    }

    #[test]
    fn a_stack_ends_where_the_packet_was_taken_from_a_queue() {
        let stack =
            ["bpf_prog_4f_queue", "bpf_trace_run1", "__dev_queue_xmit", "br_forward", "process_backlog", "ip_output"];
        assert_eq!(own_frames(stack.map(str::to_owned).into_iter()), ["__dev_queue_xmit", "br_forward"]);
    }
}
