//! Waiting until interfaces carry packets. Carrier changes reach the kernel's queues, bridges and IPv6 later than the
//! command that made them returns; the first packets in between would be lost.

use serde::Deserialize;

use crate::deadline::Deadline;
use crate::error::{Context as _, Error, Result};
use crate::netns::Netns;

/// How long that may take: the kernel's queue of such events is the whole machine's.
const PATIENCE_SECS: u64 = 60;

/// A link as `ip -json -details link` shows it.
#[derive(Clone, Debug, Deserialize, PartialEq, Eq)]
pub(crate) struct Link {
    pub(crate) ifname: String,
    pub(crate) ifindex: u32,
    pub(crate) address: Option<String>,
    operstate: String,
    linkinfo: Option<LinkInfo>,
}

#[derive(Clone, Debug, Deserialize, PartialEq, Eq)]
struct LinkInfo {
    info_slave_data: Option<Port>,
}

#[derive(Clone, Debug, Deserialize, PartialEq, Eq)]
struct Port {
    state: Option<String>,
}

impl Link {
    /// Is it up for the whole kernel and, if it is a bridge port, forwarding?
    fn carries(&self) -> bool {
        let port = self.linkinfo.as_ref().and_then(|info| info.info_slave_data.as_ref());
        let forwarding = port.and_then(|port| port.state.as_deref()).is_none_or(|state| state == "forwarding");
        self.operstate == "UP" && forwarding
    }
}

/// Waits until every one of `names` carries packets; gives them in the order of `names`.
pub(crate) fn wait_carrying(netns: &Netns, names: &[&str]) -> Result<Vec<Link>> {
    let what = format!("{} in {} carry packets", names.join(", "), netns.name());
    Deadline::secs(PATIENCE_SECS).poll(&what, || {
        let shown = netns.output("ip", &["-json", "-details", "link", "show"])?;
        let links = read(&shown)?;
        let named = names.iter().map(|name| {
            let link = links.iter().find(|link| link.ifname == *name);
            link.ok_or_else(|| Error::Name(format!("no link {name} in {}", netns.name())))
        });
        let named = named.collect::<Result<Vec<_>>>()?;
        let ready = named.iter().all(|link| link.carries());
        Ok(ready.then(|| named.into_iter().cloned().collect()))
    })
}

fn read(json: &str) -> Result<Vec<Link>> {
    serde_json::from_str(json).context(|| "output of `ip -json -details link show`".to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_port_carries_when_it_forwards() {
        let json = r#"[
            {"ifindex":1,"ifname":"lo","operstate":"UNKNOWN","address":"00:00:00:00:00:00"},
            {"ifindex":2,"ifname":"cni0","operstate":"UP","linkinfo":{"info_kind":"bridge","info_data":{"state":0}}},
            {"ifindex":3,"ifname":"a","operstate":"UP",
             "linkinfo":{"info_kind":"veth","info_slave_kind":"bridge","info_slave_data":{"state":"forwarding"}}},
            {"ifindex":4,"ifname":"b","operstate":"UP",
             "linkinfo":{"info_kind":"veth","info_slave_kind":"bridge","info_slave_data":{"state":"disabled"}}},
            {"ifindex":5,"ifname":"c","operstate":"LOWERLAYERDOWN","linkinfo":{"info_kind":"veth"}}]"#;
        let links = read(json).expect("JSON");
        let carrying = links.iter().map(|link| (link.ifindex, link.carries())).collect::<Vec<_>>();
        assert_eq!(carrying, [(1, false), (2, true), (3, true), (4, false), (5, false)]);
    }
}
