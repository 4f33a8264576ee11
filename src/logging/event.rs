//! [`Event`]: the only way in which this program logs.
//!
//! An event is built on the stack, field by field, and passed to the `log` crate as a record with key-values. Nothing
//! is formatted or allocated until the record is written, so a filtered event costs little. `docs/logs.md` lists the
//! names of events and fields; a test finds them in the source by the way in which they are written.

use log::{
    Level, Log, Record,
    kv::{self, Key, Value, VisitSource},
};
use std::fmt;

/// The key of the event's name among the key-values of its record.
pub(super) const EVENT: &str = "event";
/// Most fields of one event. A test checks the events of `docs/logs.md`.
pub const FIELDS_MAX: usize = 24;

/// An event that is being built.
///
/// ```
/// # use gorego::logging::Event;
/// let (victims, error) = (3_usize, Some("the disk is full".to_owned()));
/// Event::warn("gorego::cas", "disk_relieved")
///     .with("entries", victims)
///     .with_some("error", error.as_deref())
///     .log(format_args!("evicted {victims} entries"));
/// ```
#[must_use = "an event is written by `log`"]
pub struct Event<'a> {
    level: Level,
    target: &'static str,
    name: &'static str,
    fields: [(&'static str, Field<'a>); FIELDS_MAX],
    count: usize,
}

/// The value of a field.
#[derive(Clone, Copy)]
pub enum Field<'a> {
    /// A string that is borrowed until the line is written.
    Text(&'a str),
    /// A number that is never negative, such as a count or a size.
    Unsigned(u64),
    /// A number that may be negative.
    Signed(i64),
    /// A value that is `true` or `false`.
    Flag(bool),
    /// A value that is formatted as a string when it is written.
    Shown(&'a dyn fmt::Display),
}

impl<'a> Event<'a> {
    /// A failure that an operator must look at. Its line is written immediately.
    pub fn error(target: &'static str, name: &'static str) -> Self {
        Self::new(Level::Error, target, name)
    }

    /// Starts an event of level WARN.
    pub fn warn(target: &'static str, name: &'static str) -> Self {
        Self::new(Level::Warn, target, name)
    }

    /// Starts an event of normal operation.
    pub fn info(target: &'static str, name: &'static str) -> Self {
        Self::new(Level::Info, target, name)
    }

    /// Starts an event with details for debugging.
    pub fn debug(target: &'static str, name: &'static str) -> Self {
        Self::new(Level::Debug, target, name)
    }

    fn new(level: Level, target: &'static str, name: &'static str) -> Self {
        Self { level, target, name, fields: [("", Field::Flag(false)); FIELDS_MAX], count: 0 }
    }

    /// Adds a field. Fields are written in the order in which they were added.
    pub fn with(&mut self, key: &'static str, value: impl Into<Field<'a>>) -> &mut Self {
        debug_assert!(self.count < FIELDS_MAX, "{} has too many fields", self.name);
        if let Some(field) = self.fields.get_mut(self.count) {
            *field = (key, value.into());
            self.count += 1;
        }
        self
    }

    /// Adds a field if the value is present.
    pub fn with_some(&mut self, key: &'static str, value: Option<impl Into<Field<'a>>>) -> &mut Self {
        match value {
            Some(value) => self.with(key, value),
            None => self,
        }
    }

    /// Adds a text if it is not empty. An empty text means that a client sent none.
    pub fn with_said(&mut self, key: &'static str, text: &'a str) -> &mut Self {
        self.with_some(key, (!text.is_empty()).then_some(text))
    }

    /// Adds a value in its displayed form.
    pub fn with_shown(&mut self, key: &'static str, value: &'a impl fmt::Display) -> &mut Self {
        self.with(key, Field::Shown(value))
    }

    /// Logs the event with a sentence for people.
    pub fn log(&self, message: fmt::Arguments<'_>) {
        // The macros of `log` check this first too; most filtered events end here.
        if self.level <= log::max_level() {
            self.log_to(log::logger(), message);
        }
    }

    /// Like [`Event::log`], but with the given logger.
    pub(crate) fn log_to(&self, logger: &dyn Log, message: fmt::Arguments<'_>) {
        self.with_record(message, |record| logger.log(record));
    }

    /// Passes the event to `use_record` as a record.
    pub(super) fn with_record(&self, message: fmt::Arguments<'_>, use_record: impl FnOnce(&Record<'_>)) {
        let mut record = Record::builder();
        record.level(self.level).target(self.target).key_values(self);
        use_record(&record.args(message).build());
    }

    fn fields(&self) -> &[(&'static str, Field<'a>)] {
        self.fields.get(..self.count).unwrap_or_default()
    }
}

impl kv::Source for Event<'_> {
    fn visit<'kvs>(&'kvs self, visitor: &mut dyn VisitSource<'kvs>) -> Result<(), kv::Error> {
        visitor.visit_pair(Key::from_str(EVENT), Value::from(self.name))?;
        self.fields()
            .iter()
            .try_for_each(|(key, field)| visitor.visit_pair(Key::from_str(key), field.value()))
    }

    fn get(&self, key: Key<'_>) -> Option<Value<'_>> {
        if key.as_str() == EVENT {
            return Some(Value::from(self.name));
        }
        self.fields().iter().find(|(name, _)| *name == key.as_str()).map(|(_, field)| field.value())
    }

    fn count(&self) -> usize {
        1 + self.count
    }
}

impl Field<'_> {
    fn value(&self) -> Value<'_> {
        match self {
            Self::Text(text) => Value::from(*text),
            Self::Unsigned(number) => Value::from(*number),
            Self::Signed(number) => Value::from(*number),
            Self::Flag(flag) => Value::from(*flag),
            Self::Shown(value) => Value::from_dyn_display(*value),
        }
    }
}

impl<'a> From<&'a str> for Field<'a> {
    fn from(text: &'a str) -> Self {
        Self::Text(text)
    }
}

impl<'a> From<&'a String> for Field<'a> {
    fn from(text: &'a String) -> Self {
        Self::Text(text)
    }
}

impl From<bool> for Field<'_> {
    fn from(flag: bool) -> Self {
        Self::Flag(flag)
    }
}

macro_rules! integers {
    ($($kind:ident: $($integer:ty),+;)+) => {
        $($(
            impl From<$integer> for Field<'_> {
                fn from(number: $integer) -> Self {
                    // Lossless: no integer here is wider than 64 bits.
                    Self::$kind(number as _)
                }
            }
        )+)+
    };
}

integers! {
    Unsigned: u16, u32, u64, usize;
    Signed: i32, i64;
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::{Map, json};
    use std::{sync::Mutex, time::SystemTime};

    /// A logger that keeps the key-values of its last record.
    struct Last(Mutex<(String, Map<String, serde_json::Value>)>);

    impl Log for Last {
        fn enabled(&self, _: &log::Metadata<'_>) -> bool {
            true
        }

        fn log(&self, record: &Record<'_>) {
            let mut line = Vec::new();
            super::super::write_json(&mut line, SystemTime::now(), record);
            *self.0.lock().unwrap() = (record.args().to_string(), serde_json::from_slice(&line).unwrap());
        }

        fn flush(&self) {}
    }

    #[test]
    fn an_event_has_the_fields_that_apply_in_order_and_with_their_types() {
        let last = Last(Default::default());
        let nothing: Option<&str> = None;
        Event::warn("gorego::cas", "disk_relieved")
            .with("a", -1_i32)
            .with("b", u64::MAX)
            .with("c", true)
            .with_some("absent", nothing)
            .with_said("unsaid", "")
            .with_said("said", "so")
            .with_shown("shown", &format_args!("{}\n", 1 + 1))
            .log_to(&last, format_args!("a {}", "message"));
        let (message, mut line) = last.0.into_inner().unwrap();
        assert_eq!(message, "a message");
        assert!(line.remove("ts").is_some());
        let expected = json!({
            "level": "WARN", "target": "gorego::cas", "event": "disk_relieved", "msg": "a message",
            "a": -1, "b": u64::MAX, "c": true, "said": "so", "shown": "2\n",
        });
        assert_eq!(serde_json::Value::from(line), expected);
    }
}
