//! Label selectors.

use std::collections::BTreeSet;
use std::fmt;
use std::sync::Arc;

use super::spec::{Labels, SelectorSpec};

/// What labels must satisfy: all requirements. None of them = matches everything.
#[derive(Clone, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Selector {
    requirements: BTreeSet<Requirement>,
}

/// One requirement.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
enum Requirement {
    /// The label has one of these values.
    In(Arc<str>, BTreeSet<Arc<str>>),
    /// The label is missing, or has none of these values.
    NotIn(Arc<str>, BTreeSet<Arc<str>>),
    /// The label is there.
    Exists(Arc<str>),
    /// The label is missing.
    DoesNotExist(Arc<str>),
}

/// Why a selector has no meaning.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum SelectorFault {
    /// No such operator.
    #[error("operator {0:?} is none of In, NotIn, Exists, DoesNotExist")]
    Operator(Arc<str>),
    /// `In` and `NotIn` need values.
    #[error("operator {0} of label {1:?} has no values")]
    NoValues(Arc<str>, Arc<str>),
    /// `Exists` and `DoesNotExist` have none.
    #[error("operator {0} of label {1:?} has values")]
    Values(Arc<str>, Arc<str>),
}

impl Selector {
    /// Reads one. Values that no label may have are no fault: they match nothing.
    pub fn parse(spec: &SelectorSpec) -> Result<Self, SelectorFault> {
        let mut requirements: BTreeSet<_> = spec
            .labels
            .iter()
            .map(|(key, value)| Requirement::In(Arc::clone(key), BTreeSet::from([Arc::clone(value)])))
            .collect();
        for expression in &spec.expressions {
            let (key, operator) = (Arc::clone(&expression.key), Arc::clone(&expression.operator));
            let values: BTreeSet<_> = expression.values.iter().cloned().collect();
            requirements.insert(match (&*expression.operator, values.is_empty()) {
                ("In", false) => Requirement::In(key, values),
                ("NotIn", false) => Requirement::NotIn(key, values),
                ("Exists", true) => Requirement::Exists(key),
                ("DoesNotExist", true) => Requirement::DoesNotExist(key),
                ("In" | "NotIn", true) => return Err(SelectorFault::NoValues(operator, key)),
                ("Exists" | "DoesNotExist", false) => return Err(SelectorFault::Values(operator, key)),
                _ => return Err(SelectorFault::Operator(operator)),
            });
        }
        Ok(Self { requirements })
    }

    /// Does it match everything?
    pub fn is_empty(&self) -> bool {
        self.requirements.is_empty()
    }

    /// Does it match an object with these labels?
    pub fn matches(&self, labels: &Labels) -> bool {
        self.requirements.iter().all(|requirement| match requirement {
            Requirement::In(key, values) => labels.get(key).is_some_and(|value| values.contains(value)),
            Requirement::NotIn(key, values) => labels.get(key).is_none_or(|value| !values.contains(value)),
            Requirement::Exists(key) => labels.contains_key(key),
            Requirement::DoesNotExist(key) => !labels.contains_key(key),
        })
    }
}

/// As kubectl writes selectors: `app=web,tier in (a,b),!old`.
impl fmt::Display for Selector {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let set = |values: &BTreeSet<Arc<str>>| values.iter().map(|value| &**value).collect::<Vec<_>>().join(",");
        for (at, requirement) in self.requirements.iter().enumerate() {
            if at > 0 {
                f.write_str(",")?;
            }
            match requirement {
                Requirement::In(key, values) if values.len() == 1 => write!(f, "{key}={}", set(values))?,
                Requirement::In(key, values) => write!(f, "{key} in ({})", set(values))?,
                Requirement::NotIn(key, values) => write!(f, "{key} notin ({})", set(values))?,
                Requirement::Exists(key) => f.write_str(key)?,
                Requirement::DoesNotExist(key) => write!(f, "!{key}")?,
            }
        }
        Ok(())
    }
}
