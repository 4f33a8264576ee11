//! Converts durations and times from the wire.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

/// The last second of the year 9999, the latest time in the usual notation.
const LAST_SECOND: u64 = 253_402_300_799;

/// Converts a duration; `None` if it is negative or not valid. `Duration::try_from` of the generated type is not used,
/// because it overflows for the smallest number of seconds.
pub fn from_wire(wire: &prost_types::Duration) -> Option<Duration> {
    let seconds = u64::try_from(wire.seconds).ok()?;
    let nanos = u32::try_from(wire.nanos).ok().filter(|nanos| *nanos < 1_000_000_000)?;
    Some(Duration::new(seconds, nanos))
}

/// Converts a time; `None` if it is before 1970, after the year 9999, or not valid.
pub fn time_from_wire(wire: &prost_types::Timestamp) -> Option<SystemTime> {
    let since = from_wire(&prost_types::Duration { seconds: wire.seconds, nanos: wire.nanos })?;
    (since.as_secs() <= LAST_SECOND).then(|| UNIX_EPOCH.checked_add(since)).flatten()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_valid_duration_that_is_not_negative_is_read() {
        let read = |seconds, nanos| from_wire(&prost_types::Duration { seconds, nanos });
        assert_eq!(read(1, 2), Some(Duration::new(1, 2)));
        assert_eq!(read(0, 0), Some(Duration::ZERO));
        assert_eq!(read(i64::MAX, 999_999_999), Some(Duration::new(i64::MAX as u64, 999_999_999)));
        for (seconds, nanos) in [
            (-1, 0),
            (0, -1),
            (1, -1),
            (i64::MIN, 0),
            (i64::MIN, i32::MIN),
            (0, 1_000_000_000),
            (1, i32::MAX),
        ] {
            assert_eq!(read(seconds, nanos), None, "{seconds} {nanos}");
        }
    }
}
