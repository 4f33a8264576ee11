//! The time limit that a client sets for its call. Pure.

use http::HeaderMap;
use std::time::Duration;

/// The time limit in the header `grpc-timeout`, which has up to eight digits and a unit. A malformed value is ignored.
pub(super) fn time_limit(headers: &HeaderMap) -> Option<Duration> {
    const DIGITS_MAX: usize = 8;
    let (unit, digits) = headers.get("grpc-timeout")?.as_bytes().split_last()?;
    if digits.len() > DIGITS_MAX {
        return None;
    }
    let amount: u64 = std::str::from_utf8(digits).ok()?.parse().ok()?;
    Some(match unit {
        b'H' => Duration::from_secs(amount * 3_600),
        b'M' => Duration::from_secs(amount * 60),
        b'S' => Duration::from_secs(amount),
        b'm' => Duration::from_millis(amount),
        b'u' => Duration::from_micros(amount),
        b'n' => Duration::from_nanos(amount),
        _ => return None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_time_that_a_client_gives_is_read_or_passed_over() {
        let read = |text: &str| {
            let mut headers = HeaderMap::new();
            headers.insert("grpc-timeout", text.parse().unwrap());
            time_limit(&headers)
        };
        for (text, limit) in [
            ("2H", Duration::from_secs(7_200)),
            ("3M", Duration::from_secs(180)),
            ("4S", Duration::from_secs(4)),
            ("99999999m", Duration::from_millis(99_999_999)),
            ("5u", Duration::from_micros(5)),
            ("6n", Duration::from_nanos(6)),
        ] {
            assert_eq!(read(text), Some(limit), "{text}");
        }
        for text in ["", "S", "1", "1x", "-1S", "123456789S", "1.5S", "S1"] {
            assert_eq!(read(text), None, "{text}");
        }
        assert_eq!(time_limit(&HeaderMap::new()), None);
    }
}
