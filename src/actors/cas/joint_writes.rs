//! [`JointWrites`]: small files of different requests that are written together.
//!
//! Storing a file takes three steps: the actor reserves room, a blocking thread writes the file, and the actor makes it
//! visible. For a small file, waking threads between these steps costs more than the steps. So the first file starts a
//! job on a blocking thread. Files that arrive while the job works wait for its next turn, and share one reservation,
//! one write and one commit. From its second turn on, a job reserves room for later turns, too.
//!
//! Invariants:
//! - There is at most one job. It ends when no file waits, and gives unused room back. If it panics, the waiting files
//!   fail, and the next file starts another job.
//! - If there is no room for a file, or it cannot be written, only this file fails. If files cannot be synced to the
//!   disk, the files of one build in this turn fail.
//!
//! Bounds: a file has at most [`JOINT_FILE_BYTES`], a result at most [`JOINT_LINKS`], and a turn at most
//! [`FILES_PER_TURN`] files. The bytes that wait are charged to a budget ([`super::uploads::small`]).

use super::{
    client::{Cas, going_down},
    guards::Reservation,
    index::{EntryKind, FileId, Key},
    linking::NewResult,
    new_files::{NewFiles, Visible},
    settings::{CHANGES_PER_HOLD, FILES_PER_COMMIT, MAX_LINKS, ROOM_STEP_BYTES, RUN_ROOM_PART},
    volume::NewFile,
};
use crate::{budget::Share, caller::Owner};
use bytes::Bytes;
use gorego_reapi::error::{Error, Result};
use std::{
    io,
    sync::{Mutex, MutexGuard, PoisonError},
};
use tokio::sync::oneshot;

/// The largest file that is written jointly. Writing a larger one costs more than waking the threads.
pub(super) const JOINT_FILE_BYTES: u64 = 64 * 1024;
/// Largest number of files in one turn. The index is changed for all of them in one step.
const FILES_PER_TURN: usize = CHANGES_PER_HOLD;
// A result is linked in the last step of a commit. It is visible then only if a turn is one step.
const _: () = assert!(FILES_PER_TURN <= FILES_PER_COMMIT);
/// The most blobs of a result that is written jointly. All results of a turn together have no more than the largest one
/// that is linked.
pub(super) const JOINT_LINKS: usize = MAX_LINKS / FILES_PER_TURN;

/// A small file whose content was checked.
#[derive(Debug)]
pub(super) struct SmallFile {
    pub key: Key,
    pub content: Bytes,
    /// The result, if this is the file of a result whose blobs are all known.
    pub result: Option<Box<dyn NewResult>>,
}

/// Files that wait to be written; see the module documentation.
#[derive(Debug, Default)]
pub(super) struct JointWrites(Mutex<WaitingFiles>);

#[derive(Debug, Default)]
struct WaitingFiles {
    waiting: Vec<WaitingFile>,
    /// Whether there is a job.
    is_served: bool,
}

#[derive(Debug)]
struct WaitingFile {
    key: Key,
    content: [Bytes; 1],
    result: Option<Box<dyn NewResult>>,
    lessee: Option<Owner>,
    /// Memory for the bytes of this file and of the files that arrived with it.
    _memory: Option<Share>,
    answer: oneshot::Sender<Result<FileId>>,
}

impl JointWrites {
    fn queue(&self) -> MutexGuard<'_, WaitingFiles> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Adds files. Returns whether the caller has to start the job.
    fn add(&self, files: Vec<WaitingFile>) -> bool {
        let mut queue = self.queue();
        queue.waiting.extend(files);
        !std::mem::replace(&mut queue.is_served, true)
    }

    /// The files of the next turn. If there are none, the job ends.
    fn next_turn(&self) -> Vec<WaitingFile> {
        let mut queue = self.queue();
        queue.is_served = !queue.waiting.is_empty();
        let files = queue.waiting.len().min(FILES_PER_TURN);
        queue.waiting.drain(..files).collect()
    }
}

impl Cas {
    /// Stores small files. Returns once they are visible to all requests; each has its own outcome. They are
    /// written even if the caller does not wait. `memory` is kept until then.
    ///
    /// # Errors
    /// `Exhausted` when there is no room; `DiskFull` or `Internal` when a file cannot be written; `Unavailable` when
    /// the server is shutting down.
    pub(super) async fn write_jointly(
        &self,
        files: Vec<SmallFile>,
        mut memory: Option<Share>,
    ) -> Vec<Result<FileId>> {
        let waiting = |SmallFile { key, content, result }| {
            let (answer, answered) = oneshot::channel();
            let (lessee, _memory) = (self.lessee(), memory.take());
            (WaitingFile { key, content: [content], result, lessee, _memory, answer }, answered)
        };
        let (files, answers): (Vec<_>, Vec<_>) = files.into_iter().map(waiting).unzip();
        if !files.is_empty() && self.shared().joint_writes.add(files) {
            let job = JointJob::new(self.clone());
            self.shared().runtime.spawn_blocking(move || job.run());
        }
        let mut outcomes = Vec::with_capacity(answers.len());
        for answered in answers {
            outcomes.push(answered.await.unwrap_or_else(|_| Err(going_down())));
        }
        outcomes
    }
}

/// The job that writes files until none waits.
struct JointJob {
    cas: Cas,
    /// Room for later turns.
    room: Reservation,
    /// Whether the job has had a turn.
    has_begun: bool,
    /// Whether the job has ended because no file waited. Another job may have begun since.
    is_over: bool,
}

impl JointJob {
    fn new(cas: Cas) -> Self {
        let room = Reservation::new(cas.actor().clone(), 0);
        Self { cas, room, has_begun: false, is_over: false }
    }

    fn run(mut self) {
        while !self.is_over {
            let files = self.cas.shared().joint_writes.next_turn();
            self.is_over = files.is_empty();
            if !self.is_over {
                self.write(files);
                self.has_begun = true;
            }
        }
    }

    /// Room for this many bytes. If several turns follow one another, more files are expected, and more room is
    /// reserved.
    fn take_room(&mut self, bytes: u64) -> Result<Reservation> {
        let lacking = bytes.saturating_sub(self.room.bytes());
        let step = ROOM_STEP_BYTES.min(self.cas.shared().settings.max_bytes / RUN_ROOM_PART);
        let wanted = if self.has_begun && lacking > 0 { lacking.max(step) } else { lacking };
        let more = self.cas.block_on(async |cas| match cas.take_room(wanted).await {
            Err(Error::Exhausted { .. }) if wanted > lacking => cas.take_room(lacking).await,
            room => room,
        })?;
        self.room.absorb(more);
        Ok(self.room.split(bytes))
    }

    /// Writes files and makes them visible.
    fn write(&mut self, mut files: Vec<WaitingFile>) {
        let bytes = files.iter().map(|file| self.charge(file)).sum();
        let mut room = match self.take_room(bytes) {
            Ok(room) => room,
            Err(_) if files.len() > 1 => return files.into_iter().for_each(|file| self.write(vec![file])),
            Err(error) => return answer(files, |_| Err(error.clone())),
        };
        let cas = &self.cas;
        let runtime = &cas.shared().runtime;
        files.sort_by_key(|file| file.lessee);
        let mut stored = Vec::with_capacity(files.len());
        let mut batches = Vec::new();
        for group in files.chunk_by_mut(|one, other| one.lessee == other.lessee) {
            let room = room.split(group.iter().map(|file| self.charge(file)).sum());
            let lessee = group.first().and_then(|file| file.lessee);
            let mut new = NewFiles::new(cas.actor(), cas.shared(), room).leased_to(lessee);
            let contents: Vec<_> =
                group.iter().map(|file| NewFile { key: file.key, pieces: &file.content }).collect();
            let written = new.write_all(&contents);
            for (file, written) in group.iter_mut().zip(&written) {
                if let (Some(result), Ok(id)) = (file.result.take(), written) {
                    new.link(result.written(*id, cas.shared()));
                }
            }
            stored.extend(written.into_iter().map(|written| (written, batches.len())));
            batches.push(new);
        }
        let commits = NewFiles::commit_all(batches);
        let wait =
            |commit: Option<Visible>| commit.map_or(Ok(()), |visible| runtime.block_on(visible.wait()));
        let visible: Vec<Result<()>> = commits.into_iter().map(wait).collect();
        let mut stored = stored.into_iter();
        answer(files, |file| {
            let not_written = || (Err(io::Error::other("it was not written")), 0);
            let (written, commit) = stored.next().unwrap_or_else(not_written);
            let id = written.map_err(|error| failed(&file.key, &error))?;
            visible.get(commit).cloned().unwrap_or(Ok(())).map(|()| id)
        });
    }

    /// Bytes that a file takes on disk.
    fn charge(&self, file: &WaitingFile) -> u64 {
        self.cas.shared().volume.charge(file.content.iter().map(|piece| piece.len() as u64).sum())
    }
}

impl Drop for JointJob {
    fn drop(&mut self) {
        if self.is_over {
            return;
        }
        // The job has panicked, or the runtime does not start jobs any more.
        let mut queue = self.cas.shared().joint_writes.queue();
        queue.is_served = false;
        queue.waiting.clear();
    }
}

fn failed(key: &Key, error: &io::Error) -> Error {
    let what = if key.kind == EntryKind::Result { "the result of action" } else { "blob" };
    Error::io(&format!("store {what} {}", key.digest), error)
}

/// Gives the outcome of each file to the request that waits for it.
fn answer(files: Vec<WaitingFile>, mut outcome: impl FnMut(&WaitingFile) -> Result<FileId>) {
    for file in files {
        let outcome = outcome(&file);
        // The request may have been cancelled.
        let _ = file.answer.send(outcome);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        actors::cas::{
            CasActor, StoreShared, client::Provenance, tests::settings_at, volume::memory::Memory,
        },
        caller::Peer,
        instance::{InstanceId, Instances},
    };
    use futures::future::join_all;
    use gorego_reapi::{
        digest::{Digest, DigestFunction},
        proto::reapi::{ActionResult, OutputFile},
    };
    use std::{collections::BTreeMap, net::Ipv4Addr, sync::mpsc};
    use tokio::runtime::{Builder, Runtime};

    /// A store whose file work has one thread.
    struct Store {
        cas: Cas,
        mail: crate::actors::mail::Mail,
        volume: Memory,
        runtime: Runtime,
    }

    impl Store {
        fn new(max_bytes: u64) -> Self {
            let runtime =
                Builder::new_multi_thread().worker_threads(1).max_blocking_threads(1).build().unwrap();
            let settings = settings_at("nowhere".into(), max_bytes);
            let volume = Memory::default();
            let actor = CasActor::over(Box::new(volume.clone()), settings, runtime.handle().clone()).unwrap();
            let mail = actor.mail();
            Self { cas: actor.launch(), mail, volume, runtime }
        }

        /// Makes these writes of one file each, so that all of them wait for the job.
        async fn at_once<T>(&self, writes: Vec<impl Future<Output = T>>) -> Vec<T> {
            let (free, busy) = mpsc::channel::<()>();
            self.runtime.spawn_blocking(move || busy.recv());
            let (files, shared): (usize, &StoreShared) = (writes.len(), self.cas.shared());
            let release = async {
                while shared.joint_writes.queue().waiting.len() < files {
                    tokio::task::yield_now().await;
                }
                drop(free);
            };
            futures::join!(join_all(writes), release).0
        }

        /// Stores these files at once.
        async fn write_at_once(&self, files: &[(Option<Owner>, Bytes)]) -> Vec<Result<FileId>> {
            let cas = &self.cas;
            let writes = files.iter().map(|(lessee, content)| async move {
                let cas = lessee.map_or_else(|| cas.clone(), |build| cas.clone().for_build(build));
                cas.write_jointly(vec![blob(content)], None).await.remove(0)
            });
            self.at_once(writes.collect()).await
        }

        fn has(&self, content: &[u8]) -> bool {
            self.cas.look_up(|index| index.renew(&key(content))).unwrap().is_some()
        }

        fn end(self) {
            drop(self.cas);
            self.runtime.shutdown_background();
        }
    }

    fn key(content: &[u8]) -> Key {
        let digest = DigestFunction::Sha256.digest(content);
        Key { digest, instance: InstanceId(0), kind: EntryKind::Blob }
    }

    fn blob(content: &Bytes) -> SmallFile {
        SmallFile { key: key(content), content: content.clone(), result: None }
    }

    fn content(seed: u8, length: usize) -> Bytes {
        vec![seed; length].into()
    }

    fn peer(number: u8) -> Option<Owner> {
        let peer = Peer::V4(Ipv4Addr::new(10, 0, 0, number));
        Some(Owner { peer, ..Owner::default() })
    }

    #[actix::test]
    async fn files_that_wait_share_a_reservation_a_sync_and_a_commit_for_each_build() {
        let store = Store::new(1 << 30);
        let files: Vec<_> =
            (0..100).map(|seed| (peer(seed % 2), content(seed, 1 + usize::from(seed)))).collect();
        let stored = store.write_at_once(&files).await;
        for ((_, content), file) in files.iter().zip(stored) {
            assert_eq!(file.unwrap().key, key(content));
            assert!(store.has(content));
        }
        assert_eq!(store.mail.by_kind(), BTreeMap::from([("Commit", 2), ("ReserveRoom", 1)]));
        assert_eq!(store.volume.syncs(), 1, "all builds wait for the disk together");
        store.end();
    }

    /// A second wait could succeed although the kernel has lost the data.
    #[actix::test]
    async fn no_file_is_stored_whose_only_wait_for_the_disk_has_failed() {
        let store = Store::new(1 << 30);
        store.volume.fail_next_sync(libc::EIO);
        let files: Vec<_> =
            (0..10).map(|seed| (peer(seed % 2), content(seed, 1 + usize::from(seed)))).collect();
        let stored = store.write_at_once(&files).await;
        assert!(stored.iter().all(Result::is_err));
        assert!(files.iter().all(|(_, content)| !store.has(content)));
        assert_eq!(store.volume.len(), 0);
        let stored = store.write_at_once(&files).await;
        assert!(stored.iter().all(Result::is_ok));
        store.end();
    }

    #[actix::test]
    async fn a_job_of_many_turns_reserves_room_ahead_and_gives_the_rest_back() {
        let store = Store::new(100 << 30);
        let files: Vec<_> =
            (0..4 * FILES_PER_TURN).map(|number| (None, Bytes::from(format!("file {number}")))).collect();
        let stored = store.write_at_once(&files).await;
        assert!(stored.iter().all(Result::is_ok));
        let expected = BTreeMap::from([("Commit", 4), ("ReserveRoom", 2), ("Unreserve", 1)]);
        // The job ends after its last answer.
        while store.mail.by_kind() != expected {
            assert!(store.mail.by_kind().values().sum::<u64>() < 7, "{:?}", store.mail.by_kind());
            tokio::task::yield_now().await;
        }
        assert_eq!(store.cas.measure().totals.reserved, 0);
        store.end();
    }

    /// Each is linked to its blobs by the commit that they share.
    #[actix::test]
    async fn results_of_different_requests_are_written_together() {
        let (store, output) = (Store::new(1 << 30), content(1, 10));
        store.write_at_once(&[(None, output.clone())]).await.remove(0).unwrap();
        let needed = key(&output).digest;
        let file = OutputFile { path: "o".into(), digest: Some(needed.to_wire()), ..OutputFile::default() };
        let result = ActionResult { output_files: vec![file], ..ActionResult::default() };
        let main = Instances::new([""]).unwrap().get("").unwrap();
        let actions: Vec<_> = (0..20).map(|seed| DigestFunction::Sha256.digest(&[seed])).collect();
        let put =
            |action: &Digest| store.cas.put_result(&main, *action, result.clone(), Provenance::default());
        let stored = store.at_once(actions.iter().map(put).collect()).await;
        assert!(stored.iter().all(Result::is_ok));
        assert_eq!(store.mail.by_kind(), BTreeMap::from([("Commit", 2), ("ReserveRoom", 2)]));
        for action in actions {
            let key = Key { digest: action, instance: main.id(), kind: EntryKind::Result };
            let linked =
                store.cas.look_up(|index| index.renew(&key).and_then(|found| index.linked(found.at)));
            assert_eq!(linked.unwrap(), Some(vec![needed]));
        }
        store.end();
    }

    #[actix::test]
    async fn a_file_for_which_there_is_no_room_fails_alone() {
        let store = Store::new(100_000);
        let files: Vec<_> = [(1, 60_000), (2, 120_000), (3, 30_000)]
            .map(|(seed, length)| (None, content(seed, length)))
            .into();
        let stored = store.write_at_once(&files).await;
        assert!(matches!(stored[1], Err(Error::Exhausted { .. })), "{stored:?}");
        assert!(stored[0].is_ok() && stored[2].is_ok() && store.has(&files[2].1));
        store.end();
    }

    /// The test drops the job to simulate a panic.
    #[actix::test]
    async fn the_files_of_a_job_that_breaks_off_fail_and_later_ones_are_stored() {
        let store = Store::new(1 << 30);
        let (answer, answered) = tokio::sync::oneshot::channel();
        let lost = content(1, 10);
        let file = WaitingFile {
            key: key(&lost),
            content: [lost],
            result: None,
            lessee: None,
            _memory: None,
            answer,
        };
        assert!(store.cas.shared().joint_writes.add(vec![file]));
        drop(JointJob::new(store.cas.clone()));
        assert!(answered.await.is_err());
        let later = content(2, 10);
        let stored = store.cas.write_jointly(vec![blob(&later)], None).await;
        assert!(stored[0].is_ok());
        assert!(store.has(&later));
        store.end();
    }
}
