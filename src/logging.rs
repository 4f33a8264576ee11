//! Logs: the `log` crate with key-values, written by env_logger as JSON lines or as text.
//!
//! A line is one event of this server (`event = "rpc_finished"` among its key-values) or a message of a library, which gets
//! `event = "library"` and its key-values in an object of their own, so that a library can never change the type of a
//! documented field. `docs/logs.md` lists events and fields. Every line is made in memory by whoever logs and handed to one
//! thread that writes to standard error, so lines never mix and nobody waits for a reader. Panics are logged like everything
//! else. Where the process ends, [`flush`] or a [`FlushOnDrop`] sees to it that the last lines get out.
//!
//! This module decides how lines look and how they leave. It does not decide what is logged: each room does that where it
//! happens.

mod hand_over;
mod json;
mod text;

pub use json::write_json;
pub use text::write_text;

use crate::config::{LogConfig, LogFormat};
use hand_over::HandOver;
use log::{
    Level, LevelFilter, Record,
    kv::{Error, Value, VisitValue},
};
use std::{
    cell::RefCell,
    io::{self, IsTerminal as _, Write as _},
    panic,
    str::FromStr as _,
    sync::OnceLock,
    time::{Duration, SystemTime},
};

/// The event of every record that names none: what libraries say.
pub const LIBRARY_EVENT: &str = "library";
/// The event of a panic in any thread.
pub const PANIC_EVENT: &str = "panic";
/// Lines are missing where this event stands: they came faster than standard error took them.
pub const LINES_DROPPED: &str = "log_lines_dropped";
/// How long the end of the process, or a thread that panicked, waits for a reader of standard error. Longer than any reader
/// that is alive needs, short enough that a dead one does not hold up an exit.
const FLUSH_PATIENCE: Duration = Duration::from_secs(1);
/// How much of a thread's line buffer is kept between lines; one long line should not be paid for ever.
const KEPT_BUFFER_BYTES: usize = 16 * 1024;

/// What lines look like, once decided.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Style {
    /// One JSON object a line.
    Json,
    /// For people; with colour if asked for.
    Text {
        /// Whether levels are coloured.
        colour: bool,
    },
}

impl Style {
    /// The style for a configured format: [`LogFormat::Auto`] means text exactly when standard error is a terminal. Colour
    /// needs a terminal and no `NO_COLOR`.
    pub fn choose(format: LogFormat, terminal: bool, no_color: bool) -> Self {
        match (format, terminal) {
            (LogFormat::Json, _) | (LogFormat::Auto, false) => Self::Json,
            (LogFormat::Text, _) | (LogFormat::Auto, true) => Self::Text { colour: terminal && !no_color },
        }
    }
}

thread_local! {
    static LINE: RefCell<Vec<u8>> = const { RefCell::new(Vec::new()) };
}

/// Where the lines of this process go; unset before [`init`].
static OUT: OnceLock<HandOver> = OnceLock::new();

/// Installs the logger of this process and returns what its lines look like. The second call of a process changes nothing.
pub fn init(config: &LogConfig) -> Style {
    let no_color = std::env::var_os("NO_COLOR").is_some_and(|value| !value.is_empty());
    let style = Style::choose(config.format, io::stderr().is_terminal(), no_color);
    let mut builder = env_logger::Builder::new();
    builder.parse_filters(&config.filter).format(move |out, record| {
        // Taken out, so that a value whose own formatting logs simply finds an empty buffer here.
        let mut line = LINE.take();
        line.clear();
        write_line(&mut line, style, record);
        let written = out.write_all(&line);
        if line.capacity() <= KEPT_BUFFER_BYTES {
            LINE.set(line);
        }
        written
    });
    if OUT.get().is_none()
        && let Ok(out) = HandOver::start(io::stderr(), move |line, lines| report_dropped(line, style, lines))
    {
        // Should a second call come at the same time, the one that loses leaves an idle thread behind.
        let _ = OUT.set(out);
    }
    // Without a thread to hand lines to, whoever logs writes them: late lines are better than none.
    builder.target(match OUT.get() {
        Some(out) => env_logger::Target::Pipe(Box::new(out.clone())),
        None => env_logger::Target::Stderr,
    });
    if builder.try_init().is_ok() {
        panic::set_hook(Box::new(|info| {
            log_panic(info);
            // It may be the last that this process does.
            flush();
        }));
    }
    style
}

/// Writes text for people to standard error, in order with log lines and like them without waiting for a reader.
pub fn print(text: &str) {
    let _ = match OUT.get() {
        Some(out) => out.clone().write_all(text.as_bytes()),
        None => io::stderr().write_all(text.as_bytes()),
    };
}

/// Waits until everything that was logged before is written; not for long where nobody reads. Blocks, so it has its place only
/// where the process ends.
pub fn flush() {
    if let Some(out) = OUT.get() {
        out.flush(FLUSH_PATIENCE);
    }
}

/// Calls [`flush`] when it goes out of scope, be it by a return or by a panic.
#[derive(Debug)]
pub struct FlushOnDrop;

impl Drop for FlushOnDrop {
    fn drop(&mut self) {
        flush();
    }
}

fn write_line(line: &mut Vec<u8>, style: Style, record: &Record<'_>) {
    let now = SystemTime::now();
    match style {
        Style::Json => write_json(line, now, record),
        Style::Text { colour } => write_text(line, now, record, colour),
    }
}

/// Whether a value is an `Option` without anything in it: such a field is left out of its line, in every form.
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

fn report_dropped(line: &mut Vec<u8>, style: Style, lines: u64) {
    let fields = [("event", Value::from(LINES_DROPPED)), ("lines", Value::from(lines))];
    let mut record = Record::builder();
    record.level(Level::Warn).target("gorego::log").key_values(&fields);
    let message = "lines are missing here: standard error takes them too slowly or not at all";
    write_line(line, style, &record.args(format_args!("{message}")).build());
}

fn log_panic(info: &panic::PanicHookInfo<'_>) {
    let location = info.location().map(ToString::to_string).unwrap_or_default();
    let thread = std::thread::current().name().unwrap_or("unnamed").to_owned();
    let payload = info.payload();
    let message = payload.downcast_ref::<&str>().copied();
    let message =
        message.or_else(|| payload.downcast_ref::<String>().map(String::as_str)).unwrap_or("no message");
    log::error!(target: "gorego::panic", event = PANIC_EVENT, location = location.as_str(), thread = thread.as_str();
        "a thread panicked: {message}");
}

/// Whether this is a filter that env_logger understands: `level`, `target` or `target=level`, separated by commas. Its own
/// parser ignores what it does not understand, which would lose the operator's logs without a word.
///
/// # Errors
/// A sentence about the part that is wrong.
pub fn check_filter(filter: &str) -> Result<(), String> {
    let (directives, _) = filter.split_once('/').unwrap_or((filter, ""));
    for directive in directives.split(',').map(str::trim).filter(|directive| !directive.is_empty()) {
        let (target, level) = directive.split_once('=').unwrap_or(("", directive));
        let known = LevelFilter::from_str(level.trim()).is_ok();
        // A lone word that is no level is a target, but a near miss of a level is more likely a typing error.
        if !known && (directive.contains('=') || near_level(level)) {
            let place = if target.is_empty() { String::new() } else { format!(" of target \"{target}\"") };
            return Err(format!(
                "\"{}\"{place} is not a level; levels are error, warn, info, debug, trace and off",
                level.escape_debug()
            ));
        }
    }
    Ok(())
}

fn near_level(word: &str) -> bool {
    let word = word.to_lowercase();
    let levels = ["off", "error", "warn", "info", "debug", "trace"];
    word == "warning" || levels.iter().any(|level| strsim::damerau_levenshtein(&word, level) <= 1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn auto_is_text_exactly_on_a_terminal_and_colour_never_leaves_it() {
        use LogFormat::{Auto, Json, Text};
        assert_eq!(Style::choose(Auto, false, false), Style::Json);
        assert_eq!(Style::choose(Auto, true, false), Style::Text { colour: true });
        assert_eq!(Style::choose(Auto, true, true), Style::Text { colour: false });
        assert_eq!(Style::choose(Text, false, false), Style::Text { colour: false });
        assert_eq!(Style::choose(Json, true, false), Style::Json);
    }

    #[test]
    fn a_filter_that_would_be_ignored_is_refused() {
        for good in ["", "info", "WARN,gorego=debug", "gorego::cas=trace, h2=off", "gorego", "info/needle"] {
            assert_eq!(check_filter(good), Ok(()), "{good}");
        }
        for bad in ["warning", "gorego=inof", "inof", "gorego=", "info,h2=loud"] {
            assert!(check_filter(bad).is_err(), "{bad}");
        }
    }
}
