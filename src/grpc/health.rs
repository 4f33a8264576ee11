//! grpc.health.v1: the status of the whole server under the empty name, and of each service under its own name.

use super::services::{
    action_cache_server, byte_stream_server, capabilities_server, content_addressable_storage_server,
    execution_server, fetch_server, log_stream_service_server, operations_server, push_server,
};
use tonic_health::{ServingStatus, server::HealthReporter};

/// Names that health checks can ask for; the empty one stands for the whole server.
const NAMES: &[&str] = &[
    "",
    execution_server::SERVICE_NAME,
    action_cache_server::SERVICE_NAME,
    content_addressable_storage_server::SERVICE_NAME,
    capabilities_server::SERVICE_NAME,
    byte_stream_server::SERVICE_NAME,
    operations_server::SERVICE_NAME,
    log_stream_service_server::SERVICE_NAME,
    fetch_server::SERVICE_NAME,
    push_server::SERVICE_NAME,
];

/// Sets the answer to health checks. Cheap to clone. [`super::serve`] gets one; the wiring keeps a clone for the drain.
#[derive(Debug, Clone)]
pub struct Health {
    reporter: HealthReporter,
}

impl Health {
    /// Reports SERVING for everything.
    pub async fn serving() -> Self {
        let health = Self { reporter: HealthReporter::new() };
        health.set(ServingStatus::Serving).await;
        health
    }

    /// Reports NOT_SERVING for everything, at the start of a drain. Load balancers stop sending requests, and watchers are
    /// notified.
    pub async fn drain(&self) {
        self.set(ServingStatus::NotServing).await;
    }

    /// The reporter behind the health service.
    pub(super) fn reporter(&self) -> HealthReporter {
        self.reporter.clone()
    }

    async fn set(&self, status: ServingStatus) {
        for name in NAMES {
            self.reporter.set_service_status(name, status).await;
        }
    }
}
