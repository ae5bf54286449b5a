//! Removes established flows that nobody uses any more.
//!
//! A connection whose ends vanish without FIN or RST leaves its entries in `flow_live` for good; the programs cannot
//! know. Nothing else needs the agent: all other flows are evictable, and what ends in the ordinary way leaves
//! `flow_live` in the kernel.

use std::collections::BTreeMap;
use std::time::Duration;

use proxy_abi::FlowEntry;
use proxy_abi::flow::state;
use proxy_ebpf::conntrack::{SECOND, UdpIdle};

use super::Error;
use super::pins::Maps;

/// How long an entry may be idle, by its state.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Timeouts {
    /// Established: kube-proxy's `conntrack.tcpEstablishedTimeout`, 24 hours.
    pub established: Duration,
    /// One side has closed: kube-proxy's `conntrack.tcpCloseWaitTimeout`, 1 hour.
    pub half_closed: Duration,
    /// Not TCP, without an answer: kube-proxy's `conntrack.udpTimeout`, where it is not 0; 30 seconds, as the kernel has it.
    pub udp: Duration,
    /// Not TCP, with answers: `conntrack.udpStreamTimeout`, 2 minutes.
    pub udp_stream: Duration,
}

impl Default for Timeouts {
    fn default() -> Self {
        let udp = UdpIdle::DEFAULT;
        Self {
            established: Duration::from_hours(24),
            half_closed: Duration::from_hours(1),
            udp: Duration::from_nanos(udp.unreplied),
            udp_stream: Duration::from_nanos(udp.assured),
        }
    }
}

impl Timeouts {
    /// What the programs are to know: they forget by themselves what is not TCP. In whole seconds, and at least
    /// [`UdpIdle::LEAST`].
    pub fn udp_idle(&self) -> UdpIdle {
        let [unreplied, assured] = [self.udp, self.udp_stream].map(|time| {
            let seconds = u64::try_from(time.as_nanos().div_ceil(u128::from(SECOND))).unwrap_or(u64::MAX);
            seconds.saturating_mul(SECOND).max(UdpIdle::LEAST)
        });
        UdpIdle { unreplied, assured }
    }

    /// Is this entry past its time, `now` being CLOCK_MONOTONIC in nanoseconds?
    pub fn is_over(&self, entry: &FlowEntry, now: u64) -> bool {
        let idle = Duration::from_nanos(now.saturating_sub(entry.last_seen));
        let limit = if entry.state == state::ESTABLISHED { self.established } else { self.half_closed };
        idle > limit
    }
}

/// CLOCK_MONOTONIC in nanoseconds, as the programs write it.
pub fn monotonic() -> u64 {
    let now = nix::time::clock_gettime(nix::time::ClockId::CLOCK_MONOTONIC).map(Duration::from).unwrap_or_default();
    u64::try_from(now.as_nanos()).unwrap_or(u64::MAX)
}

/// Removes what is past its time; returns how many entries there were and how many went.
///
/// An entry is read again before it goes: a packet may have used it meanwhile.
///
/// Counts the flows of each pod anew on the way: the programs' own counts drift when two CPUs move one flow at once.
pub fn sweep(maps: &Maps, timeouts: &Timeouts, now: u64) -> Result<(usize, usize), Error> {
    let flows = &maps.flow_live;
    let all = flows.read()?;
    let mut removed = 0;
    let mut counts: BTreeMap<u32, u64> = maps.pod_flows.read()?.into_iter().map(|(pod, _)| (pod, 0)).collect();
    for (key, entry) in &all {
        if timeouts.is_over(entry, now)
            && let Some(again) = flows.get(key)?
            && timeouts.is_over(&again, now)
            && flows.delete(key)?
        {
            removed += 1;
        } else if let Some(pod) = entry.charged_to() {
            *counts.entry(pod).or_default() += 1;
        }
    }
    for (pod, count) in counts {
        if count == 0 {
            maps.pod_flows.delete(&pod)?;
        } else {
            maps.pod_flows.set(&pod, &count)?;
        }
    }
    Ok((all.len(), removed))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_the_programs_forget_is_in_whole_seconds() {
        let idle = |udp, udp_stream| Timeouts { udp, udp_stream, ..Timeouts::default() }.udp_idle();
        assert_eq!(Timeouts::default().udp_idle(), UdpIdle::DEFAULT);
        let (short, long) = (Duration::from_millis(500), Duration::from_millis(2500));
        assert_eq!(idle(short, long), UdpIdle { unreplied: 2 * SECOND, assured: 3 * SECOND });
        let ever = idle(Duration::MAX, Duration::from_secs(1));
        assert_eq!(ever, UdpIdle { unreplied: u64::MAX, assured: 2 * SECOND });
    }

    #[test]
    fn idle_time_counts_by_state() {
        let hour = 3_600_000_000_000_u64;
        let entry = |state| FlowEntry { last_seen: hour, state, ..FlowEntry::NONE };
        let table = [
            (state::ESTABLISHED, hour, false),
            (state::ESTABLISHED, 25 * hour, false),
            (state::ESTABLISHED, 25 * hour + 1, true),
            (state::FIN_INITIATOR, 2 * hour, false),
            (state::FIN_RESPONDER, 2 * hour + 1, true),
            // A clock that went backwards removes nothing.
            (state::ESTABLISHED, 0, false),
        ];
        for (state, now, over) in table {
            assert_eq!(Timeouts::default().is_over(&entry(state), now), over, "{} at {now}", state::name(state));
        }
    }
}
