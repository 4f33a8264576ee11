//! Random operations on the volume of the product, and a power cut at a random point.

use super::*;
use crate::{
    actors::cas::{
        index::{EntryKind, FileId, Index, Key, LeaseTimes},
        recovery::recover,
        volume::{Compacted, NewFile, SyncPolicy, Volume, local::Local, read_all, segments::Sizes},
    },
    instance::{InstanceId, Instances},
};
use bytes::Bytes;
use gorego_reapi::digest::{Digest, DigestFunction};

const LARGE: u64 = 70_000;
const MOST: u64 = 1 << 40;

/// The entries that the store has acknowledged, and the changes that it has only been asked for.
#[derive(Default)]
struct Model {
    /// Blobs that must exist, by name.
    blobs: BTreeMap<Digest, FileId>,
    /// For each result, the versions that may be found, and whether one must be found.
    results: BTreeMap<u64, (BTreeSet<u64>, bool)>,
    result_files: BTreeMap<u64, FileId>,
}

struct PowerRun {
    disk: Arc<SimulatedDisk>,
    volume: Local,
    random: Random,
    model: Model,
    sizes: Sizes,
}

fn blob(seed: u64, length: u64) -> Bytes {
    let block =
        |n: u64| DigestFunction::Sha256.digest(&[seed, n].map(u64::to_le_bytes).concat()).hash().to_vec();
    (0..).flat_map(block).take(length as usize).collect()
}

fn key_of(kind: EntryKind, digest: Digest) -> Key {
    Key { digest, instance: InstanceId(0), kind }
}

fn result_key(name: u64) -> Key {
    key_of(EntryKind::Result, DigestFunction::Sha256.digest(&name.to_le_bytes()))
}

/// The bytes of a version of a result, with a checksum like real results.
fn result(name: u64, version: u64) -> Bytes {
    let body = [name, version].map(u64::to_le_bytes).concat();
    [DigestFunction::Sha256.digest(&body).hash(), &body].concat().into()
}

fn open(root: &Path, sizes: Sizes, sync: SyncPolicy) -> (Local, Index) {
    let volume = Local::with_sizes(root, &Instances::new([""]).unwrap(), sizes, sync).unwrap();
    let index = recover(&volume, MOST, LeaseTimes::default(), 0);
    (volume, index)
}

impl PowerRun {
    fn write(&mut self, files: &[(Key, Bytes)]) -> Option<Vec<FileId>> {
        let new: Vec<NewFile<'_>> = files
            .iter()
            .map(|(key, bytes)| NewFile { key: *key, pieces: std::slice::from_ref(bytes) })
            .collect();
        let written: Vec<_> = self.volume.write(&new).into_iter().collect::<io::Result<_>>().ok()?;
        let ids: Vec<FileId> = written.iter().map(|written| written.file).collect();
        self.volume.sync(&ids).ok().map(|()| ids)
    }

    fn delete(&self, file: FileId) -> bool {
        self.volume
            .delete(&[crate::actors::cas::index::Victim { file, bytes: self.volume.charge(0) }])
            .is_empty()
    }

    fn step(&mut self) {
        match self.random.below(100) {
            0..35 => {
                let count = 1 + self.random.below(6);
                let blobs: Vec<Bytes> =
                    (0..count).map(|_| blob(self.random.below(1 << 40), self.random.below(3_000))).collect();
                self.put_blobs(&blobs);
            }
            35..50 => {
                let length = LARGE + self.random.below(200_000);
                let bytes = blob(self.random.below(1 << 40), length);
                if self.random.below(2) == 0 {
                    self.put_blobs(&[bytes]);
                } else {
                    self.put_draft(&bytes);
                }
            }
            50..70 => self.put_result(),
            70..85 => {
                let victim = self.pick();
                if let Some((digest, file)) = victim {
                    // A deleted blob may come back, because nothing relies on its absence.
                    self.model.blobs.remove(&digest);
                    self.delete(file);
                }
            }
            85..90 => {
                let name = self.random.below(4);
                if let Some(file) = self.model.result_files.remove(&name) {
                    let must = self.delete(file);
                    let (versions, must_be) = self.model.results.entry(name).or_default();
                    *must_be = false;
                    if must {
                        versions.clear();
                    }
                }
            }
            _ => self.compact(),
        }
    }

    fn pick(&mut self) -> Option<(Digest, FileId)> {
        let at = self.random.below(self.model.blobs.len().max(1) as u64) as usize;
        self.model.blobs.iter().nth(at).map(|(digest, file)| (*digest, *file))
    }

    fn put_blobs(&mut self, blobs: &[Bytes]) {
        let new: Vec<(Key, Bytes)> = blobs
            .iter()
            .map(|bytes| (key_of(EntryKind::Blob, DigestFunction::Sha256.digest(bytes)), bytes.clone()))
            .filter(|(key, _)| !self.model.blobs.contains_key(&key.digest))
            .collect();
        let files = self.write(&new).unwrap_or_default();
        self.model.blobs.extend(files.into_iter().map(|file| (file.key.digest, file)));
    }

    fn put_draft(&mut self, bytes: &Bytes) {
        let key = key_of(EntryKind::Blob, DigestFunction::Sha256.digest(bytes));
        let mut draft = self.volume.draft().unwrap();
        bytes.chunks(50_000).for_each(|piece| draft.write(piece).unwrap());
        if let Ok(written) = draft.keep(key)
            && self.volume.sync(&[written.file]).is_ok()
        {
            self.model.blobs.insert(key.digest, written.file);
        }
    }

    fn put_result(&mut self) {
        let (name, version) = (self.random.below(4), self.random.below(1 << 40));
        self.model.results.entry(name).or_default().0.insert(version);
        let Some(files) = self.write(&[(result_key(name), result(name, version))]) else { return };
        self.model.results.insert(name, (BTreeSet::from([version]), true));
        if let Some(old) = self.model.result_files.insert(name, files[0]) {
            self.delete(old);
        }
    }

    fn compact(&mut self) {
        let model = Mutex::new(&mut self.model);
        let may_move = |files: &[FileId]| -> Vec<bool> {
            let model = model.lock().unwrap();
            let has = |file: &FileId| {
                model.blobs.values().chain(model.result_files.values()).any(|own| own == file)
            };
            files.iter().map(has).collect()
        };
        let outcome = self.volume.compact(&may_move, &mut |moves| {
            let mut model = model.lock().unwrap();
            let relocate = |(from, generation): &(FileId, u64)| {
                let model = &mut **model;
                let mut places = model.blobs.values_mut().chain(model.result_files.values_mut());
                let place = places.find(|file| *file == from);
                place.map(|file| file.generation = *generation).is_some()
            };
            moves.moved.iter().map(relocate).collect()
        });
        assert!(outcome.is_ok() || self.disk.is_off(), "{outcome:?}");
        let _ = outcome.unwrap_or(Compacted::NothingToGain);
    }

    /// Opens the directory that a power cut has left. With `must`, it has to contain everything that was acknowledged.
    fn check(&self, image: &TempDir, must: bool, sync: SyncPolicy) {
        let (volume, index) = open(image.path(), self.sizes, sync);
        let content = |key: &Key| {
            let found = index.renew(key, 0)?;
            let stored = volume.open(&found.file).ok()?;
            let bytes = read_all(&*stored, MOST).ok()?;
            let digest = DigestFunction::Sha256.digest(&bytes);
            let is_right = key.kind == EntryKind::Result || digest == key.digest;
            // Readers hash small blobs and files without checksums.
            let is_hashed = !stored.is_checked_when_read() || key.digest.size() <= 65_536;
            assert!(is_right || is_hashed, "wrong bytes of {key:?} would be served");
            is_right.then_some(Bytes::from(bytes))
        };
        for digest in self.model.blobs.keys().filter(|_| must) {
            assert!(content(&key_of(EntryKind::Blob, *digest)).is_some(), "{digest} is lost");
        }
        for (&name, (versions, must_be)) in &self.model.results {
            let all: Vec<Bytes> = versions.iter().map(|version| result(name, *version)).collect();
            let found =
                content(&result_key(name)).filter(|bytes| crate::actors::cas::results::is_whole(bytes));
            match found {
                Some(bytes) if must => assert!(all.contains(&bytes), "result {name} is an old one"),
                Some(_) => {}
                None => assert!(!must || !must_be, "result {name} is lost"),
            }
        }
        // The store continues to work.
        let bytes = Bytes::from_static(b"after the power cut");
        let key = key_of(EntryKind::Blob, DigestFunction::Sha256.digest(&bytes));
        assert!(volume.write(&[NewFile { key, pieces: &[bytes] }])[0].is_ok());
    }
}

fn run(seed: u64, sizes: Sizes, sync: SyncPolicy) {
    let root = TempDir::new().unwrap();
    let disk = SimulatedDisk::new(root.path(), seed);
    let (volume, _) = open(root.path(), sizes, sync);
    let mut random = Random(seed);
    let steps = random.below(60);
    match sync {
        SyncPolicy::BeforeAnswer if random.below(2) == 0 => disk.fail_power_at(1 + random.below(120) as u32),
        _ => {}
    }
    let mut run = PowerRun { disk, volume, random, model: Model::default(), sizes };
    for _ in 0..steps {
        run.step();
        if run.disk.is_off() {
            break;
        }
    }
    let image = run.disk.cut_power();
    run.check(&image, sync == SyncPolicy::BeforeAnswer, sync);
}

fn small_segments() -> Sizes {
    Sizes::for_tests(4_096, 40_000)
}

/// Everything that was acknowledged exists after a power cut, with the right bytes.
#[test]
fn with_disk_durability_a_power_cut_loses_nothing_that_was_acknowledged() {
    for seed in 0..40 {
        run(seed, small_segments(), SyncPolicy::BeforeAnswer);
        run(seed, Sizes::of(0), SyncPolicy::BeforeAnswer);
    }
}

/// Without syncs, a power cut may lose anything, and the remaining files are right or their damage is noticed.
#[test]
fn with_process_durability_a_power_cut_never_leaves_wrong_bytes() {
    for seed in 0..40 {
        run(seed, small_segments(), SyncPolicy::Never);
        run(seed, Sizes::of(0), SyncPolicy::Never);
    }
}
