//! `cleanup --kube-proxy`: kube-proxy's leavings go, and everything beside them is as it was, to the byte.

use std::io::{Read as _, Write as _};
use std::net::{Ipv4Addr, TcpListener};
use std::process::Output;

use proxy_tests::Netns;
use proxy_tests::agent::find_binary;

/// Rules of others, among them kubelet's: they stay.
const FOREIGN: &str = "\
*mangle
:KUBE-IPTABLES-HINT - [0:0]
:KUBE-KUBELET-CANARY - [0:0]
COMMIT
*nat
:CNI-HOSTPORT - [0:0]
:KUBE-MARK-MASQ - [0:0]
-A PREROUTING -m addrtype --dst-type LOCAL -j CNI-HOSTPORT
-A OUTPUT -p udp -j RETURN
-A POSTROUTING -m comment --comment \"not -j KUBE-POSTROUTING\" -j RETURN
-A CNI-HOSTPORT -p tcp -m tcp --dport 8080 -j RETURN
-A KUBE-MARK-MASQ -j MARK --set-xmark 0x4000/0x4000
COMMIT
*filter
:KUBE-FIREWALL - [0:0]
-A INPUT -j KUBE-FIREWALL
-A INPUT -p tcp -m tcp --dport 22 -j ACCEPT
-A FORWARD -m conntrack --ctstate INVALID -j DROP
-A OUTPUT -p udp -j ACCEPT
COMMIT
";

/// What kube-proxy in iptables mode leaves, before and between those.
const LEAVINGS: &str = "\
*mangle
:KUBE-PROXY-CANARY - [0:0]
COMMIT
*nat
:KUBE-NODEPORTS - [0:0]
:KUBE-POSTROUTING - [0:0]
:KUBE-PROXY-CANARY - [0:0]
:KUBE-SEP-AAAAAAAAAAAAAAAA - [0:0]
:KUBE-SERVICES - [0:0]
:KUBE-SVC-BBBBBBBBBBBBBBBB - [0:0]
:KUBE-EXT-BBBBBBBBBBBBBBBB - [0:0]
-I PREROUTING -m comment --comment \"kubernetes service portals\" -j KUBE-SERVICES
-I OUTPUT -m comment --comment \"kubernetes service portals\" -j KUBE-SERVICES
-I POSTROUTING -m comment --comment \"kubernetes postrouting rules\" -j KUBE-POSTROUTING
-I CNI-HOSTPORT -p udp -j KUBE-EXT-BBBBBBBBBBBBBBBB
-A KUBE-SERVICES -p tcp -m comment --comment \"default/web cluster IP\" -m tcp --dport 80 -j KUBE-SVC-BBBBBBBBBBBBBBBB
-A KUBE-SERVICES -m addrtype --dst-type LOCAL -j KUBE-NODEPORTS
-A KUBE-NODEPORTS -p tcp -m tcp --dport 30080 -j KUBE-EXT-BBBBBBBBBBBBBBBB
-A KUBE-EXT-BBBBBBBBBBBBBBBB -j KUBE-MARK-MASQ
-A KUBE-EXT-BBBBBBBBBBBBBBBB -j KUBE-SVC-BBBBBBBBBBBBBBBB
-A KUBE-SVC-BBBBBBBBBBBBBBBB -m comment --comment \"default/web -> it\" -j KUBE-SEP-AAAAAAAAAAAAAAAA
-A KUBE-SEP-AAAAAAAAAAAAAAAA -j KUBE-MARK-MASQ
-A KUBE-POSTROUTING -m mark ! --mark 0x4000/0x4000 -j RETURN
-A KUBE-POSTROUTING -j MASQUERADE
COMMIT
*filter
:KUBE-FORWARD - [0:0]
:KUBE-EXTERNAL-SERVICES - [0:0]
:KUBE-PROXY-FIREWALL - [0:0]
:KUBE-SERVICES - [0:0]
-I INPUT -m conntrack --ctstate NEW -m comment --comment \"kubernetes load balancer firewall\" -j KUBE-PROXY-FIREWALL
-I FORWARD -m comment --comment \"kubernetes forwarding rules\" -j KUBE-FORWARD
-I FORWARD -m conntrack --ctstate NEW -j KUBE-SERVICES
-I OUTPUT -m conntrack --ctstate NEW -j KUBE-EXTERNAL-SERVICES
-A KUBE-FORWARD -m conntrack --ctstate INVALID -j DROP
COMMIT
";

const VARIANTS: [&str; 4] = ["iptables-legacy", "iptables-nft", "ip6tables-legacy", "ip6tables-nft"];

const NFT_FOREIGN: &str = "\
table inet others {
  chain input { type filter hook input priority 0; policy accept; ip saddr 192.0.2.0/24 drop; }
}
table ip kube-proxy-not { set KUBE-X { type ipv4_addr; }; }
";

const NFT_LEAVINGS: &str = "\
table ip kube-proxy {
  chain services { ip daddr 10.96.0.1 tcp dport 443 dnat to 10.0.0.1:6443; }
  chain nat-prerouting { type nat hook prerouting priority dstnat; jump services; }
}
table ip6 kube-proxy { chain services { }; }
";

/// Everything of netfilter, without the comments, which hold the time, and without the counts of packets: the question
/// whether the agent serves is a connection, too.
fn ruleset(netns: &Netns) -> Vec<String> {
    let mut all = Vec::new();
    for variant in VARIANTS {
        let save = netns.output(&format!("{variant}-save"), &[]).expect("rules");
        all.extend(save.lines().filter(|line| !line.starts_with('#')).map(|line| format!("{variant}: {line}")));
    }
    let nft = netns.output("nft", &["list", "ruleset"]).expect("tables");
    all.extend(nft.lines().map(str::to_owned));
    for line in &mut all {
        *line = uncounted(line);
    }
    all.push(netns.output("ip", &["-br", "link"]).expect("links"));
    all
}

/// A line with its counts set to nothing: `[5:300]` of a chain, `packets 5 bytes 300` of a rule.
fn uncounted(line: &str) -> String {
    let mut count = false;
    let words = line.split(' ').map(|word| {
        let is = std::mem::replace(&mut count, matches!(word, "packets" | "bytes"));
        if is || (word.starts_with('[') && word.ends_with(']')) { "#" } else { word }
    });
    words.collect::<Vec<_>>().join(" ")
}

/// Lines that only one of them has.
fn difference(got: &[String], want: &[String]) -> Vec<String> {
    let only = |sign: char, a: &[String], b: &[String]| {
        a.iter().filter(|line| !b.contains(line)).map(|line| format!("{sign} {line}")).collect::<Vec<_>>()
    };
    [only('+', got, want), only('-', want, got)].concat()
}

fn same(got: &[String], want: &[String], what: &str) {
    assert!(got == want, "{what}:\n{}", difference(got, want).join("\n"));
}

fn cleanup(netns: &Netns, flags: &[&str]) -> Output {
    let binary = find_binary().expect("the agent");
    let mut command = netns.command(&binary.display().to_string());
    command.args(["cleanup", "--kube-proxy"]).args(flags).output().expect("started")
}

/// Answers `/readyz` and `/healthz` as our agent (`ready`), or the first of them as kube-proxy.
fn answer(netns: &Netns, ready: bool) -> u16 {
    let listener = netns.run(|| TcpListener::bind((Ipv4Addr::LOCALHOST, 0))).expect("entered").expect("a port");
    let port = listener.local_addr().expect("its address").port();
    std::thread::spawn(move || {
        for stream in listener.incoming().take(if ready { 2 } else { 1 }) {
            let mut stream = stream.expect("a connection");
            let mut asked = Vec::new();
            while !asked.ends_with(b"\r\n\r\n") {
                let mut byte = [0];
                stream.read_exact(&mut byte).expect("a request");
                asked.extend(byte);
            }
            let ours = asked.starts_with(b"GET /readyz");
            let answer = match (ours, ready) {
                (true, false) => "HTTP/1.1 404 Not Found\r\n\r\n",
                (true, true) => "HTTP/1.1 200 OK\r\n\r\n{\"agent\": \"proxy-agent\",\"ready\": true}",
                (false, _) => "HTTP/1.1 200 OK\r\n\r\n{}",
            };
            stream.write_all(answer.as_bytes()).expect("an answer");
        }
    });
    port
}

#[test]
fn leavings_of_kube_proxy_go_and_nothing_else() {
    let netns = Netns::create(&format!("kpface-{}", std::process::id())).expect("a namespace");
    netns.ip("link set lo up\n").expect("loopback");
    for variant in VARIANTS {
        netns.feed(&format!("{variant}-restore"), &["--noflush"], FOREIGN).expect(variant);
    }
    netns.feed("nft", &["-f", "-"], NFT_FOREIGN).expect("nft");
    let before = ruleset(&netns);
    for variant in VARIANTS {
        netns.feed(&format!("{variant}-restore"), &["--noflush"], LEAVINGS).expect(variant);
    }
    netns.feed("nft", &["-f", "-"], NFT_LEAVINGS).expect("nft");
    // Any kind of link will do: kernels without the dummy module are common in containers.
    netns.ip("link add kube-ipvs0 type bridge\n").expect("a link");
    let dirty = ruleset(&netns);
    assert!(dirty.len() > before.len() + 4 * 30, "the leavings are there");

    // Without an agent that serves, and with kube-proxy in its place, nothing happens.
    let nobody = "127.0.0.1:9".to_owned();
    let other = format!("127.0.0.1:{}", answer(&netns, false));
    for (address, found) in
        [(nobody, "Connection refused (os error 111)"), (other, "/readyz says \"HTTP/1.1 404 Not Found\"")]
    {
        let refused = cleanup(&netns, &["--healthz", &address]);
        let want = format!(
            "proxy-agent: the agent does not answer at {address} that all Services are in the maps ({found}); nothing was \
             removed. Wait until it is ready, give its address with --healthz, or use --force\n"
        );
        assert_eq!((refused.status.success(), String::from_utf8_lossy(&refused.stderr).into_owned()), (false, want));
        same(&ruleset(&netns), &dirty, "refused, and nothing changed");
    }

    let told = cleanup(&netns, &["--dry-run", "--force"]);
    assert!(told.status.success(), "{}", String::from_utf8_lossy(&told.stderr));
    same(&ruleset(&netns), &dirty, "a dry run changes nothing");

    let address = format!("127.0.0.1:{}", answer(&netns, true));
    let done = cleanup(&netns, &["--healthz", &address]);
    assert!(done.status.success(), "{}", String::from_utf8_lossy(&done.stderr));
    let said = String::from_utf8_lossy(&done.stdout).into_owned();
    assert_eq!(said, String::from_utf8_lossy(&told.stdout), "the dry run told the same");
    for line in [
        "iptables-legacy: table nat: rule PREROUTING -m comment --comment \"kubernetes service portals\" -j KUBE-SERVICES",
        "ip6tables-nft: table filter: chain KUBE-FORWARD",
        "iptables-nft: table nat: rule CNI-HOSTPORT -p udp -j KUBE-EXT-BBBBBBBBBBBBBBBB",
        "nftables: table ip kube-proxy",
        "nftables: table ip6 kube-proxy",
        "link: kube-ipvs0",
    ] {
        assert!(said.lines().any(|said| said.contains(line)), "{line} in\n{said}");
    }
    same(&ruleset(&netns), &before, "what is not kube-proxy's is as it was");
    let again = cleanup(&netns, &["--force"]);
    assert_eq!(String::from_utf8_lossy(&again.stdout), "nothing of kube-proxy is here\n");
    netns.remove().expect("gone");
}
