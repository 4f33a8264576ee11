//! One record as one line of JSON.

use super::{LIBRARY_EVENT, is_absent};
use log::{
    Record,
    kv::{Error, Key, Value, VisitSource},
};
use std::{io::Write as _, time::SystemTime};

/// Fields that every line has; a key-value of the same name would make the object ambiguous and is left out.
const COMMON: &[&str] = &["ts", "level", "target", "event", "msg"];

/// Appends the record as one JSON object and a newline: `ts`, `level`, `target`, `event`, `msg`, then its key-values with
/// their types and without those that have no value. A record without an event is a library's: its key-values go into the
/// object `fields`.
pub fn write_json(line: &mut Vec<u8>, now: SystemTime, record: &Record<'_>) {
    let values = record.key_values();
    let event = values.get(Key::from("event"));
    // Writing to a Vec does not fail.
    let _ = write!(
        line,
        "{{\"ts\":\"{}\",\"level\":\"{}\",\"target\":",
        humantime::format_rfc3339_millis(now),
        record.level()
    );
    write_value(line, record.target());
    line.extend_from_slice(b",\"event\":");
    match &event {
        Some(event) => write_value(line, event),
        None => write_value(line, LIBRARY_EVENT),
    }
    line.extend_from_slice(b",\"msg\":");
    write_value(line, record.args());
    if event.is_some() {
        let _ = values.visit(&mut Fields { line, separator: b"," });
    } else if values.count() > 0 {
        line.extend_from_slice(b",\"fields\":{");
        let _ = values.visit(&mut Fields { line, separator: b"" });
        line.push(b'}');
    }
    line.extend_from_slice(b"}\n");
}

/// Appends a value as JSON; one that cannot be serialised becomes the text of its error.
fn write_value(line: &mut Vec<u8>, value: &(impl serde::Serialize + ?Sized)) {
    let start = line.len();
    if let Err(error) = serde_json::to_writer(&mut *line, value) {
        line.truncate(start);
        let _ = serde_json::to_writer(&mut *line, &format!("not serialisable: {error}"));
    }
}

struct Fields<'a> {
    line: &'a mut Vec<u8>,
    separator: &'static [u8],
}

impl<'kvs> VisitSource<'kvs> for Fields<'_> {
    fn visit_pair(&mut self, key: Key<'kvs>, value: Value<'kvs>) -> Result<(), Error> {
        if COMMON.contains(&key.as_str()) || is_absent(&value) {
            return Ok(());
        }
        self.line.extend_from_slice(self.separator);
        self.separator = b",";
        write_value(self.line, key.as_str());
        self.line.push(b':');
        write_value(self.line, &value);
        Ok(())
    }
}
