//! Reads the archive of one layer: a tar archive, which may be compressed with gzip or zstd. The first bytes show the
//! format.
//!
//! Memory is bounded by the decoder's window, one extension header and the names of one layer. All decoded bytes take
//! room in the budget of images, so neither large contents nor many small entries can fill the disk.

use super::{
    problem::{LayerProblem, shown},
    root::{LayerEntry, RootTree},
};
use crate::actors::asset::unpack::{
    extensions::{Extensions, is_extension},
    zstd_frames::ZstdFrames,
};
use flate2::read::MultiGzDecoder;
use std::io::{BufReader, Cursor, Read};
use tar::{Archive, EntryType};

/// Maximum size of an extension header, which contains paths and extended attributes.
const EXTENSION_MAX_BYTES: u64 = 1024 * 1024;
/// Number of bytes that are read at once.
const BUFFER_BYTES: usize = 128 * 1024;

/// Applies the layer in this archive.
///
/// # Errors
/// `Refused` if the archive is damaged or hostile.
pub(super) fn unpack(mut archive: impl Read, tree: &mut RootTree<'_>) -> Result<(), LayerProblem> {
    let mut magic = Vec::new();
    archive.by_ref().take(4).read_to_end(&mut magic).map_err(LayerProblem::of_reading)?;
    tree.begin_layer();
    let start = Cursor::new(magic.clone());
    let input = start.chain(BufReader::with_capacity(BUFFER_BYTES, archive));
    match *magic {
        [] => Err(LayerProblem::Refused("it is empty".into())),
        [0x1f, 0x8b, ..] => entries(MultiGzDecoder::new(input), tree),
        [0x28, 0xb5, 0x2f, 0xfd] => entries(ZstdFrames::new(input), tree),
        _ => entries(input, tree),
    }
}

fn entries(reader: impl Read, tree: &mut RootTree<'_>) -> Result<(), LayerProblem> {
    let mut archive = Archive::new(reader);
    let mut extensions = Extensions::default();
    // Raw mode is used because the library would otherwise read extension headers of any length into memory.
    for entry in archive.entries().map_err(LayerProblem::of_reading)?.raw(true) {
        let mut entry = entry.map_err(LayerProblem::of_reading)?;
        let kind = entry.header().entry_type();
        let size = entry.header().entry_size().map_err(LayerProblem::of_reading)?;
        if is_extension(kind) {
            if size > EXTENSION_MAX_BYTES {
                return Err(LayerProblem::Refused(format!("an extension header has {size} bytes")));
            }
            tree.take(size)?;
            let mut bytes = Vec::new();
            entry.read_to_end(&mut bytes).map_err(LayerProblem::of_reading)?;
            extensions.read(kind, &bytes).map_err(LayerProblem::Refused)?;
            continue;
        }
        let Extensions { path, link } = std::mem::take(&mut extensions);
        let path = path.unwrap_or_else(|| entry.path_bytes().into_owned());
        let target = link.or(entry.link_name_bytes().map(Into::into)).unwrap_or_default();
        let mode = entry.header().mode().unwrap_or(0o755);
        let mtime = entry.header().mtime().unwrap_or(0);
        let applied = match kind {
            EntryType::Directory => LayerEntry::Directory(mode),
            // Old archives mark a directory only by its trailing slash.
            EntryType::Regular if path.ends_with(b"/") => LayerEntry::Directory(mode),
            EntryType::Regular | EntryType::Continuous => {
                LayerEntry::File { mode, mtime, size, content: &mut entry }
            }
            EntryType::Symlink => LayerEntry::Symlink(&target),
            EntryType::Link => LayerEntry::HardLink(&target),
            EntryType::Char | EntryType::Block | EntryType::Fifo => LayerEntry::Special,
            _ => {
                let problem = format!("\"{}\" is a sparse file, or of an unknown kind", shown(&path));
                return Err(LayerProblem::Refused(problem));
            }
        };
        tree.apply(&path, applied)?;
        // Other content is not needed, but decoding it takes time.
        skip(&mut entry, tree)?;
    }
    Ok(())
}

/// Reads the rest of an entry. It takes room as if it were written.
fn skip(entry: &mut impl Read, tree: &mut RootTree<'_>) -> Result<(), LayerProblem> {
    let mut piece = [0; 16 * 1024];
    loop {
        match entry.read(&mut piece).map_err(LayerProblem::of_reading)? {
            0 => return Ok(()),
            read => tree.take(read as u64)?,
        }
    }
}
