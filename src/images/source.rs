//! [`ImageSource`]: where the documents and layers of an image are read from, and [`CheckedBlob`], which checks what is read.

use super::{
    digest::{Hasher, ImageDigest},
    manifest::{BlobName, MAX_DOCUMENT_BYTES},
    problem::{LayerProblem, carried},
    reference::ImageVersion,
};
use gorego_reapi::error::{Error, Result};
use std::io::{self, Read};

/// A registry's repository or a layout directory. All methods block.
pub(super) trait ImageSource {
    /// The digest of an image.
    ///
    /// # Errors
    /// `Precondition` when there is no such image; `Unavailable` when that cannot be found out now.
    fn resolve(&self, version: &ImageVersion) -> Result<ImageDigest>;

    /// An index or a manifest. The reader may give anything; see [`read_document`].
    ///
    /// # Errors
    /// As [`ImageSource::resolve`].
    fn document<'a>(&'a self, digest: &ImageDigest) -> Result<Box<dyn Read + 'a>>;

    /// A configuration or a layer. The reader may give anything; see [`CheckedBlob`]. An IO error of it carries an
    /// [`Error`].
    ///
    /// # Errors
    /// As [`ImageSource::resolve`].
    fn blob<'a>(&'a self, blob: &ImageDigest) -> Result<Box<dyn Read + 'a>>;
}

/// Reads a document of an image, and checks its digest.
///
/// # Errors
/// `Precondition` for a document that is too large or has another digest; those of the reader.
pub(super) fn read_document(reader: &mut dyn Read, digest: &ImageDigest) -> Result<Vec<u8>> {
    let bytes = read_bounded(reader)?;
    if !digest.is_of(&bytes) {
        return Err(wrong_digest(digest));
    }
    Ok(bytes)
}

/// Reads a document of which no digest is known.
///
/// # Errors
/// As [`read_document`].
pub(super) fn read_bounded(reader: &mut dyn Read) -> Result<Vec<u8>> {
    let mut bytes = Vec::new();
    let read = reader.take(MAX_DOCUMENT_BYTES + 1).read_to_end(&mut bytes);
    read.map_err(|error| of_reading(&error))?;
    if bytes.len() as u64 > MAX_DOCUMENT_BYTES {
        return Err(Error::Precondition(format!(
            "a document of the image has more than {MAX_DOCUMENT_BYTES} bytes"
        )));
    }
    Ok(bytes)
}

fn of_reading(error: &io::Error) -> Error {
    carried(error).cloned().unwrap_or_else(|| Error::io("read an image", error))
}

fn wrong_digest(digest: &ImageDigest) -> Error {
    Error::Precondition(format!(
        "what is stored as {digest} has another digest, so it is damaged or was replaced"
    ))
}

/// Content that must have the size and the digest by which it is called. Whoever has read what it needs calls
/// [`CheckedBlob::check`] before it trusts that.
pub(super) struct CheckedBlob<'a> {
    reader: Box<dyn Read + 'a>,
    expected: &'a BlobName,
    left: u64,
    hasher: Hasher,
}

impl<'a> CheckedBlob<'a> {
    /// Begins to read a blob.
    ///
    /// # Errors
    /// Those of the source.
    pub(super) fn open(source: &'a dyn ImageSource, blob: &'a BlobName) -> Result<Self> {
        Ok(Self {
            reader: source.blob(&blob.digest)?,
            expected: blob,
            left: blob.size,
            hasher: blob.digest.hasher(),
        })
    }

    /// Reads the rest and checks the whole. `used` is what became of the content so far: bytes that are not the right ones
    /// explain any fault in it.
    ///
    /// # Errors
    /// `Precondition` for content of another size or digest, or that was refused; other failures as they are.
    pub(super) fn check(mut self, used: Result<(), LayerProblem>) -> Result<()> {
        let refused = match used {
            Ok(()) => None,
            Err(LayerProblem::Refused(problem)) => Some(problem),
            Err(LayerProblem::Failed(error)) => return Err(error),
        };
        io::copy(&mut self, &mut io::sink()).map_err(|error| of_reading(&error))?;
        let more = self.reader.read(&mut [0]).map_err(|error| of_reading(&error))?;
        if self.left > 0 || more > 0 || self.hasher.finish() != self.expected.digest {
            return Err(wrong_digest(&self.expected.digest));
        }
        match refused {
            Some(problem) => Err(Error::Precondition(format!(
                "layer {} cannot be unpacked: {problem}",
                self.expected.digest
            ))),
            None => Ok(()),
        }
    }
}

impl Read for CheckedBlob<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let most = buffer.len().min(usize::try_from(self.left).unwrap_or(usize::MAX));
        let read = self.reader.read(&mut buffer[..most])?;
        self.hasher.update(&buffer[..read]);
        self.left -= read as u64;
        Ok(read)
    }
}
