//! Converts an [`Error`] to an HTTP status. No other code does this. Bodies are one line of text for people.

use axum::{
    body::Body,
    http::{HeaderValue, StatusCode, header},
    response::Response,
};
use gorego_reapi::error::Error;

/// A response with one line of text.
pub(super) fn plain(code: StatusCode, text: &str) -> Response {
    let mut response = Response::new(Body::from(format!("{text}\n")));
    *response.status_mut() = code;
    response
        .headers_mut()
        .insert(header::CONTENT_TYPE, HeaderValue::from_static("text/plain; charset=utf-8"));
    response
}

/// The response to a method that the resource does not support.
pub(super) fn not_allowed(methods: &str) -> Response {
    let mut response = plain(StatusCode::METHOD_NOT_ALLOWED, &format!("the supported methods are {methods}"));
    if let Ok(methods) = HeaderValue::from_str(methods) {
        response.headers_mut().insert(header::ALLOW, methods);
    }
    response
}

/// The response to a failed request.
pub(super) fn of(error: &Error) -> Response {
    let mut response = plain(code(error), &error.to_string());
    if let Some(delay) = error.retry_after() {
        response.headers_mut().insert(header::RETRY_AFTER, delay.as_secs().into());
    }
    response
}

fn code(error: &Error) -> StatusCode {
    match error {
        Error::Invalid(_) => StatusCode::BAD_REQUEST,
        Error::NotFound(_) => StatusCode::NOT_FOUND,
        Error::MissingBlobs(_) | Error::Precondition(_) => StatusCode::CONFLICT,
        Error::OutOfRange(_) => StatusCode::PAYLOAD_TOO_LARGE,
        // Waiting does not help, or somebody has to free disk space first.
        Error::Exhausted { retry_after: None, .. } | Error::DiskFull(_) => StatusCode::INSUFFICIENT_STORAGE,
        Error::OverQuota { .. } => StatusCode::TOO_MANY_REQUESTS,
        Error::Denied(_) => StatusCode::FORBIDDEN,
        Error::Unauthenticated(_) => StatusCode::UNAUTHORIZED,
        Error::Unimplemented(_) => StatusCode::UNSUPPORTED_MEDIA_TYPE,
        Error::Exhausted { retry_after: Some(_), .. } | Error::Unavailable(_) | Error::Cancelled(_) => {
            StatusCode::SERVICE_UNAVAILABLE
        }
        Error::DeadlineExceeded(_) => StatusCode::REQUEST_TIMEOUT,
        Error::DataLoss(_) | Error::Internal(_) => StatusCode::INTERNAL_SERVER_ERROR,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    #[test]
    fn a_lack_that_will_pass_is_503_and_one_that_stays_is_507() {
        let exhausted = |retry_after| Error::Exhausted { message: "no room".into(), retry_after };
        for (error, code, retries) in [
            (exhausted(Some(Duration::from_secs(7))), 503, Some("7")),
            (exhausted(None), 507, None),
            (Error::DiskFull("full".into()), 507, Some("5")),
        ] {
            let response = of(&error);
            let retry_after =
                response.headers().get(header::RETRY_AFTER).map(|value| value.to_str().unwrap());
            assert_eq!((response.status().as_u16(), retry_after), (code, retries), "{error}");
        }
    }
}
