//! CAP: the capabilities of a server, compared with its behaviour. The checks of versions and lists come first, then
//! the checks of the claimed features.

use super::Beyond;
use crate::{
    actions::result_of,
    blob::Blob,
    check::{
        Answer as _, Check, Step as _, Verdict, absent, ensure, equal, fail, inline, only, show, skipped,
    },
    checks,
    compression::{BROTLI, DEFLATE, ZSTD, compress, decompress},
    raw,
    session::Session,
    store::{partial_upload, pieces, stalled},
};
use gorego_reapi::proto::{
    reapi::{
        ActionResult, ExecutionPolicy, GetCapabilitiesRequest, OutputFile, ServerCapabilities,
        SpliceBlobRequest, SplitBlobRequest, compressor, digest_function, symlink_absolute_path_strategy,
    },
    semver::SemVer,
};
use std::{collections::BTreeSet, time::Duration};
use tokio::time::{Instant, timeout};
use tonic::{Code, Status};

pub(super) const CHECKS: &[Check] = checks![
    what_is_claimed_answers => "CAP-01";
    the_versions_are_set_and_overlap_2 => "CAP-02";
    the_deprecated_version_is_older => "CAP-03";
    what_the_high_version_promises_works => "CAP-04";
    every_listed_digest_function_works => "CAP-05";
    the_first_digest_function_of_execution_is_set => "CAP-06";
    the_digest_functions_of_execution_are_those_of_the_cache => "CAP-07";
    exec_enabled_says_whether_execute_is_accepted => "CAP-08";
    update_enabled_says_whether_results_are_accepted => "CAP-09", "AC-12";
    a_full_batch_is_read_in_one_default_message => "CAP-11";
    every_blob_is_written_and_read_compressed => "CAP-12";
    batch_compressors_are_accepted_exactly_as_listed => "CAP-13", "CAS-14";
    the_strategy_for_absolute_symlinks_is_named => "CAP-14";
    blobs_above_the_largest_size_are_refused => "CAP-15";
    split_and_splice_answer_as_claimed => "CAP-16";
    chunking_parameters_are_in_range => "CAP-17";
    priorities_of_the_listed_ranges_work => "CAP-18";
    every_connection_gets_the_same_answer_quickly => "CAP-19";
];

/// Rules that cannot be checked over the wire.
pub(super) const BEYOND: &[Beyond] = &[];

/// To test the size limit, blobs up to this size are really sent; larger ones are only announced.
const MODEST_BLOB_BYTES: i64 = 64 * 1024 * 1024;
/// Time limit for the refusal of an upload that is announced as too large.
const REFUSAL_PATIENCE: Duration = Duration::from_secs(3);
/// How much longer than an unimplemented call half of all GetCapabilities calls may take. The network counts for both;
/// asking workers takes longer.
const CHEAP: Duration = Duration::from_millis(250);
/// Number of connections, and of calls on each, that compare the capabilities.
const COMPARED: (usize, usize) = (10, 5);

async fn capabilities(s: &Session) -> Result<ServerCapabilities, Status> {
    let request = GetCapabilitiesRequest { instance_name: s.instance() };
    Ok(s.capabilities_client().get_capabilities(request).await?.into_inner())
}

async fn what_is_claimed_answers(s: Session) -> Verdict {
    let claimed = s.capabilities();
    let any = claimed.cache_capabilities.is_some() || claimed.execution_capabilities.is_some();
    ensure(any, "cache_capabilities, execution_capabilities, or both", "neither")?;
    let answer = s.missing(&[s.unknown()]).await;
    match claimed.cache_capabilities {
        Some(_) => drop(answer.wanted("FindMissingBlobs answers, since cache_capabilities is set")?),
        None => drop(answer.refused("FindMissingBlobs without cache_capabilities", &[Code::Unimplemented])?),
    }
    Ok(())
}

fn version(version: &SemVer) -> (i32, i32, i32) {
    (version.major, version.minor, version.patch)
}

async fn the_versions_are_set_and_overlap_2(s: Session) -> Verdict {
    let claimed = s.capabilities();
    let (Some(low), Some(high)) = (&claimed.low_api_version, &claimed.high_api_version) else {
        return Err(fail("low_api_version and high_api_version", "one of them is not set"));
    };
    let seen = format!("low {:?}, high {:?}", version(low), version(high));
    ensure(version(low) <= version(high), "low <= high", &seen)?;
    ensure(version(low).0 <= 2 && version(high) >= (2, 0, 0), "a range that overlaps 2.x", &seen)?;
    let plain = low.prerelease.is_empty() && high.prerelease.is_empty();
    ensure(plain, "no prerelease", format!("\"{}\", \"{}\"", low.prerelease, high.prerelease))
}

async fn the_deprecated_version_is_older(s: Session) -> Verdict {
    let claimed = s.capabilities();
    let (Some(deprecated), Some(low)) = (&claimed.deprecated_api_version, &claimed.low_api_version) else {
        return Ok(());
    };
    let seen = format!("deprecated {:?}, low {:?}", version(deprecated), version(low));
    ensure(version(deprecated) < version(low), "deprecated_api_version < low_api_version", seen)
}

async fn what_the_high_version_promises_works(s: Session) -> Verdict {
    s.runs_actions().await?;
    let high = s.capabilities().high_api_version.as_ref().map_or((0, 0, 0), version);
    if high < (2, 1, 0) {
        return Err(absent("high_api_version promises nothing beyond 2.0"));
    }
    // 2.1: output_paths of any kind, and output_symlinks.
    let script = "echo hi > file && mkdir directory && ln -s file symlink";
    let mut command = s.shell(script, &["directory", "file", "symlink"]);
    if high >= (2, 3, 0) {
        // 2.3: argv[0] without a slash is looked up in the PATH of the Command.
        command.arguments = vec!["sh".into(), "-c".into(), script.into(), s.word()];
    }
    let result = s.run_command(&command).await?;
    equal("exit_code", &result.exit_code, &0)?;
    let counts = (result.output_files.len(), result.output_directories.len(), result.output_symlinks.len());
    equal("output files, directories and symlinks", &counts, &(1, 1, 1))
}

async fn every_listed_digest_function_works(s: Session) -> Verdict {
    let listed = &s.cache()?.digest_functions;
    let unique: BTreeSet<i32> = listed.iter().copied().collect();
    ensure(!listed.is_empty() && !listed.contains(&0), "functions, and not UNKNOWN", format!("{listed:?}"))?;
    ensure(unique.len() == listed.len(), "no function twice", format!("{listed:?}"))?;
    for function in s.functions() {
        s.case(function.name(), async {
            let s = s.with_function(function);
            // These blobs are long enough that SHA256TREE differs from SHA256.
            let (streamed, batched) = (s.blob(3000), s.blob(3000));
            s.store(&[&batched]).await.own()?;
            s.write(&streamed).await.wanted("an upload is accepted")?;
            for (how, blob) in [("a batch", &batched), ("a Write", &streamed)] {
                let read = s.read(&blob.digest).await.wanted(&format!("what came in by {how} is read"))?;
                ensure(read == blob.data, format!("the bytes that came in by {how}"), "others")?;
            }
            if s.updates_results().is_ok() {
                let action = s.fresh_action().await?;
                let file = OutputFile {
                    path: "out".into(),
                    digest: Some(batched.digest.clone()),
                    ..Default::default()
                };
                let result = ActionResult { output_files: vec![file], ..Default::default() };
                s.update_result(&action, result).await.wanted("a result is stored")?;
                let hit = s.result(&action).await.wanted("a result is a hit")?;
                let digest = hit.output_files.first().and_then(|file| file.digest.clone());
                equal("the output's digest", &digest, &Some(batched.digest))?;
            }
            Ok(())
        })
        .await?;
    }
    Ok(())
}

async fn the_first_digest_function_of_execution_is_set(s: Session) -> Verdict {
    let execution = s.executes()?;
    let sha256 = digest_function::Value::Sha256 as i32;
    let functions = s.capabilities().cache_capabilities.as_ref().map(|cache| &cache.digest_functions);
    ensure(execution.digest_function != 0, "digest_function (field 1) is not UNKNOWN", "UNKNOWN")?;
    if functions.is_some_and(|functions| functions.contains(&sha256)) {
        equal("digest_function (field 1)", &execution.digest_function, &sha256)?;
    }
    Ok(())
}

async fn the_digest_functions_of_execution_are_those_of_the_cache(s: Session) -> Verdict {
    let execution = s.executes()?;
    let (first, all) = (execution.digest_function, &execution.digest_functions);
    if all.is_empty() {
        return Ok(());
    }
    ensure(all.contains(&first), format!("digest_functions contains {first}"), format!("{all:?}"))?;
    if let Ok(cache) = s.cache() {
        let known = all.iter().all(|function| cache.digest_functions.contains(function));
        let seen = format!("{all:?} and {:?}", cache.digest_functions);
        ensure(known, "only functions that the cache lists", seen)?;
    }
    Ok(())
}

async fn exec_enabled_says_whether_execute_is_accepted(s: Session) -> Verdict {
    if s.executes().is_ok() {
        let result = s.run_command(&s.shell("exit 0", &[])).await?;
        return equal("exit_code", &result.exit_code, &0);
    }
    let refused = match s.start(s.execute_request(&s.unknown())).await {
        Err(status) => Some(status),
        Ok(mut run) => run.next_status().await,
    };
    let what = "Execute is refused, since exec_enabled is not set";
    let status = refused.ok_or_else(|| fail(what, "it is accepted"))?;
    let codes =
        [Code::Unimplemented, Code::PermissionDenied, Code::FailedPrecondition, Code::InvalidArgument];
    ensure(codes.contains(&status.code()), what, show(&status))
}

async fn update_enabled_says_whether_results_are_accepted(s: Session) -> Verdict {
    s.cache()?;
    let action = s.fresh_action().await?;
    let answer = s.update_result(&action, s.a_result().await?).await;
    if s.updates_results().is_ok() {
        drop(answer.wanted("UpdateActionResult is accepted, since update_enabled is set")?);
        drop(s.result(&action).await.wanted("the result is a hit")?);
    } else {
        let codes = [Code::PermissionDenied, Code::Unimplemented, Code::Unauthenticated];
        answer.refused("UpdateActionResult without update_enabled", &codes)?;
        s.result(&action).await.refused("GetActionResult of it", &[Code::NotFound])?;
    }
    Ok(())
}

async fn a_full_batch_is_read_in_one_default_message(s: Session) -> Verdict {
    let limit = usize::try_from(s.cache()?.max_batch_total_size_bytes).unwrap_or(0);
    if limit == 0 {
        return Err(absent("the server states no limit"));
    }
    ensure(
        limit <= 4 * 1024 * 1024,
        "a limit below the 4 MiB that clients receive",
        format!("{limit} bytes"),
    )?;
    let count = 1000.min(limit);
    let mut blobs: Vec<Blob> = (1..count).map(|_| s.blob(limit / count)).collect();
    blobs.push(s.blob(limit - (count - 1) * (limit / count)));
    s.store(&blobs.iter().collect::<Vec<_>>()).await?;
    let digests: Vec<_> = blobs.iter().map(|blob| blob.digest.clone()).collect();
    let answer =
        s.batch_read(&digests, &[]).await.wanted("1000 blobs of the full size are read in one call")?;
    equal("responses", &answer.responses.len(), &count)?;
    for (at, response) in answer.responses.iter().enumerate() {
        inline(&format!("response {at}"), response.status.as_ref(), &[Code::Ok])?;
    }
    Ok(())
}

async fn every_blob_is_written_and_read_compressed(s: Session) -> Verdict {
    let listed = &s.cache()?.supported_compressors;
    if !listed.contains(&ZSTD) {
        let others = listed.iter().any(|number| *number > ZSTD);
        return Err(match others {
            true => skipped(format!("zstd is the only compressor known here; listed are {listed:?}")),
            false => absent("the server lists no compressor for ByteStream"),
        });
    }
    let (streamed, batched, compressed) = (s.text(100_000), s.text(1000), s.text(100_000));
    s.store(&[&batched]).await?;
    s.write(&streamed).await.needs("BS-23", "a plain upload is accepted")?;
    let messages = pieces(&s.compressed_write_name(&compressed), &compress(&compressed.data)?, 0, 1000);
    s.write_messages(messages).await.wanted("a compressed upload is accepted")?;
    for (how, blob) in [("a Write", &streamed), ("a batch", &batched), ("a compressed Write", &compressed)] {
        s.case(how, async {
            let plain =
                s.read(&blob.digest).await.needs("BS-07", &format!("what came in by {how} is read plain"))?;
            ensure(plain == blob.data, format!("the bytes that came in by {how}"), "others")?;
            let name = s.qualify(&blob.compressed_name("zstd"));
            let packed =
                s.read_named(&name).await.wanted(&format!("what came in by {how} is read compressed"))?;
            let unpacked = decompress(&packed, blob.data.len())?;
            ensure(
                unpacked == blob.data,
                format!("the bytes that came in by {how}"),
                "others, once decompressed",
            )?;
            Ok(())
        })
        .await?;
    }
    Ok(())
}

async fn batch_compressors_are_accepted_exactly_as_listed(s: Session) -> Verdict {
    let listed = &s.cache()?.supported_batch_update_compressors;
    ensure(
        !listed.contains(&(compressor::Value::Identity as i32)),
        "no IDENTITY in the list",
        format!("{listed:?}"),
    )?;
    for number in [ZSTD, DEFLATE, BROTLI] {
        s.case(format!("compressor {number}"), async {
            let blob = s.text(1000);
            let mut item = s.item(&blob);
            item.compressor = number;
            // Unknown compressors are refused by number, for any data.
            item.data = compress(&blob.data)?;
            if listed.contains(&number) && number != ZSTD {
                return Ok(());
            }
            let answer = s.update_items(vec![item]).await.wanted("BatchUpdateBlobs answers")?;
            let code = if listed.contains(&number) { Code::Ok } else { Code::InvalidArgument };
            inline("an item", only("an item", answer.responses)?.status.as_ref(), &[code])?;
            let stored = s
                .missing(std::slice::from_ref(&blob.digest))
                .await
                .needs("CAS-01", "FindMissingBlobs answers")?;
            equal("stored", &stored.is_empty(), &(code == Code::Ok))
        })
        .await?;
    }
    Ok(())
}

async fn the_strategy_for_absolute_symlinks_is_named(s: Session) -> Verdict {
    use symlink_absolute_path_strategy::Value;
    let strategy = s.cache()?.symlink_absolute_path_strategy;
    let named = [Value::Disallowed as i32, Value::Allowed as i32].contains(&strategy);
    ensure(named, "symlink_absolute_path_strategy DISALLOWED or ALLOWED", strategy)
}

async fn blobs_above_the_largest_size_are_refused(s: Session) -> Verdict {
    let limit = s.cache()?.max_cas_blob_size_bytes;
    if limit <= 0 {
        return Err(absent("the server states no largest blob"));
    }
    let codes = [Code::InvalidArgument];
    if limit <= MODEST_BLOB_BYTES {
        let size = usize::try_from(limit).unwrap_or(usize::MAX);
        s.write(&s.blob(size)).await.control("a blob of the largest size is accepted")?;
        let refused = s.write(&s.blob(size.saturating_add(1))).await;
        refused.refused("a blob of one byte more", &codes)?;
        return Ok(());
    }
    // Such a blob is too large to send. The name announces the size, and a server that checks it refuses at once.
    let mut blob = s.blob(1000);
    blob.digest.size_bytes = limit.saturating_add(1);
    let messages = partial_upload(&s.write_name(&blob), &blob.data, 1000);
    let upload = async { s.byte_stream().write(stalled(messages)).await };
    match timeout(REFUSAL_PATIENCE, upload).await {
        Ok(answer) => drop(answer.refused("an upload announced as one byte more than the largest", &codes)?),
        Err(_) => {
            let why = "it is too large to be sent, and the server does not refuse it by its name";
            return Err(skipped(format!("the largest blob has {limit} bytes; {why}")));
        }
    }
    Ok(())
}

async fn split_and_splice_answer_as_claimed(s: Session) -> Verdict {
    let cache = s.cache()?;
    let blob = s.stored(100).await?;
    let split = SplitBlobRequest {
        instance_name: s.instance(),
        blob_digest: Some(blob.digest.clone()),
        digest_function: s.function_number(),
        ..Default::default()
    };
    let answer = s.cas().split_blob(split).await;
    if cache.split_blob_support {
        // A server may know only the chunks of spliced blobs.
        drop(answer.or_refused("SplitBlob, since split_blob_support is set", &[Code::NotFound])?);
    } else {
        answer.refused("SplitBlob without split_blob_support", &[Code::Unimplemented])?;
    }
    let splice = SpliceBlobRequest {
        instance_name: s.instance(),
        blob_digest: Some(blob.digest.clone()),
        chunk_digests: vec![blob.digest],
        digest_function: s.function_number(),
        ..Default::default()
    };
    let answer = s.cas().splice_blob(splice).await;
    if cache.splice_blob_support {
        drop(answer.or_refused("SpliceBlob, since splice_blob_support is set", &[Code::AlreadyExists])?);
    } else {
        answer.refused("SpliceBlob without splice_blob_support", &[Code::Unimplemented])?;
    }
    Ok(())
}

async fn chunking_parameters_are_in_range(s: Session) -> Verdict {
    let cache = s.cache()?;
    let (fast, rep_max) = (&cache.fast_cdc_2020_params, &cache.rep_max_cdc_params);
    if fast.is_none() && rep_max.is_none() {
        return Err(absent("the server states no chunking parameters"));
    }
    let used = cache.split_blob_support || cache.splice_blob_support;
    ensure(used, "chunking parameters only beside SplitBlob or SpliceBlob", "neither is supported")?;
    if let Some(fast) = fast {
        let average = fast.avg_chunk_size_bytes;
        ensure((1024..=1_048_576).contains(&average), "avg_chunk_size_bytes within 1 KiB to 1 MiB", average)?;
    }
    if let Some(rep_max) = rep_max {
        let least = rep_max.min_chunk_size_bytes;
        ensure(least >= 64, "min_chunk_size_bytes of at least 64", least)?;
    }
    Ok(())
}

async fn priorities_of_the_listed_ranges_work(s: Session) -> Verdict {
    s.runs_actions().await?;
    let ranges = s.executes()?.execution_priority_capabilities.clone().unwrap_or_default().priorities;
    let mut priorities = vec![0];
    priorities.extend(ranges.iter().flat_map(|range| [range.min_priority, range.max_priority]));
    for priority in priorities {
        s.case(format!("priority {priority}"), async {
            let action = s.fresh_action().await?;
            let mut request = s.execute_request(&action);
            request.execution_policy = Some(ExecutionPolicy { priority });
            let run = s.start(request).await.wanted("Execute is accepted")?;
            let result = result_of(run.finish().await?)?;
            equal("exit_code", &result.exit_code, &0)
        })
        .await?;
    }
    Ok(())
}

async fn every_connection_gets_the_same_answer_quickly(s: Session) -> Verdict {
    let (connections, calls) = COMPARED;
    let (mut times, mut floor) = (Vec::new(), Vec::new());
    for connection in 0..connections {
        s.case(format!("connection {connection} of {connections}"), async {
            let s = s.reconnect().await?;
            for _ in 0..calls {
                let begin = Instant::now();
                let answer = capabilities(&s).await.wanted("GetCapabilities answers")?;
                times.push(begin.elapsed());
                let begin = Instant::now();
                // An unimplemented call needs no processing, so its answer does not matter.
                let _ = raw::call(
                    s.service(),
                    raw::path::NO_SUCH_METHOD,
                    tonic::Request::new(bytes::Bytes::new()),
                )
                .await;
                floor.push(begin.elapsed());
                let same = answer == *s.capabilities();
                ensure(same, "the capabilities of the first connection", format!("{answer:?}"))?;
            }
            Ok(())
        })
        .await?;
    }
    let median = |mut times: Vec<Duration>| {
        times.sort_unstable();
        times.get(times.len() / 2).copied().unwrap_or_default()
    };
    let (time, least) = (median(times), median(floor));
    let expected =
        format!("half of the calls within {CHEAP:?} of the {least:?} that a call of nothing takes");
    ensure(time < least + CHEAP, expected, format!("{time:?}"))
}
