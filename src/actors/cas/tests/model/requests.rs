//! The random requests of the model: what each of them does to the store, and what the model learns from its answer.

use super::{
    super::super::{
        compaction::{Relocate, may_move},
        results::ResultCondition,
        volume::Moves,
    },
    *,
};

impl ModelRun {
    pub(super) async fn step(&mut self) {
        match self.random.below(100) {
            0..40 => self.put_batch().await,
            40..46 => self.put_stream().await,
            46..58 => self.put_result().await,
            58..70 => self.find_missing().await,
            70..82 => self.get_result().await,
            82..86 => self.purge().await,
            86..90 => self.open_reader().await,
            90..94 => self.close_reader().await,
            _ => self.compact().await,
        }
    }

    async fn put_batch(&mut self) {
        let (number, count) = (self.any_uploader(), 1 + self.random.below(12));
        let blobs: Vec<(Digest, Bytes)> =
            (0..count).map(|_| self.new_blob(8_000)).map(|bytes| (digest(&bytes), bytes)).collect();
        let outcome = self.of(number).write_many(&self.main(), blobs.clone()).await;
        let outcomes = self.excuse(outcome).unwrap_or_default();
        for ((blob, bytes), outcome) in blobs.into_iter().zip(outcomes) {
            if self.excuse(outcome).is_some() {
                self.model.blobs.insert(blob, bytes);
                self.promise(number, blob);
            }
        }
    }

    /// A blob that is too large for a segment, or one that is not.
    async fn put_stream(&mut self) {
        let most = if self.random.below(2) == 0 { 10_000 } else { 120_000 };
        let (number, bytes) = (1 + self.random.below(BUILDS), self.new_blob(most));
        let cas = self.of(number);
        let begun = cas.begin_upload(&self.main(), "uploads/x", digest(&bytes), 0).await;
        let Some(Upload::Writer(mut writer)) = self.excuse(begun) else { return };
        for piece in bytes.chunks(50_000) {
            let written = writer.write(bytes.slice_ref(piece)).await;
            if self.excuse(written).is_none() {
                return;
            }
        }
        let finished = writer.finish().await;
        if self.excuse(finished).is_some() {
            self.model.blobs.insert(digest(&bytes), bytes);
        }
    }

    async fn put_result(&mut self) {
        let (name, version) = (self.random.below(RESULTS), self.random.below(1 << 40));
        let blobs = self.some_blobs(3);
        self.model.results.entry(name).or_default().0.insert(version, blobs.clone());
        let result = result_of(name, version, &blobs);
        let number = 1 + self.random.below(BUILDS);
        let cas = self.of(number);
        let stored = cas.put_result(&self.main(), action(name), result, Provenance::default()).await;
        if self.excuse(stored).is_some() {
            self.model.results.insert(name, (BTreeMap::from([(version, blobs)]), true));
        }
    }

    /// What is called present is promised.
    async fn find_missing(&mut self) {
        let (number, blobs) = (self.any_reader(), self.some_blobs(6));
        let missing = self.of(number).find_missing(&self.main(), &blobs).await.unwrap();
        for blob in blobs.into_iter().filter(|blob| !missing.contains(blob)) {
            self.promise(number, blob);
        }
    }

    /// A hit is one of the versions that were stored last, and all that it refers to is promised.
    async fn get_result(&mut self) {
        let (number, name) = (self.any_reader(), self.random.below(RESULTS));
        let found = self.of(number).get_result(&self.main(), action(name)).await;
        let Some(Some(found)) = self.excuse(found) else { return };
        self.happened.hits += 1;
        self.check_version(name, &found);
        for file in &found.output_files {
            let blob = Digest::from_wire(SHA256, file.digest.as_ref(), "digest").unwrap();
            assert!(self.store().has(blob).await, "a hit without its blob");
            self.promise(number, blob);
        }
    }

    async fn purge(&mut self) {
        let name = self.random.below(RESULTS);
        self.purged_in_this_run += 1;
        let condition = ResultCondition { action: Some(action(name)), ..Default::default() };
        self.model.results.entry(name).or_default().1 = false;
        match self.store().cas.purge_results(&self.main(), &condition, 0, 100_000, true).await {
            Ok(page) => {
                self.model.results.remove(&name);
                self.happened.purged += page.results.len() as u64;
            }
            Err(error) => assert!(self.is_off(), "{error}"),
        }
    }

    async fn open_reader(&mut self) {
        let Some(blob) = self.some_blobs(1).pop() else { return };
        match self.store().cas.open(&self.main(), blob).await {
            Ok(reader) => self.readers.push((blob, reader)),
            Err(Error::NotFound(_)) => {}
            Err(error) => assert!(self.is_off(), "{error}"),
        }
    }

    /// An open reader reads to the end, whatever happened to the blob meanwhile.
    pub(super) async fn close_reader(&mut self) {
        if let Some((blob, reader)) = self.readers.pop() {
            assert_eq!(read_all(&reader).await.unwrap(), self.model.blobs[&blob]);
        }
    }

    /// One step of compaction, as in the background.
    async fn compact(&mut self) {
        let compact = |cas: Cas, _| {
            let (shared, mut moved) = (cas.shared(), 0);
            let outcome = shared.volume.compact(&|files| may_move(shared, files), &mut |moves: Moves| {
                let copies = moves.moved.len();
                let accepted = shared.runtime.block_on(cas.actor().send(Relocate(moves)));
                let accepted = accepted.unwrap_or_else(|_| vec![false; copies]);
                moved += accepted.iter().filter(|accepted| **accepted).count() as u64;
                accepted
            });
            (outcome.map(drop), moved)
        };
        let (outcome, moved) = self.store().worker(compact).await;
        assert!(outcome.is_ok() || self.is_off(), "{outcome:?}");
        self.happened.moved += moved;
    }
}
