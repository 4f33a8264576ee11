//! [`LayoutDirectory`]: an OCI layout directory of this machine as a source of images.
//!
//! A client names the directory, so it must be inside a configured directory, and no link in its path may leave that.

use super::{
    digest::ImageDigest,
    manifest::Document,
    pull::this_machine,
    reference::ImageVersion,
    source::{ImageSource, read_bounded},
};
use gorego_reapi::error::{Error, Result};
use rustix::{
    fs::{self as rfs, Mode, OFlags, ResolveFlags},
    io::Errno,
};
use std::{
    fs::File,
    io::{self, Read},
    path::{Path, PathBuf},
};

/// The directory among `allowed` that contains a layout directory.
///
/// # Errors
/// `Precondition` if there is none.
pub(super) fn check_path<'a>(path: &Path, allowed: &'a [PathBuf]) -> Result<&'a PathBuf> {
    allowed.iter().find(|above| path.starts_with(above)).ok_or_else(|| {
        Error::Precondition(format!(
            "the directory {} is in none that execution.images.layouts of this server lists",
            path.display()
        ))
    })
}

/// An open layout directory.
#[derive(Debug)]
pub(super) struct LayoutDirectory {
    directory: File,
    path: PathBuf,
}

impl LayoutDirectory {
    /// Opens a layout directory below one of the `allowed` directories.
    ///
    /// # Errors
    /// `Precondition` if it is not allowed or does not exist.
    pub(super) fn open(path: &Path, allowed: &[PathBuf]) -> Result<Self> {
        let above = check_path(path, allowed)?;
        let missing = |error: io::Error| {
            Error::Precondition(format!("the image directory {} cannot be opened: {error}", path.display()))
        };
        let top = File::open(above).map_err(missing)?;
        let below = path.strip_prefix(above).unwrap_or(path);
        let below = if below.as_os_str().is_empty() { Path::new(".") } else { below };
        let directory = open_beneath(&top, below, OFlags::DIRECTORY).map_err(missing)?;
        Ok(Self { directory, path: path.to_owned() })
    }

    fn file(&self, name: &Path) -> Result<File> {
        let missing = |error: io::Error| {
            let (name, path) = (name.display(), self.path.display());
            Error::Precondition(format!("the image directory {path} has no usable file {name}: {error}"))
        };
        let flags = OFlags::NONBLOCK | OFlags::NOCTTY;
        let file = open_beneath(&self.directory, name, flags).map_err(missing)?;
        if !file.metadata().map_err(missing)?.is_file() {
            return Err(missing(io::Error::other("it is not a regular file")));
        }
        Ok(file)
    }
}

impl ImageSource for LayoutDirectory {
    fn resolve(&self, version: &ImageVersion) -> Result<ImageDigest> {
        let tag = match version {
            ImageVersion::Digest(digest) => return Ok(digest.clone()),
            ImageVersion::Tag(tag) => Some(tag.as_str()),
            ImageVersion::Only => None,
        };
        let path = self.path.display();
        let refuse = |problem: String| Error::Precondition(format!("index.json of {path}: {problem}"));
        let bytes = read_bounded(&mut self.file(Path::new("index.json"))?)?;
        let Document::Index(index) = Document::decode(&bytes).map_err(refuse)? else {
            return Err(refuse("it is not an index".into()));
        };
        match (index.tagged(tag).as_slice(), tag) {
            ([only], _) => Ok(only.digest.clone()),
            ([], Some(tag)) => {
                Err(refuse(format!("there is no image \"{tag}\"; the images in it are: {}", index.tags())))
            }
            ([], None) => Err(refuse("it has no image".into())),
            (_, None) => index
                .choose(&this_machine())
                .map(|blob| blob.digest.clone())
                .map_err(|_| refuse(format!("it has several images; name one of these: {}", index.tags()))),
            (_, Some(tag)) => Err(refuse(format!("it has several images \"{tag}\"; name one by its digest"))),
        }
    }

    fn document<'a>(&'a self, digest: &ImageDigest) -> Result<Box<dyn Read + 'a>> {
        self.blob(digest)
    }

    fn blob<'a>(&'a self, blob: &ImageDigest) -> Result<Box<dyn Read + 'a>> {
        let name = Path::new("blobs").join(blob.algorithm()).join(blob.hex());
        Ok(Box::new(self.file(&name)?))
    }

    fn is_remote(&self) -> bool {
        false
    }
}

fn open_beneath(directory: &File, path: &Path, flags: OFlags) -> io::Result<File> {
    let flags = flags | OFlags::RDONLY | OFlags::CLOEXEC;
    let resolve = ResolveFlags::BENEATH | ResolveFlags::NO_MAGICLINKS;
    loop {
        match rfs::openat2(directory, path, flags, Mode::empty(), resolve) {
            Ok(fd) => return Ok(fd.into()),
            Err(Errno::AGAIN | Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
    }
}
