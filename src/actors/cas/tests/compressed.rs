//! Tests of zstd: uploads, reads from any offset, forms and batches.

use super::*;
use crate::actors::cas::settings::SMALL_BLOB_BYTES;
use futures::future::join_all;
use gorego_reapi::compression::{CHUNK_BYTES, decode_all, stored_frame};

const NAME: &str = "uploads/6ba7b810-9dad-11d1-80b4-00c04fd430c8/compressed-blobs/zstd/x";

/// Compressible bytes.
fn text(length: usize, seed: u64) -> Bytes {
    noise(length, seed).iter().map(|byte| b"the quick fox"[usize::from(byte % 13)]).collect()
}

/// A zstd stream, as a client makes it.
fn pack(plain: &[u8]) -> Bytes {
    zstd::encode_all(plain, 3).unwrap().into()
}

async fn begin(store: &TestStore, name: &str, digest: Digest, offset: u64) -> Result<BlobWriter> {
    match store.cas.begin_upload(&store.main, name, digest, offset).await? {
        Upload::Writer(writer) => Ok(writer.decoding()),
        Upload::Present => panic!("{digest} is stored"),
    }
}

async fn send(writer: &mut BlobWriter, stream: &Bytes, chunk: usize) -> Result<()> {
    let mut stream = stream.clone();
    while !stream.is_empty() {
        writer.write(stream.split_to(chunk.min(stream.len()))).await?;
    }
    Ok(())
}

async fn upload(store: &TestStore, digest: Digest, stream: &Bytes, chunk: usize) -> Result<Digest> {
    let mut writer = begin(store, NAME, digest, 0).await?;
    send(&mut writer, stream, chunk).await?;
    writer.finish().await
}

/// Reads compressed and decodes like a client. Also checks the sizes of the pieces.
async fn get_zstd(store: &TestStore, digest: Digest, offset: u64) -> Result<Bytes> {
    let mut reader = store.cas.open_zstd(&store.main, digest, offset).await?;
    let mut pieces: Vec<Bytes> = vec![];
    while let Some(piece) = reader.next(20_000).await? {
        assert!(!piece.is_empty() && pieces.last().is_none_or(|last| last.len() == 20_000));
        pieces.push(piece);
    }
    Ok(zstd::decode_all(&pieces.concat()[..]).unwrap().into())
}

async fn forms(store: &TestStore) -> u64 {
    store.inspect().await.totals.zstd_forms
}

/// Reads compressed until a form exists.
async fn make_form(store: &TestStore, digest: Digest) {
    get_zstd(store, digest, 0).await.unwrap();
    get_zstd(store, digest, 0).await.unwrap();
    eventually(|| async { (forms(store).await == 1).then_some(()) }).await;
}

async fn nothing_is_left(store: &TestStore) {
    eventually(|| async {
        let inspection = store.inspect().await;
        let room = inspection.totals.reserved + inspection.totals.deleting;
        let uploads = inspection.partial_uploads + inspection.running_uploads;
        (room == 0 && uploads == 0 && store.files().is_empty()).then_some(())
    })
    .await;
}

/// BS-27, CAP-12: frames of any kind, in pieces of any size.
#[actix::test]
async fn a_compressed_upload_stores_the_decompressed_blob() {
    let store = TestStore::new().await;
    for (seed, (length, chunk)) in
        [(1, 1), (1_000, 1), (100_000, 777), (3_000_000, 65_536), (9_000_000, 2_000_000)]
            .into_iter()
            .enumerate()
    {
        let plain = text(length, seed as u64);
        let (first, second) = plain.split_at(length / 3);
        let mut stream = pack(first).to_vec();
        stream.extend(pack(b""));
        stored_frame(second, &mut stream);
        let blob = digest(&plain);
        assert_eq!(upload(&store, blob, &stream.into(), chunk).await.unwrap(), blob);
        assert_eq!(store.get(blob).await.unwrap(), plain);
        let status = store.cas.query_upload(&store.main, NAME, blob).await.unwrap();
        assert_eq!(status, UploadStatus { committed: length as u64, complete: true });
    }
    assert_eq!(store.inspect().await.totals.reserved, 0);
}

/// BS-22, BS-26, BS-29: small blobs take one job, large ones many.
#[actix::test]
async fn a_stream_that_is_not_the_blob_leaves_nothing_behind() {
    let store = TestStore::new().await;
    for length in [1_000usize, 5_000_000] {
        let plain = noise(length, 7);
        let blob = digest(&plain);
        let good = pack(&plain);
        let mut flipped = good.to_vec();
        flipped[length / 2] ^= 0x10;
        let with = |extra: &[u8]| Bytes::from([&good[..], extra].concat());
        for (case, stream) in [
            ("garbage", noise(length, 1)),
            ("plain bytes", plain.clone()),
            ("flipped", flipped.into()),
            ("cut", good.slice(..good.len() - 1)),
            ("cut between frames", pack(&plain[1..])),
            ("trailing garbage", with(b"garbage")),
            ("trailing beginning of a frame", with(&good[..6])),
            ("another frame", with(&pack(b"x"))),
            ("another blob", pack(&noise(length, 8))),
            ("bomb", pack(&vec![0; 50 * length])),
            ("nothing", Bytes::new()),
        ] {
            let outcome = upload(&store, blob, &stream, 100_000).await;
            assert!(matches!(outcome, Err(Error::Invalid(_))), "{case} of {length}: {outcome:?}");
            assert!(!store.has(blob).await, "{case}");
        }
        nothing_is_left(&store).await;
    }
}

/// BS-20, BS-31, BS-33: the resumed stream begins with its own frame.
#[actix::test]
async fn a_broken_compressed_upload_is_resumed_where_its_decoder_stopped() {
    let store = TestStore::new().await;
    let plain = noise(3_000_000, 1);
    let blob = digest(&plain);
    let stream = pack(&plain);
    let mut committed = 0;
    for cut in [700_000usize, 1_500_000] {
        let mut writer = begin(&store, NAME, blob, committed).await.unwrap();
        let rest = if committed == 0 { stream.clone() } else { pack(&plain[committed as usize..]) };
        send(&mut writer, &rest.slice(..cut), 50_000).await.unwrap();
        let before = store.cas.query_upload(&store.main, NAME, blob).await.unwrap();
        drop(writer);
        eventually(|| async { (store.inspect().await.partial_uploads == 1).then_some(()) }).await;
        let status = store.cas.query_upload(&store.main, NAME, blob).await.unwrap();
        assert!(!status.complete && status.committed >= before.committed && status.committed > committed);
        committed = status.committed;
    }
    assert!(committed < 3_000_000);
    let mut writer = begin(&store, NAME, blob, committed).await.unwrap();
    send(&mut writer, &pack(&plain[committed as usize..]), 50_000).await.unwrap();
    writer.finish().await.unwrap();
    assert_eq!(store.get(blob).await.unwrap(), plain);
}

/// BS-28.
#[actix::test]
async fn plain_and_compressed_uploads_of_one_blob_race_and_all_succeed() {
    let store = TestStore::new().await;
    let plain = text(1_000_000, 1);
    let (blob, stream) = (digest(&plain), pack(&plain));
    let uploads = (0..64).map(|n| {
        let (store, plain, stream) = (&store, &plain, &stream);
        async move {
            match store.cas.begin_upload(&store.main, &format!("{NAME}/{n}"), blob, 0).await.unwrap() {
                Upload::Present => {}
                Upload::Writer(mut writer) if n % 2 == 0 => {
                    send(&mut writer, plain, 10_000 + n).await.unwrap();
                    writer.finish().await.unwrap();
                }
                Upload::Writer(writer) => {
                    let mut writer = writer.decoding();
                    send(&mut writer, stream, 10_000 + n).await.unwrap();
                    writer.finish().await.unwrap();
                }
            }
        }
    });
    join_all(uploads).await;
    assert_eq!(store.get(blob).await.unwrap(), plain);
    eventually(|| async { (store.files().len() == 1).then_some(()) }).await;
}

/// BS-09, BS-12, BS-13, BS-15, CAP-12. Tested with and without a form, for compressible and incompressible
/// blobs.
#[actix::test]
async fn a_compressed_read_decodes_to_the_rest_of_the_blob_from_any_offset() {
    let store = TestStore::new().await;
    let small = SMALL_BLOB_BYTES as usize;
    for (seed, length) in
        [1, 100, small, small + 1, CHUNK_BYTES, CHUNK_BYTES + 1, 3_000_000].into_iter().enumerate()
    {
        for plain in [text(length, seed as u64), noise(length, seed as u64)] {
            let blob = store.put(plain.clone()).await;
            for round in 0..3 {
                for offset in [0, 1, length / 2, CHUNK_BYTES, CHUNK_BYTES + 1, length - 1, length] {
                    if offset <= length {
                        let rest = get_zstd(&store, blob, offset as u64).await.unwrap();
                        assert_eq!(rest, plain.slice(offset..), "{length} {round} {offset}");
                    }
                }
            }
        }
    }
    let empty = digest(b"");
    assert_eq!(get_zstd(&store, empty, 0).await.unwrap(), "");
    assert!(matches!(get_zstd(&store, digest(b"absent"), 0).await, Err(Error::NotFound(_))));
    assert!(matches!(get_zstd(&store, digest(&noise(LARGE, 99)), 0).await, Err(Error::NotFound(_))));
}

/// The form is made once, counted, and readable from any offset. It does not make its blob present.
#[actix::test]
async fn a_blob_that_is_read_compressed_twice_gets_a_form() {
    let store = TestStore::new().await;
    let plain = text(2_000_000, 1);
    let blob = store.put(plain.clone()).await;
    get_zstd(&store, blob, 0).await.unwrap();
    assert_eq!(forms(&store).await, 0);
    make_form(&store, blob).await;
    let files = store.files_of(blob);
    assert_eq!(files.len(), 2);
    let form = files.iter().find(|path| path.to_string_lossy().contains("/zstd/")).unwrap();
    let bytes = std::fs::read(form).unwrap();
    assert_eq!(decode_all(&bytes, plain.len() as u64).unwrap(), plain, "any tool can read it");
    let totals = store.inspect().await.totals;
    let charge = |bytes: u64| bytes.next_multiple_of(4_096);
    assert_eq!(totals.used, charge(plain.len() as u64) + charge(bytes.len() as u64));
    assert_eq!(totals.reserved, 0);
    for offset in [0, 5, CHUNK_BYTES as u64, 1_999_999] {
        assert_eq!(get_zstd(&store, blob, offset).await.unwrap(), plain.slice(offset as usize..));
    }

    // The form survives a restart, is verified then, and is useless without its blob.
    let store = store.restart().await;
    assert_eq!(forms(&store).await, 1);
    assert_eq!(get_zstd(&store, blob, 300_000).await.unwrap(), plain.slice(300_000..));
    let files = store.files_of(blob);
    let stored = files.iter().find(|path| path.to_string_lossy().contains("/blobs/")).unwrap();
    std::fs::remove_file(stored).unwrap();
    assert!(matches!(store.get(blob).await, Err(Error::NotFound(_))));
    assert!(!store.has(blob).await);
    assert!(matches!(get_zstd(&store, blob, 0).await, Err(Error::NotFound(_))));
}

/// CAS-22 for forms: damaged bytes are never sent.
#[actix::test]
async fn a_damaged_form_is_dropped_and_the_blob_compressed_again() {
    let mut store = TestStore::new().await;
    let plain = text(1_000_000, 1);
    let blob = store.put(plain.clone()).await;
    type Change = fn(&mut Vec<u8>);
    let changes: [(&str, Change); 5] = [
        ("in a frame", |bytes| bytes[1_000] ^= 1),
        ("in the table", |bytes| {
            let at = bytes.len() - 9 - 8;
            bytes[at] ^= 1;
        }),
        ("in the end", |bytes| *bytes.last_mut().unwrap() ^= 1),
        ("cut", |bytes| bytes.truncate(bytes.len() / 2)),
        ("empty", Vec::clear),
    ];
    for (restart, (case, change)) in changes.into_iter().enumerate() {
        make_form(&store, blob).await;
        let files = store.files_of(blob);
        let form = files.iter().find(|path| path.to_string_lossy().contains("/zstd/")).unwrap();
        overwrite(form, change);
        if restart % 2 == 1 {
            store = store.restart().await;
        }
        assert_eq!(get_zstd(&store, blob, 0).await.unwrap(), plain, "{case}");
        eventually(|| async { (!form.exists()).then_some(()) }).await;
        assert!(store.has(blob).await);
    }
}

#[actix::test]
async fn an_incompressible_blob_gets_no_form_and_is_sent_uncompressed() {
    let store = TestStore::new().await;
    let plain = noise(1_000_000, 1);
    let blob = store.put(plain.clone()).await;
    let history = || store.cas.shared().zstd_history.get(&(store.main.blobs(), blob));
    get_zstd(&store, blob, 0).await.unwrap();
    get_zstd(&store, blob, 0).await.unwrap();
    eventually(|| async { (history() == Some(History::Incompressible)).then_some(()) }).await;
    assert_eq!(get_zstd(&store, blob, 0).await.unwrap(), plain);
    eventually(|| async { (store.inspect().await.totals.reserved == 0).then_some(()) }).await;
    assert_eq!((forms(&store).await, store.files().len()), (0, 1));
}

#[actix::test]
async fn a_form_is_evicted_before_its_blob() {
    let store = TestStore::with_limit(40 * MB).await;
    let blob = store.put(text(2_000_000, 1)).await;
    make_form(&store, blob).await;
    get_zstd(&store, blob, 0).await.unwrap();
    let mut seed = 100;
    while forms(&store).await == 1 {
        store.put(noise(1_000_000, seed)).await;
        seed += 1;
        assert!(seed < 200);
    }
    assert!(store.has(blob).await);
}

/// CAS-11, CAS-14. Tested for items that are decoded in memory and for larger ones.
#[actix::test]
async fn compressed_items_of_a_batch_are_checked_after_decompression() {
    let store = TestStore::of_files().await;
    let zstd = |plain: &Bytes, stream: Bytes| (digest(plain), Payload::Zstd(stream));
    let (small, large, other) = (text(1_000, 1), text(3_000_000, 2), text(3_000_000, 3));
    let bomb = pack(&vec![0; 20_000_000]);
    let batch = vec![
        zstd(&small, pack(&small)),
        zstd(&large, pack(&large)),
        zstd(&large, pack(&large)),
        zstd(&other, pack(&large)),
        zstd(&other, pack(&other).slice(..500_000)),
        zstd(&other, bomb.clone()),
        zstd(&noise(10, 1), bomb),
        zstd(&other, other.clone()),
        (digest(b"plain"), Payload::Plain(Bytes::from("plain"))),
        zstd(&Bytes::new(), pack(b"")),
    ];
    let outcomes = store.cas.write_many(&store.main, batch.clone()).await.unwrap();
    let ok: Vec<bool> = outcomes.iter().map(Result::is_ok).collect();
    assert_eq!(ok, [true, true, true, false, false, false, false, false, true, true], "{outcomes:?}");
    assert_eq!(store.get(digest(&small)).await.unwrap(), small);
    assert_eq!(store.get(digest(&large)).await.unwrap(), large);
    assert!(!store.has(digest(&other)).await);
    // An item is checked even if its blob is already stored.
    let again = store.cas.write_many(&store.main, vec![zstd(&large, pack(&other))]).await.unwrap();
    assert!(matches!(again[..], [Err(Error::Invalid(_))]));
    eventually(|| async { (store.files().len() == 3).then_some(()) }).await;
    assert_eq!(store.inspect().await.totals.reserved, 0);
}

/// CAS-20, CAS-22.
#[actix::test]
async fn a_batch_is_read_compressed_where_that_saves_something() {
    let store = TestStore::new().await;
    let plains =
        [text(50, 1), text(5_000, 2), noise(5_000, 3), text(1_000_000, 4), noise(1_000_000, 5), Bytes::new()];
    for plain in &plains {
        store.put(plain.clone()).await;
    }
    let digests: Vec<Digest> = plains.iter().map(|plain| digest(plain)).chain([digest(b"absent")]).collect();
    for round in 0..4 {
        let items = store.cas.read_many_zstd(&store.main, digests.clone()).await.unwrap();
        let packed: Vec<bool> = items.iter().map(|item| matches!(item, Ok(Item::Zstd(_)))).collect();
        assert_eq!(packed, [false, true, false, true, false, false, false], "{round}");
        for (item, plain) in items.iter().zip(&plains) {
            match item.as_ref().unwrap() {
                Item::Plain(bytes) => assert_eq!(bytes, plain),
                Item::Zstd(stream) => {
                    assert!(stream.len() < plain.len());
                    assert_eq!(zstd::decode_all(&stream[..]).unwrap(), plain[..]);
                }
            }
        }
        assert!(matches!(items.last(), Some(Err(Error::NotFound(_)))));
    }
    eventually(|| async { (forms(&store).await == 1).then_some(()) }).await;
}
