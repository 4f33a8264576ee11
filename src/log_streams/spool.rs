//! [`Spool`]: the bytes of a client stream, in an unlinked file.
//!
//! Appends are serialized. The visible length changes only after the bytes are in the file, so readers never see
//! missing bytes and never wait for a writer. The registry enforces the limits on the length.
//!
//! A removed spool has an empty file. [`Spool::free`] empties it, and an append that is running at that moment empties
//! it once more. Therefore a reader checks after each read whether the spool was removed meanwhile. If it was, the
//! bytes that were read do not belong to the stream.

use super::{Committed, registry::gone};
use bytes::Bytes;
use gorego_reapi::error::{Error, Result};
use std::{
    fs::{self, File, OpenOptions},
    io,
    os::unix::fs::{FileExt as _, OpenOptionsExt as _},
    path::PathBuf,
    sync::{Arc, OnceLock},
};
use tokio::sync::{Mutex, OwnedMutexGuard, watch};

/// The state that readers watch.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct SpoolState {
    /// The length of the stream, and whether it is finished.
    pub(super) committed: Committed,
    /// The stream was removed, to make room or because its time was over. Its bytes are gone.
    pub(super) removed: bool,
}

/// The bytes and length of a client stream.
#[derive(Debug)]
pub(super) struct Spool {
    /// Unique path at which the file is created for the first byte. A stream without bytes has no file.
    path: PathBuf,
    file: OnceLock<File>,
    state: watch::Sender<SpoolState>,
    /// Held by the append in progress.
    turn: Arc<Mutex<()>>,
}

/// The right to do the next append.
pub(super) struct AppendTurn {
    spool: Arc<Spool>,
    offset: u64,
    _guard: OwnedMutexGuard<()>,
}

impl Spool {
    /// Creates an empty spool. Does not access the disk.
    pub(super) fn new(path: PathBuf) -> Self {
        let committed = Committed { bytes: 0, finished: false };
        let state = watch::Sender::new(SpoolState { committed, removed: false });
        Self { path, file: OnceLock::new(), state, turn: Arc::default() }
    }

    /// Reads up to `max` bytes from `offset`, or other bytes if the spool is removed meanwhile. Blocks.
    ///
    /// # Errors
    /// Errors of the disk.
    pub(super) fn read(&self, offset: u64, max: usize) -> Result<Bytes> {
        self.file.get().map_or(Ok(Bytes::new()), |file| read(file, offset, max))
    }

    pub(super) fn committed(&self) -> Committed {
        self.state.borrow().committed
    }

    pub(super) fn watch(&self) -> watch::Receiver<SpoolState> {
        self.state.subscribe()
    }

    pub(super) fn is_removed(&self) -> bool {
        self.state.borrow().removed
    }

    /// Tells readers that the bytes are gone. [`Spool::free`] has to follow.
    pub(super) fn remove(&self) {
        self.state.send_if_modified(|state| !std::mem::replace(&mut state.removed, true));
    }

    /// Frees the blocks of a removed spool, although readers may have its file open. Blocks.
    pub(super) fn free(&self) {
        if let Some(file) = self.file.get() {
            // If this fails, the kernel frees the blocks when the last reader is gone.
            let _ = file.set_len(0);
        }
    }

    /// Waits for the previous append, then checks that this one is allowed (LOG-04).
    ///
    /// # Errors
    /// `Invalid` when it does not start at the end; `Precondition` when the stream is finished.
    pub(super) async fn turn(self: &Arc<Self>, offset: u64) -> Result<AppendTurn> {
        let guard = self.turn.clone().lock_owned().await;
        let Committed { bytes, finished } = self.committed();
        if finished {
            return Err(Error::Precondition(format!(
                "the log stream was finished at byte {bytes}; nothing can be appended"
            )));
        }
        if offset != bytes {
            return Err(Error::Invalid(format!(
                "write_offset is {offset}; the log stream has {bytes} bytes and can only be appended to"
            )));
        }
        Ok(AppendTurn { spool: self.clone(), offset, _guard: guard })
    }

    /// The file. It is created and unlinked if necessary. Only the holder of the turn may call it.
    fn open(&self) -> io::Result<&File> {
        if let Some(file) = self.file.get() {
            return Ok(file);
        }
        let file = OpenOptions::new().read(true).write(true).create_new(true).mode(0o600).open(&self.path)?;
        fs::remove_file(&self.path)?;
        Ok(self.file.get_or_init(|| file))
    }
}

impl AppendTurn {
    /// Appends the bytes and makes them visible to readers. Blocks.
    ///
    /// # Errors
    /// `NotFound` when the spool was removed; errors of the disk. Nothing is appended then.
    pub(super) fn append(self, data: &[u8], finish: bool) -> Result<Committed> {
        if !data.is_empty() {
            let written = self.spool.open().and_then(|file| file.write_all_at(data, self.offset));
            written.map_err(|error| Error::io("write to a log stream", &error))?;
        }
        let committed = Committed { bytes: self.offset.saturating_add(data.len() as u64), finished: finish };
        let is_visible = self.spool.state.send_if_modified(|state| {
            if !state.removed {
                state.committed = committed;
            }
            !state.removed
        });
        if !is_visible {
            self.spool.free();
            return Err(gone());
        }
        Ok(committed)
    }
}

/// Reads up to `max` bytes of a file. Blocks.
pub(super) fn read(file: &File, offset: u64, max: usize) -> Result<Bytes> {
    let mut bytes = vec![0; max];
    let read = file.read_at(&mut bytes, offset);
    bytes.truncate(read.map_err(|error| Error::io("read a log stream", &error))?);
    Ok(bytes.into())
}
