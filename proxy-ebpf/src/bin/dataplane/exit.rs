//! The one way out of every program.

use proxy_abi::{Hook, Reason};

use crate::ctx::Skb;
use crate::maps::COUNTER;
use crate::trace;

/// What a program decided about one packet or one system call, and what decided.
#[derive(Clone, Copy)]
pub(crate) struct Outcome {
    pub(crate) verdict: Verdict,
    /// A [`Reason`], as a number.
    pub(crate) reason: u32,
    /// Service port; 0 = none.
    pub(crate) service: u32,
    /// Backend; meaningful with a service.
    pub(crate) backend: u32,
    /// Policy rule (`proxy_abi::policy::RuleRef`) that allowed or refused it; 0 = none.
    pub(crate) rule: u32,
}

#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Verdict {
    /// The next program, then the kernel.
    Pass,
    /// The helper `bpf_redirect` has been told where to.
    Redirect,
    /// The end.
    Drop,
}

impl Outcome {
    #[inline(always)]
    pub(crate) fn pass(reason: Reason) -> Self {
        Self::numbered(Verdict::Pass, reason as u32)
    }

    #[inline(always)]
    pub(crate) fn drop(reason: Reason) -> Self {
        Self::numbered(Verdict::Drop, reason as u32)
    }

    #[inline(always)]
    pub(crate) fn numbered(verdict: Verdict, reason: u32) -> Self {
        Self { verdict, reason, service: 0, backend: 0, rule: 0 }
    }

    /// A reason that says itself whether the packet passes.
    #[inline(always)]
    pub(crate) fn decided(reason: u32) -> Self {
        let verdict = if reason >= u32::from(Reason::FIRST_DROP) { Verdict::Drop } else { Verdict::Pass };
        Self::numbered(verdict, reason)
    }

    /// With the policy rule that decided.
    #[inline(always)]
    pub(crate) fn by(mut self, rule: u32) -> Self {
        self.rule = rule;
        self
    }

    #[inline(always)]
    pub(crate) fn of(mut self, service: u32, backend: u32) -> Self {
        self.service = service;
        self.backend = backend;
        self
    }
}

/// Counts one packet under a reason.
#[inline(always)]
pub(crate) fn count(hook: Hook, reason: Reason, bytes: u32) {
    count_number(hook, reason as u32, bytes);
}

/// Counts, beside the outcome, something that was found out about a packet. Hook and reason are numbers.
#[inline(always)]
pub(crate) fn count_beside(hook: u32, reason: u32) {
    add(hook * Reason::ROOM + reason, 0);
}

#[inline(always)]
fn count_number(hook: Hook, reason: u32, bytes: u32) {
    add(hook as u32 * Reason::ROOM + reason, bytes);
}

#[inline(always)]
fn add(index: u32, bytes: u32) {
    if let Some(counter) = COUNTER.get_ptr_mut(index) {
        // SAFETY: the pointer is to this CPU's entry; programs of one CPU do not interrupt each other here.
        unsafe {
            (*counter).packets += 1;
            (*counter).bytes += u64::from(bytes);
        }
    }
}

/// Ends a packet program: counts the outcome, tells it where somebody traces, and turns it into what tc understands.
#[inline(always)]
pub(crate) fn packet(hook: Hook, skb: Skb, outcome: &Outcome) -> i32 {
    count_number(hook, outcome.reason, skb.len());
    trace::packet(skb, hook, outcome);
    match outcome.verdict {
        // TCX_NEXT and TC_ACT_UNSPEC alike: others may follow.
        Verdict::Pass => -1,
        // TC_ACT_REDIRECT.
        Verdict::Redirect => 7,
        // TC_ACT_SHOT.
        Verdict::Drop => 2,
    }
}

/// Ends a socket program: 1 lets the call go on, 0 refuses it with EPERM.
#[inline(always)]
pub(crate) fn socket(hook: Hook, outcome: &Outcome) -> i32 {
    count_number(hook, outcome.reason, 0);
    i32::from(outcome.verdict != Verdict::Drop)
}
