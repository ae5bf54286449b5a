//! Every map of the probes. The first two are shared with the programs of the dataplane, where those are loaded.

use aya_ebpf::bindings::BPF_F_NO_PREALLOC;
use aya_ebpf::macros::map;
use aya_ebpf::maps::{Array, HashMap, PerCpuArray, RingBuf, StackTrace};
use proxy_abi::trace::{
    CONTROLS, COUNTS, ENDS, PACKETS, ROWS, TraceControl, TraceDropKey, TraceDrops, TraceEnd, TraceFilter,
    TraceHookEntry, TraceHookKey, TracePacket, TraceRow, TraceSymbol, listener, point,
};

use crate::kernel::Header;

#[map(name = "trace")]
pub(crate) static TRACE: Array<TraceControl> = Array::with_max_entries(CONTROLS, 0);
#[map(name = "trace_packet")]
pub(crate) static TRACE_PACKET: HashMap<u64, TracePacket> = HashMap::with_max_entries(2 * PACKETS, BPF_F_NO_PREALLOC);

#[map(name = "trace_filter")]
pub(crate) static FILTER: Array<TraceFilter> = Array::with_max_entries(1, 0);
#[map(name = "trace_end")]
pub(crate) static END: HashMap<TraceEnd, u32> = HashMap::with_max_entries(ENDS, BPF_F_NO_PREALLOC);
#[map(name = "trace_row")]
pub(crate) static ROW: Array<TraceRow> = Array::with_max_entries(ROWS, 0);
#[map(name = "trace_event")]
pub(crate) static EVENT: RingBuf = RingBuf::with_byte_size(1 << 23, 0);
#[map(name = "trace_stack")]
pub(crate) static STACK: StackTrace = StackTrace::with_max_entries(2_048, 0);
#[map(name = "trace_count")]
pub(crate) static COUNT: PerCpuArray<u64> = PerCpuArray::with_max_entries(COUNTS, 0);
/// Where a packet's headers are read to: an entry for each program, because none interrupts itself.
#[map(name = "trace_header")]
pub(crate) static HEADER: PerCpuArray<Header> = PerCpuArray::with_max_entries(point::COUNT + 1, 0);
#[map(name = "trace_drop")]
pub(crate) static DROP: HashMap<TraceDropKey, TraceDrops> = HashMap::with_max_entries(4_096, BPF_F_NO_PREALLOC);
#[map(name = "trace_hook")]
pub(crate) static HOOK: HashMap<TraceHookKey, TraceHookEntry> = HashMap::with_max_entries(16_384, BPF_F_NO_PREALLOC);

/// What the programs `listener_*` are asked: see `proxy_abi::trace::listener`.
#[map(name = "trace_listener")]
pub(crate) static LISTENER: Array<listener::Question> = Array::with_max_entries(1, 0);

/// What the program `symbol` is asked, and its answer.
#[map(name = "trace_symbol")]
pub(crate) static SYMBOL: Array<TraceSymbol> = Array::with_max_entries(1, 0);

/// Adds one to a counter.
#[inline(always)]
pub(crate) fn count(which: u32) {
    if let Some(counter) = COUNT.get_ptr_mut(which) {
        // SAFETY: this CPU's entry; where a program interrupts another the count may be one too small.
        unsafe { *counter += 1 };
    }
}
