//! Tests of calls that are dropped while their job waits for a thread: the job keeps its memory until it has run.

use super::{super::volume::memory::Memory, *};
use futures::{FutureExt as _, future::LocalBoxFuture};
use std::sync::mpsc;
use tokio::runtime::{Builder, Runtime};

/// Polls after which a call that is not ready waits for its job: it waits for nothing else but a few messages to the
/// actor, which runs on the same thread.
const POLLS: usize = 1_000;

/// A store whose jobs share one thread.
struct OneThreadStore {
    cas: Cas,
    main: Instance,
    runtime: Option<Runtime>,
}

impl OneThreadStore {
    fn new() -> Self {
        let runtime = Builder::new_multi_thread().worker_threads(1).max_blocking_threads(1).build().unwrap();
        let settings = settings_at("nowhere".into(), 1_000 * MB);
        let actor = CasActor::over(Box::new(Memory::default()), settings, runtime.handle().clone()).unwrap();
        let cas = actor.launch().on_behalf_of(Caller::connected(([127, 0, 0, 1], 1).into()));
        Self { cas, main: instances().get("").unwrap(), runtime: Some(runtime) }
    }

    /// Keeps the thread busy until the answer is dropped.
    fn block(&self) -> mpsc::Sender<()> {
        let (free, busy) = mpsc::channel::<()>();
        self.runtime.as_ref().unwrap().spawn_blocking(move || busy.recv());
        free
    }

    /// Drops a call when its job waits for the thread, and checks that the job holds a part of the budget until it has
    /// run.
    async fn assert_job_keeps_its_share<T>(&self, budget: &Budget, mut call: LocalBoxFuture<'_, T>) {
        assert_eq!(budget.held(), 0);
        let thread = self.block();
        for _ in 0..POLLS {
            assert!(call.as_mut().now_or_never().is_none(), "it waits for the thread");
            tokio::task::yield_now().await;
        }
        drop(call);
        assert!(budget.held() > 0, "the job has not run");
        drop(thread);
        eventually(|| async { (budget.held() == 0).then_some(()) }).await;
    }
}

impl Drop for OneThreadStore {
    fn drop(&mut self) {
        // A runtime must not be dropped within another one.
        self.runtime.take().unwrap().shutdown_background();
    }
}

#[actix::test]
async fn a_job_that_decodes_a_message_keeps_its_memory_when_its_call_is_dropped() {
    let store = OneThreadStore::new();
    let command = reapi::Command { arguments: vec!["x".into(); 100_000], ..Default::default() };
    let bytes = Bytes::from(prost::Message::encode_to_vec(&command));
    let decoding = store.cas.decode::<reapi::Command>(bytes, 64 * MB, "Command");
    store.assert_job_keeps_its_share(&store.cas.shared().decoded, Box::pin(decoding)).await;
}

#[actix::test]
async fn jobs_that_read_and_write_batches_keep_their_memory_when_their_calls_are_dropped() {
    let store = OneThreadStore::new();
    let bytes = noise(LARGE, 1);
    let blob = digest(&bytes);
    let writing = store.cas.write_many(&store.main, vec![(blob, bytes)]);
    store.assert_job_keeps_its_share(&store.cas.shared().batches, Box::pin(writing)).await;
    let is_stored = async || store.cas.find_missing(&store.main, &[blob]).await.unwrap().is_empty();
    eventually(async || is_stored().await.then_some(())).await;
    let reads = &store.cas.shared().reads;
    let reading = store.cas.read_many(&store.main, vec![blob]);
    store.assert_job_keeps_its_share(reads, Box::pin(reading)).await;
    let reader = store.cas.open(&store.main, blob).await.unwrap();
    assert_eq!(reads.held(), 0);
    assert_eq!(read_all(&reader).await.unwrap().len(), LARGE);
}

/// The bytes are charged until they are written, and not only until their job is started.
#[actix::test]
async fn a_job_that_writes_a_part_of_an_upload_keeps_its_memory_until_it_has_run() {
    let store = OneThreadStore::new();
    let received = &store.cas.shared().received;
    let bytes = noise(2 * LARGE, 1);
    let begun = store.cas.begin_upload(&store.main, "upload", digest(&bytes), 0).await.unwrap();
    let Upload::Writer(mut writer) = begun else { panic!() };
    let thread = store.block();
    writer.write(bytes.slice(..LARGE)).await.unwrap();
    assert!(received.held() > LARGE as u64, "the job has not run");
    drop(writer);
    assert!(received.held() > LARGE as u64, "the job has not run");
    drop(thread);
    eventually(|| async { (received.held() == 0).then_some(()) }).await;
}
