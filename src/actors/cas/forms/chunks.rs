//! Splits stored blobs into chunks (CAS-30 to CAS-34).
//!
//! Chunks are ordinary blobs. A recipe is the list of chunks that make a blob, in order. Recipes are made only here,
//! from verified bytes, so no client can supply one. They are cached in memory. If a recipe was forgotten, or its
//! chunks were evicted, it is made again from the blob, and only the missing chunks are written. Chunks take as much
//! room again as their blob, and are evicted in the order of use like all entries.
//!
//! Bounds: one split per blob at a time, [`MAX_CHUNK_JOBS`] in total. Each takes two batches of [`BATCH_BYTES`] and the
//! splitter's window in memory. Written chunks are held until all of them are there. A request that waits for a place
//! does not hold the turn of its blob, so a peer that waits for a place does not block another peer.

use crate::actors::cas::{
    blob::BlobReader,
    checked::not_found,
    client::Cas,
    guards::Hold,
    lookup::Purpose,
    memo::Memo,
    turns::{KeyTurn, Turns},
    volume::PIECE_BYTES,
};
use crate::{
    budget::{Bounds, Budget, Share},
    caller::Caller,
    instance::{Instance, InstanceId},
    logging::Event,
};
use bytes::Bytes;
use gorego_reapi::{
    chunking::{Chunking, Splitter},
    digest::Digest,
    error::{Error, Result},
};
use std::{collections::HashSet, sync::Arc, time::Instant};

/// Splits and splices that run at the same time; each keeps about two cores busy. Others wait. A peer gets four of
/// them, and one of its connections three.
const MAX_CHUNK_JOBS: u64 = 5;
/// Chunks are written in batches of about this many bytes, while the next batch is cut and hashed.
const BATCH_BYTES: usize = 8 * 1024 * 1024;
/// Memory for recipes of about 1,500,000 chunks in total.
const RECIPE_MEMO_BYTES: usize = 64 * 1024 * 1024;

/// Chunks in the order in which they make their blob.
pub(crate) type Chunks = Arc<[Digest]>;

/// A blob and the function that cuts it.
type RecipeKey = (InstanceId, Digest, Chunking);

/// A cached result of cutting a blob.
#[derive(Debug, Clone)]
pub(crate) enum Recipe {
    /// All chunks of the blob, in order.
    Chunks(Chunks),
    /// There are more chunks than this. It is cached so that a refused split is not repeated for each caller.
    MoreThan(usize),
}

/// Chunks that are about to be stored.
type Batch = Vec<(Digest, Bytes)>;

/// State shared by splits and splices.
#[derive(Debug)]
pub(crate) struct ChunkWork {
    recipes: Memo<RecipeKey, Recipe>,
    turns: Turns<(InstanceId, Digest)>,
    pub(crate) places: Budget,
}

/// The exclusive right to split or splice a blob, and one of the places for such work.
#[derive(Debug)]
pub(crate) struct Right {
    _place: Share,
    _turn: KeyTurn,
}

impl Default for ChunkWork {
    fn default() -> Self {
        Self {
            recipes: Memo::new(RECIPE_MEMO_BYTES),
            turns: Turns::default(),
            places: Budget::new(Bounds::shared("splits and splices", MAX_CHUNK_JOBS)),
        }
    }
}

impl ChunkWork {
    /// Waits for a place, then for the turn of the blob.
    pub(crate) async fn begin(&self, instance: &Instance, blob: Digest, caller: Caller) -> Result<Right> {
        let place = self.places.wait_for(caller, 1).await?;
        let turn = self.turns.take((instance.blobs(), blob)).await;
        Ok(Right { _place: place, _turn: turn })
    }

    /// Like [`ChunkWork::begin`], but if another request works on this blob, waits for its end without a place and
    /// returns `None`. Usually nothing is left to do then.
    pub(crate) async fn begin_or_wait(
        &self,
        instance: &Instance,
        blob: Digest,
        caller: Caller,
    ) -> Result<Option<Right>> {
        let key = (instance.blobs(), blob);
        let place = self.places.wait_for(caller, 1).await?;
        if let Some(turn) = self.turns.take_now(key) {
            return Ok(Some(Right { _place: place, _turn: turn }));
        }
        drop(place);
        drop(self.turns.take(key).await);
        Ok(None)
    }

    /// Caches a recipe whose chunks are known to make the blob when it is cut by `chunking`.
    pub(crate) fn remember(&self, instance: &Instance, blob: Digest, chunking: Chunking, chunks: Chunks) {
        let weight = size_of_val(&*chunks) + size_of::<RecipeKey>();
        self.recipes.insert((instance.blobs(), blob, chunking), Recipe::Chunks(chunks), weight);
    }

    /// Caches that a blob makes more than `count` chunks.
    fn remember_more_than(&self, instance: &Instance, blob: Digest, chunking: Chunking, count: usize) {
        let key = (instance.blobs(), blob, chunking);
        self.recipes.insert(key, Recipe::MoreThan(count), size_of::<RecipeKey>());
    }

    #[cfg(test)]
    pub(crate) fn forget(&self) {
        self.recipes.clear();
    }
}

impl Cas {
    /// Returns the chunks of a stored blob, at most `max_chunks`. All of them are stored and were just renewed, and so
    /// was the blob (CAS-31).
    ///
    /// # Errors
    /// `NotFound` when the blob is not stored (CAS-32), `Precondition` when it has too many chunks or the store is too
    /// small for the blob and its chunks, `Exhausted` when there is no room for them now.
    pub async fn split(
        &self,
        instance: &Instance,
        blob: Digest,
        chunking: Chunking,
        max_chunks: usize,
    ) -> Result<Chunks> {
        if blob.is_empty() {
            return Ok([].into());
        }
        if chunking.is_one_chunk(blob.size()) {
            let missing = self.find_missing(instance, &[blob]).await?;
            return if missing.is_empty() { Ok([blob].into()) } else { Err(not_found(blob)) };
        }
        let too_many = || {
            Error::Precondition(format!(
                "blob {blob} has more than the {max_chunks} chunks that one answer can name; read it by ByteStream"
            ))
        };
        if blob.size() / chunking.chunk_sizes().end() > max_chunks as u64 {
            return Err(too_many());
        }
        let recipe = match self.known_recipe(instance, blob, chunking, max_chunks).await? {
            Some(recipe) => recipe,
            None => self.chunks_in_turn(instance, blob, chunking, max_chunks).await?,
        };
        match recipe {
            Recipe::Chunks(chunks) if chunks.len() <= max_chunks => Ok(chunks),
            Recipe::Chunks(_) | Recipe::MoreThan(_) => Err(too_many()),
        }
    }

    /// The cached recipe of a blob, if the blob and all of its chunks are stored. They are renewed. Returns
    /// [`Recipe::MoreThan`] only if there are more than `max_chunks`.
    pub(crate) async fn known_recipe(
        &self,
        instance: &Instance,
        blob: Digest,
        chunking: Chunking,
        max_chunks: usize,
    ) -> Result<Option<Recipe>> {
        let recipe = self.shared().chunk_work.recipes.get(&(instance.blobs(), blob, chunking));
        let mut needed = vec![blob];
        match &recipe {
            Some(Recipe::Chunks(chunks)) => needed.extend_from_slice(chunks),
            Some(Recipe::MoreThan(count)) if *count >= max_chunks => {}
            Some(Recipe::MoreThan(_)) | None => return Ok(None),
        }
        let missing = self.find_missing(instance, &needed).await?;
        Ok(recipe.filter(|_| missing.is_empty()))
    }

    /// Cuts a blob once there is a place, unless another request does it first.
    async fn chunks_in_turn(
        &self,
        instance: &Instance,
        blob: Digest,
        chunking: Chunking,
        max_chunks: usize,
    ) -> Result<Recipe> {
        let work = &self.shared().chunk_work;
        let mut right = work.begin_or_wait(instance, blob, self.caller()).await?;
        loop {
            // Another request may have cut the blob meanwhile.
            if let Some(recipe) = self.known_recipe(instance, blob, chunking, max_chunks).await? {
                return Ok(recipe);
            }
            match right {
                Some(right) => return self.make_chunks(instance, blob, chunking, max_chunks, right).await,
                None => right = Some(work.begin(instance, blob, self.caller()).await?),
            }
        }
    }

    /// Cuts a stored blob and stores the missing chunks. Stops when there are more than `max_chunks`. The right to
    /// split the blob ends with the last job that cuts.
    async fn make_chunks(
        &self,
        instance: &Instance,
        blob: Digest,
        chunking: Chunking,
        max_chunks: usize,
        right: Right,
    ) -> Result<Recipe> {
        self.check_room_for_chunks(blob)?;
        let right = Arc::new(right);
        let started = Instant::now();
        let reader = self.open(instance, blob).await?;
        let mut scan = Some(ChunkScan { reader, blob, splitter: Splitter::new(chunking), at: 0 });
        let (mut chunks, mut holds, mut batch) = (Vec::new(), Vec::new(), Vec::new());
        loop {
            let cut = async {
                match scan.take() {
                    Some(scan) => {
                        let cutting = self.blocking_with(right.clone(), move || scan.next_batch());
                        let (cut, _right) = cutting.await?;
                        cut.map(Some)
                    }
                    None => Ok(None),
                }
            };
            chunks.extend(batch.iter().map(|(digest, _)| *digest));
            let (cut, stored) = tokio::join!(cut, self.store_chunks(instance, batch));
            // Keeps all chunks until the last one is stored.
            holds.push(stored?);
            let Some((rest, next)) = cut? else { break };
            if chunks.len() + next.len() > max_chunks {
                self.shared().chunk_work.remember_more_than(instance, blob, chunking, max_chunks);
                return Ok(Recipe::MoreThan(max_chunks));
            }
            (scan, batch) = (rest, next);
        }
        let chunks: Chunks = chunks.into();
        Event::debug(crate::actors::cas::LOG, "blob_split")
            .with_shown("digest", &blob)
            .with("chunks", chunks.len())
            .with("elapsed_ms", started.elapsed().as_millis() as u64)
            .log(format_args!("cut a blob into chunks"));
        self.shared().chunk_work.remember(instance, blob, chunking, chunks.clone());
        Ok(Recipe::Chunks(chunks))
    }

    fn check_room_for_chunks(&self, blob: Digest) -> Result<()> {
        let limit = self.shared().settings.max_bytes;
        if blob.size().saturating_mul(2) <= limit {
            return Ok(());
        }
        // Not `Exhausted`, because a retry does not help (GEN-20).
        Err(Error::Precondition(format!(
            "the store of {limit} bytes has no room for blob {blob} and its chunks, which take as much again \
             (max_size_gb raises the limit); read it by ByteStream"
        )))
    }

    /// Stores chunks and holds them.
    async fn store_chunks(&self, instance: &Instance, batch: Batch) -> Result<Hold> {
        let distinct: HashSet<Digest> = batch.iter().map(|(digest, _)| *digest).collect();
        self.write_many(instance, batch).await?.into_iter().collect::<Result<()>>()?;
        let distinct: Vec<Digest> = distinct.into_iter().collect();
        let located = self.locate(instance, &distinct, Purpose::Read).await?;
        if located.found.iter().any(Option::is_none) {
            return Err(Error::Unavailable(
                "chunks were evicted as soon as they were written; the store is too busy or too small".into(),
            ));
        }
        Ok(located.hold)
    }
}

/// A blob that is being cut. Its methods block.
struct ChunkScan {
    reader: BlobReader,
    blob: Digest,
    splitter: Splitter,
    at: u64,
}

impl ChunkScan {
    /// The next chunks, and the scan itself unless they are the last.
    fn next_batch(mut self) -> Result<(Option<Self>, Batch)> {
        let function = self.blob.function();
        let mut piece = vec![0; PIECE_BYTES];
        let (mut batch, mut bytes) = (Vec::new(), 0);
        while bytes < BATCH_BYTES {
            if let Some(chunk) = self.splitter.next_chunk() {
                bytes += chunk.len();
                batch.push((function.digest(&chunk), chunk));
                continue;
            }
            if self.at == self.blob.size() {
                return Ok((None, batch));
            }
            let read = self.reader.read_into(&mut piece, self.at)?;
            self.splitter.push(piece.get(..read).unwrap_or_default());
            self.at += read as u64;
            if self.at == self.blob.size() {
                self.splitter.end();
            }
        }
        Ok((Some(self), batch))
    }
}
