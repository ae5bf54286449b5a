//! The flow tables: where a flow lies, how it moves between them.
//!
//! `flow_live` is looked at first for TCP; an established connection costs one lookup. Everything else is in
//! `flow_brief`. A flow that is promoted leaves its entries in `flow_brief` behind: they are the first to be evicted,
//! have the same content but for the state, and serve the last packets after the flow has left `flow_live`.

use aya_ebpf::bindings::{BPF_ANY, BPF_NOEXIST};
use proxy_abi::flow::state;
use proxy_abi::{FlowEntry, FlowKey, Hook, Proto, Reason, Work};
use proxy_ebpf::conntrack::{self, UdpIdle};

use crate::ctx::{copy, copy_flow, forget, write_key};
use crate::exit::count;
use crate::maps::{DRY_RUN, FLOW_BRIEF, FLOW_LIVE, POD_FLOWS, POD_QUOTA, UDP_ASSURED, UDP_UNREPLIED, own_work};

/// The entry under a key.
#[inline(always)]
pub(crate) fn find(key: &FlowKey) -> Option<*mut FlowEntry> {
    if key.proto == Proto::TCP
        && let Some(entry) = FLOW_LIVE.get_ptr_mut(key)
    {
        return Some(entry);
    }
    FLOW_BRIEF.get_ptr_mut(key)
}

/// Coarse CLOCK_MONOTONIC in nanoseconds.
#[inline(always)]
pub(crate) fn now() -> u64 {
    // SAFETY: reads a clock.
    unsafe { aya_ebpf::helpers::bpf_ktime_get_coarse_ns() }
}

/// Has a flow that is not TCP been idle for longer than the settings allow?
#[inline(always)]
pub(crate) fn is_idle(state: u8, idle: u64) -> bool {
    let most = UdpIdle { unreplied: UDP_UNREPLIED.load(), assured: UDP_ASSURED.load() };
    conntrack::is_idle(state, idle, most)
}

/// What inserting with BPF_NOEXIST says about a key that is there.
pub(crate) const EEXIST: i32 = -17;

/// Puts an entry into `flow_brief`; in a dry run tells what that would say.
#[inline(always)]
pub(crate) fn put(key: &FlowKey, entry: &FlowEntry, mode: u32) -> Result<(), i32> {
    if DRY_RUN.load() != 0 {
        return if mode == BPF_NOEXIST && FLOW_BRIEF.get_ptr(key).is_some() { Err(EEXIST) } else { Ok(()) };
    }
    FLOW_BRIEF.insert(key, entry, u64::from(mode))
}

const ROLES: u16 = FlowEntry::KEY_ORIGINAL | FlowEntry::KEY_TRANSLATED;

/// Puts the key of the entry in `work`, by its role, beside it.
#[inline(always)]
fn own_key(work: &mut Work, proto_family: u16) {
    let (tuple, side) = if work.entry.flags & FlowEntry::KEY_ORIGINAL == 0 {
        (&work.entry.translated, FlowKey::SIDE_COMMON)
    } else if work.entry.flags & FlowEntry::INITIATOR_SIDE == 0 {
        (&work.entry.original, FlowKey::SIDE_COMMON)
    } else {
        (&work.entry.original, FlowKey::SIDE_INITIATOR)
    };
    write_key(&mut work.key, tuple, proto_family, side);
}

/// Writes state and time of a flow into both of its entries, and moves them between the tables when the state asks for
/// it. Also done once a second for a flow that is in use: it puts the other entry back if it has been evicted meanwhile
/// (a one-way UDP flow never uses the entry for its replies) and tries again what found no room in `flow_live`.
///
/// Two CPUs may do this at once for the two directions. Each writes the state that its packet leads to; the tables
/// differ by nothing but that state, and a lookup finds the flow in one of them at any moment, because an entry is
/// written to its new table before it leaves the old one.
#[inline(always)]
pub(crate) fn update(entry: *mut FlowEntry, state: u8, now: u64, proto_family: u16, hook: Hook) {
    flow_update(entry, now, u32::from(state), u32::from(proto_family), hook as u32);
}

#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn flow_update(entry: *mut FlowEntry, now: u64, state: u32, proto_family: u32, hook: u32) -> u32 {
    if DRY_RUN.load() != 0 {
        return 0;
    }
    // SAFETY: points into a map, as the caller found it, and map memory stays readable while the program runs. Single
    // fields of it are written without a lock: any order of two writers leaves a state that one of their packets led to.
    let Some(entry) = (unsafe { entry.as_mut() }) else { return 0 };
    let Some(work) = own_work() else { return 0 };
    let state = state as u8;
    copy_flow(&mut work.entry, entry);
    entry.state = state;
    entry.last_seen = now;
    let was = conntrack::is_live(work.entry.state) && work.entry.flags & FlowEntry::NOT_PROMOTED == 0;
    let moves = forget(u32::from(was) << 1 | u32::from(conntrack::is_live(state)));
    work.entry.state = state;
    work.entry.last_seen = now;
    work.entry.flags &= !FlowEntry::NOT_PROMOTED;
    let both = work.entry.flags & ROLES == ROLES;
    if moves == IN_LIVE || moves == IN_BRIEF {
        if !both {
            work.entry.flags ^= ROLES;
            flow_twin(proto_family, moves);
        }
        return 0;
    }
    flow_transfer(proto_family, moves, hook);
    if !both {
        work.entry.flags ^= ROLES;
        flow_transfer(proto_family, moves, hook);
    }
    0
}

/// Was live, is live.
const IN_LIVE: u32 = 3;
/// Was not, is not.
const IN_BRIEF: u32 = 0;
/// Was not, is live.
const PROMOTE: u32 = 1;

/// Keeps the other entry of the flow in `work` up to date, in the table where it is.
///
/// Under its key there may be another flow by now: the client has begun anew with another backend, or the entry was
/// evicted and a reply, which nobody translated, began a direct flow there. Such a stray goes; any other stays.
#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn flow_twin(proto_family: u32, moves: u32) -> u32 {
    let Some(work) = own_work() else { return 0 };
    own_key(work, proto_family as u16);
    let found = if moves == IN_LIVE { FLOW_LIVE.get_ptr_mut(&work.key) } else { FLOW_BRIEF.get_ptr_mut(&work.key) };
    let mut mode = BPF_NOEXIST;
    if let Some(found) = found {
        // SAFETY: a pointer into a map that was just found; fields are written as in `flow_update`.
        let found = unsafe { &mut *found };
        if found.original.is(&work.entry.original) && found.translated.is(&work.entry.translated) {
            renew(found, &work.entry);
            return 0;
        }
        if !is_stray(found) {
            return 0;
        }
        mode = BPF_ANY;
    }
    if moves == IN_LIVE {
        if FLOW_LIVE.insert(&work.key, &work.entry, u64::from(BPF_NOEXIST)).is_ok() {
            charge(&mut work.entry, 1);
        }
    } else {
        let _ = FLOW_BRIEF.insert(&work.key, &work.entry, u64::from(mode));
    }
    0
}

/// Writes what changes in a flow into an entry of it.
#[inline(always)]
fn renew(found: &mut FlowEntry, flow: &FlowEntry) {
    found.state = flow.state;
    found.last_seen = flow.last_seen;
    copy(&mut found.last_sent, &flow.last_sent);
}

/// Is it a direct flow of which one direction was seen, or that has ended?
#[inline(always)]
fn is_stray(entry: &FlowEntry) -> bool {
    !entry.is_translated()
        && (matches!(entry.state, state::UNREPLIED | state::MIDSTREAM) || conntrack::is_over(entry.state))
}

/// Moves one entry of the flow in `work` to the other table.
#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn flow_transfer(proto_family: u32, moves: u32, hook: u32) -> u32 {
    let Some(work) = own_work() else { return 0 };
    own_key(work, proto_family as u16);
    if moves == PROMOTE {
        // A direct flow needs no entry to go on: beyond the pod's share it stays where it can be evicted.
        if has_share(&mut work.entry) == 0 {
            work.entry.flags |= FlowEntry::NOT_PROMOTED;
            let _ = FLOW_BRIEF.insert(&work.key, &work.entry, u64::from(BPF_ANY));
            work.entry.flags &= !FlowEntry::NOT_PROMOTED;
            return 0;
        }
        if FLOW_LIVE.insert(&work.key, &work.entry, u64::from(BPF_NOEXIST)).is_ok() {
            charge(&mut work.entry, 1);
            return 0;
        }
        // Another CPU promotes it with the packet before or after, and has counted it; or there is no room.
        if FLOW_LIVE.insert(&work.key, &work.entry, u64::from(BPF_ANY)).is_ok() {
            return 0;
        }
        count(if hook == Hook::FromPod as u32 { Hook::FromPod } else { Hook::ToPod }, Reason::FlowLiveFull, 0);
        work.entry.flags |= FlowEntry::NOT_PROMOTED;
        let _ = FLOW_BRIEF.insert(&work.key, &work.entry, u64::from(BPF_ANY));
        work.entry.flags &= !FlowEntry::NOT_PROMOTED;
        return 0;
    }
    // What was promoted left its row behind: as long as it is there, writing two fields of it spares an insertion.
    let left = FLOW_BRIEF.get_ptr_mut(&work.key).map(|left| {
        // SAFETY: a pointer into a map that was just found; fields are written as in `flow_update`.
        unsafe { &mut *left }
    });
    match left {
        Some(left) if left.original.is(&work.entry.original) && left.translated.is(&work.entry.translated) => {
            renew(left, &work.entry);
        }
        _ => {
            let _ = FLOW_BRIEF.insert(&work.key, &work.entry, u64::from(BPF_ANY));
        }
    }
    if FLOW_LIVE.remove(&work.key).is_ok() {
        charge(&mut work.entry, LESS);
    }
    0
}

/// One less, in a sum that wraps.
const LESS: u64 = u64::MAX;

/// Counts a flow that comes into `flow_live` or leaves it, for the pod that began it: once for its two entries, with every
/// row that is made there and every one that is removed. Without a lock, so it drifts when two CPUs count at once: the
/// agent counts anew every minute.
#[inline(always)]
fn charge(entry: &mut FlowEntry, change: u64) {
    if entry.charged_to().is_none() {
        return;
    }
    swap_charged(entry);
    if let Some(count) = POD_FLOWS.get_ptr_mut(&entry.initiator_ifindex) {
        // SAFETY: a pointer into a map that was just found. An addition of another CPU in between is lost.
        unsafe { *count = (*count).wrapping_add(change) };
    } else if change == 1 {
        let _ = POD_FLOWS.insert(&entry.initiator_ifindex, &1, u64::from(BPF_NOEXIST));
    }
    swap_charged(entry);
}

/// Makes the entry's interface index the key under which it is counted, and back: the stack has no room for another key.
#[inline(always)]
fn swap_charged(entry: &mut FlowEntry) {
    if !entry.is_translated() {
        entry.initiator_ifindex ^= FlowEntry::DIRECT_OF;
    }
}

/// May this flow be where nothing is evicted? Any but a direct one of a pod that has its share of those there.
#[inline(always)]
fn has_share(entry: &mut FlowEntry) -> u32 {
    if entry.is_translated() || entry.charged_to().is_none() {
        return 1;
    }
    swap_charged(entry);
    let over = is_over_quota(&entry.initiator_ifindex);
    swap_charged(entry);
    u32::from(!over)
}

/// Has a pod begun as many established flows as one pod may? `pod` is a key of `pod_flows`. A sum that has drifted below
/// zero is no multitude.
#[inline(always)]
pub(crate) fn is_over_quota(pod: &u32) -> bool {
    let quota = POD_QUOTA.load();
    // SAFETY: a pointer into a map that was just found.
    quota != 0 && POD_FLOWS.get_ptr(pod).is_some_and(|count| unsafe { *count }.cast_signed() >= i64::from(quota))
}

/// Takes a flow whose initiator begins anew out of both tables, under both keys. What is known of the masqueraded port of
/// one that has ended stays there: its backend may hold it in TIME_WAIT.
#[unsafe(no_mangle)]
#[inline(never)]
pub(crate) extern "C" fn flow_discard(entry: *const FlowEntry, proto_family: u32) -> u32 {
    if DRY_RUN.load() != 0 {
        return 0;
    }
    // SAFETY: as in `flow_update`.
    let Some(entry) = (unsafe { entry.as_ref() }) else { return 0 };
    let Some(work) = own_work() else { return 0 };
    copy_flow(&mut work.entry, entry);
    flow_remove(proto_family);
    let rests = FlowEntry::KEY_ORIGINAL | FlowEntry::MASQUERADED;
    if work.entry.flags & rests == rests && conntrack::is_over(work.entry.state) {
        return 0;
    }
    work.entry.flags ^= ROLES;
    flow_remove(proto_family)
}

/// Does another flow have the key under which replies to this one are looked up? `entry` is the one under the initiator's
/// key. Changes nothing but the key in `work`.
#[unsafe(no_mangle)]
#[inline(never)]
pub(crate) extern "C" fn flow_is_robbed(entry: *const FlowEntry, proto_family: u32) -> u32 {
    // SAFETY: as in `flow_update`.
    let Some(entry) = (unsafe { entry.as_ref() }) else { return 0 };
    let Some(work) = own_work() else { return 0 };
    write_key(&mut work.key, &entry.translated, proto_family as u16, FlowKey::SIDE_COMMON);
    let Some(found) = find(&work.key) else { return 0 };
    // SAFETY: a pointer into a map that was just found.
    u32::from(!is_same(Some(found), entry) && !is_stray(unsafe { &*found }))
}

/// Removes the flow in `work` from where its role says. Under the translated key there may be another flow by now, which
/// has taken over the port of one that had ended: it stays.
#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn flow_remove(proto_family: u32) -> u32 {
    let Some(work) = own_work() else { return 0 };
    own_key(work, proto_family as u16);
    if is_same(FLOW_LIVE.get_ptr(&work.key), &work.entry) && FLOW_LIVE.remove(&work.key).is_ok() {
        charge(&mut work.entry, LESS);
    }
    if is_same(FLOW_BRIEF.get_ptr(&work.key), &work.entry) {
        let _ = FLOW_BRIEF.remove(&work.key);
    }
    0
}

/// Is what was found an entry of this flow?
#[inline(always)]
fn is_same(found: Option<*const FlowEntry>, entry: &FlowEntry) -> bool {
    // SAFETY: a pointer into a map that was just found.
    found.is_some_and(|found| unsafe {
        (*found).original.is(&entry.original) && (*found).translated.is(&entry.translated)
    })
}
