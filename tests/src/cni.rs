//! The record that libcni keeps of a pod's attachment: `cniCacheV1`, one file per pod and interface.

use std::fs;
use std::io::Write as _;
use std::net::IpAddr;
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use serde_json::{Value, json};

use crate::address::{Mac, Network};
use crate::error::{Context as _, Result};

/// Name of the CNI network.
pub const NETWORK: &str = "cbr0";

/// What the bridge plugin did for one pod.
#[derive(Clone, Debug)]
pub(crate) struct Attachment<'a> {
    pub(crate) dir: &'a Path,
    pub(crate) namespace: &'a str,
    pub(crate) name: &'a str,
    pub(crate) uid: &'a str,
    pub(crate) container_id: &'a str,
    pub(crate) sandbox: &'a Path,
    pub(crate) bridge: (&'a str, Mac),
    pub(crate) host_veth: (&'a str, Mac),
    pub(crate) pod_mac: Mac,
    pub(crate) addresses: [(IpAddr, Network); 2],
    pub(crate) gateways: [IpAddr; 2],
    pub(crate) mtu: u16,
}

/// Writes the record the way libcni does: in place, in one write, mode 0600. A reader waits for the close.
pub(crate) fn write_result(attachment: &Attachment<'_>) -> Result<PathBuf> {
    let path = attachment.dir.join(format!("{NETWORK}-{}-eth0", attachment.container_id));
    let file = fs::OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(&path);
    let mut file = file.context(|| format!("create {}", path.display()))?;
    file.write_all(record(attachment).to_string().as_bytes()).context(|| format!("write {}", path.display()))?;
    Ok(path)
}

fn record(attachment: &Attachment<'_>) -> Value {
    let Attachment {
        namespace,
        name,
        uid,
        container_id,
        sandbox,
        bridge,
        host_veth,
        pod_mac,
        addresses,
        gateways,
        mtu,
        ..
    } = attachment;
    let config = json!({
        "cniVersion": "1.0.0", "name": NETWORK, "type": "bridge", "bridge": bridge.0, "mtu": mtu,
        "isGateway": true, "isDefaultGateway": true, "hairpinMode": false, "ipMasq": false,
        "ipam": { "type": "host-local", "ranges": addresses.map(|(_, range)| json!([{ "subnet": range.to_string() }])) },
    });
    let ips: Vec<Value> = addresses
        .iter()
        .zip(gateways)
        .map(|((ip, range), gateway)| {
            json!({ "interface": 2, "address": format!("{ip}/{}", range.len), "gateway": gateway })
        })
        .collect();
    let routes: Vec<Value> = ["0.0.0.0/0", "::/0"]
        .iter()
        .zip(gateways)
        .map(|(destination, gateway)| json!({ "dst": destination, "gw": gateway }))
        .collect();
    json!({
        "kind": "cniCacheV1",
        "containerId": container_id,
        "config": STANDARD.encode(config.to_string()),
        "ifName": "eth0",
        "networkName": NETWORK,
        "netns": sandbox,
        "cniArgs": [
            ["IgnoreUnknown", "1"],
            ["K8S_POD_NAMESPACE", namespace],
            ["K8S_POD_NAME", name],
            ["K8S_POD_INFRA_CONTAINER_ID", container_id],
            ["K8S_POD_UID", uid],
        ],
        "result": {
            "cniVersion": "1.0.0",
            "interfaces": [
                { "name": bridge.0, "mac": bridge.1.to_string() },
                { "name": host_veth.0, "mac": host_veth.1.to_string() },
                { "name": "eth0", "mac": pod_mac.to_string(), "sandbox": sandbox },
            ],
            "ips": ips,
            "routes": routes,
            "dns": {},
        },
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::address::{Family, pod_cidr};

    #[test]
    fn record_names_veth_pod_and_addresses() {
        let attachment = Attachment {
            dir: Path::new("/unused"),
            namespace: "default",
            name: "a",
            uid: "u-1",
            container_id: "c1",
            sandbox: Path::new("/run/netns/x"),
            bridge: ("cni0", Mac([2, 0, 0, 0, 0, 1])),
            host_veth: ("veth00000001", Mac([2, 0, 0, 0, 0, 2])),
            pod_mac: Mac([2, 0, 0, 0, 0, 3]),
            addresses: Family::BOTH.map(|family| (pod_cidr(family, 1).host(2), pod_cidr(family, 1))),
            gateways: Family::BOTH.map(|family| pod_cidr(family, 1).host(1)),
            mtu: 1450,
        };
        let record = record(&attachment);
        let config = record["config"].as_str().expect("text");
        let decoded: Value = serde_json::from_slice(&STANDARD.decode(config).expect("base64")).expect("JSON");
        let expected_config = json!({
            "cniVersion": "1.0.0", "name": "cbr0", "type": "bridge", "bridge": "cni0", "mtu": 1450, "isGateway": true,
            "isDefaultGateway": true, "hairpinMode": false, "ipMasq": false,
            "ipam": {"type": "host-local", "ranges": [[{"subnet": "10.244.1.0/24"}], [{"subnet": "fd00:10:244:1::/64"}]]}});
        assert_eq!(decoded, expected_config);
        let expected = json!({
            "kind": "cniCacheV1", "containerId": "c1", "config": config, "ifName": "eth0",
            "networkName": "cbr0", "netns": "/run/netns/x",
            "cniArgs": [["IgnoreUnknown", "1"], ["K8S_POD_NAMESPACE", "default"], ["K8S_POD_NAME", "a"],
                        ["K8S_POD_INFRA_CONTAINER_ID", "c1"], ["K8S_POD_UID", "u-1"]],
            "result": {
                "cniVersion": "1.0.0",
                "interfaces": [
                    {"name": "cni0", "mac": "02:00:00:00:00:01"},
                    {"name": "veth00000001", "mac": "02:00:00:00:00:02"},
                    {"name": "eth0", "mac": "02:00:00:00:00:03", "sandbox": "/run/netns/x"}],
                "ips": [
                    {"interface": 2, "address": "10.244.1.2/24", "gateway": "10.244.1.1"},
                    {"interface": 2, "address": "fd00:10:244:1::2/64", "gateway": "fd00:10:244:1::1"}],
                "routes": [{"dst": "0.0.0.0/0", "gw": "10.244.1.1"}, {"dst": "::/0", "gw": "fd00:10:244:1::1"}],
                "dns": {}}});
        assert_eq!(record, expected);
    }
}
