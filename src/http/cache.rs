//! The cache over HTTP/1.1, for tools that do not speak gRPC: Bazel's `--remote_cache=http://`, ccache, sccache,
//! Gradle.
//!
//! It serves the same store under the same rules, with other names:
//!
//! - `/cas/HASH`: blobs. Content that does not match the hash is refused.
//! - `/ac/HASH`: action results in Bazel's format: an ActionResult message under the hash of its Action. gRPC clients
//!   see the same results. They are checked in the same way when they are written, and are complete when they are read.
//! - `/cache/KEY`: opaque values under any key, for tools with their own format. They are stored as blobs, and action
//!   results that no client can request bind them to their keys, so they are evicted and survive restarts like
//!   everything else. For WebDAV clients, every key that ends with a slash is a collection ([`webdav`]).
//!
//! Each path may start with the name of an instance. A hash comes without a size, so the store looks for a blob with
//! this hash. If a result is written before its Action, the size is unknown and the result is stored under size 0: HTTP
//! clients find it, gRPC clients do not. Bazel uploads the Action first.

mod body;
pub mod range;
mod read;
pub mod resource;
mod webdav;
mod write;

use super::{
    Mount,
    router::{Route, RoutePlace, RoutedPath},
};
use crate::{
    access::permission::Permission::{AcRead, AcWrite, CasRead, CasWrite},
    actors::cas::client::Cas,
    call::Call,
    gate::Gate,
    instance::Instance,
};
use axum::{extract::Request, http::Method, response::Response};
use futures::future::{BoxFuture, FutureExt as _};
use gorego_reapi::error::Result;
use resource::Resource;

/// What the cache serves.
pub const ROUTES: &[Route] = &[BLOBS, RESULTS, COLLECTIONS, VALUES];

const BLOBS: Route = Route {
    at: RoutePlace::Below("cas"),
    methods: &[("GET", &[CasRead]), ("HEAD", &[CasRead]), ("PUT", &[CasWrite])],
    shown: "[/INSTANCE]/cas/HASH (blobs)",
};
const RESULTS: Route = Route {
    at: RoutePlace::Below("ac"),
    methods: &[("GET", &[AcRead]), ("HEAD", &[AcRead]), ("PUT", &[AcWrite])],
    shown: "[/INSTANCE]/ac/HASH (action results)",
};
const COLLECTIONS: Route = Route {
    at: RoutePlace::Collections("cache"),
    methods: &[("PROPFIND", &[AcRead]), ("MKCOL", &[AcWrite])],
    shown: "",
};
const VALUES: Route = Route {
    at: RoutePlace::Below("cache"),
    methods: &[
        ("GET", &[AcRead]),
        ("HEAD", &[AcRead]),
        ("PUT", &[AcWrite]),
        ("PROPFIND", &[AcRead]),
        ("MKCOL", &[AcWrite]),
    ],
    shown: "[/INSTANCE]/cache/KEY (values)",
};

/// The mount of the cache.
#[derive(Debug)]
pub(crate) struct Cache {
    /// The way to the instances that paths may name.
    pub gate: Gate,
    /// The store of blobs and action results.
    pub cas: Cas,
    /// Size limit of one blob in bytes (CAP-15).
    pub max_blob_bytes: u64,
}

/// The instance that a request names, with the cache.
type Target<'a> = (&'a Cache, &'a Instance);

impl Mount for Cache {
    fn answer<'a>(
        &'a self,
        place: RoutedPath<'a>,
        request: Request,
        call: &'a Call,
    ) -> BoxFuture<'a, Result<Response>> {
        self.handle(place, request, call).boxed()
    }
}

impl Cache {
    /// Handles a request whose method is among those of its route.
    async fn handle(&self, place: RoutedPath<'_>, request: Request, call: &Call) -> Result<Response> {
        let resource = Resource::parse(place.keyword, place.rest)?;
        let instance = self.gate.enter(call, place.instance_name)?;
        // A value is a blob that an action result names, so it takes the permissions of both.
        match (request.method(), &resource) {
            (&Method::PUT, Resource::Value(_)) => self.gate.require(call, &instance, CasWrite)?,
            (&Method::GET | &Method::HEAD, Resource::Value(_)) => {
                self.gate.require(call, &instance, CasRead)?
            }
            _ => {}
        }
        let target = (self, &instance);
        match (request.method().as_str(), resource) {
            ("PUT", Resource::Blob(hash)) => write::blob(target, hash, request, call).await,
            (_, Resource::Blob(hash)) => read::blob(target, hash, request.headers(), call).await,
            ("PUT", Resource::Result(hash)) => write::result(target, hash, request, call).await,
            (_, Resource::Result(hash)) => read::result(target, hash, call).await,
            ("PROPFIND", Resource::Value(key)) => webdav::properties(target, key, request, call).await,
            ("MKCOL", Resource::Value(key)) => webdav::make_collection(target, key, request, call).await,
            ("PUT", Resource::Value(key)) => write::value(target, key, request, call).await,
            (_, Resource::Value(key)) => read::value(target, key, request.headers(), call).await,
        }
    }
}
