//! [`ClaimPattern`]: a pattern for the values of a claim. Pure.
//!
//! `*` matches any characters except "/", and `**` any characters. All other characters match themselves. So `team/*`
//! matches every project of a group, and `team/**` also the projects of its subgroups.

/// Maximum length of a pattern in bytes.
const MAX_PATTERN_BYTES: usize = 512;
/// Maximum length of a value that is compared, in bytes. Longer values match no pattern.
const MAX_VALUE_BYTES: usize = 4 * 1024;

/// The pattern; see the top of this file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ClaimPattern {
    pieces: Vec<PatternPiece>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum PatternPiece {
    Byte(u8),
    /// Any bytes except "/".
    Segment,
    /// Any bytes, also "/".
    Anything,
}

impl ClaimPattern {
    /// Parses a pattern.
    ///
    /// # Errors
    /// Why it is not valid. A pattern that every value matches is refused, because it would look like a condition
    /// without being one.
    pub(in crate::access) fn parse(text: &str) -> Result<Self, String> {
        if text.len() > MAX_PATTERN_BYTES {
            return Err(format!("a pattern has more than {MAX_PATTERN_BYTES} bytes"));
        }
        let mut pieces = Vec::new();
        for byte in text.bytes() {
            match (byte, pieces.last_mut()) {
                (b'*', Some(last @ PatternPiece::Segment)) => *last = PatternPiece::Anything,
                (b'*', Some(PatternPiece::Anything)) => {}
                (b'*', _) => pieces.push(PatternPiece::Segment),
                _ => pieces.push(PatternPiece::Byte(byte)),
            }
        }
        if !pieces.iter().any(|piece| matches!(piece, PatternPiece::Byte(_))) {
            return Err(format!(
                "\"{}\" is no condition; write a value, or a part of one",
                text.escape_debug()
            ));
        }
        Ok(Self { pieces })
    }

    /// Whether a value matches. The time is at most proportional to the product of both lengths.
    pub(in crate::access) fn matches(&self, value: &str) -> bool {
        if value.len() > MAX_VALUE_BYTES {
            return false;
        }
        // `matched[n]` says whether the first `n` pieces match the part of the value that was read.
        let mut matched = vec![false; self.pieces.len() + 1];
        matched[0] = true;
        self.match_nothing(&mut matched);
        for byte in value.bytes() {
            let mut next = vec![false; matched.len()];
            for (at, piece) in self.pieces.iter().enumerate().filter(|(at, _)| matched[*at]) {
                match piece {
                    PatternPiece::Byte(own) => next[at + 1] |= own == &byte,
                    PatternPiece::Segment => next[at] |= byte != b'/',
                    PatternPiece::Anything => next[at] = true,
                }
            }
            self.match_nothing(&mut next);
            matched = next;
        }
        matched[self.pieces.len()]
    }

    /// A wildcard also matches the empty text.
    fn match_nothing(&self, matched: &mut [bool]) {
        for (at, piece) in self.pieces.iter().enumerate() {
            if matched[at] && !matches!(piece, PatternPiece::Byte(_)) {
                matched[at + 1] = true;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn matches(pattern: &str, value: &str) -> bool {
        ClaimPattern::parse(pattern).unwrap().matches(value)
    }

    #[test]
    fn a_pattern_matches_the_whole_value_and_a_star_stops_at_a_slash() {
        for (pattern, value) in [
            ("team", "team"),
            ("team/*", "team/project"),
            ("team/*", "team/"),
            ("team/**", "team/sub/project"),
            ("refs/heads/release-*", "refs/heads/release-1.2"),
            ("*/main", "x/main"),
            ("a*b*c", "abbbcbc"),
            ("repo:org/*:ref:refs/heads/**", "repo:org/a:ref:refs/heads/b/c"),
            ("***x", "a/bx"),
            ("é*", "éa"),
        ] {
            assert!(matches(pattern, value), "{pattern} {value}");
        }
        for (pattern, value) in [
            ("team", "teams"),
            ("team", "Team"),
            ("team", "a team"),
            ("team/*", "team"),
            ("team/*", "team/sub/project"),
            ("team/*", "evil/team/project"),
            ("team/**", "team-evil/project"),
            ("*/main", "x/y/main"),
            ("a*b", "a"),
            ("a.c", "abc"),
            ("[a]", "a"),
            ("a?", "ab"),
        ] {
            assert!(!matches(pattern, value), "{pattern} {value}");
        }
    }

    #[test]
    fn a_pattern_that_matches_every_value_is_refused() {
        for text in ["", "*", "**", "***"] {
            assert!(ClaimPattern::parse(text).unwrap_err().contains("no condition"), "{text}");
        }
        assert!(ClaimPattern::parse(&"x".repeat(MAX_PATTERN_BYTES + 1)).is_err());
    }

    #[test]
    fn no_value_takes_long() {
        let pattern = ClaimPattern::parse(&"*a".repeat(MAX_PATTERN_BYTES / 2)).unwrap();
        assert!(!pattern.matches(&format!("{}b", "a".repeat(MAX_VALUE_BYTES - 1))));
        assert!(!matches("a*", &"a".repeat(MAX_VALUE_BYTES + 1)));
    }
}
