//! The streams of a run: the location of its log files, and their final state.
//!
//! The run itself causes no copies and no open files here. While the command runs, a reader opens the file itself
//! ([`Tail`]); an open file outlives the exec directory. Afterwards the stream is the blob that the worker stored.

use crate::{access::principal::Principal, instance::Instance};
use gorego_reapi::{digest::Digest, error::Result};
use std::{
    fs::{File, OpenOptions},
    os::unix::fs::OpenOptionsExt as _,
    path::PathBuf,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};
use tokio::sync::watch;
use uuid::Uuid;

/// The id of the two streams of one run. It cannot be guessed, so streams are found only through their operation.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct RunLogs(pub Uuid);

/// One of the two outputs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum LogKind {
    /// What the command writes to its standard output.
    Stdout,
    /// What the command writes to its standard error.
    Stderr,
}

impl LogKind {
    /// The name of its file in the exec directory, and the suffix of the stream's id.
    pub fn name(self) -> &'static str {
        match self {
            Self::Stdout => "stdout",
            Self::Stderr => "stderr",
        }
    }
}

/// The state of one output of a run.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum RunState {
    /// The log may still grow, or the command has not started.
    Open,
    /// The log is complete and stored as this blob; `None` when it is empty.
    Stored(Option<Digest>),
    /// The run ended without storing the log.
    Lost,
}

/// Both outputs of a run.
#[derive(Debug)]
pub(super) struct RunStreams {
    pub(super) instance: Instance,
    directory: PathBuf,
    states: watch::Sender<[RunState; 2]>,
    /// The clients that were told the names, because their operations wait for the run.
    told: Mutex<Vec<Principal>>,
}

/// Maximum number of clients that are remembered for one run.
const TOLD_MAX: usize = 256;

impl RunStreams {
    /// The outputs of a command that will write its logs to `directory`.
    pub(super) fn new(instance: Instance, directory: PathBuf) -> Self {
        let states = watch::Sender::new([RunState::Open; 2]);
        Self { instance, directory, states, told: Mutex::default() }
    }

    /// Records that a client was told the names.
    pub(super) fn tell(&self, principal: &Principal) {
        let mut told = self.told();
        if told.len() < TOLD_MAX && !told.iter().any(|known| known.is_same(principal)) {
            told.push(principal.clone());
        }
    }

    /// Whether a client was told the names.
    pub(super) fn was_told(&self, principal: &Principal) -> bool {
        self.told().iter().any(|known| known.is_same(principal))
    }

    fn told(&self) -> MutexGuard<'_, Vec<Principal>> {
        self.told.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Sets the final state of one output. Only the first call has an effect.
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

/// A reader's view of one output.
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

    /// The state of the output. A later change wakes [`Tail::changed`].
    pub(super) fn state(&mut self) -> RunState {
        self.states.borrow_and_update()[self.kind as usize]
    }

    /// Waits until the state differs from the one last seen.
    pub(super) async fn changed(&mut self) {
        if self.states.changed().await.is_err() {
            // Unreachable, because the tail holds the run. Waiting would be correct.
            std::future::pending::<()>().await;
        }
    }

    /// The file. It is opened by the first call after it was created.
    pub(super) async fn file(&mut self) -> Result<Option<Arc<File>>> {
        if self.file.is_none() {
            let path = self.run.directory.join(self.kind.name());
            self.file = super::blocking(move || Ok(open(&path))).await?.map(Arc::new);
        }
        Ok(self.file.clone())
    }

    /// The file, if this reader has opened it.
    pub(super) fn opened(&self) -> Option<Arc<File>> {
        self.file.clone()
    }
}

/// Opens a log file. Anything else that a command has put in its place counts as absent.
fn open(path: &std::path::Path) -> Option<File> {
    let flags = libc::O_NOFOLLOW | libc::O_NONBLOCK;
    let file = OpenOptions::new().read(true).custom_flags(flags).open(path).ok()?;
    file.metadata().is_ok_and(|metadata| metadata.is_file()).then_some(file)
}
