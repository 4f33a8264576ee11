//! [`KeyCache`]: caches the keys of one issuer and decides when to fetch them.
//!
//! Keys are fetched in the background, so requests rarely wait. A request waits only if there are no usable keys, or if
//! its token names an unknown key. There is a minimum pause between any two attempts, so tokens with invented keys
//! cause no additional requests. An attempt runs in a separate task, which continues if the client leaves. The
//! background task ends when the last verifier that uses the cache is dropped.

use super::{
    download::{self, FileState, KeyDocument},
    freshness::{FetchTimes, Freshness},
    keys::KeySet,
    location::JwksLocation,
};
use std::{
    path::Path,
    sync::{Arc, Mutex, MutexGuard, PoisonError, Weak},
    time::{Duration, SystemTime},
};
use tokio::{runtime::Handle, sync::watch};

/// Minimum time between two downloads.
pub(super) const DOWNLOAD_PAUSE: Duration = Duration::from_secs(60);
/// Minimum time between two checks of a file.
const FILE_PAUSE: Duration = Duration::from_secs(1);
/// How often a file is checked.
const FILE_INTERVAL: Duration = Duration::from_secs(5);
/// Maximum sleep of the background task. After this time it notices that the cache is no longer used.
const LONGEST_SLEEP: Duration = Duration::from_secs(60);

/// Logs the outcome of an attempt to fetch keys if it is new: new keys, or a new reason why there are none.
pub type KeyLog = fn(&JwksLocation, Result<&KeySet, &str>);

/// The configured source of an issuer's keys.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct KeySettings {
    /// The file or URL.
    pub location: JwksLocation,
    /// How often a URL is fetched again.
    pub refresh: Duration,
    /// How long keys are used after they were last fetched.
    pub max_stale: Duration,
}

impl KeySettings {
    fn times(&self) -> FetchTimes {
        let (refresh, pause) = match self.location {
            JwksLocation::Url(_) => (self.refresh, DOWNLOAD_PAUSE),
            JwksLocation::File(_) => (FILE_INTERVAL, FILE_PAUSE),
        };
        FetchTimes { refresh, max_stale: self.max_stale, pause }
    }
}

/// The cache; see the top of this file.
#[derive(Debug)]
pub(super) struct KeyCache {
    settings: KeySettings,
    times: FetchTimes,
    log: KeyLog,
    state: Mutex<CacheState>,
    /// Changes when an attempt has ended.
    attempts: watch::Sender<u64>,
}

#[derive(Debug, Default)]
struct CacheState {
    keys: Option<Arc<KeySet>>,
    freshness: Freshness,
    file: Option<FileState>,
    is_fetching: bool,
    /// Why the last attempt failed.
    problem: Option<String>,
}

impl KeyCache {
    /// Creates a cache whose keys are fetched in the background from now on. A file is read at once.
    ///
    /// # Errors
    /// Why the file cannot be used. A URL that does not answer is tried again later.
    pub(super) fn start(
        settings: KeySettings,
        now: SystemTime,
        runtime: &Handle,
        log: KeyLog,
    ) -> Result<Arc<Self>, String> {
        let times = settings.times();
        let state = match &settings.location {
            JwksLocation::File(path) => CacheState::read(path, now)?,
            JwksLocation::Url(_) => CacheState::default(),
        };
        let cache = Arc::new(Self {
            settings,
            times,
            log,
            state: Mutex::new(state),
            attempts: watch::Sender::default(),
        });
        runtime.spawn(keep_fresh(Arc::downgrade(&cache)));
        Ok(cache)
    }

    pub(super) fn settings(&self) -> &KeySettings {
        &self.settings
    }

    /// Returns the keys that are valid at this time. Fetches them first if there are none.
    ///
    /// # Errors
    /// Why there are none.
    pub(super) async fn current(self: &Arc<Self>, now: SystemTime) -> Result<Arc<KeySet>, String> {
        if let Some(keys) = self.serving(now) {
            return Ok(keys);
        }
        self.fetch(now).await;
        self.serving(now).ok_or_else(|| self.reason_for_no_keys())
    }

    /// Fetches the keys again, unless that was tried just now, and returns them if they are valid.
    pub(super) async fn newer(self: &Arc<Self>, now: SystemTime) -> Option<Arc<KeySet>> {
        self.fetch(now).await;
        self.serving(now)
    }

    fn serving(&self, now: SystemTime) -> Option<Arc<KeySet>> {
        let state = self.state();
        state.keys.clone().filter(|_| state.freshness.serves(&self.times, now))
    }

    fn reason_for_no_keys(&self) -> String {
        let state = self.state();
        let problem = state.problem.as_deref().unwrap_or("they were not fetched yet");
        let location = &self.settings.location;
        match state.keys {
            None => format!("there are no keys from {location}: {problem}"),
            Some(_) => format!(
                "the keys from {location} are older than {} s (max_stale): {problem}",
                self.times.max_stale.as_secs()
            ),
        }
    }

    /// Waits for the end of an attempt: the running one, or a new one if it may start.
    async fn fetch(self: &Arc<Self>, now: SystemTime) {
        let mut ended = self.attempts.subscribe();
        {
            let mut state = self.state();
            if !state.is_fetching {
                if !state.freshness.may_try(&self.times, now) {
                    return;
                }
                state.freshness.try_at(now);
                state.is_fetching = true;
                tokio::spawn(FetchAttempt(self.clone()).run(now));
            }
        }
        let _ = ended.changed().await;
    }

    fn state(&self) -> MutexGuard<'_, CacheState> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Stores the result of an attempt. Only changes are logged: a lasting problem once, and keys if there were none,
    /// after a problem, or if their file has changed.
    fn take(&self, document: Result<KeyDocument, String>, began: SystemTime) {
        let location = &self.settings.location;
        let mut state = self.state();
        match document {
            Ok(document) => {
                state.freshness.succeed(began);
                let had_problem = state.problem.take().is_some();
                if let KeyDocument::Keys(keys, file) = document {
                    let is_news = had_problem || file.is_some() || state.keys.is_none();
                    let keys = state.replace(keys, file);
                    drop(state);
                    if is_news {
                        (self.log)(location, Ok(&keys));
                    }
                }
            }
            Err(problem) if state.problem.as_ref() != Some(&problem) => {
                state.problem = Some(problem.clone());
                drop(state);
                (self.log)(location, Err(&problem));
            }
            Err(_) => {}
        }
    }
}

impl CacheState {
    fn read(path: &Path, now: SystemTime) -> Result<Self, String> {
        let mut state = Self::default();
        if let KeyDocument::Keys(keys, file) = download::read_file(path, None)? {
            state.freshness.try_at(now);
            state.freshness.succeed(now);
            state.replace(keys, file);
        }
        Ok(state)
    }

    fn replace(&mut self, keys: KeySet, file: Option<FileState>) -> Arc<KeySet> {
        self.file = file;
        self.keys.insert(Arc::new(keys)).clone()
    }
}

/// An attempt to fetch keys. On drop it notifies the waiting requests, even after a panic.
struct FetchAttempt(Arc<KeyCache>);

impl FetchAttempt {
    async fn run(self, began: SystemTime) {
        let known = self.0.state().file;
        let document = download::read(&self.0.settings.location, known).await;
        self.0.take(document, began);
    }
}

impl Drop for FetchAttempt {
    fn drop(&mut self) {
        self.0.state().is_fetching = false;
        self.0.attempts.send_modify(|ended| *ended = ended.wrapping_add(1));
    }
}

/// Fetches the keys when they are due, as long as the cache is used.
async fn keep_fresh(cache: Weak<KeyCache>) {
    while let Some(cache) = cache.upgrade() {
        if cache.state().freshness.due_in(&cache.times, SystemTime::now()).is_zero() {
            cache.fetch(SystemTime::now()).await;
        }
        let sleep = cache.state().freshness.due_in(&cache.times, SystemTime::now());
        drop(cache);
        tokio::time::sleep(sleep.clamp(Duration::from_millis(10), LONGEST_SLEEP)).await;
    }
}
