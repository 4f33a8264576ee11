//! [`Event`]: the one way in which this program logs.
//!
//! An event is put together on the stack, field by field, and goes to the `log` crate as a record with key-values. Until the
//! record is written, nothing is formatted and nothing is allocated; an event that is filtered out costs no more than that. The
//! names of events and fields are those of `docs/logs.md`; a test finds them by the way in which they are written here.

use log::{
    Level, Log, Record,
    kv::{self, Key, Value, VisitSource},
};
use std::fmt;

/// The key of an event's name among the key-values of its record.
pub(super) const EVENT: &str = "event";
/// Most fields of one event; a test holds the events of `docs/logs.md` against it.
pub const FIELDS_MAX: usize = 24;

/// One event that is about to be logged.
///
/// ```
/// # use gorego::logging::Event;
/// let (victims, error) = (3_usize, Some("the disk is full".to_owned()));
/// Event::warn("gorego::cas", "disk_relieved")
///     .with("entries", victims)
///     .with_some("error", &error)
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
    /// A string.
    Text(&'a str),
    /// An integer that is never negative.
    Unsigned(u64),
    /// An integer.
    Signed(i64),
    /// A boolean.
    Flag(bool),
    /// A string that is made when it is written.
    Shown(&'a dyn fmt::Display),
}

impl<'a> Event<'a> {
    /// A failure that an operator has to look at. Its line is written at once.
    pub fn error(target: &'static str, name: &'static str) -> Self {
        Self::new(Level::Error, target, name)
    }

    /// Something that should not be so.
    pub fn warn(target: &'static str, name: &'static str) -> Self {
        Self::new(Level::Warn, target, name)
    }

    /// What happens in a server that is well.
    pub fn info(target: &'static str, name: &'static str) -> Self {
        Self::new(Level::Info, target, name)
    }

    /// What only those need who look for a fault.
    pub fn debug(target: &'static str, name: &'static str) -> Self {
        Self::new(Level::Debug, target, name)
    }

    fn new(level: Level, target: &'static str, name: &'static str) -> Self {
        Self { level, target, name, fields: [("", Field::Flag(false)); FIELDS_MAX], count: 0 }
    }

    /// Adds a field.
    pub fn with(&mut self, key: &'static str, value: impl Into<Field<'a>>) -> &mut Self {
        debug_assert!(self.count < FIELDS_MAX, "{} has too many fields", self.name);
        if let Some(field) = self.fields.get_mut(self.count) {
            *field = (key, value.into());
            self.count += 1;
        }
        self
    }

    /// Adds a field if it applies.
    pub fn with_some(&mut self, key: &'static str, value: Option<impl Into<Field<'a>>>) -> &mut Self {
        match value {
            Some(value) => self.with(key, value),
            None => self,
        }
    }

    /// Adds a text if there is one: an empty text says that a client said nothing.
    pub fn with_said(&mut self, key: &'static str, text: &'a str) -> &mut Self {
        self.with_some(key, (!text.is_empty()).then_some(text))
    }

    /// Adds what is shown as a string.
    pub fn with_shown(&mut self, key: &'static str, value: &'a impl fmt::Display) -> &mut Self {
        self.with(key, Field::Shown(value))
    }

    /// Logs the event with a sentence for people.
    pub fn log(&self, message: fmt::Arguments<'_>) {
        // What the macros of `log` do first: most of what is filtered out ends here.
        if self.level <= log::max_level() {
            self.log_to(log::logger(), message);
        }
    }

    /// As [`Event::log`], to this logger.
    pub(crate) fn log_to(&self, logger: &dyn Log, message: fmt::Arguments<'_>) {
        self.with_record(message, |record| logger.log(record));
    }

    /// The event as a record.
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
                    // Lossless: none of these is wider than 64 bits.
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

    /// Keeps the key-values of the records that it is given.
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
