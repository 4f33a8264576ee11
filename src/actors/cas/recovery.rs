//! Recovery at start: the index is filled from the files of the volume.

use super::{
    LOG,
    index::{FileId, Index, LeaseTimes, Recovery},
    results, unix_seconds, uptime_seconds, volume,
};
use crate::{disk::Space, logging::Event, size::Size};
use std::{cmp::Reverse, thread, time::Instant};
use volume::{Stored, Volume};

/// Fills an index with the stored files. Blocks for about a second for 500,000 files of their own or for several
/// million records.
pub(super) fn recover(volume: &dyn Volume, limit: u64, leases: LeaseTimes, links: u64) -> Index {
    let started = Instant::now();
    let found = Recovery::new(limit, leases, links);
    let is_whole = |stored: &dyn Stored| {
        volume::read_all(stored, results::MAX_FILE_BYTES).is_ok_and(|bytes| results::is_whole(&bytes))
    };
    // Compaction copies a record with its sequence number. After a power cut, both may be there, and only the original
    // is known to be whole. It has the smaller generation, because it is in an earlier segment.
    let rank = |file: &FileId| (volume.sequence(file), Reverse(file.generation));
    let is_newer = |one: &FileId, other: &FileId| rank(one) > rank(other);
    let repairs = volume.recover(&is_whole, &|files| found.add(files));
    let (mut index, losers) = found.finish(&at_once, &is_newer, unix_seconds(), uptime_seconds());
    // A file that cannot be deleted now is found again at the next start, and is again not chosen.
    volume.delete(&losers);
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
    if let Ok(Space { total_bytes, .. }) = volume.space()
        && (1..limit).contains(&total_bytes)
    {
        Event::warn(LOG, "store_larger_than_disk")
            .with("max_size_bytes", limit)
            .with("disk_bytes", total_bytes)
            .log(format_args!(
                "max_size_gb is {}, but the file system of the store has only {}: the store takes what other programs \
                 leave of it; lower max_size_gb",
                Size::from_bytes(limit).rounded(),
                Size::from_bytes(total_bytes).rounded()
            ));
    }
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

/// Runs each job on a thread of its own. If a job panics, this panics, too, because entries would be missing from the
/// index.
fn at_once(jobs: usize, job: &(dyn Fn(usize) + Sync)) {
    thread::scope(|scope| (0..jobs).for_each(|number| _ = scope.spawn(move || job(number))));
}
