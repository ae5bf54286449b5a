//! What the proxy does, on port 10249 of the loopback address, as kube-proxy has it.

use std::sync::Arc;

use axum::Router;
use axum::http::{StatusCode, header};
use axum::routing::any;

use super::metrics::Metrics;

/// Media type of kube-proxy's metrics.
pub const EXPOSITION: &str = "text/plain; version=0.0.4; charset=utf-8";

/// What is told beside the metrics.
#[derive(Clone, Debug)]
pub struct About {
    /// The name that `/proxyMode` answers: `nftables`, whose semantics these are, unless another was asked for.
    pub mode: String,
    /// `/configz`.
    pub configz: String,
    /// Was profiling asked for?
    pub profiling: bool,
}

/// The paths of the metrics server.
pub fn router(metrics: &Arc<Metrics>, about: About) -> Router {
    let metrics = Arc::clone(metrics);
    let About { mode, configz, profiling } = about;
    let text = |body: String| {
        any(move || {
            let headers =
                [(header::CONTENT_TYPE, "text/plain; charset=utf-8"), (header::X_CONTENT_TYPE_OPTIONS, "nosniff")];
            std::future::ready((headers, body.clone()))
        })
    };
    let no_profile =
        if profiling { "enableProfiling is set, but this agent has no profiler\n" } else { "404 page not found\n" };
    Router::new()
        .route(
            "/metrics",
            any(move || {
                let metrics = Arc::clone(&metrics);
                async move {
                    // Counters are read from the kernel.
                    match tokio::task::spawn_blocking(move || metrics.scrape()).await {
                        Ok(text) => Ok(([(header::CONTENT_TYPE, EXPOSITION)], text)),
                        Err(_) => Err(StatusCode::INTERNAL_SERVER_ERROR),
                    }
                }
            }),
        )
        .route("/proxyMode", text(mode))
        .route(
            "/configz",
            any(move || std::future::ready(([(header::CONTENT_TYPE, "application/json")], configz.clone()))),
        )
        .route("/debug/pprof", any(move || std::future::ready((StatusCode::NOT_FOUND, no_profile))))
        .route("/debug/pprof/{*rest}", any(move || std::future::ready((StatusCode::NOT_FOUND, no_profile))))
}
