//! The content of the maps that the agent owns, as values.
//!
//! Flows, fragments, sockets and counters are the kernel's own and are not in here.

use std::collections::BTreeMap;
use std::fmt;
use std::net::{IpAddr, SocketAddr};

use proxy_abi::{
    BackendEntry, DeviceEntry, FrontendEntry, FrontendKey, IpBytes, LocalPodEntry, PortBe, Proto, ServiceEntry,
};

/// All map content that follows from the cluster and the node. The value of a key in an array map that is not named
/// here is zero.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Tables {
    /// Service id → name.
    pub services: BTreeMap<u32, ServiceEntry>,
    /// Backend id → address.
    pub backends: BTreeMap<u32, BackendEntry>,
    /// Slot → backend id.
    pub slots: BTreeMap<u32, u32>,
    /// Frontend → range of slots.
    pub frontends: BTreeMap<FrontendKey, FrontendEntry>,
    /// Interface index → pod interface. An interface in here has its programs attached.
    pub devices: BTreeMap<u32, DeviceEntry>,
    /// Pod address → pod interface.
    pub local_pods: BTreeMap<IpBytes, LocalPodEntry>,
}

/// One map operation. Each may run twice with the same result; deleting the absent succeeds.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Op {
    /// Name a service port.
    SetService(u32, ServiceEntry),
    /// Forget a service port.
    DeleteService(u32),
    /// Write a backend.
    SetBackend(u32, BackendEntry),
    /// Zero a backend: generation 0 makes its UDP flows stale at once.
    DeleteBackend(u32),
    /// Write a slot.
    SetSlot(u32, u32),
    /// Zero a slot.
    DeleteSlot(u32),
    /// Point a frontend at a range: the switch.
    SetFrontend(FrontendKey, FrontendEntry),
    /// Remove a frontend.
    DeleteFrontend(FrontendKey),
    /// Describe an interface and attach its programs.
    SetDevice(u32, DeviceEntry),
    /// Detach an interface's programs and forget it.
    DeleteDevice(u32),
    /// Bind an address to an interface.
    SetLocalPod(IpBytes, LocalPodEntry),
    /// Unbind an address.
    DeleteLocalPod(IpBytes),
}

/// The row that an operation writes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Row {
    /// Service id.
    Service(u32),
    /// Backend id.
    Backend(u32),
    /// Slot.
    Slot(u32),
    /// Frontend.
    Frontend(FrontendKey),
    /// Interface index.
    Device(u32),
    /// Pod address.
    LocalPod(IpBytes),
}

impl Op {
    /// The row it writes.
    pub const fn row(&self) -> Row {
        match self {
            Self::SetService(id, _) | Self::DeleteService(id) => Row::Service(*id),
            Self::SetBackend(id, _) | Self::DeleteBackend(id) => Row::Backend(*id),
            Self::SetSlot(slot, _) | Self::DeleteSlot(slot) => Row::Slot(*slot),
            Self::SetFrontend(key, _) | Self::DeleteFrontend(key) => Row::Frontend(*key),
            Self::SetDevice(ifindex, _) | Self::DeleteDevice(ifindex) => Row::Device(*ifindex),
            Self::SetLocalPod(ip, _) | Self::DeleteLocalPod(ip) => Row::LocalPod(*ip),
        }
    }
}

impl Tables {
    /// Does what the operation says, as the kernel would.
    pub fn apply(&mut self, op: &Op) {
        match op {
            Op::SetService(id, entry) => drop(self.services.insert(*id, *entry)),
            Op::DeleteService(id) => drop(self.services.remove(id)),
            Op::SetBackend(id, entry) => drop(self.backends.insert(*id, *entry)),
            Op::DeleteBackend(id) => drop(self.backends.remove(id)),
            Op::SetSlot(slot, backend) => drop(self.slots.insert(*slot, *backend)),
            Op::DeleteSlot(slot) => drop(self.slots.remove(slot)),
            Op::SetFrontend(key, entry) => drop(self.frontends.insert(*key, *entry)),
            Op::DeleteFrontend(key) => drop(self.frontends.remove(key)),
            Op::SetDevice(ifindex, entry) => drop(self.devices.insert(*ifindex, *entry)),
            Op::DeleteDevice(ifindex) => drop(self.devices.remove(ifindex)),
            Op::SetLocalPod(ip, entry) => drop(self.local_pods.insert(*ip, *entry)),
            Op::DeleteLocalPod(ip) => drop(self.local_pods.remove(ip)),
        }
    }
}

// === text: one line per row, sorted as people sort; the same form in goldens, `status` and bug reports ===

impl fmt::Display for Tables {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (id, entry) in &self.services {
            writeln!(f, "service {id} {}", entry.name.as_str())?;
        }
        for (id, entry) in &self.backends {
            let BackendEntry { ip, service, generation, port, proto, reserved: _, flags } = *entry;
            let local = if flags & BackendEntry::LOCAL == 0 { "" } else { " local" };
            writeln!(f, "backend {id} {} service {service} generation {generation}{local}", end(ip, port, proto))?;
        }
        for (slot, backend) in &self.slots {
            writeln!(f, "slot {slot} backend {backend}")?;
        }
        let mut frontends: Vec<_> = self.frontends.iter().collect();
        frontends.sort_by_key(|(key, _)| (IpAddr::from(key.ip), key.port.get(), key.proto, key.scope));
        for (key, entry) in frontends {
            write_frontend(f, key, entry)?;
        }
        for (ifindex, entry) in &self.devices {
            let DeviceEntry { ip4, ip6, gateway_ip4, gateway_ip6, pod_mac, gateway_mac, bridge, flags, slot, .. } =
                *entry;
            write!(f, "device {ifindex} pod {pod_mac}")?;
            write_known(f, [ip4, ip6])?;
            write!(f, " gateway {gateway_mac}")?;
            write_known(f, [gateway_ip4, gateway_ip6])?;
            write!(f, " bridge {bridge}")?;
            writeln!(f, " path {} policy {slot}", path(flags))?;
        }
        let mut pods: Vec<_> = self.local_pods.iter().collect();
        pods.sort_by_key(|(ip, _)| IpAddr::from(**ip));
        for (ip, entry) in pods {
            let LocalPodEntry { ifindex, mac, slot, flags } = *entry;
            writeln!(f, "local_pod {ip} device {ifindex} pod {mac} path {} policy {slot}", path(flags))?;
        }
        Ok(())
    }
}

fn write_frontend(f: &mut fmt::Formatter<'_>, key: &FrontendKey, entry: &FrontendEntry) -> fmt::Result {
    if *key == FrontendKey::address(key.ip) {
        return writeln!(f, "frontend {} address", key.ip);
    }
    let FrontendEntry { first, count, service, flags, affinity_seconds, generation } = *entry;
    write!(f, "frontend {}", end(key.ip, key.port, key.proto))?;
    if key.scope != FrontendKey::SCOPE_CLUSTER {
        write!(f, " scope {}", key.scope)?;
    }
    write!(f, " service {service}")?;
    match count {
        0 => write!(f, " no slots")?,
        1 => write!(f, " slot {first}")?,
        _ => write!(f, " slots {first}-{}", first.saturating_add(count - 1))?,
    }
    write!(f, " generation {generation}")?;
    if affinity_seconds != 0 {
        write!(f, " affinity {affinity_seconds}s")?;
    }
    if flags != 0 {
        write!(f, " flags {flags:#x}")?;
    }
    writeln!(f)
}

fn write_known(f: &mut fmt::Formatter<'_>, ips: [IpBytes; 2]) -> fmt::Result {
    ips.into_iter().filter(|ip| *ip != IpBytes::UNSPECIFIED).try_for_each(|ip| write!(f, " {ip}"))
}

/// `address:port/protocol`.
fn end(ip: IpBytes, port: PortBe, proto: Proto) -> String {
    format!("{}/{proto}", SocketAddr::new(ip.into(), port.get()))
}

/// The flags of a device, in words.
const fn path(flags: u32) -> &'static str {
    match (flags & DeviceEntry::REDIRECT != 0, flags & DeviceEntry::SWITCH != 0) {
        (true, _) => "redirect",
        (false, true) => "switch",
        (false, false) => "stack",
    }
}
