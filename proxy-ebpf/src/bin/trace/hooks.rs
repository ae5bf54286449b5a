//! What is registered at netfilter's hooks, in every network namespace that a task lives in.

use aya_ebpf::helpers::generated::bpf_probe_read_kernel_str;
use core::ffi::c_void;
use proxy_abi::trace::{TraceHookEntry, TraceHookKey};

use crate::kernel::{
    CHAIN_NAME, CHAIN_TABLE, ENTRIES_HOOKS, NET_HOOKS_ARP, NET_HOOKS_BRIDGE, NET_HOOKS_V4, NET_HOOKS_V6, NET_INUM,
    NSPROXY_NET, OPS_KIND, OPS_NFT, OPS_PRIORITY, TABLE_NAME, TASK_NSPROXY, TASK_PID, read,
};
use crate::maps::HOOK;

/// Entries of one hook that are told.
const MOST: u32 = 32;
/// A namespace that has been looked at has this entry.
const SEEN: u32 = u32::MAX;

#[inline(always)]
pub(crate) fn of_task(task: u64) {
    if task == 0 {
        return;
    }
    let proxy: u64 = read(task + u64::from(TASK_NSPROXY.load()));
    if proxy == 0 {
        return;
    }
    let net: u64 = read(proxy + u64::from(NSPROXY_NET.load()));
    let netns: u32 = read(net + u64::from(NET_INUM.load()));
    let pid: u32 = read(task + u64::from(TASK_PID.load()));
    let seen = TraceHookKey { netns, family: 0, hook: SEEN, index: 0 };
    let mark = TraceHookEntry { function: 0, priority: 0, kind: 0, table: [0; 32], chain: [0; 32], pid, reserved: 0 };
    if netns == 0 || HOOK.get_ptr(&seen).is_some() || HOOK.insert(&seen, &mark, 0).is_err() {
        return;
    }
    hook_family(net, netns, 0, NET_HOOKS_V4.load());
    hook_family(net, netns, 1, NET_HOOKS_V6.load());
    hook_family(net, netns, 2, NET_HOOKS_ARP.load());
    hook_family(net, netns, 3, NET_HOOKS_BRIDGE.load());
}

#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn hook_family(net: u64, netns: u32, family: u32, table: u32) -> u32 {
    let hooks = if family == 2 { 3 } else { 5 };
    let mut hook = 0;
    while hook < 5 {
        if hook >= hooks {
            break;
        }
        let entries: u64 = read(net + u64::from(table) + u64::from(hook) * 8);
        if entries != 0 {
            hook_entries(entries, netns, family, hook);
        }
        hook += 1;
    }
    0
}

#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn hook_entries(entries: u64, netns: u32, family: u32, hook: u32) -> u32 {
    let number = u32::from(read::<u16>(entries));
    let first = entries + u64::from(ENTRIES_HOOKS.load());
    let mut index = 0;
    while index < MOST {
        if index >= number {
            break;
        }
        // Behind the entries, of 16 bytes, lie pointers to what they were registered with.
        let operations: u64 = read(first + u64::from(number) * 16 + u64::from(index) * 8);
        hook_entry(
            first + u64::from(index) * 16,
            operations,
            u64::from(netns) << 32 | u64::from(family) << 16 | u64::from(hook) << 8 | u64::from(index),
        );
        index += 1;
    }
    0
}

#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn hook_entry(entry: u64, operations: u64, place: u64) -> u32 {
    let key = TraceHookKey {
        netns: (place >> 32) as u32,
        family: (place >> 16) as u32 & 0xff,
        hook: (place >> 8) as u32 & 0xff,
        index: place as u32 & 0xff,
    };
    let mut told = TraceHookEntry {
        function: read(entry),
        priority: read(operations + u64::from(OPS_PRIORITY.load())),
        kind: u32::from(read::<u8>(operations + u64::from(OPS_KIND.load()))),
        table: [0; 32],
        chain: [0; 32],
        pid: 0,
        reserved: 0,
    };
    if told.kind == OPS_NFT.load() && OPS_NFT.load() != 0 {
        let chain: u64 = read(entry + 8);
        let table: u64 = read(chain + u64::from(CHAIN_TABLE.load()));
        name(&mut told.chain, read(chain + u64::from(CHAIN_NAME.load())));
        name(&mut told.table, read(table + u64::from(TABLE_NAME.load())));
    }
    u32::from(HOOK.insert(&key, &told, 0).is_err())
}

#[inline(always)]
fn name(to: &mut [u8; 32], address: u64) {
    // SAFETY: the buffer is as long as said; the helper checks the address.
    unsafe { bpf_probe_read_kernel_str(to.as_mut_ptr().cast::<c_void>(), 32, address as *const c_void) };
}
