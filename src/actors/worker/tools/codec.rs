//! The messages between this server and a tool (Bazel's persistent worker protocol, package `blaze.worker`), and their
//! two encodings: length-delimited protobuf, or one JSON object per line. Pure.
//!
//! A tool may print anything. An [`AnswerReader`] never holds more than [`MAX_ANSWER_BYTES`] and takes time linear in
//! the bytes that it reads. It recognises most invalid answers by their first bytes instead of waiting for more.

use base64::{Engine as _, prelude::BASE64_STANDARD};
use prost::Message;
use serde::{Deserialize, Serialize, Serializer};
use std::fmt;

/// Maximum size of a request. Tools read a request into memory as a whole.
pub(super) const MAX_REQUEST_BYTES: usize = 64 * 1024 * 1024;
/// Maximum size of an answer. Its text is a compiler's output for one action.
pub(super) const MAX_ANSWER_BYTES: usize = 16 * 1024 * 1024;
/// How many bytes of an invalid answer are shown.
const SHOWN_BYTES: usize = 120;
/// Maximum number of bytes of the length prefix: enough for 32 bits.
const MAX_PREFIX_BYTES: usize = 5;
/// The possible first bytes of an answer: the tags (number and type) of its fields.
const ANSWER_TAGS: &[u8] = &[1 << 3, (2 << 3) | 2, 3 << 3, 4 << 3];

/// How messages are encoded.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) enum Encoding {
    /// Protobuf; each message is preceded by its length.
    Proto,
    /// JSON, one object per line.
    Json,
}

#[derive(Clone, PartialEq, Message, Serialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct WorkRequest {
    /// The arguments of the action that a process of its own would get.
    #[prost(string, repeated, tag = "1")]
    pub arguments: Vec<String>,
    /// The files that it may read.
    #[prost(message, repeated, tag = "2")]
    pub inputs: Vec<WorkInput>,
    /// Always 0, because a tool gets one request at a time.
    #[prost(int32, tag = "3")]
    pub request_id: i32,
}

/// A file that a tool may read.
#[derive(Clone, PartialEq, Message, Serialize)]
pub(super) struct WorkInput {
    /// Path relative to the working directory.
    #[prost(string, tag = "1")]
    pub path: String,
    /// Two files with the same digest have the same content.
    #[prost(bytes = "vec", tag = "2")]
    #[serde(serialize_with = "as_base64")]
    pub digest: Vec<u8>,
}

/// The answer of a tool to a request.
#[derive(Clone, PartialEq, Message, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub(super) struct WorkAnswer {
    /// The exit code of the action.
    #[prost(int32, tag = "1")]
    #[serde(alias = "exit_code")]
    pub exit_code: i32,
    /// The output of the action.
    #[prost(string, tag = "2")]
    pub output: String,
    /// The id of the request.
    #[prost(int32, tag = "3")]
    #[serde(alias = "request_id")]
    pub request_id: i32,
    /// Whether this answers a cancellation.
    #[prost(bool, tag = "4")]
    #[serde(alias = "was_cancelled")]
    pub was_cancelled: bool,
}

/// Why the output of a tool is not a valid answer to the request.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum NoAnswer {
    /// It is not an answer. It begins with this text.
    Garbage(String),
    /// It is larger than [`MAX_ANSWER_BYTES`].
    TooLarge,
    /// There is more output after the answer.
    More(String),
    /// It answers the request with this number.
    Other(i32),
    /// It says that the work was cancelled, although no cancellation was sent.
    Cancelled,
}

impl fmt::Display for NoAnswer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Garbage(text) => {
                write!(f, "it printed \"{text}\", which is no answer, to its standard output")
            }
            Self::TooLarge => write!(f, "its answer has more than {MAX_ANSWER_BYTES} bytes"),
            Self::More(text) => write!(f, "it printed \"{text}\" after its answer"),
            Self::Other(id) => write!(f, "it answered request {id}, but was asked request 0"),
            Self::Cancelled => write!(f, "it said that the request was cancelled, which it was not"),
        }
    }
}

impl WorkRequest {
    /// The encoded request; `None` if it is larger than [`MAX_REQUEST_BYTES`].
    pub(super) fn encode_as(&self, encoding: Encoding) -> Option<Vec<u8>> {
        let bytes = match encoding {
            Encoding::Proto if self.encoded_len() > MAX_REQUEST_BYTES => return None,
            Encoding::Proto => self.encode_length_delimited_to_vec(),
            Encoding::Json => {
                let mut text = serde_json::to_vec(self).ok()?;
                text.push(b'\n');
                text
            }
        };
        (bytes.len() <= MAX_REQUEST_BYTES).then_some(bytes)
    }
}

/// Assembles an answer from the output of a tool.
#[derive(Debug)]
pub(super) struct AnswerReader {
    encoding: Encoding,
    bytes: Vec<u8>,
    json: JsonEnd,
}

impl AnswerReader {
    /// A reader that has read nothing.
    pub(super) fn new(encoding: Encoding) -> Self {
        Self { encoding, bytes: Vec::new(), json: JsonEnd::default() }
    }

    /// Reads more of the tool's output. Returns the answer when it is complete.
    ///
    /// # Errors
    /// If the output is not, or cannot become, the only answer to the request.
    pub(super) fn read(&mut self, bytes: &[u8]) -> Result<Option<WorkAnswer>, NoAnswer> {
        self.bytes.extend_from_slice(bytes);
        let (answer, end) = match self.encoding {
            Encoding::Proto => match self.proto()? {
                Some(found) => found,
                None => return Ok(None),
            },
            Encoding::Json => match self.json()? {
                Some(found) => found,
                None => return Ok(None),
            },
        };
        let rest = self.bytes.get(end..).unwrap_or_default();
        let may_follow = |byte: &u8| self.encoding == Encoding::Json && byte.is_ascii_whitespace();
        match answer {
            _ if !rest.iter().all(may_follow) => Err(NoAnswer::More(shown(rest))),
            WorkAnswer { request_id, .. } if request_id != 0 => Err(NoAnswer::Other(request_id)),
            WorkAnswer { was_cancelled: true, .. } => Err(NoAnswer::Cancelled),
            answer => Ok(Some(answer)),
        }
    }

    /// Decodes a length-delimited message. Also returns the position of its end.
    fn proto(&self) -> Result<Option<(WorkAnswer, usize)>, NoAnswer> {
        let garbage = || NoAnswer::Garbage(shown(&self.bytes));
        let prefix = self.bytes.iter().take(MAX_PREFIX_BYTES).position(|byte| byte & 0x80 == 0);
        let Some(prefix) = prefix.map(|last| last + 1) else {
            return if self.bytes.len() < MAX_PREFIX_BYTES { Ok(None) } else { Err(garbage()) };
        };
        let (length, message) = self.bytes.split_at(prefix);
        let length = prost::decode_length_delimiter(length).map_err(|_| garbage())?;
        // Fields are encoded in order, so the first one is a known field even if the tool is newer than this server.
        if length > 0 && message.first().is_some_and(|tag| !ANSWER_TAGS.contains(tag)) {
            return Err(garbage());
        }
        if length > MAX_ANSWER_BYTES {
            return Err(NoAnswer::TooLarge);
        }
        let Some(message) = message.get(..length) else { return Ok(None) };
        let answer = WorkAnswer::decode(message).map_err(|_| garbage())?;
        Ok(Some((answer, prefix + length)))
    }

    /// Decodes an object. Also returns the position of its end.
    fn json(&mut self) -> Result<Option<(WorkAnswer, usize)>, NoAnswer> {
        let garbage = |bytes: &[u8]| NoAnswer::Garbage(shown(bytes));
        let start = self.bytes.iter().position(|byte| !byte.is_ascii_whitespace());
        if start.is_some_and(|start| self.bytes[start] != b'{') {
            return Err(garbage(&self.bytes));
        }
        let Some(end) = self.json.look(&self.bytes) else {
            return if self.bytes.len() > MAX_ANSWER_BYTES { Err(NoAnswer::TooLarge) } else { Ok(None) };
        };
        let object = self.bytes.get(..end).unwrap_or_default();
        let answer = serde_json::from_slice(object).map_err(|_| garbage(&self.bytes))?;
        Ok(Some((answer, end)))
    }
}

/// Finds the end of a JSON object and looks at each byte only once.
#[derive(Debug, Default)]
struct JsonEnd {
    looked_at: usize,
    depth: usize,
    in_string: bool,
    escaped: bool,
}

impl JsonEnd {
    /// The end of the object at the start of `bytes`. The caller may have appended to `bytes` since the last call.
    fn look(&mut self, bytes: &[u8]) -> Option<usize> {
        while let Some(byte) = bytes.get(self.looked_at) {
            self.looked_at += 1;
            match byte {
                _ if self.escaped => self.escaped = false,
                b'\\' if self.in_string => self.escaped = true,
                b'"' => self.in_string = !self.in_string,
                _ if self.in_string => {}
                b'{' | b'[' => self.depth += 1,
                b'}' | b']' => {
                    self.depth = self.depth.saturating_sub(1);
                    if self.depth == 0 {
                        return Some(self.looked_at);
                    }
                }
                _ => {}
            }
        }
        None
    }
}

/// The beginning of the tool's output, for messages.
pub(super) fn shown(bytes: &[u8]) -> String {
    let cut = bytes.get(..SHOWN_BYTES).unwrap_or(bytes);
    let text = String::from_utf8_lossy(cut).escape_debug().to_string();
    if cut.len() < bytes.len() { format!("{text}...") } else { text }
}

fn as_base64<S: Serializer>(bytes: &[u8], serializer: S) -> Result<S::Ok, S::Error> {
    serializer.serialize_str(&BASE64_STANDARD.encode(bytes))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn read(encoding: Encoding, bytes: &[u8]) -> Result<Option<WorkAnswer>, NoAnswer> {
        AnswerReader::new(encoding).read(bytes)
    }

    fn answer(exit_code: i32, output: &str) -> WorkAnswer {
        WorkAnswer { exit_code, output: output.into(), request_id: 0, was_cancelled: false }
    }

    fn encoded(answer: &WorkAnswer, encoding: Encoding) -> Vec<u8> {
        match encoding {
            Encoding::Proto => answer.encode_length_delimited_to_vec(),
            Encoding::Json => serde_json::to_vec(&serde_json::json!({
                "exitCode": answer.exit_code,
                "output": answer.output,
                "later": { "fields": ["are", "}", "ignored"] },
            }))
            .unwrap(),
        }
    }

    #[test]
    fn a_request_has_the_encoding_that_tools_expect() {
        let input = WorkInput { path: "a/B.java".into(), digest: b"ab12".to_vec() };
        let request = WorkRequest { arguments: vec!["-g".into()], inputs: vec![input], request_id: 0 };
        assert_eq!(
            request.encode_as(Encoding::Proto).unwrap(),
            b"\x16\x0a\x02-g\x12\x10\x0a\x08a/B.java\x12\x04ab12"
        );
        let text = String::from_utf8(request.encode_as(Encoding::Json).unwrap()).unwrap();
        let expected =
            r#"{"arguments":["-g"],"inputs":[{"path":"a/B.java","digest":"YWIxMg=="}],"requestId":0}"#;
        assert_eq!(text, format!("{expected}\n"));
    }

    #[test]
    fn a_request_that_is_too_large_is_not_sent() {
        let request = |bytes| WorkRequest { arguments: vec!["x".repeat(bytes)], ..WorkRequest::default() };
        for encoding in [Encoding::Proto, Encoding::Json] {
            assert!(request(MAX_REQUEST_BYTES).encode_as(encoding).is_none());
            assert!(request(1000).encode_as(encoding).is_some());
        }
    }

    #[test]
    fn invalid_answers_are_recognised_by_their_first_bytes() {
        let garbage = |encoding, text: &str| match read(encoding, text.as_bytes()) {
            Err(NoAnswer::Garbage(shown)) => shown,
            other => panic!("{text}: {other:?}"),
        };
        for text in
            ["Hello, world\n", "warning: x", "\u{1b}[31m", "\n\nException in thread", "[INFO] x", "OK"]
        {
            assert_eq!(garbage(Encoding::Proto, text), text.escape_debug().to_string());
            garbage(Encoding::Json, text);
        }
        garbage(Encoding::Json, "{\"exitCode\": tru}");
        assert!(matches!(read(Encoding::Proto, &[0xff; 5]), Err(NoAnswer::Garbage(_))));
        assert!(garbage(Encoding::Json, &"x".repeat(1000)).len() < 2 * SHOWN_BYTES);
    }

    #[test]
    fn an_answer_to_another_request_is_refused() {
        for encoding in [Encoding::Proto, Encoding::Json] {
            let two = encoded(&answer(0, "done"), encoding).repeat(2);
            assert!(matches!(read(encoding, &two), Err(NoAnswer::More(_))));
        }
        let other = WorkAnswer { request_id: 7, ..WorkAnswer::default() }.encode_length_delimited_to_vec();
        assert_eq!(read(Encoding::Proto, &other), Err(NoAnswer::Other(7)));
        assert_eq!(read(Encoding::Json, br#"{"request_id":7}"#), Err(NoAnswer::Other(7)));
        assert_eq!(read(Encoding::Json, br#"{"wasCancelled":true}"#), Err(NoAnswer::Cancelled));
    }

    #[test]
    fn an_answer_that_is_too_large_is_not_waited_for() {
        let mut prefix = Vec::new();
        prost::encode_length_delimiter(MAX_ANSWER_BYTES + 1, &mut prefix).unwrap();
        assert_eq!(read(Encoding::Proto, &prefix), Err(NoAnswer::TooLarge));
        let mut reader = AnswerReader::new(Encoding::Json);
        assert_eq!(reader.read(b"{\"output\":\""), Ok(None));
        assert_eq!(reader.read(&vec![b'}'; MAX_ANSWER_BYTES]), Err(NoAnswer::TooLarge));
    }

    /// Reading the text again for each piece would take hours here.
    #[test]
    fn an_answer_that_comes_byte_by_byte_takes_linear_time() {
        let whole = encoded(&answer(1, &"}\"\\{".repeat(50_000)), Encoding::Json);
        let mut reader = AnswerReader::new(Encoding::Json);
        let (last, first) = whole.split_last().unwrap();
        for byte in first {
            assert_eq!(reader.read(&[*byte]), Ok(None));
        }
        assert_eq!(reader.read(&[*last]).unwrap().unwrap().exit_code, 1);
    }

    proptest! {
        /// The bytes may be cut into any pieces.
        #[test]
        fn every_answer_is_read_back(
            exit_code: i32, output in ".{0,40}", is_json: bool, cuts in prop::collection::vec(0usize..80, 0..6),
        ) {
            let encoding = if is_json { Encoding::Json } else { Encoding::Proto };
            let (sent, mut reader) = (answer(exit_code, &output), AnswerReader::new(encoding));
            let bytes = encoded(&sent, encoding);
            let mut cuts: Vec<_> = cuts.into_iter().map(|cut| cut.min(bytes.len() - 1)).chain([0, bytes.len()]).collect();
            cuts.sort_unstable();
            let mut read = Ok(None);
            for piece in cuts.windows(2) {
                prop_assert_eq!(read, Ok(None));
                read = reader.read(&bytes[piece[0]..piece[1]]);
            }
            prop_assert_eq!(read, Ok(Some(sent)));
        }

        #[test]
        fn arbitrary_bytes_never_panic(pieces in prop::collection::vec(prop::collection::vec(any::<u8>(), 0..30), 0..5)) {
            for encoding in [Encoding::Proto, Encoding::Json] {
                let mut reader = AnswerReader::new(encoding);
                let _ = pieces.iter().try_for_each(|piece| reader.read(piece).map(|_| ()));
            }
        }
    }
}
