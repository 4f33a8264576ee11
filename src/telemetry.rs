//! Metrics: counters, readings that are taken at a scrape, and the text for Prometheus.
//!
//! Modules get handles through their constructors and keep them. So counting is an atomic addition, without a look-up
//! by label and without an allocation. State that an actor owns is not counted a second time here: at each scrape, the
//! wiring asks its owner and passes the answers as [`Readings`]. Nothing is global, so two servers in one process have
//! separate metrics.
//!
//! Invariants: every name starts with `gorego_` and is listed in `docs/metrics.md`; a test compares the list with the
//! served text. Every label has a bounded number of values. Methods, codes, reasons and kinds come from fixed lists.
//! The scheduler bounds the number of pools. Names that clients choose are stored in a table of bounded size
//! ([`lookups`]).

mod authentication;
mod kinds;
mod lookups;
pub(crate) mod process;
mod readings;
mod requests;
mod runs;
#[cfg(test)]
mod tests;

pub use authentication::{AuthenticationFailure, AuthenticationMetrics};
pub use lookups::LookupMetrics;
pub use readings::{ConnectionReading, PoolReading, PoolReadings, ProcessReading, Readings, StoreReading};
pub(crate) use requests::EndedRequest;
pub use requests::{HttpMetrics, RpcMetrics};
pub use runs::{RunFate, RunMetrics, SandboxFailure, StageOfRun};

use prometheus_client::{encoding::text, metrics::info::Info, registry::Registry};
use readings::ReadAtScrape;

/// Labels with fixed values.
type Labels<const N: usize> = [(&'static str, &'static str); N];

/// The prefix of all names.
const PREFIX: &str = "gorego";

/// The content type of [`Metrics::text`].
pub const CONTENT_TYPE: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";

/// All metrics of a server; see the top of this file.
#[derive(Debug)]
pub struct Metrics {
    /// The RPCs of the gRPC port.
    pub rpcs: RpcMetrics,
    /// The requests of the HTTP port.
    pub http: HttpMetrics,
    /// The answers of the action cache.
    pub lookups: LookupMetrics,
    /// The runs of actions.
    pub runs: RunMetrics,
    /// The requests whose credentials were not accepted.
    pub authentication: AuthenticationMetrics,
    registry: Registry,
    readings: ReadAtScrape,
}

impl Default for Metrics {
    fn default() -> Self {
        Self::new([])
    }
}

impl Metrics {
    /// Metrics of a server with these RPCs: their paths (`/package.Service/Method`) and their names in the text. All
    /// other RPCs are counted as `other`.
    pub fn new(rpcs: impl IntoIterator<Item = (String, String)>) -> Self {
        let mut registry = Registry::with_prefix(PREFIX);
        let registered = &mut registry;
        let readings = ReadAtScrape::register(registered);
        registered.register(
            "build",
            "The version of this server; the value is always 1",
            Info::new([("version", env!("CARGO_PKG_VERSION"))]),
        );
        Self {
            rpcs: RpcMetrics::register(registered, rpcs),
            http: HttpMetrics::register(registered),
            lookups: LookupMetrics::register(registered),
            runs: RunMetrics::register(registered),
            authentication: AuthenticationMetrics::register(registered),
            registry,
            readings,
        }
    }

    /// All metrics in the text format of OpenMetrics, with these readings.
    pub fn text(&self, readings: Readings) -> String {
        self.readings.set(readings);
        let mut text = String::new();
        // Writing to a string does not fail.
        let _ = text::encode(&mut text, &self.registry);
        text
    }
}
