//! The whole store against a trivial model: random requests of several builds on a store that is always full, with
//! results, purges, readers, compaction, restarts, kills and power cuts.
//!
//! The model is a map of what was acknowledged. Nothing wrong is ever served, and everything that was acknowledged is
//! there or was evicted: no more is missing than the store says that it has evicted. What was promised to a build with
//! less than its share is always there, and a purged or replaced result never comes back.

mod requests;

use super::{
    super::volume::{
        local::Local,
        segments::Sizes,
        simulation::{Random, SimulatedDisk},
    },
    *,
};
use crate::caller::Build;
use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    net::Ipv4Addr,
    sync::Arc,
};

const MAX_BYTES: u64 = 1_200 << 10;
/// Small segments, so that many are filled, closed and compacted.
const SEGMENT_BYTES: u64 = 48 << 10;
const WASTE_BYTES: u64 = MAX_BYTES / 10;
/// What the build has promised that has to keep all of it: well below its share.
const PROMISED_MAX: u64 = 100 << 10;
/// The lock, the format and the note.
const SMALL_FILES: u64 = 3 * 4_096;
/// The number of the builds that upload; the first has to keep all of its promises.
const BUILDS: u64 = 3;
const NOBODY: u64 = BUILDS;
const RESULTS: u64 = 24;
const STEPS: u64 = 200;
/// Every request ends before this.
const REQUEST_MAX: Duration = Duration::from_secs(60);

fn build(number: u64) -> Owner {
    let peer = Peer::V4(Ipv4Addr::new(127, 0, 0, number as u8));
    Owner { peer, build: Build::of(&format!("build {number}")) }
}

/// What may be found.
#[derive(Default)]
struct Model {
    /// Blobs that were acknowledged.
    blobs: BTreeMap<Digest, Bytes>,
    /// The versions of each result that may be found with the blobs that they refer to, and whether one was
    /// acknowledged and not purged.
    results: BTreeMap<u64, (BTreeMap<u64, Vec<Digest>>, bool)>,
    /// What build 0 was promised, with the bytes that it takes.
    promised: HashMap<Digest, u64>,
}

/// What all runs have done, so that none of them is empty.
#[derive(Debug, Default, Clone, Copy)]
struct Happened {
    evicted: u64,
    followed: u64,
    withdrawn: u64,
    moved: u64,
    promises_kept: u64,
    hits: u64,
    purged: u64,
    kills: u64,
    power_cuts: u64,
}

struct ModelRun {
    random: Random,
    sync: SyncPolicy,
    disk: Option<Arc<SimulatedDisk>>,
    store: Option<TestStore>,
    readers: Vec<(Digest, BlobReader)>,
    model: Model,
    /// Entries that earlier runs of the store have evicted, or dropped with their blobs.
    evicted_before: u64,
    purged_in_this_run: u64,
    happened: Happened,
}

/// The content of a version of a result, which refers to blobs.
fn result_of(name: u64, version: u64, blobs: &[Digest]) -> reapi::ActionResult {
    let file = |(at, blob): (usize, &Digest)| reapi::OutputFile {
        path: format!("o{at}"),
        digest: Some(blob.to_wire()),
        ..Default::default()
    };
    let output_files = blobs.iter().enumerate().map(file).collect();
    let stdout_raw = [name, version].map(u64::to_le_bytes).concat().into();
    reapi::ActionResult { output_files, stdout_raw, ..Default::default() }
}

fn action(name: u64) -> Digest {
    digest(&name.to_le_bytes())
}

impl ModelRun {
    async fn new(seed: u64, sync: SyncPolicy) -> Self {
        let mut run = Self {
            random: Random(seed),
            sync,
            disk: None,
            store: None,
            readers: vec![],
            model: Model::default(),
            evicted_before: 0,
            purged_in_this_run: 0,
            happened: Happened::default(),
        };
        run.open(Rc::new(TempDir::new().unwrap())).await;
        run
    }

    async fn open(&mut self, root: Rc<TempDir>) {
        let seed = self.random.below(u64::MAX);
        // A disk of the same directory would be found first.
        self.disk = None;
        self.disk = (self.sync == SyncPolicy::BeforeAnswer).then(|| SimulatedDisk::new(root.path(), seed));
        let instances = instances();
        let settings = StoreSettings {
            sync: self.sync,
            leases: LeaseTimes { named: 10_800, unnamed: 900 },
            ..settings_at(root.path().join("store"), MAX_BYTES)
        };
        let sizes = Sizes::for_tests(SEGMENT_BYTES, WASTE_BYTES);
        // The jobs of a killed store may still be ending.
        let volume =
            eventually(|| async { Local::with_sizes(&settings.root, &instances, sizes, self.sync).ok() })
                .await;
        let actor = CasActor::over(Box::new(volume), settings, Handle::current()).unwrap();
        let (main, other) = (instances.get("").unwrap(), instances.get("other/one").unwrap());
        self.store = Some(TestStore { root, cas: actor.launch(), main, other, max_bytes: MAX_BYTES });
    }

    fn store(&self) -> &TestStore {
        self.store.as_ref().unwrap()
    }

    /// The handle of a build, or of nobody, who is promised nothing.
    fn of(&self, number: u64) -> Cas {
        if number == NOBODY {
            return self.store().cas.clone();
        }
        let build = build(number);
        self.store().cas.on_behalf_of(Caller::without_connection(build.peer)).for_build(build)
    }

    fn main(&self) -> Instance {
        self.store().main.clone()
    }

    fn is_off(&self) -> bool {
        self.disk.as_ref().is_some_and(|disk| disk.is_off())
    }

    /// A refusal for lack of room is fine, and so is any error once the power is off.
    fn excuse<T>(&self, outcome: Result<T>) -> Option<T> {
        match outcome {
            Ok(done) => Some(done),
            Err(Error::Exhausted { .. }) => None,
            Err(_) if self.is_off() => None,
            Err(error) => panic!("{error}"),
        }
    }

    fn new_blob(&mut self, most: u64) -> Bytes {
        let length = 1 + self.random.below(most);
        noise(length as usize, self.random.below(1 << 40))
    }

    /// Some of the blobs that were acknowledged.
    fn some_blobs(&mut self, most: u64) -> Vec<Digest> {
        let all: Vec<Digest> = self.model.blobs.keys().copied().collect();
        let count = self.random.below(most) + 1;
        (0..count)
            .filter_map(|_| all.get(self.random.below(all.len().max(1) as u64) as usize).copied())
            .collect()
    }

    /// The build that has to keep all of its promises, if it has not had enough, or another one, or nobody.
    fn any_uploader(&mut self) -> u64 {
        match self.random.below(BUILDS + 1) {
            0 if self.has_enough() => NOBODY,
            number => number,
        }
    }

    /// The same without the other builds: what two builds have touched is charged to neither, and would fill the store.
    fn any_reader(&mut self) -> u64 {
        if self.random.below(3) == 0 && !self.has_enough() { 0 } else { NOBODY }
    }

    fn has_enough(&self) -> bool {
        self.model.promised.values().sum::<u64>() >= PROMISED_MAX
    }

    fn promise(&mut self, number: u64, blob: Digest) {
        if number == 0 {
            self.model.promised.insert(blob, blob.size() + 4_096);
        }
    }

    fn check_version(&self, name: u64, found: &reapi::ActionResult) {
        let allowed = self.model.results.get(&name).map(|(versions, _)| versions);
        // Its standard output is a blob by now, and tells the version.
        let is_version = |version: &u64| {
            let content = [name, *version].map(u64::to_le_bytes).concat();
            found.stdout_raw == content || found.stdout_digest == Some(digest(&content).to_wire())
        };
        let is_allowed = allowed.is_some_and(|versions| versions.keys().any(is_version));
        assert!(is_allowed, "result {name} was purged or replaced, and is back: {found:?}");
    }

    /// Everything that may be said of the store at any time.
    async fn check(&mut self) {
        let store = self.store();
        let mut absent = BTreeSet::new();
        for (blob, bytes) in &self.model.blobs {
            match store.get(*blob).await {
                Ok(read) => assert_eq!(read, bytes),
                Err(Error::NotFound(_)) => _ = absent.insert(*blob),
                Err(error) => panic!("{blob}: {error}"),
            }
        }
        let mut results_absent = 0;
        // Also those that were purged.
        for name in 0..RESULTS {
            let found = store.cas.get_result(&store.main, action(name)).await.unwrap();
            match (found, self.model.results.get(&name)) {
                (Some(found), _) => self.check_version(name, &found),
                (None, Some((versions, must_be)))
                    if !versions.values().flatten().any(|blob| absent.contains(blob)) =>
                {
                    results_absent += usize::from(*must_be);
                }
                (None, _) => {}
            }
        }
        let absent = (absent.len() + results_absent) as u64;
        let tally = store.cas.measure().tally;
        // Only a purge takes what is leased.
        assert!(tally.broken_promises <= self.purged_in_this_run && tally.damaged == 0, "{tally:?}");
        let evicted = self.evicted_before + tally.evicted + tally.followed;
        assert!(absent <= evicted, "{absent} entries are missing, and {evicted} were evicted");
        let promised: Vec<Digest> = self.model.promised.keys().copied().collect();
        let missing = store.cas.find_missing(&store.main, &promised).await.unwrap();
        assert_eq!(missing, [], "promised to a build with less than its share");
        let totals = eventually(|| async {
            let totals = store.inspect().await.totals;
            (totals.deleting == 0).then_some(totals)
        });
        let totals = totals.await;
        assert!(totals.used + totals.reserved <= totals.limit, "{totals:?}");
        let on_disk: u64 = files_of_store(store).map(|bytes| bytes.div_ceil(4_096) * 4_096).sum();
        assert!(on_disk <= MAX_BYTES + SMALL_FILES, "{on_disk} bytes on disk, {totals:?}");
        self.happened.promises_kept += promised.len() as u64;
    }

    /// Remembers what this run of the store has done, and ends it. Nothing but uses is written at the end.
    async fn abandon(&mut self) -> Rc<TempDir> {
        self.readers.clear();
        let TestStore { root, cas, .. } = self.store.take().unwrap();
        // The actor would live on. What it has begun goes on while the next one starts.
        let _ = cas.actor().send(CloseStore).await;
        let tally = cas.measure().tally;
        self.happened.withdrawn += tally.withdrawn_leases;
        assert!(tally.broken_promises <= std::mem::take(&mut self.purged_in_this_run), "{tally:?}");
        self.evicted_before += tally.evicted + tally.followed;
        self.happened.evicted += tally.evicted;
        self.happened.followed += tally.followed;
        root
    }

    /// The process dies, perhaps in the middle of a request.
    async fn kill(&mut self) {
        let root = self.abandon().await;
        self.happened.kills += 1;
        self.open(root).await;
    }

    /// The power fails, perhaps in the middle of a request. What was deleted and not synced may be back, so the store
    /// may have to evict at its start, also what was promised.
    async fn cut_power(&mut self) {
        self.abandon().await;
        let image = self.disk.take().unwrap().cut_power();
        self.happened.power_cuts += 1;
        self.open(Rc::new(image)).await;
        let promised: Vec<Digest> = self.model.promised.keys().copied().collect();
        let missing = self.store().cas.find_missing(&self.main(), &promised).await.unwrap();
        self.model.promised.retain(|blob, _| !missing.contains(blob));
    }

    /// The same build goes on after a restart: it asks again for what it needs.
    async fn resume_build(&mut self) {
        let promised: Vec<Digest> = self.model.promised.keys().copied().collect();
        let missing = self.of(0).find_missing(&self.main(), &promised).await.unwrap();
        assert_eq!(missing, [], "promised before the restart");
    }

    async fn run(mut self) -> Happened {
        for _ in 0..STEPS {
            if let Some(disk) = self.disk.as_ref().filter(|_| self.random.below(40) == 0) {
                disk.fail_power_at(1 + self.random.below(12) as u32);
            }
            match self.random.below(60) {
                0 if self.disk.is_none() => {
                    // The request is dropped at whatever it waits for.
                    let after = Duration::from_micros(self.random.below(3_000));
                    let _ = tokio::time::timeout(after, self.step()).await;
                    self.kill().await;
                    self.check_and_resume().await;
                }
                1 if !self.is_off() => {
                    self.kill().await;
                    self.check_and_resume().await;
                }
                2..5 if !self.is_off() => self.check().await,
                _ => tokio::time::timeout(REQUEST_MAX, self.step()).await.expect("a request did not end"),
            }
            if self.is_off() {
                self.cut_power().await;
                self.check_and_resume().await;
            }
        }
        self.check().await;
        while !self.readers.is_empty() {
            self.close_reader().await;
        }
        self.abandon().await;
        self.happened
    }

    async fn check_and_resume(&mut self) {
        self.resume_build().await;
        self.check().await;
    }
}

/// The sizes of the files of a store.
fn files_of_store(store: &TestStore) -> impl Iterator<Item = u64> {
    let mut directories = vec![store.root.path().join("store")];
    let mut sizes = vec![];
    while let Some(directory) = directories.pop() {
        for entry in std::fs::read_dir(directory).into_iter().flatten().flatten() {
            match entry.metadata() {
                Ok(metadata) if metadata.is_dir() => directories.push(entry.path()),
                Ok(metadata) => sizes.push(metadata.len()),
                Err(_) => {}
            }
        }
    }
    sizes.into_iter()
}

async fn runs(seeds: std::ops::Range<u64>, sync: SyncPolicy) -> Happened {
    let mut all = Happened::default();
    for seed in seeds {
        println!("seed {seed} {sync:?}");
        let one = ModelRun::new(seed, sync).await.run().await;
        all.evicted += one.evicted;
        all.followed += one.followed;
        all.withdrawn += one.withdrawn;
        all.moved += one.moved;
        all.promises_kept += one.promises_kept;
        all.hits += one.hits;
        all.purged += one.purged;
        all.kills += one.kills;
        all.power_cuts += one.power_cuts;
    }
    println!("{all:?}");
    let least = [all.evicted, all.withdrawn, all.moved, all.promises_kept, all.hits, all.purged];
    assert!(least.into_iter().all(|count| count > 10) && all.followed > 0, "{all:?}");
    all
}

/// CAS-05, CAS-22, AC-03.
#[actix::test]
async fn index_leases_segments_compaction_and_eviction_survive_kills_like_their_model() {
    assert!(runs(0..12, SyncPolicy::Never).await.kills > 10);
}

#[actix::test]
async fn index_leases_segments_compaction_and_eviction_survive_power_cuts_like_their_model() {
    assert!(runs(100..110, SyncPolicy::BeforeAnswer).await.power_cuts > 10);
}
