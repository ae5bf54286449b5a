//! What the kernel calls an address of its code, where `/proc/kallsyms` does not say: in a pod without CAP_SYSLOG, or with
//! `kernel.kptr_restrict`. A program asks the kernel (`%pS` of `bpf_snprintf`, Linux 5.13).

use std::os::fd::AsFd as _;

use aya::maps::Array;
use aya::programs::{ProgramError, SchedClassifier};
use aya::{Ebpf, EbpfLoader};
use proxy_abi::trace::TraceSymbol;

use super::probes::{OBJECT, ProbeError, map_error};

const PROGRAM: &str = "symbol_name";
const MAP: &str = "trace_symbol";

/// The loaded program, attached nowhere.
pub struct SymbolNames {
    ebpf: Ebpf,
}

impl std::fmt::Debug for SymbolNames {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("SymbolNames").finish_non_exhaustive()
    }
}

impl SymbolNames {
    /// Loads it.
    ///
    /// # Errors
    /// [`ProbeError::Object`], [`ProbeError::Program`] when the kernel refuses.
    pub fn open() -> Result<Self, ProbeError> {
        let mut loader = EbpfLoader::new();
        // Unused here, and as small as the kernel takes it.
        loader.map_max_entries("trace_event", 4096);
        let mut ebpf = loader.load(OBJECT).map_err(|e| ProbeError::Object(Box::new(e)))?;
        let refused = |source| ProbeError::Program { program: PROGRAM, source: Box::new(source) };
        Self::program(&mut ebpf)?.load().map_err(refused)?;
        Ok(Self { ebpf })
    }

    fn program(ebpf: &mut Ebpf) -> Result<&mut SchedClassifier, ProbeError> {
        let refused = |source: ProgramError| ProbeError::Program { program: PROGRAM, source: Box::new(source) };
        ebpf.program_mut(PROGRAM).ok_or(ProbeError::NoMap(PROGRAM))?.try_into().map_err(refused)
    }

    /// The function and the distance from its beginning; `None` when the address is in no function.
    ///
    /// # Errors
    /// [`ProbeError::Map`], [`ProbeError::Run`].
    pub fn name(&mut self, address: u64) -> Result<Option<(String, u64)>, ProbeError> {
        let map = self.ebpf.map_mut(MAP).ok_or(ProbeError::NoMap(MAP))?;
        let mut map: Array<_, TraceSymbol> = Array::try_from(map).map_err(map_error(MAP))?;
        map.set(0, TraceSymbol { address, text: [0; 128] }, 0).map_err(map_error(MAP))?;
        // The kernel wants a frame with a header of IP.
        let mut frame = [0_u8; 64];
        frame[12..14].copy_from_slice(&[0x08, 0x00]);
        let refused = |source| ProbeError::Program { program: PROGRAM, source: Box::new(source) };
        let fd = Self::program(&mut self.ebpf)?.fd().map_err(refused)?.as_fd();
        let run = super::sysbpf::test_run(fd, &frame, (0, 0), 1);
        run.map_err(|source| ProbeError::Run { program: PROGRAM, source })?;
        let map = self.ebpf.map(MAP).ok_or(ProbeError::NoMap(MAP))?;
        let map: Array<_, TraceSymbol> = Array::try_from(map).map_err(map_error(MAP))?;
        let told = map.get(&0, 0).map_err(map_error(MAP))?;
        let text = told.text.split(|byte| *byte == 0).next().unwrap_or_default();
        Ok(read(&String::from_utf8_lossy(text)))
    }
}

/// Of `name+0x12/0x34 [module]`.
fn read(text: &str) -> Option<(String, u64)> {
    let (name, rest) = text.split_once("+0x")?;
    let far = rest.split(['/', ' ']).next()?;
    Some((name.to_owned(), u64::from_str_radix(far, 16).ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_the_kernel_prints_is_read() {
        let read = ["ip_rcv+0x0/0x110", "br_nf_pre_routing+0x7d/0x4f0 [br_netfilter]", "0xffff000000000005"].map(read);
        let named = |name: &str, far| Some((name.to_owned(), far));
        assert_eq!(read, [named("ip_rcv", 0), named("br_nf_pre_routing", 0x7d), None]);
    }
}
