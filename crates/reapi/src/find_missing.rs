//! The two messages of FindMissingBlobs. They are decoded to digests and encoded from digests without a `String` for
//! each.
//!
//! A client asks about thousands of blobs in one call. In the generated messages, each digest has a `String` that is
//! allocated, parsed and dropped. Here the usual form of a digest is parsed directly from the message. All other forms
//! go through the generated decoder, so both decode to the same digests. A test compares them.
//!
//! Memory: a decoded request takes at most [`FindMissingBlobsRequest::EXPANSION_MAX`] times its wire size, so it need
//! not be measured by [`crate::wire`] before it is decoded. After the first digest that is malformed under every
//! function, no more digests are stored, because the request will be refused.

use crate::{
    digest::{Digest, DigestFunction},
    error::Result,
    proto::reapi,
};
use bytes::{Buf, BufMut};
use prost::{
    DecodeError, Message, Name,
    encoding::{self, DecodeContext, WireType},
};

const PACKAGE: &str = "build.bazel.remote.execution.v2";
const INSTANCE_NAME: u32 = 1;
const BLOB_DIGESTS: u32 = 2;
const DIGEST_FUNCTION: u32 = 3;
/// The number of the list field in an answer.
const MISSING_BLOB_DIGESTS: u32 = 2;

/// The keys of field 1 as text or message, of field 2 as text or message, and of field 2 as a number. Each is one byte.
const TEXT_1: u8 = 0x0a;
const MESSAGE_2: u8 = 0x12;
const NUMBER_2: u8 = 0x10;
/// Lengths and numbers below this value take one byte.
const ONE_BYTE: u8 = 0x80;
/// The shortest entry with a hash of any function: the key and the length of the hash, and the hash.
const SHORTEST_ENTRY: usize = 2 + 2 * 16;
/// The longest wire form of a digest: keys, lengths, the longest hash and the largest size.
const LONGEST_DIGEST: usize = 3 + 2 * 64 + 11;

/// The request message of FindMissingBlobs.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct FindMissingBlobsRequest {
    /// The instance in which the blobs are looked up.
    pub instance_name: String,
    /// The digests to look for.
    pub blob_digests: UnresolvedDigests,
    /// The number of the function of all digests; 0 if the client named none.
    pub digest_function: i32,
}

impl FindMissingBlobsRequest {
    /// A decoded request takes at most this many times its wire size. The shortest entry of the list has 36 bytes and
    /// becomes a digest of 80 bytes, and a quarter of the list's capacity may be unused.
    pub const EXPANSION_MAX: u64 = 3;
}

/// Digests whose function is not known yet.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct UnresolvedDigests {
    /// The digests before the first malformed one. The function of each is the first one that has hashes of this
    /// length.
    parsed: Vec<Digest>,
    /// The first digest that is not valid under any function.
    malformed: Option<reapi::Digest>,
    /// The distinct lengths of all hashes in characters, in the order of their first occurrence. Only lengths of some
    /// function's hashes are included.
    hash_chars: Vec<usize>,
}

impl UnresolvedDigests {
    /// The distinct lengths of hashes that are valid under some function, in the order of their first occurrence.
    pub fn hash_chars(&self) -> impl Iterator<Item = usize> {
        self.hash_chars.iter().copied()
    }

    /// The digests under `function`. `field` names the list in errors.
    ///
    /// # Errors
    /// The error of the first digest that is malformed, as in [`Digest::from_wire`].
    pub fn resolve(mut self, function: DigestFunction, field: &str) -> Result<Vec<Digest>> {
        for digest in &mut self.parsed {
            if digest.function() != function {
                *digest = digest
                    .with_function(function)
                    .map_or_else(|| Digest::from_wire(function, Some(&digest.to_wire()), field), Ok)?;
            }
        }
        if self.malformed.is_some() {
            // The digest is malformed under this function too, so this returns its error.
            self.parsed.push(Digest::from_wire(function, self.malformed.as_ref(), field)?);
        }
        Ok(self.parsed)
    }

    /// Parses the next digest of a message if it has the usual form. Returns the number of its bytes.
    fn take_usual(&mut self, bytes: &[u8]) -> Option<usize> {
        let (&length, rest) = bytes.split_first().filter(|(length, _)| **length < ONE_BYTE)?;
        let entry = rest.get(..length.into())?;
        let [TEXT_1, hash_chars, rest @ ..] = entry else { return None };
        let (hash, size) = rest.split_at_checked((*hash_chars).into())?;
        let size = match size {
            [] => 0,
            [NUMBER_2, size @ ..] => small_number(size)?,
            _ => return None,
        };
        let function = first_function(hash.len())?;
        self.add(Digest::from_hex(function, hash, size)?, bytes, 1 + entry.len());
        Some(1 + entry.len())
    }

    /// Adds a digest. Its entry is at the start of `message` and takes `taken` bytes of it.
    fn add(&mut self, digest: Digest, message: &[u8], taken: usize) {
        self.note(2 * digest.hash().len());
        if self.malformed.is_some() {
            return;
        }
        if self.parsed.len() == self.parsed.capacity() {
            let next = 1 + usual_entries(message.get(taken..).unwrap_or_default());
            self.parsed.reserve_exact(next.max(self.parsed.len() / 4));
        }
        self.parsed.push(digest);
    }

    /// Adds a digest in any form, which the generated decoder has decoded.
    fn add_wire(&mut self, digest: reapi::Digest) {
        let function = first_function(digest.hash.len());
        let parsed = function
            .zip(u64::try_from(digest.size_bytes).ok())
            .and_then(|(function, size)| Digest::from_hex(function, digest.hash.as_bytes(), size));
        match parsed {
            Some(parsed) => self.add(parsed, &[], 0),
            None => {
                if function.is_some() {
                    self.note(digest.hash.len());
                }
                self.malformed.get_or_insert(digest);
            }
        }
    }

    fn note(&mut self, hash_chars: usize) {
        if !self.hash_chars.contains(&hash_chars) {
            self.hash_chars.push(hash_chars);
        }
    }

    fn encode(&self, buffer: &mut impl BufMut) {
        self.parsed.iter().for_each(|digest| encode_entry(digest, buffer));
        if let Some(malformed) = &self.malformed {
            encoding::message::encode(BLOB_DIGESTS, malformed, buffer);
        }
    }

    fn encoded_len(&self) -> usize {
        let malformed = self.malformed.as_ref();
        self.parsed.iter().map(entry_len).sum::<usize>()
            + malformed.map_or(0, |digest| encoding::message::encoded_len(BLOB_DIGESTS, digest))
    }
}

/// The first function with hashes of this many characters.
fn first_function(hash_chars: usize) -> Option<DigestFunction> {
    DigestFunction::ALL.iter().copied().find(|function| 2 * function.hash_bytes() == hash_chars)
}

/// The maximum number of entries in the usual form at the start of a message.
fn usual_entries(mut message: &[u8]) -> usize {
    let mut entries = 0;
    while let [MESSAGE_2, length, rest @ ..] = message
        && *length < ONE_BYTE
        && usize::from(*length) >= SHORTEST_ENTRY
        && let Some(rest) = rest.get((*length).into()..)
    {
        entries += 1;
        message = rest;
    }
    entries
}

/// Parses a varint of these bytes. `None` if it is too large for a size.
fn small_number(bytes: &[u8]) -> Option<u64> {
    let (last, before) = bytes.split_last()?;
    if *last >= ONE_BYTE || before.len() > 7 || before.iter().any(|byte| *byte < ONE_BYTE) {
        return None;
    }
    let groups = bytes.iter().rev().map(|byte| u64::from(byte & 0x7f));
    Some(groups.fold(0, |number, group| number << 7 | group))
}

impl Message for FindMissingBlobsRequest {
    fn encode_raw(&self, buffer: &mut impl BufMut) {
        if !self.instance_name.is_empty() {
            encoding::string::encode(INSTANCE_NAME, &self.instance_name, buffer);
        }
        self.blob_digests.encode(buffer);
        if self.digest_function != 0 {
            encoding::int32::encode(DIGEST_FUNCTION, &self.digest_function, buffer);
        }
    }

    fn merge_field(
        &mut self,
        tag: u32,
        wire_type: WireType,
        buffer: &mut impl Buf,
        context: DecodeContext,
    ) -> std::result::Result<(), DecodeError> {
        let named = |field| {
            move |mut error: DecodeError| {
                error.push(Self::NAME, field);
                error
            }
        };
        match tag {
            INSTANCE_NAME => encoding::string::merge(wire_type, &mut self.instance_name, buffer, context)
                .map_err(named("instance_name")),
            BLOB_DIGESTS => {
                if wire_type == WireType::LengthDelimited
                    && let Some(taken) = self.blob_digests.take_usual(buffer.chunk())
                {
                    buffer.advance(taken);
                    return Ok(());
                }
                let mut digest = reapi::Digest::default();
                encoding::message::merge(wire_type, &mut digest, buffer, context)
                    .map_err(named("blob_digests"))?;
                self.blob_digests.add_wire(digest);
                Ok(())
            }
            DIGEST_FUNCTION => encoding::int32::merge(wire_type, &mut self.digest_function, buffer, context)
                .map_err(named("digest_function")),
            _ => encoding::skip_field(wire_type, tag, buffer, context),
        }
    }

    fn encoded_len(&self) -> usize {
        let mut length = 0;
        if !self.instance_name.is_empty() {
            length += encoding::string::encoded_len(INSTANCE_NAME, &self.instance_name);
        }
        length += self.blob_digests.encoded_len();
        if self.digest_function != 0 {
            length += encoding::int32::encoded_len(DIGEST_FUNCTION, &self.digest_function);
        }
        length
    }

    fn clear(&mut self) {
        *self = Self::default();
    }
}

impl Name for FindMissingBlobsRequest {
    const NAME: &'static str = "FindMissingBlobsRequest";
    const PACKAGE: &'static str = PACKAGE;
}

/// The response message of FindMissingBlobs.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct FindMissingBlobsResponse {
    /// The digests that are not stored.
    pub missing_blob_digests: Vec<Digest>,
}

impl Message for FindMissingBlobsResponse {
    fn encode_raw(&self, buffer: &mut impl BufMut) {
        for digest in &self.missing_blob_digests {
            encode_entry(digest, buffer);
        }
    }

    /// Servers only send responses. A client decodes the same list, in any form.
    fn merge_field(
        &mut self,
        tag: u32,
        wire_type: WireType,
        buffer: &mut impl Buf,
        context: DecodeContext,
    ) -> std::result::Result<(), DecodeError> {
        if tag != MISSING_BLOB_DIGESTS {
            return encoding::skip_field(wire_type, tag, buffer, context);
        }
        let mut list = UnresolvedDigests::default();
        let mut digest = reapi::Digest::default();
        encoding::message::merge(wire_type, &mut digest, buffer, context)?;
        list.add_wire(digest);
        self.missing_blob_digests.append(&mut list.parsed);
        Ok(())
    }

    fn encoded_len(&self) -> usize {
        self.missing_blob_digests.iter().map(entry_len).sum()
    }

    fn clear(&mut self) {
        self.missing_blob_digests.clear();
    }
}

/// The length of the wire form of a digest.
fn digest_len(digest: &Digest) -> usize {
    let chars = 2 * digest.hash().len();
    let size = if digest.size() == 0 { 0 } else { 1 + encoding::encoded_len_varint(digest.size()) };
    1 + encoding::encoded_len_varint(chars as u64) + chars + size
}

/// The length of the output of [`encode_entry`].
fn entry_len(digest: &Digest) -> usize {
    let length = digest_len(digest);
    1 + encoding::encoded_len_varint(length as u64) + length
}

/// Encodes a digest as an element of field 2.
fn encode_entry(digest: &Digest, buffer: &mut impl BufMut) {
    buffer.put_u8(MESSAGE_2);
    encoding::encode_varint(digest_len(digest) as u64, buffer);
    let mut place = [0; LONGEST_DIGEST];
    let mut rest = &mut place[..];
    rest.put_u8(TEXT_1);
    encoding::encode_varint(2 * digest.hash().len() as u64, &mut rest);
    let hex = rest.split_off_mut(..2 * digest.hash().len()).unwrap_or_default();
    // The slice has the right length, so this cannot fail.
    let _ = const_hex::encode_to_slice(digest.hash(), hex);
    if digest.size() > 0 {
        rest.put_u8(NUMBER_2);
        encoding::encode_varint(digest.size(), &mut rest);
    }
    let left = rest.len();
    buffer.put_slice(&place[..LONGEST_DIGEST - left]);
}

#[cfg(test)]
mod tests;
