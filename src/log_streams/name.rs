//! Names of log streams: `{parent}/logstreams/{id}`, and for writing `{parent}/logstreams/{id}/{token}` (LOG-01).
//!
//! Pure. The text is untrusted, and has at most [`MAX_RESOURCE_NAME_BYTES`]. Whether the parent and the stream exist is
//! checked elsewhere.

use super::run::{LogKind, RunLogs};
use gorego_reapi::{
    error::{Error, Result},
    escape,
    resource_name::MAX_RESOURCE_NAME_BYTES,
};
use std::fmt;
use uuid::Uuid;

/// The segment that marks the name of a log stream.
pub const KEYWORD: &str = "logstreams";
/// The first of these segments in a ByteStream name decides its kind.
const KEYWORDS: [&str; 4] = ["blobs", "compressed-blobs", "uploads", KEYWORD];

/// The parsed name of a log stream.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LogName {
    /// An instance name, which may be empty, or the name of an operation.
    pub parent: String,
    /// The id of the stream.
    pub id: StreamId,
    /// The secret that allows writing; `None` in a read name.
    pub token: Option<WriteToken>,
}

/// The id of a stream below its parent.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum StreamId {
    /// A stream that a client created.
    Client(Uuid),
    /// An output of a run.
    Run(RunLogs, LogKind),
}

impl LogName {
    /// Parses a ByteStream name; `None` if it does not name a log stream.
    ///
    /// # Errors
    /// `Invalid` for a malformed name; `NotFound` for an id or token that this server never issued.
    pub fn parse(name: &str) -> Option<Result<Self>> {
        let is_keyword = |segment: &&str| KEYWORDS.contains(segment);
        // Almost all names refer to blobs.
        if name.split('/').find(is_keyword)? != KEYWORD {
            return None;
        }
        let shown = || escape::shown(name);
        if name.len() > MAX_RESOURCE_NAME_BYTES {
            return Some(Err(Error::Invalid(format!(
                "resource name \"{}\" has {} bytes; at most {MAX_RESOURCE_NAME_BYTES} are possible",
                shown(),
                name.len()
            ))));
        }
        let segments: Vec<&str> = name.split('/').collect();
        let keyword = segments.iter().position(is_keyword)?;
        let (parent, rest) = (segments.get(..keyword)?.join("/"), segments.get(keyword + 1..)?);
        let malformed = || {
            Error::Invalid(format!(
                "resource name \"{}\" is malformed; the form is {{parent}}/logstreams/{{id}}[/{{token}}]",
                shown()
            ))
        };
        // With an empty parent there is no slash; otherwise one stream would have two names.
        if name.starts_with('/') {
            return Some(Err(malformed()));
        }
        let (id, token) = match *rest {
            [id] => (id, None),
            [id, token] => (id, Some(token)),
            _ => return Some(Err(malformed())),
        };
        let unknown = || Error::NotFound(format!("log stream \"{}\" is unknown to this server", shown()));
        let parsed = || {
            let id = StreamId::parse(id)?;
            let token = token.map(|text| WriteToken::parse(text).ok_or(())).transpose().ok()?;
            Some(Self { parent, id, token })
        };
        Some(parsed().ok_or_else(unknown))
    }

    /// The read name of the same stream.
    pub fn for_reading(&self) -> Self {
        Self { token: None, ..self.clone() }
    }
}

impl fmt::Display for LogName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if !self.parent.is_empty() {
            write!(f, "{}/", self.parent)?;
        }
        write!(f, "{KEYWORD}/{}", self.id)?;
        self.token.as_ref().map_or(Ok(()), |token| write!(f, "/{}", token.0))
    }
}

impl StreamId {
    fn parse(text: &str) -> Option<Self> {
        for kind in [LogKind::Stdout, LogKind::Stderr] {
            if let Some(id) = text.strip_suffix(kind.name()).and_then(|rest| rest.strip_suffix('-')) {
                return Some(Self::Run(RunLogs(uuid(id)?), kind));
            }
        }
        uuid(text).map(Self::Client)
    }
}

impl fmt::Display for StreamId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Client(id) => id.hyphenated().fmt(f),
            Self::Run(RunLogs(id), kind) => write!(f, "{}-{}", id.hyphenated(), kind.name()),
        }
    }
}

/// Accepts only one spelling per id, so that each stream has one name.
fn uuid(text: &str) -> Option<Uuid> {
    Uuid::try_parse(text).ok().filter(|id| id.hyphenated().to_string() == text)
}

/// The last segment of a write name: 244 random bits in 64 hexadecimal digits. `Debug` does not show it.
#[derive(Clone, PartialEq, Eq)]
pub struct WriteToken(String);

impl WriteToken {
    /// Creates a random token.
    pub fn new() -> Self {
        // Each UUID has 122 bits from the system's random source. LOG-01 requires 128.
        Self(format!("{}{}", Uuid::new_v4().simple(), Uuid::new_v4().simple()))
    }

    fn parse(text: &str) -> Option<Self> {
        let is_hex = |byte: u8| byte.is_ascii_digit() || (b'a'..=b'f').contains(&byte);
        (text.len() == 64 && text.bytes().all(is_hex)).then(|| Self(text.to_owned()))
    }
}

impl Default for WriteToken {
    fn default() -> Self {
        Self::new()
    }
}

impl fmt::Debug for WriteToken {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("WriteToken")
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::HashSet;

    fn client(parent: &str) -> LogName {
        let id = StreamId::Client(Uuid::new_v4());
        LogName { parent: parent.into(), id, token: Some(WriteToken::new()) }
    }

    /// LOG-01.
    #[test]
    fn names_are_read_back_and_the_write_name_is_the_name_and_one_segment() {
        for parent in ["", "main", "a/b/c", "main/operations/6ba7b810-9dad-11d1-80b4-00c04fd430c8"] {
            let write = client(parent);
            let read = write.for_reading();
            assert_eq!(LogName::parse(&write.to_string()), Some(Ok(write.clone())));
            assert_eq!(LogName::parse(&read.to_string()), Some(Ok(read.clone())));
            let token = write.to_string();
            let token = token.strip_prefix(&format!("{read}/")).unwrap();
            assert!(token.len() == 64 && !token.contains('/'));
            let run = StreamId::Run(RunLogs(Uuid::new_v4()), LogKind::Stderr);
            let run = LogName { parent: parent.into(), id: run, token: None };
            assert_eq!(LogName::parse(&run.to_string()), Some(Ok(run)));
        }
    }

    /// LOG-01.
    #[test]
    fn tokens_do_not_repeat_and_are_long_enough() {
        let tokens: HashSet<String> = (0..1000).map(|_| WriteToken::new().0).collect();
        assert_eq!(tokens.len(), 1000);
        assert!(tokens.iter().all(|token| token.len() * 4 >= 128));
        assert!(!format!("{:?}", client("")).contains(tokens.iter().next().unwrap().as_str()));
    }

    #[test]
    fn a_name_is_that_of_a_blob_or_an_upload_when_their_word_comes_first() {
        let id = Uuid::new_v4();
        for name in [
            format!("uploads/{id}/blobs/abc/1/logstreams/{id}"),
            format!("i/blobs/abc/1/logstreams/{id}"),
            format!("compressed-blobs/zstd/abc/1/logstreams/{id}"),
            String::new(),
            "operations/x".into(),
        ] {
            assert_eq!(LogName::parse(&name), None, "{name}");
        }
        let upper = id.to_string().to_uppercase();
        for name in [
            "logstreams".into(),
            format!("logstreams/{id}/a/b"),
            format!("a/logstreams/{id}/t/"),
            format!("/logstreams/{id}"),
        ] {
            assert!(matches!(LogName::parse(&name), Some(Err(Error::Invalid(_)))), "{name}");
        }
        for name in ["logstreams/".into(), format!("logstreams/{upper}"), format!("logstreams/{id}/token")] {
            assert!(matches!(LogName::parse(&name), Some(Err(Error::NotFound(_)))), "{name}");
        }
    }

    /// LOG-01.
    #[test]
    fn a_name_that_is_too_long_has_a_short_error() {
        for part in ["/", "\u{7f}"] {
            let name = format!("i/logstreams/{}", part.repeat(16 * 1024 * 1024));
            let Some(Err(Error::Invalid(text))) = LogName::parse(&name) else { panic!() };
            assert!(
                text.contains(&format!("has {} bytes; at most 16384 are possible", name.len())),
                "{text}"
            );
            assert!(text.len() < 4096, "{}", text.len());
        }
    }

    proptest! {
        #[test]
        fn whatever_is_read_as_a_name_is_written_the_same(name in "(a/|b/|/)?logstreams/[0-9a-f/-]{0,80}(stdout|stderr)?") {
            if let Some(Ok(parsed)) = LogName::parse(&name) {
                prop_assert_eq!(parsed.to_string(), name);
            }
        }

        #[test]
        fn no_text_is_too_strange_to_be_refused(name in "\\PC{0,200}") {
            let _ = LogName::parse(&name);
        }
    }
}
