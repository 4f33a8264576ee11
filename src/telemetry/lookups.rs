//! [`LookupMetrics`]: the answers of the action cache, by instance and mnemonic.
//!
//! Clients choose mnemonics, so their number and form are bounded: the first [`MNEMONICS_MAX`] texts that look like a
//! mnemonic get separate series, and all others are counted as `other`. The same holds for instances beyond
//! [`INSTANCES_MAX`]. A client that fills the table with invented names makes the numbers less detailed; it has no
//! other effect.

use prometheus_client::{
    metrics::{counter::Counter, family::Family},
    registry::Registry,
};
use std::{
    borrow::Cow,
    collections::HashMap,
    sync::{Arc, OnceLock, PoisonError, RwLock},
};

/// Maximum number of instances with separate series.
pub(super) const INSTANCES_MAX: usize = 32;
/// Maximum number of mnemonics with separate series. Bazel has about fifty for the rules of all common languages.
pub(super) const MNEMONICS_MAX: usize = 64;
/// Maximum length in bytes of a mnemonic with a separate series.
const MNEMONIC_MAX_BYTES: usize = 64;

/// The value for mnemonics and instances without a separate series.
const OTHER: &str = "other";
/// The value for requests that name no mnemonic.
const NONE: &str = "none";

type LookupLabels = [(&'static str, Cow<'static, str>); 3];

/// The answers of the action cache. Cheap to clone.
#[derive(Debug, Clone)]
pub struct LookupMetrics(Arc<LookupTable>);

#[derive(Debug)]
struct LookupTable {
    family: Family<LookupLabels, Counter>,
    /// The columns of the known mnemonics, from 0.
    mnemonics: RwLock<HashMap<Box<str>, usize>>,
    /// Rows of [`COLUMNS`] cells: one row for each instance, and one for all other instances.
    cells: Vec<LookupCounters>,
}

/// The counters of hits and misses. They are created at the first look-up.
type LookupCounters = OnceLock<[Counter; 2]>;

/// The known mnemonics, [`OTHER`] and [`NONE`].
const COLUMNS: usize = MNEMONICS_MAX + 2;

impl LookupMetrics {
    pub(super) fn register(registry: &mut Registry) -> Self {
        let family = Family::<LookupLabels, Counter>::default();
        let help = "Look-ups of action results, by outcome";
        registry.register("action_cache_lookups", help, family.clone());
        let cells = (0..(INSTANCES_MAX + 1) * COLUMNS).map(|_| LookupCounters::new()).collect();
        Self(Arc::new(LookupTable { family, mnemonics: RwLock::default(), cells }))
    }

    /// Counts a look-up in the instance with this number and name, for an action with this mnemonic.
    pub fn count(&self, (number, name): (usize, &str), mnemonic: &str, is_hit: bool) {
        let table = &*self.0;
        let (row, name) = if number < INSTANCES_MAX { (number, name) } else { (INSTANCES_MAX, OTHER) };
        let (column, mnemonic) = table.column(mnemonic);
        let Some(cell) = table.cells.get(row * COLUMNS + column) else { return };
        let [hits, misses] = cell.get_or_init(|| {
            ["hit", "miss"].map(|result| {
                table.family.get_or_create_owned(&[
                    ("instance_name", name.to_owned().into()),
                    ("mnemonic", mnemonic.to_owned().into()),
                    ("result", result.into()),
                ])
            })
        });
        if is_hit {
            hits.inc()
        } else {
            misses.inc()
        };
    }
}

impl LookupTable {
    /// The column of a mnemonic, and its name in the text.
    fn column<'a>(&self, mnemonic: &'a str) -> (usize, &'a str) {
        const IS_OTHER: (usize, &str) = (MNEMONICS_MAX, OTHER);
        if mnemonic.is_empty() {
            return (MNEMONICS_MAX + 1, NONE);
        }
        let known = self.mnemonics.read().unwrap_or_else(PoisonError::into_inner);
        if let Some(column) = known.get(mnemonic) {
            return (*column, mnemonic);
        }
        if known.len() >= MNEMONICS_MAX || !is_mnemonic(mnemonic) {
            return IS_OTHER;
        }
        drop(known);
        let mut known = self.mnemonics.write().unwrap_or_else(PoisonError::into_inner);
        let next = known.len();
        match known.get(mnemonic) {
            Some(column) => (*column, mnemonic),
            None if next >= MNEMONICS_MAX => IS_OTHER,
            None => {
                known.insert(mnemonic.into(), next);
                (next, mnemonic)
            }
        }
    }
}

/// Whether a text looks like a mnemonic, such as `CppCompile`. The names of the table's own columns do not.
fn is_mnemonic(text: &str) -> bool {
    let is_usual = |byte: u8| byte.is_ascii_alphanumeric() || b"_-.+:".contains(&byte);
    text.len() <= MNEMONIC_MAX_BYTES && text.bytes().all(is_usual) && ![OTHER, NONE].contains(&text)
}

impl Default for LookupMetrics {
    /// Counters that are not part of a text.
    fn default() -> Self {
        Self::register(&mut Registry::default())
    }
}
