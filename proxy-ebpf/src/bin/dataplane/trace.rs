//! Telling a reader what was decided: see `proxy_abi::trace`.
//!
//! A packet is told of only when the probes at the kernel's tracepoints follow it, so all filtering is theirs. Nothing
//! here changes what becomes of it.

use aya_ebpf::Global;
use aya_ebpf::bindings::__sk_buff;
use aya_ebpf::helpers::{bpf_get_smp_processor_id, bpf_ktime_get_ns, bpf_probe_read_kernel};
use aya_ebpf::macros::map;
use aya_ebpf::maps::{Array, HashMap, RingBuf};
use proxy_abi::trace::{CONTROL, CONTROLS, FOLLOWED, PACKETS, RING_BYTES, TraceControl, TraceDecision, TracePacket};
use proxy_abi::{Hook, Reason};

use crate::ctx::Skb;
use crate::exit::Outcome;
use crate::maps::{DRY_RUN, WORK};

#[map(name = "trace")]
static TRACE: Array<TraceControl> = Array::with_max_entries(CONTROLS, 0);
#[map(name = "trace_packet")]
static TRACE_PACKET: HashMap<u64, TracePacket> =
    HashMap::with_max_entries(2 * PACKETS, aya_ebpf::bindings::BPF_F_NO_PREALLOC);
#[map(name = "trace_ring")]
static TRACE_RING: RingBuf = RingBuf::with_byte_size(RING_BYTES, 0);

/// May a program read the kernel's memory here? 0 or 1. Not under `lockdown=confidentiality`: the programs must not even
/// have the call then.
#[unsafe(no_mangle)]
static TRACING: Global<u32> = Global::new(0xa5a5_0005);

/// Offsets in the kernel's `sk_buff` are smaller.
const OFFSET_MASK: u32 = 0x3ff;

/// Tells what became of a packet, if somebody wants to know.
#[inline(always)]
pub(crate) fn packet(skb: Skb, hook: Hook, outcome: &Outcome) {
    if is_wanted() {
        let what = hook as u64 | (outcome.verdict as u64) << 8 | u64::from(outcome.reason) << 16;
        trace_decision(skb.0, what | u64::from(outcome.rule) << 32);
    }
}

/// Tells what was found out about a packet that goes on. Hook and reason are numbers.
#[inline(always)]
pub(crate) fn beside(skb: Skb, hook: u32, reason: u32, rule: u32) {
    if is_wanted() {
        trace_decision(skb.0, u64::from(hook) | u64::from(reason) << 16 | u64::from(rule) << 32);
    }
}

/// Does somebody trace?
#[inline(always)]
fn is_wanted() -> bool {
    if TRACING.load() == 0 {
        return false;
    }
    let Some(control) = TRACE.get_ptr(CONTROL) else { return false };
    // SAFETY: an array's entry; it is one word, which another CPU may change at any time.
    unsafe { core::ptr::read_volatile(&raw const (*control).until) != 0 }
}

/// Does a packet with this reason come so far that the plan in `work` is its own?
const fn has_plan(reason: u32) -> bool {
    const WITHOUT: [Reason; 12] = [
        Reason::NotIp,
        Reason::NoDevice,
        Reason::OtherProtocol,
        Reason::Unparsed,
        Reason::IcmpError,
        Reason::FragmentUnknown,
        Reason::FragmentBeforeFirst,
        Reason::FrameType,
        Reason::FrameSource,
        Reason::FrameNeighbour,
        Reason::FrameRouter,
        Reason::FrameUnparsed,
    ];
    let mut i = 0;
    while i < WITHOUT.len() {
        if WITHOUT[i] as u32 == reason {
            return false;
        }
        i += 1;
    }
    true
}

/// `what`: hook, verdict, reason and rule, from the lowest bits on. Service and backend are looked up in the plan: what is
/// kept for a call alone costs the programs stack, of which they have none to spare.
#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn trace_decision(skb: *mut __sk_buff, what: u64) -> u32 {
    if TRACING.load() == 0 {
        return 0;
    }
    let Some(followed) = TRACE.get_ptr(FOLLOWED) else { return 0 };
    // SAFETY: an array's entry; it is one word, which another CPU may change at any time.
    if unsafe { core::ptr::read_volatile(&raw const (*followed).until) } == 0 {
        return 0;
    }
    let Some(control) = TRACE.get_ptr_mut(CONTROL) else { return 0 };
    // SAFETY: an array's entry. Where two CPUs count at once a counter may be one too small, but not 0.
    let control = unsafe { &mut *control };
    // SAFETY: no arguments.
    let now = unsafe { bpf_ktime_get_ns() };
    if now > control.until {
        return 0;
    }
    let address = skb as u64;
    let at = address.wrapping_add(u64::from(control.head_offset & OFFSET_MASK));
    // SAFETY: the helper checks the address.
    let head = unsafe { bpf_probe_read_kernel(at as *const u64) }.unwrap_or(0);
    let mut id = 0;
    // In a dry run there is one packet, and one that asks.
    if DRY_RUN.load() == 0 {
        let Some(found) = TRACE_PACKET.get_ptr(&address).or_else(|| TRACE_PACKET.get_ptr(&head)) else { return 0 };
        // SAFETY: a pointer into a map that was just found.
        id = unsafe { (*found).id };
    }
    let packet = Skb(skb);
    let reason = (what >> 16) as u32 & 0xffff;
    let (mut service, mut backend) = (0, 0);
    if has_plan(reason)
        && let Some(work) = WORK.get_ptr(0)
    {
        // SAFETY: this CPU's entry, which nobody else uses now.
        (service, backend) = unsafe { ((*work).service, (*work).backend) };
    }
    let Some(mut entry) = TRACE_RING.reserve::<TraceDecision>(0) else {
        control.lost += 1;
        return 0;
    };
    entry.write(TraceDecision {
        at: now,
        id,
        skb: address,
        head,
        ifindex: packet.ifindex(),
        len: packet.len(),
        hook: what as u32 & 0xff,
        verdict: (what >> 8) as u32 & 0xff,
        reason,
        service,
        backend,
        rule: (what >> 32) as u32,
        // SAFETY: no arguments.
        cpu: unsafe { bpf_get_smp_processor_id() },
        reserved: [0; 7],
    });
    entry.submit(0);
    control.told += 1;
    0
}
