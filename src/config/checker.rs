//! [`Checker`]: collects the problems of a configuration, so that all of them are reported together.

use super::{Loaded, Machine, load::keys};
use crate::size::Size;
use gorego_reapi::error::Error;
use std::{
    fmt::Write as _,
    path::{Path, PathBuf},
    time::Duration,
};

/// Minimum configurable size. A smaller one indicates a wrong unit.
pub(super) const MIN_SIZE: Size = Size::from_bytes(1_000_000);
/// Maximum configurable duration. It keeps sums of times far from overflow.
const MAX_DURATION: Duration = Duration::from_secs(366 * 24 * 3600);

/// The configuration that is checked, and the problems that were found.
pub(super) struct Checker<'a> {
    pub(super) loaded: &'a Loaded,
    pub(super) problems: Vec<String>,
}

/// The problem of a size that is too small.
pub(super) fn size_range() -> String {
    format!("must be between {MIN_SIZE} and {}", Size::MAX)
}

impl<'a> Checker<'a> {
    pub(super) fn new(loaded: &'a Loaded) -> Self {
        Self { loaded, problems: Vec::new() }
    }

    /// All problems in one error, each on its own line.
    pub(super) fn error(&self) -> Error {
        let mut text = String::from("the configuration cannot be used:");
        for problem in &self.problems {
            // Writing to a String cannot fail.
            let _ = write!(text, "\n  {problem}");
        }
        Error::Invalid(text)
    }

    /// Notes a problem of the value of a key. The value of a key that could not be read is not the configured one.
    pub(super) fn refuse(&mut self, key: &str, problem: &str) {
        if self.loaded.unusable.contains(key) {
            return;
        }
        let value = keys(&self.loaded.config).into_iter().find(|(name, _)| name == key);
        let value = value.map(|(_, value)| value.to_string()).unwrap_or_default();
        self.problems.push(format!("{key} = {value} ({}): {problem}", self.loaded.origin(key)));
    }

    pub(super) fn require(&mut self, key: &str, holds: bool, problem: &str) {
        if !holds {
            self.refuse(key, problem);
        }
    }

    /// Whether none of these keys has a value that could not be read.
    pub(super) fn are_usable(&self, keys: &[&str]) -> bool {
        keys.iter().all(|key| !self.loaded.unusable.contains(*key))
    }

    /// Like [`Checker::require`], for a condition that depends on the values of `others` too.
    pub(super) fn require_with(&mut self, key: &str, others: &[&str], holds: bool, problem: &str) {
        self.require(key, holds || !self.are_usable(others), problem);
    }

    /// Checks a size and converts it to bytes.
    pub(super) fn size(&mut self, key: &str, size: Size) -> u64 {
        self.require(key, size >= MIN_SIZE, &size_range());
        size.bytes()
    }

    pub(super) fn count(&mut self, key: &str, count: usize, max: usize) {
        self.require(key, (1..=max).contains(&count), &format!("must be between 1 and {max}"));
    }

    pub(super) fn duration(&mut self, key: &str, duration: Duration, zero_is_fine: bool) {
        self.require(key, zero_is_fine || !duration.is_zero(), "must be more than 0");
        self.require(key, duration <= MAX_DURATION, "must not be longer than 366 days");
    }

    /// Parses a list of rules. Refuses the key if one of them is malformed.
    pub(super) fn rules<T>(
        &mut self,
        key: &str,
        texts: &[String],
        form: &str,
        parse: fn(&str) -> Option<T>,
    ) -> Vec<T> {
        let mut rules = Vec::with_capacity(texts.len());
        for text in texts {
            match parse(text) {
                Some(rule) => rules.push(rule),
                None => self.refuse(key, &format!("\"{}\" is not {form}", text.escape_debug())),
            }
        }
        rules
    }

    /// Makes a configured, non-empty path absolute.
    pub(super) fn directory(&mut self, key: &str, path: &Path, machine: &Machine) -> PathBuf {
        let text = path.to_string_lossy();
        self.require(
            key,
            text != "~" && !text.starts_with("~/"),
            "\"~\" is not expanded here; write the full path",
        );
        self.require(key, !text.contains('\0'), "contains a NUL");
        machine.current_dir.join(path)
    }
}
