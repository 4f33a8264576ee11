//! [`Decoder`]: decodes the zstd stream of an upload. The stream is untrusted.
//!
//! Invariants: the output never exceeds the limit; the first byte beyond it is an error, so a decompression bomb stops
//! there. Memory is a window of at most 8 MiB and one piece, whatever the frames request. A decoder with its own budget
//! ([`Decoder::within`]) never exceeds that, and checks the header of each frame before the library reads it. Every
//! call ends: its work is proportional to its input and output, and input without output is bounded
//! ([`MAX_BYTES_WITHOUT_OUTPUT`]).
//!
//! Only frames of the current format and skippable frames are accepted. The library could also read formats older than
//! 1.0, but their decoders are not maintained.

use super::{
    PIECE_BYTES,
    frame_head::{FRAME_MAGIC, HEAD_MAX_BYTES, SKIPPABLE_MAGIC, WINDOW_MAX_BYTES, WINDOW_MAX_LOG, window},
};
use crate::error::{Error, Result};
use zstd::stream::raw::{DParameter, Decoder as Context, Operation as _};

/// Memory of a decoder besides its window: tables, one piece, and two blocks of input and output, rounded up.
pub const DECODER_BYTES: u64 = 1024 * 1024;

/// Most consecutive input bytes without output. A block yields output after 128 KiB and a few bytes; only skippable and
/// empty frames yield none, and no client needs that many.
const MAX_BYTES_WITHOUT_OUTPUT: usize = 1024 * 1024;

/// A reservation of memory for the window of one decoder, counted elsewhere. Dropping it returns the memory.
pub trait Room: Send + Sync {
    /// Number of reserved bytes.
    fn amount(&self) -> u64;

    /// Reserves this many bytes more.
    ///
    /// # Errors
    /// `Exhausted` when no more memory is available.
    fn grow(&mut self, more: u64) -> Result<()>;
}

/// Decodes one stream of frames that arrives in pieces of any size; see the top of this file.
pub struct Decoder {
    context: Context<'static>,
    piece: Vec<u8>,
    limit: u64,
    produced: u64,
    without_output: usize,
    /// True between two frames and before the first.
    at_boundary: bool,
    /// The bytes of the current frame's header that were seen so far, and their number.
    head_seen: usize,
    head: [u8; HEAD_MAX_BYTES],
    /// Memory reserved for this decoder; `None` if its memory is not counted.
    room: Option<Box<dyn Room>>,
}

impl Decoder {
    /// Creates a decoder for a stream of at most `limit` decoded bytes.
    ///
    /// # Errors
    /// `Internal` when the library cannot allocate memory.
    pub fn new(limit: u64) -> Result<Self> {
        let mut context = Context::new().map_err(Error::internal)?;
        context.set_parameter(DParameter::WindowLogMax(WINDOW_MAX_LOG)).map_err(Error::internal)?;
        Ok(Self {
            context,
            piece: Vec::new(),
            limit,
            produced: 0,
            without_output: 0,
            at_boundary: true,
            head_seen: 0,
            head: [0; HEAD_MAX_BYTES],
            room: None,
        })
    }

    /// Memory that a decoder needs for a stream that starts with these bytes and decodes to at most `limit` bytes; the
    /// maximum if the bytes do not show it. The window is filled by output, so at most `limit` bytes of it are used.
    pub fn memory(head: &[u8], limit: u64) -> u64 {
        DECODER_BYTES + window(head).unwrap_or(WINDOW_MAX_BYTES).min(WINDOW_MAX_BYTES).min(limit)
    }

    /// Bounds the memory of this decoder by a reservation.
    #[must_use]
    pub fn within(mut self, room: impl Room + 'static) -> Self {
        self.hold(room);
        self
    }

    /// Replaces the reservation. A frame with a larger window makes it grow.
    pub fn hold(&mut self, room: impl Room + 'static) {
        self.room = Some(Box::new(room));
    }

    /// Number of bytes decoded so far.
    pub fn produced(&self) -> u64 {
        self.produced
    }

    /// Decodes the next bytes of the stream completely and passes the output to `take` in non-empty pieces.
    ///
    /// # Errors
    /// `Invalid` when the bytes are not a zstd stream, need too large a window or yield more than the limit;
    /// `Exhausted` when there is no memory for a later frame's larger window; the errors of `take`. The decoder cannot
    /// be used after an error.
    pub fn decode(&mut self, mut input: &[u8], mut take: impl FnMut(&[u8]) -> Result<()>) -> Result<()> {
        while let Some(piece) = self.next(&mut input)? {
            take(piece)?;
        }
        Ok(())
    }

    /// Decodes the next non-empty piece and removes its input from the front of `input`. `None` when all input is
    /// consumed and all output was returned.
    ///
    /// # Errors
    /// As [`Decoder::decode`].
    pub fn next(&mut self, input: &mut &[u8]) -> Result<Option<&[u8]>> {
        let written = loop {
            if input.is_empty() && self.at_boundary {
                return Ok(None);
            }
            self.check_head(input)?;
            // One byte more than the limit, so that excess output is noticed.
            let left = self.limit - self.produced;
            let room =
                usize::try_from(left).map_or(PIECE_BYTES, |left| left.saturating_add(1).min(PIECE_BYTES));
            if self.piece.len() < room {
                self.piece.resize(room, 0);
            }
            let output = self.piece.get_mut(..room).unwrap_or_default();
            let status = self.context.run_on_buffers(input, output).map_err(|error| self.garbage(&error))?;
            if status.bytes_read == 0 && status.bytes_written == 0 {
                return if input.is_empty() {
                    Ok(None)
                } else {
                    Err(self.garbage(&"it stops making progress"))
                };
            }
            *input = input.get(status.bytes_read..).unwrap_or_default();
            let written = status.bytes_written as u64;
            if written > left {
                let limit = self.limit;
                return Err(Error::Invalid(format!(
                    "the zstd stream yields more than the {limit} bytes expected"
                )));
            }
            self.produced += written;
            self.count_barren(status.bytes_read, status.bytes_written)?;
            self.head_seen = self.head_seen.saturating_add(status.bytes_read).min(HEAD_MAX_BYTES);
            self.at_boundary = status.remaining == 0;
            if self.at_boundary {
                self.head_seen = 0;
            }
            if written > 0 {
                break status.bytes_written;
            }
        };
        Ok(self.piece.get(..written))
    }

    /// Checks that the stream did not end in the middle of a frame.
    ///
    /// # Errors
    /// `Invalid` when it did.
    pub fn finish(&self) -> Result<()> {
        if self.at_boundary {
            return Ok(());
        }
        Err(Error::Invalid(format!(
            "the zstd stream ends inside of a frame, after {} decoded bytes",
            self.produced
        )))
    }

    /// Collects the bytes of a frame's header, which may arrive in parts, and checks the frame's type and window.
    fn check_head(&mut self, input: &[u8]) -> Result<()> {
        let mut seen = self.head_seen;
        for (place, &byte) in self.head.iter_mut().skip(seen).zip(input) {
            *place = byte;
            seen += 1;
        }
        let head = self.head.get(..seen).unwrap_or_default();
        let begins = |with: [u8; 4], mask: u8| {
            let masks = [mask, 0xFF, 0xFF, 0xFF];
            head.iter().zip(with).zip(masks).all(|((byte, with), mask)| byte & mask == with)
        };
        if !begins(FRAME_MAGIC, 0xFF) && !begins(SKIPPABLE_MAGIC, 0xF0) {
            return Err(self.garbage(&"no frame starts here"));
        }
        if let (Some(room), Some(_)) = (&mut self.room, window(head)) {
            let needed = Self::memory(head, self.limit);
            if needed > room.amount() {
                room.grow(needed - room.amount())?;
            }
        }
        Ok(())
    }

    fn count_barren(&mut self, read: usize, written: usize) -> Result<()> {
        self.without_output = if written > 0 { 0 } else { self.without_output.saturating_add(read) };
        if self.without_output <= MAX_BYTES_WITHOUT_OUTPUT {
            return Ok(());
        }
        Err(self
            .garbage(&format!("more than {MAX_BYTES_WITHOUT_OUTPUT} consecutive bytes decode to nothing")))
    }

    fn garbage(&self, problem: &dyn std::fmt::Display) -> Error {
        Error::Invalid(format!(
            "the zstd stream is not valid after {} decoded bytes: {problem}",
            self.produced
        ))
    }
}

impl std::fmt::Debug for Decoder {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Decoder")
            .field("limit", &self.limit)
            .field("produced", &self.produced)
            .finish_non_exhaustive()
    }
}

/// Decodes a complete stream in memory to at most `limit` bytes.
///
/// # Errors
/// `Invalid` as described at [`Decoder::decode`] and [`Decoder::finish`].
pub fn decode_all(stream: &[u8], limit: u64) -> Result<Vec<u8>> {
    let mut decoder = Decoder::new(limit)?;
    let mut bytes = Vec::new();
    decoder.decode(stream, |piece| {
        bytes.extend_from_slice(piece);
        Ok(())
    })?;
    decoder.finish()?;
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::compression::{Encoder, stored_frame};
    use proptest::prelude::*;
    use std::sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    };

    /// Memory up to a limit; the counter shows how much is reserved.
    struct Counted(Arc<AtomicU64>);

    const ROOM_BYTES: u64 = DECODER_BYTES + (1 << 22);

    impl Room for Counted {
        fn amount(&self) -> u64 {
            self.0.load(Ordering::Relaxed)
        }

        fn grow(&mut self, more: u64) -> Result<()> {
            if self.amount() + more > ROOM_BYTES {
                return Err(Error::Exhausted { message: "no room".into(), retry_after: None });
            }
            self.0.fetch_add(more, Ordering::Relaxed);
            Ok(())
        }
    }

    impl Drop for Counted {
        fn drop(&mut self) {
            self.0.store(0, Ordering::Relaxed);
        }
    }

    fn pack(plain: &[u8], level: i32) -> Vec<u8> {
        zstd::encode_all(plain, level).unwrap()
    }

    fn skippable(length: u32) -> Vec<u8> {
        let mut frame = 0x184D_2A53u32.to_le_bytes().to_vec();
        frame.extend(length.to_le_bytes());
        frame.resize(8 + length as usize, 7);
        frame
    }

    /// Decodes the stream in pieces of the given sizes. The output before an error is kept.
    fn decode_in(stream: &[u8], limit: u64, cuts: &[usize]) -> (Vec<u8>, Result<()>) {
        let mut bytes = vec![];
        let mut decoder = Decoder::new(limit).unwrap();
        let mut rest = stream;
        let mut cuts = cuts.iter().cycle();
        while !rest.is_empty() {
            let (piece, after) = rest.split_at((*cuts.next().unwrap()).clamp(1, rest.len()));
            rest = after;
            let outcome = decoder.decode(piece, |piece| {
                assert!(!piece.is_empty() && piece.len() <= PIECE_BYTES);
                bytes.extend_from_slice(piece);
                Ok(())
            });
            assert!(decoder.produced() <= limit);
            if outcome.is_err() {
                return (bytes, outcome);
            }
        }
        let ended = decoder.finish();
        (bytes, ended)
    }

    fn plain() -> impl Strategy<Value = Vec<u8>> {
        let run = (any::<u8>(), 1usize..5_000).prop_map(|(byte, length)| vec![byte; length]);
        let noise = proptest::collection::vec(any::<u8>(), 0..3_000);
        proptest::collection::vec(prop_oneof![run, noise], 0..12).prop_map(|parts| parts.concat())
    }

    fn cuts() -> impl Strategy<Value = Vec<usize>> {
        proptest::collection::vec(prop_oneof![3 => 1usize..10, 1 => 1usize..100_000], 1..20)
    }

    proptest! {
        /// BS-26, BS-27: any number and kind of frames, cut anywhere, decode to the same bytes.
        #[test]
        fn any_pieces_of_any_frames_decode_to_the_same_bytes(parts in proptest::collection::vec(plain(), 0..6), cuts in cuts()) {
            let mut stream = vec![];
            for (n, part) in parts.iter().enumerate() {
                match n % 4 {
                    0 => stream.extend(pack(part, 1)),
                    1 => stored_frame(part, &mut stream),
                    2 => stream.extend(pack(part, 19)),
                    _ => { stream.extend(skippable(n as u32 * 9)); Encoder::new(3).unwrap().frames(part, &mut stream).unwrap(); }
                }
            }
            let whole = parts.concat();
            let (bytes, outcome) = decode_in(&stream, whole.len() as u64, &cuts);
            prop_assert_eq!(outcome, Ok(()));
            prop_assert_eq!(bytes, whole);
        }

        /// BS-26: truncated, damaged and oversized streams are refused, and the output never exceeds the limit.
        #[test]
        fn damage_is_refused_and_no_byte_too_many_comes_out(
            plain in plain(), cuts in cuts(), at in any::<prop::sample::Index>(), flip in 1u8.., limit in any::<prop::sample::Index>(),
        ) {
            let stream = pack(&plain, 3);
            let size = plain.len() as u64;
            let (_, cut) = decode_in(&stream[..at.index(stream.len())], size, &cuts);
            prop_assert!(cut.is_err() || at.index(stream.len()) == 0);
            let low = limit.index(plain.len() + 1) as u64;
            let (bytes, outcome) = decode_in(&stream, low, &cuts);
            prop_assert!(bytes.len() as u64 <= low);
            prop_assert_eq!(outcome.is_ok(), low == size);
            prop_assert_eq!(&bytes[..], &plain[..bytes.len()]);
            let mut damaged = stream.clone();
            damaged[at.index(stream.len())] ^= flip;
            let (bytes, _) = decode_in(&damaged, size, &cuts);
            prop_assert!(bytes.len() as u64 <= size);
        }

        /// Random bytes are not accepted as zstd.
        #[test]
        fn garbage_is_refused(garbage in proptest::collection::vec(any::<u8>(), 1..300), cuts in cuts()) {
            prop_assume!(garbage[..4.min(garbage.len())] != FRAME_MAGIC[..4.min(garbage.len())]);
            prop_assume!(garbage[0] & 0xF0 != 0x50);
            let (bytes, outcome) = decode_in(&garbage, 1_000, &cuts);
            prop_assert!(outcome.is_err() && bytes.is_empty());
            let mut trailing = pack(b"good", 3);
            trailing.extend(&garbage);
            prop_assert!(decode_in(&trailing, 1_000, &cuts).1.is_err());
        }
    }

    /// BS-26: a gigabyte compressed to a few kilobytes.
    #[test]
    fn a_bomb_stops_at_the_size_of_its_blob() {
        let bomb = pack(&vec![0; 64 << 20], 19);
        assert!(bomb.len() < 10_000);
        let (bytes, outcome) = decode_in(&bomb, 1_000, &[bomb.len()]);
        assert!(
            matches!(&outcome, Err(Error::Invalid(message)) if message.contains("more than the 1000 bytes"))
        );
        assert!(bytes.len() <= 1_000);
    }

    #[test]
    fn windows_of_8_mib_are_granted_and_larger_ones_are_not() {
        let noise: Vec<u8> = (0u32..9 << 20).map(|n| (n.wrapping_mul(2_654_435_761) >> 24) as u8).collect();
        for (log, fits) in [(WINDOW_MAX_LOG, true), (WINDOW_MAX_LOG + 1, false), (27, false)] {
            let mut encoder = zstd::stream::Encoder::new(Vec::new(), 1).unwrap();
            encoder.window_log(log).unwrap();
            std::io::Write::write_all(&mut encoder, &noise).unwrap();
            let outcome = decode_all(&encoder.finish().unwrap(), noise.len() as u64);
            assert_eq!(outcome.is_ok_and(|bytes| bytes == noise), fits, "{log}");
        }
    }

    /// A stream with this window, as written by clients that do not know its length in advance.
    fn with_window(plain: &[u8], log: u32) -> Vec<u8> {
        let mut encoder = zstd::stream::Encoder::new(Vec::new(), 1).unwrap();
        encoder.window_log(log).unwrap();
        std::io::Write::write_all(&mut encoder, plain).unwrap();
        encoder.finish().unwrap()
    }

    #[test]
    fn the_head_of_a_frame_says_how_much_memory_it_takes() {
        let none =
            |head: &[u8]| assert_eq!(Decoder::memory(head, u64::MAX), DECODER_BYTES + WINDOW_MAX_BYTES);
        for log in [17, 21, WINDOW_MAX_LOG] {
            let stream = with_window(&vec![7; 300_000], log);
            assert_eq!(window(&stream), Some(1 << log));
            assert_eq!(Decoder::memory(&stream, u64::MAX), DECODER_BYTES + (1 << log));
            assert_eq!(Decoder::memory(&stream, 1_000), DECODER_BYTES + 1_000);
            none(&stream[..5]);
        }
        none(&skippable(100));
        none(b"");
    }

    #[test]
    fn a_later_frame_with_a_larger_window_takes_more_room_before_it_is_decoded() {
        let plain = vec![7; 100_000];
        let frames = [20, 18, 22, 23].map(|log| with_window(&plain, log));
        let held = Arc::new(AtomicU64::new(Decoder::memory(&frames[0], u64::MAX)));
        let mut decoder = Decoder::new(u64::MAX).unwrap().within(Counted(held.clone()));
        for (frame, log) in frames.iter().zip([20, 20, 22]) {
            for piece in frame.chunks(3) {
                decoder.decode(piece, |_| Ok(())).unwrap();
            }
            assert_eq!(held.load(Ordering::Relaxed), DECODER_BYTES + (1 << log));
        }
        let refused = decoder.decode(&frames[3], |_| Ok(())).unwrap_err();
        assert!(matches!(refused, Error::Exhausted { .. }), "{refused}");
        drop(decoder);
        assert_eq!(held.load(Ordering::Relaxed), 0);
    }

    #[test]
    fn endless_frames_without_content_are_refused() {
        let empty = pack(b"", 1);
        let mut decoder = Decoder::new(10).unwrap();
        let mut sent = 0;
        while decoder.decode(&empty, |_| Ok(())).is_ok() {
            sent += empty.len();
            assert!(sent < 2 * MAX_BYTES_WITHOUT_OUTPUT);
        }
        let (_, outcome) = decode_in(&skippable(3 * MAX_BYTES_WITHOUT_OUTPUT as u32), 10, &[1 << 20]);
        assert!(outcome.is_err());
    }

    #[test]
    fn frames_of_versions_before_1_0_are_refused() {
        for version in 0x22u32..=0x27 {
            let mut frame = (0xFD2F_B500 | version).to_le_bytes().to_vec();
            frame.extend([0; 20]);
            assert!(decode_all(&frame, 100).is_err());
        }
    }
}
