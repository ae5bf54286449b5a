//! What a pod with a policy says of others on its link, as fast as one sender can: nobody hears it.

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, UdpSocket};
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;

use proxy_tests::packet::neighbour::{self, kind, link_local, link_message};
use proxy_tests::packet::{Body, Extension, Fragment, Frame, L4, Mac, Udp, Vlan, ether_type, proto};
use proxy_tests::rawsock::{Flooded, RawSocket};
use proxy_tests::{Deadline, Family, Pod};
use serde_json::{Value, json};

use crate::stage::Stage;

/// Frames of each kind.
const EACH: u64 = 100_000;
/// What every frame ends with; one byte follows, the number of its kind.
const MARK: &[u8] = b"from x-a, says it:";
/// The number of the honest one.
const HONEST: u8 = u8::MAX;
/// The one port that the policy does not allow.
const FORBIDDEN: u16 = 80;

/// The lies about the gateway's MAC.
const ABOUT_THE_GATEWAY: [&str; 3] =
    ["ARP reply for the gateway", "advertisement for the gateway", "solicitation from another"];
/// Flags of an advertisement (RFC 4861 §4.4): Override. Without it nobody who knows a MAC takes another.
const OVERRIDE: [u8; 4] = [0x20, 0, 0, 0];

/// Frames of one kind, which the programs drop for one reason.
struct Lie {
    name: &'static str,
    reason: &'static str,
    frames: Vec<Frame>,
    /// Fragments without which those in `frames` are never let through, policy or not.
    firsts: Vec<Frame>,
}

/// The liar, those that listen, and their gateway.
struct Link {
    liar: Pod,
    others: [Pod; 2],
    gateway: (Mac, [IpAddr; 2]),
}

/// Lets x-a out to everywhere on every port but one, and everybody in.
fn all_but_one() -> Value {
    let below = json!({ "port": 1, "endPort": FORBIDDEN - 1 });
    let above = json!({ "port": FORBIDDEN + 1, "endPort": 65_535 });
    let with = |mut range: Value, protocol: &str| {
        range["protocol"] = json!(protocol);
        range
    };
    let ports: Vec<Value> = ["TCP", "UDP"]
        .iter()
        .flat_map(|protocol| [with(below.clone(), protocol), with(above.clone(), protocol)])
        .collect();
    json!({
        "podSelector": { "matchLabels": { "pod": "a" } }, "policyTypes": ["Ingress", "Egress"],
        "ingress": [{}], "egress": [{ "ports": ports }],
    })
}

fn v4(ip: IpAddr) -> Ipv4Addr {
    match ip {
        IpAddr::V4(ip) => ip,
        IpAddr::V6(ip) => panic!("{ip} is not IPv4"),
    }
}

fn v6(ip: IpAddr) -> Ipv6Addr {
    match ip {
        IpAddr::V6(ip) => ip,
        IpAddr::V4(ip) => panic!("{ip} is not IPv6"),
    }
}

fn udp(src: u16, dst: u16) -> L4 {
    L4::Udp(Udp { src, dst, checksum: true, payload: vec![2; 20] })
}

/// The frame with its IP packet changed.
fn with(mut frame: Frame, change: impl FnOnce(&mut proxy_tests::packet::Ip)) -> Frame {
    change(frame.as_ip_mut().expect("IP"));
    frame
}

/// The ICMP message with these flags.
fn with_flags(frame: Frame, flags: [u8; 4]) -> Frame {
    with(frame, |packet| match &mut packet.l4 {
        L4::Icmp(icmp) => icmp.rest = flags,
        other => panic!("{other:?} is not ICMP"),
    })
}

impl Link {
    fn of(stage: &Stage) -> Self {
        let pod = |name: &str| stage.scenario.cluster().pod(name).expect("pod");
        let node = stage.scenario.node(0);
        let ips = Family::BOTH.map(|family| node.bridge_ip(family));
        Self { liar: pod("x-a"), others: [pod("y-a"), pod("z-b")], gateway: (node.bridge_mac(), ips) }
    }

    /// An honest datagram on an allowed port, to one of the others.
    fn honest(&self, to: &Pod, family: Family) -> Frame {
        Frame::ip((self.liar.mac(), self.liar.ip(family)), (to.mac(), to.ip(family)), udp(5_000, 9))
    }

    /// Everybody whose address the liar can give for its own, from the side of `to`.
    fn names(&self, to: &Pod, family: Family) -> Vec<IpAddr> {
        let third = self.others.iter().find(|pod| pod.name() != to.name()).expect("two");
        let outside = match family {
            Family::V4 => "192.0.2.1".parse(),
            Family::V6 => "2001:db8::1".parse(),
        };
        let gateway = self.gateway.1[usize::from(family == Family::V6)];
        vec![third.ip(family), to.ip(family), gateway, outside.expect("an address")]
    }

    /// Every address of the link, with the MAC of its owner.
    fn owners(&self) -> BTreeMap<String, String> {
        let pod = |pod: &Pod| (pod.mac(), [pod.ip4(), pod.ip6()]);
        let all = self.others.iter().map(pod).chain([pod(&self.liar), self.gateway]);
        let named = |(mac, [ip4, ip6]): (Mac, [IpAddr; 2])| {
            [ip4, ip6, link_local(mac).into()].map(|ip| (ip.to_string(), mac.to_string()))
        };
        all.flat_map(named).collect()
    }

    /// What it says to both of the others.
    fn lies(&self) -> Vec<Lie> {
        let mut lies: Vec<Lie> = Vec::new();
        for to in &self.others {
            for (name, reason, frames) in self.lies_to(to) {
                let firsts: Vec<Frame> = frames.iter().filter_map(first_of).collect();
                match lies.iter_mut().find(|lie| lie.name == name) {
                    Some(lie) => {
                        lie.frames.extend(frames);
                        lie.firsts.extend(firsts);
                    }
                    None => lies.push(Lie { name, reason, frames, firsts }),
                }
            }
        }
        lies
    }

    fn lies_to(&self, to: &Pod) -> Vec<(&'static str, &'static str, Vec<Frame>)> {
        let (mac, own4, own6) = (self.liar.mac(), v4(self.liar.ip4()), v6(self.liar.ip6()));
        let (gateway, gateway4, gateway6) = (self.gateway.0, v4(self.gateway.1[0]), v6(self.gateway.1[1]));
        // Said to one alone: a group's address would reach the rest of the node too, and prove no more.
        let to_one = |frame: Frame| Frame { dst: to.mac(), ..frame };
        let plain = |family| self.honest(to, family);
        let forged = |family| {
            let names = self.names(to, family);
            names.into_iter().map(|ip| with(plain(family), |packet| packet.src = ip)).collect::<Vec<_>>()
        };
        let tagged = |tags: &[(u16, u16)]| {
            let tag = |family| {
                let vlans = tags.iter().map(|&(tpid, tci)| Vlan { tpid, tci }).collect();
                Frame { vlans, ..plain(family) }
            };
            Family::BOTH.map(tag).to_vec()
        };
        let macs = [gateway, to.mac(), Mac([2, 0, 0, 0, 0xee, 1])];
        let (arp, nd) = (
            |sender: (Mac, Ipv4Addr)| to_one(neighbour::arp(mac, 2, sender, v4(to.ip4()))),
            |src: Ipv6Addr, kind, target, option| to_one(link_message((mac, src), kind, Some(target), option)),
        );
        let advertised = |target| with_flags(nd(own6, kind::ADVERTISEMENT, target, Some((2, mac))), OVERRIDE);
        let local = link_local(mac);
        vec![
            ("IPv4 source", "frame_source", forged(Family::V4)),
            ("IPv6 source", "frame_source", forged(Family::V6)),
            (
                "source MAC",
                "frame_source",
                macs.iter().flat_map(|&src| Family::BOTH.map(|family| Frame { src, ..plain(family) })).collect(),
            ),
            (ABOUT_THE_GATEWAY[0], "frame_neighbour", vec![arp((mac, gateway4))]),
            ("ARP with another MAC", "frame_neighbour", macs.iter().map(|&other| arp((other, own4))).collect()),
            (ABOUT_THE_GATEWAY[1], "frame_neighbour", vec![advertised(gateway6), advertised(link_local(gateway))]),
            (
                ABOUT_THE_GATEWAY[2],
                "frame_source",
                [gateway6, link_local(gateway), v6(to.ip6())]
                    .map(|src| nd(src, kind::SOLICITATION, v6(to.ip6()), Some((1, mac))))
                    .to_vec(),
            ),
            (
                "router advertisement",
                "frame_router",
                vec![to_one(link_message((mac, local), kind::ROUTER_ADVERTISEMENT, None, Some((1, mac))))],
            ),
            ("VLAN 0", "frame_type", tagged(&[(ether_type::VLAN, 0)])),
            ("QinQ", "frame_type", tagged(&[(ether_type::QINQ, 5), (ether_type::VLAN, 0)])),
            ("LLC and SNAP", "frame_type", Family::BOTH.map(|family| snap(plain(family))).to_vec()),
            ("IPv4 fragment without a first", "fragment_before_first", later_fragments(&plain(Family::V4))),
            ("IPv6 fragment without a first", "fragment_before_first", later_fragments(&plain(Family::V6))),
            ("IPv4 first fragment without ports", "frame_unparsed", portless_v4(&plain(Family::V4))),
            ("IPv6 first fragment without ports", "frame_unparsed", portless_v6(&plain(Family::V6))),
            ("IPv4 DHCP server", "frame_router", vec![with(plain(Family::V4), |packet| packet.l4 = udp(67, 68))]),
            ("IPv6 DHCP server", "frame_router", vec![with(plain(Family::V6), |packet| packet.l4 = udp(547, 546))]),
        ]
    }
}

/// The packet behind a SNAP header (IEEE 802): the EtherType's place has the length.
fn snap(frame: Frame) -> Frame {
    let whole = frame.build();
    // LLC: SNAP, SNAP, unnumbered information; SNAP: no organisation, and the EtherType.
    let bytes = [&[0xaa, 0xaa, 3, 0, 0, 0], &whole[12..]].concat();
    let ether_type = u16::try_from(bytes.len()).expect("a short frame");
    Frame { body: Body::Other { ether_type, bytes }, ..frame }
}

/// Later fragments of packets that have no first one, in the middle and at the end.
fn later_fragments(frame: &Frame) -> Vec<Frame> {
    let mut all = Vec::new();
    for number in 0..32_u16 {
        for more in [true, false] {
            all.push(with(frame.clone(), |packet| {
                packet.id = u32::from(0x7700 + number);
                packet.dont_fragment = false;
                packet.fragment = Some(Fragment { offset: 8 * (1 + number), more });
                packet.l4 = L4::Other { proto: proto::UDP, bytes: vec![0; 32] };
            }));
        }
    }
    all
}

/// The first fragment of a later one's packet.
fn first_of(frame: &Frame) -> Option<Frame> {
    let later = frame.as_ip()?.fragment.is_some_and(|place| place.offset > 0);
    let first = || {
        with(frame.clone(), |packet| {
            packet.fragment = Some(Fragment { offset: 0, more: true });
            let bytes = [[0x13, 0x88, 0, 9, 0, 200, 0, 0]; 2].concat(); // ports 5000 and 9
            packet.l4 = L4::Other { proto: proto::UDP, bytes };
        })
    };
    later.then(first)
}

/// First fragments that end before the ports do.
fn portless_v4(frame: &Frame) -> Vec<Frame> {
    let cut = |len: u16| {
        with(frame.clone(), |packet| {
            packet.id = u32::from(0x6600 + len);
            packet.dont_fragment = false;
            packet.fragment = Some(Fragment { offset: 0, more: true });
            packet.l4 = L4::Other { proto: proto::UDP, bytes: vec![0; usize::from(len)] };
        })
    };
    (0..4).map(cut).collect()
}

/// First fragments that end before the ports do, or in a header before them.
fn portless_v6(frame: &Frame) -> Vec<Frame> {
    let cut = |(id, kind, bytes): (u32, u8, Vec<u8>)| {
        with(frame.clone(), |packet| {
            packet.id = id;
            packet.fragment = Some(Fragment { offset: 0, more: true });
            packet.l4 = L4::Other { proto: kind, bytes };
        })
    };
    // Options of 24 bytes, of which 8 are here.
    let options = vec![proto::UDP, 2, 1, 4, 0, 0, 0, 0];
    // Options that are all here, and nothing behind them.
    let whole = vec![proto::UDP, 0, 1, 4, 0, 0, 0, 0];
    let mut all: Vec<Frame> =
        (0..4_u8).map(|len| cut((0x6600 + u32::from(len), proto::UDP, vec![0; usize::from(len)]))).collect();
    all.extend([(0x6610, proto::DESTINATION, options), (0x6611, proto::DESTINATION, whole)].map(cut));
    let before = Extension { kind: proto::DESTINATION, content: vec![1, 4, 0, 0, 0, 0] };
    all.push(with(all[0].clone(), |packet| packet.extensions = vec![before]));
    all
}

/// The frame's bytes, and who says them.
fn marked(frame: &Frame, number: u8) -> Vec<u8> {
    [&frame.build(), MARK, &[number]].concat()
}

/// Addresses of the gateway and of the liar at the other pods, with the MACs that they have for them.
type Neighbours = BTreeMap<(String, String), String>;

fn neighbours(pods: &[Pod]) -> Neighbours {
    let mut all = Neighbours::new();
    for pod in pods {
        let shown = pod.netns().output("ip", &["-json", "neigh", "show", "dev", "eth0"]).expect("ip neigh");
        let rows: Vec<Value> = serde_json::from_str(&shown).expect("JSON");
        for row in rows {
            if let (Some(ip), Some(mac)) = (row["dst"].as_str(), row["lladdr"].as_str()) {
                all.insert((pod.name().to_owned(), ip.to_owned()), mac.to_owned());
            }
        }
    }
    all
}

/// Has a pod send something to an address, and look for its MAC if it has none.
fn speak_to(pod: &Pod, ip: IpAddr) {
    let target = SocketAddr::new(ip, 9);
    let any: IpAddr = if ip.is_ipv4() { Ipv4Addr::UNSPECIFIED.into() } else { Ipv6Addr::UNSPECIFIED.into() };
    pod.netns().run(|| UdpSocket::bind((any, 0))?.send_to(b"?", target)).expect("namespace").expect("sent");
}

/// Lets the others learn the gateway's MAC and the liar's, and gives what they know.
fn learned(link: &Link) -> Neighbours {
    let mut wanted = Vec::new();
    for pod in &link.others {
        let known = [
            (link.gateway.1[0], link.gateway.0),
            (link.gateway.1[1], link.gateway.0),
            (link.liar.ip4(), link.liar.mac()),
            (link.liar.ip6(), link.liar.mac()),
        ];
        for (ip, mac) in known {
            speak_to(pod, ip);
            wanted.push(((pod.name().to_owned(), ip.to_string()), mac.to_string()));
        }
    }
    let all_known = || {
        let got = neighbours(&link.others);
        wanted.iter().all(|(who, mac)| got.get(who) == Some(mac))
    };
    Deadline::secs(60).until("neighbours are known", all_known).expect("honest neighbours");
    wanted.into_iter().collect()
}

/// Frames that arrived, by the number of their kind.
type Heard = BTreeMap<u8, u64>;

/// What came of telling.
struct Told {
    heard: Heard,
    floods: Vec<Flooded>,
    /// What the others knew of their neighbours after each lie.
    known: Vec<Neighbours>,
}

/// Sends while the others listen: honest frames, then `lies`, then honest frames.
///
/// `with_firsts` sends the first fragments too.
fn told(stage: &Stage, link: &Link, lies: &[Lie], with_firsts: bool) -> Told {
    let ears = link.others.each_ref().map(|pod| RawSocket::open(pod.netns(), "eth0").expect("socket"));
    let mouth = RawSocket::open(link.liar.netns(), "eth0").expect("socket");
    let stop = AtomicBool::new(false);
    let said = || {
        for pod in &link.others {
            for family in Family::BOTH {
                mouth.send(&marked(&link.honest(pod, family), HONEST)).expect("sent");
            }
        }
    };
    thread::scope(|scope| {
        let listening = ears.each_ref().map(|ear| {
            scope.spawn(|| {
                let mut heard = Heard::new();
                let look = |frame: &[u8]| {
                    if let Some((&number, rest)) = frame.split_last()
                        && rest.ends_with(MARK)
                    {
                        *heard.entry(number).or_default() += 1;
                    }
                };
                ear.watch(&stop, look).map(|()| heard).expect("heard")
            })
        });
        said();
        let (mut floods, mut known) = (Vec::new(), Vec::new());
        for (number, lie) in (0..).zip(lies) {
            // Where the others are is told to the bridge anew, for what the last lies have made of it.
            for (ear, pod) in ears.iter().zip(&link.others) {
                let own = v4(pod.ip4());
                ear.send(&neighbour::arp(pod.mac(), 1, (pod.mac(), own), own).build()).expect("sent");
            }
            for first in lie.firsts.iter().filter(|_| with_firsts) {
                mouth.send(&first.build()).expect("sent");
            }
            let before = stage.scenario.counters(0).expect("counters");
            let frames: Vec<_> = lie.frames.iter().map(|frame| marked(frame, number)).collect();
            let flood = mouth.flood(&frames, None, |sent| sent < EACH).expect("sent");
            let counted = stage.scenario.counters(0).expect("counters").since(&before);
            println!("{}: {} frames, {} a second; {counted}", lie.name, flood.frames, flood.rate());
            floods.push(flood);
            known.push(neighbours(&link.others));
        }
        said();
        stop.store(true, Ordering::Relaxed);
        let mut heard = Heard::new();
        for one in listening {
            for (number, count) in one.join().expect("listened") {
                *heard.entry(number).or_default() += count;
            }
        }
        Told { heard, floods, known }
    })
}

/// Says its lies about the gateway until both of the others have taken them for the truth.
///
/// Once is not enough. For a second after a change a neighbour entry takes no other MAC from an ARP reply (`locktime`,
/// net/ipv4/arp.c), and none from an advertisement when it has failed (net/ipv6/ndisc.c); the gateway's own requests put the
/// truth back at any time; and a liar that answers no probe is forgotten again. A solicitation is believed in every state of
/// IPv6; an ARP reply needs an entry, which who has none makes by speaking to the gateway.
fn believed(link: &Link, lies: &[Lie]) {
    let mouth = RawSocket::open(link.liar.netns(), "eth0").expect("socket");
    let about: Vec<&Frame> =
        lies.iter().filter(|lie| ABOUT_THE_GATEWAY.contains(&lie.name)).flat_map(|lie| &lie.frames).collect();
    let liar = link.liar.mac().to_string();
    for (pod, gateway) in link.others.iter().flat_map(|pod| link.gateway.1.map(|ip| (pod, ip))) {
        let who = (pod.name().to_owned(), gateway.to_string());
        let taken = || {
            for frame in &about {
                mouth.send(&frame.build()).expect("sent");
            }
            let known = neighbours(std::slice::from_ref(pod));
            if !known.contains_key(&who) {
                speak_to(pod, gateway);
            }
            known.get(&who) == Some(&liar)
        };
        Deadline::secs(60).until(&format!("{who:?} is the liar"), taken).expect("a lie that is believed");
    }
}

#[test]
fn nobody_hears_a_pod_that_speaks_for_another() {
    let mut stage = Stage::build();
    stage.apply("x", "all-but-one", &all_but_one());
    stage.settle();
    let link = Link::of(&stage);
    stage.wait_endpoint(0, &link.liar, "ingress, egress");
    let (lies, known) = (link.lies(), learned(&link));
    let before = stage.scenario.counters(0).expect("counters");
    let Told { heard, floods, known: after } = told(&stage, &link, &lies, false);
    let dropped = stage.scenario.counters(0).expect("counters").since(&before);
    assert_eq!(heard, Heard::from([(HONEST, 8)]), "four before, four after");
    let owners = link.owners();
    for (lie, after) in lies.iter().zip(&after) {
        for (who, mac) in &known {
            assert_eq!(after.get(who), Some(mac), "{who:?} after {}", lie.name);
        }
        for ((who, ip), mac) in after {
            // What they have learned besides, of link-local addresses: only the truth.
            assert_eq!(owners.get(ip), Some(mac), "{ip} at {who} after {}", lie.name);
        }
    }
    let mut expected: BTreeMap<&str, u64> = BTreeMap::new();
    for (lie, flood) in lies.iter().zip(&floods) {
        *expected.entry(lie.reason).or_default() += flood.frames;
    }
    for (reason, frames) in expected {
        let got = dropped.get("from_pod", reason);
        assert!(got >= frames, "{got} of {frames} {reason}");
    }

    // Without a policy anywhere the same is heard, and believed: so there was something to hear.
    stage.delete("x", "all-but-one");
    stage.settle();
    stage.wait_endpoint(0, &link.liar, "none");
    let Told { heard, .. } = told(&stage, &link, &lies, true);
    for (number, lie) in (0..).zip(&lies) {
        assert!(heard.contains_key(&number), "{} was not heard at all: {heard:?}", lie.name);
    }
    println!("heard without a policy: {heard:?}");
    believed(&link, &lies);
}
