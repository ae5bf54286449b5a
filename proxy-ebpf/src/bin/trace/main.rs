//! Probes at the kernel's tracepoints, for `proxy-agent trace`. They hang on a reader's descriptors and end with it.
//!
//! ```text
//!   netif_receive_skb ─┐  begin: does the packet match? ─▶ trace_packet[sk_buff], [head]
//!   net_dev_queue ─────┤  go on: one look-up
//!   net_dev_start_xmit ┤
//!   kfree_skb ─────────┤  drops begin as well as end; grouped in trace_drop on request
//!   consume_skb ───────┘
//!                          every sight ─▶ trace_event (ring)
//!   listener_* ── a question in trace_listener ─▶ is there a socket?      attached nowhere: BPF_PROG_TEST_RUN
//!   symbol_name ─ an address in trace_symbol ─▶ what it is called         the same
//!   arrive ── lets a frame pass that `trace why --inject` brings to an interface      the same, with live frames
//!   iter/task ── every network namespace that a task lives in ─▶ trace_hook
//! ```
//!
//! A packet is known by the address of its `sk_buff` and by that of its data (`head`): the first survives a copy of the
//! data, the second a clone. Memory is used again, so what no translation changes must be the same as well.
#![cfg_attr(target_arch = "bpf", no_std, no_main)]

#[cfg(not(target_arch = "bpf"))]
fn main() {}

#[cfg(target_arch = "bpf")]
mod drops;
#[cfg(target_arch = "bpf")]
mod filter;
#[cfg(target_arch = "bpf")]
mod hooks;
#[cfg(target_arch = "bpf")]
mod kernel;
#[cfg(target_arch = "bpf")]
mod listener;
#[cfg(target_arch = "bpf")]
mod maps;
#[cfg(target_arch = "bpf")]
mod sight;
#[cfg(target_arch = "bpf")]
mod symbol;

#[cfg(target_arch = "bpf")]
mod programs {
    use aya_ebpf::EbpfContext as _;
    use aya_ebpf::bindings::xdp_action;
    use aya_ebpf::macros::{btf_tracepoint, classifier, xdp};
    use aya_ebpf::programs::{BtfTracePointContext, TcContext, XdpContext};
    use proxy_abi::trace::point;

    use crate::kernel::CONSUME_LOCATION;
    use crate::{drops, hooks, listener, sight, symbol};

    #[btf_tracepoint(function = "netif_receive_skb")]
    fn receive(ctx: BtfTracePointContext) -> i32 {
        sight::begins(ctx.as_ptr(), ctx.arg(0), point::RECEIVE);
        0
    }

    #[btf_tracepoint(function = "net_dev_queue")]
    fn queue(ctx: BtfTracePointContext) -> i32 {
        sight::begins(ctx.as_ptr(), ctx.arg(0), point::QUEUE);
        0
    }

    #[btf_tracepoint(function = "net_dev_start_xmit")]
    fn transmit(ctx: BtfTracePointContext) -> i32 {
        sight::goes_on(ctx.as_ptr(), ctx.arg(0), point::TRANSMIT);
        0
    }

    #[btf_tracepoint(function = "kfree_skb")]
    fn dropped(ctx: BtfTracePointContext) -> i32 {
        let reason: u64 = ctx.arg(2);
        sight::dropped(ctx.as_ptr(), ctx.arg(0), ctx.arg(1), reason as u32);
        0
    }

    #[btf_tracepoint(function = "kfree_skb")]
    fn drops(ctx: BtfTracePointContext) -> i32 {
        let reason: u64 = ctx.arg(2);
        drops::group(ctx.arg(0), ctx.arg(1), reason as u32);
        0
    }

    #[btf_tracepoint(function = "consume_skb")]
    fn consumed(ctx: BtfTracePointContext) -> i32 {
        // Linux 6.1 has one argument, and refuses a program that reads another.
        let location = if CONSUME_LOCATION.load() == 0 { 0 } else { ctx.arg(1) };
        sight::consumed(ctx.as_ptr(), ctx.arg(0), location);
        0
    }

    /// Called once for each task, and once more at the end without one.
    #[unsafe(no_mangle)]
    #[unsafe(link_section = "iter/task")]
    extern "C" fn namespaces(ctx: *mut u64) -> i32 {
        // SAFETY: `struct bpf_iter__task`: two pointers, of which the second is the task.
        let task = unsafe { *ctx.add(1) };
        hooks::of_task(task);
        0
    }

    /// Run by `BPF_PROG_TEST_RUN` alone.
    #[classifier]
    fn listener_tcp(ctx: TcContext) -> i32 {
        listener::tcp(ctx.skb.skb)
    }

    /// The same.
    #[classifier]
    fn listener_udp(ctx: TcContext) -> i32 {
        listener::udp(ctx.skb.skb)
    }

    /// The same. Named by `symbol::name`.
    #[classifier]
    fn symbol_name(_: TcContext) -> i32 {
        symbol::name()
    }

    /// Run by `BPF_PROG_TEST_RUN` alone, on a live frame: what passes goes up the stack as if it had come from the wire.
    #[xdp]
    fn arrive(_ctx: XdpContext) -> u32 {
        xdp_action::XDP_PASS
    }

    /// Some helpers are open to programs under a GPL-compatible licence only.
    #[unsafe(link_section = "license")]
    #[unsafe(no_mangle)]
    static LICENSE: [u8; 13] = *b"Dual MIT/GPL\0";

    #[panic_handler]
    fn panic(_info: &core::panic::PanicInfo<'_>) -> ! {
        loop {}
    }
}
