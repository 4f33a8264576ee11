//! What `gorego exec` shows while it works: one line on a terminal, nothing in a pipe.

use crate::client::Progress;
use indicatif::{HumanBytes, ProgressBar, ProgressDrawTarget, ProgressStyle};
use std::{
    future::Future,
    io::{self, IsTerminal as _},
    pin::pin,
    time::Duration,
};

/// How often the line is redrawn.
const TICK: Duration = Duration::from_millis(100);

/// The line, for as many as want to write to it; hidden where standard error is no terminal.
#[derive(Debug, Clone)]
pub struct Line(ProgressBar);

impl Line {
    /// A line for this process.
    pub fn new() -> Self {
        if !io::stderr().is_terminal() {
            return Self(ProgressBar::hidden());
        }
        let bar = ProgressBar::with_draw_target(None, ProgressDrawTarget::stderr());
        if let Ok(style) = ProgressStyle::with_template("{spinner} {elapsed:>3} {msg}") {
            bar.set_style(style);
        }
        bar.enable_steady_tick(TICK);
        Self(bar)
    }

    /// Says what is going on.
    pub fn say(&self, what: &str) {
        self.0.set_message(crate::logging::escaped(what));
    }

    /// Says how far a transfer is while it goes on.
    pub async fn during<T>(&self, what: &str, progress: &Progress, transfer: impl Future<Output = T>) -> T {
        let mut transfer = pin!(transfer);
        let mut tick = tokio::time::interval(TICK);
        loop {
            tokio::select! {
                done = &mut transfer => return done,
                _ = tick.tick() => match progress.bytes() {
                    (_, 0) => self.say(what),
                    (done, total) => self.say(&format!("{what} {} of {}", HumanBytes(done), HumanBytes(total))),
                },
            }
        }
    }

    /// Takes the line away, so that the command's own output starts on a clean one.
    pub fn clear(&self) {
        self.0.finish_and_clear();
    }
}

impl Default for Line {
    fn default() -> Self {
        Self::new()
    }
}
