//! [`ScrubState`]: the progress of the scrub, which is kept on disk. Pure.

use std::time::Duration;

/// Shortest time between the beginnings of two passes. Errors of disks appear over months, and every read checks its
/// bytes.
pub(super) const PASS_EVERY: Duration = Duration::from_secs(7 * 24 * 60 * 60);
const MAGIC: &str = "gorego scrub 1";

/// The progress of the scrub.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub(super) struct ScrubState {
    /// Whether the server has stopped properly since this was written.
    pub stopped: bool,
    /// The last part that was verified in this pass; empty between two passes and at the start of one.
    pub position: String,
    /// Whether a pass is under way.
    pub in_pass: bool,
    /// When the last pass began, in seconds since 1970.
    pub began: u64,
}

/// Why a pass begins.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum PassReason {
    /// The server was killed, its machine lost power, or nothing is known about its last stop.
    UncleanStop,
    /// The server was stopped during a pass, which continues.
    Resumed,
    /// The last pass began long ago.
    Due,
}

impl PassReason {
    /// The name of the reason in the log.
    pub(super) fn name(self) -> &'static str {
        match self {
            Self::UncleanStop => "unclean_stop",
            Self::Resumed => "resumed",
            Self::Due => "due",
        }
    }
}

impl ScrubState {
    /// Encodes the state as text with a checksum.
    pub(super) fn encode(&self) -> String {
        let Self { stopped, position, in_pass, began } = self;
        let text =
            format!("{MAGIC}\nstopped {stopped}\nin_pass {in_pass}\nbegan {began}\nposition {position}\n");
        let sum = crc32c::crc32c(text.as_bytes());
        format!("{text}sum {sum:08x}\n")
    }

    /// Decodes the text. `None` if it is damaged or was written by another version.
    pub(super) fn decode(text: &str) -> Option<Self> {
        let (body, sum) = text.strip_suffix('\n')?.rsplit_once("sum ")?;
        if u32::from_str_radix(sum, 16).ok()? != crc32c::crc32c(body.as_bytes()) {
            return None;
        }
        let mut lines = body.strip_prefix(MAGIC)?.strip_prefix('\n')?.lines();
        let mut field = |name: &str| lines.next()?.strip_prefix(name)?.strip_prefix(' ');
        Some(Self {
            stopped: field("stopped")?.parse().ok()?,
            in_pass: field("in_pass")?.parse().ok()?,
            began: field("began")?.parse().ok()?,
            position: field("position")?.to_owned(),
        })
    }

    /// The state of a run that begins at `now`, in seconds since 1970, and the reason for a pass if one begins at once.
    /// An empty store counts as read.
    pub(super) fn at_start(kept: Option<Self>, is_empty: bool, now: u64) -> (Self, Option<PassReason>) {
        match kept {
            _ if is_empty => (Self { began: now, ..Self::default() }, None),
            Some(kept) if kept.stopped => {
                let reason = kept.in_pass.then_some(PassReason::Resumed);
                (Self { stopped: false, ..kept }, reason)
            }
            _ => (Self::default(), Some(PassReason::UncleanStop)),
        }
    }

    /// How long it is until the next pass is due.
    pub(super) fn due_in(&self, now: u64) -> Duration {
        // A clock that was set back must not delay the next pass for years.
        let age = Duration::from_secs(now.saturating_sub(self.began.min(now)));
        PASS_EVERY.saturating_sub(age)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_state_is_read_back_and_any_change_of_it_shows() {
        let state =
            ScrubState { stopped: true, position: "blobs/=a/sha256/0f".into(), in_pass: true, began: 17 };
        let text = state.encode();
        assert_eq!(ScrubState::decode(&text), Some(state));
        for at in 0..text.len() {
            let mut changed = text.clone().into_bytes();
            changed[at] ^= 1;
            let changed = String::from_utf8_lossy(&changed).into_owned();
            assert_eq!(ScrubState::decode(&changed), None, "{changed}");
            assert_eq!(ScrubState::decode(&text[..at]), None, "{at}");
        }
    }

    #[test]
    fn a_pass_is_resumed_after_a_clean_stop_and_begins_anew_after_any_other() {
        let kept = ScrubState { stopped: true, position: "p".into(), in_pass: true, began: 9 };
        let (state, reason) = ScrubState::at_start(Some(kept.clone()), false, 20);
        assert_eq!((&*state.position, state.stopped, reason), ("p", false, Some(PassReason::Resumed)));
        let killed = ScrubState { stopped: false, ..kept.clone() };
        assert_eq!(
            ScrubState::at_start(Some(killed), false, 20),
            (ScrubState::default(), Some(PassReason::UncleanStop))
        );
        assert_eq!(ScrubState::at_start(None, false, 20).1, Some(PassReason::UncleanStop));
        let idle = ScrubState { in_pass: false, position: String::new(), ..kept };
        assert_eq!(ScrubState::at_start(Some(idle), false, 20).1, None);
    }

    #[test]
    fn an_empty_store_needs_no_pass_before_the_next_one_is_due() {
        for kept in [None, Some(ScrubState { in_pass: true, position: "p".into(), ..ScrubState::default() })]
        {
            let (state, reason) = ScrubState::at_start(kept, true, 1_000_000);
            assert_eq!((reason, state.due_in(1_000_000)), (None, PASS_EVERY));
        }
    }

    #[test]
    fn the_next_pass_is_due_a_week_after_the_last_whatever_the_clock_does() {
        let state = ScrubState { began: 1_000_000, ..ScrubState::default() };
        assert_eq!(state.due_in(1_000_000), PASS_EVERY);
        assert_eq!(state.due_in(1_000_000 + PASS_EVERY.as_secs()), Duration::ZERO);
        assert_eq!(state.due_in(10), PASS_EVERY, "the clock was set back");
    }
}
