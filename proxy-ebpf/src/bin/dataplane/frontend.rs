//! Which frontend a packet or a socket asks for, whether it may, and which backend it gets.

use aya_ebpf::bindings::BPF_ANY;
use aya_ebpf::helpers::bpf_get_prandom_u32;
use aya_ebpf::maps::lpm_trie::Key;
use proxy_abi::{
    AffinityEntry, AffinityKey, BackendEntry, FrontendEntry, FrontendKey, IpBytes, PortBe, PrefixKey, Proto, Reason,
};
use proxy_ebpf::{balance, conntrack};

use crate::flow;
use crate::maps::{AFFINITY, BACKEND, BACKEND_SLOT, DRY_RUN, FRONTEND, PREFIX};

#[inline(always)]
pub(crate) fn random() -> u32 {
    // SAFETY: no arguments.
    unsafe { bpf_get_prandom_u32() }
}

/// Is an address in one of the ranges of a scope? A function of its own, because the trie wants its key on the stack.
#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn prefix_contains(ip: *const IpBytes, scope: u32) -> u32 {
    // SAFETY: the caller's.
    let Some(ip) = (unsafe { ip.as_ref() }) else { return 0 };
    let whole = PrefixKey::exact(scope, *ip);
    let [a, b, c, d] = whole.ip.0;
    u32::from(PREFIX.get(&Key::new(whole.length, [whole.scope, a, b, c, d])).is_some())
}

/// Is an address in one of the ranges of a scope?
#[inline(always)]
pub(crate) fn is_within(ip: &IpBytes, scope: u32) -> bool {
    prefix_contains(ip, scope) != 0
}

#[inline(always)]
fn entry(ip: &IpBytes, port: PortBe, proto: Proto, scope: u8) -> Option<*const FrontendEntry> {
    FRONTEND.get_ptr(&FrontendKey { ip: *ip, port, proto, scope })
}

/// What an address is, whatever the port: flags `ADDRESS_*` of [`FrontendEntry`]; 0 = nothing to us.
#[inline(always)]
pub(crate) fn address(ip: &IpBytes) -> u32 {
    // SAFETY: a pointer into a map that was just found.
    FRONTEND.get_ptr(&FrontendKey::address(*ip)).map_or(0, |mark| unsafe { (*mark).flags })
}

/// The frontend at an address and port, as pods and the node see it; without one, what the address is.
#[inline(always)]
pub(crate) fn look_up(ip: &IpBytes, port: PortBe, proto: Proto) -> Result<*const FrontendEntry, u32> {
    if let Some(found) = entry(ip, port, proto, FrontendKey::SCOPE_CLUSTER) {
        return Ok(found);
    }
    let mark = address(ip);
    if mark & FrontendEntry::ADDRESS_NODE_PORT != 0
        && let Some(found) = entry(&FrontendKey::wildcard(ip.is_v4()), port, proto, FrontendKey::SCOPE_CLUSTER)
    {
        return Ok(found);
    }
    Err(mark)
}

/// The same as the outside sees it, where that is another one.
#[inline(always)]
pub(crate) fn from_outside(ip: &IpBytes, port: PortBe, proto: Proto) -> Option<*const FrontendEntry> {
    entry(ip, port, proto, FrontendKey::SCOPE_EXTERNAL)
        .or_else(|| entry(&FrontendKey::wildcard(ip.is_v4()), port, proto, FrontendKey::SCOPE_EXTERNAL))
}

/// A backend that serves, for a client; with its id. By chance, or the one that the client had before.
#[inline(always)]
pub(crate) fn choose(entry: &FrontendEntry, client: &IpBytes) -> Result<(u32, &'static BackendEntry), Reason> {
    if entry.affinity_seconds != 0 {
        let id = affinity_recall(entry, client);
        if id != 0
            && let Some(backend) = BACKEND.get(id)
        {
            return Ok((id, backend));
        }
    }
    let slot = balance::pick(random(), entry.count).ok_or(Reason::NoBackend)?;
    let id = *BACKEND_SLOT.get(entry.first.wrapping_add(slot)).ok_or(Reason::BackendMissing)?;
    let backend = BACKEND.get(id).ok_or(Reason::BackendMissing)?;
    if backend.generation == 0 {
        return Err(Reason::BackendMissing);
    }
    if entry.affinity_seconds != 0 {
        affinity_remember(entry, client, id, backend.generation);
    }
    Ok((id, backend))
}

/// The backend that a client was sent to last, if it still takes new connections of this frontend and the time-out has
/// not run out; 0 otherwise. Slides the time-out.
#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn affinity_recall(entry: *const FrontendEntry, client: *const IpBytes) -> u32 {
    // SAFETY: the caller's: the stack, or a pointer into a map that was just found.
    let (Some(entry), Some(client)) = (unsafe { (entry.as_ref(), client.as_ref()) }) else { return 0 };
    let key = AffinityKey { service: entry.service, reserved: 0, client: *client };
    let Some(known) = AFFINITY.get_ptr_mut(&key) else { return 0 };
    // SAFETY: a pointer into a map that was just found. Single fields are written without a lock: two new connections of
    // one client at the same time both write the present.
    let known = unsafe { &mut *known };
    let now = flow::now();
    if now.saturating_sub(known.last_used) > u64::from(entry.affinity_seconds) * conntrack::SECOND {
        return 0;
    }
    let id = known.backend;
    let set =
        if entry.flags & FrontendEntry::LOCAL_SET != 0 { BackendEntry::IN_LOCAL } else { BackendEntry::IN_CLUSTER };
    let eligible = BACKEND.get(id).is_some_and(|b| b.generation == known.generation && b.flags & set != 0);
    if !eligible {
        return 0;
    }
    if DRY_RUN.load() == 0 {
        known.last_used = now;
    }
    id
}

#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn affinity_remember(entry: *const FrontendEntry, client: *const IpBytes, id: u32, generation: u32) -> u32 {
    if DRY_RUN.load() != 0 {
        return 0;
    }
    // SAFETY: as in `affinity_recall`.
    let (Some(entry), Some(client)) = (unsafe { (entry.as_ref(), client.as_ref()) }) else { return 0 };
    let key = AffinityKey { service: entry.service, reserved: 0, client: *client };
    let value = AffinityEntry { backend: id, generation, last_used: flow::now() };
    // A map that takes nothing costs affinity, not the connection.
    let _ = AFFINITY.insert(&key, &value, u64::from(BPF_ANY));
    0
}

/// Does the backend that a flow was made with still serve?
#[inline(always)]
pub(crate) fn serves(backend: u32, generation: u32) -> bool {
    BACKEND.get(backend).is_some_and(|b| b.generation == generation)
}
