//! The content of the maps that the agent owns, as values.
//!
//! Flows, fragments, sockets and counters are the kernel's own and are not in here.

use std::collections::BTreeMap;
use std::fmt;
use std::net::{IpAddr, SocketAddr};

use proxy_abi::{
    BackendEntry, CgroupPodEntry, DeviceEntry, FrontendEntry, FrontendKey, IpBytes, LocalPodEntry, PortBe, PrefixKey,
    Proto, ServiceEntry,
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
    /// Interface index → interface. One with [`DeviceEntry::NETDEV`], or of a pod, has its programs attached.
    pub devices: BTreeMap<u32, DeviceEntry>,
    /// Pod address → pod interface.
    pub local_pods: BTreeMap<IpBytes, LocalPodEntry>,
    /// Address range under a scope → 1.
    pub prefixes: BTreeMap<PrefixKey, u32>,
    /// Cgroup id → pod whose sockets are translated.
    pub cgroup_pods: BTreeMap<u64, CgroupPodEntry>,
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
    /// Add an address range to a scope.
    SetPrefix(PrefixKey, u32),
    /// Take it out.
    DeletePrefix(PrefixKey),
    /// Translate the sockets of a pod.
    SetCgroupPod(u64, CgroupPodEntry),
    /// Leave them to its packets.
    DeleteCgroupPod(u64),
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
    /// Address range.
    Prefix(PrefixKey),
    /// Cgroup id.
    CgroupPod(u64),
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
            Self::SetPrefix(key, _) | Self::DeletePrefix(key) => Row::Prefix(*key),
            Self::SetCgroupPod(id, _) | Self::DeleteCgroupPod(id) => Row::CgroupPod(*id),
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
            Op::SetPrefix(key, value) => drop(self.prefixes.insert(*key, *value)),
            Op::DeletePrefix(key) => drop(self.prefixes.remove(key)),
            Op::SetCgroupPod(id, entry) => drop(self.cgroup_pods.insert(*id, *entry)),
            Op::DeleteCgroupPod(id) => drop(self.cgroup_pods.remove(id)),
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
            write!(f, "backend {id} {} service {service} generation {generation}", end(ip, port, proto))?;
            write_flags(f, flags, &BACKEND_FLAGS)?;
            writeln!(f)?;
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
            write_device(f, *ifindex, entry)?;
        }
        let mut pods: Vec<_> = self.local_pods.iter().collect();
        pods.sort_by_key(|(ip, _)| IpAddr::from(**ip));
        for (ip, entry) in pods {
            let LocalPodEntry { ifindex, mac, slot, flags } = *entry;
            writeln!(f, "local_pod {ip} device {ifindex} pod {mac} path {} policy {slot}", path(flags))?;
        }
        let mut prefixes: Vec<_> = self.prefixes.keys().collect();
        prefixes.sort_by_key(|key| (key.scope, IpAddr::from(key.ip), key.length));
        prefixes.into_iter().try_for_each(|key| write_prefix(f, *key))?;
        for (id, CgroupPodEntry { ip4, ip6, ifindex, reserved: _ }) in &self.cgroup_pods {
            write!(f, "cgroup_pod {id} device {ifindex}")?;
            write_known(f, [*ip4, *ip6])?;
            writeln!(f)?;
        }
        Ok(())
    }
}

fn write_device(f: &mut fmt::Formatter<'_>, ifindex: u32, entry: &DeviceEntry) -> fmt::Result {
    let DeviceEntry { ip4, ip6, gateway_ip4, gateway_ip6, pod_mac, gateway_mac, bridge, flags, slot, mtu, .. } = *entry;
    // Another device than a pod's is its own gateway: see the table in `proxy_abi::device`.
    if bridge == 0 && pod_mac == gateway_mac {
        write!(f, "device {ifindex} {pod_mac}")?;
        write_known(f, [ip4, ip6])?;
        let programs = if flags & DeviceEntry::NETDEV == 0 { "none" } else { "netdev" };
        return writeln!(f, " programs {programs} mtu {mtu}");
    }
    write!(f, "device {ifindex} pod {pod_mac}")?;
    write_known(f, [ip4, ip6])?;
    write!(f, " gateway {gateway_mac}")?;
    write_known(f, [gateway_ip4, gateway_ip6])?;
    write!(f, " bridge {bridge} path {} policy {slot}", path(flags))?;
    if mtu != 0 {
        write!(f, " mtu {mtu}")?;
    }
    writeln!(f)
}

fn write_prefix(f: &mut fmt::Formatter<'_>, key: PrefixKey) -> fmt::Result {
    let bits = key.length.saturating_sub(32 + if key.ip.is_v4() { 96 } else { 0 });
    match key.scope {
        PrefixKey::SERVICE_CIDR => writeln!(f, "prefix {}/{bits} service range", key.ip),
        PrefixKey::LOCAL_SOURCE => writeln!(f, "prefix {}/{bits} local source", key.ip),
        service => writeln!(f, "prefix {}/{bits} source of service {service}", key.ip),
    }
}

const BACKEND_FLAGS: [(u32, &str); 3] =
    [(BackendEntry::LOCAL, "local"), (BackendEntry::IN_CLUSTER, "in-cluster"), (BackendEntry::IN_LOCAL, "in-local")];

const FRONTEND_FLAGS: [(u32, &str); 11] = [
    (FrontendEntry::MASQUERADE, "masquerade"),
    (FrontendEntry::MASQUERADE_OUTSIDE, "masquerade-outside"),
    (FrontendEntry::EXTERNAL_SPLIT, "external-split"),
    (FrontendEntry::DROP_EMPTY, "drop-empty"),
    (FrontendEntry::LOCAL_SET, "local-set"),
    (FrontendEntry::SOURCE_RANGES, "source-ranges"),
    (FrontendEntry::NODE_ALLOWED, "node-allowed"),
    (FrontendEntry::ADDRESS_REJECT, "reject"),
    (FrontendEntry::ADDRESS_NODE_PORT, "node-port"),
    (FrontendEntry::ADDRESS_NODE, "node"),
    (FrontendEntry::ADDRESS_LOOPBACK, "loopback"),
];

/// The names of the flags that are set, each with a space in front; what has no name as a number.
fn write_flags(f: &mut fmt::Formatter<'_>, flags: u32, names: &[(u32, &str)]) -> fmt::Result {
    let mut rest = flags;
    for (flag, name) in names.iter().filter(|(flag, _)| flags & flag != 0) {
        rest &= !flag;
        write!(f, " {name}")?;
    }
    if rest == 0 { Ok(()) } else { write!(f, " flags {rest:#x}") }
}

fn write_frontend(f: &mut fmt::Formatter<'_>, key: &FrontendKey, entry: &FrontendEntry) -> fmt::Result {
    if *key == FrontendKey::address(key.ip) {
        write!(f, "frontend {} address", key.ip)?;
        write_flags(f, entry.flags, &FRONTEND_FLAGS)?;
        return writeln!(f);
    }
    let FrontendEntry { first, count, service, flags, affinity_seconds, generation } = *entry;
    write!(f, "frontend {}", end(key.ip, key.port, key.proto))?;
    match key.scope {
        FrontendKey::SCOPE_CLUSTER => {}
        FrontendKey::SCOPE_EXTERNAL => f.write_str(" from outside")?,
        scope => write!(f, " scope {scope}")?,
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
    write_flags(f, flags, &FRONTEND_FLAGS)?;
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
