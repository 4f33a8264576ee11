//! Polling for effects that a server may delay.
//!
//! A check whose verdict depends on timing is worthless. Where the API allows a delay (killing a process, a cache of
//! several machines), a check polls until it observes the expected state, and fails if it never does.

use super::check::Verdict;
use std::{future::Future, time::Duration};

/// Number of polls before a condition counts as not met.
const POLLS: usize = 20;
/// Delay between two polls.
const PAUSE: Duration = Duration::from_millis(250);

/// Repeats a step until it succeeds. Returns the last result if it never does.
///
/// # Errors
/// The error of the last attempt.
pub(crate) async fn within_patience<T, F>(step: impl Fn() -> F) -> Verdict<T>
where
    F: Future<Output = Verdict<T>>,
{
    for _ in 1..POLLS {
        if let Ok(value) = step().await {
            return Ok(value);
        }
        tokio::time::sleep(PAUSE).await;
    }
    step().await
}
