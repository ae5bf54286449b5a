//! Names of Kubernetes objects.

use std::fmt;
use std::sync::Arc;

/// `namespace/name` of a namespaced object.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ObjectName {
    /// Namespace.
    pub namespace: Arc<str>,
    /// Name.
    pub name: Arc<str>,
}

impl ObjectName {
    /// From its two parts.
    pub fn new(namespace: impl Into<Arc<str>>, name: impl Into<Arc<str>>) -> Self {
        Self { namespace: namespace.into(), name: name.into() }
    }
}

impl fmt::Display for ObjectName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.namespace, self.name)
    }
}

/// One port of one Service: the unit of load balancing, affinity and identity. Shown as `namespace/name:port`, or
/// `namespace/name` when the port has no name.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ServicePortName {
    /// The Service.
    pub service: ObjectName,
    /// Name of its port; empty when the Service has one unnamed port.
    pub port: Arc<str>,
}

impl ServicePortName {
    /// The reverse of its text form; `None` when the text is no such name.
    pub fn parse(text: &str) -> Option<Self> {
        let (namespace, rest) = text.split_once('/')?;
        let (name, port) = rest.split_once(':').unwrap_or((rest, ""));
        let parsed = Self { service: ObjectName::new(namespace, name), port: port.into() };
        let whole = !namespace.is_empty() && !name.is_empty() && parsed.to_string() == text;
        whole.then_some(parsed)
    }
}

impl fmt::Display for ServicePortName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.port.is_empty() { self.service.fmt(f) } else { write!(f, "{}:{}", self.service, self.port) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn service_port_names_survive_their_text() {
        let name = |namespace: &str, name: &str, port: &str| ServicePortName {
            service: ObjectName::new(namespace, name),
            port: port.into(),
        };
        let cases = [
            ("default/web", Some(name("default", "web", ""))),
            ("default/web:http", Some(name("default", "web", "http"))),
            ("", None),
            ("web", None),
            ("/web", None),
            ("default/", None),
            ("default/:http", None),
            ("default/web:", None),
        ];
        for (text, expected) in cases {
            assert_eq!(ServicePortName::parse(text), expected, "{text:?}");
            assert_eq!(expected.map_or(text.to_owned(), |name| name.to_string()), text);
        }
    }
}
