//! The HTTP/1.1 port. Its paths are divided among mounts ([`Router`]): the [`cache`], health and metrics
//! ([`operations`]), and the front page.
//!
//! This module has what all mounts share: connections, the check of the host name, places among the calls, log lines,
//! and the status of errors. A new mount implements [`Mount`] and takes one line in [`Port::new`].
//!
//! Nothing here depends on gRPC. A request counts like a call ([`Connections::calls`]), and its body counts like any
//! upload. The only state of this module is the number of compressed uploads.

pub mod cache;
mod connection;
mod front_page;
pub(crate) mod hosts;
pub(crate) mod operations;
mod request_log;
pub mod router;
mod status;

use crate::{
    access::authenticator::Authentication,
    actors::scheduler::operation::ClientInfo,
    budget::{Bounds, Budget},
    call::Call,
    connections::Connections,
    gate::{Gate, RevocationCheck},
    telemetry::Metrics,
    tls::TlsPort,
    unfinished_requests::UnfinishedRequests,
};
use axum::{
    body::Body,
    extract::Request,
    http::{HeaderMap, HeaderValue, Method, StatusCode, header},
    response::Response,
};
use cache::Cache;
use connection::Ends;
use front_page::FrontPage;
use futures::{FutureExt as _, future::BoxFuture};
use gorego_reapi::error::{Error, Result};
use hosts::{HostRefusal, Hosts};
use operations::Operations;
use request_log::RequestLine;
use router::{Missed, RoutedPath, Router};
use std::{fmt, future::Future, sync::Arc};
use tokio::{net::TcpListener, select};

/// Target of the log lines of this module.
const LOG: &str = "gorego::http";
/// Limit on the number of compressed uploads at a time. Clients of further uploads are told to retry. Each upload holds
/// a window of the size that its client has chosen, at most 8 MiB.
const ENCODED_UPLOADS: Bounds = Bounds { what: "encoded uploads at a time", total: 256, connection: 1 };

/// A part of the port.
trait Mount: fmt::Debug + Send + Sync {
    /// Answers a request for one of its routes. For HEAD, it answers as for GET, and the body is removed.
    fn answer<'a>(
        &'a self,
        place: RoutedPath<'a>,
        request: Request,
        call: &'a Call,
    ) -> BoxFuture<'a, Result<Response>>;
}

/// The mounts of the port, and what they share.
#[derive(Debug)]
pub struct Port {
    mounts: Router<Box<dyn Mount>>,
    gate: Gate,
    /// The host names that requests may use.
    hosts: Hosts,
    /// Counts the requests that a shutdown waits for.
    unfinished_requests: UnfinishedRequests,
    /// The open connections of all ports.
    connections: Connections,
    decoders: Budget,
    /// Counts the requests that have ended.
    metrics: Arc<Metrics>,
}

impl Port {
    /// Creates a port with the cache, the paths for operators, and the front page.
    pub(crate) fn new(cache: Cache, operations: Operations, shared: PortContext) -> Self {
        let mut port = Self::empty(shared);
        port.mounts.mount(cache::ROUTES, Box::new(cache));
        port.mounts.mount(operations::ROUTES, Box::new(operations));
        // The front page is mounted last, because it lists all other paths.
        port.mounts.mount(front_page::ROUTES, Box::new(FrontPage { page: index(&port.mounts) }));
        port
    }

    fn empty(shared: PortContext) -> Self {
        let PortContext { gate, hosts, unfinished_requests, connections, metrics } = shared;
        let decoders = Budget::new(ENCODED_UPLOADS);
        Self { mounts: Router::default(), gate, hosts, unfinished_requests, connections, decoders, metrics }
    }

    /// Authenticates the sender of a request, and checks whether it may make this request.
    async fn authenticate(&self, call: &Call, headers: &HeaderMap) -> Result<()> {
        let identified = match self.gate.identify(call, headers) {
            Authentication::Done(done) => done,
            Authentication::Pending(pending) => pending.await,
        };
        self.gate.pass(call, identified)
    }
}

/// The parts of the server that all mounts of a port share.
#[derive(Debug)]
pub(crate) struct PortContext {
    /// Authenticates callers and admits requests to instances.
    pub(crate) gate: Gate,
    /// The host names that requests may use.
    pub(crate) hosts: Hosts,
    /// Counts the requests that a shutdown waits for.
    pub(crate) unfinished_requests: UnfinishedRequests,
    /// The open connections of all ports.
    pub(crate) connections: Connections,
    /// Counts the requests that have ended.
    pub(crate) metrics: Arc<Metrics>,
}

/// The text of the front page: the paths that the port serves.
fn index<M>(mounts: &Router<M>) -> String {
    format!("this is goREgo's HTTP port; it serves {}", mounts.index())
}

/// Serves on `listener` until `shutdown` completes, then finishes the open requests.
pub(crate) async fn serve(
    port: Port,
    listener: TcpListener,
    tls: Option<TlsPort>,
    shutdown: impl Future<Output = ()>,
) {
    let connections = port.connections.clone();
    let port = Arc::new(port);
    connection::serve(listener, connections, tls, shutdown, move |ends, request| {
        answer(port.clone(), ends, request).boxed()
    })
    .await;
}

async fn answer(port: Arc<Port>, ends: Ends, request: Request) -> Response {
    let uri = request.uri().clone();
    let found = port.mounts.find(request.method().as_str(), uri.path());
    let found = found.map(|(mount, place)| (mount.as_ref(), place));
    let permissions = found.as_ref().ok().map(|(_, place)| place.permissions);
    let unfinished = port.unfinished_requests.begin();
    let call = Call::begin(Some(ends.client.clone()), ClientInfo::default(), permissions, Some(unfinished));
    let what = (request.method(), request.uri());
    let mut line = RequestLine::new(&call, &port, &ends.client, what);
    let host = port.hosts.check(request.version(), request.uri(), request.headers(), ends.here);
    if let Err(refusal) = host {
        let (code, why) = match refusal {
            HostRefusal::Malformed(why) => (StatusCode::BAD_REQUEST, why.to_owned()),
            HostRefusal::Stranger(why) => (StatusCode::MISDIRECTED_REQUEST, why),
        };
        let response = status::plain(code, &why);
        line.refused(why);
        return line.follow(response);
    }
    let caller = call.caller();
    // The place is taken before the client is authenticated, because that may take a while.
    let place = match port.connections.calls().take(caller, 1) {
        Ok(place) => place,
        Err(refusal) => {
            line.refused(refusal.to_string());
            return line.follow(busy(&refusal.to_string()));
        }
    };
    if let Err(error) = port.authenticate(&call, request.headers()).await {
        line.failed(&error);
        return line.follow(port.challenged(status::of(&error)));
    }
    let is_encoded = request.headers().contains_key(header::CONTENT_ENCODING);
    let decoder = is_encoded.then(|| port.decoders.take(caller, 1)).transpose();
    let response = match decoder {
        Ok(_decoder) => {
            let mut revocation = RevocationCheck::new(port.gate.clone(), call.clone());
            let response = select! {
                response = dispatch(&port.mounts, found, request, &call) => response,
                error = revocation.ended() => Err(error),
            };
            line.hold(place);
            response
        }
        Err(refusal) => {
            line.refused(refusal.to_string());
            Ok(busy(&refusal.to_string()))
        }
    };
    let response = response.unwrap_or_else(|error| {
        line.failed(&error);
        port.challenged(status::of(&error))
    });
    line.follow(response)
}

impl Port {
    /// Adds the accepted kinds of authentication to a response with status 401 (RFC 9110, 11.6.1).
    fn challenged(&self, mut response: Response) -> Response {
        if response.status() == StatusCode::UNAUTHORIZED {
            for challenge in self.gate.challenges() {
                response.headers_mut().append(header::WWW_AUTHENTICATE, HeaderValue::from_static(challenge));
            }
        }
        response
    }
}

/// The response to a request that may be retried after a second.
fn busy(why: &str) -> Response {
    let mut response = status::plain(StatusCode::SERVICE_UNAVAILABLE, why);
    response.headers_mut().insert(header::RETRY_AFTER, HeaderValue::from_static("1"));
    response
}

/// Lets a mount answer the request.
async fn dispatch(
    mounts: &Router<Box<dyn Mount>>,
    found: Result<(&dyn Mount, RoutedPath<'_>), Missed>,
    mut request: Request,
    call: &Call,
) -> Result<Response> {
    let (mount, place) = match found {
        Ok(found) => found,
        Err(Missed::Method(route)) => return Ok(status::not_allowed(&route.allow())),
        Err(Missed::Path) => return Err(Error::NotFound(format!("not found; {}", index(mounts)))),
    };
    if request.method() != Method::HEAD {
        return mount.answer(place, request, call).await;
    }
    // Ranges apply only to GET.
    request.headers_mut().remove(header::RANGE);
    let response = mount.answer(place, request, call).await?;
    // The headers still describe the body.
    Ok(response.map(|_| Body::empty()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        access::{
            authenticator::Authenticator,
            documented::{table, written},
        },
        instance::Instances,
    };
    use futures::future::ready;
    use router::{OPEN, Route, RoutePlace};
    use std::collections::BTreeMap;
    use tokio::{
        io::{AsyncReadExt as _, AsyncWriteExt as _},
        net::TcpStream,
    };

    const NUMBERS: &[Route] = &[Route { at: RoutePlace::Path("numbers"), methods: OPEN, shown: "/numbers" }];

    /// A minimal mount.
    #[derive(Debug)]
    struct Numbers;

    impl Mount for Numbers {
        fn answer<'a>(
            &'a self,
            _: RoutedPath<'a>,
            _: Request,
            _: &'a Call,
        ) -> BoxFuture<'a, Result<Response>> {
            ready(Ok(status::plain(StatusCode::OK, "1 2 3"))).boxed()
        }
    }

    /// The methods and the path of each row, with the permissions.
    fn of_routes(routes: &'static [Route]) -> BTreeMap<(&'static str, String), Vec<&'static str>> {
        let path = |at| match at {
            RoutePlace::Path(path) => format!("/{path}"),
            RoutePlace::Below(keyword) | RoutePlace::Collections(keyword) => format!("/{keyword}/"),
        };
        let methods =
            routes.iter().flat_map(|route| route.methods.iter().map(|method| (path(route.at), method)));
        methods.map(|(path, (method, permissions))| ((*method, path), written(permissions))).collect()
    }

    #[test]
    fn the_documentation_has_the_permissions_of_every_request() {
        let rows = table("### What each HTTP request needs").into_iter();
        let documented: BTreeMap<_, _> = rows
            .flat_map(|(mut methods, needs)| {
                let path = methods.pop().unwrap().to_owned();
                methods
                    .into_iter()
                    .map(move |method| ((method, path.clone()), needs.clone()))
                    .collect::<Vec<_>>()
            })
            .collect();
        let routes = [cache::ROUTES, operations::ROUTES, front_page::ROUTES].map(of_routes);
        assert_eq!(documented, routes.into_iter().flatten().collect());
    }

    async fn ask(address: std::net::SocketAddr, method: &str, path: &str) -> String {
        let mut client = TcpStream::connect(address).await.unwrap();
        let head = format!("{method} {path} HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n");
        client.write_all(head.as_bytes()).await.unwrap();
        let mut answer = String::new();
        client.read_to_string(&mut answer).await.unwrap();
        answer
    }

    #[tokio::test]
    async fn a_second_mount_takes_one_line() {
        let mut port = Port::empty(PortContext {
            gate: Gate::new(Instances::new([""]).unwrap(), Authenticator::open()),
            hosts: Hosts::default(),
            unfinished_requests: UnfinishedRequests::default(),
            connections: Connections::default(),
            metrics: Arc::default(),
        });
        port.mounts.mount(front_page::ROUTES, Box::new(FrontPage { page: "front".into() }));
        port.mounts.mount(NUMBERS, Box::new(Numbers));
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        tokio::spawn(serve(port, listener, None, std::future::pending()));
        for (method, path, status, text) in [
            ("GET", "/numbers", "200", "1 2 3"),
            ("HEAD", "/numbers", "200", ""),
            ("PUT", "/numbers", "405", "GET, HEAD"),
            ("GET", "/", "200", "front"),
            ("GET", "/cas/1", "404", "it serves /numbers"),
        ] {
            let answer = ask(address, method, path).await;
            let (head, body) = answer.split_once("\r\n\r\n").unwrap();
            assert!(head.starts_with(&format!("HTTP/1.1 {status}")), "{method} {path}: {answer}");
            assert!(body.contains(text) && body.is_empty() == text.is_empty(), "{method} {path}: {answer}");
        }
    }
}
