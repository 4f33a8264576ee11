//! Logs: records of the `log` crate with key-values, filtered by env_logger and written as JSON lines or as text.
//!
//! A line is either an [`Event`] of this server or a message of a library. Library messages have `event = "library"`
//! and nest their key-values in an object, so that a library can never change the type of a documented field.
//! `docs/logs.md` lists events and fields. Each thread formats lines in its own reusable buffer and hands them to one
//! writer thread, which writes them to standard error in batches. So lines never mix, and no thread waits for standard
//! error. Lines of level error are written immediately. Panics are logged like everything else. At the end of the
//! process, [`flush`] or a [`FlushOnDrop`] writes the last lines.
//!
//! This module decides how lines are formatted and written. The code that logs an event decides what is logged.

mod event;
mod hand_over;
mod json;
mod settings;
mod text;

pub use event::{Event, FIELDS_MAX, Field};
pub use json::write_json;
pub use settings::{LogConfig, LogFormat};
pub use text::write_text;

use arc_swap::ArcSwap;
use hand_over::{HandOver, Pace};
use log::{Level, Log, Metadata, Record};
use std::{
    cell::RefCell,
    io::{self, IsTerminal as _, Write as _},
    panic,
    sync::{Arc, OnceLock},
    time::{Duration, SystemTime},
};

/// The event of records without an event, which come from libraries.
pub const LIBRARY_EVENT: &str = "library";
/// The event of a panic in any thread.
pub const PANIC_EVENT: &str = "panic";
/// The event that marks missing lines. They were produced faster than standard error accepted them.
pub const LINES_DROPPED: &str = "log_lines_dropped";
/// How long an exiting process or a panicking thread waits for standard error to accept lines. A live reader needs
/// less; a dead one must not block the exit.
const FLUSH_PATIENCE: Duration = Duration::from_secs(1);
/// A thread keeps a line buffer up to this size for its next line.
const KEPT_BUFFER_BYTES: usize = 16 * 1024;

/// The resolved format of lines.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Style {
    /// One JSON object per line.
    Json,
    /// Human-readable text, one line per record.
    Text {
        /// Whether levels are coloured.
        colour: bool,
    },
}

impl Style {
    /// The style for a configured format. [`LogFormat::Auto`] selects text only if standard error is a terminal. Colour
    /// requires a terminal and no `NO_COLOR`.
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

/// The writer thread of this process; unset before [`init`].
static OUT: OnceLock<HandOver> = OnceLock::new();

/// The logger of this process; unset before [`init`].
static LOGGER: OnceLock<CurrentLogger> = OnceLock::new();

/// A logger whose filter can be replaced.
struct CurrentLogger {
    current: ArcSwap<env_logger::Logger>,
    style: Style,
}

impl Log for CurrentLogger {
    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        self.current.load().enabled(metadata)
    }

    fn log(&self, record: &Record<'_>) {
        self.current.load().log(record);
    }

    fn flush(&self) {
        self.current.load().flush();
    }
}

/// Replaces the filter of the installed logger. The filter is one that the configuration accepts.
pub(crate) fn set_filter(config: &LogConfig) {
    let Some(installed) = LOGGER.get() else { return };
    let logger = logger(config, installed.style, OUT.get());
    let max_level = logger.filter();
    installed.current.store(Arc::new(logger));
    log::set_max_level(max_level);
}

/// Installs the logger of this process and returns the line format. Further calls have no effect.
pub fn init(config: &LogConfig) -> Style {
    let no_color = std::env::var_os("NO_COLOR").is_some_and(|value| !value.is_empty());
    let style = Style::choose(config.format, io::stderr().is_terminal(), no_color);
    if OUT.get().is_none() {
        let report = move |line: &mut Vec<u8>, lines| report_dropped(line, style, lines);
        if let Ok(out) = HandOver::start(io::stderr(), Pace::default(), report) {
            // If two calls race, the loser leaves an idle thread behind.
            let _ = OUT.set(out);
        }
    }
    let logger = logger(config, style, OUT.get());
    let max_level = logger.filter();
    let installed = LOGGER.get_or_init(|| CurrentLogger { current: ArcSwap::from_pointee(logger), style });
    if log::set_logger(installed).is_ok() {
        log::set_max_level(max_level);
        panic::set_hook(Box::new(|info| {
            log_panic(info);
            // This may be the last action of the process.
            flush();
        }));
    }
    style
}

/// Creates a logger that hands its lines to `out`. Without a writer thread, the logging threads write lines themselves:
/// slow lines are better than none.
fn logger(config: &LogConfig, style: Style, out: Option<&HandOver>) -> env_logger::Logger {
    let mut builder = env_logger::Builder::new();
    builder.parse_filters(&config.filter);
    match out.cloned() {
        // The lines bypass env_logger's writer, which ignores levels and locks its output.
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

/// Formats a record into this thread's buffer and passes the line to `use_line`.
fn with_line<T>(style: Style, record: &Record<'_>, use_line: impl FnOnce(&[u8]) -> T) -> T {
    // The buffer is taken out, so that a value that logs while it is formatted finds an empty buffer. While the
    // thread's locals are destroyed there is no buffer; lines are still written.
    let mut line = LINE.try_with(RefCell::take).unwrap_or_default();
    line.clear();
    write_line(&mut line, style, record);
    let used = use_line(&line);
    if line.capacity() <= KEPT_BUFFER_BYTES {
        let _ = LINE.try_with(|kept| kept.replace(line));
    }
    used
}

/// Writes text for the user to standard error, in order with the log lines and without waiting for the reader.
pub fn print(text: &str) {
    match OUT.get() {
        Some(out) => out.put_urgent(text.as_bytes()),
        None => drop(io::stderr().write_all(text.as_bytes())),
    }
}

/// The number of lines of this process that standard error did not accept, or too slowly.
pub fn lines_dropped() -> u64 {
    OUT.get().map_or(0, HandOver::missing)
}

/// Waits until all earlier lines are written, for a limited time. Blocks, so call it only at the end of the process.
pub fn flush() {
    if let Some(out) = OUT.get() {
        out.flush(FLUSH_PATIENCE);
    }
}

/// Calls [`flush`] when it is dropped, by a return or a panic.
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
    // Appended to the batch after which the lines are missing.
    Event::warn("gorego::log", LINES_DROPPED).with("lines", lines).with_record(
        format_args!("lines are missing here: standard error accepts them too slowly or not at all"),
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

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::mpsc;

    /// A writer that sends each write as one text.
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
        // Only urgency ends this wait.
        let pace = Pace { bytes: usize::MAX, time: Duration::from_secs(3600), ..Pace::default() };
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
}
