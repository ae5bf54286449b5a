//! `BPF_PROG_TEST_RUN`: programs that are attached nowhere, on one packet.

use std::io;
use std::os::fd::BorrowedFd;

use super::{bpf, command, raw};

/// What a program did with a packet.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TestRun {
    /// Its return value.
    pub verdict: u32,
    /// The packet afterwards.
    pub packet: Vec<u8>,
    /// Nanoseconds for one run, on average.
    pub nanoseconds: u32,
}

/// Interface where a packet is, and the one by which it came into the node; 0 = it was made here.
pub type At = (u32, u32);

#[repr(C)]
#[derive(Default)]
struct Attr {
    program: u32,
    verdict: u32,
    size_in: u32,
    size_out: u32,
    data_in: u64,
    data_out: u64,
    repeat: u32,
    duration: u32,
    context_size_in: u32,
    context_size_out: u32,
    context_in: u64,
    context_out: u64,
    flags: u32,
    cpu: u32,
    batch: u32,
    pad: u32,
}

fn length(bytes: usize) -> io::Result<u32> {
    u32::try_from(bytes).map_err(io::Error::other)
}

/// Runs a tc program on a packet without a device (`BPF_PROG_TEST_RUN`); the kernel gives it a socket.
pub fn test_run(program: BorrowedFd<'_>, packet: &[u8], at: At, repeat: u32) -> io::Result<TestRun> {
    let mut out = vec![0_u8; packet.len() + 256];
    // `struct __sk_buff`: `ingress_ifindex`, and `ifindex`, which the kernel takes for the device of the packet.
    let mut context = [0_u32; 48];
    (context[10], context[9]) = at;
    let mut attr = Attr {
        program: raw(program),
        size_in: length(packet.len())?,
        size_out: length(out.len())?,
        data_in: packet.as_ptr() as u64,
        data_out: out.as_mut_ptr() as u64,
        repeat,
        context_size_in: length(size_of_val(&context))?,
        context_in: context.as_ptr() as u64,
        ..Attr::default()
    };
    // SAFETY: all buffers are as long as said and live until the call returns.
    unsafe { bpf(command::PROG_TEST_RUN, &mut attr) }?;
    out.truncate(attr.size_out as usize);
    Ok(TestRun { verdict: attr.verdict, packet: out, nanoseconds: attr.duration })
}

/// Lets one frame arrive at an interface of the calling thread's network namespace, as from its wire: an XDP program that
/// lets everything pass is run on it live (`BPF_F_TEST_XDP_LIVE_FRAMES`, Linux 5.18). No more than the frame is needed: the
/// interface has no XDP program, before or afterwards.
///
/// # Errors
/// `ENODEV` without such an interface, `EINVAL` where the kernel knows no live frames or the frame fills most of a page.
pub fn arrive(program: BorrowedFd<'_>, frame: &[u8], ifindex: u32) -> io::Result<()> {
    const LIVE_FRAMES: u32 = 1 << 1;
    let size_in = length(frame.len())?;
    // `struct xdp_md`: data, its end, metadata, `ingress_ifindex`, `rx_queue_index`, `egress_ifindex`.
    let context = [0, size_in, 0, ifindex, 0, 0];
    let mut attr = Attr {
        program: raw(program),
        size_in,
        data_in: frame.as_ptr() as u64,
        repeat: 1,
        context_size_in: length(size_of_val(&context))?,
        context_in: context.as_ptr() as u64,
        flags: LIVE_FRAMES,
        batch: 1,
        ..Attr::default()
    };
    // SAFETY: both buffers are as long as said and live until the call returns.
    unsafe { bpf(command::PROG_TEST_RUN, &mut attr) }.map(drop)
}
