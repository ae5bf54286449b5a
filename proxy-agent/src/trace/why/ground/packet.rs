//! The packets of a question, and what the programs would do with them.

use std::net::{IpAddr, SocketAddr};
use std::ops::{ControlFlow, Range};

use proxy_abi::policy::RuleRef;
use proxy_abi::{BackendEntry, FlowEntry, FlowKey, Hook, MacBytes, PortBe, Proto, Reason, Tuple};
use proxy_ebpf::conntrack;

use super::super::check::Check;
use super::super::dry::{Expected, Ran};
use super::super::flow::Known;
use super::super::frame::{Frame, Part};
use super::super::question::{Kind, Place, Question};
use super::super::service::{self, Frontend};
use super::Ground;
use crate::dataplane::map::Map;
use crate::dataplane::sysbpf::At;
use crate::trace::packet::Packet;
use crate::trace::{TraceError, monotonic, rules};

/// Ports of the sender: the first that no flow has.
pub const PORTS: Range<u16> = 59_000..60_000;

/// What was run, with the packet afterwards; or the check that says why it could not be.
type Outcome = Result<(Ran, Vec<u8>), Check>;

/// An interface, and the MACs of a packet there.
type Wire = (u32, (MacBytes, MacBytes));

impl Ground<'_> {
    /// Has a flow to there this port of the sender?
    fn has_flow(&self, from: SocketAddr, to: SocketAddr, proto: Proto) -> Result<bool, TraceError> {
        let (src_port, dst_port) = (PortBe::new(from.port()), PortBe::new(to.port()));
        let tuple = Tuple { src: from.ip().into(), dst: to.ip().into(), src_port, dst_port };
        let key = tuple.key(proto, tuple.dst.family(), FlowKey::SIDE_COMMON);
        Ok(self.maps.flow_live.get(&key)?.is_some() || self.maps.flow_brief.get(&key)?.is_some())
    }

    /// A port of the sender that no flow to there has.
    fn free_port(&self, from: IpAddr, to: SocketAddr, proto: Proto) -> Result<u16, TraceError> {
        for port in PORTS {
            if !self.has_flow(SocketAddr::new(from, port), to, proto)? {
                return Ok(port);
            }
        }
        Ok(PORTS.start)
    }

    /// Gives the question the port and the number of one real packet: such as no flow has and, where the kernel tells, no
    /// socket of the sender, so that what answers it comes to nobody.
    ///
    /// # Errors
    /// When a map cannot be read.
    pub fn reserve(&mut self, question: &mut Question) -> Result<(), TraceError> {
        // The clock is never the same twice.
        let now = monotonic();
        question.number = u32::try_from(now & u64::from(u32::MAX)).unwrap_or(1);
        let room = PORTS.end - PORTS.start;
        let first = u16::try_from(now / 1000 % u64::from(room)).unwrap_or(0);
        let target = SocketAddr::new(question.to.ip, question.port.unwrap_or(0));
        let at = self.namespace(&question.from);
        for step in 0..room {
            let port = PORTS.start + (first + step) % room;
            let from = SocketAddr::new(question.source(), port);
            let is_tcp = question.proto == Proto::TCP;
            let socket = match (&mut self.probes, at) {
                (Some(probes), Some((nsid, ifindex))) if question.port.is_some() => {
                    probes.listens((target, from), is_tcp, nsid, ifindex).unwrap_or(false)
                }
                _ => false,
            };
            if !socket && !self.has_flow(from, target, question.proto)? {
                question.from_port = port;
                return Ok(());
            }
        }
        Err(TraceError::Usage(format!("all ports from {} to {} of the sender are in use", PORTS.start, PORTS.end - 1)))
    }

    /// The MACs of a packet that is sent by a pod, or comes to it.
    fn macs(&self, pod: IpAddr, sends: bool, other: IpAddr) -> Result<Option<Wire>, TraceError> {
        let Some((ifindex, device)) = self.device_of(pod)? else { return Ok(None) };
        let macs = match self.device_of(other)? {
            _ if !sends => (device.gateway_mac, device.pod_mac),
            Some((_, other)) if other.bridge == device.bridge && device.bridge != 0 => (device.pod_mac, other.pod_mac),
            _ => (device.pod_mac, device.gateway_mac),
        };
        Ok(Some((ifindex, macs)))
    }

    /// The packet as it leaves the sender (`egress`), or as it comes to the receiver; and that pod's interface. `None` where
    /// that is no pod of this node, or the maps do not know its interface.
    ///
    /// # Errors
    /// When a map cannot be read.
    pub fn frame(
        &self,
        question: &Question,
        egress: bool,
        to: (IpAddr, Option<u16>),
    ) -> Result<Option<(u32, Frame)>, TraceError> {
        let target = SocketAddr::new(to.0, to.1.unwrap_or(0));
        let end = if egress { question.from.ip } else { to.0 };
        let Some((ifindex, macs)) = self.macs(end, egress, to.0)? else { return Ok(None) };
        let port = match (question.from_port, to.1) {
            (0, Some(_)) => self.free_port(question.source(), target, question.proto)?,
            (port, _) => port,
        };
        let Question { proto, size, part, number, .. } = *question;
        let ends = (SocketAddr::new(question.source(), port), target);
        Ok(Some((ifindex, Frame { macs, ends, proto, size, part, number })))
    }

    /// Where a packet came into the node: by a pod's own interface, by another one's, by no one's.
    fn came(&mut self, from: &Place) -> Result<u32, TraceError> {
        Ok(match (from.kind, self.device_of(from.ip)?) {
            (Kind::Node, _) => 0,
            (_, Some((ifindex, _))) => ifindex,
            (_, None) => self.requests.way(from.ip, None)?.map_or(0, |hop| hop.ifindex),
        })
    }

    /// What a program does with a frame. `port`: of the responder, `peer`: the pod's other end, both for the name of a rule.
    fn ran(
        &mut self,
        hook: Hook,
        at: At,
        frame: &[u8],
        (proto, port): (Proto, Option<u16>),
        peer: IpAddr,
    ) -> Result<Outcome, TraceError> {
        let name = hook.name();
        let unknown = |why: String| {
            Check::unknown(
                "dry run",
                format!("{name} could not be asked: {why}"),
                "`proxy-agent check` tells what the kernel lacks",
            )
        };
        let ran = match &mut self.programs {
            Ok(programs) => programs.run(name, frame, at),
            Err(why) => return Ok(Err(unknown(why.clone()))),
        };
        let ran = match ran {
            Ok(ran) => ran,
            Err(error) => return Ok(Err(unknown(format!("{:#}", anyhow::Error::from(error))))),
        };
        let told = ran.decision.as_ref();
        let reason = told.and_then(|told| Reason::ALL.iter().find(|reason| **reason as u32 == told.reason).copied());
        let backend = match told.filter(|told| told.service != 0) {
            Some(told) => self.maps.backend.get(&told.backend)?.map(|found| service::address(&found)),
            None => None,
        };
        let egress = hook == Hook::FromPod;
        let is_reply = reason == Some(Reason::Reply);
        let peer = backend.filter(|_| egress && !is_reply).map_or(peer, |backend| backend.ip());
        let rule = told.map(|told| told.rule).filter(|rule| *rule != 0);
        let rule = rule.map(|rule| (RuleRef(rule), rules::of(self.pin_root, rule, peer, proto, port)));
        let done = Ran {
            hook,
            device: self.links.get(&at.0).map_or_else(|| format!("#{}", at.0), |link| link.name.to_string()),
            verdict: ran.verdict,
            reason,
            rule,
            // A reply comes from there.
            backend: backend.filter(|_| egress && !is_reply),
        };
        Ok(Ok((done, ran.packet)))
    }

    /// What the program at a pod's interface would do with the packet, and whether that is what the maps say. `egress`: at
    /// the sender's interface, else at the receiver's, which the packet comes to as `to`.
    ///
    /// # Errors
    /// When a map cannot be read.
    pub fn dry(
        &mut self,
        question: &Question,
        egress: bool,
        to: (&Place, Option<u16>),
        expected: &Expected,
    ) -> Result<Option<(Check, Option<Ran>)>, TraceError> {
        let (place, port) = to;
        let end = if egress { &question.from } else { place };
        if end.kind != Kind::Pod {
            return Ok(None);
        }
        let Some((ifindex, frame)) = self.frame(question, egress, (place.ip, port))? else { return Ok(None) };
        let came = if egress { ifindex } else { self.came(&question.from)? };
        let hook = if egress { Hook::FromPod } else { Hook::ToPod };
        let peer = if egress { place.ip } else { question.source() };
        let about = (question.proto, question.port);
        Ok(Some(match self.ran(hook, (ifindex, came), &frame.bytes(), about, peer)? {
            Ok((ran, _)) => (ran.check(expected), Some(ran)),
            Err(unknown) => (unknown, None),
        }))
    }

    /// What the programs of the pods on its way would do with a packet of a known flow, one after the other: the second gets
    /// what the first made of it. A program that drops it is the last.
    ///
    /// # Errors
    /// When a map cannot be read.
    pub fn along(
        &mut self,
        from: &Place,
        frame: &Frame,
        port: Option<u16>,
    ) -> Result<Vec<Result<Ran, Check>>, TraceError> {
        let mut all = Vec::new();
        let about = (frame.proto, port);
        let (sender, receiver) = (frame.ends.0.ip(), frame.ends.1.ip());
        let mut bytes = frame.bytes();
        if from.kind == Kind::Pod
            && let Some((ifindex, macs)) = self.macs(from.ip, true, receiver)?
        {
            bytes = Frame { macs, ..*frame }.bytes();
            match self.ran(Hook::FromPod, (ifindex, ifindex), &bytes, about, receiver)? {
                Ok((ran, after)) => {
                    let ends = ran.is_drop();
                    all.push(Ok(ran));
                    if ends {
                        return Ok(all);
                    }
                    bytes = after;
                }
                Err(unknown) => return Ok(vec![Err(unknown)]),
            }
        } else if let Some((_, macs)) = self.macs(receiver, false, sender)? {
            bytes = Frame { macs, ..*frame }.bytes();
        }
        let Some(packet) = bytes.get(14..).and_then(Packet::parse) else { return Ok(all) };
        let Some((ifindex, _)) = self.device_of(packet.dst)? else { return Ok(all) };
        let came = self.came(from)?;
        all.push(self.ran(Hook::ToPod, (ifindex, came), &bytes, about, packet.src)?.map(|(ran, _)| ran));
        Ok(all)
    }

    /// Flows of the tables that the question is about, those that live and were seen last first. `frontend`: the Service
    /// that is asked for, which a process of the node reaches by the addresses of its backends.
    ///
    /// # Errors
    /// When a map cannot be read.
    pub fn flows(&self, question: &Question, frontend: Option<&Frontend>) -> Result<Vec<Known>, TraceError> {
        let node = question.from.kind == Kind::Node;
        let mut targets = vec![(question.to.ip, question.port)];
        if node && let Some(frontend) = frontend {
            targets.extend(frontend.candidates().iter().map(|at| (at.ip(), Some(at.port()))));
        }
        let is_asked_for = |key: &FlowKey, entry: &FlowEntry| {
            let (src, dst) = (IpAddr::from(entry.original.src), IpAddr::from(entry.original.dst));
            let port = entry.original.dst_port.get();
            let begins = if node { self.names.own.contains(&src) } else { src == question.source() };
            key.proto == question.proto
                && entry.flags & FlowEntry::KEY_ORIGINAL != 0
                && begins
                && targets.iter().any(|(ip, wanted)| *ip == dst && wanted.is_none_or(|wanted| wanted == port))
        };
        let mut found: Vec<(FlowKey, FlowEntry, &'static str)> = Vec::new();
        let mut take = |map: &Map<FlowKey, FlowEntry>, table: &'static str| {
            map.scan(|key, entry| {
                // What was promoted left its row behind in the other table, which comes second.
                if is_asked_for(key, entry) && !found.iter().any(|(known, ..)| known == key) {
                    found.push((*key, *entry, table));
                }
                ControlFlow::Continue(())
            })
        };
        take(&self.maps.flow_live, "flow_live")?;
        take(&self.maps.flow_brief, "flow_brief")?;
        let now = monotonic();
        let mut known = Vec::new();
        for (_, entry, table) in found {
            let backend: Option<BackendEntry> =
                if entry.service == 0 { None } else { self.maps.backend.get(&entry.backend)? };
            let serves = backend.is_some_and(|backend| backend.generation == entry.generation);
            let idle = now.saturating_sub(entry.last_seen);
            known.push(Known { entry, proto: question.proto, table, idle, is_stale: entry.service != 0 && !serves });
        }
        known.sort_by_key(|known| (conntrack::is_over(known.entry.state), known.idle));
        Ok(known)
    }

    /// Has the end of a known flow a socket for what comes to it? `None`: it cannot be told.
    pub fn has_socket(&mut self, at: &Place, from: SocketAddr, to: SocketAddr, proto: Proto) -> Option<bool> {
        let (nsid, ifindex) = self.namespace(at)?;
        let probes = self.probes.as_mut().filter(|_| matches!(proto, Proto::TCP | Proto::UDP))?;
        probes.listens((from, to), proto == Proto::TCP, nsid, ifindex).ok()
    }

    /// A frame of a known flow, without MACs: those of the first pod on its way are filled in where it is run.
    pub fn frame_of(question: &Question, ends: (SocketAddr, SocketAddr), part: Part) -> Frame {
        let macs = (MacBytes::default(), MacBytes::default());
        Frame { macs, ends, proto: question.proto, size: question.size, part, number: question.number }
    }
}
