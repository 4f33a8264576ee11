//! [`Routes`]: finds the service that a request names. A path is `/SERVICE/METHOD`; the service itself finds the
//! method.

use futures::future::{BoxFuture, FutureExt as _, ready};
use http::{Request, Response};
use std::{
    collections::HashMap,
    convert::Infallible,
    fmt,
    sync::Arc,
    task::{Context, Poll},
};
use tonic::{Status, body::Body as TonicBody, server::NamedService};
use tower::Service;

type RoutedAnswer = BoxFuture<'static, Result<Response<TonicBody>, Infallible>>;
type Handler<B> = Box<dyn Fn(Request<B>) -> RoutedAnswer + Send + Sync>;

/// The services of the port by name, for requests with a body of type `B`. Cheap to clone.
pub(super) struct Routes<B>(Arc<HashMap<&'static str, Handler<B>>>);

/// [`Routes`] that are not complete yet.
pub(super) struct RoutesBuilder<B>(HashMap<&'static str, Handler<B>>);

impl<B> RoutesBuilder<B> {
    pub(super) fn new() -> Self {
        Self(HashMap::new())
    }

    /// Adds a service. It must always be ready, as all generated services are.
    pub(super) fn add<S>(mut self, service: S) -> Self
    where
        S: Service<Request<B>, Response = Response<TonicBody>, Error = Infallible, Future = RoutedAnswer>,
        S: NamedService + Clone + Send + Sync + 'static,
    {
        self.0.insert(S::NAME, Box::new(move |request| service.clone().call(request)));
        self
    }

    pub(super) fn build(self) -> Routes<B> {
        Routes(Arc::new(self.0))
    }
}

impl<B> Service<Request<B>> for Routes<B> {
    type Response = Response<TonicBody>;
    type Error = Infallible;
    type Future = RoutedAnswer;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: Request<B>) -> RoutedAnswer {
        match service_name(request.uri().path()).and_then(|name| self.0.get(name)) {
            Some(handler) => handler(request),
            None => ready(Ok(Status::unimplemented("this server has no such service").into_http())).boxed(),
        }
    }
}

impl<B> Clone for Routes<B> {
    fn clone(&self) -> Self {
        Self(self.0.clone())
    }
}

impl<B> fmt::Debug for Routes<B> {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.debug_set().entries(self.0.keys()).finish()
    }
}

/// The name of the service in the path of a request.
fn service_name(path: &str) -> Option<&str> {
    path.strip_prefix('/')?.split_once('/').map(|(service, _)| service)
}
