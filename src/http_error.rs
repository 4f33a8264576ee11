//! The text of a failed HTTP request for messages. Pure.

use std::error::Error;

/// The causes of an error, without the outermost message. For requests, that message only repeats the URL.
pub(crate) fn causes(error: &dyn Error) -> String {
    let mut causes = Vec::new();
    let mut next = error.source();
    while let Some(error) = next {
        causes.push(error.to_string());
        next = error.source();
    }
    if causes.is_empty() { "the request failed".into() } else { causes.join(": ") }
}
