//! The format of the files of a [`ChecksumTable`](super::ChecksumTable). Pure.
//!
//! ```text
//! head    "gorego sums 1", zeros 3, nonce 8, zeros 8
//! record  nonce 8, CRC-32C of the rest of the record 4, CRC-32C of the rest of this header 4, generation 8, bytes of the file 8,
//!         start of the hash 16, CRC-32C of each block of the file 4, zeros up to a multiple of 8
//! ```
//!
//! Numbers are little-endian.

use super::super::{
    checksums::{BLOCK_BYTES, Checksums},
    segments::{u32_at, u64_at},
};
use crate::actors::cas::index::FileId;

const MAGIC: &[u8; 16] = b"gorego sums 1\0\0\0";
/// Bytes of a table file before its first record.
pub(super) const HEAD_BYTES: usize = 32;
/// Bytes of a record before its checksums.
pub(super) const RECORD_HEAD_BYTES: usize = 48;
/// Records start at multiples of this.
pub(super) const UNIT_BYTES: u64 = 8;
/// The part of a record's header that its checksum covers starts here.
const CHECKED_FROM: usize = 16;

/// The head of a table file with this nonce.
pub(super) fn head_of(nonce: u64) -> [u8; HEAD_BYTES] {
    let mut head = [0; HEAD_BYTES];
    let fields = MAGIC.iter().copied().chain(nonce.to_le_bytes());
    head.iter_mut().zip(fields).for_each(|(to, from)| *to = from);
    head
}

/// The nonce in the head of a table file; `None` if the head is not valid.
pub(super) fn nonce_of(bytes: &[u8]) -> Option<u64> {
    bytes.starts_with(MAGIC).then(|| u64_at(bytes, MAGIC.len())).flatten()
}

/// A record, without its checksums.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct RecordHead {
    pub generation: u64,
    pub size: u64,
    /// The start of the hash. A shorter hash is padded with zeros.
    pub hash: [u8; 16],
    pub body_checksum: u32,
}

impl RecordHead {
    /// The header for the checksums of a file of `size` bytes. The checksum of its body is not set.
    pub(super) fn of(file: &FileId, size: u64) -> Self {
        let mut hash = [0; 16];
        let of_file = file.key.digest.hash();
        hash.iter_mut().zip(of_file).for_each(|(to, from)| *to = *from);
        Self { generation: file.generation, size, hash, body_checksum: 0 }
    }

    pub(super) fn body_bytes(&self) -> u64 {
        self.size.div_ceil(BLOCK_BYTES as u64).saturating_mul(4)
    }

    pub(super) fn record_bytes(&self) -> u64 {
        (RECORD_HEAD_BYTES as u64).saturating_add(self.body_bytes().next_multiple_of(UNIT_BYTES))
    }

    /// Encodes the record with this body.
    pub(super) fn encode(&self, nonce: u64, body: &[u8]) -> Vec<u8> {
        let mut bytes = Vec::with_capacity(self.record_bytes() as usize);
        bytes.extend_from_slice(&nonce.to_le_bytes());
        bytes.extend_from_slice(&crc32c::crc32c(body).to_le_bytes());
        bytes.extend_from_slice(&[0; 4]);
        bytes.extend_from_slice(&self.generation.to_le_bytes());
        bytes.extend_from_slice(&self.size.to_le_bytes());
        bytes.extend_from_slice(&self.hash);
        let checksum = head_checksum(&bytes);
        if let Some(place) = bytes.get_mut(12..CHECKED_FROM) {
            place.copy_from_slice(&checksum.to_le_bytes());
        }
        bytes.extend_from_slice(body);
        bytes.resize(bytes.len().next_multiple_of(UNIT_BYTES as usize), 0);
        bytes
    }

    /// Reads the header at the start of `bytes`; `None` if there is no valid header.
    pub(super) fn decode(nonce: u64, bytes: &[u8]) -> Option<Self> {
        let bytes = bytes.get(..RECORD_HEAD_BYTES)?;
        if u64_at(bytes, 0)? != nonce || u32_at(bytes, 12)? != head_checksum(bytes) {
            return None;
        }
        Some(Self {
            generation: u64_at(bytes, 16)?,
            size: u64_at(bytes, 24)?,
            hash: bytes.get(32..48)?.try_into().ok()?,
            body_checksum: u32_at(bytes, 8)?,
        })
    }

    /// The checksums in the body of this record; `None` if the body is damaged.
    pub(super) fn checksums(&self, body: &[u8]) -> Option<Checksums> {
        if crc32c::crc32c(body) != self.body_checksum {
            return None;
        }
        Checksums::new(self.size, body.chunks_exact(4).filter_map(|sum| u32_at(sum, 0)).collect())
    }
}

/// Iterates over the headers of the records in the bytes of a table file, each with its offset. Damaged records are
/// skipped.
pub(super) struct Records<'a> {
    nonce: u64,
    bytes: &'a [u8],
    at: usize,
}

impl<'a> Records<'a> {
    pub(super) fn new(nonce: u64, bytes: &'a [u8]) -> Self {
        Self { nonce, bytes, at: HEAD_BYTES }
    }
}

impl Iterator for Records<'_> {
    type Item = (u64, RecordHead);

    fn next(&mut self) -> Option<Self::Item> {
        loop {
            let rest = self.bytes.get(self.at..).filter(|rest| rest.len() >= RECORD_HEAD_BYTES)?;
            let at = self.at as u64;
            match RecordHead::decode(self.nonce, rest) {
                Some(head) => {
                    self.at = self.at.saturating_add(usize::try_from(head.record_bytes()).ok()?);
                    return Some((at, head));
                }
                None => self.at += UNIT_BYTES as usize,
            }
        }
    }
}

/// The checksum of a record's header. It also covers the checksum of the body.
fn head_checksum(head: &[u8]) -> u32 {
    let of_body = crc32c::crc32c(head.get(8..12).unwrap_or_default());
    crc32c::crc32c_append(of_body, head.get(CHECKED_FROM..RECORD_HEAD_BYTES).unwrap_or_default())
}

/// The body of a record with these checksums.
pub(super) fn body_of(sums: &Checksums) -> Vec<u8> {
    sums.blocks().iter().flat_map(|sum| sum.to_le_bytes()).collect()
}

/// The body of the record at an offset; `None` if it is damaged.
pub(super) fn body_at<'a>(bytes: &'a [u8], at: u64, head: &RecordHead) -> Option<&'a [u8]> {
    let start = usize::try_from(at).ok()?.checked_add(RECORD_HEAD_BYTES)?;
    let body = bytes.get(start..)?.get(..usize::try_from(head.body_bytes()).ok()?)?;
    (crc32c::crc32c(body) == head.body_checksum).then_some(body)
}
