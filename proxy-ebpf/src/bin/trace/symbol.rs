//! What is an address of the kernel's code called? Asked with `BPF_PROG_TEST_RUN` where `/proc/kallsyms` hides addresses: in a
//! pod without CAP_SYSLOG. The kernel prints the name itself (`%pS`, since Linux 5.13). Attached nowhere.

use aya_ebpf::helpers::generated::bpf_snprintf;

use crate::maps::SYMBOL;

/// The helper takes it from read-only memory alone.
#[unsafe(no_mangle)]
static FORMAT: [u8; 4] = *b"%pS\0";

/// Bytes of the name with its zero, or what the helper says.
#[inline(always)]
pub(crate) fn name() -> i32 {
    let Some(symbol) = SYMBOL.get_ptr_mut(0) else { return 0 };
    // SAFETY: an array's entry.
    let symbol = unsafe { &mut *symbol };
    let mut arguments = [symbol.address];
    let room = symbol.text.len() as u32;
    // SAFETY: the buffer is as long as said; the arguments are one word, for one place in the format.
    unsafe {
        bpf_snprintf(symbol.text.as_mut_ptr().cast(), room, FORMAT.as_ptr().cast(), arguments.as_mut_ptr(), 8) as i32
    }
}
