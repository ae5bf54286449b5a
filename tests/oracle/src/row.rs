//! The rows of the semantics table, as switches.

/// A row that an [`crate::verdict::Oracle`] gets wrong on purpose.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Row {
    /// An absent podSelector selects no pod.
    O1,
    /// `egress: []` isolates egress.
    O2,
    /// Ingress rules count under `policyTypes: [Egress]`.
    O3,
    /// A policy without rules does not isolate.
    O4,
    /// The rule `{}` allows nothing.
    O5,
    /// An empty list of peers is nobody.
    O6,
    /// An empty list of ports is every TCP port.
    O7,
    /// Only the first policy counts.
    O8,
    /// Peer or port suffices.
    O9,
    /// Egress is not asked.
    O10,
    /// A peer with ipBlock and selectors is its ipBlock.
    O11,
    /// A policy whose subject cannot be read selects nothing.
    O11Subject,
    /// A list of ports that cannot be read is no list of ports.
    O11Ports,
    /// A range with host bits is none.
    O12,
    /// A podSelector alone looks into all namespaces.
    P1,
    /// A namespaceSelector alone finds nothing.
    P2,
    /// Two selectors of one peer: either.
    P3,
    /// `namespaceSelector: {}` means outside addresses too.
    P4,
    /// `NotIn` wants the label.
    P5NotIn,
    /// `DoesNotExist` is `Exists`.
    P5DoesNotExist,
    /// A pod of a namespace that is not known matches every namespace selector.
    P6,
    /// What one peer excepts no other may allow.
    P7,
    /// `except` is not read.
    P7Except,
    /// An ipBlock does not match pods.
    P8,
    /// An ipBlock does not match nodes.
    P9,
    /// `0.0.0.0/0` is every address.
    P10,
    /// hostNetwork pods are found by selectors.
    P11,
    /// No protocol: every protocol.
    T1,
    /// No port: none.
    T2,
    /// endPort is not read.
    T3,
    /// Egress rules mean the source port.
    T4,
    /// Named ports of ingress are those of the peer.
    T5,
    /// Named ports of egress are those of the source.
    T6,
    /// A name counts whatever its protocol.
    T7,
    /// Names of sidecars do not count.
    T8,
    /// Names of other init containers count.
    T8Init,
    /// SCTP is TCP.
    T9,
    /// Port 0 is every port.
    T10,
    /// A rule without ports is for protocols with ports.
    Protocols,
    /// The node is a stranger to its pods.
    LocalNode,
    /// A pod does not reach itself through a Service.
    Hairpin,
    /// A finished pod keeps its address.
    Finished,
    /// An address belongs to the oldest pod that has it.
    Reuse,
    /// Policies leave a terminating namespace before its pods.
    Terminating,
    /// Without a known port, rules with ports match.
    Fragment,
    /// Audited policies are enforced.
    Audit,
}

impl Row {
    /// Every row.
    pub const ALL: [Self; 46] = [
        Self::O1,
        Self::O2,
        Self::O3,
        Self::O4,
        Self::O5,
        Self::O6,
        Self::O7,
        Self::O8,
        Self::O9,
        Self::O10,
        Self::O11,
        Self::O11Subject,
        Self::O11Ports,
        Self::O12,
        Self::P1,
        Self::P2,
        Self::P3,
        Self::P4,
        Self::P5NotIn,
        Self::P5DoesNotExist,
        Self::P6,
        Self::P7,
        Self::P7Except,
        Self::P8,
        Self::P9,
        Self::P10,
        Self::P11,
        Self::T1,
        Self::T2,
        Self::T3,
        Self::T4,
        Self::T5,
        Self::T6,
        Self::T7,
        Self::T8,
        Self::T8Init,
        Self::T9,
        Self::T10,
        Self::Protocols,
        Self::LocalNode,
        Self::Hairpin,
        Self::Finished,
        Self::Reuse,
        Self::Terminating,
        Self::Fragment,
        Self::Audit,
    ];
}
