//! The paths for operators and their tools: whether the server is alive, whether it is ready, and its metrics.
//!
//! The answers to the first two only say yes or no, because these paths need no credential.

use super::{
    Mount,
    router::{OPEN, Route, RoutePlace, RoutedPath},
    status,
};
use crate::{access::permission::Permission, call::Call, telemetry};
use axum::{
    body::{Body, Bytes},
    extract::Request,
    http::{HeaderValue, StatusCode, header},
    response::Response,
};
use futures::future::{BoxFuture, FutureExt as _};
use gorego_reapi::error::Result;
use std::{fmt, sync::Arc};

/// Whether the process answers. Some tools ask for `/status` instead.
const ALIVE: RoutePlace = RoutePlace::Path("healthz");
const READY: RoutePlace = RoutePlace::Path("readyz");
const METRICS: RoutePlace = RoutePlace::Path("metrics");

/// The routes of [`Operations`].
pub(super) const ROUTES: &[Route] = &[
    Route { at: ALIVE, methods: OPEN, shown: "/healthz (health check)" },
    Route { at: RoutePlace::Path("status"), methods: OPEN, shown: "" },
    Route { at: READY, methods: OPEN, shown: "/readyz (readiness)" },
    Route {
        at: METRICS,
        methods: &[("GET", &[Permission::Metrics]), ("HEAD", &[Permission::Metrics])],
        shown: "/metrics",
    },
];

/// The source of the state and the metrics of the server. Each answer comes in bounded time.
pub(crate) trait Observe: fmt::Debug + Send + Sync {
    /// Whether the server takes requests of all kinds that it is configured for.
    fn is_ready(&self) -> BoxFuture<'_, bool>;

    /// All metrics, in the text format of OpenMetrics.
    fn metrics(&self) -> BoxFuture<'_, Bytes>;
}

/// The mount of these paths.
#[derive(Debug)]
pub(crate) struct Operations {
    /// The source of the answers.
    pub(crate) observer: Arc<dyn Observe>,
}

impl Mount for Operations {
    fn answer<'a>(
        &'a self,
        place: RoutedPath<'a>,
        _: Request,
        _: &'a Call,
    ) -> BoxFuture<'a, Result<Response>> {
        async move {
            Ok(match place.route.at {
                READY if self.observer.is_ready().await => status::plain(StatusCode::OK, "ok"),
                READY => status::plain(StatusCode::SERVICE_UNAVAILABLE, "not ready"),
                METRICS => metrics(self.observer.metrics().await),
                _ => status::plain(StatusCode::OK, "ok"),
            })
        }
        .boxed()
    }
}

fn metrics(text: Bytes) -> Response {
    let mut response = Response::new(Body::from(text));
    let kind = HeaderValue::from_static(telemetry::CONTENT_TYPE);
    response.headers_mut().insert(header::CONTENT_TYPE, kind);
    response
}
