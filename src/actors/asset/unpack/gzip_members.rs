//! [`GzipMembers`]: decodes a gzip stream member by member.
//!
//! Some tools fill the last block of a file with zeros, so zeros may follow a member, as for `gzip -d`. Anything else
//! that is not a member is an error.

use flate2::bufread::GzDecoder;
use std::io::{self, BufRead, Read};

/// Decodes a stream of gzip members; see the module documentation. `None` at its end.
pub(super) struct GzipMembers<R: BufRead>(Option<GzDecoder<R>>);

impl<R: BufRead> GzipMembers<R> {
    /// A decoder of the stream that begins here.
    pub(super) fn new(input: R) -> Self {
        Self(Some(GzDecoder::new(input)))
    }
}

impl<R: BufRead> Read for GzipMembers<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        // Reading nothing would look like the end of a member.
        if buffer.is_empty() {
            return Ok(0);
        }
        while let Some(member) = &mut self.0 {
            let read = member.read(buffer)?;
            if read > 0 {
                return Ok(read);
            }
            let ended = self.0.take().map(GzDecoder::into_inner);
            self.0 = ended.map_or(Ok(None), next_member)?;
        }
        Ok(0)
    }
}

/// Skips zeros and begins the next member; `None` at the end of the input.
fn next_member<R: BufRead>(mut input: R) -> io::Result<Option<GzDecoder<R>>> {
    loop {
        let bytes = input.fill_buf()?;
        if bytes.is_empty() {
            return Ok(None);
        }
        let zeros = bytes.iter().take_while(|byte| **byte == 0).count();
        if zeros == 0 {
            return Ok(Some(GzDecoder::new(input)));
        }
        input.consume(zeros);
    }
}
