//! A panic in a handler becomes INTERNAL. The connection and the process continue.
//!
//! Handlers own no state, so continuing is safe. Panics in the actors that own state are not caught; they end the
//! process.

use bytes::Bytes;
use http::{HeaderMap, Request, Response};
use http_body::{Body, Frame, SizeHint};
use std::{
    future::Future,
    panic::{AssertUnwindSafe, catch_unwind},
    pin::Pin,
    task::{Context, Poll},
};
use tonic::Status;
use tower::{Layer, Service};

/// Wraps a service in a [`PanicGuard`].
#[derive(Debug, Clone, Copy)]
pub(crate) struct PanicGuardLayer;

impl<S> Layer<S> for PanicGuardLayer {
    type Service = PanicGuard<S>;

    fn layer(&self, inner: S) -> PanicGuard<S> {
        PanicGuard { inner }
    }
}

/// A service that answers INTERNAL when its inner service panics.
#[derive(Debug, Clone)]
pub(crate) struct PanicGuard<S> {
    inner: S,
}

impl<S, R, B> Service<Request<R>> for PanicGuard<S>
where
    S: Service<Request<R>, Response = Response<B>>,
    B: Body<Data = Bytes> + Default,
{
    type Response = Response<GuardedBody<B>>;
    type Error = S::Error;
    type Future = GuardedFuture<S::Future>;

    fn poll_ready(&mut self, context: &mut Context<'_>) -> Poll<Result<(), S::Error>> {
        self.inner.poll_ready(context)
    }

    fn call(&mut self, request: Request<R>) -> Self::Future {
        GuardedFuture { inner: self.inner.call(request) }
    }
}

pin_project_lite::pin_project! {
    /// The future of a [`PanicGuard`] call.
    #[derive(Debug)]
    pub struct GuardedFuture<F> {
        #[pin]
        inner: F,
    }
}

impl<F, B, E> Future for GuardedFuture<F>
where
    F: Future<Output = Result<Response<B>, E>>,
    B: Body<Data = Bytes> + Default,
{
    type Output = Result<Response<GuardedBody<B>>, E>;

    fn poll(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Self::Output> {
        let inner = self.project().inner;
        let polled = catch_unwind(AssertUnwindSafe(|| inner.poll(context)));
        let response = polled.unwrap_or_else(|_| Poll::Ready(Ok(fault().into_http())));
        response.map_ok(|response| response.map(|inner| GuardedBody { inner, panicked: false }))
    }
}

pin_project_lite::pin_project! {
    /// A response body that ends with INTERNAL when its inner body panics.
    #[derive(Debug, Default)]
    pub struct GuardedBody<B> {
        #[pin]
        inner: B,
        panicked: bool,
    }
}

impl<B: Body<Data = Bytes>> Body for GuardedBody<B> {
    type Data = Bytes;
    type Error = B::Error;

    fn poll_frame(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, B::Error>>> {
        let this = self.project();
        if *this.panicked {
            return Poll::Ready(None);
        }
        match catch_unwind(AssertUnwindSafe(|| this.inner.poll_frame(context))) {
            Ok(poll) => poll,
            Err(_) => {
                *this.panicked = true;
                let mut trailers = HeaderMap::new();
                // This cannot fail, because the message is ASCII.
                let _ = fault().add_header(&mut trailers);
                Poll::Ready(Some(Ok(Frame::trailers(trailers))))
            }
        }
    }

    fn is_end_stream(&self) -> bool {
        self.panicked || self.inner.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.inner.size_hint()
    }
}

/// The panic hook of the process has logged the panic; the client is told to look there.
fn fault() -> Status {
    Status::internal("internal error of this server; its log has the details")
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::convert::Infallible;
    use tonic::Code;
    use tower::{ServiceExt as _, service_fn};

    /// A body that panics when it is read.
    #[derive(Default)]
    struct Broken;

    impl Body for Broken {
        type Data = Bytes;
        type Error = Infallible;

        fn poll_frame(
            self: Pin<&mut Self>,
            _: &mut Context<'_>,
        ) -> Poll<Option<Result<Frame<Bytes>, Infallible>>> {
            panic!("a fault in a stream")
        }
    }

    fn code(headers: &HeaderMap) -> Code {
        Code::from_bytes(headers["grpc-status"].as_bytes())
    }

    #[tokio::test]
    async fn a_panic_in_a_handler_is_internal() {
        async fn handler(_: Request<()>) -> Result<Response<Broken>, Infallible> {
            panic!("a fault in a handler")
        }
        let response = PanicGuardLayer.layer(service_fn(handler)).oneshot(Request::new(())).await.unwrap();
        assert_eq!(code(response.headers()), Code::Internal);
    }

    #[tokio::test]
    async fn a_panic_in_a_stream_ends_it_with_internal_trailers() {
        async fn handler(_: Request<()>) -> Result<Response<Broken>, Infallible> {
            Ok(Response::new(Broken))
        }
        let response = PanicGuardLayer.layer(service_fn(handler)).oneshot(Request::new(())).await.unwrap();
        let mut body = std::pin::pin!(response.into_body());
        let frame = std::future::poll_fn(|context| body.as_mut().poll_frame(context)).await;
        assert_eq!(code(frame.unwrap().unwrap().trailers_ref().unwrap()), Code::Internal);
        assert!(std::future::poll_fn(|context| body.as_mut().poll_frame(context)).await.is_none());
    }
}
