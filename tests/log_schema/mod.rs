//! The tables of `docs/logs.md` as a schema, for tests that hold real lines against what is documented.

use serde_json::{Map, Value};
use std::collections::{BTreeMap, BTreeSet};

/// What may stand in a line.
#[derive(Debug)]
pub struct Schema {
    /// Fields of every line, by type.
    pub common: BTreeMap<String, String>,
    /// Fields of events, by type.
    pub fields: BTreeMap<String, String>,
    /// Events: level and the fields that may be there.
    pub events: BTreeMap<String, (String, BTreeSet<String>)>,
}

impl Schema {
    /// The schema that `docs/logs.md` documents; panics when the page contradicts itself.
    pub fn documented() -> Self {
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
                    let fields = cells[2].split('`').map(str::trim).filter(|word| !word.is_empty());
                    let event = (cells[1].to_owned(), fields.map(str::to_owned).collect());
                    schema.events.insert(name, event).is_some()
                }
                other => panic!("a table in section {other}"),
            };
            assert!(!again, "documented twice: {line}");
        }
        let used: BTreeSet<&String> = schema.events.values().flat_map(|(_, fields)| fields).collect();
        assert_eq!(used, schema.fields.keys().collect(), "fields of events and the list of fields differ");
        schema
    }

    /// Checks one line and returns its fields.
    pub fn check(&self, line: &str) -> Result<Map<String, Value>, String> {
        let object: Map<String, Value> =
            serde_json::from_str(line).map_err(|error| format!("not a JSON object: {error}: {line}"))?;
        let event = object.get("event").and_then(Value::as_str).unwrap_or_default();
        let Some((level, allowed)) = self.events.get(event) else {
            return Err(format!("event {event:?} is not documented: {line}"));
        };
        if level != "any" && object.get("level").and_then(Value::as_str) != Some(level) {
            return Err(format!("event {event} should have level {level}: {line}"));
        }
        if let Some(name) = self.common.keys().find(|name| !object.contains_key(*name)) {
            return Err(format!("{name} is missing: {line}"));
        }
        for (name, value) in &object {
            let kind =
                self.common.get(name).or_else(|| self.fields.get(name).filter(|_| allowed.contains(name)));
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
