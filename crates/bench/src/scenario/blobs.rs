//! Scenarios with existence checks and batches of small blobs.

use super::seed;
use crate::{
    Target,
    drive::{Call, Workload, message, prepared, ready},
    figures::Work,
    noise::Noise,
    target::{FUNCTION, check_stored},
};
use bytes::Bytes;
use gorego_reapi::{digest::Digest, error::Result, proto::reapi};
use std::{collections::HashMap, sync::Arc};

/// Size of a small blob.
pub(super) const SMALL_BYTES: usize = 4096;
/// Stored blobs that are read again and again.
pub(super) const STORED_BLOBS: usize = 2_000;
/// Blobs of one batch.
const BATCH: usize = 100;
/// Digests of one existence check.
const DIGESTS: usize = 1_000;

/// Stores small blobs for reading.
pub(super) async fn stored(target: &Target) -> Result<Vec<(Digest, Bytes)>> {
    let mut noise = Noise::new(seed());
    let blobs: Vec<_> = (0..STORED_BLOBS).map(|_| noise.bytes(SMALL_BYTES)).collect();
    Ok(target.upload(blobs.clone()).await?.into_iter().zip(blobs).collect())
}

pub(super) async fn find_missing(target: &Target, _: usize) -> Result<Box<dyn Workload>> {
    let stored = stored(target).await?;
    let mut noise = Noise::new(seed());
    let absent = (0..DIGESTS / 2).map(|_| FUNCTION.digest(&noise.bytes(64)).to_wire());
    let absent: Vec<_> = absent.collect();
    let present = stored.iter().take(DIGESTS / 2).map(|(digest, _)| digest.to_wire());
    let request = reapi::FindMissingBlobsRequest {
        instance_name: target.instance.clone(),
        blob_digests: present
            .zip(absent.iter().cloned())
            .flat_map(|(present, absent)| [present, absent])
            .collect(),
        ..Default::default()
    };
    let (target, mut expected) = (target.clone(), absent);
    expected.sort_by(|a, b| a.hash.cmp(&b.hash));
    let expected = Arc::new(expected);
    Ok(ready(move |_| {
        let (mut cas, request, expected) = (target.cas(), request.clone(), expected.clone());
        async move {
            let answer = cas.find_missing_blobs(request).await;
            let answer = answer.map_err(|status| message("FindMissingBlobs", &status))?;
            let mut missing = answer.into_inner().missing_blob_digests;
            missing.sort_by(|a, b| a.hash.cmp(&b.hash));
            if missing != *expected {
                return Err("FindMissingBlobs gave the wrong digests".into());
            }
            Ok(Work { units: DIGESTS as u64, bytes: 0 })
        }
    }))
}

pub(super) async fn batch_update(target: &Target, _: usize) -> Result<Box<dyn Workload>> {
    let (target, seed) = (target.clone(), seed());
    Ok(prepared(move |number| {
        let target = target.clone();
        async move {
            let mut noise = Noise::new(seed ^ (number << 20));
            let request = target.batch((0..BATCH).map(|_| noise.bytes(SMALL_BYTES)).collect());
            let mut cas = target.cas();
            let call = Call::new(async move {
                let answer = cas.batch_update_blobs(request).await;
                let answer = answer.map_err(|status| message("BatchUpdateBlobs", &status))?.into_inner();
                check_stored(&answer)?;
                Ok(Work { units: answer.responses.len() as u64, bytes: (BATCH * SMALL_BYTES) as u64 })
            });
            Ok(call.holding((BATCH * SMALL_BYTES) as u64))
        }
    }))
}

pub(super) async fn batch_read(target: &Target, _: usize) -> Result<Box<dyn Workload>> {
    let stored = stored(target).await?;
    let contents: HashMap<String, Bytes> =
        stored.iter().map(|(digest, blob)| (digest.hash_hex(), blob.clone())).collect();
    let (target, stored, contents) = (target.clone(), Arc::new(stored), Arc::new(contents));
    Ok(ready(move |number| {
        let (target, stored, contents) = (target.clone(), stored.clone(), contents.clone());
        async move {
            let first = number as usize * 7;
            let digests = (0..BATCH).map(|at| stored[(first + at) % STORED_BLOBS].0.to_wire());
            let request = reapi::BatchReadBlobsRequest {
                instance_name: target.instance.clone(),
                digests: digests.collect(),
                ..Default::default()
            };
            let answer = target.cas().batch_read_blobs(request).await;
            let answer = answer.map_err(|status| message("BatchReadBlobs", &status))?.into_inner();
            let is_right = |response: &reapi::batch_read_blobs_response::Response| {
                let hash = response.digest.as_ref().map(|digest| &digest.hash);
                hash.and_then(|hash| contents.get(hash)) == Some(&response.data)
            };
            if answer.responses.len() != BATCH || !answer.responses.iter().all(is_right) {
                return Err("BatchReadBlobs gave wrong content".into());
            }
            Ok(Work { units: BATCH as u64, bytes: (BATCH * SMALL_BYTES) as u64 })
        }
    }))
}
