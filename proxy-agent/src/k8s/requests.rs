//! Counts of requests to the API servers, as client-go keeps them: dashboards for kube-proxy show these.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use http::{Method, StatusCode};

use crate::histogram::Histogram;

/// Upper bounds in seconds of `rest_client_request_duration_seconds`
/// (kubernetes/staging/src/k8s.io/component-base/metrics/prometheus/restclient/metrics.go).
const BOUNDS: [f64; 12] = [0.005, 0.025, 0.1, 0.25, 0.5, 1.0, 2.0, 4.0, 8.0, 15.0, 30.0, 60.0];

/// What client-go gives as the code of a request that got no answer.
const NO_ANSWER: &str = "<error>";

/// Requests so far. Their labels are few: servers, methods and codes.
#[derive(Debug, Default)]
pub struct Requests {
    counts: Mutex<BTreeMap<RequestKind, u64>>,
    durations: Mutex<BTreeMap<(String, String), Arc<Histogram>>>,
}

/// What is counted apart.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct RequestKind {
    /// Status, or `<error>`.
    pub code: String,
    /// Host and port of the server.
    pub host: String,
    /// HTTP method.
    pub method: String,
}

impl Requests {
    /// One more; `status` is `None` where no answer came. `took` until its headers were there, of a watch as well.
    pub(crate) fn count(&self, host: &str, method: &Method, status: Option<StatusCode>, took: Duration) {
        let code = status.map_or_else(|| NO_ANSWER.to_owned(), |status| status.as_u16().to_string());
        let kind = RequestKind { code, host: host.to_owned(), method: method.to_string() };
        if let Ok(mut counts) = self.counts.lock() {
            *counts.entry(kind).or_default() += 1;
        }
        let Ok(mut durations) = self.durations.lock() else { return };
        let histogram = durations.entry((method.to_string(), host.to_owned()));
        histogram.or_insert_with(|| Arc::new(Histogram::new(BOUNDS.to_vec()))).observe(took);
    }

    /// How many of each kind.
    pub fn counts(&self) -> Vec<(RequestKind, u64)> {
        self.counts.lock().map_or_else(|_| Vec::new(), |counts| counts.clone().into_iter().collect())
    }

    /// How long they took, by method and host.
    pub fn durations(&self) -> Vec<((String, String), Arc<Histogram>)> {
        self.durations.lock().map_or_else(|_| Vec::new(), |durations| durations.clone().into_iter().collect())
    }
}
