//! Parses the tables of `docs/logs.md` as a schema, for tests that compare real log lines with the documentation.

use serde_json::{Map, Value};
use std::collections::{BTreeMap, BTreeSet};

/// The documented events and fields.
#[derive(Debug)]
pub(crate) struct Schema {
    /// The type of each field that every line has.
    pub(crate) common: BTreeMap<String, String>,
    /// The type of each field of events.
    pub(crate) fields: BTreeMap<String, String>,
    /// The documented events, by name.
    pub(crate) events: BTreeMap<String, Event>,
}

/// The documented form of the lines of one event.
#[derive(Debug)]
pub(crate) struct Event {
    /// Its level; `any` if a library chooses it.
    pub(crate) level: String,
    /// Its fields. The value is true if the field is always present.
    pub(crate) fields: BTreeMap<String, bool>,
}

impl Schema {
    /// Reads the schema from `docs/logs.md`. Panics if the page contradicts itself.
    pub(crate) fn documented() -> Self {
        let mut schema = Self { common: BTreeMap::new(), fields: BTreeMap::new(), events: BTreeMap::new() };
        let mut section = "";
        for line in include_str!("../../docs/logs.md").lines() {
            if let Some(title) = line.strip_prefix("## ") {
                section = title;
            }
            let cells: Vec<&str> = line.trim_matches('|').split('|').map(str::trim).collect();
            let Some(name) = cells[0].strip_prefix('`').and_then(|name| name.strip_suffix('`')) else {
                continue;
            };
            let name = name.to_owned();
            let again = match section {
                "Fields of every line" => schema.common.insert(name, cells[1].to_owned()).is_some(),
                "Fields of events" => schema.fields.insert(name, cells[1].to_owned()).is_some(),
                "Events" => {
                    let words = cells[2].split_whitespace();
                    let fields =
                        words.map(|word| (word.replace(['`', '?'], ""), !word.ends_with('?'))).collect();
                    schema.events.insert(name, Event { level: cells[1].to_owned(), fields }).is_some()
                }
                other => panic!("a table in section {other}"),
            };
            assert!(!again, "documented twice: {line}");
        }
        let used: BTreeSet<&String> = schema.events.values().flat_map(|event| event.fields.keys()).collect();
        assert_eq!(used, schema.fields.keys().collect(), "fields of events and the list of fields differ");
        schema
    }

    /// Checks one line and returns its fields.
    pub(crate) fn check(&self, line: &str) -> Result<Map<String, Value>, String> {
        let object: Map<String, Value> =
            serde_json::from_str(line).map_err(|error| format!("not a JSON object: {error}: {line}"))?;
        let event = object.get("event").and_then(Value::as_str).unwrap_or_default();
        let Some(Event { level, fields }) = self.events.get(event) else {
            return Err(format!("event {event:?} is not documented: {line}"));
        };
        if level != "any" && object.get("level").and_then(Value::as_str) != Some(level) {
            return Err(format!("event {event} should have level {level}: {line}"));
        }
        let always = fields.iter().filter_map(|(name, always)| always.then_some(name));
        if let Some(name) = self.common.keys().chain(always).find(|name| !object.contains_key(*name)) {
            return Err(format!("{name} is missing: {line}"));
        }
        for (name, value) in &object {
            let kind =
                self.common.get(name).or_else(|| self.fields.get(name).filter(|_| fields.contains_key(name)));
            let Some(kind) = kind else {
                return Err(format!("field {name} of event {event} is not documented: {line}"));
            };
            let fits = match kind.as_str() {
                "string" => value.is_string(),
                "integer" => value.is_i64() || value.is_u64(),
                "boolean" => value.is_boolean(),
                "object" => value.is_object(),
                other => panic!("docs/logs.md: unknown type {other} of {name}"),
            };
            if !fits {
                return Err(format!("field {name} of event {event} is no {kind}: {line}"));
            }
        }
        let ts = object.get("ts").and_then(Value::as_str).unwrap_or_default();
        if ts.len() != 24 || humantime::parse_rfc3339(ts).is_err() {
            return Err(format!("ts is not RFC 3339 in UTC with milliseconds: {line}"));
        }
        Ok(object)
    }
}
