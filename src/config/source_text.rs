//! Points at a position in a configuration file: path, line, column, and a caret under the faulty text.

use std::{fmt::Write as _, ops::Range, path::Path};

/// The number of the line that contains byte `at`, counted from 1.
pub(super) fn line_of(text: &str, at: usize) -> usize {
    1 + text.bytes().take(at).filter(|byte| *byte == b'\n').count()
}

/// Formats `path:line:column: message`, followed by the line with the text in `span` underlined.
pub(super) fn point_at(path: &Path, text: &str, span: Option<Range<usize>>, message: &str) -> String {
    let path = path.display();
    let Some(span) = span else { return format!("{path}: {message}") };
    let start = (0..=span.start.min(text.len())).rev().find(|at| text.is_char_boundary(*at)).unwrap_or(0);
    let (before, after) = text.split_at(start);
    let line_start = before.rfind('\n').map_or(0, |newline| newline + 1);
    let (column, line) = (before[line_start..].chars().count(), line_of(text, start));
    let rest = after.lines().next().unwrap_or_default();
    let width = span.end.saturating_sub(start).min(rest.len());
    let marked = rest.char_indices().take_while(|(at, _)| *at < width).count().max(1);
    let gutter = " ".repeat(line.to_string().len());
    let mut shown = format!("{path}:{line}:{}: {message}\n", column + 1);
    // Writing to a String cannot fail.
    let _ = write!(
        shown,
        "{gutter} |\n{line} | {}{rest}\n{gutter} | {}{}",
        &before[line_start..],
        " ".repeat(column),
        "^".repeat(marked)
    );
    shown
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_caret_stands_under_the_words_also_after_letters_of_several_bytes() {
        let text = "a = 1\né = \"ü\"  b\n";
        let at = text.find('b').unwrap();
        let shown = point_at(Path::new("f.toml"), text, Some(at..at + 1), "no");
        assert_eq!(shown, "f.toml:2:10: no\n  |\n2 | é = \"ü\"  b\n  |          ^");
        // A span that ends or starts outside the text is truncated and does not panic.
        assert!(point_at(Path::new("f"), text, Some(900..901), "no").starts_with("f:3:1: no"));
        assert!(point_at(Path::new("f"), text, Some(7..900), "no").starts_with("f:2:1: no"));
    }
}
