//! Watches the file system of the exec directories while commands run on it.
//!
//! A command whose write failed for lack of space may still exit with 0 and leave half a file. So an action fails if
//! the disk was full while it ran, whatever its exit code; see [`crate::disk`] for what counts as full and what is not
//! detected. One thread samples for all slots, only while something runs, and stops every running command when the disk
//! is full: its result would be unusable, and its end frees space.
//!
//! [`Runs`] decides which effect a sample has on the runs. It neither samples nor stops them.

use super::cancel::CancelToken;
use crate::disk::Space;
use std::{
    collections::HashMap,
    path::PathBuf,
    sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError},
    thread,
    time::Duration,
};

/// How long to wait after a sample that failed.
const RETRY: Duration = Duration::from_millis(100);

/// Samples the disk while commands run. The thread ends when this is dropped.
#[derive(Debug)]
pub struct DiskWatch(Arc<WatchShared>);

#[derive(Debug)]
struct WatchShared {
    path: PathBuf,
    state: Mutex<WatchState>,
    begun: Condvar,
}

#[derive(Debug, Default)]
struct WatchState {
    runs: Runs,
    /// Whether the thread waits for a run to begin.
    idle: bool,
    closed: bool,
}

/// The current runs, and whether the disk was full during each.
#[derive(Debug, Default)]
struct Runs {
    last: u64,
    watched: HashMap<u64, WatchedRun>,
}

#[derive(Debug)]
struct WatchedRun {
    stop: CancelToken,
    /// The first sample that counts as full.
    full: Option<Space>,
}

impl Runs {
    fn begin(&mut self, stop: CancelToken) -> u64 {
        self.last += 1;
        self.watched.insert(self.last, WatchedRun { stop, full: None });
        self.last
    }

    /// Records a sample. A full disk fails and stops every current run.
    fn note(&mut self, sample: Space) {
        if !sample.is_exhausted() {
            return;
        }
        for run in self.watched.values_mut().filter(|run| run.full.is_none()) {
            run.full = Some(sample);
            run.stop.stop();
        }
    }

    fn end(&mut self, run: u64) -> Option<Space> {
        self.watched.remove(&run)?.full
    }
}

impl DiskWatch {
    /// Starts a watch over the file system of `path`.
    pub fn new(path: PathBuf) -> Self {
        let shared = Arc::new(WatchShared { path, state: Mutex::default(), begun: Condvar::new() });
        let sampler = shared.clone();
        // Without the thread, the disk is still sampled at the end of each run.
        let _ = thread::Builder::new().name("gorego-disk".into()).spawn(move || sampler.sample());
        Self(shared)
    }

    /// Samples the disk now.
    pub fn look(&self) -> Option<Space> {
        Space::of(&self.0.path).ok()
    }

    /// Begins to watch a run. `stop` is stopped when the disk is full.
    pub fn begin(&self, stop: CancelToken) -> RunWatch<'_> {
        let mut state = self.0.lock();
        let run = state.runs.begin(stop);
        if std::mem::take(&mut state.idle) {
            self.0.begun.notify_one();
        }
        RunWatch { watch: self, run }
    }
}

impl Drop for DiskWatch {
    fn drop(&mut self) {
        self.0.lock().closed = true;
        self.0.begun.notify_one();
    }
}

impl WatchShared {
    fn lock(&self) -> MutexGuard<'_, WatchState> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The loop of the thread.
    fn sample(&self) {
        let mut state = self.lock();
        while !state.closed {
            if state.runs.watched.is_empty() {
                state.idle = true;
                state = self.begun.wait(state).unwrap_or_else(PoisonError::into_inner);
                continue;
            }
            drop(state);
            let sample = Space::of(&self.path).ok();
            state = self.lock();
            if let Some(sample) = sample {
                state.runs.note(sample);
            }
            let pace = sample.map_or(RETRY, |sample| sample.pace());
            (state, _) = self.begun.wait_timeout(state, pace).unwrap_or_else(PoisonError::into_inner);
        }
    }
}

/// The watch over one run.
#[derive(Debug)]
pub struct RunWatch<'a> {
    watch: &'a DiskWatch,
    run: u64,
}

impl RunWatch<'_> {
    /// Ends the watch after the command, with one more sample. Returns the first sample that counted as full, if there
    /// was one.
    pub fn end(self) -> Option<Space> {
        let sample = self.watch.look();
        let mut state = self.watch.0.lock();
        if let Some(sample) = sample {
            state.runs.note(sample);
        }
        state.runs.end(self.run)
    }
}

impl Drop for RunWatch<'_> {
    fn drop(&mut self) {
        self.watch.0.lock().runs.end(self.run);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sample(free_bytes: u64) -> Space {
        Space { free_bytes, total_bytes: 1 << 30, free_inodes: 0, total_inodes: 0 }
    }

    #[test]
    fn a_full_disk_fails_and_stops_the_current_runs_but_no_others() {
        let mut runs = Runs::default();
        let tokens = [0; 3].map(|_| CancelToken::new());
        let ended = runs.begin(tokens[0].clone());
        assert_eq!(runs.end(ended), None);
        let spoilt = runs.begin(tokens[1].clone());
        runs.note(sample(1 << 29));
        assert!(!tokens[1].is_stopped());
        runs.note(sample(7));
        let later = runs.begin(tokens[2].clone());
        runs.note(sample(1 << 29));
        assert_eq!(tokens.each_ref().map(CancelToken::is_stopped), [false, true, false]);
        assert!(!tokens[1].is_cancelled(), "only the scheduler cancels");
        assert_eq!((runs.end(spoilt), runs.end(later)), (Some(sample(7)), None));
    }
}
