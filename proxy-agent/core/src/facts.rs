//! What servers and metrics tell of Services, beside the maps.

use std::collections::BTreeMap;
use std::num::NonZeroU16;

use crate::name::ObjectName;

/// A snapshot; cheap to compare.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Facts {
    /// Services with a `healthCheckNodePort`.
    pub health_checks: BTreeMap<ObjectName, HealthCheck>,
    /// Service ports with `internalTrafficPolicy: Local` that have endpoints, but none on this node.
    pub no_local_internal: u32,
    /// Service ports with `externalTrafficPolicy: Local` that have endpoints, but none on this node.
    pub no_local_external: u32,
}

/// What the health check server of one Service answers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct HealthCheck {
    /// `spec.healthCheckNodePort`.
    pub port: NonZeroU16,
    /// Distinct endpoints of this node that are ready, over all ports; terminating ones do not count (KEP-1669).
    pub local_endpoints: u32,
}
