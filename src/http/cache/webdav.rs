//! PROPFIND and MKCOL, which WebDAV clients (sccache) send before they write (RFC 4918).
//!
//! The store has no directories, so every collection always exists, and creating one changes nothing. The members of a
//! collection are unknown: a collection is described alone, and a request for everything below it (`Depth: infinity`)
//! is refused, as the RFC allows. Every response is small.

use super::{
    COLLECTIONS, Target, VALUES,
    body::{UploadBody, UploadLimit},
    read::value_digest,
    write::created,
};
use crate::{call::Call, http::status};
use axum::{
    extract::Request,
    http::{HeaderMap, HeaderValue, StatusCode, header},
    response::Response,
};
use gorego_reapi::error::{Error, Result};
use std::fmt::Write as _;

/// Size limit of a body. The content of PROPFIND is ignored: all properties are always sent. MKCOL must have none.
const LIMIT: UploadLimit = UploadLimit { bytes: 64 * 1024, of: "a PROPFIND or MKCOL request" };
/// The store keeps no modification times, but clients require the property.
const MODIFIED: &str = "<D:getlastmodified>Thu, 01 Jan 1970 00:00:00 GMT</D:getlastmodified>";

/// Responds with the properties of a key, or of a collection if the key is empty or ends with a slash.
pub(super) async fn properties(
    target: Target<'_>,
    key: &str,
    request: Request,
    call: &Call,
) -> Result<Response> {
    let is_collection = is_collection(key);
    let depth = Depth::of(request.headers())?;
    let body = UploadBody::new(request, call, LIMIT, target.0.cas.decoders())?;
    body.collect(call, |_| Ok(())).await?;
    if is_collection && depth == Depth::Infinity {
        let text = "<D:error xmlns:D=\"DAV:\"><D:propfind-finite-depth/></D:error>";
        return Ok(xml(StatusCode::FORBIDDEN, text));
    }
    let properties = if is_collection {
        "<D:resourcetype><D:collection/></D:resourcetype>".to_owned()
    } else {
        let cas = target.0.cas.on_behalf_of(call.caller()).for_build(call.build());
        let size = value_digest((&cas, target.1), key, call).await?.size();
        format!("<D:resourcetype/><D:getcontentlength>{size}</D:getcontentlength>")
    };
    let href = href(target.1.name(), key);
    let text = format!(
        "<D:multistatus xmlns:D=\"DAV:\"><D:response><D:href>{href}</D:href><D:propstat><D:prop>{properties}{MODIFIED}</D:prop>\
         <D:status>HTTP/1.1 200 OK</D:status></D:propstat></D:response></D:multistatus>"
    );
    Ok(xml(StatusCode::MULTI_STATUS, &text))
}

/// Handles MKCOL: succeeds without a change, unless a value has this name.
pub(super) async fn make_collection(
    target: Target<'_>,
    key: &str,
    request: Request,
    call: &Call,
) -> Result<Response> {
    let body = UploadBody::new(request, call, LIMIT, target.0.cas.decoders())?.next(call).await?;
    if body.is_some() {
        return Err(Error::Unimplemented("a MKCOL request with a body is not supported".into()));
    }
    let name = key.trim_end_matches('/');
    if name.is_empty() {
        return Ok(status::not_allowed(&COLLECTIONS.allow()));
    }
    let cas = target.0.cas.on_behalf_of(call.caller()).for_build(call.build());
    match value_digest((&cas, target.1), name, call).await {
        Ok(_) => Ok(status::not_allowed(&VALUES.allow())),
        Err(Error::NotFound(_)) => Ok(created()),
        Err(error) => Err(error),
    }
}

/// Whether a key names a collection: it is empty or ends with a slash.
fn is_collection(key: &str) -> bool {
    key.is_empty() || key.ends_with('/')
}

/// The depth of a PROPFIND request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Depth {
    /// Only the resource itself.
    Zero,
    /// The collection and its members, which are not listed.
    One,
    /// Everything below it. This is the default of the protocol.
    Infinity,
}

impl Depth {
    fn of(headers: &HeaderMap) -> Result<Self> {
        let mut values = headers.get_all("depth").iter();
        match (values.next().map(HeaderValue::as_bytes), values.next()) {
            (None, _) => Ok(Self::Infinity),
            (Some(b"0"), None) => Ok(Self::Zero),
            (Some(b"1"), None) => Ok(Self::One),
            (Some(text), None) if text.eq_ignore_ascii_case(b"infinity") => Ok(Self::Infinity),
            _ => Err(Error::invalid("Depth is 0, 1 or infinity")),
        }
    }
}

fn xml(code: StatusCode, text: &str) -> Response {
    let mut response = status::plain(code, &format!("<?xml version=\"1.0\" encoding=\"utf-8\"?>{text}"));
    let kind = HeaderValue::from_static("application/xml; charset=utf-8");
    response.headers_mut().insert(header::CONTENT_TYPE, kind);
    response
}

/// The path of a key as a URI in XML. All characters that are not known to be safe in both are percent-encoded.
fn href(instance: &str, key: &str) -> String {
    let mut text = String::from("/");
    let segments = if instance.is_empty() { vec!["cache", key] } else { vec![instance, "cache", key] };
    for byte in segments.join("/").bytes() {
        match byte {
            // Encoded characters are not encoded twice.
            b'/' | b'%' | b'-' | b'.' | b'_' | b'~' | b'!' | b'$' | b'(' | b')' | b'*' | b'+' | b','
            | b';' | b'=' | b':' | b'@' => text.push(char::from(byte)),
            _ if byte.is_ascii_alphanumeric() => text.push(char::from(byte)),
            b'&' => text.push_str("&amp;"),
            _ => {
                let _ = write!(text, "%{byte:02X}");
            }
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn the_path_in_an_answer_is_the_one_that_was_asked_for() {
        assert_eq!(href("", ""), "/cache/");
        assert_eq!(href("team/a", "b/4/"), "/team/a/cache/b/4/");
        assert_eq!(href("", "a%2Fb&c"), "/cache/a%2Fb&amp;c");
    }

    proptest! {
        /// A key cannot inject XML.
        #[test]
        fn no_key_can_break_the_answer(key in "\\PC{0,60}") {
            let href = href("", &key);
            let harmless = |c: char| c.is_ascii_graphic() && !"<>\"'".contains(c);
            prop_assert!(href.chars().all(harmless), "{href}");
            prop_assert_eq!(href.matches('&').count(), href.matches("&amp;").count());
        }
    }

    #[test]
    fn a_depth_is_one_of_three() {
        let depth = |values: &[&str]| {
            let mut headers = HeaderMap::new();
            for value in values {
                headers.append("depth", value.parse().unwrap());
            }
            Depth::of(&headers).ok()
        };
        assert_eq!(depth(&[]), Some(Depth::Infinity));
        assert_eq!(depth(&["0"]), Some(Depth::Zero));
        assert_eq!(depth(&["1"]), Some(Depth::One));
        assert_eq!(depth(&["Infinity"]), Some(Depth::Infinity));
        for wrong in [&["2"][..], &[""], &["0", "0"], &["1,noroot"]] {
            assert_eq!(depth(wrong), None, "{wrong:?}");
        }
    }
}
