//! The two ends of a segment file: its [`Head`], and the table of its records, which is added when the segment is full.
//! Pure.
//!
//! ```text
//! head     "gorego segment 1", number 8, nonce 8, bytes of the head 4, CRC-32C 4, the names of the instances, zeros
//! records
//! table    a copy of the head, and for each record: slot 4, kind 1, function 1, instance 2, last use 4, bytes of content 4,
//!          the size in the digest 8 (not for blobs), hash
//! trailer  nonce 8, offset of the table 8, last sequence 8, bytes of the table 4, zeros 4, CRC-32C of all that 4, "END1"
//! ```
//!
//! With a valid table, a start reads nothing else of the segment. So either end may be damaged without a loss: the
//! table has a copy of the head, and without a table the records are scanned.

use super::record::{function_number, function_of, kind_number, kind_of, u32_at, u64_at};
use crate::actors::cas::index::EntryKind;
use gorego_reapi::digest::Digest;

const MAGIC: &[u8; 16] = b"gorego segment 1";
const END: &[u8; 4] = b"END1";
/// Bytes of a head before the names.
const HEAD_FIXED_BYTES: usize = 40;
pub(super) const TRAILER_BYTES: usize = 40;
/// The largest head that is read. Thousands of instances with long names fit.
pub(super) const MAX_HEAD_BYTES: usize = 16 << 20;

/// The start of a segment file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Head {
    pub number: u64,
    /// A random number that is a part of every record.
    pub nonce: u64,
    /// The directory names of the instances. Records name an instance by its position.
    pub names: Vec<String>,
}

impl Head {
    pub(super) fn encode(&self) -> Vec<u8> {
        let mut bytes = MAGIC.to_vec();
        bytes.extend_from_slice(&self.number.to_le_bytes());
        bytes.extend_from_slice(&self.nonce.to_le_bytes());
        bytes.extend_from_slice(&[0; 8]);
        for name in &self.names {
            bytes.extend_from_slice(&(name.len() as u16).to_le_bytes());
            bytes.extend_from_slice(name.as_bytes());
        }
        // A name is never empty, so zeros end the list.
        bytes.extend_from_slice(&[0; 2]);
        bytes.resize(bytes.len().next_multiple_of(super::record::SLOT_BYTES as usize), 0);
        let length = bytes.len() as u32;
        put(&mut bytes, 32, &length.to_le_bytes());
        let checksum = crc32c::crc32c(&bytes);
        put(&mut bytes, 36, &checksum.to_le_bytes());
        bytes
    }

    /// The bytes of the head that starts with these; `None` if no head does.
    pub(super) fn length(start: &[u8]) -> Option<usize> {
        let length = u32_at(start, 32)? as usize;
        let fits = start.starts_with(MAGIC) && (HEAD_FIXED_BYTES..=MAX_HEAD_BYTES).contains(&length);
        fits.then_some(length)
    }

    /// Reads the head at the start of `bytes`.
    pub(super) fn decode(bytes: &[u8]) -> Option<Self> {
        let mut head = bytes.get(..Self::length(bytes)?)?.to_vec();
        let checksum = u32_at(&head, 36)?;
        put(&mut head, 36, &[0; 4]);
        if crc32c::crc32c(&head) != checksum {
            return None;
        }
        let (number, nonce) = (u64_at(&head, 16)?, u64_at(&head, 24)?);
        let (mut names, mut rest) = (Vec::new(), head.get(HEAD_FIXED_BYTES..)?);
        while let Some((length, after)) = rest.split_first_chunk() {
            let length = usize::from(u16::from_le_bytes(*length));
            if length == 0 {
                break;
            }
            let (name, after) = after.split_at_checked(length)?;
            names.push(String::from_utf8(name.to_vec()).ok()?);
            rest = after;
        }
        Some(Self { number, nonce, names })
    }
}

/// The entry of one record in the table.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Row {
    pub slot: u32,
    pub kind: EntryKind,
    /// The position of the instance in the list of the segment.
    pub instance: u16,
    pub touched: u32,
    /// Length of the content in bytes.
    pub length: u32,
    pub digest: Digest,
}

impl Row {
    pub(super) fn encode(&self, to: &mut Vec<u8>) {
        to.extend_from_slice(&self.slot.to_le_bytes());
        to.extend_from_slice(&[kind_number(self.kind), function_number(self.digest.function())]);
        to.extend_from_slice(&self.instance.to_le_bytes());
        to.extend_from_slice(&self.touched.to_le_bytes());
        to.extend_from_slice(&self.length.to_le_bytes());
        if self.kind != EntryKind::Blob {
            to.extend_from_slice(&self.digest.size().to_le_bytes());
        }
        to.extend_from_slice(self.digest.hash());
    }

    /// The bytes after the row at the start of `bytes`; `None` if there is no valid row.
    fn skip(bytes: &[u8]) -> Option<&[u8]> {
        let function = function_of(*bytes.get(5)?)?;
        let hash_at = match kind_of(*bytes.get(4)?)? {
            EntryKind::Blob => 16,
            EntryKind::Result | EntryKind::Zstd => {
                i64::try_from(u64_at(bytes, 16)?).ok()?;
                24
            }
        };
        bytes.get(hash_at + function.hash_bytes()..)
    }

    /// Reads the row at the start of `bytes`. Also returns the bytes after it.
    fn decode(bytes: &[u8]) -> Option<(Self, &[u8])> {
        let kind = kind_of(*bytes.get(4)?)?;
        let function = function_of(*bytes.get(5)?)?;
        let length = u32_at(bytes, 12)?;
        let (size, hash_at) = match kind {
            EntryKind::Blob => (u64::from(length), 16),
            EntryKind::Result | EntryKind::Zstd => (u64_at(bytes, 16)?, 24),
        };
        let (row, rest) = bytes.split_at_checked(hash_at + function.hash_bytes())?;
        let row = Self {
            slot: u32_at(row, 0)?,
            kind,
            instance: u16::from_le_bytes(row.get(6..8)?.try_into().ok()?),
            touched: u32_at(row, 8)?,
            length,
            digest: Digest::from_hash(function, row.get(hash_at..)?, size)?,
        };
        Some((row, rest))
    }
}

/// The rows of a table, up to the first invalid one.
pub(super) fn rows(mut table: &[u8]) -> impl Iterator<Item = Row> {
    std::iter::from_fn(move || {
        let (row, rest) = Row::decode(table)?;
        table = rest;
        Some(row)
    })
}

/// Whether every row of a table is valid.
pub(super) fn are_rows(mut table: &[u8]) -> bool {
    while let Some(rest) = Row::skip(table) {
        table = rest;
    }
    table.is_empty()
}

/// The end of a segment file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Trailer {
    nonce: u64,
    /// The offset of the table in the file.
    pub table_at: u64,
    /// The largest sequence of its records.
    pub last_sequence: u64,
    table_bytes: u32,
    checksum: u32,
}

impl Trailer {
    /// Completes the end of a segment: `table` is the copy of the head and the rows.
    pub(super) fn append_to(table: &mut Vec<u8>, nonce: u64, table_at: u64, last_sequence: u64) {
        let table_bytes = table.len() as u32;
        table.extend_from_slice(&nonce.to_le_bytes());
        table.extend_from_slice(&table_at.to_le_bytes());
        table.extend_from_slice(&last_sequence.to_le_bytes());
        table.extend_from_slice(&table_bytes.to_le_bytes());
        table.extend_from_slice(&[0; 4]);
        let checksum = crc32c::crc32c(table);
        table.extend_from_slice(&checksum.to_le_bytes());
        table.extend_from_slice(END);
    }

    /// Reads the trailer in the last bytes of a file of `size` bytes.
    pub(super) fn decode(bytes: &[u8], size: u64) -> Option<Self> {
        let trailer = Self {
            nonce: u64_at(bytes, 0)?,
            table_at: u64_at(bytes, 8)?,
            last_sequence: u64_at(bytes, 16)?,
            table_bytes: u32_at(bytes, 24)?,
            checksum: u32_at(bytes, 32)?,
        };
        let end = trailer.table_at.checked_add(u64::from(trailer.table_bytes))?;
        (bytes.get(36..40)? == END && end.checked_add(TRAILER_BYTES as u64)? == size).then_some(trailer)
    }

    /// Checks the bytes from the offset of the table to the end of the file. Returns the head and the rows.
    pub(super) fn open<'a>(&self, end: &'a [u8]) -> Option<(Head, &'a [u8])> {
        let table = end.get(..self.table_bytes as usize)?;
        let checked = end.get(..self.table_bytes as usize + 32)?;
        if crc32c::crc32c(checked) != self.checksum {
            return None;
        }
        let head = Head::decode(table)?;
        let rows = table.get(Head::length(table)?..)?;
        (head.nonce == self.nonce).then_some((head, rows))
    }
}

fn put(bytes: &mut [u8], at: usize, value: &[u8]) {
    if let Some(place) = bytes.get_mut(at..at + value.len()) {
        place.copy_from_slice(value);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use gorego_reapi::digest::DigestFunction;

    fn head() -> Head {
        Head { number: 7, nonce: 0x1234, names: vec!["=".into(), "=a%2fb".into(), "=a+private".into()] }
    }

    #[test]
    fn a_head_with_any_bit_flipped_is_rejected() {
        let bytes = head().encode();
        assert_eq!(Head::decode(&bytes), Some(head()));
        assert_eq!(bytes.len() % 16, 0);
        for bit in 0..bytes.len() * 8 {
            let mut flipped = bytes.clone();
            flipped[bit / 8] ^= 1 << (bit % 8);
            assert_eq!(Head::decode(&flipped), None, "bit {bit}");
        }
    }

    #[test]
    fn a_table_is_read_back_and_any_flipped_bit_shows() {
        let row = |slot, kind, function: DigestFunction| Row {
            slot,
            kind,
            instance: 2,
            touched: 5,
            length: 3,
            digest: Digest::from_hash(function, function.digest(b"abc").hash(), 3).unwrap(),
        };
        let all = [
            row(1, EntryKind::Blob, DigestFunction::Sha256),
            row(2, EntryKind::Result, DigestFunction::Sha512),
            row(3, EntryKind::Zstd, DigestFunction::Md5),
        ];
        let mut end = head().encode();
        all.iter().for_each(|row| row.encode(&mut end));
        Trailer::append_to(&mut end, 0x1234, 1_000, 99);
        let head_bytes = head().encode().len();
        let table = &end[head_bytes..end.len() - TRAILER_BYTES];
        for cut in 0..table.len() {
            let (whole, found) = (are_rows(&table[..cut]), rows(&table[..cut]).count());
            assert_eq!(whole, [(0, 0), (48, 1), (136, 2)].contains(&(cut, found)), "{cut}");
        }
        let size = 1_000 + end.len() as u64;
        let read = |end: &[u8]| {
            let trailer = Trailer::decode(&end[end.len() - TRAILER_BYTES..], size)?;
            let (head, table) = trailer.open(end)?;
            let found: Vec<Row> = rows(table).collect();
            are_rows(table).then_some((head, found, trailer.last_sequence, trailer.table_at))
        };
        assert_eq!(read(&end), Some((head(), all.to_vec(), 99, 1_000)));
        for bit in 0..end.len() * 8 {
            let mut flipped = end.clone();
            flipped[bit / 8] ^= 1 << (bit % 8);
            assert_eq!(read(&flipped), None, "bit {bit}");
        }
    }
}
