//! Recovery at start: the index is filled from the files of the volume.

use super::{
    LOG,
    index::{FileId, Index, LeaseTimes},
    results, unix_seconds, uptime_seconds, volume,
};
use crate::logging::Event;
use std::time::Instant;
use volume::{Stored, Volume};

/// Fills an index with the stored files. Blocks for about a second per 500,000 files.
pub(super) fn recover(volume: &dyn Volume, limit: u64, leases: LeaseTimes, links: u64) -> Index {
    let started = Instant::now();
    let mut index = Index::with_leases(limit, leases, links);
    let is_whole = |stored: &dyn Stored| {
        volume::read_all(stored, results::MAX_FILE_BYTES).is_ok_and(|bytes| results::is_whole(&bytes))
    };
    let is_newer = |one: &FileId, other: &FileId| volume.sequence(one) > volume.sequence(other);
    let repairs = volume.recover(&is_whole, &mut |found| {
        let loser = index.recover(found.file, found.bytes, found.touched, &is_newer)?;
        index.deleted(loser.bytes);
        Some(loser)
    });
    index.finish_recovery(unix_seconds(), uptime_seconds());
    index.set_overhead(volume.overhead());
    let totals = index.totals();
    Event::info(LOG, "store_opened")
        .with("blobs", totals.blobs)
        .with("results", totals.results)
        .with("bytes", totals.used)
        .with("max_size_bytes", limit)
        .with("removed", repairs.removed)
        .with("ignored", repairs.foreign)
        .with("elapsed_ms", started.elapsed().as_millis() as u64)
        .log(format_args!("the store has {} blobs and {} action results", totals.blobs, totals.results));
    if repairs.removed + repairs.foreign + repairs.unreadable > 0 {
        Event::warn(LOG, "store_repaired")
            .with("removed", repairs.removed)
            .with("ignored", repairs.foreign)
            .with("unreadable", repairs.unreadable)
            .log(format_args!(
                "the store had unfinished, foreign or unreadable files; clients will upload lost blobs again"
            ));
    }
    index
}
