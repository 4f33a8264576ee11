//! Escapes untrusted text (names of targets, paths, messages of a server) for messages, terminals and log lines.

use std::fmt::{self, Write as _};

/// Most characters of a client's text that a message repeats.
pub const SHOWN_CHARS: usize = 300;

/// A text of a client as a message repeats it: escaped, and cut after [`SHOWN_CHARS`] characters, with an ellipsis.
/// The rest of the text is not looked at.
pub fn shown(text: &str) -> String {
    match text.char_indices().nth(SHOWN_CHARS) {
        Some((end, _)) => format!("{}...", text[..end].escape_debug()),
        None => text.escape_debug().to_string(),
    }
}

/// The text on one line, with control characters escaped.
pub fn escaped(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    let _ = Escaped(&mut out).write_str(text);
    out
}

/// A writer that escapes control characters and appends the result to a string.
#[derive(Debug)]
pub struct Escaped<'a>(pub &'a mut String);

impl fmt::Write for Escaped<'_> {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        for c in text.chars() {
            if c.is_control() {
                self.0.extend(c.escape_default());
            } else {
                self.0.push(c);
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_message_repeats_a_short_text_as_a_whole_and_the_beginning_of_a_long_one() {
        assert_eq!(shown("a\n\"\u{7f}"), "a\\n\\\"\\u{7f}");
        let whole = "\u{e9}".repeat(SHOWN_CHARS);
        assert_eq!(shown(&whole), whole);
        assert_eq!(shown(&format!("{whole}x")), format!("{whole}..."));
    }
}
