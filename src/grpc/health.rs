//! grpc.health.v1: the status of the whole server under the empty name, and of each service under its own name.
//!
//! Execution is NOT_SERVING on a server that runs no actions, and while no worker can run any. During a drain
//! everything is NOT_SERVING.

use super::services::{
    action_cache_server, byte_stream_server, capabilities_server, content_addressable_storage_server,
    execution_server, fetch_server, log_stream_service_server, operations_server, push_server,
};
use std::sync::Arc;
use tokio::sync::Mutex;
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

/// Sets the answer to health checks. It is cheap to clone: [`super::serve`] gets one, and the wiring keeps a clone for
/// the drain.
#[derive(Debug, Clone)]
pub struct Health {
    reporter: HealthReporter,
    told: Arc<Mutex<Told>>,
}

/// The state that was reported last.
#[derive(Debug)]
struct Told {
    is_draining: bool,
    can_execute: bool,
}

impl Health {
    /// Reports SERVING for everything.
    pub async fn serving() -> Self {
        let told = Told { is_draining: false, can_execute: true };
        let health = Self { reporter: HealthReporter::new(), told: Arc::new(Mutex::new(told)) };
        health.set(ServingStatus::Serving).await;
        health
    }

    /// Reports whether actions can be executed. Has no effect during a drain.
    pub async fn set_can_execute(&self, can_execute: bool) {
        let mut told = self.told.lock().await;
        if told.is_draining || told.can_execute == can_execute {
            return;
        }
        told.can_execute = can_execute;
        let status = if can_execute { ServingStatus::Serving } else { ServingStatus::NotServing };
        self.reporter.set_service_status(execution_server::SERVICE_NAME, status).await;
    }

    /// Reports NOT_SERVING for everything, at the start of a drain. Load balancers stop sending requests, and watchers
    /// are notified.
    pub async fn drain(&self) {
        let mut told = self.told.lock().await;
        told.is_draining = true;
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
