//! [`Load`]: the requests of a client, in random order: uploads and reads in all ways, results, trees and actions.

use crate::{
    Random,
    support::{self, Client, Run, directory, empty, file, http_client, sh_with, subdirectory},
};
use gorego_reapi::{
    digest::{Digest, DigestFunction},
    proto::{
        bytestream::{ReadRequest, WriteRequest},
        reapi::{
            Action, ActionResult, BatchReadBlobsRequest, BatchUpdateBlobsRequest, Directory, ExecuteResponse,
            FindMissingBlobsRequest, GetActionResultRequest, GetTreeRequest, OutputFile,
            UpdateActionResultRequest, batch_update_blobs_request, compressor,
        },
    },
};
use prost::Message as _;
use std::{collections::VecDeque, net::SocketAddr};
use tonic::{Code, Status};

/// Bytes of a message of an upload.
const PIECE: usize = 64 * 1024;
/// How many of its last blobs and results a client asks for again.
const REMEMBERED: usize = 32;
const ZSTD: i32 = compressor::Value::Zstd as i32;

/// A client that takes one step after the other. A call that fails leaves nothing acknowledged.
pub(crate) struct Load {
    client: Client,
    random: Random,
    http: Option<(reqwest::Client, SocketAddr)>,
    blobs: VecDeque<(Digest, Vec<u8>)>,
    /// Actions with the content of their output `out`.
    results: VecDeque<(Digest, String)>,
}

/// What the server has acknowledged in a step.
pub(crate) enum Stored {
    Blob(Digest, Vec<u8>),
    /// An action that has a result, and the content of its output `out`.
    Result(Digest, String),
    /// Nothing new: the step has read, and checked what it got.
    Nothing,
}

impl Load {
    pub(crate) fn new(client: Client, random: Random) -> Self {
        Self { client, random, http: None, blobs: VecDeque::new(), results: VecDeque::new() }
    }

    /// Uses the HTTP cache at this address, too.
    pub(crate) fn with_http(self, address: SocketAddr) -> Self {
        Self { http: Some((http_client(), address)), ..self }
    }

    /// Takes a step of a random kind.
    pub(crate) async fn step(&mut self) -> Result<Stored, Status> {
        let stored = match self.random.below(20) {
            0..4 => self.batch_one().await?,
            4..7 => self.stream(false).await?,
            7..9 => self.stream(true).await?,
            9 => self.put().await?,
            10..12 => self.run().await?,
            12 => self.update_result().await?,
            13 => self.find_missing().await?,
            14 => self.get_result().await?,
            15 => self.read().await?,
            16 => self.read_zstd().await?,
            17 => self.read_batch().await?,
            18 => self.get().await?,
            _ => self.tree().await?,
        };
        match &stored {
            Stored::Blob(digest, bytes) => remember(&mut self.blobs, (*digest, bytes.clone())),
            Stored::Result(action, output) => remember(&mut self.results, (*action, output.clone())),
            Stored::Nothing => {}
        }
        Ok(stored)
    }

    /// Stores blobs with BatchUpdateBlobs.
    pub(crate) async fn batch(
        &self,
        blobs: impl IntoIterator<Item = Vec<u8>>,
    ) -> Result<Vec<Digest>, Status> {
        let mut digests = Vec::new();
        let mut requests = Vec::new();
        for data in blobs {
            let digest = sha256(&data);
            digests.push(digest);
            requests.push(batch_update_blobs_request::Request {
                digest: Some(digest.to_wire()),
                data: data.into(),
                ..Default::default()
            });
        }
        self.send_batch(requests).await?;
        Ok(digests)
    }

    async fn send_batch(&self, requests: Vec<batch_update_blobs_request::Request>) -> Result<(), Status> {
        let request = BatchUpdateBlobsRequest { requests, ..Default::default() };
        for response in self.client.cas.clone().batch_update_blobs(request).await?.into_inner().responses {
            check(response.status.unwrap_or_default())?;
        }
        Ok(())
    }

    /// Stores a blob with BatchUpdateBlobs, compressed or not.
    async fn batch_one(&mut self) -> Result<Stored, Status> {
        let blob = self.random.blob();
        let digest = sha256(&blob);
        let (data, compressor) = match self.random.below(2) {
            0 => (blob.clone(), 0),
            _ => (zstd::encode_all(&*blob, 1)?, ZSTD),
        };
        let digest_on_wire = Some(digest.to_wire());
        let request =
            batch_update_blobs_request::Request { digest: digest_on_wire, data: data.into(), compressor };
        self.send_batch(vec![request]).await?;
        Ok(Stored::Blob(digest, blob))
    }

    /// Stores a blob with ByteStream.
    async fn stream(&mut self, is_compressed: bool) -> Result<Stored, Status> {
        let blob = self.random.blob();
        let digest = sha256(&blob);
        let upload = uuid::Uuid::from_u128(self.random.number().into());
        let (name, sent) = match is_compressed {
            true => {
                let name = format!("compressed-blobs/zstd/{}/{}", digest.hash_hex(), digest.size());
                (name, zstd::encode_all(&*blob, 1)?)
            }
            false => (digest.blob_name(), blob.clone()),
        };
        let name = format!("uploads/{upload}/{name}");
        let last = sent.len().div_ceil(PIECE) - 1;
        let message = |(at, piece): (usize, &[u8])| WriteRequest {
            resource_name: name.clone(),
            write_offset: (at * PIECE) as i64,
            finish_write: at == last,
            data: piece.to_vec().into(),
        };
        let messages: Vec<_> = sent.chunks(PIECE).enumerate().map(message).collect();
        self.client.bytes.clone().write(futures::stream::iter(messages)).await?;
        Ok(Stored::Blob(digest, blob))
    }

    /// Stores a blob over HTTP, if the server has the HTTP cache.
    async fn put(&mut self) -> Result<Stored, Status> {
        let Some((http, address)) = self.http.clone() else { return self.stream(false).await };
        let blob = self.random.blob();
        let digest = sha256(&blob);
        let url = format!("http://{address}/cas/{}", digest.hash_hex());
        let response = http.put(url).body(blob.clone()).send().await.map_err(broke_off)?;
        match response.status().as_u16() {
            201 => Ok(Stored::Blob(digest, blob)),
            503 | 507 => Err(Status::resource_exhausted("over HTTP")),
            other => Err(Status::internal(format!("HTTP status {other}"))),
        }
    }

    /// Runs an action of its own that makes a file.
    async fn run(&mut self) -> Result<Stored, Status> {
        let text = format!("{:016x}", self.random.number());
        let action = self.action(&text).await?;
        let mut run: Run = self.client.start_request(self.client.request(action)).await?;
        let mut last = None;
        while let Some(operation) = run.0.message().await? {
            last = Some(operation);
        }
        let last = last.filter(|operation| operation.done);
        let response: ExecuteResponse =
            support::response(&last.ok_or_else(|| Status::unavailable("broke off"))?);
        check(response.status.unwrap_or_default())?;
        Ok(Stored::Result(action, text))
    }

    /// Stores an action whose output `out` is this text.
    async fn action(&self, text: &str) -> Result<Digest, Status> {
        let command = sh_with(&format!("printf {text} > out"), &["out"]).encode_to_vec();
        let action = Action {
            command_digest: Some(sha256(&command).to_wire()),
            input_root_digest: Some(empty().to_wire()),
            ..Default::default()
        };
        Ok(self.batch([command, action.encode_to_vec()]).await?[1])
    }

    /// Stores the result of an action that has run elsewhere.
    async fn update_result(&mut self) -> Result<Stored, Status> {
        let text = format!("{:016x}", self.random.number());
        let action = self.action(&text).await?;
        let output = self.batch([text.clone().into_bytes()]).await?[0];
        let output = OutputFile { path: "out".into(), digest: Some(output.to_wire()), ..Default::default() };
        let request = UpdateActionResultRequest {
            action_digest: Some(action.to_wire()),
            action_result: Some(ActionResult { output_files: vec![output], ..Default::default() }),
            ..Default::default()
        };
        self.client.action_cache.clone().update_action_result(request).await?;
        Ok(Stored::Result(action, text))
    }

    async fn find_missing(&mut self) -> Result<Stored, Status> {
        let unknown = sha256(&self.random.number().to_le_bytes());
        let known = self.blobs.iter().map(|(digest, _)| *digest);
        let blob_digests = known.chain([unknown]).map(|digest| digest.to_wire()).collect();
        let request = FindMissingBlobsRequest { blob_digests, ..Default::default() };
        let missing = self.client.cas.clone().find_missing_blobs(request).await?.into_inner();
        assert!(missing.missing_blob_digests.contains(&unknown.to_wire()), "nothing stored {unknown}");
        Ok(Stored::Nothing)
    }

    async fn get_result(&mut self) -> Result<Stored, Status> {
        let Some((action, output)) = pick(&mut self.random, &self.results) else {
            return Ok(Stored::Nothing);
        };
        let request = GetActionResultRequest { action_digest: Some(action.to_wire()), ..Default::default() };
        if let Some(result) = found(self.client.action_cache.clone().get_action_result(request).await)? {
            let file = &result.into_inner().output_files[0];
            assert_eq!(file.digest, Some(sha256(output.as_bytes()).to_wire()), "{action}");
        }
        Ok(Stored::Nothing)
    }

    /// Reads a part of a blob with ByteStream.
    async fn read(&mut self) -> Result<Stored, Status> {
        let Some((digest, bytes)) = pick(&mut self.random, &self.blobs) else { return Ok(Stored::Nothing) };
        let from = self.random.below(bytes.len() as u64);
        let request =
            ReadRequest { resource_name: digest.blob_name(), read_offset: from as i64, ..Default::default() };
        let read = found(self.client.read_request(request).await)?;
        assert!(read.is_none_or(|read| read == bytes[from as usize..]), "{digest} is another blob");
        Ok(Stored::Nothing)
    }

    async fn read_zstd(&mut self) -> Result<Stored, Status> {
        let Some((digest, bytes)) = pick(&mut self.random, &self.blobs) else { return Ok(Stored::Nothing) };
        let resource_name = format!("compressed-blobs/zstd/{}/{}", digest.hash_hex(), digest.size());
        let request = ReadRequest { resource_name, ..Default::default() };
        if let Some(read) = found(self.client.read_request(request).await)? {
            assert!(zstd::decode_all(&*read)? == bytes, "{digest} is another blob");
        }
        Ok(Stored::Nothing)
    }

    /// Reads a blob with BatchReadBlobs, compressed if the server likes.
    async fn read_batch(&mut self) -> Result<Stored, Status> {
        let Some((digest, bytes)) = pick(&mut self.random, &self.blobs) else { return Ok(Stored::Nothing) };
        let request = BatchReadBlobsRequest {
            digests: vec![digest.to_wire()],
            acceptable_compressors: vec![ZSTD],
            ..Default::default()
        };
        let reply = self.client.cas.clone().batch_read_blobs(request).await?.into_inner();
        for response in reply.responses {
            if found(check(response.status.unwrap_or_default()))?.is_none() {
                continue;
            }
            let read = match response.compressor {
                ZSTD => zstd::decode_all(&*response.data)?,
                _ => response.data.to_vec(),
            };
            assert!(read == bytes, "{digest} is another blob");
        }
        Ok(Stored::Nothing)
    }

    /// Reads a blob over HTTP, if the server has the HTTP cache.
    async fn get(&mut self) -> Result<Stored, Status> {
        let Some((http, address)) = self.http.clone() else { return self.read().await };
        let Some((digest, bytes)) = pick(&mut self.random, &self.blobs) else { return Ok(Stored::Nothing) };
        let url = format!("http://{address}/cas/{}", digest.hash_hex());
        let response = http.get(url).send().await.map_err(broke_off)?;
        match response.status().as_u16() {
            200 => assert!(response.bytes().await.map_err(broke_off)? == bytes, "{digest} is another blob"),
            404 => {}
            other => return Err(Status::internal(format!("HTTP status {other}"))),
        }
        Ok(Stored::Nothing)
    }

    /// Stores a tree of three directories and reads it with GetTree.
    async fn tree(&mut self) -> Result<Stored, Status> {
        let content = self.random.number().to_le_bytes().to_vec();
        let leaf = directory(vec![file("f", sha256(&content))], vec![], vec![]);
        let middle = directory(vec![], vec![subdirectory("leaf", sha256(&leaf))], vec![]);
        let root = directory(vec![], vec![subdirectory("middle", sha256(&middle))], vec![]);
        let root_digest = sha256(&root).to_wire();
        self.batch([content, leaf.clone(), middle.clone(), root.clone()]).await?;
        let request = GetTreeRequest { root_digest: Some(root_digest), ..Default::default() };
        let Some(stream) = found(self.client.cas.clone().get_tree(request).await)? else {
            return Ok(Stored::Nothing);
        };
        let (mut stream, mut directories) = (stream.into_inner(), Vec::new());
        loop {
            let Some(page) = found(stream.message().await)? else { return Ok(Stored::Nothing) };
            let Some(page) = page else { break };
            directories.extend(page.directories.iter().map(Directory::encode_to_vec));
        }
        assert!(directories == [root, middle, leaf], "the tree is another one");
        Ok(Stored::Nothing)
    }
}

/// One of the values, if there is any.
fn pick<T: Clone>(random: &mut Random, from: &VecDeque<T>) -> Option<T> {
    let at = random.below((from.len() as u64).max(1));
    from.get(at as usize).cloned()
}

fn sha256(bytes: &[u8]) -> Digest {
    DigestFunction::Sha256.digest(bytes)
}

fn remember<T>(all: &mut VecDeque<T>, new: T) {
    all.push_back(new);
    if all.len() > REMEMBERED {
        all.pop_front();
    }
}

/// `None` for what was evicted.
fn found<T>(answer: Result<T, Status>) -> Result<Option<T>, Status> {
    match answer {
        Ok(answer) => Ok(Some(answer)),
        Err(status) if status.code() == Code::NotFound => Ok(None),
        Err(status) => Err(status),
    }
}

fn check(status: gorego_reapi::proto::rpc::Status) -> Result<(), Status> {
    if status.code == 0 { Ok(()) } else { Err(Status::new(status.code.into(), status.message)) }
}

fn broke_off(error: reqwest::Error) -> Status {
    Status::unavailable(error.to_string())
}
