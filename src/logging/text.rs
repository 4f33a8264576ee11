//! Formats a record as one line of text for a terminal.
//!
//! Logs contain text from clients (target names, paths), so control characters are escaped: no client can move the
//! operator's cursor or forge a line.

use super::event::EVENT;
use gorego_reapi::escape::{Escaped, escaped};
use log::{
    Level, Record,
    kv::{Error, Key, Value, VisitSource, VisitValue},
};
use std::{fmt::Write as _, io::Write as _, time::SystemTime};

/// The column at which key-values start if the message is short enough, so that they align.
const MESSAGE_WIDTH: usize = 44;

/// Appends `TIME LEVEL module message key=value ...` and a newline. The time is in UTC, and the module is the target
/// without "gorego::".
pub fn write_text(line: &mut Vec<u8>, now: SystemTime, record: &Record<'_>, colour: bool) {
    let stamp = humantime::format_rfc3339_millis(now).to_string();
    let time = stamp.get(11..23).unwrap_or(&stamp);
    let (on, off) = match (colour, record.level()) {
        (false, _) => ("", ""),
        (true, Level::Error) => ("\x1b[31m", "\x1b[0m"),
        (true, Level::Warn) => ("\x1b[33m", "\x1b[0m"),
        (true, _) => ("\x1b[2m", "\x1b[0m"),
    };
    let room = record.target().strip_prefix("gorego::").unwrap_or(record.target());
    let mut text = String::with_capacity(160);
    // Writing to a String or a Vec cannot fail.
    let _ = write!(Escaped(&mut text), "{}", record.args());
    let _ = write!(line, "{time} {on}{:5}{off} {:9} ", record.level(), escaped(room));
    let mut fields = String::new();
    let _ = record.key_values().visit(&mut TextFields(&mut fields));
    if fields.is_empty() {
        line.extend_from_slice(text.as_bytes());
    } else {
        let _ = write!(line, "{text:MESSAGE_WIDTH$}{fields}");
    }
    line.push(b'\n');
}

struct TextFields<'a>(&'a mut String);

impl<'kvs> VisitSource<'kvs> for TextFields<'_> {
    fn visit_pair(&mut self, key: Key<'kvs>, value: Value<'kvs>) -> Result<(), Error> {
        // The message says what happened; the name of the event is for programs.
        if key.as_str() == EVENT || is_absent(&value) {
            return Ok(());
        }
        self.0.push(' ');
        let _ = write!(Escaped(self.0), "{}=", key.as_str());
        let start = self.0.len();
        let _ = write!(Escaped(self.0), "{value}");
        let shown = self.0.get(start..).unwrap_or_default();
        if shown.is_empty() || shown.contains([' ', '"', '=']) {
            let quoted = format!("\"{}\"", shown.replace('"', "\\\""));
            self.0.truncate(start);
            self.0.push_str(&quoted);
        }
        Ok(())
    }
}

/// Whether a value is `None`. Such a field is omitted from its line.
fn is_absent(value: &Value<'_>) -> bool {
    struct Absent(bool);
    impl<'v> VisitValue<'v> for Absent {
        fn visit_any(&mut self, _: Value<'_>) -> Result<(), Error> {
            Ok(())
        }

        fn visit_null(&mut self) -> Result<(), Error> {
            self.0 = true;
            Ok(())
        }
    }
    let mut absent = Absent(false);
    value.visit(&mut absent).is_ok() && absent.0
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::{Duration, UNIX_EPOCH};

    fn line(args: std::fmt::Arguments<'_>, kvs: &[(&str, Value<'_>)]) -> String {
        let mut line = Vec::new();
        let mut builder = Record::builder();
        let record = builder.target("gorego::cas").level(Level::Warn).key_values(&kvs).args(args).build();
        write_text(&mut line, UNIX_EPOCH + Duration::from_millis(3_723_004), &record, false);
        String::from_utf8(line).unwrap()
    }

    #[test]
    fn a_line_for_people_is_short_and_aligned() {
        let kvs = [
            ("event", Value::from("blobs_evicted")),
            ("bytes", Value::from(12u64)),
            ("error", Value::null()),
        ];
        assert_eq!(
            line(format_args!("evicted {} blobs", 3), &kvs),
            "01:02:03.004 WARN  cas       evicted 3 blobs                              bytes=12\n"
        );
        assert_eq!(line(format_args!("plain"), &kvs[..1]), "01:02:03.004 WARN  cas       plain\n");
    }

    #[test]
    fn a_client_cannot_forge_lines_or_steer_the_terminal() {
        let kvs = [("target_id", Value::from("//x\n\x1b[2J")), ("empty", Value::from(""))];
        let line = line(format_args!("bad {}", "a\r\nb"), &kvs);
        assert_eq!(line.matches('\n').count(), 1);
        assert!(!line.contains(['\x1b', '\r']), "{line:?}");
        assert!(line.contains("target_id=//x\\n\\u{1b}[2J empty=\"\""), "{line:?}");
    }
}
