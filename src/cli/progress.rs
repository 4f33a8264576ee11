//! The progress of `gorego exec`: one line on a terminal, nothing in a pipe.

use gorego_client::Progress;
use gorego_reapi::proto::gorego::QueueStatus;
use indicatif::{HumanBytes, ProgressBar, ProgressDrawTarget, ProgressStyle};
use std::{
    future::Future,
    io::{self, IsTerminal as _},
    pin::pin,
    time::Duration,
};

/// Interval between updates of the line.
const TICK: Duration = Duration::from_millis(100);

/// The progress line. Clones share it. It is hidden if standard error is not a terminal.
#[derive(Debug, Clone)]
pub(super) struct ProgressLine(ProgressBar);

impl ProgressLine {
    /// Creates the progress line of this process.
    pub(super) fn new() -> Self {
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

    /// Shows the line again after [`ProgressLine::clear`].
    fn show(&self) {
        if self.0.is_finished() && !self.0.is_hidden() {
            self.0.reset();
            self.0.enable_steady_tick(TICK);
        }
    }

    /// Shows the current activity, unless the line was cleared.
    pub(super) fn say(&self, what: &str) {
        self.0.set_message(gorego_reapi::escape::escaped(what));
    }

    /// Shows the progress of a transfer while it runs, also after [`ProgressLine::clear`].
    pub(super) async fn during<T>(
        &self,
        what: &str,
        progress: &Progress,
        transfer: impl Future<Output = T>,
    ) -> T {
        self.say(what);
        self.show();
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

    /// Removes the line, so that other output starts on an empty line. The next transfer shows it again.
    pub(super) fn clear(&self) {
        self.0.finish_and_clear();
    }
}

/// One line with the reason why an operation waits.
pub(super) fn waiting(status: &QueueStatus) -> String {
    let QueueStatus { pool, position, busy_slots, slots, reason, .. } = status;
    match position {
        1.. => format!("waiting: {} in pool {pool}, {busy_slots} of {slots} slots busy", ordinal(*position)),
        _ if reason.is_empty() => format!("waiting in pool {pool}"),
        _ => format!("waiting: {reason}"),
    }
}

fn ordinal(number: i64) -> String {
    let ending = match (number % 10, number % 100) {
        (1, last) if last != 11 => "st",
        (2, last) if last != 12 => "nd",
        (3, last) if last != 13 => "rd",
        _ => "th",
    };
    format!("{number}{ending}")
}

impl Default for ProgressLine {
    fn default() -> Self {
        Self::new()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn progress_shows_the_position_in_the_queue() {
        let status = |position| QueueStatus {
            pool: "linux".into(),
            position,
            busy_slots: 2,
            slots: 2,
            reason: "its inputs are being checked".into(),
            ..Default::default()
        };
        assert_eq!(waiting(&status(12)), "waiting: 12th in pool linux, 2 of 2 slots busy");
        assert_eq!(waiting(&status(0)), "waiting: its inputs are being checked");
        let spoken = [1, 2, 3, 4, 11, 13, 21, 102, 111].map(ordinal);
        assert_eq!(spoken, ["1st", "2nd", "3rd", "4th", "11th", "13th", "21st", "102nd", "111th"]);
    }
}
