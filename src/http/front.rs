//! The front page, which lists what the port serves, and the health check.

use super::{
    Mount,
    router::{OPEN, Route, RoutePlace, RoutedPath},
    status,
};
use crate::call::Call;
use axum::{extract::Request, http::StatusCode, response::Response};
use futures::future::{BoxFuture, FutureExt as _, ready};
use gorego_reapi::error::Result;

/// Path of the health check. Some tools ask for `/status` instead.
const HEALTH: RoutePlace = RoutePlace::Path("healthz");

/// What [`Front`] serves.
pub(super) const ROUTES: &[Route] = &[
    Route { at: RoutePlace::Path(""), methods: OPEN, shown: "" },
    Route { at: HEALTH, methods: OPEN, shown: "/healthz (health check)" },
    Route { at: RoutePlace::Path("status"), methods: OPEN, shown: "" },
];

/// The mount of the front page and the health check.
#[derive(Debug)]
pub(super) struct Front {
    /// The text of the front page.
    pub page: String,
}

impl Mount for Front {
    fn answer<'a>(
        &'a self,
        place: RoutedPath<'a>,
        _: Request,
        _: &'a Call,
    ) -> BoxFuture<'a, Result<Response>> {
        let text = if place.route.at == RoutePlace::Path("") { &self.page } else { "ok" };
        ready(Ok(status::plain(StatusCode::OK, text))).boxed()
    }
}
