//! Tests for both kinds of streams, with real files.

use super::{
    follow::{Follower, Piece},
    *,
};
use crate::instance::Instances;
use gorego_reapi::digest::{Digest, DigestFunction};
use proptest::prelude::*;
use std::fs;

fn limits() -> StreamLimits {
    let hour = Duration::from_secs(3600);
    StreamLimits { streams: 8, bytes: 1 << 20, stream_bytes: 1 << 19, idle: Some(hour), kept: hour }
}

/// A client with its own address.
fn client(host: u8) -> Caller {
    Caller::connected(([127, 0, 0, host], 1).into())
}

struct Bench {
    streams: LogStreams,
    directory: tempfile::TempDir,
}

impl Bench {
    fn new(clients: StreamLimits) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let settings = LogSettings {
            client_streams: true,
            clients,
            runs: limits(),
            spool_directory: directory.path().to_owned(),
        };
        Self { streams: LogStreams::new(settings), directory }
    }

    fn run(&self) -> LiveRun {
        let instance = Instances::new(["main"]).unwrap().get("main").unwrap();
        self.streams.begin_run(&instance, self.directory.path()).unwrap()
    }

    fn write(&self, kind: LogKind, text: &str) {
        use std::io::Write as _;
        let path = self.directory.path().join(kind.name());
        let mut file = fs::OpenOptions::new().create(true).append(true).open(path).unwrap();
        file.write_all(text.as_bytes()).unwrap();
    }
}

fn name(run: &LiveRun, kind: LogKind) -> LogName {
    LogName { parent: "main".into(), id: StreamId::Run(run.logs(), kind), token: None }
}

/// Reads everything from an offset to the end.
async fn rest(mut follower: Follower, offset: u64) -> Result<Vec<u8>> {
    let mut bytes = Vec::new();
    loop {
        match follower.next(offset + bytes.len() as u64, 7).await? {
            Piece::Bytes(piece) => bytes.extend_from_slice(&piece),
            Piece::End => return Ok(bytes),
            Piece::Stored(digest) => return Err(Error::MissingBlobs(vec![digest])),
        }
    }
}

fn digest(text: &str) -> Digest {
    DigestFunction::Sha256.digest(text.as_bytes())
}

fn runtime() -> tokio::runtime::Runtime {
    tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap()
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    /// LOG-03, LOG-04, LOG-05: compared with a vector of bytes; readers from each offset that join before, during and
    /// after.
    #[test]
    fn a_client_stream_is_what_was_appended_in_order_and_nothing_else_can_be_done_to_it(
        writes in proptest::collection::vec((proptest::collection::vec(any::<u8>(), 0..40), 0i8..4), 0..12),
        from in 0u64..30,
    ) {
        runtime().block_on(async {
            let bench = Bench::new(limits());
            let created = bench.streams.create("main".into(), client(1)).unwrap();
            let read = created.for_reading();
            let writer = bench.streams.writer(&created).unwrap();
            let mut model: Vec<u8> = Vec::new();
            let mut readers = vec![tokio::spawn(rest(bench.streams.follow(&read, client(20)).unwrap(), from))];
            for (bytes, shift) in writes {
                let offset = model.len() as u64;
                // Three of four writes start at the end of the stream; the others try to overwrite or leave a hole.
                if shift == 0 {
                    let wrong = if bytes.len() % 2 == 0 { offset + 1 } else { offset.wrapping_sub(1) };
                    let refused = writer.append(wrong, bytes.into(), false).await;
                    prop_assert!(matches!(refused, Err(Error::Invalid(_))));
                    continue;
                }
                model.extend_from_slice(&bytes);
                let committed = writer.append(offset, bytes.into(), false).await.unwrap();
                prop_assert_eq!(committed, Committed { bytes: model.len() as u64, finished: false });
                prop_assert_eq!(writer.committed(), committed);
                readers.push(tokio::spawn(rest(bench.streams.follow(&read, client(20)).unwrap(), from)));
            }
            let end = model.len() as u64;
            let last = writer.append(end, Bytes::new(), true).await.unwrap();
            prop_assert_eq!(last, Committed { bytes: end, finished: true });
            for offset in [0, end] {
                let late = writer.append(offset, Bytes::from_static(b"x"), false).await;
                prop_assert!(matches!(late, Err(Error::Precondition(_))));
            }
            readers.push(tokio::spawn(rest(bench.streams.follow(&read, client(20)).unwrap(), from)));
            for reader in readers {
                let got = reader.await.unwrap();
                match model.get(usize::try_from(from).unwrap()..) {
                    Some(wanted) => prop_assert_eq!(got.unwrap(), wanted),
                    None => prop_assert!(matches!(got, Err(Error::OutOfRange(_)))),
                }
            }
            Ok(())
        })?;
    }
}

/// LOG-04: if two writers start at the same end, one of them fails.
#[tokio::test]
async fn two_writers_cannot_write_the_same_place() {
    let bench = Bench::new(limits());
    let name = bench.streams.create("main".into(), client(2)).unwrap();
    let (one, two) = (bench.streams.writer(&name).unwrap(), bench.streams.writer(&name).unwrap());
    let (one, two) = tokio::join!(one.append(0, "one".into(), false), two.append(0, "two".into(), false));
    assert!(one.is_ok() != two.is_ok(), "{one:?} {two:?}");
    let writer = bench.streams.writer(&name).unwrap();
    writer.append(3, Bytes::new(), true).await.unwrap();
    let bytes = rest(bench.streams.follow(&name.for_reading(), client(20)).unwrap(), 0).await.unwrap();
    assert_eq!(bytes, if one.is_ok() { b"one" } else { b"two" });
}

/// LOG-01, LOG-02, GEN-15.
#[tokio::test]
async fn only_the_exact_names_open_a_stream() {
    let bench = Bench::new(limits());
    let name = bench.streams.create("main".into(), client(3)).unwrap();
    let read = name.for_reading();
    assert!(matches!(bench.streams.writer(&read), Err(Error::Invalid(_))));
    assert!(matches!(bench.streams.follow(&name, client(20)), Err(Error::Invalid(_))));
    let elsewhere = LogName { parent: "other".into(), ..name.clone() };
    assert!(matches!(bench.streams.writer(&elsewhere), Err(Error::NotFound(_))));
    assert!(matches!(bench.streams.follow(&elsewhere.for_reading(), client(20)), Err(Error::NotFound(_))));
    let guessed = LogName { token: Some(WriteToken::new()), ..name };
    assert!(matches!(bench.streams.writer(&guessed), Err(Error::NotFound(_))));
    let run = bench.run();
    let written = LogName { token: Some(WriteToken::new()), ..self::name(&run, LogKind::Stdout) };
    assert!(matches!(bench.streams.writer(&written), Err(Error::NotFound(_))));
}

/// EXE-64: readers that arrive before the file exists, while it exists, and after it was removed.
#[tokio::test]
async fn the_output_of_a_run_is_read_from_its_file_and_then_from_its_blob() {
    let bench = Bench::new(limits());
    let run = bench.run();
    let stdout = name(&run, LogKind::Stdout);
    let follow = || bench.streams.follow(&stdout, client(20)).unwrap();
    let early = tokio::spawn(rest(follow(), 0));
    tokio::task::yield_now().await;
    bench.write(LogKind::Stdout, "first ");
    let mut during = follow();
    assert_eq!(during.next(0, 100).await, Ok(Piece::Bytes("first ".into())));
    let during = tokio::spawn(rest(during, 6));
    bench.write(LogKind::Stdout, "second");
    fs::remove_file(bench.directory.path().join("stdout")).unwrap();
    run.stored(LogKind::Stdout, Some(digest("first second")));
    assert_eq!(during.await.unwrap().unwrap(), b"second");
    // Whether this reader opened the file is random. In both cases it misses nothing.
    match early.await.unwrap() {
        Ok(bytes) => assert_eq!(bytes, b"first second"),
        Err(stored) => assert_eq!(stored, Error::MissingBlobs(vec![digest("first second")])),
    }
    drop(run);
    assert_eq!(follow().next(3, 100).await, Ok(Piece::Stored(digest("first second"))));
}

/// EXE-64: the streams of a run end, however the run ends.
#[tokio::test]
async fn the_streams_of_a_run_that_is_lost_end_after_what_there_was() {
    let bench = Bench::new(limits());
    let run = bench.run();
    let (stdout, stderr) = (name(&run, LogKind::Stdout), name(&run, LogKind::Stderr));
    bench.write(LogKind::Stdout, "so far");
    let mut follower = bench.streams.follow(&stdout, client(20)).unwrap();
    assert_eq!(follower.next(0, 100).await, Ok(Piece::Bytes("so far".into())));
    let waiting = tokio::spawn(rest(follower, 6));
    run.stored(LogKind::Stderr, None);
    drop(run);
    assert_eq!(waiting.await.unwrap().unwrap(), b"");
    assert_eq!(rest(bench.streams.follow(&stderr, client(20)).unwrap(), 0).await.unwrap(), b"");
    assert!(matches!(
        rest(bench.streams.follow(&stdout, client(20)).unwrap(), 0).await,
        Err(Error::NotFound(_))
    ));
}

/// If a command replaces its log with something that is not a regular file, it is not read.
#[tokio::test]
async fn a_link_or_a_fifo_in_the_place_of_a_log_is_not_followed() {
    let bench = Bench::new(limits());
    let run = bench.run();
    let secret = bench.directory.path().join("secret");
    fs::write(&secret, "secret").unwrap();
    std::os::unix::fs::symlink(&secret, bench.directory.path().join("stdout")).unwrap();
    let fifo = bench.directory.path().join("stderr");
    rustix::fs::mknodat(rustix::fs::CWD, &fifo, rustix::fs::FileType::Fifo, rustix::fs::Mode::RWXU, 0)
        .unwrap();
    for kind in [LogKind::Stdout, LogKind::Stderr] {
        let reader = tokio::spawn(rest(bench.streams.follow(&name(&run, kind), client(20)).unwrap(), 0));
        tokio::task::yield_now().await;
        run.stored(kind, None);
        assert_eq!(reader.await.unwrap().unwrap(), b"");
    }
}

/// A slow reader could otherwise keep the disk blocks of streams that are no longer counted.
#[test]
fn a_removed_stream_frees_its_bytes_and_ends_the_readers_that_have_not_read_them() {
    // With one thread, blocking jobs run in order.
    let mut builder = tokio::runtime::Builder::new_current_thread();
    builder.max_blocking_threads(1).enable_all().build().unwrap().block_on(async {
        let bench = Bench::new(StreamLimits { streams: 1, ..limits() });
        let created = bench.streams.create("main".into(), client(1)).unwrap();
        let writer = bench.streams.writer(&created).unwrap();
        writer.append(0, "123456".into(), true).await.unwrap();
        let follow = || bench.streams.follow(&created.for_reading(), client(20)).unwrap();
        let (mut slow, mut quick) = (follow(), follow());
        assert_eq!(slow.next(0, 3).await, Ok(Piece::Bytes("123".into())));
        let spool = writer.stream.spool.clone();
        bench.streams.create("main".into(), client(2)).unwrap();
        blocking(|| Ok(())).await.unwrap();
        assert_eq!(spool.read(0, 6), Ok(Bytes::new()), "the file is empty");
        let refused = slow.next(3, 3).await.unwrap_err();
        assert!(matches!(&refused, Error::NotFound(text) if text.contains("removed")), "{refused}");
        assert_eq!(quick.next(6, 3).await, Ok(Piece::End));
    });
}

/// The stream may be removed while its append is on the way to the disk.
#[tokio::test]
async fn an_append_to_a_stream_that_is_being_removed_leaves_no_bytes() {
    let bench = Bench::new(limits());
    let created = bench.streams.create("main".into(), client(1)).unwrap();
    let writer = bench.streams.writer(&created).unwrap();
    writer.append(0, "123".into(), false).await.unwrap();
    let spool = writer.stream.spool.clone();
    let turn = spool.turn(3).await.unwrap();
    spool.remove();
    spool.free();
    assert!(matches!(turn.append(b"456", true), Err(Error::NotFound(_))));
    assert_eq!(spool.read(0, 6), Ok(Bytes::new()));
    assert_eq!(spool.committed(), Committed { bytes: 3, finished: false });
}

/// Every reader ends: after the stream's idle limit, and at shutdown.
#[tokio::test]
async fn readers_do_not_wait_for_ever() {
    let bench = Bench::new(StreamLimits { idle: Some(Duration::ZERO), ..limits() });
    let idle = bench.streams.create("main".into(), client(4)).unwrap();
    let reader = tokio::spawn(rest(bench.streams.follow(&idle.for_reading(), client(20)).unwrap(), 0));
    let sweeping = tokio::spawn(bench.streams.clone().sweep());
    assert!(matches!(reader.await.unwrap(), Err(Error::DeadlineExceeded(_))));
    assert!(matches!(bench.streams.writer(&idle), Err(Error::NotFound(_))));
    let run = bench.run();
    let reader =
        tokio::spawn(rest(bench.streams.follow(&name(&run, LogKind::Stdout), client(20)).unwrap(), 0));
    bench.streams.close();
    assert!(matches!(reader.await.unwrap(), Err(Error::Unavailable(_))));
    sweeping.await.unwrap();
}

#[tokio::test]
async fn bounds_are_refusals_that_leave_a_stream_as_it_was() {
    let bench = Bench::new(StreamLimits { streams: 2, bytes: 10, stream_bytes: 6, ..limits() });
    let one = bench.streams.create("main".into(), client(5)).unwrap();
    let two = bench.streams.create("main".into(), client(6)).unwrap();
    let full = |error| matches!(error, Error::Exhausted { .. });
    assert!(full(bench.streams.create("main".into(), client(7)).unwrap_err()));
    let (one, writer) = (bench.streams.writer(&one).unwrap(), bench.streams.writer(&two).unwrap());
    one.append(0, "123456".into(), false).await.unwrap();
    let too_long = one.append(6, "7".into(), false).await.unwrap_err();
    assert!(matches!(too_long, Error::OutOfRange(_)), "GEN-20: waiting does not help, {too_long}");
    writer.append(0, "1234".into(), false).await.unwrap();
    assert!(full(writer.append(4, "5".into(), false).await.unwrap_err()));
    assert_eq!(writer.committed(), Committed { bytes: 4, finished: false });
    // A finished stream makes room.
    one.append(6, Bytes::new(), true).await.unwrap();
    let three = bench.streams.create("main".into(), client(8)).unwrap();
    writer.append(4, "56".into(), true).await.unwrap();
    assert_eq!(
        rest(bench.streams.follow(&two.for_reading(), client(20)).unwrap(), 0).await.unwrap(),
        b"123456"
    );
    assert!(bench.streams.writer(&three).is_ok());
    // No file is left under a name.
    assert_eq!(fs::read_dir(bench.directory.path()).unwrap().count(), 0);
}

#[tokio::test]
async fn unfinished_streams_of_one_client_leave_places_and_bytes_for_others() {
    let bench = Bench::new(StreamLimits { streams: 9, bytes: 90, stream_bytes: 90, ..limits() });
    let greedy = client(1);
    let mut made: Vec<_> = (0..7).map(|_| bench.streams.create("main".into(), greedy).unwrap()).collect();
    assert!(matches!(bench.streams.create("main".into(), greedy), Err(Error::Exhausted { .. })));
    let _of_next_connection = bench.streams.create("main".into(), client(1)).unwrap();
    assert!(matches!(bench.streams.create("main".into(), client(1)), Err(Error::Exhausted { .. })));
    let other = bench.streams.create("main".into(), client(2)).unwrap();
    let writer = bench.streams.writer(&made.pop().unwrap()).unwrap();
    writer.append(0, vec![b'x'; 80].into(), false).await.unwrap();
    let refused = writer.append(80, "x".into(), false).await.unwrap_err();
    assert!(matches!(refused, Error::Exhausted { .. }), "{refused}");
    let other = bench.streams.writer(&other).unwrap();
    other.append(0, vec![b'x'; 10].into(), true).await.unwrap();
    // Finished streams make room, here first for their own client.
    writer.append(80, Bytes::new(), true).await.unwrap();
    bench.streams.create("main".into(), client(1)).unwrap();
    assert_eq!(bench.streams.0.bytes.held(), 0);
}
