//! Formats a record as one line of JSON.
//!
//! Everything is written directly to the line. Texts that need an escape, numbers and booleans use the value writers of
//! `serde_json`; only structured values of libraries go through its serializer.

use super::{LIBRARY_EVENT, event::EVENT};
use log::{
    Record,
    kv::{Error, Key, Value, VisitSource, VisitValue},
};
use serde::Serialize;
use std::{fmt::Display, io::Write as _, time::SystemTime};

/// The fields that every line has. A key-value with one of these names is omitted, because it would make the object
/// ambiguous.
const COMMON: &[&str] = &["ts", "level", "target", EVENT, "msg"];

/// Appends the record as one JSON object and a newline: `ts`, `level`, `target`, `event`, `msg`, then its key-values
/// with their types. Absent values are omitted. A record without an event comes from a library, and its key-values are
/// nested in the object `fields`.
pub fn write_json(line: &mut Vec<u8>, now: SystemTime, record: &Record<'_>) {
    let values = record.key_values();
    let event = values.get(Key::from(EVENT));
    // Writing to a Vec cannot fail.
    let _ = write!(line, "{{\"ts\":\"{}\",\"level\":\"", humantime::format_rfc3339_millis(now));
    line.extend_from_slice(record.level().as_str().as_bytes());
    line.extend_from_slice(b"\",\"target\":");
    write_text(line, record.target());
    line.extend_from_slice(b",\"event\":");
    match &event {
        Some(event) => write_value(line, event),
        None => write_value(line, LIBRARY_EVENT),
    }
    line.extend_from_slice(b",\"msg\":");
    match record.args().as_str() {
        Some(message) => write_text(line, message),
        None => write_shown(line, record.args()),
    }
    if event.is_some() {
        let _ = values.visit(&mut JsonFields { line, separator: b"," });
    } else if values.count() > 0 {
        line.extend_from_slice(b",\"fields\":{");
        let _ = values.visit(&mut JsonFields { line, separator: b"" });
        line.push(b'}');
    }
    line.extend_from_slice(b"}\n");
}

/// Appends a text as JSON. Almost all need no escapes, which is found out for many bytes at once.
fn write_text(line: &mut Vec<u8>, text: &str) {
    if !text.bytes().fold(true, |all, byte| all & is_plain(byte)) {
        return write_value(line, text);
    }
    line.push(b'"');
    line.extend_from_slice(text.as_bytes());
    line.push(b'"');
}

/// Appends the displayed form of a value as a JSON text.
fn write_shown(line: &mut Vec<u8>, value: &(impl Display + ?Sized)) {
    let start = line.len();
    line.push(b'"');
    // If the value fails to display itself, its text is cut short.
    let _ = write!(line, "{value}");
    let text = line.get(start + 1..).unwrap_or_default();
    if text.iter().fold(true, |all, byte| all & is_plain(*byte)) {
        line.push(b'"');
    } else {
        let text = String::from_utf8_lossy(text).into_owned();
        line.truncate(start);
        write_text(line, &text);
    }
}

/// Whether a byte stands for itself in a JSON text.
fn is_plain(byte: u8) -> bool {
    byte >= b' ' && byte != b'"' && byte != b'\\'
}

/// Appends a value as JSON. A value that cannot be serialised is replaced by the text of its error.
fn write_value(line: &mut Vec<u8>, value: &(impl Serialize + ?Sized)) {
    let start = line.len();
    if let Err(error) = serde_json::to_writer(&mut *line, value) {
        line.truncate(start);
        let _ = serde_json::to_writer(&mut *line, &format!("not serialisable: {error}"));
    }
}

/// Writes key-values, each after a separator.
struct JsonFields<'a> {
    line: &'a mut Vec<u8>,
    separator: &'static [u8],
}

impl<'kvs> VisitSource<'kvs> for JsonFields<'_> {
    fn visit_pair(&mut self, key: Key<'kvs>, value: Value<'kvs>) -> Result<(), Error> {
        if COMMON.contains(&key.as_str()) {
            return Ok(());
        }
        let start = self.line.len();
        self.line.extend_from_slice(self.separator);
        write_text(self.line, key.as_str());
        self.line.push(b':');
        let mut present = Present { line: self.line, is_absent: false };
        value.visit(&mut present)?;
        if present.is_absent {
            self.line.truncate(start);
        } else {
            self.separator = b",";
        }
        Ok(())
    }
}

/// Writes a value unless it is `None`.
struct Present<'a> {
    line: &'a mut Vec<u8>,
    is_absent: bool,
}

impl VisitValue<'_> for Present<'_> {
    fn visit_any(&mut self, value: Value<'_>) -> Result<(), Error> {
        write_value(self.line, &value);
        Ok(())
    }

    fn visit_null(&mut self) -> Result<(), Error> {
        self.is_absent = true;
        Ok(())
    }

    fn visit_u64(&mut self, value: u64) -> Result<(), Error> {
        write_value(self.line, &value);
        Ok(())
    }

    fn visit_i64(&mut self, value: i64) -> Result<(), Error> {
        write_value(self.line, &value);
        Ok(())
    }

    fn visit_bool(&mut self, value: bool) -> Result<(), Error> {
        write_value(self.line, &value);
        Ok(())
    }

    fn visit_str(&mut self, value: &str) -> Result<(), Error> {
        write_text(self.line, value);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::{super::event::Event, *};
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn every_text_is_read_back_as_it_was(text in "\\PC{0,20}|[\\x00-\\x7f]{0,20}") {
            let mut line = Vec::new();
            Event::info("gorego::cas", "store_opened")
                .with("text", &text)
                .with_shown("shown", &text)
                .with_record(format_args!("{text}."), |record| write_json(&mut line, SystemTime::UNIX_EPOCH, record));
            let line: serde_json::Value = serde_json::from_slice(&line).unwrap();
            prop_assert_eq!(&line["msg"], &format!("{text}."));
            prop_assert_eq!(&line["text"], &text);
            prop_assert_eq!(&line["shown"], &text);
        }
    }
}
