//! [`Target`]: the server under test.

use gorego_client::{
    Client, Service,
    stubs::{
        ActionCacheClient, ByteStreamClient, CapabilitiesClient, ContentAddressableStorageClient,
        ExecutionClient,
    },
};
use gorego_reapi::{
    digest::{Digest, DigestFunction},
    error::{Error, Result},
    proto::reapi,
};
use tonic::Status;

/// Digests of all scenarios.
pub(crate) const FUNCTION: DigestFunction = DigestFunction::Sha256;
/// Maximum size of a decoded answer.
const MAX_MESSAGE_BYTES: usize = 16 << 20;

/// One connection to one instance of a server. Cheap to clone; all calls share the connection.
#[derive(Debug, Clone)]
pub struct Target {
    service: Service,
    /// The endpoint, for the report.
    pub endpoint: String,
    /// The instance in which all calls are made.
    pub instance: String,
}

impl Target {
    /// The server that this client is connected to.
    pub fn new(client: &Client) -> Self {
        Self {
            service: client.service(),
            endpoint: client.endpoint().to_owned(),
            instance: client.instance().to_owned(),
        }
    }

    pub(crate) fn capabilities(&self) -> CapabilitiesClient<Service> {
        CapabilitiesClient::new(self.service.clone())
    }

    pub(crate) fn cas(&self) -> ContentAddressableStorageClient<Service> {
        ContentAddressableStorageClient::new(self.service.clone())
            .max_decoding_message_size(MAX_MESSAGE_BYTES)
    }

    pub(crate) fn byte_stream(&self) -> ByteStreamClient<Service> {
        ByteStreamClient::new(self.service.clone()).max_decoding_message_size(MAX_MESSAGE_BYTES)
    }

    pub(crate) fn action_cache(&self) -> ActionCacheClient<Service> {
        ActionCacheClient::new(self.service.clone())
    }

    pub(crate) fn execution(&self) -> ExecutionClient<Service> {
        ExecutionClient::new(self.service.clone())
    }

    /// A resource name in this instance.
    pub(crate) fn resource(&self, rest: &str) -> String {
        if self.instance.is_empty() { rest.to_owned() } else { format!("{}/{rest}", self.instance) }
    }

    /// Uploads blobs in batches.
    ///
    /// # Errors
    /// Errors of the server, even if only one blob is refused.
    pub(crate) async fn upload(&self, blobs: impl IntoIterator<Item = bytes::Bytes>) -> Result<Vec<Digest>> {
        const BATCH_BYTES: usize = 3_000_000;
        const BATCH_BLOBS: usize = 1_000;
        let (mut digests, mut batch, mut size) = (Vec::new(), Vec::new(), 0);
        for blob in blobs {
            if !batch.is_empty() && (size + blob.len() > BATCH_BYTES || batch.len() == BATCH_BLOBS) {
                self.update(std::mem::take(&mut batch)).await?;
                size = 0;
            }
            size += blob.len();
            digests.push(FUNCTION.digest(&blob));
            batch.push(blob);
        }
        if !batch.is_empty() {
            self.update(batch).await?;
        }
        Ok(digests)
    }

    async fn update(&self, blobs: Vec<bytes::Bytes>) -> Result<()> {
        let answer = self.cas().batch_update_blobs(self.batch(blobs)).await;
        let answer = answer.map_err(|status| refused("BatchUpdateBlobs", &status))?.into_inner();
        check_stored(&answer).map_err(Error::Unavailable)
    }

    /// Makes a BatchUpdateBlobs request that uploads these blobs uncompressed.
    pub(crate) fn batch(&self, blobs: Vec<bytes::Bytes>) -> reapi::BatchUpdateBlobsRequest {
        let request = |data: bytes::Bytes| reapi::batch_update_blobs_request::Request {
            digest: Some(FUNCTION.digest(&data).to_wire()),
            data,
            ..Default::default()
        };
        reapi::BatchUpdateBlobsRequest {
            instance_name: self.instance.clone(),
            requests: blobs.into_iter().map(request).collect(),
            ..Default::default()
        }
    }
}

/// Checks that every blob of a batch was stored. The error is the message of the first blob that was not.
pub(crate) fn check_stored(answer: &reapi::BatchUpdateBlobsResponse) -> std::result::Result<(), String> {
    let failed = |response: &reapi::batch_update_blobs_response::Response| {
        response.status.clone().filter(|status| status.code != 0)
    };
    answer.responses.iter().find_map(failed).map_or(Ok(()), |status| Err(status.message))
}

/// The error of a call that is necessary for a scenario.
pub(crate) fn refused(method: &str, status: &Status) -> Error {
    Error::Unavailable(format!("{method} failed: {:?}: {}", status.code(), status.message()))
}
