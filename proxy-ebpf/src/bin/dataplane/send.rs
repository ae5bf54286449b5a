//! The last step of a packet that is translated: written as planned, and sent on its way.

use aya_ebpf::bindings::__sk_buff;
use aya_ebpf::helpers::bpf_redirect;
use proxy_abi::{DeviceEntry, FlowEntry, Hook, Reason, Work};
use proxy_ebpf::packet::{Family, Parsed};

use crate::ctx::{Skb, forget};
use crate::exit::{Outcome, Verdict};
use crate::maps::DEVICE;
use crate::route::found;
use crate::tc::netdev;
use crate::{refuse, route, service};

/// Writes the packet as planned and sends it on its way.
#[inline(always)]
pub(crate) fn packet<F: Family>(
    skb: Skb,
    parsed: &Parsed,
    device: *const DeviceEntry,
    work: *mut Work,
    hook: Hook,
    reason: u32,
) -> Outcome {
    // SAFETY: a pointer into a map that was found for this packet; and this CPU's entry of `work`.
    let (gateway, plan) = unsafe { (&(*device).gateway_mac, &*work) };
    let (service, backend) = (plan.service, plan.backend);
    let mut redirect = forget(plan.redirect);
    let mut set_mac = forget(u32::from(plan.set_mac)) as u16;
    if matches!(hook, Hook::FromPod | Hook::FromNetdev)
        && (set_mac == FlowEntry::ROUTED || netdev(hook) && redirect != 0)
    {
        let way = way_out(skb, work, device, redirect, u32::from(parsed.proto.0));
        if way == found::NONE {
            return Outcome::drop(Reason::NoRoute).of(service, backend);
        }
        if way == found::TOO_BIG {
            // SAFETY: as above.
            let (mtu, masqueraded) = unsafe { ((*work).mtu, (*work).new.src.halves() != parsed.tuple.src.halves()) };
            if masqueraded || !refuse::may_be_cut::<F>(skb) {
                return refuse::packet::<F>(skb, parsed, mtu, Reason::TooBig as u32).of(service, backend);
            }
            // The stack cuts it: the source is the client's own, so it takes the packet.
            redirect = 0;
            set_mac = 0;
        }
    }
    // A bridge that switches the frame wants to see the pod's own MAC, not its own, at the pod's port.
    let written = (set_mac & (FlowEntry::REDIRECT | FlowEntry::SWITCH) == 0 || skb.set_dst_mac(&plan.mac).is_some())
        && (set_mac & FlowEntry::REDIRECT == 0 || skb.set_src_mac(gateway).is_some())
        && skb.rewrite::<F>(parsed, &parsed.tuple, &plan.new).is_some();
    if !written {
        return Outcome::drop(Reason::RewriteFailed).of(service, backend);
    }
    // SAFETY: as above.
    send(work, redirect, u32::from(set_mac), reason).of(service, backend).by(unsafe { (*work).rule })
}

/// Sends a written packet on its way.
#[inline(always)]
pub(crate) fn send(work: *const Work, redirect: u32, set_mac: u32, reason: u32) -> Outcome {
    let mut outcome = Outcome::numbered(Verdict::Pass, reason);
    if set_mac == u32::from(FlowEntry::ROUTED) {
        route::route_redirect(work);
        outcome.verdict = Verdict::Redirect;
    } else if redirect != 0 {
        // SAFETY: sets the target of this packet; an interface that is gone drops it in the kernel.
        unsafe { bpf_redirect(redirect, 0) };
        outcome.verdict = Verdict::Redirect;
    }
    outcome
}

/// Looks up the way of a packet that the stack would not take, or that goes to the veth `redirect`: is there one, and
/// does the packet fit?
#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn tc_way_out(
    skb: *mut __sk_buff,
    work: *mut Work,
    device: *const DeviceEntry,
    redirect: u32,
    proto: u32,
) -> u32 {
    // SAFETY: as in `service_open`.
    let (Some(work), Some(device)) = (unsafe { (work.as_mut(), device.as_ref()) }) else { return found::NONE };
    if redirect == 0 {
        return route::look_up(skb, work, true, service::incoming(skb, device), proto);
    }
    let Some(to) = DEVICE.get_ptr(&redirect) else { return found::WAY };
    // SAFETY: a pointer into a map that was just found.
    work.mtu = unsafe { (*to).mtu };
    if route::is_too_big(Skb(skb), work.mtu) { found::TOO_BIG } else { found::WAY }
}

#[inline(always)]
pub(crate) fn way_out(skb: Skb, work: *mut Work, device: *const DeviceEntry, redirect: u32, proto: u32) -> u32 {
    forget(tc_way_out(skb.0, work, device, redirect, proto))
}
