//! Guarantees for programs that read log lines.
#![allow(clippy::unwrap_used, clippy::indexing_slicing, missing_docs)]

mod log_schema;

use gorego::{
    config::{LogConfig, LogFormat},
    logging::Event,
};
use log::{Level, Record, kv::Value as Kv};
use log_schema::Schema;
use proptest::prelude::*;
use serde_json::{Map, Value};
use std::{
    collections::HashMap,
    io,
    path::Path,
    process::Command,
    time::{Duration, UNIX_EPOCH},
};

fn write(level: Level, target: &str, message: std::fmt::Arguments<'_>, kvs: &[(&str, Kv<'_>)]) -> String {
    let mut line = Vec::new();
    let now = UNIX_EPOCH + Duration::from_millis(1_700_000_000_123);
    let mut builder = Record::builder();
    let record = builder.level(level).target(target).key_values(&kvs).args(message).build();
    gorego::logging::write_json(&mut line, now, &record);
    String::from_utf8(line).unwrap()
}

fn parse(line: &str) -> Map<String, Value> {
    assert!(line.ends_with('\n') && line.matches('\n').count() == 1, "one line: {line:?}");
    serde_json::from_str(line).unwrap()
}

#[test]
fn a_line_has_the_documented_fields_with_their_types() {
    let schema = Schema::documented();
    let kvs = [
        ("event", Kv::from("operation_completed")),
        ("operation", Kv::from("operations/1")),
        ("action_digest", Kv::from("aa/1")),
        ("instance", Kv::from("")),
        ("priority", Kv::from(-1i32)),
        ("grpc_code", Kv::from("OK")),
        ("cached", Kv::from(true)),
        ("run_ms", Kv::from(12u64)),
        ("exit_code", Kv::from(-1i32)),
        ("slot", Kv::from(3usize)),
    ];
    let line = write(Level::Info, "gorego::scheduler", format_args!("operation {} is over", 7), &kvs);
    let object = schema.check(&line).unwrap();
    assert_eq!(object["ts"], "2023-11-14T22:13:20.123Z");
    assert_eq!(object["msg"], "operation 7 is over");
    assert_eq!(
        (&object["run_ms"], &object["exit_code"], &object["cached"]),
        (&12.into(), &(-1).into(), &true.into())
    );
    let refused = |kvs: &[(&str, Kv<'_>)]| {
        schema.check(&write(Level::Info, "gorego", format_args!(""), kvs)).unwrap_err()
    };
    let event = |name| ("event", Kv::from(name));
    assert!(refused(&kvs[..6]).contains("cached is missing"), "what is always there is asked for");
    let trimmed =
        |entries: Kv<'static>| [event("store_trimmed"), ("bytes", Kv::from(1)), ("entries", entries)];
    assert!(refused(&trimmed(Kv::from("1"))).contains("entries"), "types are checked");
    assert!(refused(&trimmed(Kv::from(1.5))).contains("entries"), "an integer has no fraction");
    assert!(refused(&[event("server_stopped"), ("byts", Kv::from(1))]).contains("byts"), "names are checked");
    assert!(refused(&[event("server_failed")]).contains("level"), "levels are checked");
    assert!(refused(&[event("nothing")]).contains("nothing"), "events are checked");
}

#[test]
fn a_library_cannot_change_the_fields_of_this_program() {
    let schema = Schema::documented();
    let line = write(
        Level::Warn,
        "h2::proto",
        format_args!("oops"),
        &[("bytes", Kv::from("many")), ("ts", Kv::from(1))],
    );
    let object = schema.check(&line).unwrap();
    assert_eq!(object["event"], "library");
    assert_eq!(object["fields"], serde_json::json!({ "bytes": "many" }));
    let object = schema.check(&write(Level::Debug, "h2", format_args!("plain"), &[])).unwrap();
    assert!(!object.contains_key("fields"));
}

/// A value whose formatting fails in the middle.
struct Broken;

impl serde::Serialize for Broken {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        use serde::ser::{Error as _, SerializeSeq as _};
        serializer.serialize_seq(None)?.serialize_element(&1)?;
        Err(S::Error::custom("broke"))
    }
}

impl std::fmt::Debug for Broken {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Broken")
    }
}

#[test]
fn structured_values_stay_structured_and_broken_ones_do_not_break_the_line() {
    let map = HashMap::from([("hash", vec![1, 2])]);
    let error = io::Error::other("disk\nfull");
    let kvs = [
        ("event", Kv::from("x")),
        ("digest", Kv::from_serde(&map)),
        ("broken", Kv::from_serde(&Broken)),
        ("error", Kv::from_dyn_error(&error)),
        ("nan", Kv::from(f64::NAN)),
        ("big", Kv::from(u64::MAX)),
        ("none", Kv::null()),
    ];
    let object = parse(&write(Level::Error, "gorego", format_args!("m"), &kvs));
    assert_eq!(object["digest"], serde_json::json!({ "hash": [1, 2] }));
    assert!(object["broken"].as_str().unwrap().contains("broke"));
    assert_eq!((&object["error"], &object["nan"]), (&"disk\nfull".into(), &Value::Null));
    assert!(!object.contains_key("none"), "what is absent is absent, not null");
    assert_eq!(object["big"], u64::MAX);
}

/// Set in the process that a test starts to examine the logs of a whole process.
const CHILD: &str = "GOREGO_TEST_LOG_CHILD";
/// Number of lines that it logs last.
const LAST_WORDS: usize = 5000;

/// Not a test, but the process of the next one: a message of a library, a panic in a thread, and an exit right after
/// many lines.
#[test]
#[ignore = "a process of another test"]
fn a_process_with_a_log() {
    if std::env::var_os(CHILD).is_none() {
        return;
    }
    let filter = "info,h2=off".to_owned();
    gorego::logging::init(&LogConfig { filter, format: LogFormat::Json });
    log::warn!(target: "hyper::proto", bytes = "many", event_id = 7; "a library\nspeaks");
    log::error!(target: "h2", "filtered out");
    let thread = std::thread::Builder::new().name("doomed".into());
    let panicked = thread.spawn(|| panic!("no {}", "luck")).unwrap().join();
    assert!(panicked.is_err());
    for n in 0..LAST_WORDS {
        Event::info("gorego::server", "server_stopping")
            .with("signal", "SIGTERM")
            .with("grace_ms", n)
            .log(format_args!("last words"));
    }
    gorego::logging::flush();
    std::process::exit(3);
}

#[test]
fn what_a_process_logged_before_it_exits_is_written_whole_panics_and_libraries_included() {
    let output = Command::new(std::env::current_exe().unwrap())
        .args(["--ignored", "--exact", "a_process_with_a_log", "--nocapture"])
        .env(CHILD, "1")
        .output()
        .unwrap();
    assert_eq!(output.status.code(), Some(3), "{output:?}");
    let schema = Schema::documented();
    let lines: Vec<Map<String, Value>> =
        String::from_utf8(output.stderr).unwrap().lines().map(|line| schema.check(line).unwrap()).collect();
    let common =
        |line: &Map<String, Value>| [&line["event"], &line["level"], &line["msg"]].map(Value::to_string);
    assert_eq!(common(&lines[0]), [r#""library""#, r#""WARN""#, r#""a library\nspeaks""#]);
    assert_eq!(lines[0]["fields"], serde_json::json!({ "bytes": "many", "event_id": 7 }));
    assert_eq!(common(&lines[1]), [r#""panic""#, r#""ERROR""#, r#""a thread panicked: no luck""#]);
    assert_eq!(lines[1]["thread"], "doomed");
    assert!(lines[1]["location"].as_str().unwrap().starts_with("tests/logs.rs:"), "{:?}", lines[1]);
    let last = lines[2..].iter().map(|line| line["grace_ms"].as_u64().unwrap() as usize);
    assert!(last.eq(0..LAST_WORDS), "in order, none missing, none twice");
}

/// The other tests compare lines with the page. This one finds events that no test causes.
#[test]
fn the_page_lists_every_event_that_the_source_names_and_no_other() {
    let schema = Schema::documented();
    let source = source_below(Path::new(env!("CARGO_MANIFEST_DIR")).join("src").as_path());
    let constant = |name: &str| {
        let after = source.split_once(&format!("const {name}: &str = \""))?.1;
        Some(after.split('"').next()?.to_owned())
    };
    let mut named = 0;
    for level in ["error", "warn", "info", "debug"] {
        for after in source.split(&format!("Event::{level}(")).skip(1) {
            // After the target: a name in quotes, or a constant, possibly with a module prefix.
            let word = after.split([',', ')']).nth(1).unwrap_or_default().trim();
            let event = match word.strip_prefix('"') {
                Some(quoted) => quoted.trim_end_matches('"').to_owned(),
                None => constant(word.rsplit("::").next().unwrap_or_default())
                    .unwrap_or_else(|| panic!("{word:?} should be the name of an event")),
            };
            let documented = schema.events.get(&event);
            let documented = documented.unwrap_or_else(|| panic!("docs/logs.md does not list {event:?}"));
            assert_eq!(documented.level, level.to_uppercase(), "level of {event}");
            named += 1;
        }
        let macro_call = format!("log::{level}!(");
        assert!(!source.contains(&macro_call), "events are logged with `Event`, not with {macro_call}");
    }
    assert!(named > 40, "the way in which events are written changed; this test finds {named}");
    for (name, event) in &schema.events {
        assert!(source.contains(&format!("\"{name}\"")), "nothing logs {name}, which docs/logs.md lists");
        assert!(event.fields.len() <= gorego::logging::FIELDS_MAX, "{name} has too many fields");
    }
}

/// The source without comments.
fn source_below(directory: &Path) -> String {
    let mut text = String::new();
    for entry in std::fs::read_dir(directory).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            text += &source_below(&path);
        } else {
            let file = std::fs::read_to_string(&path).unwrap();
            text.extend(file.lines().filter(|line| !line.trim_start().starts_with("//")));
        }
    }
    text
}

fn json(value: &impl serde::Serialize) -> String {
    serde_json::to_string(value).unwrap()
}

proptest! {
    #[test]
    fn a_line_is_to_the_byte_what_serde_json_makes_of_its_values(
        message in any::<String>(), target in any::<String>(), key in "[^a-z]*", text in any::<String>(),
        natural in any::<u64>(), integer in any::<i64>(), fraction in any::<f64>(), flag in any::<bool>()
    ) {
        let kvs = [
            ("event", Kv::from("e")),
            (key.as_str(), Kv::from(text.as_str())),
            ("shown", Kv::from_display(&text)),
            ("natural", Kv::from(natural)),
            ("integer", Kv::from(integer)),
            ("fraction", Kv::from(fraction)),
            ("flag", Kv::from(flag)),
        ];
        let line = write(Level::Info, &target, format_args!("{message}"), &kvs);
        let expected = format!(
            "{{\"ts\":\"2023-11-14T22:13:20.123Z\",\"level\":\"INFO\",\"target\":{},\"event\":\"e\",\"msg\":{},{}:{},\
             \"shown\":{},\"natural\":{},\"integer\":{},\"fraction\":{},\"flag\":{}}}\n",
            json(&target), json(&message), json(&key), json(&text), json(&text), json(&natural), json(&integer),
            json(&fraction), json(&flag)
        );
        prop_assert_eq!(line, expected);
    }

    #[test]
    fn whatever_clients_send_stays_one_line_of_json(message in any::<String>(), key in any::<String>(), value in any::<String>()) {
        let kvs = [("event", Kv::from("e")), (key.as_str(), Kv::from(value.as_str()))];
        let object = parse(&write(Level::Info, &value, format_args!("{message}"), &kvs));
        prop_assert_eq!(object["msg"].as_str(), Some(message.as_str()));
        if !["ts", "level", "target", "event", "msg"].contains(&key.as_str()) {
            prop_assert_eq!(object[&key].as_str(), Some(value.as_str()));
        }
        let mut line = Vec::new();
        let mut builder = Record::builder();
        let builder = builder.target(&value).key_values(&kvs);
        gorego::logging::write_text(&mut line, UNIX_EPOCH, &builder.args(format_args!("{message}")).build(), false);
        let text = String::from_utf8(line).unwrap();
        prop_assert!(text.trim_end_matches('\n').chars().all(|c| !c.is_control()), "{text:?}");
    }
}
