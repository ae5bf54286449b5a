//! Network policy at a pod's veth. The decision is [`proxy_ebpf::policy`]; here are its maps, what is asked of it, and
//! what a flow remembers of the answer.
//!
//! ```text
//!                 first packet                            later ones, either direction
//!   initiator     from_pod: egress, towards the           slot and revision of the stamp are the pod's: pass
//!                 translated destination                  else: judged anew by the flow's tuples
//!   responder     to_pod: ingress, from the source        the same
//!                 as the initiator sent it
//! ```
//!
//! Each side asks for itself alone, and stamps what it allows; what is refused leaves no entry and no stamp. A slot of 0
//! asks nothing.
//!
//! What is allowed is then asked of the shadow, where there is one (`policy_audit`): by those who called for the verdict,
//! because one function after the other needs no more stack than one.

use core::arch::asm;

use aya_ebpf::bindings::__sk_buff;
use aya_ebpf::maps::lpm_trie::Key;
use proxy_abi::flow::provenance;
use proxy_abi::policy::{Bits, BitsKey, BlockEntry, CellWord, Direction, PortPage, SetEntry, SlotWord, prefix_of};
use proxy_abi::{DeviceEntry, FlowEntry, FrontendEntry, Hook, IpBytes, PortBe, Proto, Reason, Work};
use proxy_ebpf::policy::{self, Cause, Found, Lookup, Question};

use crate::ctx::{Skb, copy, forget};
use crate::maps::{
    DRY_RUN, NODE_OPEN, POLICY_BITS, POLICY_BLOCK, POLICY_EPOCH, POLICY_HITS, POLICY_IP, POLICY_PAGE, POLICY_POD_HITS,
    POLICY_PREFIX, POLICY_SET, POLICY_SLOT, WORK, own_work,
};
use crate::{exit, flow, frontend, trace};

/// The pinned maps.
struct Kernel;

/// What a pointer that a map gave points to. SAFETY, for all uses: values of maps stay readable while the program runs;
/// what may change under it is told by the epoch, and judged again.
macro_rules! found {
    ($pointer:expr) => {
        $pointer.map(|found| unsafe { &*found })
    };
}

impl Lookup for Kernel {
    #[inline(always)]
    fn epoch(&self) -> u32 {
        // SAFETY: a pointer into a map. Volatile: it is read again to see whether it has moved.
        POLICY_EPOCH.get_ptr(0).map_or(0, |epoch| unsafe { core::ptr::read_volatile(epoch) })
    }

    #[inline(always)]
    fn slot(&self, index: u32) -> Option<SlotWord> {
        found!(POLICY_SLOT.get_ptr(index)).copied()
    }

    #[inline(always)]
    fn block(&self, block: u32) -> Option<&BlockEntry> {
        found!(POLICY_BLOCK.get_ptr(block))
    }

    #[inline(always)]
    fn set(&self, set: u32) -> Option<&SetEntry> {
        found!(POLICY_SET.get_ptr(set))
    }

    #[inline(always)]
    fn ip(&self, ip: &IpBytes) -> Option<CellWord> {
        found!(POLICY_IP.get_ptr(ip)).copied()
    }

    #[inline(always)]
    fn prefix(&self, ip: &IpBytes) -> Option<CellWord> {
        let whole = prefix_of(*ip);
        let [a, b, c, d] = whole.ip.0;
        POLICY_PREFIX.get(Key::new(whole.length, [whole.scope, a, b, c, d])).copied()
    }

    #[inline(always)]
    fn page(&self, index: u32) -> Option<&PortPage> {
        found!(POLICY_PAGE.get_ptr(index))
    }

    #[inline(always)]
    fn bits(&self, key: BitsKey) -> Option<&Bits> {
        found!(POLICY_BITS.get_ptr(&key))
    }

    #[inline(always)]
    fn shadow(&self, block: u32) -> u32 {
        policy_shadow(block)
    }

    #[inline(always)]
    fn peer_cell(&self, _: &IpBytes, side: u32) -> u32 {
        policy_peer(side)
    }

    #[inline(always)]
    fn judge_set(&self, first: u32, peer: u32, port: u32) -> Found {
        Found::unpack(policy_rules(first, peer, port))
    }
}

/// [`policy::peer_cell`] of the address in `work`.
#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn policy_peer(side: u32) -> u32 {
    let Some(work) = WORK.get_ptr_mut(0) else { return 0 };
    // SAFETY: this CPU's entry of the map `work`, which nobody else uses now.
    policy::peer_cell(&Kernel, unsafe { &(*work).peer }, side)
}

/// [`BlockEntry::shadow`] of a block.
#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn policy_shadow(block: u32) -> u32 {
    Kernel.block(block).map_or(0, |block| block.shadow)
}

/// [`policy::judge_set`], packed.
#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn policy_rules(first: u32, peer: u32, port: u32) -> u64 {
    policy::judge_set(&Kernel, first, peer, port).pack()
}

// The stacks of a call chain together are limited, and the programs' own are large: what asks here is called by them, and
// not by what they call.

/// A question as one number: protocol, flags of [`Question`] and [`EGRESS`], port in memory order.
#[inline(always)]
fn about(proto: Proto, flags: u8, port: PortBe) -> u32 {
    u32::from(proto.0) | u32::from(flags) << 8 | u32::from(port.0) << 16
}

/// The pod is the initiator. Beside the flags of [`Question`].
const EGRESS: u8 = 0x80;

/// Is the other end in `work` this node?
#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn policy_is_node(work: *const Work) -> u32 {
    // SAFETY: this CPU's entry of the map `work`, which nobody else uses now.
    unsafe { work.as_ref() }.map_or(0, |work| frontend::address(&work.peer) & FrontendEntry::ADDRESS_NODE)
}

/// Asks for one side of a flow, whose other end is in `work`, and leaves revision and rule there. 0: it may pass; else
/// the reason why not.
#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn policy_judge(work: *mut Work, slot: u32, about: u32) -> u32 {
    // SAFETY: this CPU's entry of the map `work`, which nobody else uses now.
    let Some(work) = (unsafe { work.as_mut() }) else { return Reason::PolicyUnready as u32 };
    work.asked_about = about;
    work.asked_slot = slot;
    let flags = (about >> 8) as u8;
    let egress = flags & EGRESS != 0;
    let question = Question {
        slot: slot as u16,
        direction: if egress { Direction::Egress } else { Direction::Ingress },
        // In `work`, where the look-up finds it.
        peer: IpBytes::UNSPECIFIED,
        proto: Proto(about as u8),
        port: PortBe((about >> 16) as u16),
        flags: flags & !EGRESS,
    };
    let judgement = policy::judge(&Kernel, &question);
    work.revision = judgement.revision;
    work.rule = judgement.rule.0;
    if judgement.allowed {
        policy_count(0);
        return 0;
    }
    match judgement.cause {
        Cause::Rule | Cause::Isolated if !egress => {
            policy_count(REFUSED);
            Reason::PolicyIngress as u32
        }
        Cause::Rule | Cause::Isolated => {
            if NODE_OPEN.load() != 0 && policy_is_node(work) != 0 {
                0
            } else {
                policy_count(REFUSED);
                Reason::PolicyEgress as u32
            }
        }
        _ if slot == u32::from(DeviceEntry::HELD) => Reason::PolicyHeld as u32,
        _ => Reason::PolicyUnready as u32,
    }
}

/// To [`policy_count`]: the flow is refused.
const REFUSED: u32 = 1;

/// Counts the judgement that is in `work`, a part of which is a key here: see [`own_work`].
#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn policy_count(refused: u32) -> u32 {
    if DRY_RUN.load() != 0 {
        return 0;
    }
    let Some(work) = own_work() else { return 0 };
    if work.rule != 0
        && let Some(hits) = POLICY_HITS.get_ptr_mut(&work.rule)
    {
        // SAFETY: a pointer into a map that was just found; other CPUs add to it in the same way.
        unsafe { add(&raw mut (*hits).count) };
    }
    if refused != 0
        && let Some(hits) = POLICY_POD_HITS.get_ptr_mut(work.asked_slot)
    {
        let flags = (work.asked_about >> 8) as u8;
        // SAFETY: as above.
        unsafe {
            let counted =
                if flags & Question::SHADOW != 0 { &raw mut (*hits).audited } else { &raw mut (*hits).refused };
            add(counted.cast::<u64>().add(usize::from(flags & EGRESS != 0)));
        }
    }
    0
}

/// Adds one, whatever other CPUs add at the same time. By the instruction itself: `core` has no atomic addition for this
/// target, because older kernels cannot tell what was there before, which nobody asks for here.
///
/// # Safety
/// `to` points into a map, at 8 aligned bytes that nobody touches but by adding.
#[inline(always)]
unsafe fn add(to: *mut u64) {
    // SAFETY: the caller's; nothing but these bytes is written.
    unsafe { asm!("lock *(u64 *)({to} + 0) += {one}", to = in(reg) to, one = in(reg) 1_u64, options(nostack)) };
}

/// Asks the shadow about the flow in `work` that was just allowed. Where it would have been refused, that is counted and
/// told, and nothing else.
#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn policy_audit(skb: *mut __sk_buff, work: *mut Work, hook: u32) -> u32 {
    if DRY_RUN.load() != 0 {
        return 0;
    }
    // SAFETY: this CPU's entry of the map `work`, which nobody else uses now.
    let Some(work) = (unsafe { work.as_mut() }) else { return 0 };
    let word = Kernel.slot(SlotWord::index(work.asked_slot as u16, Kernel.epoch()));
    if policy_shadow(word.map_or(0, |word| word.block)) == 0 {
        return 0;
    }
    let (rule, revision) = (work.rule, work.revision);
    let refused = policy_judge(work, work.asked_slot, work.asked_about | u32::from(Question::SHADOW) << 8);
    // Not what is not ready: that says nothing of the policies.
    if refused == Reason::PolicyIngress as u32 || refused == Reason::PolicyEgress as u32 {
        exit::count_beside(hook, Reason::PolicyAudit as u32);
        trace::beside(Skb(skb), hook, Reason::PolicyAudit as u32, work.rule);
    }
    work.rule = rule;
    work.revision = revision;
    0
}

/// [`policy_audit`], where the verdict that was just asked for allows the flow.
#[inline(always)]
fn audited(skb: Skb, work: *mut Work, hook: Hook, refused: u32) -> u32 {
    if refused == 0 {
        policy_audit(skb.0, work, hook as u32);
    }
    refused
}

/// Flags that a packet at `to_pod` gives a question: where it comes from.
#[inline(always)]
fn arriving(skb: Skb) -> u8 {
    let from = skb.ingress_ifindex();
    if from == skb.ifindex() {
        // It came out of this very veth: the pod's own frame, or the refusal of one.
        return Question::HAIRPIN;
    }
    if from == 0 && skb.has_socket() { Question::FROM_NODE } else { 0 }
}

/// Does the first packet of a flow that arrives at a pod come from a socket of this node?
#[inline(always)]
pub(crate) fn is_from_node(skb: Skb) -> bool {
    skb.ingress_ifindex() == 0 && skb.has_socket()
}

/// Judges this pod's side of the new flow in `work`, and stamps it. 0, or the reason to drop its first packet.
/// `egress`: the pod is its initiator.
#[unsafe(no_mangle)]
#[inline(never)]
pub(crate) extern "C" fn policy_new(
    skb: *mut __sk_buff,
    work: *mut Work,
    device: *const DeviceEntry,
    egress: u32,
    proto: u32,
) -> u32 {
    let skb = Skb(skb);
    // SAFETY: this CPU's entry of the map `work`, which nobody else uses now, and a pointer into a map.
    let (Some(work), Some(device)) = (unsafe { (work.as_mut(), device.as_ref()) }) else {
        return Reason::PolicyUnready as u32;
    };
    let slot = device.slot;
    if slot == 0 {
        return 0;
    }
    let mut flags = 0;
    if egress != 0 {
        copy(&mut work.peer, &work.entry.translated.dst);
        flags = EGRESS;
        if work.entry.flags & FlowEntry::HAIRPIN != 0 {
            flags |= Question::HAIRPIN;
        }
    } else {
        copy(&mut work.peer, &work.entry.original.src);
        flags |= arriving(skb);
    }
    let refused =
        forget(policy_judge(work, u32::from(slot), about(Proto(proto as u8), flags, work.entry.translated.dst_port)));
    if refused != 0 {
        return refused;
    }
    if egress != 0 {
        work.entry.initiator_stamp.revision = work.revision;
        work.entry.initiator_stamp.rule = work.rule;
        work.entry.initiator_slot = slot;
    } else {
        work.entry.responder_stamp.revision = work.revision;
        work.entry.responder_stamp.rule = work.rule;
        work.entry.responder_slot = slot;
    }
    0
}

/// [`policy_new`], for the packet of a hook.
#[inline(always)]
pub(crate) fn open(skb: Skb, work: *mut Work, device: *const DeviceEntry, hook: Hook, proto: Proto) -> u32 {
    let refused = policy_new(skb.0, work, device, u32::from(matches!(hook, Hook::FromPod)), u32::from(proto.0));
    audited(skb, work, hook, forget(refused))
}

/// [`policy_again`], for the flow under the key in `work`, where there is one.
#[inline(always)]
pub(crate) fn by_key(skb: Skb, work: *mut Work, hook: Hook, how: u32, proto: Proto) -> u32 {
    let refused = policy_again(skb.0, core::ptr::null_mut(), how, u32::from(proto.0));
    audited(skb, work, hook, forget(refused))
}

/// Flags of [`again`].
#[inline(always)]
pub(crate) fn side(arrives: bool, answers: u32) -> u32 {
    let initiates = if (answers != 0) == arrives { again::INITIATES } else { 0 };
    initiates | if arrives && answers == 0 { again::ARRIVES } else { 0 }
}

/// Which side of a flow a pod is on, and how the packet at hand goes.
pub(crate) mod again {
    /// The pod is the initiator.
    pub(crate) const INITIATES: u32 = 1 << 16;
    /// The packet goes from the initiator to this pod.
    pub(crate) const ARRIVES: u32 = 1 << 17;
}

/// Judges this pod's side of a flow of the table, and stamps it. 0, or the reason to drop the packet. Without an entry the
/// one under the key in `work`. `how`: the slot, and flags of [`again`].
#[unsafe(no_mangle)]
#[inline(never)]
pub(crate) extern "C" fn policy_again(skb: *mut __sk_buff, entry: *mut FlowEntry, how: u32, proto: u32) -> u32 {
    let Some(work) = own_work() else { return Reason::PolicyUnready as u32 };
    let entry = if entry.is_null() { flow::find(&work.key).unwrap_or(entry) } else { entry };
    // SAFETY: a pointer into a map that was just found. Single fields of it are written without a lock: whoever is later
    // has seen the later policy, or is judged again.
    let Some(entry) = (unsafe { entry.as_mut() }) else { return Reason::PolicyUnready as u32 };
    let slot = how & 0xffff;
    let initiates = how & again::INITIATES != 0;
    let mut flags = if entry.flags & FlowEntry::HAIRPIN != 0 { Question::HAIRPIN } else { 0 };
    if initiates {
        copy(&mut work.peer, &entry.translated.dst);
        flags |= EGRESS;
    } else {
        copy(&mut work.peer, &entry.original.src);
        if how & again::ARRIVES != 0 {
            flags |= arriving(Skb(skb));
        }
        if entry.provenance == provenance::NODE {
            flags |= Question::FROM_NODE;
        }
    }
    let refused = policy_judge(work, slot, about(Proto(proto as u8), flags, entry.translated.dst_port));
    let stamp = if initiates { &mut entry.initiator_stamp } else { &mut entry.responder_stamp };
    if refused != 0 {
        let live = stamp.revision != 0 && refused != Reason::PolicyHeld as u32;
        return if live { Reason::PolicyCut as u32 } else { refused };
    }
    if DRY_RUN.load() != 0 {
        return 0;
    }
    stamp.revision = work.revision;
    stamp.rule = work.rule;
    if initiates {
        entry.initiator_slot = slot as u16;
    } else {
        entry.responder_slot = slot as u16;
        if flags & Question::FROM_NODE != 0 {
            entry.provenance = provenance::NODE;
        }
    }
    0
}

/// May a packet of a flow in the table pass this pod's side? Mostly one comparison; else [`policy_again`]. 0, or the
/// reason to drop it; the rule is in `work`.
#[inline(always)]
pub(crate) fn check(
    skb: Skb,
    found: *mut FlowEntry,
    work: *mut Work,
    slot: u16,
    hook: Hook,
    answers: u32,
    proto: Proto,
) -> u32 {
    let arrives = !matches!(hook, Hook::FromPod);
    // SAFETY: a pointer into a map that was just found; and this CPU's entry of the map `work`.
    let (entry, plan) = unsafe { (&*found, &mut *work) };
    let initiates = forget(u32::from((answers != 0) == arrives));
    let (stamp, of) = if initiates != 0 {
        (&entry.initiator_stamp, entry.initiator_slot)
    } else {
        (&entry.responder_stamp, entry.responder_slot)
    };
    let revision = policy::revision(&Kernel, slot);
    plan.rule = stamp.rule;
    // Nothing that was never judged has a revision, and a slot that is not there has none.
    if revision != 0 && forget(u32::from(of ^ slot) | (stamp.revision ^ revision)) == 0 {
        return 0;
    }
    let how = u32::from(slot)
        | if initiates != 0 { again::INITIATES } else { 0 }
        | if arrives && answers == 0 { again::ARRIVES } else { 0 };
    let refused = policy_again(skb.0, found, how, u32::from(proto.0));
    audited(skb, work, hook, forget(refused))
}

/// Judges a packet that belongs to no flow and makes none. The other end is in `work`.
#[inline(always)]
pub(crate) fn single(skb: Skb, work: *mut Work, slot: u16, hook: Hook, proto: Proto) -> u32 {
    let flags = Question::NO_PORT | if matches!(hook, Hook::FromPod) { EGRESS } else { arriving(skb) };
    let refused = policy_judge(work, u32::from(slot), about(proto, flags, PortBe(0)));
    audited(skb, work, hook, forget(refused))
}
