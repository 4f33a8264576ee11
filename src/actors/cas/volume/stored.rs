//! [`StoredFile`]: a stored file on disk, open for reading.

use super::{Look, PIECE_BYTES, Stored, stamps};
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
}

impl StoredFile {
    /// Wraps an open file. `has_fine_times` is the result of [`stamps::has_fine_change_times`] for its file system.
    pub(super) fn new(file: File, has_fine_times: bool) -> Self {
        Self { file, has_fine_times }
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

    fn read_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<usize> {
        self.file.read_at(buffer, offset)
    }

    fn read_cached(&self, buffer: &mut Vec<u8>, offset: u64) -> io::Result<usize> {
        let spare = buffer.spare_capacity_mut();
        let vector = libc::iovec { iov_base: spare.as_mut_ptr().cast(), iov_len: spare.len() };
        let offset = i64::try_from(offset).map_err(io::Error::other)?;
        // SAFETY: the vector describes memory that the buffer owns and that nothing else uses during the call.
        let read =
            unsafe { libc::preadv2(self.file.as_raw_fd(), &raw const vector, 1, offset, libc::RWF_NOWAIT) };
        let read = usize::try_from(read).map_err(|_| io::Error::last_os_error())?;
        // SAFETY: the buffer was asked for its spare capacity, so it has `read` initialised bytes more now: the kernel has
        // written this many, which it was told is at most that capacity.
        unsafe { buffer.set_len(buffer.len() + read) };
        Ok(read)
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
                // Across file systems, or where the kernel cannot do it.
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
