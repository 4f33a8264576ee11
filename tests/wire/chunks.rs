//! SplitBlob and SpliceBlob: the benefit for a client on a slow link, and protection against abuse.

use crate::support::*;
use bytes::Bytes;
use gorego_client::stubs::CapabilitiesClient;
use gorego_reapi::{
    chunking::{Chunking, Splitter},
    digest::{Digest, DigestFunction},
    proto::reapi::{
        self, GetCapabilitiesRequest, SpliceBlobRequest, SplitBlobRequest, SplitBlobResponse,
        chunking_function::Value,
    },
};
use tonic::{Code, Status};

const MB: usize = 1_000_000;

/// Distinct lines of text.
fn text(bytes: usize) -> Vec<u8> {
    let mut text = Vec::with_capacity(bytes + 64);
    let mut state = 1u64;
    while text.len() < bytes {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        text.extend_from_slice(format!("{:016x} {}\n", state, state >> 40).as_bytes());
    }
    text.truncate(bytes);
    text
}

/// Cuts a file like a client that has received the server's parameters.
fn cut(file: &[u8], chunking: Chunking) -> Vec<Bytes> {
    let mut splitter = Splitter::new(chunking);
    splitter.push(file);
    splitter.end();
    std::iter::from_fn(|| splitter.next_chunk()).collect()
}

fn digests(chunks: &[Bytes]) -> Vec<Digest> {
    chunks.iter().map(|chunk| sha256(chunk)).collect()
}

fn digests_of(function: DigestFunction, chunks: &[Bytes]) -> Vec<Digest> {
    chunks.iter().map(|chunk| function.digest(chunk)).collect()
}

fn wire(chunks: &[Digest]) -> Vec<reapi::Digest> {
    chunks.iter().map(|chunk| chunk.to_wire()).collect()
}

impl Client {
    /// Uploads the chunks that are not stored. Returns the number of bytes.
    async fn upload_missing(&self, chunks: &[Bytes]) -> usize {
        let missing = self.missing(&digests_of(self.function, chunks)).await;
        let mut sent = 0;
        for chunk in missing {
            let chunk = chunks.iter().find(|bytes| self.function.digest(bytes) == chunk).unwrap();
            self.upload(chunk.to_vec()).await;
            sent += chunk.len();
        }
        sent
    }

    async fn splice_as(&self, blob: Digest, chunks: &[Digest], function: i32) -> Result<Digest, Status> {
        let request = SpliceBlobRequest {
            instance_name: self.instance.clone(),
            blob_digest: Some(blob.to_wire()),
            chunk_digests: wire(chunks),
            digest_function: self.wire_function(),
            chunking_function: function,
        };
        let reply = self.cas.clone().splice_blob(request).await?.into_inner();
        Ok(self.digest(reply.blob_digest.as_ref()))
    }

    async fn splice(&self, blob: Digest, chunks: &[Digest]) -> Result<Digest, Status> {
        self.splice_as(blob, chunks, 0).await
    }

    async fn split(&self, blob: Digest, function: i32) -> Result<SplitBlobResponse, Status> {
        let request = SplitBlobRequest {
            instance_name: self.instance.clone(),
            blob_digest: Some(blob.to_wire()),
            digest_function: self.wire_function(),
            chunking_function: function,
        };
        Ok(self.cas.clone().split_blob(request).await?.into_inner())
    }
}

/// After one more line in the middle of a large file, only a few per cent of it are transferred. CAS-30, CAS-33,
/// CAS-34, CAS-37, CAP-16, CAP-17.
#[tokio::test]
async fn a_line_added_to_a_large_file_uploads_a_few_per_cent_of_it() {
    let server = Server::start().await;
    let client = server.client().await;
    let mut capabilities = CapabilitiesClient::connect(server.endpoint()).await.unwrap();
    let offered = capabilities.get_capabilities(GetCapabilitiesRequest::default()).await.unwrap();
    let cache = offered.into_inner().cache_capabilities.unwrap();
    assert!(cache.split_blob_support && cache.splice_blob_support);
    let fast = cache.fast_cdc_2020_params.unwrap();
    let rep = cache.rep_max_cdc_params.unwrap();

    let before = text(40 * MB);
    let middle = before.len() / 2;
    let after = [&before[..middle], b"a line that was not there\n", &before[middle..]].concat();
    for (chunking, function) in [
        (Chunking::fast_cdc(fast.avg_chunk_size_bytes as u32, fast.seed), Value::FastCdc2020),
        (Chunking::rep_max(rep.min_chunk_size_bytes as u32, rep.horizon_size_bytes as u32), Value::RepMaxCdc),
    ] {
        let chunking = chunking.unwrap();
        let mut sent = vec![];
        for file in [&before, &after] {
            let chunks = cut(file, chunking);
            sent.push(client.upload_missing(&chunks).await);
            let blob = sha256(file);
            assert_eq!(client.splice_as(blob, &digests(&chunks), function.into()).await.unwrap(), blob);
            assert!(client.read(blob).await.unwrap() == *file);
            let answer = client.split(blob, function.into()).await.unwrap();
            assert_eq!(answer.chunking_function, function as i32);
            assert_eq!(answer.chunk_digests, wire(&digests(&chunks)), "both sides cut at the same places");
        }
        assert_eq!(sent[0], before.len());
        let share = sent[1] as f64 / after.len() as f64;
        println!("{function:?}: {} of {} bytes sent again, {:.1} %", sent[1], after.len(), share * 100.0);
        assert!(sent[1] > 0 && share < 0.05, "{share}");
    }
}

/// CAS-30, CAS-31, CAS-32, CAS-33: a client that has most chunks of a blob that was uploaded whole reads the others.
#[tokio::test]
async fn a_blob_that_was_never_chunked_is_split_on_demand() {
    let server = Server::start().await;
    let client = server.client().await;
    let file = text(3 * MB);
    let blob = client.upload(file.clone()).await;
    let small = client.upload("small").await;
    for function in [Value::Unknown, Value::FastCdc2020, Value::RepMaxCdc] {
        let answer = client.split(blob, function.into()).await.unwrap();
        let expected = if function == Value::RepMaxCdc { Chunking::REP_MAX } else { Chunking::FAST_CDC };
        assert_eq!(answer.chunking_function, expected.wire() as i32);
        assert!(answer.chunk_digests.len() > 2);
        let mut joined = vec![];
        for chunk in &answer.chunk_digests {
            let chunk = Digest::from_wire(DigestFunction::Sha256, Some(chunk), "chunk").unwrap();
            assert!(chunk.size() > 0 && chunk.size() <= *expected.chunk_sizes().end());
            joined.extend_from_slice(&client.read(chunk).await.unwrap());
        }
        assert!(joined == file);
        assert_eq!(client.split(small, function.into()).await.unwrap().chunk_digests, wire(&[small]));
    }
    assert_eq!(client.split(empty(), 0).await.unwrap().chunk_digests, []);
    assert_eq!(client.split(sha256(b"unknown"), 0).await.unwrap_err().code(), Code::NotFound);
    assert_eq!(client.split(sha256(&text(MB)), 0).await.unwrap_err().code(), Code::NotFound);
    assert_eq!(client.split(blob, 99).await.unwrap_err().code(), Code::InvalidArgument);
}

/// CAS-35, CAS-36, CAS-37, CAS-38, CAS-33.
#[tokio::test]
async fn a_splice_that_is_not_the_blob_is_refused_and_one_that_is_works_everywhere() {
    let server = Server::start().await;
    let client = server.client().await;
    let [one, two] = [client.upload("one, ").await, client.upload("two, ").await];
    let blob = sha256(b"one, two, one, ");
    let lost = Digest::parse(DigestFunction::Sha256, &"0".repeat(64), 5).unwrap();
    for (chunks, code) in [
        (vec![two, one, one], Code::InvalidArgument),
        (vec![one, two], Code::InvalidArgument),
        (vec![], Code::InvalidArgument),
        (vec![one, two, lost], Code::NotFound),
    ] {
        let status = client.splice(blob, &chunks).await.unwrap_err();
        assert_eq!(status.code(), code, "{chunks:?}: {}", status.message());
        assert_eq!(client.missing(&[blob]).await, [blob]);
    }
    let status = client.splice(blob, &[one, two, lost]).await.unwrap_err();
    assert!(status.message().contains(&lost.to_string()), "it says which: {}", status.message());
    // Chunks of another digest function, and lists that do not form the blob.
    let foreign = reapi::Digest { hash: "0".repeat(40), size_bytes: 5 };
    let chunk_digests = vec![one.to_wire(), two.to_wire(), foreign];
    for chunk_digests in [chunk_digests, vec![Default::default(); 3], vec![Default::default(); 200_000]] {
        let blob_digest = Some(blob.to_wire());
        let request = SpliceBlobRequest { blob_digest, chunk_digests, ..Default::default() };
        let status = client.cas.clone().splice_blob(request).await.unwrap_err();
        assert_eq!(status.code(), Code::InvalidArgument);
    }
    let status = client.splice_as(blob, &[one, two, one], 99).await.unwrap_err();
    assert_eq!(status.code(), Code::InvalidArgument);

    for function in [0, 1, 2] {
        assert_eq!(client.splice_as(blob, &[one, two, one], function).await.unwrap(), blob);
    }
    assert_eq!(client.missing(&[blob]).await, []);
    assert_eq!(client.read(blob).await.unwrap(), b"one, two, one, ");
    let root = client.upload(directory(vec![file("in", blob)], vec![], vec![])).await;
    let action = client.action(sh("cat in"), root).await;
    let result = client.run(action).await.result.unwrap();
    assert_eq!(client.stdout(&result).await, "one, two, one, ");
}

/// CAS-30: chunks use the digest function of their blob, and chunks of another function are not mistaken for them.
#[tokio::test]
async fn chunks_are_of_the_digest_function_of_their_blob() {
    let server = Server::start().await;
    let file = text(3 * MB);
    let chunks = cut(&file, Chunking::FAST_CDC);
    for &function in DigestFunction::ALL {
        let client = Client { function, ..server.client().await };
        let (blob, parts) = (function.digest(&file), digests_of(function, &chunks));
        assert_eq!(client.splice(blob, &parts).await.unwrap_err().code(), Code::NotFound);
        assert_eq!(client.upload_missing(&chunks).await, file.len());
        assert_eq!(client.splice(blob, &parts).await.unwrap(), blob);
        assert_eq!(client.split(blob, 0).await.unwrap().chunk_digests, wire(&parts));
        assert!(client.read(blob).await.unwrap() == file);
        let repeated = client.upload(chunks.concat()).await;
        assert_eq!(repeated, blob);
    }
}

/// After kill -9 at any time, a blob is either complete or absent, and chunks match their digests.
#[tokio::test]
async fn a_server_killed_in_the_middle_of_a_splice_has_the_whole_blob_or_none() {
    let file = text(24 * MB);
    let chunks = cut(&file, Chunking::FAST_CDC);
    let blob = sha256(&file);
    let mut server = Server::start().await;
    let client = server.client().await;
    client.upload_missing(&chunks).await;
    let spliced = tokio::spawn({
        let (client, parts) = (client.clone(), digests(&chunks));
        async move { client.splice(blob, &parts).await }
    });
    // The new blob has bytes on disk: the splice has begun and is not finished.
    let tmp = server.store().join("v1/tmp");
    let growing = || {
        let sizes = files_below(&tmp).into_iter().filter_map(|path| path.metadata().ok());
        sizes.map(|metadata| metadata.len()).sum::<u64>() > 0
    };
    eventually("a splice under way", || growing() || spliced.is_finished()).await;
    let store = server.kill().await;
    let _ = spliced.await.unwrap();
    server = Server::on(store, &[]).await;
    let client = server.client().await;
    assert_eq!(client.missing(&digests(&chunks)).await, []);
    if client.missing(&[blob]).await.is_empty() {
        assert!(client.read(blob).await.unwrap() == file);
    }
    assert_eq!(client.splice(blob, &digests(&chunks)).await.unwrap(), blob);
    assert!(client.read(blob).await.unwrap() == file);
    assert_eq!(client.split(blob, 0).await.unwrap().chunk_digests, wire(&digests(&chunks)));
}

/// CAP-16.
#[tokio::test]
async fn chunking_that_is_switched_off_is_neither_promised_nor_done() {
    let server = Server::with(&[("CACHE__CHUNKING", "false")]).await;
    let client = server.client().await;
    let mut capabilities = CapabilitiesClient::connect(server.endpoint()).await.unwrap();
    let offered = capabilities.get_capabilities(GetCapabilitiesRequest::default()).await.unwrap();
    let cache = offered.into_inner().cache_capabilities.unwrap();
    assert!(!cache.split_blob_support && !cache.splice_blob_support);
    assert_eq!((cache.fast_cdc_2020_params, cache.rep_max_cdc_params), (None, None));
    let blob = client.upload("blob").await;
    assert_eq!(client.split(blob, 0).await.unwrap_err().code(), Code::Unimplemented);
    assert_eq!(client.splice(blob, &[blob]).await.unwrap_err().code(), Code::Unimplemented);
}
