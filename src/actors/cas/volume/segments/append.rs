//! Appends records to the open segment. A new segment is created when it is full, or when another process has
//! removed or replaced its file.

use super::{
    Segments,
    record::Location,
    segment::{self, Addition, Segment},
    table::Head,
};
use crate::actors::cas::volume::{
    durable::{SyncPolicy, sync_directory, sync_file},
    paths::again_with_directory,
};
use std::{
    fs::{self, File, OpenOptions},
    io,
    os::unix::fs::{FileExt as _, MetadataExt as _, OpenOptionsExt as _},
    path::Path,
    sync::{Arc, PoisonError, atomic::Ordering::Relaxed},
};
use uuid::Uuid;

/// A segment that is open, with its file.
#[derive(Debug)]
pub(super) struct Appended {
    pub(super) segment: Arc<Segment>,
    file: Arc<File>,
    head: Head,
    head_bytes: u64,
}

impl Appended {
    /// Whether its path still leads to this file, with a head. The next start would not find what is written to a file
    /// that another process has removed, replaced or emptied.
    fn is_in_place(&self, path: &Path) -> bool {
        let (Ok(open), Ok(there)) = (self.file.metadata(), fs::symlink_metadata(path)) else { return false };
        (open.dev(), open.ino()) == (there.dev(), there.ino()) && open.len() >= self.head_bytes
    }
}

impl Segments {
    /// Appends records. `announce` receives their locations before they are written. An error of `announce` ends the
    /// write.
    pub(super) fn append(
        &self,
        additions: &[Addition<'_>],
        announce: impl FnOnce(&[Location]) -> io::Result<()>,
    ) -> io::Result<Vec<Location>> {
        let (target, at) = self.reserve(additions)?;
        let mut offset = at;
        let place = |addition: &Addition<'_>| {
            let slot = segment::slot_at(offset);
            offset += addition.bytes();
            Location { segment: target.segment.number, slot }
        };
        let locations: Vec<Location> = additions.iter().map(place).collect();
        let announced = announce(&locations);
        let written = announced.and_then(|()| target.segment.write(&target.file, at, additions));
        if written.is_err() {
            let slots = locations.iter().map(|location| location.slot).collect();
            self.bury_failed(&target.segment, slots);
        }
        let failed = if written.is_ok() { &[] } else { additions };
        let (is_last, before, after) = target.segment.written(at, failed);
        self.count((before, after));
        if is_last {
            self.finish(&target);
        }
        written.map(|()| locations)
    }

    /// Reserves a range in the open segment, or in a new one.
    fn reserve(&self, additions: &[Addition<'_>]) -> io::Result<(Arc<Appended>, u64)> {
        let mut full = None;
        let reserved = {
            let mut head = self.head.lock().unwrap_or_else(PoisonError::into_inner);
            if let Some(open) = head.as_ref() {
                let is_in_place = open.is_in_place(&self.segment_path(open.segment.number));
                let place =
                    if is_in_place { open.segment.reserve(additions, self.sizes.segment) } else { None };
                if let Some((at, before, after)) = place {
                    self.count((before, after));
                    return Ok((open.clone(), at));
                }
                full = head.take().filter(|open| open.segment.close());
            }
            self.create().and_then(|new| {
                let new = head.insert(Arc::new(new));
                let (at, before, after) = new
                    .segment
                    .reserve(additions, u64::MAX)
                    .ok_or_else(|| io::Error::other("a new segment is full"))?;
                self.count((before, after));
                Ok((new.clone(), at))
            })
        };
        if let Some(full) = full {
            self.finish(&full);
        }
        reserved
    }

    /// Creates the next segment.
    fn create(&self) -> io::Result<Appended> {
        let number = self.next_number.fetch_add(1, Relaxed);
        let (nonce, _) = Uuid::new_v4().as_u64_pair();
        let head = Head { number, nonce, names: self.names.clone() };
        let path = self.segment_path(number);
        let file = again_with_directory(&path, || {
            OpenOptions::new().read(true).write(true).create_new(true).mode(0o644).open(&path)
        })?;
        let bytes = head.encode();
        let written = file.write_all_at(&bytes, 0).and_then(|()| match self.policy {
            SyncPolicy::Never => Ok(()),
            SyncPolicy::BeforeAnswer => sync_directory(&self.directory),
        });
        if let Err(error) = written {
            let _ = fs::remove_file(&path);
            return Err(error);
        }
        let head_bytes = bytes.len() as u64;
        let segment = Arc::new(Segment::open(&head, head_bytes, self.instances.clone()));
        let file = Arc::new(file);
        self.add(segment.clone());
        self.open.add(number, file.clone());
        Ok(Appended { segment, file, head, head_bytes })
    }

    /// Completes a segment that has no more writers.
    pub(super) fn finish(&self, full: &Appended) {
        let is_synced = self.policy == SyncPolicy::Never || sync_file(&full.file).is_ok();
        // The table makes the records count as written.
        let (is_gone, before, after) = full.segment.finish(&full.file, &full.head, is_synced);
        self.count((before, after));
        if is_gone {
            self.remove(full.segment.number);
        }
    }
}
