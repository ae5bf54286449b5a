//! The flow tables: where a flow lies, how it moves between them.
//!
//! `flow_live` is looked at first for TCP; an established connection costs one lookup. Everything else is in
//! `flow_brief`. A flow that is promoted leaves its entries in `flow_brief` behind: they are the first to be evicted,
//! have the same content but for the state, and serve the last packets after the flow has left `flow_live`.

use aya_ebpf::bindings::{BPF_ANY, BPF_NOEXIST};
use proxy_abi::{FlowEntry, FlowKey, Hook, Proto, Reason, Work};
use proxy_ebpf::conntrack;

use crate::ctx::forget;
use crate::exit::count;
use crate::maps::{FLOW_BRIEF, FLOW_LIVE, WORK};

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

const ROLES: u16 = FlowEntry::KEY_ORIGINAL | FlowEntry::KEY_TRANSLATED;

/// Key of the entry itself, by its role.
#[inline(always)]
fn own_key(entry: &FlowEntry, proto: Proto, family: u8) -> FlowKey {
    if entry.flags & FlowEntry::KEY_ORIGINAL != 0 {
        let side = if entry.flags & FlowEntry::INITIATOR_SIDE != 0 { FlowKey::SIDE_INITIATOR } else { FlowKey::SIDE_COMMON };
        return entry.original.key(proto, family, side);
    }
    entry.translated.key(proto, family, FlowKey::SIDE_COMMON)
}

/// Writes state and time of a flow into both of its entries, and moves them between the tables when the state asks for
/// it. Also done once a second for a flow that is in use: it puts the other entry back if it has been evicted meanwhile
/// (a one-way UDP flow never uses the entry for its replies) and tries again what found no room in `flow_live`.
///
/// Two CPUs may do this at once for the two directions. Each writes the state that its packet leads to; the tables
/// differ by nothing but that state, and a lookup finds the flow in one of them at any moment, because an entry is
/// written to its new table before it leaves the old one.
#[inline(never)]
pub(crate) fn update(entry: *mut FlowEntry, state: u8, now: u64, proto_family: u16, hook: u8) -> u32 {
    let Some(work) = WORK.get_ptr_mut(0) else { return 0 };
    // SAFETY: `entry` points into a map, as the caller found it, and map memory stays readable while the program runs.
    // Single fields of it are written without a lock: any order of two writers leaves a state that one of their packets
    // led to. `work` is this CPU's own.
    let work = unsafe {
        (*work).entry = *entry;
        (*entry).state = state;
        (*entry).last_seen = now;
        &mut *work
    };
    let was = conntrack::is_live(work.entry.state) && work.entry.flags & FlowEntry::NOT_PROMOTED == 0;
    let moves = forget(u32::from(was) << 1 | u32::from(conntrack::is_live(state)));
    work.entry.state = state;
    work.entry.last_seen = now;
    work.entry.flags &= !FlowEntry::NOT_PROMOTED;
    let roles = work.entry.flags & ROLES;
    if moves == IN_LIVE || moves == IN_BRIEF {
        if roles != ROLES {
            work.entry.flags ^= ROLES;
            twin(work, proto_family, moves);
        }
        return 0;
    }
    transfer(work, proto_family, moves, hook);
    if roles != ROLES {
        work.entry.flags ^= ROLES;
        transfer(work, proto_family, moves, hook);
    }
    0
}

/// Was live, is live.
const IN_LIVE: u32 = 3;
/// Was not, is not.
const IN_BRIEF: u32 = 0;
/// Was not, is live.
const PROMOTE: u32 = 1;

/// Keeps the other entry of a flow up to date, in the table where it is.
#[inline(never)]
fn twin(work: *mut Work, proto_family: u16, moves: u32) -> u32 {
    // SAFETY: as in `update`.
    let work = unsafe { &mut *work };
    work.key = own_key(&work.entry, Proto(proto_family as u8), (proto_family >> 8) as u8);
    if moves == IN_LIVE {
        match FLOW_LIVE.get_ptr_mut(&work.key) {
            // SAFETY: a pointer into a map that was just found; fields are written as in `update`.
            Some(twin) => unsafe {
                (*twin).state = work.entry.state;
                (*twin).last_seen = work.entry.last_seen;
            },
            None => drop(FLOW_LIVE.insert(&work.key, &work.entry, u64::from(BPF_NOEXIST))),
        }
    } else {
        match FLOW_BRIEF.get_ptr_mut(&work.key) {
            // SAFETY: as above.
            Some(twin) => unsafe {
                (*twin).state = work.entry.state;
                (*twin).last_seen = work.entry.last_seen;
            },
            None => drop(FLOW_BRIEF.insert(&work.key, &work.entry, u64::from(BPF_NOEXIST))),
        }
    }
    0
}

/// Moves one entry of a flow to the other table.
#[inline(never)]
fn transfer(work: *mut Work, proto_family: u16, moves: u32, hook: u8) -> u32 {
    // SAFETY: as in `update`.
    let work = unsafe { &mut *work };
    work.key = own_key(&work.entry, Proto(proto_family as u8), (proto_family >> 8) as u8);
    if moves == PROMOTE {
        if FLOW_LIVE.insert(&work.key, &work.entry, u64::from(BPF_ANY)).is_ok() {
            return 0;
        }
        count(if hook == Hook::FromPod as u8 { Hook::FromPod } else { Hook::ToPod }, Reason::FlowLiveFull, 0);
        work.entry.flags |= FlowEntry::NOT_PROMOTED;
        let _ = FLOW_BRIEF.insert(&work.key, &work.entry, u64::from(BPF_ANY));
        work.entry.flags &= !FlowEntry::NOT_PROMOTED;
    } else {
        let _ = FLOW_BRIEF.insert(&work.key, &work.entry, u64::from(BPF_ANY));
        let _ = FLOW_LIVE.remove(&work.key);
    }
    0
}
