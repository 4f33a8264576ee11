//! Tests that the served metrics are documented and used, and that names from clients can neither break nor flood the
//! text.

use super::{
    lookups::{INSTANCES_MAX, MNEMONICS_MAX},
    *,
};
use requests::RPC_CODES;
use std::{
    collections::{BTreeMap, BTreeSet},
    time::{Duration, SystemTime},
};

const DOCUMENT: &str = include_str!("../../docs/metrics.md");
const DASHBOARD: &str = include_str!("../../packaging/grafana/gorego.json");
const ALERTS: &str = include_str!("../../packaging/prometheus/alerts.yml");

const PATH: &str = "/build.bazel.remote.execution.v2.ActionCache/GetActionResult";
const REQUEST: EndedRequest =
    EndedRequest { took: Duration::from_millis(2), bytes_in: 100, bytes_out: 2_000 };

fn metrics() -> Metrics {
    Metrics::new([(PATH.to_owned(), "ActionCache/GetActionResult".to_owned())])
}

/// The type and the labels of each metric in the table.
type Described = BTreeMap<String, (String, BTreeSet<String>)>;

/// All metrics, with a sample of each.
fn served() -> Described {
    let metrics = metrics();
    metrics.rpcs.ended(PATH, 0, REQUEST);
    metrics.http.ended("GET", Some(200), REQUEST);
    metrics.lookups.count((0, ""), "CppCompile", true);
    let pools = PoolReadings { age: Duration::ZERO, pools: vec![pool("a")] };
    let closed = vec![("idle", 1)];
    let connections = ConnectionReading { closed, ..Default::default() };
    let store = StoreReading { disk_free: Some(1), beside: vec![("images", 1)], ..StoreReading::default() };
    let readings = Readings {
        store,
        pools: Some(pools),
        connections,
        certificate_expiry: Some(1),
        started: Some(SystemTime::now()),
        ..Default::default()
    };
    described(&metrics.text(readings))
}

fn pool(name: &str) -> PoolReading {
    PoolReading { name: name.into(), ..PoolReading::default() }
}

/// The description of each metric in a text.
fn described(text: &str) -> Described {
    let mut described = Described::new();
    for line in text.lines() {
        let Some((name, kind)) = line.strip_prefix("# TYPE ").and_then(|line| line.split_once(' ')) else {
            continue;
        };
        let suffix = match kind {
            "counter" => "_total",
            "info" => "_info",
            _ => "",
        };
        let of_name = |line: &&str| {
            let rest = line.strip_prefix(name).filter(|_| !line.starts_with('#'));
            rest.is_some_and(|rest| {
                ["{", " ", "_total", "_info", "_bucket"].iter().any(|next| rest.starts_with(next))
            })
        };
        let labels = text.lines().filter(of_name).flat_map(|line| labels(line).into_keys());
        let labels = labels.filter(|label| label != "le").collect();
        described.insert(format!("{name}{suffix}"), (kind.to_owned(), labels));
    }
    described
}

/// The labels of a sample. Their values contain no escapes.
fn labels(line: &str) -> BTreeMap<String, String> {
    let inner = line.split_once('{').and_then(|(_, rest)| rest.rsplit_once('}'));
    let pairs = inner.map_or("", |(inner, _)| inner).split("\",").filter(|pair| !pair.is_empty());
    let pairs = pairs.map(|pair| pair.split_once("=\"").unwrap_or_default());
    pairs.map(|(name, value)| (name.to_owned(), value.trim_end_matches('"').to_owned())).collect()
}

fn documented() -> Described {
    let row = |line: &str| {
        let cells: Vec<_> = line.strip_prefix("| `gorego_")?.split('|').map(str::trim).collect();
        let [name, kind, labels, ..] = cells.as_slice() else { return None };
        let labels = labels.split_whitespace().map(|label| label.trim_matches('`').to_owned());
        Some((format!("gorego_{}", name.trim_matches('`')), ((*kind).to_owned(), labels.collect())))
    };
    DOCUMENT.lines().filter_map(row).collect()
}

#[test]
fn the_documentation_has_every_metric_with_its_type_and_labels_and_no_other() {
    assert_eq!(documented(), served());
}

#[test]
fn the_dashboard_and_the_alerts_use_metrics_that_there_are() {
    let served = served();
    let exists = |name: &str| {
        let base = ["_bucket", "_count", "_sum"].iter().find_map(|end| name.strip_suffix(end));
        let is_histogram = |base: &str| served.get(base).is_some_and(|(kind, _)| kind == "histogram");
        served.contains_key(name) || base.is_some_and(is_histogram)
    };
    let mut used = BTreeSet::new();
    for (file, text) in [("dashboard", DASHBOARD), ("alerts", ALERTS)] {
        let words = text.split(|c: char| !(c.is_ascii_alphanumeric() || c == '_'));
        for name in words.filter(|word| word.starts_with("gorego_")) {
            assert!(exists(name), "the {file} use {name}, which there is not");
            used.insert(name.trim_end_matches("_bucket").to_owned());
        }
    }
    let unused: Vec<_> = served.keys().filter(|name| !used.contains(*name)).collect();
    assert!(unused.is_empty(), "neither shown nor watched: {unused:?}");
}

#[test]
fn a_request_is_counted_by_method_and_code_and_unknown_ones_share_a_series() {
    let metrics = metrics();
    metrics.rpcs.ended(PATH, 5, REQUEST);
    metrics.rpcs.ended(PATH, 5, REQUEST);
    for path in ["", "/", "/x.Y/Z", "/build.bazel.remote.execution.v2.ActionCache/GetActionResul"] {
        metrics.rpcs.ended(path, 12, REQUEST);
    }
    metrics.rpcs.ended(PATH, RPC_CODES.len(), REQUEST);
    for (method, status) in [("GET", Some(404)), ("GET", None), ("BREW", Some(418)), ("GET", Some(0))] {
        metrics.http.ended(method, status, REQUEST);
    }
    let text = metrics.text(Readings::default());
    for line in [
        "gorego_grpc_requests_total{method=\"ActionCache/GetActionResult\",code=\"NOT_FOUND\"} 2",
        "gorego_grpc_requests_total{method=\"other\",code=\"UNIMPLEMENTED\"} 4",
        "gorego_grpc_received_bytes_total{method=\"other\"} 400",
        "gorego_grpc_sent_bytes_total{method=\"other\"} 8000",
        "gorego_grpc_request_seconds_count{method=\"other\"} 4",
        "gorego_grpc_request_seconds_bucket{le=\"0.001\",method=\"other\"} 0",
        "gorego_grpc_request_seconds_bucket{le=\"0.003\",method=\"other\"} 4",
        "gorego_http_requests_total{method=\"GET\",code=\"404\"} 1",
        "gorego_http_requests_total{method=\"GET\",code=\"gone\"} 1",
        "gorego_http_requests_total{method=\"GET\",code=\"other\"} 1",
        "gorego_http_requests_total{method=\"other\",code=\"other\"} 1",
    ] {
        assert!(text.lines().any(|served| served == line), "{line} is not in\n{text}");
    }
    assert!(text.ends_with("# EOF\n"));
}

#[test]
fn names_that_clients_choose_are_bounded_in_number_and_form() {
    let metrics = metrics();
    let hostile = ["a\"b", "a\nb", "a\\", "{}", "\u{e9}", "a b", &"x".repeat(65), "other", "none"];
    for mnemonic in hostile {
        metrics.lookups.count((0, ""), mnemonic, false);
    }
    metrics.lookups.count((0, ""), "", true);
    for number in 0..10_000 {
        metrics.lookups.count((number, &format!("team/{number}")), &format!("Kind{number}"), false);
    }
    let text = metrics.text(Readings::default());
    let series: Vec<_> = text.lines().filter(|line| line.starts_with("gorego_action_cache")).collect();
    let values =
        |label: &str| series.iter().filter_map(|line| labels(line).remove(label)).collect::<BTreeSet<_>>();
    assert_eq!(values("mnemonic").len(), MNEMONICS_MAX + 2);
    assert_eq!(
        values("instance_name").len(),
        INSTANCES_MAX + 2,
        "the default one, the first ones and the others"
    );
    let find = |mnemonic: &str, result: &str| {
        let labels = format!("{{instance_name=\"\",mnemonic=\"{mnemonic}\",result=\"{result}\"}} ");
        series.iter().find_map(|line| Some(line.split_once(&labels)?.1.to_owned()))
    };
    assert_eq!(find("other", "miss"), Some(hostile.len().to_string()));
    assert_eq!(find("none", "hit").as_deref(), Some("1"));
}

#[test]
fn pools_of_one_name_are_one_series() {
    let draining = PoolReading { out_of_service: 2, busy: 1, desired: 1, ..pool("linux") };
    let oldest = Some(Duration::from_secs(9));
    let successor = PoolReading { free: 3, waiting: 2, desired: 2, oldest, ..pool("linux") };
    let pools = PoolReading::by_name([draining, pool("mac"), successor]);
    let sum =
        PoolReading { free: 3, busy: 1, out_of_service: 2, waiting: 2, oldest, desired: 3, ..pool("linux") };
    assert_eq!(pools, [sum, pool("mac")]);
    let readings =
        Readings { pools: Some(PoolReadings { age: Duration::ZERO, pools }), ..Default::default() };
    let text = metrics().text(readings);
    for line in [
        "gorego_slots{pool=\"linux\",state=\"out_of_service\"} 2.0",
        "gorego_queue_oldest_seconds{pool=\"linux\"} 9.0",
        "gorego_desired_slots{pool=\"linux\"} 3.0",
    ] {
        assert!(text.lines().any(|served| served == line), "{line} is not in\n{text}");
    }
}
