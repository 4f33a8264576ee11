//! [`Spool`]: the bytes of a stream that a client writes, in a file without a name.
//!
//! One append at a time; the length that readers see moves only after the bytes are in the file, so that no reader sees what
//! is not there, and none ever waits for a writer. Bounds on length are the registry's business.

use super::Committed;
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

/// What readers watch.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct SpoolState {
    /// How far the stream is.
    pub(super) committed: Committed,
    /// It was forgotten before it was finished; no more will come.
    pub(super) given_up: bool,
}

/// A client stream's bytes and length.
#[derive(Debug)]
pub(super) struct Spool {
    /// Where the file is made at the first byte, under a name that nobody else has. A stream without bytes has none.
    path: PathBuf,
    file: OnceLock<File>,
    state: watch::Sender<SpoolState>,
    /// Held by the append that is going on.
    turn: Arc<Mutex<()>>,
}

/// The right to do the next append.
pub(super) struct Turn {
    spool: Arc<Spool>,
    offset: u64,
    _guard: OwnedMutexGuard<()>,
}

impl Spool {
    /// An empty one; nothing is touched on disk.
    pub(super) fn new(path: PathBuf) -> Self {
        let committed = Committed { bytes: 0, finished: false };
        let state = watch::Sender::new(SpoolState { committed, given_up: false });
        Self { path, file: OnceLock::new(), state, turn: Arc::default() }
    }

    /// Up to `max` bytes from `offset`. Blocks.
    ///
    /// # Errors
    /// Those of the disk.
    pub(super) fn read(&self, offset: u64, max: usize) -> Result<Bytes> {
        self.file.get().map_or(Ok(Bytes::new()), |file| super::follow::read(file, offset, max))
    }

    pub(super) fn committed(&self) -> Committed {
        self.state.borrow().committed
    }

    pub(super) fn watch(&self) -> watch::Receiver<SpoolState> {
        self.state.subscribe()
    }

    /// Tells readers that no more will come.
    pub(super) fn give_up(&self) {
        self.state.send_if_modified(|state| !std::mem::replace(&mut state.given_up, true));
    }

    /// Waits for the append before this one, then checks that this one may follow (LOG-04).
    ///
    /// # Errors
    /// `Invalid` when it would not start at the end; `Precondition` when the stream is finished.
    pub(super) async fn turn(self: &Arc<Self>, offset: u64) -> Result<Turn> {
        let guard = self.turn.clone().lock_owned().await;
        let Committed { bytes, finished } = self.committed();
        if finished {
            return Err(Error::Precondition(format!(
                "the log stream was finished at byte {bytes}; nothing can be added"
            )));
        }
        if offset != bytes {
            return Err(Error::Invalid(format!(
                "write_offset is {offset}; the log stream has {bytes} bytes and can only be added to"
            )));
        }
        Ok(Turn { spool: self.clone(), offset, _guard: guard })
    }
}

impl Spool {
    /// The file, made if need be; its path is free again when this returns. Only for whoever has the turn.
    fn open(&self) -> io::Result<&File> {
        if let Some(file) = self.file.get() {
            return Ok(file);
        }
        let file = OpenOptions::new().read(true).write(true).create_new(true).mode(0o600).open(&self.path)?;
        fs::remove_file(&self.path)?;
        Ok(self.file.get_or_init(|| file))
    }
}

impl Turn {
    /// Adds the bytes and lets readers have them. Blocks.
    ///
    /// # Errors
    /// Those of the disk; then nothing was added.
    pub(super) fn append(self, data: &[u8], finish: bool) -> Result<Committed> {
        if !data.is_empty() {
            let written = self.spool.open().and_then(|file| file.write_all_at(data, self.offset));
            written.map_err(|error| Error::io("write to a log stream", &error))?;
        }
        let committed = Committed { bytes: self.offset.saturating_add(data.len() as u64), finished: finish };
        self.spool.state.send_modify(|state| state.committed = committed);
        Ok(committed)
    }
}
