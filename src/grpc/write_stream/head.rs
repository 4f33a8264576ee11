//! [`MessageHead`]: the beginning of a message of ByteStream.Write: its prefix and the fields before its data. Pure.
//!
//! Every client sends the data as the last field. A message in another form, or one that does not parse, is decoded as
//! a whole.

use crate::grpc::REQUEST_MAX_BYTES;
use gorego_reapi::proto::bytestream::WriteRequest;
use prost::encoding::decode_varint;
use tonic::Status;

/// Length of the prefix of each message: a flag and four bytes of length.
pub(super) const PREFIX_BYTES: usize = 5;
/// Largest number of bytes in which the fields before the data are looked for. The name of a blob has about 150 bytes.
pub(super) const HEAD_MAX_BYTES: usize = 4 * 1024;

/// Tags of the fields of a [`WriteRequest`], with their wire types.
mod tag {
    pub(super) const RESOURCE_NAME: u64 = 1 << 3 | 2;
    pub(super) const WRITE_OFFSET: u64 = 2 << 3;
    pub(super) const FINISH_WRITE: u64 = 3 << 3;
    pub(super) const DATA: u64 = 10 << 3 | 2;
}

/// The beginning of a message of ByteStream.Write, as far as it has arrived.
#[derive(Debug, PartialEq)]
pub(super) enum MessageHead {
    /// More bytes are needed.
    Incomplete,
    /// The fields before the data, the length of the data, and the length of the prefix and the fields.
    Complete { fields: WriteRequest, data: usize, length: usize },
    /// A message of this length that has to be decoded as a whole.
    Whole { length: usize },
}

impl MessageHead {
    /// Parses the beginning of a message, with the errors of tonic.
    pub(super) fn parse(bytes: &[u8]) -> Result<Self, Status> {
        let Some((&[flag, a, b, c, d], rest)) = bytes.split_first_chunk::<PREFIX_BYTES>() else {
            return Ok(Self::Incomplete);
        };
        if flag != 0 {
            return Err(compressed(flag));
        }
        let length = u32::from_be_bytes([a, b, c, d]) as usize;
        if length > REQUEST_MAX_BYTES {
            return Err(Status::out_of_range(format!(
                "Error, decoded message length too large: found {length} bytes, the limit is: {REQUEST_MAX_BYTES} bytes"
            )));
        }
        let present = rest.get(..length).unwrap_or(rest);
        Ok(match Self::fields(present, length) {
            Some((fields, data)) => {
                let length = PREFIX_BYTES + length - data;
                Self::Complete { fields, data, length }
            }
            None if present.len() < length.min(HEAD_MAX_BYTES) => Self::Incomplete,
            None => Self::Whole { length },
        })
    }

    /// Reads the fields of a message up to its data, and the length of the data. `None` if the data is not the rest of
    /// the message, or if anything is missing or malformed.
    fn fields(mut bytes: &[u8], length: usize) -> Option<(WriteRequest, usize)> {
        let mut fields = WriteRequest::default();
        let mut left = length;
        while left > 0 {
            let before = bytes.len();
            match decode_varint(&mut bytes).ok()? {
                tag::RESOURCE_NAME => {
                    let length = usize::try_from(decode_varint(&mut bytes).ok()?).ok()?;
                    let (name, rest) = bytes.split_at_checked(length)?;
                    fields.resource_name = std::str::from_utf8(name).ok()?.to_owned();
                    bytes = rest;
                }
                tag::WRITE_OFFSET => fields.write_offset = decode_varint(&mut bytes).ok()? as i64,
                tag::FINISH_WRITE => fields.finish_write = decode_varint(&mut bytes).ok()? != 0,
                tag::DATA => {
                    let data = usize::try_from(decode_varint(&mut bytes).ok()?).ok()?;
                    left -= before - bytes.len();
                    return (data == left).then_some((fields, data));
                }
                _ => return None,
            }
            left -= before - bytes.len();
        }
        Some((fields, 0))
    }
}

/// The error for a message that is marked as compressed in a request without `grpc-encoding`. The texts are tonic's.
fn compressed(flag: u8) -> Status {
    Status::internal(match flag {
        1 => "protocol error: received message with compressed-flag but no grpc-encoding was specified"
            .to_owned(),
        flag => format!(
            "protocol error: received message with invalid compression flag: {flag} (valid flags are 0 and 1), while sending request"
        ),
    })
}
