//! [`Decoder`]: the zstd stream of an upload, which may be anything.
//!
//! Invariants: no more bytes come out than the limit, and the first one too many is an error, so a bomb stops there. Memory
//! is a window of at most 8 MiB and one piece, whatever the frames ask for. Every call ends: it does work in proportion to
//! its input and to what that yields, and input that yields nothing is bounded ([`BARREN_MAX_BYTES`]).
//!
//! Only frames of today's format and skippable ones are taken; the library would also read those of versions before 1.0,
//! whose decoders nobody looks after.

use super::PIECE_BYTES;
use crate::error::{Error, Result};
use zstd::stream::raw::{DParameter, Decoder as Context, Operation as _};

/// Logarithm of the largest window: 8 MiB, which every decoder has to grant and which is all that clients' levels use.
pub const WINDOW_MAX_LOG: u32 = 23;

/// Input in a row that yields nothing. A block yields something after 128 KiB and a few bytes; only skippable and empty
/// frames go on without, and nobody needs so many.
const BARREN_MAX_BYTES: usize = 1024 * 1024;

/// The first bytes of a frame.
const FRAME_MAGIC: [u8; 4] = 0xFD2F_B528u32.to_le_bytes();
/// The first bytes of a skippable frame; the low half of the first one is free.
const SKIPPABLE_MAGIC: [u8; 4] = 0x184D_2A50u32.to_le_bytes();

/// Whether a frame that we take begins with these bytes.
pub fn is_frame_magic(magic: [u8; 4]) -> bool {
    let [first, rest @ ..] = magic;
    let [skippable, after @ ..] = SKIPPABLE_MAGIC;
    magic == FRAME_MAGIC || (first & 0xF0 == skippable && rest == after)
}

/// Decodes one stream of frames, in whatever pieces it comes; see the top of this file.
pub struct Decoder {
    context: Context<'static>,
    piece: Vec<u8>,
    limit: u64,
    produced: u64,
    barren: usize,
    /// Between two frames, or before the first.
    at_boundary: bool,
    /// How much of the current frame's magic number was seen, and what it was.
    magic_seen: usize,
    magic: [u8; 4],
}

impl Decoder {
    /// A decoder for a stream that stands for at most `limit` bytes.
    ///
    /// # Errors
    /// `Internal` when there is no memory for it.
    pub fn new(limit: u64) -> Result<Self> {
        let mut context = Context::new().map_err(Error::internal)?;
        context.set_parameter(DParameter::WindowLogMax(WINDOW_MAX_LOG)).map_err(Error::internal)?;
        Ok(Self {
            context,
            piece: Vec::new(),
            limit,
            produced: 0,
            barren: 0,
            at_boundary: true,
            magic_seen: 0,
            magic: [0; 4],
        })
    }

    /// Bytes that came out so far.
    pub fn produced(&self) -> u64 {
        self.produced
    }

    /// Decodes the next bytes of the stream completely and hands over what comes out, in pieces that are never empty.
    ///
    /// # Errors
    /// `Invalid` when the bytes are no zstd stream, want a larger window or yield more than the limit; those of `take`. The
    /// decoder is of no more use then.
    pub fn decode(&mut self, mut input: &[u8], mut take: impl FnMut(&[u8]) -> Result<()>) -> Result<()> {
        while let Some(piece) = self.next(&mut input)? {
            take(piece)?;
        }
        Ok(())
    }

    /// The next piece that comes out, which is not empty, and takes what it is made of from the front of `input`. `None`
    /// when all of that has been taken in and given out.
    ///
    /// # Errors
    /// As [`Decoder::decode`].
    pub fn next(&mut self, input: &mut &[u8]) -> Result<Option<&[u8]>> {
        let written = loop {
            if input.is_empty() && self.at_boundary {
                return Ok(None);
            }
            self.check_magic(input)?;
            // Room for one byte more than may come: that it comes is how too much is noticed.
            let left = self.limit - self.produced;
            let room =
                usize::try_from(left).map_or(PIECE_BYTES, |left| left.saturating_add(1).min(PIECE_BYTES));
            if self.piece.len() < room {
                self.piece.resize(room, 0);
            }
            let output = self.piece.get_mut(..room).unwrap_or_default();
            let status = self.context.run_on_buffers(input, output).map_err(|error| self.garbage(&error))?;
            if status.bytes_read == 0 && status.bytes_written == 0 {
                return if input.is_empty() { Ok(None) } else { Err(self.garbage(&"it does not go on")) };
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
            self.magic_seen = (self.magic_seen + status.bytes_read).min(4);
            self.at_boundary = status.remaining == 0;
            if self.at_boundary {
                self.magic_seen = 0;
            }
            if written > 0 {
                break status.bytes_written;
            }
        };
        Ok(self.piece.get(..written))
    }

    /// Makes sure that the stream did not end in the middle of a frame.
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

    /// Looks at the bytes that say what kind of frame begins here, of which there may be only some yet.
    fn check_magic(&mut self, input: &[u8]) -> Result<()> {
        let mut seen = self.magic_seen;
        for &byte in input.iter().take(4 - seen) {
            if let Some(place) = self.magic.get_mut(seen) {
                *place = byte;
            }
            seen += 1;
        }
        let mut first = self.magic;
        first[0] &= 0xF0;
        let begins = |magic: &[u8; 4], with: &[u8; 4]| magic.iter().zip(with).take(seen).all(|(a, b)| a == b);
        if begins(&self.magic, &FRAME_MAGIC) || begins(&first, &SKIPPABLE_MAGIC) {
            return Ok(());
        }
        Err(self.garbage(&"no frame begins here"))
    }

    fn count_barren(&mut self, read: usize, written: usize) -> Result<()> {
        self.barren = if written > 0 { 0 } else { self.barren.saturating_add(read) };
        if self.barren <= BARREN_MAX_BYTES {
            return Ok(());
        }
        Err(self.garbage(&format!("more than {BARREN_MAX_BYTES} bytes in a row stand for nothing")))
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

/// Decodes a whole stream that is at hand into at most `limit` bytes.
///
/// # Errors
/// `Invalid` as [`Decoder::decode`] and [`Decoder::finish`] say.
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

    fn pack(plain: &[u8], level: i32) -> Vec<u8> {
        zstd::encode_all(plain, level).unwrap()
    }

    fn skippable(length: u32) -> Vec<u8> {
        let mut frame = 0x184D_2A53u32.to_le_bytes().to_vec();
        frame.extend(length.to_le_bytes());
        frame.resize(8 + length as usize, 7);
        frame
    }

    /// Decodes in the given pieces; what came out so far stays when it fails.
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
        /// BS-26, BS-27: frames of any kind and number, cut anywhere, stand for the same bytes.
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

        /// BS-26: what is cut off, damaged or too long is refused, and never more comes out than may.
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

        /// Bytes that nobody meant to be zstd.
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

    /// BS-26: a gigabyte in a few kilobytes.
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

    #[test]
    fn endless_frames_that_stand_for_nothing_end() {
        let empty = pack(b"", 1);
        let mut decoder = Decoder::new(10).unwrap();
        let mut sent = 0;
        while decoder.decode(&empty, |_| Ok(())).is_ok() {
            sent += empty.len();
            assert!(sent < 2 * BARREN_MAX_BYTES);
        }
        let (_, outcome) = decode_in(&skippable(3 * BARREN_MAX_BYTES as u32), 10, &[1 << 20]);
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
