//! What the command line asks the running agent: names for the numbers in the maps. Nothing can be changed by it.
//!
//! ```text
//!   command line ── one line of JSON ──▶ @proxy-agent/<digest of the pin directory> ──▶ the reconciler's task
//!                ◀── one line of JSON ──                 answers root alone
//! ```
//!
//! The socket has a name in the node's network namespace and no file: it goes with the agent, however that ends, and a
//! container needs no directory for it. Verdicts come from the maps and need no agent.

use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::net::IpAddr;
use std::os::linux::net::SocketAddrExt as _;
use std::os::unix::net::{SocketAddr, UnixStream};
use std::path::Path;
use std::time::Duration;

use nix::sys::socket::{getsockopt, sockopt};
use proxy_core::netpol::digest;
use proxy_core::netpol::hits::Hits;
use proxy_core::netpol::lint::{Finding, rule_name};
use serde::{Deserialize, Serialize};

pub mod listen;

/// The longest wait for the agent.
const DEADLINE: Duration = Duration::from_secs(5);
/// Longer answers are refused: all policies of a large cluster take a tenth of it.
const LONGEST: u64 = 64 << 20;

/// A question.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Question {
    /// Pods of these names (`namespace/name`) and at these addresses.
    Pods {
        /// Names.
        names: Vec<String>,
        /// Addresses.
        ips: Vec<IpAddr>,
    },
    /// Pods with all of these labels, keys and values.
    Labelled(Vec<(String, String)>),
    /// The pods of this node that have a slot.
    Endpoints,
    /// All policies.
    Policies,
    /// What is the matter with all policies, or with the one of this name (`namespace/name`).
    Lint {
        /// Name.
        policy: Option<String>,
    },
    /// Why a verdict is as it is.
    Reason(Asked),
    /// What the maps are to hold: of all, and of the first of these frontends that there is.
    Model(Vec<FrontendName>),
}

/// Key of a frontend, as in the maps.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct FrontendName {
    /// Address; unspecified = all of the node's of its family.
    pub ip: IpAddr,
    /// Port.
    pub port: u16,
    /// Protocol number.
    pub proto: u8,
    /// Scope.
    pub scope: u8,
}

/// A verdict on one side of a flow.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Asked {
    /// Rule, as in the maps.
    pub rule: u32,
    /// The other end.
    pub peer: IpAddr,
    /// Protocol number.
    pub proto: u8,
    /// Destination port, where there is one.
    pub port: Option<u16>,
}

/// An answer.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Answer {
    /// Those that there are, by name. To names that there are not, similar ones.
    Pods {
        /// Pods.
        found: Vec<PodInfo>,
        /// Name asked for → names that there are.
        similar: Vec<(String, Vec<String>)>,
    },
    /// All policies, by name.
    Policies(Vec<PolicyInfo>),
    /// What is the matter with them, by policy; `None` = there is no policy of this name.
    Lint(Option<Vec<LintInfo>>),
    /// Why.
    Reason(ReasonInfo),
    /// What is to be.
    Model(ModelInfo),
}

/// What the maps are to hold.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ModelInfo {
    /// Kinds of objects that have not been listed yet: until then the maps stay as they were.
    pub missing: Vec<String>,
    /// Are all changes to Services and to policies in the maps?
    pub settled: bool,
    /// Epoch of the policies.
    pub epoch: u32,
    /// The frontend; `None` when there is none of the keys.
    pub frontend: Option<FrontendInfo>,
}

/// What a frontend is to be.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct FrontendInfo {
    /// Generation of its row.
    pub generation: u32,
    /// Its endpoints.
    pub endpoints: Vec<std::net::SocketAddr>,
}

/// A pod.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PodInfo {
    /// `namespace/name`.
    pub name: String,
    /// UID.
    pub uid: String,
    /// Node.
    pub node: Option<String>,
    /// Is it on this node?
    pub local: bool,
    /// Addresses.
    pub ips: Vec<IpAddr>,
    /// Its slot in the maps, when it is on this node and policies are in force.
    pub slot: Option<u16>,
    /// Policies that select it, by name; of pods of this node.
    pub policies: Vec<String>,
    /// Why nothing passes but what the node itself begins, when that is so.
    pub locked: Option<String>,
}

/// A policy.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PolicyInfo {
    /// `namespace/name`.
    pub name: String,
    /// Which pods it is for.
    pub subject: String,
    /// Rules of its directions; `None` = it says nothing about the direction.
    pub ingress: Option<Vec<String>>,
    /// The same for egress.
    pub egress: Option<Vec<String>>,
    /// Pods of this node that it selects.
    pub pods: usize,
    /// What is wrong with it.
    pub problems: Vec<String>,
    /// How many things are the matter with it, those that are wrong among them.
    #[serde(default)]
    pub lint: usize,
    /// It is not enforced: what it would refuse passes, and is counted.
    #[serde(default)]
    pub audited: bool,
    /// What each rule of `ingress` has decided; `None` = it is not counted, because no pod of this node has it.
    #[serde(default)]
    pub ingress_hits: Vec<Option<HitsInfo>>,
    /// The same for egress.
    #[serde(default)]
    pub egress_hits: Vec<Option<HitsInfo>>,
    /// Flows that were refused because none of its rules matched, nor one of another policy of the pod; of an audited one:
    /// that would be refused.
    #[serde(default)]
    pub refused: Option<HitsInfo>,
}

/// A number, and since when it is counted.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct HitsInfo {
    /// Judgements of flows.
    pub count: u64,
    /// Seconds since 1970.
    pub since: u64,
}

impl From<Hits> for HitsInfo {
    fn from(Hits { count, since }: Hits) -> Self {
        Self { count, since }
    }
}

/// Something that is the matter with a policy.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct LintInfo {
    /// `namespace/name`.
    pub policy: String,
    /// Which of its rules: `ingress[0]`; `None` = the policy as a whole.
    pub rule: Option<String>,
    /// Name of what is the matter.
    pub kind: String,
    /// What is the matter.
    pub problem: String,
    /// What to do about it.
    pub fix: String,
}

impl From<Finding> for LintInfo {
    fn from(Finding { policy, rule, flaw }: Finding) -> Self {
        Self {
            policy: policy.to_string(),
            rule: rule.map(|(direction, index)| rule_name(direction, index)),
            kind: flaw.name().to_owned(),
            problem: flaw.to_string(),
            fix: flaw.fix(),
        }
    }
}

/// What stands behind a verdict.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ReasonInfo {
    /// The rule that decided.
    pub rule: Option<RuleInfo>,
    /// Policies that isolate the pod, where none of their rules matched.
    pub isolated_by: Vec<String>,
    /// Those among them that are only audited.
    #[serde(default)]
    pub audited: Vec<String>,
    /// Rules that match the peer or the port, but not both.
    pub near: Vec<NearInfo>,
}

/// A rule.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct RuleInfo {
    /// `namespace/name`.
    pub policy: String,
    /// Which of its rules: `ingress[0]`.
    pub rule: String,
    /// The rule in words.
    pub text: String,
}

/// A rule that nearly matched.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct NearInfo {
    /// The rule.
    #[serde(flatten)]
    pub rule: RuleInfo,
    /// Does the peer match?
    pub peer: bool,
    /// Does the port match?
    pub port: bool,
}

/// Why there is no answer.
#[derive(Debug, thiserror::Error)]
pub enum AskError {
    /// No agent of this pin directory runs in this network namespace.
    #[error("the agent does not answer: {0}; it must run in this network namespace, and be asked by root")]
    Away(#[from] std::io::Error),
    /// Somebody else listens there.
    #[error("who listens in the agent's place is not root (uid {0})")]
    Stranger(u32),
    /// The answer cannot be read.
    #[error("the agent's answer cannot be read: {0}; is it of the same version?")]
    Unreadable(#[from] serde_json::Error),
}

/// Asks the agent of this pin directory.
pub fn ask(pin_root: &Path, question: &Question) -> Result<Answer, AskError> {
    let mut stream = UnixStream::connect_addr(&address(pin_root)?)?;
    let peer = getsockopt(&stream, sockopt::PeerCredentials).map_err(std::io::Error::from)?;
    if peer.uid() != 0 {
        return Err(AskError::Stranger(peer.uid()));
    }
    stream.set_read_timeout(Some(DEADLINE))?;
    stream.set_write_timeout(Some(DEADLINE))?;
    let mut line = serde_json::to_vec(question)?;
    line.push(b'\n');
    stream.write_all(&line)?;
    let mut answer = String::new();
    BufReader::new(stream.take(LONGEST)).read_line(&mut answer)?;
    Ok(serde_json::from_str(&answer)?)
}

/// The abstract address of the agent that works on this pin directory.
fn address(pin_root: &Path) -> std::io::Result<SocketAddr> {
    let [high, low] = digest::of(&pin_root);
    SocketAddr::from_abstract_name(format!("proxy-agent/{high:016x}{low:016x}"))
}
