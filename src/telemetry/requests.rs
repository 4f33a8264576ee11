//! [`RpcMetrics`] and [`HttpMetrics`]: the requests of the two ports, by method and code.
//!
//! Methods and codes come from fixed lists, so the handles are in a table. A handle is created when the first request
//! with its method and code ends. So the text has no series for methods that are never called, and later requests need
//! no allocation and no look-up by label.

use prometheus_client::{
    metrics::{counter::Counter, family::Family, histogram::Histogram},
    registry::{Registry, Unit},
};
use std::{
    sync::{Arc, OnceLock},
    time::Duration,
};

/// Upper bounds of the buckets in seconds: from a look-up in memory to an Execute that waits for its action.
const SECONDS: [f64; 16] =
    [0.0001, 0.0003, 0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0, 1000.0, 3000.0];

/// The value for a method or code that is not in the list.
const OTHER: &str = "other";

/// The codes of gRPC, in the order of their numbers.
pub(super) const RPC_CODES: [&str; 17] = [
    "OK",
    "CANCELLED",
    "UNKNOWN",
    "INVALID_ARGUMENT",
    "DEADLINE_EXCEEDED",
    "NOT_FOUND",
    "ALREADY_EXISTS",
    "PERMISSION_DENIED",
    "RESOURCE_EXHAUSTED",
    "FAILED_PRECONDITION",
    "ABORTED",
    "OUT_OF_RANGE",
    "UNIMPLEMENTED",
    "INTERNAL",
    "UNAVAILABLE",
    "DATA_LOSS",
    "UNAUTHENTICATED",
];

/// The methods of HTTP that the port knows, sorted.
const HTTP_METHODS: [&str; 8] = ["DELETE", "GET", "HEAD", "MKCOL", "OPTIONS", "POST", "PROPFIND", "PUT"];

/// The HTTP statuses that the port and its parts answer with, sorted.
const HTTP_CODES: [&str; 29] = [
    "200", "201", "204", "206", "207", "304", "400", "401", "403", "404", "405", "408", "409", "411", "412",
    "413", "414", "415", "416", "417", "421", "429", "431", "500", "501", "502", "503", "504", "507",
];
/// The index for requests whose clients left before the answer. The next index is for [`OTHER`].
const DISCONNECTED: usize = HTTP_CODES.len();

type MethodLabels<const N: usize> = [(&'static str, String); N];

/// The numbers of a request that has ended.
#[derive(Debug, Clone, Copy)]
pub(crate) struct EndedRequest {
    pub(crate) took: Duration,
    pub(crate) bytes_in: u64,
    pub(crate) bytes_out: u64,
}

/// The RPCs of the gRPC port. Cheap to clone.
#[derive(Debug, Clone)]
pub struct RpcMetrics(Arc<RequestTable>);

impl RpcMetrics {
    /// `rpcs` contains paths and the names of their methods in the text.
    pub(super) fn register(
        registry: &mut Registry,
        rpcs: impl IntoIterator<Item = (String, String)>,
    ) -> Self {
        Self(Arc::new(RequestTable::register(registry, "grpc", rpcs, &RPC_CODES)))
    }

    /// Counts an RPC with this path that ended with the code of this number.
    pub(crate) fn ended(&self, path: &str, code: usize, request: EndedRequest) {
        self.0.ended(path, code, request);
    }
}

impl Default for RpcMetrics {
    /// Metrics that are not part of a text.
    fn default() -> Self {
        Self::register(&mut Registry::default(), [])
    }
}

/// The requests of the HTTP port. Cheap to clone.
#[derive(Debug, Clone)]
pub struct HttpMetrics(Arc<RequestTable>);

impl HttpMetrics {
    pub(super) fn register(registry: &mut Registry) -> Self {
        let methods = HTTP_METHODS.map(|method| (method.to_owned(), method.to_owned()));
        let codes: Vec<_> = HTTP_CODES.into_iter().chain(["gone", OTHER]).collect();
        Self(Arc::new(RequestTable::register(registry, "http", methods, &codes)))
    }

    /// Counts a request that ended with this status, or with `None` if its client left before the answer.
    pub(crate) fn ended(&self, method: &str, status: Option<u16>, request: EndedRequest) {
        let listed = |status: u16| {
            HTTP_CODES.binary_search_by(|code| code.parse::<u16>().unwrap_or(0).cmp(&status)).ok()
        };
        let code = status.map_or(DISCONNECTED, |status| listed(status).unwrap_or(DISCONNECTED + 1));
        self.0.ended(method, code, request);
    }
}

impl Default for HttpMetrics {
    /// Metrics that are not part of a text.
    fn default() -> Self {
        Self::register(&mut Registry::default())
    }
}

/// The handles of one port.
#[derive(Debug)]
struct RequestTable {
    families: RequestFamilies,
    codes: Vec<&'static str>,
    /// The methods, sorted by key.
    rows: Vec<MethodRow>,
    other: MethodRow,
}

#[derive(Debug)]
struct RequestFamilies {
    ended: Family<MethodLabels<2>, Counter>,
    seconds: Family<MethodLabels<1>, Histogram, fn() -> Histogram>,
    received: Family<MethodLabels<1>, Counter>,
    sent: Family<MethodLabels<1>, Counter>,
}

/// The handles of one method.
#[derive(Debug)]
struct MethodRow {
    /// The method in requests.
    key: String,
    /// The value of the label.
    name: String,
    /// The counters, by the index of the code.
    ended: Vec<OnceLock<Counter>>,
    rest: OnceLock<MethodHandles>,
}

#[derive(Debug)]
struct MethodHandles {
    seconds: Histogram,
    received: Counter,
    sent: Counter,
}

impl RequestTable {
    fn register(
        registry: &mut Registry,
        port: &str,
        methods: impl IntoIterator<Item = (String, String)>,
        codes: &[&'static str],
    ) -> Self {
        let families = RequestFamilies {
            ended: Family::default(),
            seconds: Family::new_with_constructor(|| Histogram::new(SECONDS)),
            received: Family::default(),
            sent: Family::default(),
        };
        let RequestFamilies { ended, seconds, received, sent } = &families;
        let name = |what: &str| format!("{port}_{what}");
        let help = "Finished requests, by method and code";
        registry.register(name("requests"), help, ended.clone());
        let help = "How long requests took, from their headers to the end of their answers";
        registry.register_with_unit(name("request"), help, Unit::Seconds, seconds.clone());
        let help = "Bytes of the bodies of finished requests, as received";
        registry.register_with_unit(name("received"), help, Unit::Bytes, received.clone());
        let help = "Bytes of the bodies of finished answers, as sent";
        registry.register_with_unit(name("sent"), help, Unit::Bytes, sent.clone());
        let row = |(key, name)| MethodRow {
            key,
            name,
            ended: codes.iter().map(|_| OnceLock::new()).collect(),
            rest: OnceLock::new(),
        };
        let mut rows: Vec<_> = methods.into_iter().map(row).collect();
        rows.sort_unstable_by(|row, other: &MethodRow| row.key.cmp(&other.key));
        Self { families, codes: codes.to_vec(), rows, other: row((OTHER.to_owned(), OTHER.to_owned())) }
    }

    fn ended(&self, key: &str, code: usize, request: EndedRequest) {
        let row = self.rows.binary_search_by(|row| row.key.as_str().cmp(key)).ok();
        let row = row.and_then(|at| self.rows.get(at)).unwrap_or(&self.other);
        let families = &self.families;
        if let (Some(ended), Some(code)) = (row.ended.get(code), self.codes.get(code)) {
            let labels = || [("method", row.name.clone()), ("code", (*code).to_owned())];
            ended.get_or_init(|| families.ended.get_or_create_owned(&labels())).inc();
        }
        let MethodHandles { seconds, received, sent } = row.rest.get_or_init(|| {
            let labels = [("method", row.name.clone())];
            MethodHandles {
                seconds: families.seconds.get_or_create_owned(&labels),
                received: families.received.get_or_create_owned(&labels),
                sent: families.sent.get_or_create_owned(&labels),
            }
        });
        seconds.observe(request.took.as_secs_f64());
        received.inc_by(request.bytes_in);
        sent.inc_by(request.bytes_out);
    }
}
