//! The scenarios: the work of one call, and the blobs that must be stored on the server before it.

mod blobs;
mod bound;
mod cache;
mod execute;
mod streams;

use crate::{Target, drive::Workload, limits};
pub(crate) use bound::Bound;
use futures::future::BoxFuture;
use gorego_reapi::error::{Error, Result};
use std::fmt;

/// Sets a scenario up on a server, for this many callers.
type Start = for<'a> fn(&'a Target, usize) -> BoxFuture<'a, Result<Box<dyn Workload>>>;

/// A kind of call that can be measured.
pub struct Scenario {
    /// Its name on the command line.
    pub name: &'static str,
    /// What one call does.
    pub about: &'static str,
    /// The unit that is counted besides calls.
    pub unit: &'static str,
    /// Usual number of concurrent callers.
    pub callers: usize,
    /// The limit of the machine that its rate is compared with.
    pub(crate) bound: Option<Bound>,
    start: Start,
}

impl fmt::Debug for Scenario {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.debug_tuple("Scenario").field(&self.name).finish()
    }
}

impl Scenario {
    /// Name of the limit of the machine that its rate is compared with.
    pub fn limit(&self) -> Option<&'static str> {
        self.bound.as_ref().map(|bound| bound.kind.name)
    }

    pub(crate) async fn start(&self, target: &Target, callers: usize) -> Result<Box<dyn Workload>> {
        (self.start)(target, callers).await
    }
}

macro_rules! scenario {
    ($name:literal, $callers:literal, $unit:literal, $bound:expr, $start:path, $about:literal) => {
        Scenario {
            name: $name,
            about: $about,
            unit: $unit,
            callers: $callers,
            bound: $bound,
            start: |target, callers| Box::pin($start(target, callers)),
        }
    };
}

static ALL: &[Scenario] = &[
    scenario!(
        "capabilities",
        8,
        "calls",
        Bound::calls(&limits::UNARY),
        cache::capabilities,
        "GetCapabilities, the cheapest call there is"
    ),
    scenario!(
        "find-missing",
        8,
        "digests",
        Bound::calls(&limits::FIND_MISSING),
        blobs::find_missing,
        "FindMissingBlobs with 1,000 digests, half of them stored"
    ),
    scenario!(
        "batch-update",
        8,
        "blobs",
        Bound::content(&limits::HASH_SMALL),
        blobs::batch_update,
        "BatchUpdateBlobs with 100 new blobs of 4 KiB"
    ),
    scenario!(
        "batch-read",
        8,
        "blobs",
        Bound::calls(&limits::BATCH_READ),
        blobs::batch_read,
        "BatchReadBlobs with 100 of 2,000 blobs of 4 KiB"
    ),
    scenario!(
        "write-small",
        32,
        "blobs",
        Bound::calls(&limits::WRITE_SMALL),
        streams::write_small,
        "ByteStream.Write of a new blob of 4 KiB"
    ),
    scenario!(
        "read-small",
        32,
        "blobs",
        Bound::calls(&limits::READ_SMALL),
        streams::read_small,
        "ByteStream.Read of one of 2,000 blobs of 4 KiB"
    ),
    scenario!(
        "write-large",
        2,
        "blobs",
        Bound::content(&limits::WRITE_LARGE),
        streams::write_large,
        "ByteStream.Write of a new blob of 64 MiB, in messages of 1 MiB"
    ),
    scenario!(
        "read-large",
        2,
        "blobs",
        Bound::content(&limits::READ_LARGE),
        streams::read_large,
        "ByteStream.Read of a blob of 64 MiB"
    ),
    scenario!(
        "read-zstd",
        2,
        "blobs",
        Bound::content(&limits::READ_ZSTD),
        streams::read_zstd,
        "the same for a compressible blob, as a zstd stream; MB/s of content"
    ),
    scenario!(
        "cache-hit",
        32,
        "results",
        Bound::calls(&limits::UNARY),
        cache::hit,
        "GetActionResult of one of 1,000 results with three outputs"
    ),
    scenario!(
        "cache-miss",
        32,
        "results",
        Bound::calls(&limits::UNARY),
        cache::miss,
        "GetActionResult of an action that has no result"
    ),
    scenario!(
        "cache-update",
        32,
        "results",
        Bound::calls(&limits::UNARY),
        cache::update,
        "UpdateActionResult of a new action, with three stored outputs"
    ),
    scenario!(
        "execute",
        1,
        "actions",
        Bound::calls(&limits::SPAWN),
        execute::plain,
        "Execute of /bin/true, not cached, one at a time"
    ),
    scenario!(
        "execute-parallel",
        64,
        "actions",
        Bound::calls(&limits::SPAWN_ALL),
        execute::plain,
        "the same, 64 at once"
    ),
    scenario!(
        "execute-cached",
        32,
        "actions",
        Bound::calls(&limits::UNARY),
        execute::cached,
        "Execute of an action whose result is cached"
    ),
    scenario!(
        "execute-tree",
        2,
        "actions",
        Bound::calls(&limits::SPAWN_ALL),
        execute::tree,
        "Execute of /bin/true with 1,000 input files in 50 directories"
    ),
    scenario!(
        "execute-tree-changed",
        2,
        "actions",
        Bound::calls(&limits::SPAWN_ALL),
        execute::changed_tree,
        "the same, and one file differs in each action"
    ),
    scenario!(
        "execute-outputs",
        1,
        "actions",
        Bound::calls_of(execute::OUTPUTS, &limits::CREATE),
        execute::outputs,
        "Execute of a command that writes 200 files of 4 KiB"
    ),
    scenario!(
        "execute-identical",
        64,
        "actions",
        None,
        execute::identical,
        "Execute of one action by 16 clients at the same time; it runs once"
    ),
    scenario!(
        "execute-queue",
        1000,
        "actions",
        Bound::calls(&limits::SPAWN_ALL),
        execute::plain,
        "Execute of /bin/true by 1,000 clients, most of which wait in the queue"
    ),
];

/// All scenarios, in their usual order.
pub fn scenarios() -> impl Iterator<Item = &'static Scenario> {
    ALL.iter()
}

/// The scenarios with these names; all if there are none.
///
/// # Errors
/// `Invalid` for an unknown name.
pub fn find(names: &[String]) -> Result<Vec<&'static Scenario>> {
    if names.is_empty() {
        return Ok(ALL.iter().collect());
    }
    let find = |name: &String| {
        ALL.iter().find(|scenario| scenario.name == name).ok_or_else(|| {
            let known: Vec<_> = ALL.iter().map(|scenario| scenario.name).collect();
            let name = name.escape_debug();
            Error::Invalid(format!("there is no scenario \"{name}\"; the scenarios are {}", known.join(", ")))
        })
    };
    names.iter().map(find).collect()
}

/// A random seed, so that blobs that are meant to be new really are new to the server.
fn seed() -> u64 {
    uuid::Uuid::new_v4().as_u64_pair().0
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_unique_and_found_and_all_but_one_have_a_limit() {
        let mut names: Vec<_> = scenarios().map(|scenario| scenario.name).collect();
        assert_eq!(find(&[]).unwrap().len(), names.len());
        assert_eq!(find(&["cache-hit".into()]).unwrap()[0].name, "cache-hit");
        let error = find(&["cache-hits".into()]).unwrap_err().to_string();
        assert!(error.contains("cache-hits") && error.contains("execute-tree"), "{error}");
        let unbounded: Vec<_> =
            scenarios().filter(|scenario| scenario.limit().is_none()).map(|scenario| scenario.name).collect();
        // Its command sleeps, so no limit of the machine bounds its rate.
        assert_eq!(unbounded, ["execute-identical"]);
        names.sort_unstable();
        names.dedup();
        assert_eq!(names.len(), scenarios().count());
    }
}
