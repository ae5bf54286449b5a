//! A dry run: what the programs would do with a packet, asked of the programs themselves.
//!
//! The object is loaded a second time, attached nowhere and run on one packet. Its maps are the pinned ones, but for those
//! that are no state: where a flow is made, counters, the limit of refusals, and what a trace is told by.
//!
//! ```text
//!   pinned   all that is looked up: the constant DRY_RUN is 1, so that no write to them is left in the loaded programs
//!   private  work, counter, limit, trace, trace_packet, trace_ring
//! ```

use std::collections::BTreeMap;
use std::os::fd::AsFd as _;

use aya::maps::{Array, MapData, RingBuf};
use aya::programs::{ProgramError, SchedClassifier};
use aya::{Ebpf, EbpfLoader};
use proxy_abi::map;
use proxy_abi::trace::{CONTROLS, TraceControl, TraceDecision, map as trace_map};
use proxy_ebpf::conntrack;

use super::describe::{self, Description};
use super::pins::{self, Pins};
use super::probes::decision;
use super::sysbpf::{self, At};
use super::{Error, OBJECT, is_memory_hidden};

/// The programs, for packets that are none.
pub struct DryRun {
    ebpf: Ebpf,
    ring: RingBuf<MapData>,
}

/// What a program would do with a packet.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Dry {
    /// Its return value: -1 pass, 2 drop, 7 redirect.
    pub verdict: i32,
    /// The packet afterwards.
    pub packet: Vec<u8>,
    /// What it decided; `None` where programs must not read the kernel's memory.
    pub decision: Option<TraceDecision>,
}

impl std::fmt::Debug for DryRun {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("DryRun").finish_non_exhaustive()
    }
}

/// Pinned maps that a dry run has its own of.
fn is_private(name: &str) -> bool {
    name == map::COUNTER
}

impl DryRun {
    /// Loads the programs over the pinned maps, with the settings that the agent has written there.
    ///
    /// # Errors
    /// When a map is not pinned, or the kernel refuses the programs.
    pub fn open(pins: &Pins) -> Result<Self, Error> {
        let directory = pins.maps();
        let settings: BTreeMap<String, u32> =
            Description::read(&directory)?.map(|found| found.settings).unwrap_or_default();
        let setting = |name: &str| settings.get(name).copied().unwrap_or(0);
        let (quota, node_open) = (setting(describe::POD_QUOTA), setting(describe::NODE_OPEN));
        let cookie = sysbpf::netns_cookie().map_err(|source| Error::Pin { path: directory.clone(), source })?;
        let tracing = u32::from(!is_memory_hidden());
        let mut loader = EbpfLoader::new();
        loader.override_global("NETNS_COOKIE", &cookie, true);
        loader.override_global("SET_RETVAL", &1_u32, true);
        loader.override_global("POD_QUOTA", &quota, true);
        loader.override_global("NODE_OPEN", &node_open, true);
        let idle = describe::UDP_IDLE.map(|name| u64::from(setting(name)) * conntrack::SECOND);
        loader.override_global("UDP_UNREPLIED", &idle[0], true);
        loader.override_global("UDP_ASSURED", &idle[1], true);
        loader.override_global("TRACING", &tracing, true);
        // No program at a socket is run here.
        loader.override_global("SOCKET_LB", &0_u32, true);
        loader.override_global("DRY_RUN", &1_u32, true);
        for layout in pins::LAYOUTS.iter().filter(|layout| !is_private(layout.name)) {
            let path = directory.join(layout.name);
            // The loader would make and pin what is missing.
            if !path.exists() {
                return Err(Error::NotRunning { path: directory });
            }
            loader.map_pin_path(layout.name, path);
        }
        let mut ebpf = loader.load(OBJECT).map_err(|e| Error::Object(Box::new(e)))?;
        let wrong = |source: aya::maps::MapError| Error::Pin {
            path: trace_map::TRACE_RING.into(),
            source: std::io::Error::other(source),
        };
        let missing = || Error::NotRunning { path: directory.clone() };
        let ring = RingBuf::try_from(ebpf.take_map(trace_map::TRACE_RING).ok_or_else(missing)?).map_err(wrong)?;
        let mut control: Array<_, TraceControl> =
            Array::try_from(ebpf.map_mut(trace_map::TRACE).ok_or_else(missing)?).map_err(wrong)?;
        for entry in 0..CONTROLS {
            control.set(entry, TraceControl { until: u64::MAX, ..TraceControl::OFF }, 0).map_err(wrong)?;
        }
        Ok(Self { ebpf, ring })
    }

    /// Runs a tc program on a frame.
    ///
    /// # Errors
    /// When the kernel refuses the program, or to run it: there is no such interface.
    pub fn run(&mut self, program: &'static str, frame: &[u8], at: At) -> Result<Dry, Error> {
        let refused = |source| Error::Program { program, source };
        let found: &mut SchedClassifier =
            self.ebpf.program_mut(program).ok_or(Error::NoProgram { program })?.try_into().map_err(refused)?;
        match found.load() {
            Ok(()) | Err(ProgramError::AlreadyLoaded) => {}
            Err(error) => return Err(refused(error)),
        }
        let fd = found.fd().map_err(refused)?.as_fd();
        let ran = sysbpf::test_run(fd, frame, at, 1).map_err(|source| Error::Attach {
            program,
            target: format!("a test run at interface {}", at.0),
            source,
        })?;
        let mut told = None;
        while let Some(item) = self.ring.next() {
            told = decision(&item);
        }
        Ok(Dry { verdict: ran.verdict.cast_signed(), packet: ran.packet, decision: told })
    }
}
