//! The streams of a run: where the log files of its command lie, and what has become of them.
//!
//! Nothing here copies a byte or holds a file open on behalf of the run. While the command runs, a reader opens the file by
//! itself ([`Tail`]); an open file outlives the exec directory. Afterwards the stream is the blob that the worker stored.

use crate::instance::Instance;
use gorego_reapi::{digest::Digest, error::Result};
use std::{
    fs::{File, OpenOptions},
    os::unix::fs::OpenOptionsExt as _,
    path::PathBuf,
    sync::Arc,
};
use tokio::sync::watch;
use uuid::Uuid;

/// Names the two streams of one run of an action; unguessable, so that they are found through the operation only.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct RunLogs(pub Uuid);

/// Which of the two.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum LogKind {
    /// Standard output.
    Stdout,
    /// Standard error.
    Stderr,
}

impl LogKind {
    /// The name of its file in an exec directory, and the end of its stream's id.
    pub fn name(self) -> &'static str {
        match self {
            Self::Stdout => "stdout",
            Self::Stderr => "stderr",
        }
    }
}

/// What has become of one output of a run.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum RunState {
    /// The log may still grow, or the command has not started.
    Open,
    /// It is complete, and this blob; `None` when it is empty.
    Stored(Option<Digest>),
    /// The run ended without storing it.
    Lost,
}

/// Both outputs of a run.
#[derive(Debug)]
pub(super) struct RunStreams {
    pub(super) instance: Instance,
    directory: PathBuf,
    states: watch::Sender<[RunState; 2]>,
}

impl RunStreams {
    /// Those of a command whose logs will lie in `directory`.
    pub(super) fn new(instance: Instance, directory: PathBuf) -> Self {
        Self { instance, directory, states: watch::Sender::new([RunState::Open; 2]) }
    }

    /// One output has its end; only the first end counts.
    pub(super) fn end(&self, kind: LogKind, end: RunState) {
        self.states.send_if_modified(|states| {
            let state = &mut states[kind as usize];
            let is_first = *state == RunState::Open;
            if is_first {
                *state = end;
            }
            is_first
        });
    }
}

/// One reader's view of one output.
#[derive(Debug)]
pub(super) struct Tail {
    run: Arc<RunStreams>,
    kind: LogKind,
    states: watch::Receiver<[RunState; 2]>,
    file: Option<Arc<File>>,
}

impl Tail {
    pub(super) fn new(run: Arc<RunStreams>, kind: LogKind) -> Self {
        let states = run.states.subscribe();
        Self { run, kind, states, file: None }
    }

    /// The output's state; a later change wakes [`Tail::changed`].
    pub(super) fn state(&mut self) -> RunState {
        self.states.borrow_and_update()[self.kind as usize]
    }

    /// Waits for another state than the last one seen.
    pub(super) async fn changed(&mut self) {
        if self.states.changed().await.is_err() {
            // The run is held by ourselves, so that this cannot be; if it were, waiting would be right.
            std::future::pending::<()>().await;
        }
    }

    /// The file, opened at the first call at which it is there.
    pub(super) async fn file(&mut self) -> Result<Option<Arc<File>>> {
        if self.file.is_none() {
            let path = self.run.directory.join(self.kind.name());
            self.file = super::blocking(move || Ok(open(&path))).await?.map(Arc::new);
        }
        Ok(self.file.clone())
    }

    /// The file, if it was ever there for this reader.
    pub(super) fn opened(&self) -> Option<Arc<File>> {
        self.file.clone()
    }
}

/// Opens a log; whatever else a command has put in its place is as good as absent.
fn open(path: &std::path::Path) -> Option<File> {
    let flags = libc::O_NOFOLLOW | libc::O_NONBLOCK;
    let file = OpenOptions::new().read(true).custom_flags(flags).open(path).ok()?;
    file.metadata().is_ok_and(|metadata| metadata.is_file()).then_some(file)
}
