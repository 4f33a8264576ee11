//! The front page, which lists what the port serves.

use super::{
    Mount,
    router::{OPEN, Route, RoutePlace, RoutedPath},
    status,
};
use crate::call::Call;
use axum::{extract::Request, http::StatusCode, response::Response};
use futures::future::{BoxFuture, FutureExt as _, ready};
use gorego_reapi::error::Result;

/// The routes of [`FrontPage`].
pub(super) const ROUTES: &[Route] = &[Route { at: RoutePlace::Path(""), methods: OPEN, shown: "" }];

/// The mount of the front page.
#[derive(Debug)]
pub(super) struct FrontPage {
    /// The text of the front page.
    pub page: String,
}

impl Mount for FrontPage {
    fn answer<'a>(&'a self, _: RoutedPath<'a>, _: Request, _: &'a Call) -> BoxFuture<'a, Result<Response>> {
        ready(Ok(status::plain(StatusCode::OK, &self.page))).boxed()
    }
}
