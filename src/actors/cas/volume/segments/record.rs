//! One record of a segment: a header and the bytes of a stored file. Pure.
//!
//! ```text
//!  0  nonce of the segment              8
//!  8  CRC-32C of the rest of the header 4   also covers the slot, so a header that was copied elsewhere is not valid there
//! 12  kind                              1
//! 13  digest function                   1
//! 14  instance, in the segment's list   2
//! 16  last use, seconds since 1970      4
//! 20  bytes of content                  4
//! 24  size in the digest                8
//! 32  sequence                          8
//! 40  hash                              of its function's length
//!     CRC-32C of each block             4 for each started 64 KiB of content
//!     content, and zeros up to what the longest hash would take and to a multiple of 16
//! ```
//!
//! Numbers are little-endian. Only this server knows the nonce, so a blob whose bytes look like a record is not
//! mistaken for one when a segment is scanned.

use crate::actors::cas::{
    index::{EntryKind, FileId},
    volume::checksums::BLOCK_BYTES,
};
use bytes::Bytes;
use gorego_reapi::digest::{Digest, DigestFunction};
use std::io;

/// Records start at multiples of this.
pub(super) const SLOT_BYTES: u64 = 16;
/// Bytes of a header before its hash.
pub(super) const FIXED_BYTES: usize = 40;
/// The part of a header that its checksum covers starts here.
const CHECKED_FROM: usize = 12;

/// The location of a record. It serves as the generation of the stored file: the highest bit marks it as a record, and
/// the lowest bits are the slot. The number of a segment is used only once.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(crate) struct Location {
    pub(super) segment: u64,
    /// The offset in the segment, divided by [`SLOT_BYTES`].
    pub(super) slot: u32,
}

impl Location {
    const IS_RECORD: u64 = 1 << 63;
    const SLOT_BITS: u32 = 26;
    /// No record starts at this offset or after it, because its slot would have too many bits.
    pub(super) const END: u64 = SLOT_BYTES << Self::SLOT_BITS;
    /// The greatest number of a segment that is used at start. It is half of what a location can have, so a file with a
    /// strange name leaves numbers for new segments.
    pub(super) const MAX_FOUND: u64 = (Self::IS_RECORD >> Self::SLOT_BITS) / 2;

    /// The location of a record; `None` for a file of its own.
    pub(crate) fn of(file: &FileId) -> Option<Self> {
        let rest = file.generation.checked_sub(Self::IS_RECORD)?;
        Some(Self { segment: rest >> Self::SLOT_BITS, slot: (rest & ((1 << Self::SLOT_BITS) - 1)) as u32 })
    }

    /// The number of the segment.
    pub(in crate::actors::cas::volume) fn segment(self) -> u64 {
        self.segment
    }

    /// The generation of the file at this location.
    pub(super) fn generation(self) -> u64 {
        Self::IS_RECORD | (self.segment << Self::SLOT_BITS) | u64::from(self.slot)
    }

    pub(super) fn offset(self) -> u64 {
        u64::from(self.slot) * SLOT_BYTES
    }
}

/// The fields of a header.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Header {
    pub kind: EntryKind,
    /// The position of the instance in the list of the segment.
    pub instance: u16,
    pub digest: Digest,
    /// Seconds since 1970 of the last use, when the record was written.
    pub touched: u32,
    /// Length of the content in bytes.
    pub length: u32,
    /// Grows with every stored file. A copy of a record has the sequence of the original.
    pub sequence: u64,
}

/// Bytes of a record. They depend on the length of its content only, so that a file can be charged before its digest is
/// known.
pub(super) fn record_bytes(length: u64) -> u64 {
    let header = header_bytes(DigestFunction::Sha512, length) as u64;
    header.saturating_add(length).checked_next_multiple_of(SLOT_BYTES).unwrap_or(u64::MAX)
}

pub(super) fn header_bytes(function: DigestFunction, length: u64) -> usize {
    let blocks = length.div_ceil(BLOCK_BYTES as u64) as usize;
    FIXED_BYTES + function.hash_bytes() + 4 * blocks
}

impl Header {
    /// Appends the header of a record at `slot` with this content.
    pub(super) fn encode(&self, nonce: u64, slot: u32, pieces: &[Bytes], to: &mut Vec<u8>) {
        let start = to.len();
        to.extend_from_slice(&nonce.to_le_bytes());
        to.extend_from_slice(&[0; 4]);
        to.extend_from_slice(&[kind_number(self.kind), function_number(self.digest.function())]);
        to.extend_from_slice(&self.instance.to_le_bytes());
        to.extend_from_slice(&self.touched.to_le_bytes());
        to.extend_from_slice(&self.length.to_le_bytes());
        to.extend_from_slice(&self.digest.size().to_le_bytes());
        to.extend_from_slice(&self.sequence.to_le_bytes());
        to.extend_from_slice(self.digest.hash());
        for_each_block(pieces, |checksum| to.extend_from_slice(&checksum.to_le_bytes()));
        let header = to.get_mut(start..).unwrap_or_default();
        let checksum = header_checksum(slot, header);
        if let Some(place) = header.get_mut(8..CHECKED_FROM) {
            place.copy_from_slice(&checksum.to_le_bytes());
        }
    }

    /// Reads the header at the start of `bytes`; `None` if it is not a valid header for this slot, or not all of it is
    /// there.
    pub(super) fn decode(nonce: u64, slot: u32, bytes: &[u8]) -> Option<Self> {
        if bytes.get(..8)? != nonce.to_le_bytes() {
            return None;
        }
        let function = function_of(*bytes.get(13)?)?;
        let length = u32_at(bytes, 20)?;
        let header = bytes.get(..header_bytes(function, u64::from(length)))?;
        if header_checksum(slot, header) != u32_at(header, 8)? {
            return None;
        }
        let hash = header.get(FIXED_BYTES..FIXED_BYTES + function.hash_bytes())?;
        Some(Self {
            kind: kind_of(*header.get(12)?)?,
            instance: u16::from_le_bytes(header.get(14..16)?.try_into().ok()?),
            digest: Digest::from_hash(function, hash, u64_at(header, 24)?)?,
            touched: u32_at(header, 16)?,
            length,
            sequence: u64_at(header, 32)?,
        })
    }

    /// Bytes of the header.
    pub(super) fn bytes(&self) -> usize {
        header_bytes(self.digest.function(), u64::from(self.length))
    }

    pub(super) fn record_bytes(&self) -> u64 {
        record_bytes(u64::from(self.length))
    }

    /// Whether the content of a record with this valid header matches its checksums. `record` starts with the header.
    pub(super) fn is_whole(&self, record: &[u8]) -> bool {
        let Some((header, rest)) = record.split_at_checked(self.bytes()) else { return false };
        let Some(content) = rest.get(..self.length as usize) else { return false };
        let sums = header.get(FIXED_BYTES + self.digest.function().hash_bytes()..).unwrap_or_default();
        let blocks = content.chunks(BLOCK_BYTES).map(|block| crc32c::crc32c(block).to_le_bytes());
        blocks.eq(sums.chunks(4).map(|sum| <[u8; 4]>::try_from(sum).unwrap_or_default()))
    }
}

/// The error for a record that has changed since it was written. Its file counts as lost.
pub(super) fn damaged(what: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, what.to_owned())
}

fn header_checksum(slot: u32, header: &[u8]) -> u32 {
    crc32c::crc32c_append(crc32c::crc32c(&slot.to_le_bytes()), header.get(CHECKED_FROM..).unwrap_or_default())
}

/// Calls `see` with the checksum of each block of content that is in pieces.
fn for_each_block(pieces: &[Bytes], mut see: impl FnMut(u32)) {
    let (mut sum, mut filled) = (0, 0);
    for piece in pieces {
        let mut rest = &piece[..];
        while !rest.is_empty() {
            let (part, after) = rest.split_at(rest.len().min(BLOCK_BYTES - filled));
            sum = crc32c::crc32c_append(sum, part);
            filled += part.len();
            rest = after;
            if filled == BLOCK_BYTES {
                see(std::mem::take(&mut sum));
                filled = 0;
            }
        }
    }
    if filled > 0 {
        see(sum);
    }
}

pub(super) fn kind_number(kind: EntryKind) -> u8 {
    match kind {
        EntryKind::Blob => 1,
        EntryKind::Result => 2,
        EntryKind::Zstd => 3,
    }
}

pub(super) fn kind_of(number: u8) -> Option<EntryKind> {
    EntryKind::ALL.into_iter().find(|kind| kind_number(*kind) == number)
}

pub(super) fn function_number(function: DigestFunction) -> u8 {
    function.wire() as i32 as u8
}

pub(super) fn function_of(number: u8) -> Option<DigestFunction> {
    DigestFunction::from_wire(i32::from(number)).ok()
}

pub(in crate::actors::cas::volume) fn u32_at(bytes: &[u8], at: usize) -> Option<u32> {
    Some(u32::from_le_bytes(bytes.get(at..at + 4)?.try_into().ok()?))
}

pub(in crate::actors::cas::volume) fn u64_at(bytes: &[u8], at: usize) -> Option<u64> {
    Some(u64::from_le_bytes(bytes.get(at..at + 8)?.try_into().ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{actors::cas::index::Key, instance::InstanceId};

    fn header(content: &[u8]) -> Header {
        let digest = DigestFunction::Sha256.digest(content);
        let length = content.len() as u32;
        Header { kind: EntryKind::Blob, instance: 3, digest, touched: 77, length, sequence: 9 }
    }

    #[test]
    fn a_location_is_a_generation_that_no_file_of_its_own_has() {
        let key = Key {
            digest: DigestFunction::Sha256.digest(b""),
            instance: InstanceId(0),
            kind: EntryKind::Blob,
        };
        for location in [
            Location { segment: 1, slot: 2 },
            Location { segment: (1 << 37) - 1, slot: (1 << 26) - 1 },
            Location { segment: 0, slot: 0 },
        ] {
            let generation = location.generation();
            assert_eq!(Location::of(&FileId { key, generation }), Some(location));
        }
        assert_eq!(Location::of(&FileId { key, generation: 1 << 62 }), None);
    }

    /// Any changed bit of the header or the content is detected, and so is a record in another place.
    #[test]
    fn a_record_with_any_bit_flipped_is_rejected() {
        for length in [0usize, 1, 15, 16, 100] {
            let content = vec![7; length];
            let header = header(&content);
            let mut record = vec![];
            let pieces =
                [Bytes::from(content[..length / 2].to_vec()), Bytes::from(content[length / 2..].to_vec())];
            header.encode(42, 5, &pieces, &mut record);
            record.extend(&content);
            assert!(
                header.record_bytes() >= record.len() as u64
                    && header.record_bytes().is_multiple_of(SLOT_BYTES)
            );
            assert_eq!(Header::decode(42, 5, &record), Some(header));
            assert!(header.is_whole(&record));
            assert_eq!(Header::decode(43, 5, &record), None);
            assert_eq!(Header::decode(42, 6, &record), None);
            for bit in 0..record.len() * 8 {
                let mut flipped = record.clone();
                flipped[bit / 8] ^= 1 << (bit % 8);
                let accepted =
                    Header::decode(42, 5, &flipped).is_some_and(|header| header.is_whole(&flipped));
                assert!(!accepted, "bit {bit}");
            }
            for end in 0..record.len() {
                let cut = &record[..end];
                assert!(
                    !Header::decode(42, 5, cut).is_some_and(|header| header.is_whole(cut)),
                    "cut at {end}"
                );
            }
        }
    }

    #[test]
    fn each_block_has_a_checksum_however_the_content_is_cut() {
        let content: Vec<u8> = (0..3 * BLOCK_BYTES as u32 - 5).map(|at| (at % 251) as u8).collect();
        let header = header(&content);
        let mut whole = vec![];
        header.encode(1, 1, &[Bytes::from(content.clone())], &mut whole);
        let pieces: Vec<Bytes> = content.chunks(50_001).map(Bytes::copy_from_slice).collect();
        let mut cut = vec![];
        header.encode(1, 1, &pieces, &mut cut);
        assert_eq!(whole, cut);
        assert_eq!(whole.len(), header.bytes());
        whole.extend(&content);
        assert!(header.is_whole(&whole));
        *whole.last_mut().unwrap() ^= 1;
        assert!(!header.is_whole(&whole));
    }
}
