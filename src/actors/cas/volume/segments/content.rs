//! [`RecordContent`]: an open stored file with the bytes of a record, which were read and checked.

use crate::actors::cas::{
    index::Stamp,
    volume::{Look, Stored, stored::copy_in_pieces},
};
use bytes::Bytes;
use std::{fs::File, io};

/// Records are never changed and every read of one is checked, so all of them have the same stamp.
pub(super) const STAMP: Stamp = Stamp::CHECKED_WHEN_READ;

#[derive(Debug)]
pub(super) struct RecordContent(pub Bytes);

impl RecordContent {
    fn rest(&self, offset: u64) -> &[u8] {
        usize::try_from(offset).ok().and_then(|offset| self.0.get(offset..)).unwrap_or_default()
    }
}

/// The size and stamp of a record.
pub(super) fn look_of(size: u64) -> Look {
    Look { size, stamp: STAMP, lasting: STAMP }
}

impl Stored for RecordContent {
    fn look(&self) -> io::Result<Look> {
        Ok(look_of(self.0.len() as u64))
    }

    fn whole(&self) -> Option<Bytes> {
        Some(self.0.clone())
    }

    fn read_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<usize> {
        let rest = self.rest(offset);
        let read = rest.len().min(buffer.len());
        if let (Some(to), Some(from)) = (buffer.get_mut(..read), rest.get(..read)) {
            to.copy_from_slice(from);
        }
        Ok(read)
    }

    fn read_cached(&self, buffer: &mut Vec<u8>, offset: u64) -> io::Result<usize> {
        let rest = self.rest(offset);
        let read = rest.len().min(buffer.capacity() - buffer.len());
        buffer.extend_from_slice(rest.get(..read).unwrap_or_default());
        Ok(read)
    }

    fn nobody_writes(&self) -> bool {
        true
    }

    fn copy_to(&self, to: &File, size: u64) -> io::Result<()> {
        copy_in_pieces(self, to, size)
    }
}
