//! How the dataplane goes: whole, or so that connections go on without it.

use std::path::Path;

use proxy_abi::flow::state;
use proxy_abi::{FlowEntry, Proto};

use super::pins::{self, LinkPin, Pins};
use super::{Error, attach};

/// Takes no new flows any more, and keeps those that are there: for another proxy to take over. Returns what was removed,
/// and how many established flows are left; when they have ended, [`cleanup`] removes the rest.
pub fn retire(pin_root: &Path) -> Result<(Vec<String>, usize), Error> {
    let pins = Pins::new(pin_root);
    let _lock = pins.lock()?;
    let maps = pins.open()?;
    let mut removed = Vec::new();
    for pin in pins.list_links()?.into_iter().filter(|pin| matches!(pin, LinkPin::Cgroup(_))) {
        pins.remove_link(&pin)?;
        removed.push(format!("link {}", pins.link(&pin).display()));
    }
    let frontends = maps.frontend.read()?;
    for (key, _) in &frontends {
        maps.frontend.delete(key)?;
    }
    for (key, _) in maps.prefix.read()? {
        maps.prefix.delete(&key)?;
    }
    removed.push(format!("{} frontends", frontends.len()));
    // Only connections go on; what comes from a port whose connection has ended is the other proxy's.
    for (key, entry) in maps.flow_brief.read()? {
        let goes_on = (state::SYN_SENT..=state::FIN_RESPONDER).contains(&entry.state);
        if key.proto != Proto::TCP || !goes_on {
            maps.flow_brief.delete(&key)?;
        }
    }
    let flows = maps.flow_live.read()?;
    let left = flows.iter().filter(|(_, entry)| entry.flags & FlowEntry::KEY_ORIGINAL != 0 && entry.is_translated());
    Ok((removed, left.count()))
}

/// Detaches everything and removes every pin: nothing of us stays in the kernel. Returns what was removed.
pub fn cleanup(pin_root: &Path) -> Result<Vec<String>, Error> {
    let pins = Pins::new(pin_root);
    let mut removed = Vec::new();
    if pin_root.exists() {
        // Another version's are there when an agent was killed while it took them over.
        for pins in std::iter::once(pins.clone()).chain(pins.others()?) {
            for pin in pins.list_links()? {
                match &pin {
                    LinkPin::Tcx(_, ifindex) | LinkPin::Clsact(ifindex) => attach::detach(&pins, *ifindex)?,
                    LinkPin::Cgroup(_) => pins.remove_link(&pin)?,
                }
                removed.push(format!("link {}", pins.link(&pin).display()));
            }
        }
        for layout in pins::LAYOUTS {
            let path = pins.maps().join(layout.name);
            if path.exists() {
                removed.push(format!("map {}", path.display()));
            }
        }
        pins.remove()?;
    }
    Ok(removed)
}
