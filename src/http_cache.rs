//! The cache over HTTP/1.1, for tools that do not speak gRPC: Bazel's `--remote_cache=http://`, ccache, sccache, Gradle.
//!
//! The same store under the same rules, with other names:
//!
//! - `/cas/HASH`: blobs. Content that does not match the hash is refused.
//! - `/ac/HASH`: action results in Bazel's format: an ActionResult message under the hash of its Action. gRPC clients see
//!   the same results. They are checked in the same way when they are written, and are complete when they are read.
//! - `/cache/KEY`: opaque values under any key, for tools with their own format. They are stored as blobs, and action
//!   results that no client can request bind them to their keys, so they are evicted and survive restarts like everything
//!   else. For WebDAV clients, every key that ends with a slash is a collection ([`webdav`]).
//!
//! Each path may start with the name of an instance. A hash comes without a size, so the store looks for a blob with this
//! hash. If a result is written before its Action, the size is unknown and the result is stored under size 0: HTTP clients
//! find it, gRPC clients do not. Bazel uploads the Action first.
//!
//! Nothing here depends on gRPC. A request counts like a call ([`Connections::calls`]), and its body counts like any
//! upload. The only state of this module is the budget of decoders.

mod body;
mod connection;
pub(crate) mod hosts;
pub mod range;
mod read;
mod request_log;
pub mod resource;
mod status;
mod webdav;
mod write;

use crate::{
    actors::cas::client::Cas,
    budget::{Bounds, Budget},
    connections::Connections,
    instance::{Instance, Instances},
    under_way::UnderWay,
};
use axum::{
    body::Body,
    extract::Request,
    http::{HeaderValue, Method, StatusCode, header},
    response::Response,
};
use connection::Ends;
use futures::FutureExt as _;
use gorego_reapi::error::Result;
use hosts::{HostRefusal, Hosts};
use request_log::RequestLog;
use resource::Resource;
use std::{future::Future, sync::Arc};
use tokio::net::TcpListener;

/// Target of the log lines of this module.
const LOG: &str = "gorego::http";
/// Number of concurrent compressed uploads; further ones are told to retry. Each holds the window that its client chose, at
/// most 8 MiB.
const DECODERS: Bounds = Bounds { what: "encoded uploads at a time", total: 256, connection: 1 };

/// The resources from which requests are answered.
#[derive(Debug)]
pub struct HttpCache {
    /// The namespaces that paths may name.
    pub instances: Instances,
    /// The store of blobs and action results.
    pub cas: Cas,
    /// The host names that requests may use.
    pub hosts: Hosts,
    /// Size limit of one blob in bytes (CAP-15).
    pub max_blob_bytes: u64,
    /// Counts the requests that a shutdown waits for.
    pub under_way: UnderWay,
    /// The open connections of all ports.
    pub connections: Connections,
}

/// The instance that a request names, with the server of the request.
type Target<'a> = (&'a HttpCache, &'a Instance);

struct Service {
    cache: HttpCache,
    decoders: Budget,
}

/// Serves on `listener` until `shutdown` completes, then finishes the open requests.
pub async fn serve(cache: HttpCache, listener: TcpListener, shutdown: impl Future<Output = ()>) {
    let connections = cache.connections.clone();
    let service = Arc::new(Service { cache, decoders: Budget::new(DECODERS) });
    connection::serve(listener, connections, shutdown, move |ends, request| {
        answer(service.clone(), ends, request).boxed()
    })
    .await;
}

async fn answer(service: Arc<Service>, ends: Ends, request: Request) -> Response {
    let cache = &service.cache;
    let mut line = RequestLog::new(
        &cache.connections,
        &ends.client,
        request.method(),
        request.uri(),
        cache.under_way.begin(),
    );
    let host = cache.hosts.check(request.version(), request.uri(), request.headers(), ends.here);
    if let Err(refusal) = host {
        let (code, why) = match refusal {
            HostRefusal::Malformed(why) => (StatusCode::BAD_REQUEST, why.to_owned()),
            HostRefusal::Stranger(why) => (StatusCode::MISDIRECTED_REQUEST, why),
        };
        let response = status::plain(code, &why);
        line.refused(why);
        return line.follow(response);
    }
    let is_encoded = request.headers().contains_key(header::CONTENT_ENCODING);
    let caller = ends.client.caller;
    let place = cache.connections.calls().take(caller, 1);
    let decoder = is_encoded.then(|| service.decoders.take(caller, 1)).transpose();
    let response = match (place, decoder) {
        (Ok(place), Ok(_decoder)) => {
            let response = dispatch(cache, request, &mut line).await;
            line.hold(place);
            response
        }
        (Err(refusal), _) | (_, Err(refusal)) => {
            line.refused(refusal.to_string());
            Ok(busy(&refusal.to_string()))
        }
    };
    let response = response.unwrap_or_else(|error| {
        line.failed(&error);
        status::of(&error)
    });
    line.follow(response)
}

/// The response to a request that may be retried after a second.
fn busy(why: &str) -> Response {
    let mut response = status::plain(StatusCode::SERVICE_UNAVAILABLE, why);
    response.headers_mut().insert(header::RETRY_AFTER, HeaderValue::from_static("1"));
    response
}

/// Handles one request.
async fn dispatch(cache: &HttpCache, mut request: Request, line: &mut RequestLog) -> Result<Response> {
    let resource = Resource::parse(request.uri().path())?;
    let instance = match resource.instance_name() {
        Some(name) => Some(cache.instances.get(name)?),
        None => None,
    };
    let Some(instance) = instance else {
        return Ok(match (resource, request.method()) {
            (Resource::Health, &Method::GET | &Method::HEAD) => status::plain(StatusCode::OK, "ok"),
            (Resource::Root, &Method::GET | &Method::HEAD) => status::plain(StatusCode::OK, resource::HELP),
            _ => status::not_allowed("GET, HEAD"),
        });
    };
    line.instance(&instance);
    let target = (cache, &instance);
    if request.method() == Method::HEAD {
        // Ranges apply only to GET.
        request.headers_mut().remove(header::RANGE);
    }
    match (request.method().as_str(), resource) {
        ("GET", Resource::Blob { hash, .. }) => read::blob(target, hash, request.headers(), line).await,
        ("HEAD", Resource::Blob { hash, .. }) => {
            read::blob(target, hash, request.headers(), line).await.map(headers)
        }
        ("PUT", Resource::Blob { hash, .. }) => write::blob(target, hash, request, line).await,
        ("GET", Resource::Result { hash, .. }) => read::result(target, hash, line).await,
        ("HEAD", Resource::Result { hash, .. }) => read::result(target, hash, line).await.map(headers),
        ("PUT", Resource::Result { hash, .. }) => write::result(target, hash, request, line).await,
        ("PROPFIND", Resource::Value { key, .. }) => webdav::properties(target, &key, request, line).await,
        ("MKCOL", Resource::Value { key, .. }) => webdav::make_collection(target, &key, request, line).await,
        (_, Resource::Value { key, .. }) if webdav::is_collection(&key) => {
            Ok(status::not_allowed(webdav::allowed(&key)))
        }
        ("GET", Resource::Value { key, .. }) => read::value(target, &key, request.headers(), line).await,
        ("HEAD", Resource::Value { key, .. }) => {
            read::value(target, &key, request.headers(), line).await.map(headers)
        }
        ("PUT", Resource::Value { key, .. }) => write::value(target, &key, request, line).await,
        (_, Resource::Value { key, .. }) => Ok(status::not_allowed(webdav::allowed(&key))),
        _ => Ok(status::not_allowed("GET, HEAD, PUT")),
    }
}

/// Removes the body of a response. The headers still describe it.
fn headers(response: Response) -> Response {
    response.map(|_| Body::empty())
}
