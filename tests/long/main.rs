//! Tests that take minutes to hours. CI compiles them and does not run them; `README.md` says how and when to.
#![allow(clippy::unwrap_used, missing_docs)]

mod kills;
mod soak;
#[path = "../support/mod.rs"]
mod support;

use gorego_reapi::{
    digest::{Digest, DigestFunction},
    proto::{
        bytestream::WriteRequest,
        reapi::{Action, BatchUpdateBlobsRequest, Command, ExecuteResponse, batch_update_blobs_request},
    },
};
use prost::Message as _;
use support::{Client, Run, empty};
use tonic::Status;

/// A number from the environment.
pub(crate) fn setting(name: &str, default: u64) -> u64 {
    std::env::var(name).map_or(default, |text| text.parse().expect(name))
}

/// SplitMix64, so that a seed repeats a run.
#[derive(Clone)]
pub(crate) struct Random(u64);

impl Random {
    /// A generator with the seed of the environment, or a new one, which is printed.
    pub(crate) fn seeded(test: &str) -> Self {
        let now = std::time::SystemTime::UNIX_EPOCH.elapsed().unwrap();
        let seed = setting("LONG_SEED", now.as_nanos() as u64);
        println!("{test}: LONG_SEED={seed}");
        Self(seed)
    }

    pub(crate) fn number(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    pub(crate) fn below(&mut self, bound: u64) -> u64 {
        self.number() % bound
    }

    /// A generator for another task.
    pub(crate) fn fork(&mut self) -> Self {
        Self(self.number())
    }

    /// Bytes of a size that is usually small.
    pub(crate) fn blob(&mut self) -> Vec<u8> {
        let most = 1 << self.below(22);
        let words = 1 + self.below(most) / 8;
        (0..words).flat_map(|_| self.number().to_le_bytes()).collect()
    }
}

/// One step of a client. A call that fails leaves nothing acknowledged.
pub(crate) struct Load {
    pub(crate) client: Client,
    pub(crate) random: Random,
}

/// What the server has acknowledged.
pub(crate) enum Stored {
    Blob(Digest, Vec<u8>),
    /// An action that has run, and the content of its output.
    Result(Digest, String),
}

impl Load {
    pub(crate) async fn step(&mut self) -> Result<Stored, Status> {
        match self.random.below(10) {
            0..4 => {
                let blob = self.random.blob();
                Ok(Stored::Blob(self.batch([blob.clone()]).await?[0], blob))
            }
            4..8 => self.stream().await,
            _ => self.run().await,
        }
    }

    async fn batch(&self, blobs: impl IntoIterator<Item = Vec<u8>>) -> Result<Vec<Digest>, Status> {
        let mut digests = Vec::new();
        let mut requests = Vec::new();
        for data in blobs {
            let digest = DigestFunction::Sha256.digest(&data);
            digests.push(digest);
            requests.push(batch_update_blobs_request::Request {
                digest: Some(digest.to_wire()),
                data: data.into(),
                ..Default::default()
            });
        }
        let request = BatchUpdateBlobsRequest { requests, ..Default::default() };
        for response in self.client.cas.clone().batch_update_blobs(request).await?.into_inner().responses {
            let status = response.status.unwrap_or_default();
            if status.code != 0 {
                return Err(Status::new(status.code.into(), status.message));
            }
        }
        Ok(digests)
    }

    async fn stream(&mut self) -> Result<Stored, Status> {
        const PIECE: usize = 64 * 1024;
        let blob = self.random.blob();
        let digest = DigestFunction::Sha256.digest(&blob);
        let name =
            format!("uploads/{}/{}", uuid::Uuid::from_u128(self.random.number().into()), digest.blob_name());
        let last = blob.len().div_ceil(PIECE) - 1;
        let message = |(at, piece): (usize, &[u8])| WriteRequest {
            resource_name: name.clone(),
            write_offset: (at * PIECE) as i64,
            finish_write: at == last,
            data: piece.to_vec().into(),
        };
        let messages: Vec<_> = blob.chunks(PIECE).enumerate().map(message).collect();
        let messages = futures::stream::iter(messages);
        self.client.bytes.clone().write(messages).await?;
        Ok(Stored::Blob(digest, blob))
    }

    /// Runs an action of its own that makes a file.
    async fn run(&mut self) -> Result<Stored, Status> {
        let text = format!("{:016x}", self.random.number());
        let script = format!("printf {text} > out");
        let command = Command {
            arguments: ["/bin/sh", "-c", &script].map(str::to_owned).to_vec(),
            output_paths: vec!["out".into()],
            ..Default::default()
        }
        .encode_to_vec();
        let action = Action {
            command_digest: Some(DigestFunction::Sha256.digest(&command).to_wire()),
            input_root_digest: Some(empty().to_wire()),
            ..Default::default()
        };
        let action = self.batch([command, action.encode_to_vec()]).await?[1];
        let mut run: Run = self.client.start_request(self.client.request(action)).await?;
        let mut last = None;
        while let Some(operation) = run.0.message().await? {
            last = Some(operation);
        }
        let last = last.filter(|operation| operation.done);
        let response: ExecuteResponse =
            support::response(&last.ok_or_else(|| Status::unavailable("broke off"))?);
        let status = response.status.unwrap_or_default();
        if status.code != 0 {
            return Err(Status::new(status.code.into(), status.message));
        }
        Ok(Stored::Result(action, text))
    }
}
