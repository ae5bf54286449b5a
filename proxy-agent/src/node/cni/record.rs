//! The record that libcni keeps of an attachment: `cniCacheV1`, one file for each pod and interface.
//!
//! ```text
//!   cniArgs   K8S_POD_NAMESPACE, K8S_POD_NAME, K8S_POD_UID ──▶ the pod
//!   result    interfaces without a sandbox ──▶ bridge, host side of the veth: which of them it is, netlink knows
//!             interface `ifName` in the sandbox ──▶ addresses that are the pod's
//! ```

use std::collections::BTreeSet;
use std::net::IpAddr;
use std::sync::Arc;

use proxy_abi::MacBytes;
use proxy_core::name::ObjectName;
use serde::Deserialize;

/// What the CNI did for one pod.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Attachment {
    /// Its pod.
    pub pod: ObjectName,
    /// The pod's UID.
    pub uid: Arc<str>,
    /// Interfaces that the CNI made or used on the node.
    pub host: Vec<HostInterface>,
    /// Addresses that it gave to the pod.
    pub addresses: BTreeSet<IpAddr>,
}

/// An interface of the node that a record names.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HostInterface {
    /// Name.
    pub name: Arc<str>,
    /// Its own MAC, where the record has it.
    pub mac: Option<MacBytes>,
}

/// Why a record is of no use.
#[derive(Debug, thiserror::Error)]
pub enum RecordError {
    /// No JSON, or not of this form.
    #[error("is no record of libcni: {0}")]
    Form(#[from] serde_json::Error),
    /// Another kind of record.
    #[error("is of kind {0:?}, not cniCacheV1")]
    Kind(String),
    /// The runtime does not pass the UID.
    #[error("does not name the pod's UID: the container runtime passes no K8S_POD_UID")]
    NoUid,
    /// A result of CNI 0.2 or older.
    #[error("names no interface: the plugin answers as CNI 0.2 or older did")]
    NoInterfaces,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Cached {
    kind: Option<String>,
    if_name: Option<String>,
    cni_args: Option<Vec<(String, String)>>,
    result: Option<Outcome>,
}

#[derive(Deserialize)]
struct Outcome {
    interfaces: Option<Vec<Interface>>,
    ips: Option<Vec<Address>>,
}

#[derive(Deserialize)]
struct Interface {
    name: Option<String>,
    mac: Option<String>,
    sandbox: Option<String>,
}

#[derive(Deserialize)]
struct Address {
    interface: Option<usize>,
    address: Option<String>,
}

/// Reads a record. `None` when it is of no pod, or of an interface that does not leave the pod, such as its loopback.
pub fn parse(bytes: &[u8]) -> Result<Option<Attachment>, RecordError> {
    let Cached { kind, if_name, cni_args, result } = serde_json::from_slice(bytes)?;
    let kind = kind.unwrap_or_default();
    if kind != "cniCacheV1" {
        return Err(RecordError::Kind(kind));
    }
    let argument = |key: &str| {
        let mut pairs = cni_args.iter().flatten();
        pairs.find(|(name, value)| name == key && !value.is_empty()).map(|(_, value)| value.as_str())
    };
    let (Some(namespace), Some(name)) = (argument("K8S_POD_NAMESPACE"), argument("K8S_POD_NAME")) else {
        return Ok(None);
    };
    let uid = argument("K8S_POD_UID").ok_or(RecordError::NoUid)?;
    let Outcome { interfaces, ips } = result.unwrap_or(Outcome { interfaces: None, ips: None });
    let interfaces = interfaces.ok_or(RecordError::NoInterfaces)?;
    let in_sandbox = |interface: &Interface| interface.sandbox.as_deref().is_some_and(|path| !path.is_empty());
    let host: Vec<_> =
        interfaces.iter().filter(|interface| !in_sandbox(interface)).filter_map(host_interface).collect();
    if host.is_empty() {
        return Ok(None);
    }
    // An address that names no interface is the pod's; so is one that names an interface that is not in the list.
    let is_pods = |index: Option<usize>| match index.and_then(|index| interfaces.get(index)) {
        Some(interface) => in_sandbox(interface) && (if_name.is_none() || interface.name == if_name),
        None => true,
    };
    let ips = ips.iter().flatten().filter(|ip| is_pods(ip.interface));
    let addresses = ips.filter_map(|ip| address(ip.address.as_deref()?)).collect();
    Ok(Some(Attachment { pod: ObjectName::new(namespace, name), uid: uid.into(), host, addresses }))
}

fn host_interface(interface: &Interface) -> Option<HostInterface> {
    let name = interface.name.as_deref().filter(|name| !name.is_empty())?;
    Some(HostInterface { name: name.into(), mac: interface.mac.as_deref().and_then(mac) })
}

/// `ADDRESS/LENGTH`, or an address alone.
fn address(text: &str) -> Option<IpAddr> {
    text.split('/').next()?.parse().ok()
}

fn mac(text: &str) -> Option<MacBytes> {
    let mut bytes = [0; 6];
    let mut parts = text.split(':');
    for byte in &mut bytes {
        *byte = u8::from_str_radix(parts.next()?, 16).ok()?;
    }
    parts.next().is_none().then_some(MacBytes(bytes))
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    /// As containerd 2 with the bridge plugin writes it.
    fn bridged() -> Value {
        let sandbox = "/var/run/netns/cni-5b2d";
        json!({
            "kind": "cniCacheV1", "containerId": "c1", "config": "e30=", "ifName": "eth0", "networkName": "cbr0",
            "netns": sandbox,
            "cniArgs": [["IgnoreUnknown", "1"], ["K8S_POD_NAMESPACE", "shop"], ["K8S_POD_NAME", "web"],
                        ["K8S_POD_INFRA_CONTAINER_ID", "c1"], ["K8S_POD_UID", "u-1"]],
            "capabilityArgs": {"dns": {"Searches": ["cluster.local"]}, "portMappings": []},
            "result": {
                "cniVersion": "1.0.0", "dns": {},
                "interfaces": [
                    {"name": "cni0", "mac": "02:00:00:00:00:01"},
                    {"name": "veth1", "mac": "02:00:00:00:00:02", "mtu": 1450},
                    {"name": "eth0", "mac": "02:00:00:00:00:03", "sandbox": sandbox}],
                "ips": [
                    {"interface": 2, "address": "10.244.1.2/24", "gateway": "10.244.1.1"},
                    {"interface": 2, "address": "fd00:1::2/64", "gateway": "fd00:1::1"}],
                "routes": [{"dst": "0.0.0.0/0"}]},
        })
    }

    fn with(change: impl FnOnce(&mut Value)) -> Value {
        let mut record = bridged();
        change(&mut record);
        record
    }

    fn show(bytes: &[u8]) -> String {
        match parse(bytes) {
            Ok(None) => "-".to_owned(),
            Err(error) => error.to_string(),
            Ok(Some(Attachment { pod, uid, host, addresses })) => {
                let host: Vec<_> = host
                    .iter()
                    .map(|one| one.mac.map_or(one.name.to_string(), |mac| format!("{} {mac}", one.name)))
                    .collect();
                format!("{pod} {uid} by {host:?} has {addresses:?}")
            }
        }
    }

    #[test]
    fn records() {
        let whole =
            r#"shop/web u-1 by ["cni0 02:00:00:00:00:01", "veth1 02:00:00:00:00:02"] has {10.244.1.2, fd00:1::2}"#;
        let bare = r#"shop/web u-1 by ["cni0 02:00:00:00:00:01", "veth1"] has {10.244.1.2, fd00:1::2}"#;
        let one = r#"shop/web u-1 by ["cni0 02:00:00:00:00:01", "veth1 02:00:00:00:00:02"] has {10.244.1.2}"#;
        let none = r#"shop/web u-1 by ["cni0 02:00:00:00:00:01", "veth1 02:00:00:00:00:02"] has {}"#;
        let no_uid = "does not name the pod's UID: the container runtime passes no K8S_POD_UID";
        let old = "names no interface: the plugin answers as CNI 0.2 or older did";
        let rows = [
            ("bridge plugin", bridged(), whole),
            ("CNI 0.3 names the family", with(|r| r["result"]["ips"][0]["version"] = "4".into()), whole),
            ("an address of the bridge", with(|r| r["result"]["ips"][1]["interface"] = 0.into()), one),
            (
                "an address of another interface of the pod",
                with(|r| {
                    let second = json!({"name": "net1", "sandbox": "/x"});
                    r["result"]["interfaces"].as_array_mut().unwrap().push(second);
                    r["result"]["ips"][1]["interface"] = 3.into();
                }),
                one,
            ),
            (
                "no interface named",
                with(|r| {
                    r["result"]["ips"][0].as_object_mut().unwrap().remove("interface");
                }),
                whole,
            ),
            ("an interface that is not there", with(|r| r["result"]["ips"][0]["interface"] = 9.into()), whole),
            (
                "no MAC",
                with(|r| {
                    r["result"]["interfaces"][1].as_object_mut().unwrap().remove("mac");
                }),
                bare,
            ),
            ("no MAC that is one", with(|r| r["result"]["interfaces"][1]["mac"] = "02:00".into()), bare),
            (
                "no addresses",
                with(|r| {
                    r["result"].as_object_mut().unwrap().remove("ips");
                }),
                none,
            ),
            ("an address that is none", with(|r| r["result"]["ips"][1]["address"] = "fd00::g/64".into()), one),
            (
                "loopback",
                with(|r| {
                    r["ifName"] = "lo".into();
                    r["result"]["interfaces"] = json!([{"name": "lo", "sandbox": "/x"}]);
                }),
                "-",
            ),
            ("no pod's", with(|r| r["cniArgs"] = json!([["IgnoreUnknown", "1"]])), "-"),
            ("no arguments", with(|r| r["cniArgs"] = Value::Null), "-"),
            (
                "an old runtime",
                with(|r| {
                    r["cniArgs"].as_array_mut().unwrap().pop();
                }),
                no_uid,
            ),
            ("an empty UID", with(|r| r["cniArgs"][4][1] = "".into()), no_uid),
            ("CNI 0.2", with(|r| r["result"] = json!({"cniVersion": "0.2.0", "ip4": {"ip": "10.244.1.2/24"}})), old),
            ("no result", with(|r| r["result"] = Value::Null), old),
            ("another kind", with(|r| r["kind"] = "cniCacheV2".into()), "is of kind \"cniCacheV2\", not cniCacheV1"),
            (
                "no kind: libcni 0.7",
                with(|r| {
                    r.as_object_mut().unwrap().remove("kind");
                }),
                "is of kind \"\", not cniCacheV1",
            ),
        ];
        for (case, record, want) in rows {
            assert_eq!(show(record.to_string().as_bytes()), want, "{case}");
        }
        let half = bridged().to_string();
        for broken in ["", "{", "[]", &half[..half.len() / 2]] {
            assert!(show(broken.as_bytes()).starts_with("is no record of libcni: "), "{broken:?}");
        }
    }
}
