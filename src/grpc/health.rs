//! grpc.health.v1: the status of the whole server, under the empty name, and of each service under its own.

use tonic_health::{ServingStatus, server::HealthReporter};

/// Switches what health checks answer; cheap to clone. Everything serves from the start.
#[derive(Debug, Clone)]
pub struct Health {
    reporter: HealthReporter,
    services: &'static [&'static str],
}

impl Health {
    /// Health of the server and of these services, all of them serving.
    pub async fn serving(services: &'static [&'static str]) -> Self {
        let health = Self { reporter: HealthReporter::new(), services };
        health.set(ServingStatus::Serving).await;
        health
    }

    /// From now on everything is NOT_SERVING: load balancers send nothing new, watchers are told at once. For the start of a
    /// drain.
    pub async fn drain(&self) {
        self.set(ServingStatus::NotServing).await;
    }

    /// The reporter behind the health service.
    pub(super) fn reporter(&self) -> HealthReporter {
        self.reporter.clone()
    }

    async fn set(&self, status: ServingStatus) {
        for service in self.services.iter().copied().chain([""]) {
            self.reporter.set_service_status(service, status).await;
        }
    }
}
