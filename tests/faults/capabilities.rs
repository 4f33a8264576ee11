//! Faults of the capabilities: claims that do not hold, and features that are not claimed.

use super::{
    Fault,
    change::{both, exchange, instead, job, read_request, response},
    fault,
    proxy::Behaviour,
};
use gorego_reapi::proto::{
    bytestream::ReadRequest,
    reapi::{
        ActionCacheUpdateCapabilities, BatchUpdateBlobsRequest, BatchUpdateBlobsResponse, CacheCapabilities,
        ExecuteRequest, ExecutionCapabilities, FastCdc2020Params, GetCapabilitiesRequest, ServerCapabilities,
    },
    semver::SemVer,
};
use std::sync::atomic::{AtomicI64, Ordering};
use tonic::Status;

const BLAKE3: i32 = 9;
const ZSTD: i32 = 1;

fn said(change: impl Fn(&mut ServerCapabilities) + Send + Sync + 'static) -> Behaviour {
    response("GetCapabilities", change)
}

fn of_cache(change: impl Fn(&mut CacheCapabilities) + Send + Sync + 'static) -> Behaviour {
    said(move |said| change(said.cache_capabilities.get_or_insert_default()))
}

fn of_execution(change: impl Fn(&mut ExecutionCapabilities) + Send + Sync + 'static) -> Behaviour {
    said(move |said| change(said.execution_capabilities.get_or_insert_default()))
}

fn version(major: i32, minor: i32) -> Option<SemVer> {
    Some(SemVer { major, minor, ..Default::default() })
}

pub(crate) fn faults() -> Vec<Fault> {
    let calls = AtomicI64::new(0);
    vec![
        fault("neither cache nor execution is claimed", &["CAP-01"], {
            said(|said| (said.cache_capabilities, said.execution_capabilities) = (None, None))
        }),
        fault("some instances have no capabilities", &["CAP-01"], {
            exchange::<GetCapabilitiesRequest, ServerCapabilities>("GetCapabilities", |asked, answer| {
                let answer = answer?;
                Ok(if asked.instance_name.is_empty() { ServerCapabilities::default() } else { answer })
            })
        }),
        fault("no API version is said", &["CAP-02"], {
            said(|said| (said.low_api_version, said.high_api_version) = (None, None))
        }),
        fault("the versions are those of another API", &["CAP-02"], {
            said(|said| (said.low_api_version, said.high_api_version) = (version(3, 0), version(3, 1)))
        }),
        fault("the deprecated version is the newest", &["CAP-03"], {
            said(|said| said.deprecated_api_version = version(2, 9))
        }),
        fault("a digest function is listed twice", &["CAP-05"], {
            of_cache(|cache| cache.digest_functions.push(1))
        }),
        fault("a digest function is listed that does not work", &["CAP-05"], {
            let listed = of_cache(|cache| {
                if !cache.digest_functions.contains(&BLAKE3) {
                    cache.digest_functions.push(BLAKE3);
                }
            });
            let broken = exchange::<BatchUpdateBlobsRequest, BatchUpdateBlobsResponse>(
                "BatchUpdateBlobs",
                |asked, answer| match asked.digest_function {
                    BLAKE3 => Err(Status::invalid_argument("BLAKE3 is not supported")),
                    _ => answer,
                },
            );
            both("GetCapabilities", listed, broken)
        }),
        fault("the old field for the digest function is empty", &["CAP-06"], {
            of_execution(|execution| execution.digest_function = 0)
        }),
        fault("execution takes digests that the cache does not", &["CAP-07"], {
            of_execution(|execution| execution.digest_functions.push(7))
        }),
        fault("execution is claimed to be off", &["CAP-08"], {
            of_execution(|execution| execution.exec_enabled = false)
        }),
        fault("updates of the action cache are claimed to be off", &["CAP-09", "AC-12"], {
            of_cache(|cache| {
                cache.action_cache_update_capabilities = Some(ActionCacheUpdateCapabilities::default());
            })
        }),
        fault("batches are claimed to be larger than they are", &["CAP-10"], {
            of_cache(|cache| cache.max_batch_total_size_bytes += 1_000_000)
        }),
        fault("a batch is as large as a message", &["CAP-11"], {
            of_cache(|cache| cache.max_batch_total_size_bytes = 4 * 1024 * 1024)
        }),
        fault("a compressor is claimed that does not work", &["CAP-12"], {
            let listed = of_cache(|cache| cache.supported_compressors = vec![ZSTD]);
            let broken = instead("Read", |call, upstream| async move {
                let (asked, call) = read_request::<ReadRequest>(call).await?;
                match asked.resource_name.contains("compressed-blobs/") {
                    true => Err(Status::invalid_argument("zstd is not supported")),
                    false => upstream.forward(call).await,
                }
            });
            both("GetCapabilities", listed, broken)
        }),
        fault("no compression is claimed to be a batch compressor", &["CAP-13"], {
            of_cache(|cache| cache.supported_batch_update_compressors.push(0))
        }),
        fault("nothing is said about absolute symlinks", &["CAP-14"], {
            of_cache(|cache| cache.symlink_absolute_path_strategy = 0)
        }),
        fault("absolute symlinks are claimed to be the other way", &["EXE-36"], {
            of_cache(|cache| {
                cache.symlink_absolute_path_strategy = 3 - cache.symlink_absolute_path_strategy;
            })
        }),
        fault("the largest blob is claimed to be small", &["CAP-15"], {
            of_cache(|cache| cache.max_cas_blob_size_bytes = 1000)
        }),
        fault("split and splice are claimed to be what they are not", &["CAP-16"], {
            of_cache(|cache| {
                cache.split_blob_support ^= true;
                cache.splice_blob_support ^= true;
            })
        }),
        fault("chunks are tiny", &["CAP-17"], {
            of_cache(|cache| {
                cache.split_blob_support = true;
                cache.fast_cdc_2020_params =
                    Some(FastCdc2020Params { avg_chunk_size_bytes: 16, ..Default::default() });
            })
        }),
        fault("priorities are refused", &["CAP-18"], {
            instead("Execute", |call, upstream| async move {
                let (asked, call) = read_request::<ExecuteRequest>(call).await?;
                match asked.execution_policy {
                    Some(_) => Err(Status::invalid_argument("execution_policy is not supported")),
                    None => upstream.forward(call).await,
                }
            })
        }),
        fault("a version is claimed whose platforms and paths are not", &["CAP-04"], {
            job(|job| job.command.output_paths.truncate(1))
        }),
        fault("each connection gets different capabilities", &["CAP-19"], {
            said(move |said| {
                let call = calls.fetch_add(1, Ordering::Relaxed);
                said.cache_capabilities.get_or_insert_default().max_cas_blob_size_bytes += call;
            })
        }),
    ]
}
