//! The action cache part of [`Cas`]: results are read, checked against what is stored, and written.
//!
//! The first look-up of a result reads its file, and the Trees and Directories that it names. Blobs that were not read
//! since the start are hashed, so that a result with a damaged blob is not served. The [`LoadedResult`] is immutable
//! and cached in memory. From then on a hit is a look-up that checks and renews every reference in the index (AC-03,
//! AC-04).

use crate::actors::cas::{
    checked::{is_sound, not_found, read_unchecked, read_unless_large, report},
    client::{Cas, Provenance},
    decoding::worst_case,
    index::{EntryKind, EntryRef, FoundEntry, Key, Stamp},
    lookup::Purpose,
    results::{self, DirectReferences, LoadedResult, PreparedResult, ResultLookup, Uploader},
    settings::{
        CHECKED_AT_ONCE_BYTES, LINKED_TREE_BYTES, LOOKUPS_PER_HOLD, LOOKUPS_PER_TURN, MAX_LINKS,
        MAX_REFERENCES, MAX_TREE_BYTES, RESULT_READ_TRIES,
    },
    trees::TreeRoom,
};
use crate::{
    instance::Instance,
    result::{ResultRoom, SharedResult},
};
use gorego_reapi::{
    digest::{Digest, DigestFunction},
    error::{Error, Result},
    proto::reapi,
    tree::MAX_MESSAGE_MEMORY,
    wire::UNCOUNTED_BYTES,
};
use prost::Message as _;
use std::sync::{Arc, atomic::Ordering::Relaxed};

impl Cas {
    /// Returns a stored result whose blobs are all present and just renewed (AC-03, AC-04). A result that lacks a blob
    /// is dropped. The result of a failed command is never returned (AC-13).
    ///
    /// # Errors
    /// `Unavailable` when the server is shutting down.
    pub async fn get_result(&self, instance: &Instance, action: Digest) -> Result<Option<SharedResult>> {
        let mut tried = None;
        for _ in 0..RESULT_READ_TRIES {
            let found = match self.look_up_result(instance, action)? {
                ResultLookup::Hit(result) => return self.with_room(result).await.map(Some),
                ResultLookup::Miss => return Ok(None),
                ResultLookup::NoRoom(wanted) => match self.ease_leases(wanted).await? {
                    true => continue,
                    false => return Ok(None),
                },
                ResultLookup::Long(found, loaded) => {
                    if !self.has_leases_for(instance, &loaded).await? {
                        return Ok(None);
                    }
                    self.without_leases().check_unread(instance, &loaded.references).await?;
                    return match self.confirm_in_parts(instance, found.at, &loaded).await? {
                        Some(result) => self.with_room(result).await.map(Some),
                        None => Ok(None),
                    };
                }
                ResultLookup::Cold(found) => found,
            };
            // The look-up is tried again only if the result was replaced meanwhile.
            if tried.replace(found.file.generation) == Some(found.file.generation) {
                return Ok(None);
            }
            if let Some(result) = self.load_result(instance, action, found).await? {
                return Ok(Some(result));
            }
        }
        Ok(None)
    }

    /// Reads a result that is not in memory, and checks it. Returns `None` also if an update has deleted its file.
    async fn load_result(
        &self,
        instance: &Instance,
        action: Digest,
        found: FoundEntry,
    ) -> Result<Option<SharedResult>> {
        let id = instance.id();
        // The blobs are leased when the result is confirmed, if there is room for that.
        let reader = self.without_leases();
        let Some((result, room)) = reader.read_result(instance, action, found).await? else {
            return Ok(None);
        };
        let linked = self.look_up(|index| index.linked(found.at))?;
        let is_linked = linked.is_some();
        let references = match linked {
            Some(linked) => Ok(linked),
            None => reader.references(instance, action.function(), &result).await,
        };
        let references = match references {
            Ok(references) => references,
            Err(Unloadable::Server(error)) => return Err(error),
            Err(Unloadable::Result(reason)) => {
                self.drop_result(found.at, reason);
                return Ok(None);
            }
        };
        let generation = found.file.generation;
        let ((loaded, weight), room) = self.loaded(generation, result, references, room).await?;
        loaded.is_linked.store(is_linked, Relaxed);
        reader.check_unread(instance, &loaded.references).await?;
        self.shared().results.insert((id, action), loaded.clone(), weight);
        let result = if loaded.references.len() > LOOKUPS_PER_TURN {
            if !self.has_leases_for(instance, &loaded).await? {
                return Ok(None);
            }
            self.confirm_in_parts(instance, found.at, &loaded).await?
        } else {
            self.confirm_loaded(instance, found, &loaded)?
        };
        match (result, room) {
            (Some(result), None) => self.with_room(result).await.map(Some),
            (result, room) => Ok(result.map(|result| result.holding(room))),
        }
    }

    /// Takes room for a result that is not small. The memo may drop it while its request waits for room for the answer,
    /// and then its memory would not be counted.
    pub(crate) async fn with_room(&self, result: SharedResult) -> Result<SharedResult> {
        if result.memory() <= UNCOUNTED_BYTES {
            return Ok(result);
        }
        let memory = (result.memory() as u64).min(results::LARGEST_RESULT);
        let room = self.shared().large_results.wait_for(self.caller(), memory).await?;
        Ok(result.holding(Some(ResultRoom::new(room))))
    }

    /// Hashes the blobs of a result that were not read since the start. Damaged blobs are dropped, and then the result
    /// is dropped when it is confirmed.
    async fn check_unread(&self, instance: &Instance, references: &[Digest]) -> Result<()> {
        for part in references.chunks(LOOKUPS_PER_TURN) {
            let located = self.locate(instance, part, Purpose::Read).await?;
            let mut unread = located.found;
            unread.retain(|found| found.is_some_and(|found| found.stamp == Stamp::UNTRUSTED));
            if unread.is_empty() {
                continue;
            }
            let place = self.shared().result_checks.wait_for(self.caller(), 1).await?;
            let (cas, hold) = (self.clone(), located.hold);
            self.blocking(move || {
                let (_place, _hold) = (place, hold);
                unread.iter().flatten().try_for_each(|found| is_sound(&cas, found).map(drop))
            })
            .await??;
        }
        Ok(())
    }

    /// Whether there is room to lease the blobs of a result with many references. Other builds may lose leases for it.
    async fn has_leases_for(&self, instance: &Instance, loaded: &LoadedResult) -> Result<bool> {
        if !self.may_lack_leases(loaded)? {
            return Ok(true);
        }
        let mut wanted = 0u64;
        for part in loaded.references.chunks(LOOKUPS_PER_HOLD) {
            wanted = wanted.saturating_add(self.unleased_bytes(instance, part)?);
            tokio::task::yield_now().await;
        }
        Ok(!self.lacks_leases(wanted)? || self.ease_leases(wanted).await?)
    }

    /// Like [`Cas::confirm_loaded`], for a result with many references: other callers are served in between.
    async fn confirm_in_parts(
        &self,
        instance: &Instance,
        at: EntryRef,
        loaded: &LoadedResult,
    ) -> Result<Option<SharedResult>> {
        if !loaded.is_hit {
            return Ok(None);
        }
        for part in loaded.references.chunks(LOOKUPS_PER_TURN) {
            if let Some(lost) = self.find_missing(instance, part).await?.first() {
                self.drop_result(at, format!("blob {lost} is gone"));
                return Ok(None);
            }
        }
        self.link(instance, at, loaded)?;
        Ok(Some(loaded.result.clone()))
    }

    /// Builds the [`LoadedResult`] and its weight. Returns the room of the result.
    async fn loaded(
        &self,
        generation: u64,
        result: SharedResult,
        references: Vec<Digest>,
        room: Option<ResultRoom>,
    ) -> Result<((Arc<LoadedResult>, usize), Option<ResultRoom>)> {
        let is_long = references.len() > LOOKUPS_PER_TURN;
        let load = move || {
            let loaded = Arc::new(LoadedResult::new(generation, result, references));
            let weight = loaded.memory();
            (loaded, weight)
        };
        if is_long { self.blocking_with(room, load).await } else { Ok((load(), room)) }
    }

    /// Reads and decodes the file of a result. A large result is returned with the room that it takes.
    async fn read_result(
        &self,
        instance: &Instance,
        action: Digest,
        found: FoundEntry,
    ) -> Result<Option<(SharedResult, Option<ResultRoom>)>> {
        let cas = self.clone();
        let small = self.blocking(move || read_unless_large(&cas, &found, UNCOUNTED_BYTES as u64)).await?;
        let small = match small {
            Ok(small) => small,
            Err(Error::NotFound(_)) => return Ok(None),
            Err(error) => return Err(error),
        };
        // All room is taken before the bytes are read, and the room for the result comes first, because a request with
        // room to decode must not wait for anything.
        let (mut room, decoding) = match &small {
            Ok(_) => (None, None),
            Err(size) => {
                let memory = worst_case((*size).min(results::MAX_FILE_BYTES), MAX_MESSAGE_MEMORY);
                let room = self.shared().large_results.wait_for(self.caller(), memory).await?;
                (Some(ResultRoom::new(room)), self.room_to_decode(memory).await?)
            }
        };
        let (cas, instance) = (self.clone(), instance.clone());
        self.blocking(move || {
            let _decoding = decoding;
            let bytes = match small {
                Ok(bytes) => bytes,
                Err(_) => match read_unchecked(&cas, &found, results::MAX_FILE_BYTES) {
                    Ok(bytes) => bytes,
                    Err(Error::NotFound(_)) => return Ok(None),
                    Err(error) => return Err(error),
                },
            };
            match results::decode(&bytes, instance.name(), action) {
                Ok(result) => {
                    let result = SharedResult::new(result);
                    if let Some(room) = &mut room {
                        room.shrink_to(result.memory());
                    }
                    Ok(Some((result, room)))
                }
                Err(reason) => {
                    report(&cas, &found, reason.into());
                    Ok(None)
                }
            }
        })
        .await?
    }

    /// Every blob that a result references.
    async fn references(
        &self,
        instance: &Instance,
        function: DigestFunction,
        result: &reapi::ActionResult,
    ) -> std::result::Result<Vec<Digest>, Unloadable> {
        let direct =
            DirectReferences::of(result, function).map_err(|error| Unloadable::Result(error.to_string()))?;
        let mut references = direct.blobs;
        let mut room = TreeRoom::new(self);
        for tree in direct.trees {
            let files = self.files_of_tree(instance, tree).await?;
            room.grow(files.len() * size_of::<Digest>()).await?;
            references.extend(files);
            references.push(tree);
            if references.len() > MAX_REFERENCES {
                let reason = format!("it refers to more than {MAX_REFERENCES} blobs");
                return Err(Unloadable::Result(reason));
            }
        }
        for root in direct.roots {
            let closure = self.closure(instance, root, &mut room).await.map_err(Unloadable::of_root)?;
            if let Some(lost) = closure.missing.first() {
                return Err(Unloadable::Result(format!("its Directory {lost} is gone")));
            }
            references.extend(closure.directories.keys().copied().chain(closure.files()));
        }
        Ok(references)
    }

    /// Every blob that a new result references, if it is enough to read small Trees. Otherwise its first hit finds the
    /// references.
    async fn references_in_small_trees(
        &self,
        instance: &Instance,
        new: &PreparedResult,
    ) -> Option<Vec<Digest>> {
        let direct = &new.direct;
        let bytes = direct.trees.iter().map(Digest::size).fold(0, u64::saturating_add);
        if direct.trees.is_empty() || !direct.roots.is_empty() || bytes > LINKED_TREE_BYTES {
            return None;
        }
        let reader = self.without_leases();
        let references = reader.references(instance, new.action.function(), &new.result).await.ok()?;
        (references.len() <= MAX_LINKS).then_some(references)
    }

    /// Reads a Tree of a result.
    async fn files_of_tree(
        &self,
        instance: &Instance,
        tree: Digest,
    ) -> std::result::Result<Vec<Digest>, Unloadable> {
        if tree.size() > MAX_TREE_BYTES {
            let reason = format!("its Tree {tree} is larger than {MAX_TREE_BYTES} bytes");
            return Err(Unloadable::Result(reason));
        }
        let decoding = self.room_to_decode(worst_case(tree.size(), MAX_MESSAGE_MEMORY)).await?;
        let read = self.read_many(instance, vec![tree]).await?.pop();
        let bytes = match read.unwrap_or_else(|| Err(not_found(tree))) {
            Err(error) if !matches!(error, Error::NotFound(_)) => return Err(error.into()),
            read => read,
        };
        let files = move || bytes.and_then(|bytes| results::files_of_tree(bytes, tree.function()));
        let (files, _decoding) = self.in_room(decoding, files).await?;
        files.map_err(|error| Unloadable::Result(format!("its Tree {tree}: {error}")))
    }

    /// The result of an action that this principal may see: a public one, or otherwise its own.
    ///
    /// # Errors
    /// As [`Cas::get_result`].
    pub(crate) async fn get_result_for(
        &self,
        instance: &Instance,
        action: Digest,
        principal: &str,
    ) -> Result<Option<SharedResult>> {
        let found = self.get_result(instance, action).await?;
        if found.is_some() {
            return Ok(found);
        }
        match instance.private_result(principal, action) {
            Some((space, key)) => self.get_result(&space, key).await,
            None => Ok(None),
        }
    }

    /// Stores a result and atomically replaces an earlier one (AC-08). Inlined contents become blobs first (AC-05).
    /// Execution metadata is always present afterwards (AC-09). Returns the stored result.
    ///
    /// # Errors
    /// `Invalid` for digests or output paths that are malformed, absolute, escaping or duplicate (AC-10).
    pub async fn put_result(
        &self,
        instance: &Instance,
        action: Digest,
        result: reapi::ActionResult,
        provenance: Provenance,
    ) -> Result<SharedResult> {
        self.put_of_client(instance, action, result, provenance, true).await
    }

    /// Like [`Cas::put_result`], for a key whose value may change at any time, so that no difference is reported.
    ///
    /// # Errors
    /// As [`Cas::put_result`].
    pub async fn put_value(
        &self,
        instance: &Instance,
        key: Digest,
        result: reapi::ActionResult,
        provenance: Provenance,
    ) -> Result<SharedResult> {
        self.put_of_client(instance, key, result, provenance, false).await
    }

    async fn put_of_client(
        &self,
        instance: &Instance,
        action: Digest,
        result: reapi::ActionResult,
        provenance: Provenance,
        is_compared: bool,
    ) -> Result<SharedResult> {
        let private = instance.private_result(&provenance.principal, action);
        let private_action = private.is_some().then_some(action);
        let (space, key) = private.unwrap_or_else(|| (instance.clone(), action));
        let is_large = result.encoded_len() > CHECKED_AT_ONCE_BYTES;
        let within = space.clone();
        let check = move || -> Result<_> {
            let mut prepared = PreparedResult::check(&within, key, result, provenance, Uploader::Client)?;
            prepared.origin.private_action_digest = private_action.map(|action| action.to_wire());
            Ok(prepared.encode())
        };
        let mut prepared = if is_large { self.blocking(check).await?? } else { check()? };
        let contents = std::mem::take(&mut prepared.contents);
        if !contents.is_empty() {
            self.write_many(instance, contents).await?.into_iter().collect::<Result<()>>()?;
        }
        prepared.references = self.references_in_small_trees(&space, &prepared).await;
        let result = prepared.result.clone();
        // A result that replaces another is compared with it, which may read the disk. Two first results of an action
        // that arrive at the same time are not compared.
        let replaces =
            is_compared && self.shared().reports.get().is_some() && self.has_result(&space, key)?;
        let is_alone = replaces || !prepared.is_small();
        if !is_alone && let Ok(memory) = self.charge_received(prepared.memory()) {
            let stored = self.write_jointly(vec![prepared.into_file(&space)], memory).await;
            return stored.into_iter().collect::<Result<Vec<_>>>().map(|_| result);
        }
        let room = self.take_room(prepared.charge(self)).await?;
        let memory = self.memory_to_write(prepared.memory()).await?;
        let cas = self.clone();
        let visible = self.blocking(move || -> Result<_> {
            let _memory = memory;
            if is_compared {
                cas.report_difference(&space, &prepared);
            }
            let mut files = cas.new_files(room);
            prepared.write(&cas, &mut files, &space)?;
            Ok(files.commit())
        });
        if let Some(visible) = visible.await?? {
            visible.wait().await?;
        }
        Ok(result)
    }

    fn has_result(&self, instance: &Instance, action: Digest) -> Result<bool> {
        let key = Key { digest: action, instance: instance.id(), kind: EntryKind::Result };
        self.look_up(|index| index.has(&key))
    }
}

/// Why the references of a result could not be loaded.
enum Unloadable {
    /// The result is incomplete or malformed.
    Result(String),
    /// The server could not read it now.
    Server(Error),
}

impl Unloadable {
    fn of_root(error: Error) -> Self {
        match error {
            Error::Invalid(reason) => Self::Result(reason),
            error => Self::Server(error),
        }
    }
}

impl From<Error> for Unloadable {
    fn from(error: Error) -> Self {
        Self::Server(error)
    }
}
