//! [`Credential`]: parses the `authorization` header of a request. Pure. Headers are hostile until they are parsed
//! here.

use super::rejection::Rejection;
use base64::{Engine as _, engine::general_purpose::STANDARD};
use http::{HeaderMap, HeaderValue, header::AUTHORIZATION};
use std::fmt;

/// Maximum length of the header's value in bytes. Tokens of identity providers have one to four thousand bytes.
pub const CREDENTIAL_MAX_BYTES: usize = 16 * 1024;
/// Maximum length of a user name in bytes.
pub const USER_MAX_BYTES: usize = 128;
/// Maximum length of a password in bytes. bcrypt ignores further bytes, so a longer password would be only partly
/// checked.
pub const PASSWORD_MAX_BYTES: usize = 72;

/// A credential that is not checked yet. `Debug` shows no secret.
#[derive(Clone, PartialEq, Eq)]
pub enum Credential<'a> {
    /// A token (RFC 6750).
    Bearer(&'a str),
    /// A user and a password (RFC 7617).
    Basic {
        /// The user name: printable characters without a colon.
        user: String,
        /// The password: any bytes except NUL.
        password: Vec<u8>,
    },
}

impl fmt::Debug for Credential<'_> {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Bearer(_) => formatter.write_str("Bearer"),
            Self::Basic { user, .. } => write!(formatter, "Basic({user:?})"),
        }
    }
}

impl<'a> Credential<'a> {
    /// The credential in these headers; `None` if there is none.
    ///
    /// # Errors
    /// `Malformed` if there are several headers, or one that cannot be parsed.
    pub fn parse(headers: &'a HeaderMap) -> Result<Option<Self>, Rejection> {
        let mut values = headers.get_all(AUTHORIZATION).iter();
        match (values.next(), values.next()) {
            (None, _) => Ok(None),
            (Some(value), None) => Self::of_value(value).map(Some),
            (Some(_), Some(_)) => Err(malformed("the request has several authorization headers; send one")),
        }
    }

    fn of_value(value: &'a HeaderValue) -> Result<Self, Rejection> {
        if value.len() > CREDENTIAL_MAX_BYTES {
            return Err(malformed("the authorization header is longer than 16 KiB"));
        }
        let text = value.to_str().map_err(|_| malformed("the authorization header is not ASCII text"))?;
        let (scheme, rest) = text.split_once(' ').unwrap_or((text, ""));
        let token = rest.trim_matches(' ');
        if !is_token68(token) {
            return Err(malformed(
                "the authorization header is malformed; the forms are \"Bearer TOKEN\" and \"Basic BASE64\"",
            ));
        }
        if scheme.eq_ignore_ascii_case("bearer") {
            Ok(Self::Bearer(token))
        } else if scheme.eq_ignore_ascii_case("basic") {
            Self::of_basic(token)
        } else {
            Err(malformed("the authorization header has a scheme that is not supported; use Bearer or Basic"))
        }
    }

    fn of_basic(token: &str) -> Result<Self, Rejection> {
        let decoded = STANDARD.decode(token).map_err(|_| malformed("the Basic credential is not base64"))?;
        let colon = decoded.iter().position(|byte| *byte == b':');
        let Some((user, [_, password @ ..])) = colon.map(|colon| decoded.split_at(colon)) else {
            return Err(malformed("the Basic credential has no colon between user and password"));
        };
        let user = std::str::from_utf8(user).ok().filter(|user| is_user(user));
        let user = user.ok_or_else(|| {
            malformed("the user of the Basic credential is empty, too long, or not printable")
        })?;
        if password.contains(&0) {
            return Err(malformed("the password of the Basic credential contains a NUL"));
        }
        Ok(Self::Basic { user: user.to_owned(), password: password.to_owned() })
    }
}

/// Whether a text can be a user name for Basic authentication.
pub fn is_user(user: &str) -> bool {
    !user.is_empty()
        && user.len() <= USER_MAX_BYTES
        && !user.contains(':')
        && !user.chars().any(char::is_control)
}

/// The characters of a token in a header (RFC 9110, 11.2). A comma would start another credential.
fn is_token68(text: &str) -> bool {
    let body = text.trim_end_matches('=');
    !body.is_empty() && body.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"-._~+/".contains(&byte))
}

fn malformed(why: &str) -> Rejection {
    Rejection::Malformed(why.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn headers(values: &[&[u8]]) -> HeaderMap {
        let mut headers = HeaderMap::new();
        for value in values {
            headers.append(AUTHORIZATION, HeaderValue::from_bytes(value).unwrap());
        }
        headers
    }

    fn basic(text: &[u8]) -> Vec<u8> {
        format!("Basic {}", STANDARD.encode(text)).into_bytes()
    }

    #[test]
    fn a_scheme_is_known_in_any_case_and_there_is_one_credential_or_none() {
        assert_eq!(Credential::parse(&headers(&[])), Ok(None));
        for text in ["Bearer a.b-c_d~e+f/g==", "bearer  a.b-c_d~e+f/g==", "BEARER a.b-c_d~e+f/g== "] {
            let headers = headers(&[text.as_bytes()]);
            assert_eq!(
                Credential::parse(&headers),
                Ok(Some(Credential::Bearer("a.b-c_d~e+f/g=="))),
                "{text}"
            );
        }
        let twice = headers(&[b"Bearer a", b"Bearer a"]);
        assert!(matches!(Credential::parse(&twice), Err(Rejection::Malformed(_))));
    }

    #[test]
    fn a_user_ends_at_the_first_colon_and_a_password_may_have_odd_bytes() {
        for (text, user, password) in [
            (&b"u:p:q"[..], "u", &b"p:q"[..]),
            (b"u:", "u", b""),
            ("\u{e9} x:\u{e9}".as_bytes(), "\u{e9} x", "\u{e9}".as_bytes()),
            (b"u:\xff\xfe\n", "u", b"\xff\xfe\n"),
        ] {
            let headers = headers(&[&basic(text)]);
            let expected = Credential::Basic { user: user.into(), password: password.to_vec() };
            assert_eq!(Credential::parse(&headers), Ok(Some(expected)));
        }
    }

    #[test]
    fn an_invalid_credential_is_refused_without_repeating_it() {
        let long = format!("Bearer {}", "x".repeat(CREDENTIAL_MAX_BYTES));
        let mut values: Vec<Vec<u8>> = [
            "",
            " ",
            "Bearer",
            "Bearer ",
            "Bearer secret secret",
            "Bearer secret, Basic secret",
            "Bearer =",
            "Bearer \"secret\"",
            "Token secret",
            "secret",
            "Basic secret!",
            "Basic ====",
            "Basic c2VjcmV0",
            &long,
        ]
        .map(|text| text.as_bytes().to_vec())
        .into();
        values.push(b"Bearer secret\xff".to_vec());
        values.push(b"Bearer secret\tsecret".to_vec());
        for text in [&b":secret"[..], b"a\0:secret", b"a\n:secret", b"\xff:secret", b"u:secret\0"] {
            values.push(basic(text));
        }
        values.push(basic(format!("{}:secret", "u".repeat(USER_MAX_BYTES + 1)).as_bytes()));
        for value in values {
            let headers = headers(&[&value]);
            let Err(Rejection::Malformed(why)) = Credential::parse(&headers) else {
                panic!("{:?}", String::from_utf8_lossy(&value));
            };
            assert!(!why.contains("secret"), "{why}");
        }
    }

    proptest! {
        #[test]
        fn no_header_is_too_strange_and_no_secret_is_shown(value in proptest::collection::vec(32u8..=255, 0..200)) {
            let Ok(value) = HeaderValue::from_bytes(&value) else { return Ok(()) };
            let mut headers = HeaderMap::new();
            headers.append(AUTHORIZATION, value);
            if let Ok(Some(Credential::Bearer(token))) = Credential::parse(&headers) {
                let shown = format!("{:?}", Credential::Bearer(token));
                prop_assert_eq!(shown, "Bearer");
            }
        }
    }
}
