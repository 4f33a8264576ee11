//! [`ImageSource`]: a source of the documents and layers of an image. [`CheckedBlob`] checks the content that is read.

use super::{
    cache::layers::NewLayer,
    digest::{Hasher, ImageDigest},
    manifest::{BlobName, MAX_DOCUMENT_BYTES},
    problem::{LayerProblem, inner_error},
    reference::ImageVersion,
};
use gorego_reapi::error::{Error, Result};
use std::io::{self, Read};

/// A registry's repository or a layout directory. All methods block.
pub(super) trait ImageSource {
    /// Returns the digest of an image.
    ///
    /// # Errors
    /// `Precondition` if there is no such image; `Unavailable` if that cannot be determined now.
    fn resolve(&self, version: &ImageVersion) -> Result<ImageDigest>;

    /// Opens an index or a manifest. The content is not checked; see [`read_document`].
    ///
    /// # Errors
    /// As [`ImageSource::resolve`].
    fn document<'a>(&'a self, digest: &ImageDigest) -> Result<Box<dyn Read + 'a>>;

    /// Opens a configuration or a layer. The content is not checked; see [`CheckedBlob`]. Its IO errors contain an
    /// [`Error`].
    ///
    /// # Errors
    /// As [`ImageSource::resolve`].
    fn blob<'a>(&'a self, blob: &ImageDigest) -> Result<Box<dyn Read + 'a>>;

    /// Whether fetching content takes so long that it is worth keeping.
    fn is_remote(&self) -> bool;
}

/// Reads a document of an image, and checks its digest.
///
/// # Errors
/// `Precondition` if the document is too large or has another digest; the errors of the reader.
pub(super) fn read_document(reader: &mut dyn Read, digest: &ImageDigest) -> Result<Vec<u8>> {
    let bytes = read_bounded(reader)?;
    if !digest.is_of(&bytes) {
        return Err(wrong_digest(digest));
    }
    Ok(bytes)
}

/// Reads a document without a known digest.
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
    inner_error(error).cloned().unwrap_or_else(|| Error::io("read an image", error))
}

fn wrong_digest(digest: &ImageDigest) -> Error {
    Error::Precondition(format!(
        "the content stored as {digest} has another digest, so it is damaged or was replaced"
    ))
}

/// A blob that must have the given size and digest. The reader must call [`CheckedBlob::check`] before it trusts the
/// content.
pub(super) struct CheckedBlob<'a> {
    reader: Box<dyn Read + 'a>,
    expected: &'a BlobName,
    left: u64,
    hasher: Hasher,
    /// The layer that a copy is written to, if one is kept.
    copy: Option<NewLayer>,
}

impl<'a> CheckedBlob<'a> {
    /// Opens a blob of the source.
    ///
    /// # Errors
    /// The errors of the source.
    pub(super) fn open(source: &'a dyn ImageSource, blob: &'a BlobName) -> Result<Self> {
        Ok(Self::reading(source.blob(&blob.digest)?, blob))
    }

    pub(super) fn reading(reader: Box<dyn Read + 'a>, blob: &'a BlobName) -> Self {
        Self { reader, expected: blob, left: blob.size, hasher: blob.digest.hasher(), copy: None }
    }

    /// Also keeps the content, if it turns out to be correct.
    pub(super) fn copied_to(self, copy: NewLayer) -> Self {
        Self { copy: Some(copy), ..self }
    }

    /// Reads the rest and checks the whole blob. `used` is the result of using the content so far: if the bytes are
    /// wrong, that explains any failure.
    ///
    /// # Errors
    /// `Precondition` if the content has another size or digest, or was refused; other failures are returned unchanged.
    pub(super) fn check(self, used: Result<(), LayerProblem>) -> Result<()> {
        self.judge(used).map_err(BlobFault::into_error)
    }

    /// The same for a blob that can be fetched again if the bytes are wrong or cannot be read.
    ///
    /// # Errors
    /// See [`BlobFault`].
    pub(super) fn judge(mut self, used: Result<(), LayerProblem>) -> Result<(), BlobFault> {
        let refused = match used {
            Ok(()) => None,
            Err(LayerProblem::Refused(problem)) => Some(problem),
            Err(LayerProblem::Failed(error)) => return Err(BlobFault::Unusable(error)),
        };
        let unread = |error: io::Error| BlobFault::Unread(of_reading(&error));
        io::copy(&mut self, &mut io::sink()).map_err(unread)?;
        let more = self.reader.read(&mut [0]).map_err(unread)?;
        if self.left > 0 || more > 0 || self.hasher.finish() != self.expected.digest {
            return Err(BlobFault::Wrong(wrong_digest(&self.expected.digest)));
        }
        if let Some(problem) = refused {
            return Err(BlobFault::Unusable(Error::Precondition(format!(
                "layer {} cannot be unpacked: {problem}",
                self.expected.digest
            ))));
        }
        if let Some(copy) = self.copy.take() {
            copy.finish();
        }
        Ok(())
    }
}

/// Why a blob could not be used.
#[derive(Debug)]
pub(super) enum BlobFault {
    /// The bytes do not have the digest.
    Wrong(Error),
    /// The bytes cannot be read.
    Unread(Error),
    /// The bytes are right or were not checked, and another problem occurred.
    Unusable(Error),
}

impl BlobFault {
    /// The error for callers that need the image.
    pub(super) fn into_error(self) -> Error {
        match self {
            Self::Wrong(error) | Self::Unread(error) | Self::Unusable(error) => error,
        }
    }
}

impl Read for CheckedBlob<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let most = buffer.len().min(usize::try_from(self.left).unwrap_or(usize::MAX));
        let read = self.reader.read(&mut buffer[..most])?;
        self.hasher.update(&buffer[..read]);
        if let Some(copy) = &mut self.copy {
            copy.write(&buffer[..read]);
        }
        self.left -= read as u64;
        Ok(read)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A file on a broken disk.
    struct Unreadable;

    impl Read for Unreadable {
        fn read(&mut self, _: &mut [u8]) -> io::Result<usize> {
            Err(rustix::io::Errno::IO.into())
        }
    }

    #[test]
    fn a_blob_that_cannot_be_read_is_told_from_one_that_cannot_be_used() {
        let name = BlobName { digest: ImageDigest::of(b"x"), size: 1 };
        let mut blob = CheckedBlob::reading(Box::new(Unreadable), &name);
        let used = blob.read(&mut [0]).map(drop).map_err(LayerProblem::of_reading);
        assert!(matches!(blob.judge(used), Err(BlobFault::Unread(_))));
        let blob = CheckedBlob::reading(Box::new(&b"x"[..]), &name);
        let used = Err(LayerProblem::Refused("it is hostile".into()));
        assert!(matches!(blob.judge(used), Err(BlobFault::Unusable(_))));
    }
}
