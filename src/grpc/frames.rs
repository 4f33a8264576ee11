//! [`FrameReader`]: parses the frame headers of one direction of an HTTP/2 connection (RFC 9113, section 4.1). Pure.

/// Length of the client's connection preface.
const PREFACE_BYTES: usize = 24;
/// Length of a frame header: length, type, flags and stream.
const HEADER_BYTES: usize = 9;

/// Frame types of RFC 9113, section 6.
pub(super) mod kind {
    pub(crate) const DATA: u8 = 0;
    pub(crate) const HEADERS: u8 = 1;
    pub(crate) const PRIORITY: u8 = 2;
    pub(crate) const RST_STREAM: u8 = 3;
    pub(crate) const SETTINGS: u8 = 4;
    pub(crate) const GOAWAY: u8 = 7;
    pub(crate) const WINDOW_UPDATE: u8 = 8;
    pub(crate) const CONTINUATION: u8 = 9;
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

    /// Whether the stream ends in this direction.
    pub(super) fn ends_stream(self) -> bool {
        matches!(self.kind, kind::DATA | kind::HEADERS) && self.flags & 0x1 != 0
    }

    /// Whether this is the last frame of a header block.
    pub(super) fn ends_headers(self) -> bool {
        matches!(self.kind, kind::HEADERS | kind::CONTINUATION) && self.flags & 0x4 != 0
    }
}

/// Finds frames in bytes that arrive in pieces of any size.
#[derive(Debug)]
pub(super) struct FrameReader {
    header: [u8; HEADER_BYTES],
    /// Number of header bytes that have arrived.
    seen: usize,
    /// Number of bytes of the preface or payload that are still to come.
    skip: usize,
}

impl FrameReader {
    /// A reader for the client's direction.
    pub(super) fn of_client() -> Self {
        Self { skip: PREFACE_BYTES, ..Self::of_server() }
    }

    /// A reader for the server's direction.
    pub(super) fn of_server() -> Self {
        Self { header: [0; HEADER_BYTES], seen: 0, skip: 0 }
    }

    /// Whether the next byte begins a frame.
    pub(super) fn is_between_frames(&self) -> bool {
        self.seen == 0 && self.skip == 0
    }

    /// Consumes the next bytes, and calls `frame` for each complete header.
    pub(super) fn take(&mut self, mut bytes: &[u8], mut frame: impl FnMut(Frame)) {
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
