//! Tables for people: columns that fit the terminal.
//!
//! A table is never wider than the terminal, so that no line wraps: columns that may be cut are shortened, the widest
//! first, and end with an ellipsis. In a pipe nothing is cut. Values are untrusted, so control characters are escaped.

use gorego_reapi::escape::escaped;
use rustix::termios::tcgetwinsize;
use std::{
    io::{self, IsTerminal as _},
    time::Duration,
};
use unicode_width::{UnicodeWidthChar as _, UnicodeWidthStr as _};

/// The space between two columns.
const GAP: usize = 2;
/// Minimum width of a column that is cut.
const MIN_CUT_WIDTH: usize = 8;
/// The end of a value that is cut.
const ELLIPSIS: char = '…';

#[derive(Debug, Clone, Copy)]
pub(super) struct Column {
    pub(super) title: &'static str,
    /// Whether its values may be cut.
    pub(super) may_be_cut: bool,
    /// Whether its values are numbers, which are aligned to the right.
    pub(super) is_number: bool,
}

impl Column {
    /// A column of short words, which are never cut.
    pub(super) const fn word(title: &'static str) -> Self {
        Self { title, may_be_cut: false, is_number: false }
    }

    /// A column of texts.
    pub(super) const fn text(title: &'static str) -> Self {
        Self { title, may_be_cut: true, is_number: false }
    }

    /// A column of numbers.
    pub(super) const fn number(title: &'static str) -> Self {
        Self { title, may_be_cut: false, is_number: true }
    }
}

/// The width of the terminal at standard output; `None` if that is not a terminal.
pub(super) fn terminal_width() -> Option<usize> {
    let stdout = io::stdout();
    if !stdout.is_terminal() {
        return None;
    }
    tcgetwinsize(&stdout).ok().map(|size| usize::from(size.ws_col)).filter(|columns| *columns > 0)
}

/// The lines of a table with at most this width. Columns without values are left out.
pub(super) fn table(columns: &[Column], rows: &[Vec<String>], width: Option<usize>) -> String {
    let rows: Vec<Vec<String>> =
        rows.iter().map(|row| row.iter().map(|value| escaped(value)).collect()).collect();
    let value = |row: &[String], at: usize| row.get(at).cloned().unwrap_or_default();
    let kept = |at: &usize| rows.is_empty() || rows.iter().any(|row| !value(row, *at).is_empty());
    let kept: Vec<(usize, &Column)> = columns.iter().enumerate().filter(|(at, _)| kept(at)).collect();
    let natural = |(at, column): &(usize, &Column)| {
        rows.iter().map(|row| value(row, *at).width()).fold(column.title.width(), usize::max)
    };
    let mut widths: Vec<usize> = kept.iter().map(natural).collect();
    if let Some(width) = width {
        let can_be_cut: Vec<bool> = kept.iter().map(|(_, column)| column.may_be_cut).collect();
        cut(&mut widths, &can_be_cut, width);
    }
    let mut text = String::new();
    let titles = columns.iter().map(|column| column.title.to_owned()).collect();
    for row in std::iter::once(&titles).chain(&rows) {
        let mut line = String::new();
        for ((at, column), width) in kept.iter().zip(&widths) {
            if !line.is_empty() {
                line.push_str(&" ".repeat(GAP));
            }
            line.push_str(&fitted(&value(row, *at), *width, column.is_number));
        }
        let line = match width {
            // Even the columns that are not cut may be too wide together.
            Some(width) => shortened(line.trim_end(), width),
            None => line.trim_end().to_owned(),
        };
        text.push_str(&line);
        text.push('\n');
    }
    text
}

/// Makes the widest columns that can be cut narrower, one step at a time, until all fit.
fn cut(widths: &mut [usize], can_be_cut: &[bool], width: usize) {
    let gaps = GAP * widths.len().saturating_sub(1);
    while widths.iter().sum::<usize>() + gaps > width {
        let candidates = widths.iter_mut().zip(can_be_cut).filter(|(_, can)| **can).map(|(width, _)| width);
        match candidates.max().filter(|widest| **widest > MIN_CUT_WIDTH) {
            Some(widest) => *widest -= 1,
            None => return,
        }
    }
}

/// The value in a cell of this width.
fn fitted(value: &str, width: usize, is_number: bool) -> String {
    let value = shortened(value, width);
    let blank = " ".repeat(width.saturating_sub(value.width()));
    if is_number { blank + &value } else { value + &blank }
}

/// The text, at most this wide.
fn shortened(text: &str, width: usize) -> String {
    if text.width() <= width {
        return text.to_owned();
    }
    let mut left = width.saturating_sub(1);
    let mut kept = String::new();
    for character in text.chars() {
        let Some(rest) = left.checked_sub(character.width().unwrap_or(0)) else { break };
        left = rest;
        kept.push(character);
    }
    kept.push(ELLIPSIS);
    kept
}

/// A duration with its two largest units: `2d 3h`, `4m 5s`, `6s`.
pub(super) fn short_duration(duration: Duration) -> String {
    let seconds = duration.as_secs();
    let units =
        [(seconds / 86_400, "d"), (seconds / 3_600 % 24, "h"), (seconds / 60 % 60, "m"), (seconds % 60, "s")];
    let first = units.iter().position(|(count, _)| *count > 0).unwrap_or(units.len() - 1);
    let shown = units.iter().skip(first).take(2).filter(|(count, unit)| *count > 0 || *unit == "s");
    let mut words: Vec<String> = shown.map(|(count, unit)| format!("{count}{unit}")).collect();
    if words.len() > 1 && words.last().is_some_and(|word| word == "0s") {
        words.pop();
    }
    words.join(" ")
}

#[cfg(test)]
mod tests {
    use super::*;

    const COLUMNS: [Column; 3] = [Column::word("STATE"), Column::text("TARGET"), Column::number("N")];

    fn rows(targets: &[&str]) -> Vec<Vec<String>> {
        targets.iter().map(|target| vec!["queued".into(), (*target).into(), "7".into()]).collect()
    }

    #[test]
    fn no_line_is_wider_than_the_terminal_and_words_are_kept() {
        let rows = rows(&["//some/long/package:with_a_long_name", "//a:b", "//日本語日本語日本語日本語:x"]);
        for width in 1..80 {
            let text = table(&COLUMNS, &rows, Some(width));
            assert!(text.lines().all(|line| line.width() <= width), "{width}: {text}");
        }
        let text = table(&COLUMNS, &rows, Some(30));
        assert!(
            text.lines().skip(1).all(|line| line.starts_with("queued  //") && line.ends_with('7')),
            "{text}"
        );
        assert!(text.contains('…') && text.contains("//a:b "), "{text}");
        let piped = table(&COLUMNS, &rows, None);
        assert!(piped.contains("//some/long/package:with_a_long_name") && !piped.contains('…'));
    }

    #[test]
    fn columns_without_values_are_left_out_and_values_cannot_break_lines() {
        let text = table(&COLUMNS, &rows(&["", ""]), None);
        assert_eq!(text, "STATE   N\nqueued  7\nqueued  7\n");
        let text = table(&COLUMNS, &rows(&["a\n\u{1b}[31mb"]), None);
        assert_eq!(text.lines().count(), 2);
        assert!(!text.contains('\u{1b}'));
        assert_eq!(table(&COLUMNS, &[], None), "STATE  TARGET  N\n");
    }

    #[test]
    fn durations_are_shown_with_their_two_largest_units() {
        for (seconds, shown) in [
            (0, "0s"),
            (59, "59s"),
            (60, "1m"),
            (125, "2m 5s"),
            (3_600, "1h"),
            (3_605, "1h"),
            (90_000, "1d 1h"),
        ] {
            assert_eq!(short_duration(Duration::from_secs(seconds)), shown);
        }
    }
}
