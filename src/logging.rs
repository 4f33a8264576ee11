//! Logs: records of the `log` crate with key-values, filtered by env_logger and written as JSON lines or as text.
//!
//! A line is one [`Event`] of this server or a message of a library, which gets `event = "library"` and its key-values in an
//! object of their own, so that a library can never change the type of a documented field. `docs/logs.md` lists events and
//! fields. Each thread writes its lines into a buffer of its own that it uses again, and hands them to one thread that writes
//! them to standard error in batches, so lines never mix and nobody waits for a reader. Lines of level error are written at
//! once. Panics are logged like everything else. Where the process ends, [`flush`] or a [`FlushOnDrop`] writes the last lines.
//!
//! This module decides how lines look and how they leave. It does not decide what is logged: each room does that where it
//! happens.

mod event;
mod hand_over;
mod json;
mod text;

pub use event::{Event, FIELDS_MAX, Field};
pub use json::write_json;
pub use text::write_text;

use crate::config::{LogConfig, LogFormat};
use hand_over::{HandOver, Pace};
use log::{Level, LevelFilter, Record};
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
    if OUT.get().is_none() {
        let report = move |line: &mut Vec<u8>, lines| report_dropped(line, style, lines);
        if let Ok(out) = HandOver::start(io::stderr(), Pace::default(), report) {
            // Should a second call come at the same time, the one that loses leaves an idle thread behind.
            let _ = OUT.set(out);
        }
    }
    let logger = logger(config, style, OUT.get());
    let max_level = logger.filter();
    if log::set_boxed_logger(Box::new(logger)).is_ok() {
        log::set_max_level(max_level);
        panic::set_hook(Box::new(|info| {
            log_panic(info);
            // It may be the last that this process does.
            flush();
        }));
    }
    style
}

/// The logger that hands the lines it lets through to `out`. Without a thread to hand lines to, whoever logs writes them: late
/// lines are better than none.
fn logger(config: &LogConfig, style: Style, out: Option<&HandOver>) -> env_logger::Logger {
    let mut builder = env_logger::Builder::new();
    builder.parse_filters(&config.filter);
    match out.cloned() {
        // The lines go past env_logger's own writer, which does not know their levels and locks what it writes to.
        Some(out) => {
            builder.target(env_logger::Target::Pipe(Box::new(io::sink()))).format(move |_, record| {
                with_line(style, record, |line| match record.level() {
                    Level::Error => out.put_urgent(line),
                    _ => out.put(line),
                });
                Ok(())
            })
        }
        None => builder
            .target(env_logger::Target::Stderr)
            .format(move |out, record| with_line(style, record, |line| out.write_all(line))),
    };
    builder.build()
}

/// Writes a record as a line into the buffer of this thread, for as long as `use_line` takes.
fn with_line<T>(style: Style, record: &Record<'_>, use_line: impl FnOnce(&[u8]) -> T) -> T {
    // Taken out, so that a value whose own formatting logs simply finds an empty buffer here. There is none when the thread
    // ends: what its last destructors log is written too.
    let mut line = LINE.try_with(RefCell::take).unwrap_or_default();
    line.clear();
    write_line(&mut line, style, record);
    let used = use_line(&line);
    if line.capacity() <= KEPT_BUFFER_BYTES {
        let _ = LINE.try_with(|kept| kept.replace(line));
    }
    used
}

/// Writes text for people to standard error, in order with log lines and like them without waiting for a reader.
pub fn print(text: &str) {
    match OUT.get() {
        Some(out) => out.put_urgent(text.as_bytes()),
        None => drop(io::stderr().write_all(text.as_bytes())),
    }
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

fn report_dropped(line: &mut Vec<u8>, style: Style, lines: u64) {
    // Straight into the batch at whose end the lines are missing.
    Event::warn("gorego::log", LINES_DROPPED).with("lines", lines).with_record(
        format_args!("lines are missing here: standard error takes them too slowly or not at all"),
        |record| write_line(line, style, record),
    );
}

fn log_panic(info: &panic::PanicHookInfo<'_>) {
    let location = info.location().map(ToString::to_string).unwrap_or_default();
    let thread = std::thread::current().name().unwrap_or("unnamed").to_owned();
    let payload = info.payload();
    let message = payload.downcast_ref::<&str>().copied();
    let message =
        message.or_else(|| payload.downcast_ref::<String>().map(String::as_str)).unwrap_or("no message");
    Event::error("gorego::panic", PANIC_EVENT)
        .with("location", &location)
        .with("thread", &thread)
        .log(format_args!("a thread panicked: {message}"));
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
    use std::sync::mpsc;

    /// Tells what is written, one text for each write.
    struct Told(mpsc::Sender<String>);

    impl io::Write for Told {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            let _ = self.0.send(String::from_utf8_lossy(bytes).into_owned());
            Ok(bytes.len())
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    #[test]
    fn lines_gather_and_one_of_level_error_takes_them_along_at_once() {
        const PATIENCE: Duration = Duration::from_secs(30);
        let (told, writes) = mpsc::channel();
        // Nothing but urgency ends this rest.
        let pace = Pace { bytes: usize::MAX, time: Duration::from_secs(3600) };
        let out = HandOver::start(Told(told), pace, |_, _| {}).unwrap();
        let config = LogConfig { filter: "info".into(), format: LogFormat::Text };
        let logger = logger(&config, Style::Text { colour: false }, Some(&out));
        Event::info("gorego::server", "server_stopped").log_to(&logger, format_args!("first"));
        assert!(writes.recv_timeout(PATIENCE).unwrap().contains("first"));
        Event::info("gorego::server", "server_stopped").log_to(&logger, format_args!("second"));
        Event::warn("gorego::server", "connections_cut").log_to(&logger, format_args!("third"));
        Event::debug("gorego::worker", "action_finished").log_to(&logger, format_args!("filtered out"));
        assert!(writes.try_recv().is_err(), "these are in no hurry");
        Event::error("gorego::server", "server_failed").log_to(&logger, format_args!("last"));
        let written = writes.recv_timeout(PATIENCE).unwrap();
        let last_words = written.lines().filter_map(|line| line.split_whitespace().last());
        assert_eq!(last_words.collect::<Vec<_>>(), ["second", "third", "last"]);
    }

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
