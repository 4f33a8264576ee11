//! [`StoredFile`]: a stored file on disk, open for reading.
//!
//! A file with checksums is read in whole blocks, and each block is checked before its bytes are handed out. Where a
//! read begins or ends within a block, the rest of the block is read too.

use super::{
    Look, PIECE_BYTES, Stored,
    checksums::{BLOCK_BYTES, Checksums},
    stamps,
};
use rustix::fs::copy_file_range;
use std::{
    fs::{File, Metadata},
    io,
    os::{fd::AsRawFd as _, unix::fs::FileExt as _},
    time::SystemTime,
};

/// An open stored file.
#[derive(Debug)]
pub(crate) struct StoredFile {
    file: File,
    has_fine_times: bool,
    /// `None` for a file whose readers check all of its content, and for a file that an older version has stored.
    sums: Option<Checksums>,
}

impl StoredFile {
    /// Wraps an open file. `has_fine_times` is the result of [`stamps::has_fine_change_times`] for its file system.
    pub(super) fn new(file: File, has_fine_times: bool, sums: Option<Checksums>) -> Self {
        Self { file, has_fine_times, sums }
    }

    /// Reads whole blocks from the start of a block on, and checks them: as many as fit.
    fn read_blocks(&self, sums: &Checksums, buffer: &mut [u8], offset: u64) -> io::Result<usize> {
        let left = usize::try_from(sums.size() - offset).unwrap_or(usize::MAX);
        let wanted = if left <= buffer.len() { left } else { buffer.len() - buffer.len() % BLOCK_BYTES };
        let mut done = 0;
        // Small pieces are still in the cache of the processor when they are checked.
        for piece in buffer.get_mut(..wanted).unwrap_or_default().chunks_mut(PIECE_BYTES) {
            let at = offset + done as u64;
            self.file.read_exact_at(piece, at)?;
            sums.check(at, piece)?;
            done += piece.len();
        }
        Ok(done)
    }

    /// Reads a part of one block, after checking all of it.
    fn read_in_block(&self, sums: &Checksums, buffer: &mut [u8], offset: u64) -> io::Result<usize> {
        let skipped = (offset % BLOCK_BYTES as u64) as usize;
        let start = offset - skipped as u64;
        let left = usize::try_from(sums.size() - start).unwrap_or(usize::MAX);
        let mut block = vec![0; left.min(BLOCK_BYTES)];
        self.read_blocks(sums, &mut block, start)?;
        let rest = block.get(skipped..).unwrap_or_default();
        let (read, _) = rest.split_at(rest.len().min(buffer.len()));
        buffer.iter_mut().zip(read).for_each(|(to, from)| *to = *from);
        Ok(read.len())
    }

    fn read_checked(&self, sums: &Checksums, buffer: &mut [u8], offset: u64) -> io::Result<usize> {
        let mut filled = 0;
        while let Some(rest) = buffer.get_mut(filled..).filter(|rest| !rest.is_empty()) {
            let at = offset + filled as u64;
            if at >= sums.size() {
                break;
            }
            let is_whole = at.is_multiple_of(BLOCK_BYTES as u64)
                && (rest.len() >= BLOCK_BYTES || rest.len() as u64 >= sums.size() - at);
            if is_whole {
                filled += self.read_blocks(sums, rest, at)?;
            } else if filled == 0 {
                filled += self.read_in_block(sums, rest, at)?;
            } else {
                // The next read begins with this block.
                break;
            }
        }
        Ok(filled)
    }

    /// Appends bytes that are in the page cache to a buffer, at most as many as `limit`. Does not block.
    fn read_without_blocking(&self, buffer: &mut Vec<u8>, limit: usize, offset: u64) -> io::Result<usize> {
        let spare = buffer.spare_capacity_mut();
        let spare = spare.get_mut(..limit.min(spare.len())).unwrap_or_default();
        let vector = libc::iovec { iov_base: spare.as_mut_ptr().cast(), iov_len: spare.len() };
        let offset = i64::try_from(offset).map_err(io::Error::other)?;
        // SAFETY: the vector describes memory that the buffer owns and that nothing else uses during the call.
        let read =
            unsafe { libc::preadv2(self.file.as_raw_fd(), &raw const vector, 1, offset, libc::RWF_NOWAIT) };
        let read = usize::try_from(read).map_err(|_| io::Error::last_os_error())?;
        // SAFETY: the buffer was asked for its spare capacity, so it has `read` initialised bytes more now: the kernel
        // has written this many, which it was told is at most that capacity.
        unsafe { buffer.set_len(buffer.len() + read) };
        Ok(read)
    }

    /// [`Stored::read_cached`] of whole blocks.
    fn read_cached_blocks(&self, sums: &Checksums, buffer: &mut Vec<u8>, offset: u64) -> io::Result<usize> {
        if !offset.is_multiple_of(BLOCK_BYTES as u64) {
            return Ok(0);
        }
        let start = buffer.len();
        while buffer.len() < buffer.capacity() {
            let before = buffer.len();
            let at = offset + (before - start) as u64;
            let left = usize::try_from(sums.size().saturating_sub(at)).unwrap_or(usize::MAX);
            let read = match self.read_without_blocking(buffer, left.min(PIECE_BYTES), at) {
                Ok(read) => read,
                Err(_) if before > start => break,
                Err(error) => return Err(error),
            };
            let whole = if read == left { read } else { read - read % BLOCK_BYTES };
            buffer.truncate(before + whole);
            sums.check(at, buffer.get(before..).unwrap_or_default())?;
            if whole < PIECE_BYTES {
                break;
            }
        }
        Ok(buffer.len() - start)
    }
}

/// The size and stamps in a file's metadata.
pub(super) fn look_of(metadata: &Metadata, has_fine_times: bool) -> Look {
    let stamp = stamps::stamp_of(metadata);
    let lasting = stamps::settled(stamp, has_fine_times, SystemTime::now());
    Look { size: metadata.len(), stamp, lasting }
}

impl Stored for StoredFile {
    fn look(&self) -> io::Result<Look> {
        Ok(look_of(&self.file.metadata()?, self.has_fine_times))
    }

    fn is_checked_when_read(&self) -> bool {
        self.sums.is_some()
    }

    fn read_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<usize> {
        match &self.sums {
            Some(sums) => self.read_checked(sums, buffer, offset),
            None => self.file.read_at(buffer, offset),
        }
    }

    fn read_cached(&self, buffer: &mut Vec<u8>, offset: u64) -> io::Result<usize> {
        match &self.sums {
            Some(sums) => self.read_cached_blocks(sums, buffer, offset),
            None => self.read_without_blocking(buffer, usize::MAX, offset),
        }
    }

    fn nobody_writes(&self) -> bool {
        stamps::nobody_writes(&self.file)
    }

    /// The files share their blocks until one is written, where the file system supports this.
    fn copy_to(&self, to: &File, size: u64) -> io::Result<()> {
        let (mut read_at, mut written_at) = (0u64, 0u64);
        while read_at < size {
            let left = usize::try_from(size - read_at).unwrap_or(usize::MAX);
            match copy_file_range(&self.file, Some(&mut read_at), to, Some(&mut written_at), left) {
                Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
                Ok(_) => {}
                Err(rustix::io::Errno::INTR) => {}
                // The kernel cannot copy this file, for example to another file system.
                Err(_) if read_at == 0 => return copy_in_pieces(self, to, size),
                Err(error) => return Err(error.into()),
            }
        }
        Ok(())
    }
}

/// Implements [`Stored::copy_to`] by reading and writing.
pub(super) fn copy_in_pieces(from: &dyn Stored, to: &File, size: u64) -> io::Result<()> {
    let mut piece = vec![0; PIECE_BYTES];
    let mut at = 0;
    while at < size {
        let read = from.read_at(&mut piece, at)?;
        let Some(bytes) = piece.get(..read).filter(|bytes| !bytes.is_empty()) else {
            return Err(io::ErrorKind::UnexpectedEof.into());
        };
        to.write_all_at(bytes, at)?;
        at += read as u64;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;

    fn content() -> Vec<u8> {
        (0..5 * BLOCK_BYTES as u32 + 777).map(|at| (at.wrapping_mul(2_654_435_761) >> 13) as u8).collect()
    }

    fn open(path: &std::path::Path, sums: Option<Checksums>) -> StoredFile {
        StoredFile::new(File::open(path).unwrap(), true, sums)
    }

    /// Any read returns the right bytes, whether or not it begins at a block, and makes progress until the end.
    #[test]
    fn reads_of_any_offset_and_length_return_the_bytes_of_the_file() {
        let directory = tempfile::tempdir().unwrap();
        let (path, content) = (directory.path().join("file"), content());
        fs::write(&path, &content).unwrap();
        let file = open(&path, Some(Checksums::of(&[&content])));
        let end = content.len() as u64;
        let edges: Vec<u64> = (0..=6).map(|block| block * BLOCK_BYTES as u64).chain([end]).collect();
        let near = |edge: &u64| [edge.saturating_sub(1), *edge, edge + 1];
        for offset in edges.iter().flat_map(near) {
            for length in
                [1, 100, BLOCK_BYTES - 1, BLOCK_BYTES, BLOCK_BYTES + 1, 3 * BLOCK_BYTES + 5, content.len()]
            {
                let expected = content.get(offset as usize..).unwrap_or_default();
                let mut buffer = vec![0; length];
                let read = file.read_at(&mut buffer, offset).unwrap();
                assert_eq!(buffer[..read], expected[..read], "{length} at {offset}");
                assert_eq!(read == 0, expected.is_empty(), "{length} at {offset}");
                let mut cached = Vec::with_capacity(length);
                let limit = cached.capacity();
                let read = file.read_cached(&mut cached, offset).unwrap();
                assert_eq!(cached, expected[..read], "{length} at {offset}");
                let is_whole =
                    offset.is_multiple_of(BLOCK_BYTES as u64) && limit >= BLOCK_BYTES.min(expected.len());
                assert_eq!(read > 0, is_whole && !expected.is_empty(), "{length} at {offset}");
            }
        }
    }

    /// Every read that covers a bad block fails, and every other read succeeds, even if the file is longer or shorter.
    #[test]
    fn no_byte_of_a_bad_block_is_returned() {
        let directory = tempfile::tempdir().unwrap();
        let (path, content) = (directory.path().join("file"), content());
        let sums = || Some(Checksums::of(&[&content]));
        let (bad, block) = (2 * BLOCK_BYTES + 9, BLOCK_BYTES as u64);
        let mut changed = content.clone();
        changed[bad] ^= 4;
        fs::write(&path, &changed).unwrap();
        let file = open(&path, sums());
        let read = |file: &StoredFile, offset: u64| {
            let mut buffer = vec![0; BLOCK_BYTES];
            let read = file.read_at(&mut buffer, offset).map(|read| buffer[..read].to_vec());
            let mut cached = Vec::with_capacity(BLOCK_BYTES);
            let outcome = file.read_cached(&mut cached, offset);
            assert!(outcome.is_err() || cached == content[offset as usize..][..cached.len()]);
            read
        };
        for offset in (0..content.len() as u64).step_by(10_007) {
            let is_bad = offset / block == 2;
            let outcome = read(&file, offset);
            match outcome {
                Ok(bytes) => assert!(!is_bad && content[offset as usize..].starts_with(&bytes), "{offset}"),
                Err(error) => assert!(is_bad && super::super::is_lost(&error), "{offset}: {error}"),
            }
        }
        assert_eq!(
            open(&path, None).read_at(&mut [0; 1], bad as u64).unwrap(),
            1,
            "nothing else would notice"
        );
        fs::write(&path, &content[..content.len() - 1]).unwrap();
        assert!(super::super::is_lost(&read(&open(&path, sums()), 5 * block).unwrap_err()));
        fs::write(&path, [&content[..], b"more"].concat()).unwrap();
        let file = open(&path, sums());
        assert_eq!(
            file.read_at(&mut [0; 9], content.len() as u64).unwrap(),
            0,
            "what follows is not the blob's"
        );
    }
}
