//! Damage to the temporary files of uploads in progress.

use super::{
    super::*,
    OF_FILES, WITH_SEGMENTS,
    fault::{self, Fault, kind_of, obeying_permissions},
    stock::{WAYS, read_by},
};

/// An upload in progress.
struct Unfinished {
    bytes: Bytes,
    writer: Box<BlobWriter>,
}

/// Bytes that are uploaded before the damage, and after it.
const PART: usize = 400_000;

impl Unfinished {
    /// Uploads the first part of a blob.
    async fn begin(store: &TestStore, seed: u64) -> Self {
        let bytes = noise(2 * PART, seed);
        let begun = store.cas.begin_upload(&store.main, &format!("uploads/{seed}"), digest(&bytes), 0).await;
        let Upload::Writer(mut writer) = begun.unwrap() else { panic!("it is not stored") };
        writer.write(bytes.slice(..PART)).await.unwrap();
        Self { bytes, writer }
    }

    async fn finish(mut self) -> (Bytes, Result<Digest>) {
        let written = self.writer.write(self.bytes.slice(PART..)).await;
        let finished = match written {
            Ok(_) => self.writer.finish().await,
            Err(error) => Err(error),
        };
        (self.bytes, finished)
    }
}

/// The temporary files that have bytes.
fn temporary_files(directory: &Path) -> Vec<PathBuf> {
    let mut files = fault::files_below(directory);
    let has_bytes = |file: &Path| std::fs::metadata(directory.join(file)).is_ok_and(|found| found.len() > 0);
    files.retain(|file| kind_of(file) == "v1/tmp" && has_bytes(file));
    files
}

/// An upload whose file somebody changes meanwhile stores the right bytes, or its blob is missing, whichever way it is
/// read first. Another try succeeds.
#[test]
fn damage_to_the_file_of_an_upload_in_progress_is_never_served() {
    obeying_permissions(|| async {
        for max_bytes in [WITH_SEGMENTS, OF_FILES] {
            for (number, fault) in Fault::ALL.into_iter().enumerate() {
                // Staging copies a file without checking its checksums.
                for first in [0, 1 + number % (WAYS - 1)] {
                    println!("{fault:?}, read by way {first} first");
                    check_fault(fault, first, max_bytes).await;
                }
            }
        }
    });
}

async fn check_fault(fault: Fault, first: usize, max_bytes: u64) {
    let store = TestStore::with_limit(max_bytes).await;
    let directory = store.root.path().join("store");
    let uploads = [Unfinished::begin(&store, 1).await, Unfinished::begin(&store, 2).await];
    let files = eventually(|| async { Some(temporary_files(&directory)).filter(|files| files.len() == 2) });
    fault.damage(&directory, &files.await[0]);
    let mut blobs = vec![];
    for upload in uploads {
        let (bytes, finished) = upload.finish().await;
        assert!(!matches!(finished, Err(Error::Invalid(_))), "it is no fault of the client: {finished:?}");
        blobs.push(bytes);
    }
    for bytes in &blobs {
        for way in first..first + WAYS {
            match read_by(way, &store, bytes).await {
                Ok(read) => assert!(read == bytes, "wrong bytes were served"),
                Err(Error::NotFound(_) | Error::MissingBlobs(_) | Error::Unavailable(_)) => {}
                Err(error) => panic!("not a miss: {error}"),
            }
        }
        assert_eq!(store.has(digest(bytes)).await, store.get(digest(bytes)).await.is_ok());
        store.put(bytes.clone()).await;
    }
    let store = store.restart().await;
    for bytes in &blobs {
        for way in first..first + WAYS {
            assert!(read_by(way, &store, bytes).await.unwrap() == bytes);
        }
    }
    store.cas.actor().send(CloseStore).await.unwrap();
}
