//! [`FrameReader`]: the frames of one direction of an HTTP/2 connection, by their headers alone (RFC 9113, section 4.1). Pure.

/// What the client sends before its first frame.
const PREFACE_BYTES: usize = 24;
/// Length, type, flags and stream of a frame.
const HEADER_BYTES: usize = 9;

/// Frame types of RFC 9113, section 6.
pub(super) mod kind {
    pub const DATA: u8 = 0;
    pub const HEADERS: u8 = 1;
    pub const RST_STREAM: u8 = 3;
    pub const SETTINGS: u8 = 4;
    pub const GOAWAY: u8 = 7;
    pub const WINDOW_UPDATE: u8 = 8;
    pub const CONTINUATION: u8 = 9;
}

/// The header of a frame.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Frame {
    pub kind: u8,
    pub length: u32,
    pub stream: u32,
    flags: u8,
}

impl Frame {
    fn parse(header: [u8; HEADER_BYTES]) -> Self {
        let [a, b, c, kind, flags, stream @ ..] = header;
        Self {
            kind,
            length: u32::from_be_bytes([0, a, b, c]),
            // The first bit is reserved.
            stream: u32::from_be_bytes(stream) & (u32::MAX >> 1),
            flags,
        }
    }

    /// Whether nothing more comes of the stream in this direction.
    pub fn ends_stream(self) -> bool {
        matches!(self.kind, kind::DATA | kind::HEADERS) && self.flags & 0x1 != 0
    }

    /// Whether this is the last frame of a header block.
    pub fn ends_headers(self) -> bool {
        matches!(self.kind, kind::HEADERS | kind::CONTINUATION) && self.flags & 0x4 != 0
    }
}

/// Finds the frames in bytes that come in pieces of any size.
#[derive(Debug)]
pub(super) struct FrameReader {
    header: [u8; HEADER_BYTES],
    /// How much of the header has come.
    seen: usize,
    /// What is to come of the preface or of the payload.
    skip: usize,
}

impl FrameReader {
    /// For what a client sends.
    pub fn of_client() -> Self {
        Self { skip: PREFACE_BYTES, ..Self::of_server() }
    }

    /// For what a server sends.
    pub fn of_server() -> Self {
        Self { header: [0; HEADER_BYTES], seen: 0, skip: 0 }
    }

    /// Whether a frame could begin here.
    pub fn is_between_frames(&self) -> bool {
        self.seen == 0 && self.skip == 0
    }

    /// Takes the next bytes, and gives each frame whose header is complete.
    pub fn take(&mut self, mut bytes: &[u8], mut frame: impl FnMut(Frame)) {
        while !bytes.is_empty() {
            if self.skip > 0 {
                let part = self.skip.min(bytes.len());
                self.skip -= part;
                bytes = bytes.get(part..).unwrap_or_default();
                continue;
            }
            let part = (HEADER_BYTES - self.seen).min(bytes.len());
            let (head, rest) = bytes.split_at(part);
            if let Some(place) = self.header.get_mut(self.seen..self.seen + part) {
                place.copy_from_slice(head);
            }
            self.seen += part;
            bytes = rest;
            if self.seen == HEADER_BYTES {
                let parsed = Frame::parse(self.header);
                self.seen = 0;
                self.skip = usize::try_from(parsed.length).unwrap_or(usize::MAX);
                frame(parsed);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn frames_are_found_however_the_bytes_are_cut(
            frames in proptest::collection::vec((any::<u8>(), any::<u8>(), 0u32..40, 0u32..1000), 0..20), piece in 1usize..70,
        ) {
            let mut bytes = vec![b'x'; PREFACE_BYTES];
            for &(kind, flags, length, stream) in &frames {
                bytes.extend(&length.to_be_bytes()[1..]);
                bytes.extend([kind, flags]);
                bytes.extend((stream | 1 << 31).to_be_bytes());
                bytes.extend(std::iter::repeat_n(7, length as usize));
            }
            let mut reader = FrameReader::of_client();
            let mut found = Vec::new();
            for piece in bytes.chunks(piece) {
                reader.take(piece, |frame| found.push((frame.kind, frame.flags, frame.length, frame.stream)));
            }
            prop_assert_eq!(found, frames);
            prop_assert!(reader.is_between_frames());
        }
    }
}
