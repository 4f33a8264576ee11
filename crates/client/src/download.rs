//! Downloads the outputs of an action, and other files of the store.
//!
//! The result comes from the server and may be hostile. [`Listing`] checks the paths and bounds the Trees, and
//! [`Destination`] keeps every write below the given directory.

use super::{
    Client, Progress, blocking,
    destination::Destination,
    listing::{ListedFile, Listing},
};
use bytes::Bytes;
use futures::{StreamExt as _, TryStreamExt as _, stream};
use gorego_reapi::{
    digest::Digest,
    error::{Error, Result},
    path::RootPath,
    proto::reapi,
};
use std::{collections::HashMap, io::Write as _, path::Path, sync::Arc};

/// Number of concurrent transfers.
const CALLS_AT_A_TIME: usize = 8;

impl Client {
    /// Downloads every output of a result to `directory`, at the path under which it was requested. Existing files are
    /// replaced one by one; other files in output directories stay.
    ///
    /// # Errors
    /// `Invalid` for a path that would leave `directory` or pass through a symbolic link, and when a file cannot be
    /// written; `DataLoss` for wrong bytes; errors of the server.
    pub async fn download_outputs(
        &self,
        result: &reapi::ActionResult,
        directory: &Path,
        progress: &Arc<Progress>,
    ) -> Result<()> {
        self.download_listing(self.listing(result, &RootPath::root()).await?, directory, progress).await
    }

    /// Downloads all entries of a listing to `directory`, like [`Client::download_outputs`].
    ///
    /// # Errors
    /// As [`Client::download_outputs`].
    pub async fn download_listing(
        &self,
        listing: Listing,
        directory: &Path,
        progress: &Arc<Progress>,
    ) -> Result<()> {
        let directory = directory.to_owned();
        let Listing { files, directories, symlinks } = listing;
        let destination = blocking(move || {
            let destination = Destination::open(&directory)?;
            directories.iter().try_for_each(|path| destination.directory(path))?;
            Ok(destination)
        })
        .await?;
        self.download_files(files, &destination, progress).await?;
        // Symlinks are created last, so that they do not block files of the same result.
        blocking(move || symlinks.iter().try_for_each(|(path, target)| destination.symlink(path, target)))
            .await
    }

    /// Downloads blobs to `directory`, each to a file whose name is the hash.
    ///
    /// # Errors
    /// As [`Client::download_outputs`].
    pub async fn download_blobs(
        &self,
        digests: impl IntoIterator<Item = Digest>,
        directory: &Path,
        progress: &Arc<Progress>,
    ) -> Result<()> {
        let file = |digest: Digest| {
            let path = RootPath::root().join(&digest.hash_hex()).map_err(Error::internal)?;
            Ok(ListedFile { path, digest, executable: false })
        };
        let files = digests.into_iter().map(file).collect::<Result<_>>()?;
        self.download_listing(Listing { files, ..Listing::default() }, directory, progress).await
    }

    async fn download_files(
        &self,
        files: Vec<ListedFile>,
        destination: &Destination,
        progress: &Arc<Progress>,
    ) -> Result<()> {
        // Equal files are fetched once.
        let mut wanted: HashMap<Digest, Vec<ListedFile>> = HashMap::new();
        for file in files {
            wanted.entry(file.digest).or_default().push(file);
        }
        progress.expect(wanted.keys().map(Digest::size).sum());
        let (small, large): (Vec<_>, Vec<_>) = wanted.keys().copied().partition(|d| self.fits_batch(d));
        let wanted = Arc::new(wanted);
        let calls = self.batches(small).into_iter().chain(large.into_iter().map(|digest| vec![digest]));
        stream::iter(calls)
            .map(|digests| {
                let (client, destination) = (self.clone(), destination.clone());
                let (wanted, progress) = (wanted.clone(), progress.clone());
                async move { client.download_some(digests, wanted, destination, &progress).await }
            })
            .buffer_unordered(CALLS_AT_A_TIME)
            .try_collect()
            .await
    }

    async fn download_some(
        &self,
        digests: Vec<Digest>,
        wanted: Arc<HashMap<Digest, Vec<ListedFile>>>,
        destination: Destination,
        progress: &Arc<Progress>,
    ) -> Result<()> {
        if let [digest] = digests[..]
            && !self.fits_batch(&digest)
        {
            let Some((first, equal)) = wanted.get(&digest).and_then(|files| files.split_first()) else {
                return Ok(());
            };
            let (first, equal) = (first.clone(), equal.to_vec());
            let create = destination.clone();
            let pending = blocking(move || create.create(&first.path, first.executable)).await?;
            let pending = self.read_into(digest, pending, progress).await?;
            return blocking(move || {
                for file in equal {
                    let mut copy = destination.create(&file.path, file.executable)?;
                    pending.copy_to(&mut copy)?;
                    copy.commit()?;
                }
                pending.commit()
            })
            .await;
        }
        // The empty blob is never fetched (GEN-06).
        let asked: Vec<_> = digests.iter().copied().filter(|digest| !digest.is_empty()).collect();
        let blobs = if asked.is_empty() { HashMap::new() } else { self.read_batch(&asked).await? };
        let progress = progress.clone();
        blocking(move || {
            for digest in digests {
                let bytes = match blobs.get(&digest) {
                    Some(bytes) => bytes.clone(),
                    None if digest.is_empty() => Bytes::new(),
                    None => return Err(Error::NotFound(format!("the server did not send blob {digest}"))),
                };
                for file in wanted.get(&digest).into_iter().flatten() {
                    let mut pending = destination.create(&file.path, file.executable)?;
                    pending.write_all(&bytes).map_err(|error| {
                        Error::Invalid(format!("could not write output {}: {error}", file.path))
                    })?;
                    pending.commit()?;
                }
                progress.advance(digest.size());
            }
            Ok(())
        })
        .await
    }
}
