//! [`Local`]: the volume of the product. Small files go to [`Segments`], and the others are kept by [`Files`].
//!
//! ```text
//! <root>/v1/           files of their own; see `files`
//! <root>/segments/     small files; see `segments`
//! <root>/checksums/    checksums of files of their own; see `checksum_table`
//! ```
//!
//! Small files that an earlier version has kept on their own are read, touched and evicted where they are.

use super::{
    Compacted, Draft, Look, Moved, Moves, NewFile, Repairs, Stored, Take, Volume, WrittenFile,
    checksums::Checksums,
    durable::{GroupCommit, SyncGroup, SyncPolicy, sync_file_system},
    files::Files,
    outside::LeftFile,
    segments::{Location, Segments, Sizes, Verdict},
};
use crate::{
    actors::cas::index::{FileId, Key, Victim},
    disk::Space,
    instance::Instances,
};
use bytes::Bytes;
use gorego_reapi::{
    digest::{Digest, Hasher},
    error::Result,
};
use std::{
    io,
    path::Path,
    sync::Arc,
    time::{SystemTime, UNIX_EPOCH},
};

/// The prefix of the names of parts that are segments. No other names of parts have it.
const SEGMENTS: &str = "segments/";

/// The files of one store on a local disk.
#[derive(Debug)]
pub(crate) struct Local {
    files: Arc<Files>,
    segments: Arc<Segments>,
    commits: GroupCommit,
    policy: SyncPolicy,
}

/// A file that is being written. It stays in memory for as long as it is small.
#[derive(Debug)]
struct LocalDraft {
    small: Vec<u8>,
    large: Option<Box<dyn Draft>>,
    files: Arc<Files>,
    segments: Arc<Segments>,
}

impl Local {
    /// Opens and locks a store directory, creating it if necessary. The store takes at most `max_bytes`, or what its
    /// file system has, if that is less.
    ///
    /// # Errors
    /// The errors of [`Files::open`].
    pub(crate) fn open(
        root: &Path,
        instances: &Instances,
        max_bytes: u64,
        policy: SyncPolicy,
    ) -> Result<Self> {
        let files = Files::open(root, instances, policy)?;
        let most = files.space().map_or(u64::MAX, |space| space.most_for_store());
        Self::over(root, files, Sizes::of(max_bytes.min(most)), policy)
    }

    #[cfg(test)]
    pub(in crate::actors::cas) fn with_sizes(
        root: &Path,
        instances: &Instances,
        sizes: Sizes,
        policy: SyncPolicy,
    ) -> Result<Self> {
        Self::over(root, Files::open(root, instances, policy)?, sizes, policy)
    }

    fn over(root: &Path, files: Files, sizes: Sizes, policy: SyncPolicy) -> Result<Self> {
        let segments = Segments::open(root, files.names(), sizes, files.sequence(), policy);
        let segments =
            segments.map_err(|error| super::root::failed(root, "its segments cannot be opened", &error))?;
        if policy == SyncPolicy::BeforeAnswer {
            // Files that an earlier run has written and not synced are about to become visible.
            sync_file_system(root)
                .map_err(|error| super::root::failed(root, "it cannot be synced", &error))?;
        }
        let commits = GroupCommit::default();
        Ok(Self { files: Arc::new(files), segments: Arc::new(segments), commits, policy })
    }
}

fn write_small(segments: &Segments, key: Key, bytes: Bytes) -> io::Result<WrittenFile> {
    let pieces = [bytes];
    let written = segments.write(&[NewFile { key, pieces: &pieces }], unix_seconds());
    written.into_iter().next().unwrap_or_else(|| Err(io::ErrorKind::Other.into()))
}

fn unix_seconds() -> u32 {
    let elapsed = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    u32::try_from(elapsed.as_secs()).unwrap_or(u32::MAX)
}

impl Volume for Local {
    fn next_generation(&self) -> u64 {
        self.files.next_generation()
    }

    fn charge(&self, size: u64) -> u64 {
        if self.segments.takes(size) { Segments::charge(size) } else { self.files.charge(size) }
    }

    fn overhead(&self) -> u64 {
        self.segments.overhead().saturating_add(self.files.overhead())
    }

    fn space(&self) -> io::Result<Space> {
        self.files.space()
    }

    fn open(&self, file: &FileId) -> io::Result<Box<dyn Stored>> {
        match Location::of(file) {
            Some(at) => self.segments.read(at, file),
            None => self.files.open(file),
        }
    }

    fn look(&self, file: &FileId) -> io::Result<Look> {
        match Location::of(file) {
            Some(at) => self.segments.look(at, file),
            None => self.files.look(file),
        }
    }

    fn write(&self, files: &[NewFile<'_>]) -> Vec<io::Result<WrittenFile>> {
        let small: Vec<NewFile<'_>> =
            files.iter().filter(|file| self.segments.takes(file.size())).copied().collect();
        let mut of_small = match small.is_empty() {
            true => Vec::new(),
            false => self.segments.write(&small, unix_seconds()),
        }
        .into_iter();
        let lost = || Err(io::Error::other("a file of a batch was not written"));
        let write = |file: &NewFile<'_>| {
            if self.segments.takes(file.size()) {
                return of_small.next().unwrap_or_else(lost);
            }
            self.files.write(std::slice::from_ref(file)).pop().unwrap_or_else(lost)
        };
        files.iter().map(write).collect()
    }

    fn draft(&self) -> io::Result<Box<dyn Draft>> {
        let (files, segments) = (self.files.clone(), self.segments.clone());
        Ok(Box::new(LocalDraft { small: Vec::new(), large: None, files, segments }))
    }

    fn sync(&self, files: &[FileId]) -> io::Result<()> {
        if self.policy == SyncPolicy::Never || files.is_empty() {
            return Ok(());
        }
        let add = |group: &mut SyncGroup| {
            for file in files {
                match Location::of(file) {
                    Some(at) => group.segments.insert(at.segment()),
                    None => group.directories.insert(self.files.directory_of(file)),
                };
            }
        };
        self.commits.join(add, |group| {
            group.segments.iter().try_for_each(|number| self.segments.sync(*number))?;
            group.directories.iter().try_for_each(|directory| self.files.sync_directory(directory))
        })
    }

    fn packed_draft(&self, used: u32) -> io::Result<Box<dyn Draft>> {
        self.files.packed_draft(used)
    }

    fn adopt(&self, key: Key, left: &LeftFile<'_>) -> io::Result<Option<WrittenFile>> {
        if !self.segments.takes(left.size()) {
            return self.files.adopt(key, left);
        }
        match left.read_unchanged(key.digest)? {
            Some(bytes) => write_small(&self.segments, key, bytes).map(Some),
            None => Ok(None),
        }
    }

    fn add_checksums(&self, file: &FileId, sums: &Checksums) -> io::Result<()> {
        if Location::of(file).is_some() { Ok(()) } else { self.files.add_checksums(file, sums) }
    }

    fn delete(&self, victims: &[Victim]) -> Vec<(FileId, io::Error)> {
        let (mut records, mut files) = (Vec::new(), Vec::new());
        for victim in victims {
            match Location::of(&victim.file) {
                Some(at) => records.push((at, *victim)),
                None => files.push(*victim),
            }
        }
        let mut failures = self.files.delete(&files);
        failures.extend(self.segments.delete(&records));
        failures
    }

    fn delete_again(&self) {
        self.files.delete_again();
        self.segments.note_again();
    }

    fn touch(&self, files: &[FileId], moved: &mut dyn FnMut(Vec<Moved>)) {
        let records: Vec<Location> = files.iter().filter_map(Location::of).collect();
        if !records.is_empty() {
            self.segments.touch(records, unix_seconds());
        }
        let others = files.iter().enumerate().filter(|(_, file)| Location::of(file).is_none());
        let (places, others): (Vec<usize>, Vec<FileId>) = others.map(|(at, file)| (at, *file)).unzip();
        self.files.touch(&others, &mut |of_others| {
            let of_all = |at: &Moved| Some(Moved { at: *places.get(at.at)?, ..*at });
            moved(of_others.iter().filter_map(of_all).collect());
        });
    }

    fn sequence(&self, file: &FileId) -> u64 {
        Location::of(file).map_or(file.sequence(), |at| self.segments.sequence(at))
    }

    fn wants_compaction(&self) -> Option<super::Urgency> {
        match self.segments.verdict() {
            Verdict::Fine => None,
            Verdict::Worthwhile => Some(super::Urgency::Background),
            Verdict::Urgent => Some(super::Urgency::WritersWait),
        }
    }

    fn compact(
        &self,
        may_move: &dyn Fn(&[FileId]) -> Vec<bool>,
        relocate: &mut dyn FnMut(Moves) -> Vec<bool>,
    ) -> io::Result<Compacted> {
        self.segments.compact(may_move, relocate)
    }

    fn packed_together(&self) -> u64 {
        self.segments.records()
    }

    fn recover(&self, is_whole: &(dyn Fn(&dyn Stored) -> bool + Sync), take: Take<'_>) -> Repairs {
        let mut repairs = self.files.recover(is_whole, take);
        repairs += self.segments.recover(take);
        repairs
    }

    fn parts(&self) -> Vec<String> {
        let of_segments =
            self.segments.numbers().into_iter().map(|number| format!("{SEGMENTS}{number:012x}"));
        let mut parts = self.files.parts();
        parts.extend(of_segments);
        parts
    }

    fn files_in(&self, part: &str) -> io::Result<Vec<FileId>> {
        match part.strip_prefix(SEGMENTS) {
            Some(number) => {
                let number = u64::from_str_radix(number, 16).map_err(|_| io::ErrorKind::NotFound)?;
                self.segments.files_in(number)
            }
            None => self.files.files_in(part),
        }
    }

    fn note(&self) -> Option<String> {
        self.files.note()
    }

    fn keep_note(&self, note: &str) -> io::Result<()> {
        self.files.keep_note(note)
    }

    #[cfg(test)]
    fn place(&self, file: &FileId) -> Option<(std::path::PathBuf, u64)> {
        match Location::of(file) {
            Some(_) => self.segments.place(file),
            None => self.files.place(file),
        }
    }
}

impl Draft for LocalDraft {
    fn write(&mut self, bytes: &[u8]) -> io::Result<()> {
        if let Some(large) = &mut self.large {
            return large.write(bytes);
        }
        if self.segments.takes((self.small.len() + bytes.len()) as u64) {
            self.small.extend_from_slice(bytes);
            return Ok(());
        }
        let large = self.large.insert(self.files.draft()?);
        large.write(&std::mem::take(&mut self.small))?;
        large.write(bytes)
    }

    fn write_pieces(&mut self, pieces: &[Bytes]) -> io::Result<()> {
        match &mut self.large {
            Some(large) => large.write_pieces(pieces),
            None => pieces.iter().try_for_each(|piece| self.write(piece)),
        }
    }

    fn hash(&self, mut hasher: Hasher) -> io::Result<Digest> {
        match &self.large {
            Some(large) => large.hash(hasher),
            None => {
                hasher.update(&self.small);
                Ok(hasher.finish())
            }
        }
    }

    fn keep(self: Box<Self>, key: Key) -> io::Result<WrittenFile> {
        match self.large {
            Some(large) => large.keep(key),
            None if self.segments.takes(self.small.len() as u64) => {
                write_small(&self.segments, key, self.small.into())
            }
            // A store without segments.
            None => {
                let mut empty = self.files.draft()?;
                empty.write(&self.small)?;
                empty.keep(key)
            }
        }
    }
}
