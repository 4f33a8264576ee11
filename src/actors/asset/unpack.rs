//! Unpacks archives: tar (plain or compressed with gzip, xz or zstd) and zip, which are told apart by their first
//! bytes.
//!
//! Entries go through [`Layout`], which refuses hostile ones, and contents go straight to the store. An archive takes
//! memory for its layout, its decoder and one piece of one file. Each of these has a limit that does not depend on
//! what the archive claims, and all archives together have a limit too ([`UNPACKING`]). All decoded bytes, including
//! headers, count against one limit, which stops a bomb.
//!
//! Owners, times and permissions other than "executable" are dropped. Devices, pipes, sparse files and encrypted files
//! are refused.

pub(crate) mod extensions;
mod gzip_members;
pub(crate) mod zstd_frames;

use super::{
    layout::{self, Layout},
    outcome::{FailureKind, Problem},
};
use crate::budget::Bounds;
use extensions::{Extensions, is_extension};
use gorego_reapi::{digest::Digest, error::Error, path::MAX_PATH_BYTES};
use gzip_members::GzipMembers;
use liblzma::{read::XzDecoder, stream::Stream as XzStream};
use std::{
    cell::Cell,
    io::{self, BufRead, BufReader, Read, Seek, SeekFrom},
    rc::Rc,
};
use tar::{Archive, EntryType};
use zip::{
    ZipArchive,
    read::{ArchiveOffset, Config},
};
use zstd_frames::ZstdFrames;

/// Bound on the memory of an xz decoder: a little more than the highest preset needs.
const XZ_MEMORY_BYTES: u64 = 128 * 1024 * 1024;
/// The largest window of a zstd frame, as a power of two: 128 MiB, the most that `zstd --ultra` uses without
/// `--long=31`.
const ZSTD_WINDOW_LOG_MAX: u32 = 27;
/// The largest extension header of a tar entry. It holds one or two paths.
const EXTENSION_MAX_BYTES: u64 = 64 * 1024;
/// Bound on the bytes that are read to find and read the central directory of a zip: enough for 65,534 entries with
/// long names. The length that the archive claims is not reliable, and all of it is read into memory.
const ZIP_DIRECTORY_MAX_BYTES: u64 = 64 * 1024 * 1024;
/// The most memory that a layout takes.
const LAYOUT_BYTES: u64 = layout::LAYOUT_BYTES as u64;
/// Memory for the decoders and layouts of all archives that are unpacked at the same time. It is enough for two of the
/// largest archives and two small ones; a single peer can have only one of the largest.
pub(crate) const UNPACKING: Bounds = Bounds::shared(
    "bytes of memory to unpack archives",
    2 * LARGEST_BYTES + 2 * (SMALL_DECODER_BYTES + LAYOUT_BYTES),
);
/// The most memory that one archive takes.
pub(crate) const LARGEST_BYTES: u64 = LARGE_DECODER_BYTES + LAYOUT_BYTES;
/// The memory of a decoder with a large dictionary: xz or zstd.
const LARGE_DECODER_BYTES: u64 = 128 * 1024 * 1024;
/// The memory of any other decoder, which has only buffers.
const SMALL_DECODER_BYTES: u64 = 1024 * 1024;
/// The length of the first bytes by which formats are told apart.
pub(crate) const MAGIC_BYTES: usize = 6;
/// Bytes that are read at once from the archive.
const BUFFER_BYTES: usize = 128 * 1024;

/// The destination of the files of an archive.
pub trait Contents {
    /// Stores the content and returns its digest.
    ///
    /// # Errors
    /// The errors of the store; and the errors of the reader, converted by [`Problem::of_io`].
    fn put(&mut self, content: &mut dyn Read) -> Result<Digest, Problem>;
}

/// The maximum memory that unpacking an archive takes, given its first bytes and its length.
pub(crate) fn memory_bytes(magic: &[u8], length: u64) -> u64 {
    let decoder = match magic {
        // The list of contents is read as a whole, and parsed.
        [b'P', b'K', ..] => SMALL_DECODER_BYTES + length.min(ZIP_DIRECTORY_MAX_BYTES),
        [0xfd, b'7', b'z', ..] | [0x28, 0xb5, 0x2f, 0xfd, ..] => LARGE_DECODER_BYTES,
        _ => SMALL_DECODER_BYTES,
    };
    decoder + LAYOUT_BYTES
}

/// Unpacks an archive from its start. `max_bytes` bounds the unpacked bytes.
///
/// # Errors
/// `Unusable` for input that is damaged, hostile or not an archive; `TooMuch` beyond a bound; the errors of `contents`.
pub fn unpack(
    mut archive: impl Read + Seek,
    max_bytes: u64,
    contents: &mut dyn Contents,
) -> Result<Layout, Problem> {
    let mut magic = Vec::new();
    (archive.by_ref().take(MAGIC_BYTES as u64).read_to_end(&mut magic))
        .map_err(|error| Problem::of_io(&error))?;
    if magic.is_empty() {
        return Err(refuse("it is empty"));
    }
    let start = archive.seek(SeekFrom::Start(0));
    start.map_err(|error| Problem::of_io(&error))?;
    let mut input = BufReader::with_capacity(BUFFER_BYTES, archive);
    let budget = Rc::new(Cell::new(max_bytes));
    let limited = |reader| BudgetedReader { reader, left: budget.clone(), max: max_bytes };
    match magic.as_slice() {
        [b'P', b'K', 3, 4, ..] | [b'P', b'K', 5, 6, ..] => unpack_zip(input, &budget, max_bytes, contents),
        [0x1f, 0x8b, ..] => {
            unpack_compressed_tar(limited(Box::new(GzipMembers::new(input)) as Box<dyn Read>), contents)
        }
        [0xfd, b'7', b'z', b'X', b'Z', 0] => {
            const CONCATENATED: u32 = liblzma::stream::CONCATENATED;
            let stream =
                XzStream::new_stream_decoder(XZ_MEMORY_BYTES, CONCATENATED).map_err(Error::internal)?;
            unpack_compressed_tar(limited(Box::new(XzDecoder::new_stream(input, stream))), contents)
        }
        [0x28, 0xb5, 0x2f, 0xfd, ..] => {
            unpack_compressed_tar(limited(Box::new(ZstdFrames::new(input))), contents)
        }
        _ => unpack_tar(limited(Box::new(&mut input)), contents),
    }
}

/// The problem of an archive that is refused.
fn refuse(message: impl Into<String>) -> Problem {
    Problem::origin(FailureKind::Unusable, format!("the archive is refused: {}", message.into()))
}

/// A reader with a budget of bytes, which it may share with others.
struct BudgetedReader<R> {
    reader: R,
    left: Rc<Cell<u64>>,
    max: u64,
}

impl<R: Read> Read for BudgetedReader<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let read = self.reader.read(buffer)?;
        match self.left.get().checked_sub(read as u64) {
            Some(left) => self.left.set(left),
            None => {
                let message = format!(
                    "the archive unpacks to more than {} bytes (assets.max_unpacked_gb of this server)",
                    self.max
                );
                return Err(Problem::origin(FailureKind::TooMuch, message).into_io());
            }
        }
        Ok(read)
    }
}

/// Unpacks a tar, and decodes what follows it: the checksum of the compressed stream is at its end.
fn unpack_compressed_tar(mut reader: impl Read, contents: &mut dyn Contents) -> Result<Layout, Problem> {
    let layout = unpack_tar(&mut reader, contents)?;
    io::copy(&mut reader, &mut io::sink()).map_err(|error| Problem::of_io(&error))?;
    Ok(layout)
}

/// Unpacks a tar up to the blocks that mark its end.
fn unpack_tar(reader: impl Read, contents: &mut dyn Contents) -> Result<Layout, Problem> {
    let damaged = |error: io::Error| Problem::of_io(&error);
    let mut layout = Layout::default();
    let mut archive = Archive::new(reader);
    let mut extensions = Extensions::default();
    // Raw mode, because the library would read extension headers of any length into memory.
    for entry in archive.entries().map_err(damaged)?.raw(true) {
        let mut entry = entry.map_err(damaged)?;
        let kind = entry.header().entry_type();
        if is_extension(kind) {
            let size = entry.header().entry_size().map_err(damaged)?;
            if size > EXTENSION_MAX_BYTES {
                return Err(refuse(format!("an extension header has {size} bytes")));
            }
            let mut bytes = Vec::new();
            entry.read_to_end(&mut bytes).map_err(damaged)?;
            extensions.read(kind, &bytes).map_err(refuse)?;
            continue;
        }
        add_tar_entry(&mut layout, &mut entry, std::mem::take(&mut extensions), contents)?;
    }
    Ok(layout)
}

/// Adds the file, directory or link of an entry, with the extension headers before it.
fn add_tar_entry(
    layout: &mut Layout,
    entry: &mut tar::Entry<'_, impl Read>,
    Extensions { path, link }: Extensions,
    contents: &mut dyn Contents,
) -> Result<(), Problem> {
    let damaged = |error: io::Error| Problem::of_io(&error);
    let path = text(path.unwrap_or_else(|| entry.path_bytes().into_owned()))?;
    let target = || text(link.clone().or(entry.link_name_bytes().map(Into::into)).unwrap_or_default());
    let added = match entry.header().entry_type() {
        EntryType::Directory => layout.add_directory(&path),
        // Old archives mark a directory only by its trailing slash.
        EntryType::Regular if path.ends_with('/') => layout.add_directory(&path),
        EntryType::Symlink => layout.add_symlink(&path, &target()?),
        EntryType::Link => layout.add_hard_link(&path, &target()?),
        EntryType::Regular | EntryType::Continuous => {
            let executable = entry.header().mode().unwrap_or(0) & 0o111 != 0;
            let size = entry.header().entry_size().map_err(damaged)?;
            let digest = contents.put(entry)?;
            if digest.size() != size {
                return Err(refuse(format!("it ends within \"{}\"", path.escape_debug())));
            }
            layout.add_file(&path, digest, executable)
        }
        _ => Err(format!("\"{}\" is a device, a pipe or a sparse file", path.escape_debug())),
    };
    added.map_err(refuse)
}

fn text(bytes: Vec<u8>) -> Result<String, Problem> {
    String::from_utf8(bytes)
        .map_err(|_| refuse("it has a name that is not UTF-8, which no Directory can have"))
}

fn unpack_zip(
    mut input: impl BufRead + Seek,
    budget: &Rc<Cell<u64>>,
    max_bytes: u64,
    contents: &mut dyn Contents,
) -> Result<Layout, Problem> {
    refuse_zip64(&mut input)?;
    let damaged = |error: zip::result::ZipError| Problem::of_io(&error.into());
    let directory_left = Rc::new(Cell::new(Some(ZIP_DIRECTORY_MAX_BYTES)));
    let input = LimitedReader { reader: input, left: directory_left.clone() };
    // The central directory is at the offset that the end record states; the file is not searched for it.
    let config = Config { archive_offset: ArchiveOffset::Known(0) };
    let mut archive = ZipArchive::with_config(config, input).map_err(damaged)?;
    // From here on only the unpacked bytes are limited.
    directory_left.set(None);
    let mut layout = Layout::default();
    for index in 0..archive.len() {
        let file = archive.by_index(index).map_err(damaged)?;
        let path = text(file.name_raw().to_vec())?;
        let mode = file.unix_mode().unwrap_or(0);
        let (directory, link) = (file.is_dir(), file.is_symlink());
        let size = file.size();
        let mut file = BudgetedReader { reader: file, left: budget.clone(), max: max_bytes };
        let added = if directory {
            layout.add_directory(&path)
        } else if link {
            let mut target = Vec::new();
            let limit = MAX_PATH_BYTES as u64 + 1;
            file.take(limit).read_to_end(&mut target).map_err(|error| Problem::of_io(&error))?;
            layout.add_symlink(&path, &text(target)?)
        } else {
            let digest = contents.put(&mut file)?;
            if digest.size() != size {
                return Err(refuse(format!("\"{}\" is not as long as it says", path.escape_debug())));
            }
            layout.add_file(&path, digest, mode & 0o111 != 0)
        };
        added.map_err(refuse)?;
    }
    Ok(layout)
}

/// A reader that limits the bytes read while `left` is set.
struct LimitedReader<R> {
    reader: R,
    left: Rc<Cell<Option<u64>>>,
}

impl<R: Read> Read for LimitedReader<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let read = self.reader.read(buffer)?;
        if let Some(left) = self.left.get() {
            let left = left.checked_sub(read as u64).ok_or_else(|| {
                refuse(format!("its list of contents has more than {ZIP_DIRECTORY_MAX_BYTES} bytes"))
                    .into_io()
            })?;
            self.left.set(Some(left));
        }
        Ok(read)
    }
}

impl<R: Seek> Seek for LimitedReader<R> {
    fn seek(&mut self, to: SeekFrom) -> io::Result<u64> {
        self.reader.seek(to)
    }
}

/// Refuses 64-bit zips: they may claim any number of entries, for which the library would allocate memory.
fn refuse_zip64(input: &mut (impl Read + Seek)) -> Result<(), Problem> {
    /// More than the longest comment and all records before it.
    const TAIL_BYTES: u64 = 128 * 1024;
    const LOCATOR: &[u8] = b"PK\x06\x07";
    let damaged = |error: io::Error| Problem::of_io(&error);
    let length = input.seek(SeekFrom::End(0)).map_err(damaged)?;
    input.seek(SeekFrom::Start(length.saturating_sub(TAIL_BYTES))).map_err(damaged)?;
    let mut tail = Vec::new();
    input.take(TAIL_BYTES).read_to_end(&mut tail).map_err(damaged)?;
    if tail.windows(LOCATOR.len()).any(|window| window == LOCATOR) {
        return Err(refuse("it is a 64-bit zip, which is not read here; use tar"));
    }
    input.seek(SeekFrom::Start(0)).map_err(damaged)?;
    Ok(())
}

#[cfg(test)]
mod tests;
