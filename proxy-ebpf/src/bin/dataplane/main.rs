//! The eBPF programs. Built for the BPF target by `proxy-agent/build.rs`; on the host this is an empty program, so that
//! `cargo test` and `cargo clippy` of the workspace need no BPF toolchain.
//!
//! ```text
//!             ┌───────────────── node ──────────────────┐
//!   pod ──▶ veth  from_pod ─▶ redirect ─▶ to_pod  veth ──▶ pod        same node, through a Service
//!             │       └──▶ bridge / IP stack ──▶ ...                  everything else
//!   pod ◀── veth  to_pod ◀── bridge / IP stack ◀── ...
//!   outside ──▶ uplink  from_netdev ─▶ redirect ─▶ to_pod  veth ──▶ pod      NodePort, load balancer
//!   outside ◀── uplink  to_netdev ◀── IP stack ◀── ...
//!   node process ── connect, sendmsg, recvmsg, getpeername            sockets of the node's own namespace
//! ```
#![cfg_attr(target_arch = "bpf", no_std, no_main, feature(asm_experimental_arch))]

#[cfg(not(target_arch = "bpf"))]
fn main() {}

#[cfg(target_arch = "bpf")]
mod ctx;
#[cfg(target_arch = "bpf")]
mod exit;
#[cfg(target_arch = "bpf")]
mod flow;
#[cfg(target_arch = "bpf")]
mod frontend;
#[cfg(target_arch = "bpf")]
mod icmp;
#[cfg(target_arch = "bpf")]
mod maps;
#[cfg(target_arch = "bpf")]
mod other;
#[cfg(target_arch = "bpf")]
mod policy;
#[cfg(target_arch = "bpf")]
mod refuse;
#[cfg(target_arch = "bpf")]
mod route;
#[cfg(target_arch = "bpf")]
mod send;
#[cfg(target_arch = "bpf")]
mod service;
#[cfg(target_arch = "bpf")]
mod sock;
#[cfg(target_arch = "bpf")]
mod tc;
#[cfg(target_arch = "bpf")]
mod trace;

#[cfg(target_arch = "bpf")]
mod programs {
    use aya_ebpf::macros::{cgroup_sock_addr, classifier};
    use aya_ebpf::programs::{SockAddrContext, TcContext};
    use proxy_abi::Hook;
    use proxy_ebpf::packet::{V4, V6};

    use crate::{sock, tc};

    /// What a pod sends: ingress of its host-side veth.
    #[classifier]
    #[inline(always)]
    fn from_pod(ctx: TcContext) -> i32 {
        tc::run(ctx.skb.skb, Hook::FromPod)
    }

    /// What a pod receives: egress of its host-side veth.
    #[classifier]
    #[inline(always)]
    fn to_pod(ctx: TcContext) -> i32 {
        tc::run(ctx.skb.skb, Hook::ToPod)
    }

    /// What comes to the node: ingress of an uplink or tunnel.
    #[classifier]
    #[inline(always)]
    fn from_netdev(ctx: TcContext) -> i32 {
        tc::run(ctx.skb.skb, Hook::FromNetdev)
    }

    /// What leaves the node: egress of an uplink or tunnel.
    #[classifier]
    #[inline(always)]
    fn to_netdev(ctx: TcContext) -> i32 {
        tc::run(ctx.skb.skb, Hook::ToNetdev)
    }

    /// TCP and connected UDP, IPv4.
    #[cgroup_sock_addr(connect4)]
    fn connect4(ctx: SockAddrContext) -> i32 {
        sock::connect::<V4>(ctx.sock_addr)
    }

    /// TCP and connected UDP, IPv6.
    #[cgroup_sock_addr(connect6)]
    fn connect6(ctx: SockAddrContext) -> i32 {
        sock::connect::<V6>(ctx.sock_addr)
    }

    /// Unconnected UDP, IPv4.
    #[cgroup_sock_addr(sendmsg4)]
    fn sendmsg4(ctx: SockAddrContext) -> i32 {
        sock::sendmsg::<V4>(ctx.sock_addr)
    }

    /// Unconnected UDP, IPv6.
    #[cgroup_sock_addr(sendmsg6)]
    fn sendmsg6(ctx: SockAddrContext) -> i32 {
        sock::sendmsg::<V6>(ctx.sock_addr)
    }

    /// UDP replies, IPv4.
    #[cgroup_sock_addr(recvmsg4)]
    fn recvmsg4(ctx: SockAddrContext) -> i32 {
        sock::peer::<V4>(ctx.sock_addr, Hook::Recvmsg)
    }

    /// UDP replies, IPv6.
    #[cgroup_sock_addr(recvmsg6)]
    fn recvmsg6(ctx: SockAddrContext) -> i32 {
        sock::peer::<V6>(ctx.sock_addr, Hook::Recvmsg)
    }

    /// The peer that a program is shown, IPv4.
    #[cgroup_sock_addr(getpeername4)]
    fn getpeername4(ctx: SockAddrContext) -> i32 {
        sock::peer::<V4>(ctx.sock_addr, Hook::Getpeername)
    }

    /// The peer that a program is shown, IPv6.
    #[cgroup_sock_addr(getpeername6)]
    fn getpeername6(ctx: SockAddrContext) -> i32 {
        sock::peer::<V6>(ctx.sock_addr, Hook::Getpeername)
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
