//! [`Reloader`]: applies a new configuration while the server runs.
//!
//! The configuration is read again from the same sources as at the start, and checked as a whole: first its values,
//! then every [`Reloadable`] part, which may look at files that it names. Only then is anything changed. So an invalid
//! configuration changes nothing. Keys that no part applies need a restart; they keep their running values, and every
//! later reload says so again. A change that was checked can still fail, for example because a thread cannot be
//! started. The other changes are made all the same, the answer names both, and the next reload tries again what has
//! failed.
//!
//! One reload runs at a time. Reading and checking happen on a blocking thread; the actors only get messages.

use crate::{
    config::{Config, Loaded, Settings, load::keys},
    logging::Event,
};
use futures::{FutureExt as _, future::BoxFuture};
use gorego_reapi::error::{Error, Result};
use std::{any::Any, collections::BTreeMap, fmt, panic::AssertUnwindSafe, sync::Arc};
use tokio::{runtime::Handle, sync::Mutex};
use toml::Value;

/// Target of the log lines of this module.
const LOG: &str = "gorego::reload";
/// Event of a reload that has changed the running configuration.
const CONFIG_RELOADED: &str = "config_reloaded";
/// Event of a configuration that was refused.
const CONFIG_REFUSED: &str = "config_refused";
/// Event of a valid configuration of which a part could not be put in effect.
const CONFIG_INCOMPLETE: &str = "config_incomplete";
/// Longest value in a description, in characters.
const SHOWN_CHARS: usize = 120;

/// A part of the server that can take in new settings while it runs.
pub(crate) trait Reloadable: Send + Sync {
    /// The keys that it applies, such as `log.filter`, or sections, such as `access`, for all keys below.
    fn keys(&self) -> &'static [&'static str];

    /// Checks new settings and the files that they name, and says what would change. Changes nothing. It is called for
    /// every reload, since a file may have changed under the same name. Blocks; not called on the actors' thread.
    ///
    /// # Errors
    /// `Invalid` or `Precondition` that name the key and the value at fault.
    fn prepare(&self, next: &Settings) -> Result<Vec<PreparedChange>>;
}

/// A change that was checked.
pub(crate) struct PreparedChange {
    /// The key, or the section.
    pub(crate) key: String,
    /// What changes, for people. Without secrets.
    pub(crate) description: String,
    /// Makes the change. `None` if it needs a restart.
    pub(crate) apply: Option<BoxFuture<'static, Result<()>>>,
}

/// A key with what has changed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct KeyChange {
    pub(crate) key: String,
    pub(crate) description: String,
}

/// The outcome of a reload.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub(crate) struct Reloaded {
    /// Changes that were made.
    pub(crate) applied: Vec<KeyChange>,
    pub(crate) needs_restart: Vec<KeyChange>,
    /// Changes that failed, with the reason.
    failed: Vec<KeyChange>,
    /// Settings that are valid but may surprise.
    pub(crate) warnings: Vec<String>,
}

impl Reloaded {
    /// Fails if a change has failed.
    fn complete(self) -> Result<Self> {
        if self.failed.is_empty() {
            return Ok(self);
        }
        let failed: Vec<_> =
            self.failed.iter().map(|failed| format!("{}: {}", failed.key, failed.description)).collect();
        let changed = if self.applied.is_empty() { "nothing".to_owned() } else { named(&self.applied) };
        Err(Error::Internal(format!(
            "a part of the new configuration could not be put in effect: {}. What has changed: {changed}. The next reload tries \
             again what has failed",
            failed.join("; ")
        )))
    }
}

/// Reads the configuration from its sources.
type ReadSettings = Box<dyn Fn() -> Result<(Loaded, Settings)> + Send + Sync>;

/// Takes in a new configuration while the server runs. Cheap to clone.
#[derive(Clone)]
pub(crate) struct Reloader(Arc<ReloaderState>);

struct ReloaderState {
    load: ReadSettings,
    parts: Vec<Box<dyn Reloadable>>,
    /// The values that are in effect, by key. Held during a reload.
    running: Mutex<BTreeMap<String, Value>>,
    runtime: Handle,
}

impl fmt::Debug for Reloader {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Reloader").finish()
    }
}

impl Reloader {
    /// Reloads with `load` on `runtime`. `running` is the configuration with which the server was started.
    pub(crate) fn new(
        load: impl Fn() -> Result<(Loaded, Settings)> + Send + Sync + 'static,
        running: &Config,
        parts: Vec<Box<dyn Reloadable>>,
        runtime: Handle,
    ) -> Self {
        let running = Mutex::new(keys(running).into_iter().collect());
        Self(Arc::new(ReloaderState { load: Box::new(load), parts, running, runtime }))
    }

    /// Reads the configuration again and applies the reloadable settings. With `dry_run`, only says what would change.
    /// A reload runs to its end even if its caller has stopped waiting.
    ///
    /// # Errors
    /// `Invalid` or `Precondition` that name each key and value at fault; then nothing has changed. `Internal` if a
    /// change has failed; it also names the changes that were made.
    pub(crate) async fn reload(&self, dry_run: bool) -> Result<Reloaded> {
        let reloader = self.clone();
        let reload = self.0.runtime.spawn(async move { reloader.reload_once(dry_run).await });
        let outcome = reload.await.unwrap_or_else(|_| Err(Error::internal("the reload panicked")));
        tell(&outcome, dry_run);
        outcome.and_then(Reloaded::complete)
    }

    async fn reload_once(&self, dry_run: bool) -> Result<Reloaded> {
        let mut running = self.0.running.lock().await;
        let state = self.0.clone();
        let checked = self.0.runtime.spawn_blocking(move || state.check());
        let checked = checked.await.unwrap_or_else(|_| Err(Error::internal("the check panicked")));
        let (loaded, settings, prepared) = checked?;
        let mut outcome = Reloaded { warnings: settings.warnings, ..Reloaded::default() };
        let next: BTreeMap<String, Value> = keys(&loaded.config).into_iter().collect();
        for (key, value) in next.iter().filter(|(key, value)| running.get(*key) != Some(*value)) {
            if !self.0.is_taken_in(key) {
                let before = running.get(key).map(shown).unwrap_or_default();
                let description = format!("{before} -> {}", shown(value));
                outcome.needs_restart.push(KeyChange { key: key.clone(), description });
            }
        }
        for PreparedChange { key, description, apply } in prepared {
            let change = KeyChange { key, description };
            match apply {
                None => outcome.needs_restart.push(change),
                Some(_) if dry_run => outcome.applied.push(change),
                // A panic must not hide the changes that were made before.
                Some(apply) => match AssertUnwindSafe(apply).catch_unwind().await.unwrap_or_else(panicked) {
                    Ok(()) => outcome.applied.push(change),
                    Err(error) => {
                        outcome.failed.push(KeyChange { description: error.to_string(), ..change });
                    }
                },
            }
        }
        if !dry_run {
            running.extend(next.into_iter().filter(|(key, _)| self.0.is_taken_in(key)));
        }
        Ok(outcome)
    }
}

impl ReloaderState {
    /// Reads and checks everything. Blocks.
    fn check(&self) -> Result<(Loaded, Settings, Vec<PreparedChange>)> {
        let (loaded, settings) = (self.load)()?;
        let mut prepared = Vec::new();
        for part in &self.parts {
            prepared.extend(part.prepare(&settings)?);
        }
        Ok((loaded, settings, prepared))
    }

    /// Whether a part applies this key.
    fn is_taken_in(&self, key: &str) -> bool {
        let covers = |taken: &&str| {
            key.strip_prefix(*taken).is_some_and(|rest| rest.is_empty() || rest.starts_with('.'))
        };
        self.parts.iter().any(|part| part.keys().iter().any(covers))
    }
}

fn panicked(_: Box<dyn Any + Send>) -> Result<()> {
    Err(Error::internal("the change panicked"))
}

/// A value in a description.
fn shown(value: &Value) -> String {
    let text = value.to_string();
    match text.char_indices().nth(SHOWN_CHARS) {
        Some((end, _)) => format!("{}...", text.get(..end).unwrap_or_default()),
        None => text,
    }
}

/// The keys of changes, in one line.
fn named(changes: &[KeyChange]) -> String {
    changes.iter().map(|change| change.key.as_str()).collect::<Vec<_>>().join(", ")
}

/// Logs the outcome of a reload.
fn tell(outcome: &Result<Reloaded>, dry_run: bool) {
    match outcome {
        Ok(_) if dry_run => {}
        Ok(Reloaded { applied, needs_restart, failed, warnings }) => {
            Event::info(LOG, CONFIG_RELOADED)
                .with("applied", &*named(applied))
                .with("needs_restart", &*named(needs_restart))
                .log(format_args!("the configuration was read again"));
            for KeyChange { key, description } in failed {
                Event::error(LOG, CONFIG_INCOMPLETE)
                    .with("key", &**key)
                    .with("error", &**description)
                    .log(format_args!("{key} could not be changed; the next reload tries again"));
            }
            for warning in warnings {
                Event::warn("gorego::config", "config_warning").log(format_args!("{warning}"));
            }
        }
        Err(error) => Event::error(LOG, CONFIG_REFUSED)
            .with_shown("error", error)
            .log(format_args!("the configuration was read again and refused; nothing has changed")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::Machine;
    use std::{
        sync::{
            Mutex as SyncMutex,
            atomic::{AtomicUsize, Ordering},
        },
        time::Duration,
    };

    /// Takes in `log`. Refuses the filter "off", and fails to change to the filters "stuck" and "panics".
    #[derive(Default)]
    struct Part {
        filter: Arc<SyncMutex<String>>,
    }

    /// Takes in `shutdown_grace`, which comes after `log.filter`, and counts its changes.
    struct LaterPart(Arc<AtomicUsize>);

    impl Reloadable for LaterPart {
        fn keys(&self) -> &'static [&'static str] {
            &["shutdown_grace"]
        }

        fn prepare(&self, next: &Settings) -> Result<Vec<PreparedChange>> {
            if next.shutdown_grace == Config::default().shutdown_grace {
                return Ok(Vec::new());
            }
            let changes = self.0.clone();
            let apply = Box::pin(async move {
                changes.fetch_add(1, Ordering::Relaxed);
                Ok(())
            });
            let key = "shutdown_grace".to_owned();
            Ok(vec![PreparedChange { key, description: String::new(), apply: Some(apply) }])
        }
    }

    impl Reloadable for Part {
        fn keys(&self) -> &'static [&'static str] {
            &["log"]
        }

        fn prepare(&self, next: &Settings) -> Result<Vec<PreparedChange>> {
            let filter = next.log.filter.clone();
            if filter == "off" {
                return Err(Error::invalid("log.filter = \"off\": not here"));
            }
            let own = self.filter.clone();
            let apply = Box::pin(async move {
                if filter == "stuck" {
                    return Err(Error::internal("it is stuck"));
                }
                assert_ne!(filter, "panics");
                *own.lock().unwrap() = filter;
                Ok(())
            });
            Ok(vec![PreparedChange {
                key: "log.filter".into(),
                description: "new".into(),
                apply: Some(apply),
            }])
        }
    }

    struct Bench {
        reloader: Reloader,
        next: Arc<SyncMutex<Config>>,
        filter: Arc<SyncMutex<String>>,
        later_changes: Arc<AtomicUsize>,
    }

    fn bench() -> Bench {
        let part = Part::default();
        let filter = part.filter.clone();
        let next = Arc::new(SyncMutex::new(Config::default()));
        let source = next.clone();
        let load = move || {
            let mut loaded = Loaded::defaults();
            loaded.config = source.lock().unwrap().clone();
            let machine =
                Machine { cpus: 2, cache_home: Some("/home/u/.cache".into()), current_dir: "/".into() };
            let settings = Settings::new(&loaded, &machine)?;
            Ok((loaded, settings))
        };
        let later_changes = Arc::new(AtomicUsize::new(0));
        let parts: Vec<Box<dyn Reloadable>> =
            vec![Box::new(part), Box::new(LaterPart(later_changes.clone()))];
        let reloader = Reloader::new(load, &Config::default(), parts, Handle::current());
        Bench { reloader, next, filter, later_changes }
    }

    #[tokio::test]
    async fn what_a_part_takes_in_changes_and_the_rest_is_named_until_the_restart() {
        let bench = bench();
        {
            let mut next = bench.next.lock().unwrap();
            next.log.filter = "debug".into();
            next.cache.zstd_level = 7;
        }
        for dry_run in [true, false, false] {
            let reloaded = bench.reloader.reload(dry_run).await.unwrap();
            let keys = |changes: &[KeyChange]| changes.iter().map(|c| c.key.clone()).collect::<Vec<_>>();
            assert_eq!(keys(&reloaded.needs_restart), ["cache.zstd_level"]);
            assert_eq!(reloaded.needs_restart[0].description, "1 -> 7");
            assert_eq!(keys(&reloaded.applied), ["log.filter"]);
            assert_eq!(*bench.filter.lock().unwrap(), if dry_run { "" } else { "debug" });
        }
    }

    #[tokio::test]
    async fn a_bad_configuration_changes_nothing() {
        let bench = bench();
        bench.next.lock().unwrap().log.filter = "debug".into();
        bench.next.lock().unwrap().cache.zstd_level = 99;
        let refused = bench.reloader.reload(false).await.unwrap_err().to_string();
        assert!(refused.contains("cache.zstd_level = 99"), "{refused}");
        bench.next.lock().unwrap().cache.zstd_level = 1;
        bench.next.lock().unwrap().log.filter = "off".into();
        assert!(bench.reloader.reload(false).await.is_err());
        assert_eq!(*bench.filter.lock().unwrap(), "");
    }

    #[tokio::test]
    async fn a_change_that_fails_is_named_and_the_others_are_made() {
        let bench = bench();
        bench.next.lock().unwrap().shutdown_grace = Duration::from_secs(7);
        for (at, (filter, problem)) in
            [("stuck", "log.filter: it is stuck"), ("panics", "log.filter: the change panicked")]
                .into_iter()
                .enumerate()
        {
            bench.next.lock().unwrap().log.filter = filter.into();
            let failed = bench.reloader.reload(false).await.unwrap_err();
            let text = failed.to_string();
            assert!(matches!(failed, Error::Internal(_)), "{failed:?}");
            for part in [problem, "What has changed: shutdown_grace."] {
                assert!(text.contains(part), "{part} is not in {text}");
            }
            assert_eq!(bench.later_changes.load(Ordering::Relaxed), at + 1);
        }
        bench.next.lock().unwrap().log.filter = "debug".into();
        assert_eq!(bench.reloader.reload(false).await.unwrap().applied.len(), 2);
        assert_eq!(*bench.filter.lock().unwrap(), "debug");
    }

    #[tokio::test]
    async fn a_part_takes_in_its_keys_and_those_below_and_no_others() {
        let state = bench().reloader.0;
        for (key, is_taken_in) in [
            ("log", true),
            ("log.filter", true),
            ("logs", false),
            ("log_streams.enabled", false),
            ("lo", false),
        ] {
            assert_eq!(state.is_taken_in(key), is_taken_in, "{key}");
        }
    }
}
