//! Parses the `Range` header: a single range of bytes. Pure.

use std::ops::Range;

/// The meaning of a `Range` header for a body of a known length.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Asked {
    /// The whole body: there is no range, or it must be ignored because it is invalid or has several parts.
    Whole,
    /// These bytes; never empty.
    Part(Range<u64>),
    /// A range outside the body.
    Unsatisfiable,
}

/// Parses a header. Several ranges would need a multipart body, which no cache client requests.
pub fn parse(header: Option<&str>, length: u64) -> Asked {
    let Some(range) = header.and_then(|header| header.strip_prefix("bytes=")) else { return Asked::Whole };
    let Some((first, last)) = range.trim().split_once('-') else { return Asked::Whole };
    let number = |text: &str| {
        let digits = !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit());
        // A number that does not fit is beyond the end of any body.
        digits.then(|| text.parse().unwrap_or(u64::MAX))
    };
    let part = match (number(first), number(last)) {
        (Some(first), None) if last.is_empty() => first..length,
        (Some(first), Some(last)) if first <= last => first..last.saturating_add(1).min(length),
        // A suffix range: the last `count` bytes.
        (None, Some(count)) if first.is_empty() => length.saturating_sub(count)..length,
        _ => return Asked::Whole,
    };
    if part.is_empty() { Asked::Unsatisfiable } else { Asked::Part(part) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn the_forms_of_a_range_are_understood_and_others_ignored() {
        let asked = |header| parse(Some(header), 10);
        assert_eq!(asked("bytes=0-0"), Asked::Part(0..1));
        assert_eq!(asked("bytes=2-"), Asked::Part(2..10));
        assert_eq!(asked("bytes=2-99"), Asked::Part(2..10));
        assert_eq!(asked("bytes=-3"), Asked::Part(7..10));
        assert_eq!(asked("bytes=-99"), Asked::Part(0..10));
        assert_eq!(asked("bytes=9-99999999999999999999"), Asked::Part(9..10));
        for header in ["bytes=10-", "bytes=10-11", "bytes=-0", "bytes=99999999999999999999-"] {
            assert_eq!(asked(header), Asked::Unsatisfiable, "{header}");
        }
        for header in [
            "",
            "bytes",
            "bytes=",
            "bytes=-",
            "bytes=3-2",
            "bytes=0-1,3-4",
            "lines=1-2",
            "bytes=+1-2",
            "bytes=a-b",
        ] {
            assert_eq!(asked(header), Asked::Whole, "{header}");
        }
        assert_eq!(parse(None, 10), Asked::Whole);
        assert_eq!(parse(Some("bytes=0-"), 0), Asked::Unsatisfiable);
    }

    proptest! {
        #[test]
        fn a_part_is_never_empty_and_never_outside(header in "bytes=[0-9]{0,20}-[0-9]{0,20}", length: u64) {
            if let Asked::Part(part) = parse(Some(&header), length) {
                prop_assert!(part.start < part.end && part.end <= length);
            }
        }
    }
}
