//! What a server may do later: looked at several times.
//!
//! A check whose verdict depends on who is faster is worth nothing. Where the API leaves a server time (a process that is killed, a
//! cache of several machines), a check looks until it sees what it wants, and fails when it never does.

use super::check::Verdict;
use std::{future::Future, time::Duration};

/// How often something is looked at.
const LOOKS: usize = 20;
/// The pause between two looks.
const PAUSE: Duration = Duration::from_millis(250);

/// Repeats a step until it succeeds; what it comes to the last time where it never does.
///
/// # Errors
/// Those of the last look.
pub async fn within_patience<T, F>(step: impl Fn() -> F) -> Verdict<T>
where
    F: Future<Output = Verdict<T>>,
{
    for _ in 1..LOOKS {
        if let Ok(value) = step().await {
            return Ok(value);
        }
        tokio::time::sleep(PAUSE).await;
    }
    step().await
}
