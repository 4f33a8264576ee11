//! GEN-01 to GEN-11: valid digests, and their functions.

use crate::{
    blob::Blob,
    check::{Answer as _, Check, Step as _, Verdict, absent, ensure, equal, inline, only},
    checks,
    session::Session,
};
use gorego_reapi::{
    digest::DigestFunction,
    proto::{
        bytestream::ReadRequest,
        reapi::{
            self, ActionResult, Digest, Directory, ExecuteRequest, GetActionResultRequest, GetTreeRequest,
            OutputFile, SplitBlobRequest, digest_function,
        },
    },
};
use tonic::Code;

pub(crate) const CHECKS: &[Check] = checks![
    upper_case_hashes_are_refused => "GEN-01";
    hashes_of_another_length_or_alphabet_are_refused => "GEN-02";
    negative_and_overflowing_sizes_are_refused => "GEN-03";
    the_right_hash_with_a_wrong_size_finds_nothing => "GEN-04";
    a_wrong_size_is_no_action_to_execute => "GEN-04";
    a_digest_that_is_not_set_is_an_argument_error => "GEN-05";
    the_empty_blob_exists_in_every_call => "GEN-06";
    the_empty_blob_counts_as_present_in_results => "GEN-06", "AC-03";
    the_empty_blob_is_an_input_directory_and_file => "GEN-06";
    size_0_with_another_hash_is_not_the_empty_blob => "GEN-07";
    an_unset_digest_function_is_inferred => "GEN-08";
    unsupported_digest_functions_are_refused => "GEN-09";
    hashes_of_two_functions_in_one_request_are_refused => "GEN-10";
    presence_under_one_function_says_nothing_of_another => "GEN-11";
];

const INVALID: &[Code] = &[Code::InvalidArgument];
/// The codes for optional calls.
const INVALID_OR_NONE: &[Code] = &[Code::InvalidArgument, Code::Unimplemented];

/// Checks that every call that takes a digest refuses this one.
async fn refused_everywhere(s: &Session, what: &str, digest: &Digest) -> Verdict {
    let asked = std::slice::from_ref(digest);
    s.missing(asked).await.refused(&format!("{what} in FindMissingBlobs"), INVALID)?;
    s.read(digest).await.refused(&format!("{what} in Read"), INVALID)?;
    s.result(digest).await.refused(&format!("{what} in GetActionResult"), INVALID)?;
    s.tree(digest, 0).await.refused(&format!("{what} in GetTree"), INVALID_OR_NONE)?;
    // In a batch, either the call or the entry is refused.
    if let Some(answer) =
        s.batch_read(asked, &[]).await.or_refused(&format!("{what} in BatchReadBlobs"), INVALID)?
    {
        let what = format!("{what} in BatchReadBlobs");
        inline(&what, only(&what, answer.responses)?.status.as_ref(), INVALID)?;
    }
    let blob = Blob { digest: digest.clone(), ..s.blob(100) };
    if let Some(answer) =
        s.update(&[&blob]).await.or_refused(&format!("{what} in BatchUpdateBlobs"), INVALID)?
    {
        let what = format!("{what} in BatchUpdateBlobs");
        inline(&what, only(&what, answer.responses)?.status.as_ref(), INVALID)?;
    }
    s.write(&blob).await.refused(&format!("{what} in Write"), INVALID)?;
    Ok(())
}

/// A valid digest of no stored blob. Checks that the server accepts its form.
async fn understood(s: &Session) -> Verdict<Digest> {
    let good = s.unknown();
    let missing = s.missing(std::slice::from_ref(&good)).await.needs("CAS-01", "FindMissingBlobs answers")?;
    equal("missing_blob_digests", &missing, &vec![good.clone()]).needs("CAS-01")?;
    s.read(&good).await.refused("Read of an unknown blob", &[Code::NotFound]).needs("BS-08")?;
    s.result(&good)
        .await
        .refused("GetActionResult of an unknown action", &[Code::NotFound])
        .needs("AC-01")?;
    Ok(good)
}

async fn upper_case_hashes_are_refused(s: Session) -> Verdict {
    let blob = s.stored(100).await?;
    let mut digest = blob.digest.clone();
    digest.hash.make_ascii_uppercase();
    // A hash without letters has no upper case; that happens once in 10^12 runs.
    understood(&s).await?;
    refused_everywhere(&s, "an upper-case hash", &digest).await
}

async fn hashes_of_another_length_or_alphabet_are_refused(s: Session) -> Verdict {
    let good = understood(&s).await?;
    let rest = good.hash.get(1..).unwrap_or_default();
    for (what, hash) in [
        ("a hash with a character too few", rest.to_owned()),
        ("a hash with a character too many", format!("0{}", good.hash)),
        ("a hash with a \"g\"", format!("g{rest}")),
    ] {
        refused_everywhere(&s, what, &Digest { hash, ..good.clone() }).await?;
    }
    Ok(())
}

async fn negative_and_overflowing_sizes_are_refused(s: Session) -> Verdict {
    let good = understood(&s).await?;
    refused_everywhere(&s, "a size of -1", &Digest { size_bytes: -1, ..good.clone() }).await?;
    let name = s.read_name(&good);
    let stem = name.rsplit_once('/').map_or("", |(stem, _)| stem);
    let overflowing = format!("{stem}/9223372036854775808");
    s.read_named(&overflowing).await.refused("a size of 2^63 in Read", INVALID)?;
    Ok(())
}

async fn the_right_hash_with_a_wrong_size_finds_nothing(s: Session) -> Verdict {
    let blob = s.stored(100).await?;
    s.read(&blob.digest).await.needs("BS-07", "the right digest is read")?;
    for size_bytes in [101, 99, 0] {
        s.case(format!("size {size_bytes} instead of 100"), async {
            let wrong = Digest { size_bytes, ..blob.digest.clone() };
            let asked = std::slice::from_ref(&wrong);
            match s.missing(asked).await {
                // Size 0 is recognisably wrong without a lookup (GEN-07).
                Err(status) if size_bytes == 0 && status.code() == Code::InvalidArgument => {}
                answer => equal(
                    "missing_blob_digests",
                    &answer.wanted("FindMissingBlobs answers")?,
                    &asked.to_vec(),
                )?,
            }
            let codes = [Code::NotFound, Code::InvalidArgument];
            s.read(&wrong).await.refused("Read", &codes)?;
            let upload = Blob { digest: wrong, ..blob.clone() };
            if let Some(answer) = s.update(&[&upload]).await.or_refused("the batch", INVALID)? {
                inline("an upload", only("an upload", answer.responses)?.status.as_ref(), INVALID)?;
            }
            Ok(())
        })
        .await?;
    }
    Ok(())
}

async fn a_wrong_size_is_no_action_to_execute(s: Session) -> Verdict {
    s.runs_actions().await?;
    let action = s.action(&s.shell("true", &[]), &s.empty().digest).await?;
    let right = s.execute(&action).await?;
    inline("an Execute of the right digest", right.status.as_ref(), &[Code::Ok]).control()?;
    let wrong = Digest { size_bytes: action.size_bytes + 1, ..action };
    let codes = [Code::FailedPrecondition, Code::InvalidArgument];
    let refusal = s.refusal(&wrong).await.case("Execute with a wrong size")?;
    inline("Execute with a wrong size", Some(&refusal.status), &codes)
}

async fn a_digest_that_is_not_set_is_an_argument_error(s: Session) -> Verdict {
    understood(&s).await?;
    for (what, digest) in [("no digest", None), ("a zero-valued digest", Some(Digest::default()))] {
        s.case(what, async {
            let request =
                GetActionResultRequest { action_digest: digest.clone(), ..s.result_of(&s.unknown()) };
            s.result_request(request).await.refused("GetActionResult without action_digest", INVALID)?;
            let request = GetTreeRequest {
                instance_name: s.instance(),
                root_digest: digest.clone(),
                digest_function: s.function_number(),
                ..Default::default()
            };
            s.tree_request(request).await.refused("GetTree without root_digest", INVALID_OR_NONE)?;
            let request = SplitBlobRequest {
                instance_name: s.instance(),
                blob_digest: digest.clone(),
                digest_function: s.function_number(),
                ..Default::default()
            };
            let answer = s.cas().split_blob(request).await;
            answer.refused("SplitBlob without blob_digest", INVALID_OR_NONE)?;
            if s.executes().is_ok() {
                let request = ExecuteRequest { action_digest: digest, ..s.execute_request(&s.unknown()) };
                let refusal = s.refusal_of(request).await.case("Execute without action_digest")?;
                inline("Execute without action_digest", Some(&refusal.status), INVALID)?;
            }
            Ok(())
        })
        .await?;
    }
    Ok(())
}

async fn the_empty_blob_exists_in_every_call(s: Session) -> Verdict {
    s.cache()?;
    for function in s.functions() {
        s.case(function.name(), async {
            let s = s.with_function(function);
            let (empty, named) = (s.empty().digest, function.wire().as_str_name());
            let asked = std::slice::from_ref(&empty);
            let missing =
                s.missing(asked).await.wanted(&format!("FindMissingBlobs under {named} answers"))?;
            ensure(missing.is_empty(), format!("the empty blob of {named} is not missing"), "it is missing")?;
            let read = s.read(&empty).await.wanted(&format!("the empty blob of {named} is read"))?;
            ensure(read.is_empty(), "no bytes", format!("{} bytes", read.len()))?;
            let batch = s.batch_read(asked, &[]).await.wanted("BatchReadBlobs answers")?;
            let what = format!("BatchReadBlobs of {named}");
            inline(&what, only(&what, batch.responses)?.status.as_ref(), &[Code::Ok])?;
            match s.tree(&empty, 0).await {
                Err(status) if status.code() == Code::Unimplemented => {}
                answer => {
                    let pages = answer.wanted("GetTree of the empty digest answers")?;
                    let all: Vec<_> = pages.into_iter().flat_map(|page| page.directories).collect();
                    equal("directories", &all, &vec![Directory::default()])?;
                }
            }
            Ok(())
        })
        .await?;
    }
    Ok(())
}

async fn the_empty_blob_counts_as_present_in_results(s: Session) -> Verdict {
    s.updates_results()?;
    for function in s.functions() {
        s.case(function.name(), async {
            let s = s.with_function(function);
            let action = s.fresh_action().await?;
            let file =
                OutputFile { path: "empty".into(), digest: Some(s.empty().digest), ..Default::default() };
            let result = ActionResult { output_files: vec![file], ..Default::default() };
            s.update_result(&action, result).await.needs("AC-08", "the result is stored")?;
            let what =
                format!("a result whose only output is the empty blob of {} is a hit", function.name());
            s.result(&action).await.wanted(&what)?;
            Ok(())
        })
        .await?;
    }
    Ok(())
}

async fn the_empty_blob_is_an_input_directory_and_file(s: Session) -> Verdict {
    s.runs_actions().await?;
    let (mut root, empty) = (Directory::default(), s.empty().digest);
    let directory = reapi::DirectoryNode { name: "d".into(), digest: Some(empty.clone()) };
    root.directories.push(directory);
    root.files.push(reapi::FileNode { name: "f".into(), digest: Some(empty), ..Default::default() });
    let root = s.stored_directory(&root).await?;
    let action = s.action(&s.shell("test -d d && test -f f && ! test -s f", &[]), &root.digest).await?;
    let result = crate::actions::result_of(s.execute(&action).await?)?;
    equal("exit_code", &result.exit_code, &0)
}

async fn size_0_with_another_hash_is_not_the_empty_blob(s: Session) -> Verdict {
    let hash = "0".repeat(s.empty().digest.hash.len());
    let wrong = Digest { hash, size_bytes: 0 };
    let asked = std::slice::from_ref(&wrong);
    if let Some(missing) = s.missing(asked).await.or_refused("FindMissingBlobs", INVALID)? {
        equal("missing_blob_digests", &missing, &asked.to_vec())?;
    }
    s.read(&wrong).await.refused("Read of it", &[Code::NotFound, Code::InvalidArgument])?;
    Ok(())
}

/// Whether the length of a hash of this function implies this function when none is named. That is the case unless a
/// legacy function has the same length.
fn is_implied_by_length(function: DigestFunction, listed: &[DigestFunction]) -> bool {
    let rivals: Vec<_> = listed.iter().filter(|f| f.hash_bytes() == function.hash_bytes()).collect();
    let legacy = |f: &DigestFunction| (f.wire() as i32) < digest_function::Value::Sha256tree as i32;
    rivals.len() == 1 || (legacy(&function) && rivals.iter().filter(|f| legacy(f)).count() == 1)
}

async fn an_unset_digest_function_is_inferred(s: Session) -> Verdict {
    s.cache()?;
    let listed = s.functions();
    for function in listed.iter().copied().filter(|function| is_implied_by_length(*function, &listed)) {
        s.case(function.name(), async {
            let named = s.with_function(function);
            let s = named.without_function_number();
            let blob = s.blob(100);
            let asked = std::slice::from_ref(&blob.digest);
            let what = format!("{} is inferred from the length of the hash", function.wire().as_str_name());
            equal("missing_blob_digests", &s.missing(asked).await.wanted(&what)?, &asked.to_vec())?;
            let updated = s.update(&[&blob]).await.wanted(&what)?;
            inline(&what, only(&what, updated.responses)?.status.as_ref(), &[Code::Ok])?;
            let read = s.batch_read(asked, &[]).await.wanted(&what)?;
            inline(&what, only(&what, read.responses)?.status.as_ref(), &[Code::Ok])?;
            let missing = named.missing(asked).await.needs("CAS-01", "FindMissingBlobs answers")?;
            equal(&format!("{what}; missing under its name"), &missing, &Vec::new())?;
            s.result(&blob.digest)
                .await
                .refused("an unknown action without a function", &[Code::NotFound])?;
            Ok(())
        })
        .await?;
    }
    Ok(())
}

/// Checks that every call with a `digest_function` field refuses this number.
async fn number_refused(s: &Session, number: i32, blob: &Blob) -> Verdict {
    let what = match digest_function::Value::try_from(number) {
        Ok(value) => format!("digest function {}", value.as_str_name()),
        Err(_) => format!("digest function {number}"),
    };
    let asked = vec![blob.digest.clone()];
    let request = reapi::FindMissingBlobsRequest {
        instance_name: s.instance(),
        blob_digests: asked.clone(),
        digest_function: number,
    };
    let answer = s.cas().find_missing_blobs(request).await;
    answer.refused(&format!("{what} in FindMissingBlobs"), INVALID)?;
    let request = GetActionResultRequest { digest_function: number, ..s.result_of(&blob.digest) };
    s.result_request(request).await.refused(&format!("{what} in GetActionResult"), INVALID)?;
    let request = reapi::BatchReadBlobsRequest {
        instance_name: s.instance(),
        digests: asked,
        digest_function: number,
        ..Default::default()
    };
    let answer = s.cas().batch_read_blobs(request).await.map(tonic::Response::into_inner);
    if let Some(answer) = answer.or_refused(&format!("{what} in BatchReadBlobs"), INVALID)? {
        let what = format!("{what} in BatchReadBlobs");
        inline(&what, only(&what, answer.responses)?.status.as_ref(), INVALID)?;
    }
    let request = reapi::BatchUpdateBlobsRequest {
        instance_name: s.instance(),
        requests: vec![s.item(blob)],
        digest_function: number,
    };
    let answer = s.cas().batch_update_blobs(request).await.map(tonic::Response::into_inner);
    if let Some(answer) = answer.or_refused(&format!("{what} in BatchUpdateBlobs"), INVALID)? {
        let what = format!("{what} in BatchUpdateBlobs");
        inline(&what, only(&what, answer.responses)?.status.as_ref(), INVALID)?;
    }
    Ok(())
}

async fn unsupported_digest_functions_are_refused(s: Session) -> Verdict {
    let listed = &s.cache()?.digest_functions;
    let blob = s.stored(100).await?;
    // Numbers that are not assigned.
    for number in [99, -1, i32::MAX] {
        number_refused(&s, number, &blob).await?;
    }
    for function in DigestFunction::ALL {
        let number = function.wire() as i32;
        let other = Blob::new(*function, blob.data.clone());
        if !listed.contains(&number) {
            number_refused(&s, number, &other).await?;
        }
        // A hash of another length does not belong to this function, whether it is listed or not.
        if function.hash_bytes() != s.function().hash_bytes() {
            let case = format!("a hash of {} bytes", s.function().hash_bytes());
            s.case(case, number_refused(&s, number, &blob)).await?;
        }
    }
    Ok(())
}

async fn hashes_of_two_functions_in_one_request_are_refused(s: Session) -> Verdict {
    let good = understood(&s).await?;
    let length = if good.hash.len() == 40 { 64 } else { 40 };
    let other = Digest { hash: "a1".repeat(length / 2), size_bytes: 100 };
    for (named, s) in
        [("digest_function set", s.clone()), ("digest_function unset", s.without_function_number())]
    {
        for (order, mixed) in
            [("second", [good.clone(), other.clone()]), ("first", [other.clone(), good.clone()])]
        {
            s.case(format!("{named}, the odd hash {order}"), async {
                s.missing(&mixed).await.refused("FindMissingBlobs of hashes of two lengths", INVALID)?;
                if let Some(answer) = s.batch_read(&mixed, &[]).await.or_refused("the batch", INVALID)? {
                    let refused = |status: &gorego_reapi::proto::rpc::Status| {
                        status.code == Code::InvalidArgument as i32
                    };
                    let some = answer.responses.iter().any(|one| one.status.as_ref().is_some_and(refused));
                    ensure(some, "one of the two is refused in BatchReadBlobs", format!("{answer:?}"))?;
                }
                Ok(())
            })
            .await?;
        }
    }
    Ok(())
}

async fn presence_under_one_function_says_nothing_of_another(s: Session) -> Verdict {
    s.cache()?;
    let others: Vec<_> = s.functions().into_iter().filter(|other| *other != s.function()).collect();
    if others.is_empty() {
        return Err(absent("the server lists one digest function only"));
    }
    let blob = s.stored(2000).await?;
    for function in others {
        s.case(function.name(), async {
            let s = s.with_function(function);
            let other = Blob::new(function, blob.data.clone());
            let asked = std::slice::from_ref(&other.digest);
            let missing = s.missing(asked).await.needs("CAS-01", "FindMissingBlobs answers")?;
            if missing.is_empty() {
                let what = format!("what is present under {} can be read so", function.name());
                let resource_name = s.read_name(&other.digest);
                let request = ReadRequest { resource_name, ..Default::default() };
                drop(s.byte_stream().read(request).await.wanted(&what)?);
                let read = s.read(&other.digest).await.wanted(&what)?;
                ensure(read == blob.data, what, "other bytes")?;
            }
            Ok(())
        })
        .await?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn legacy_functions_win_over_new_ones_of_the_same_length() {
        let all = DigestFunction::ALL;
        assert!(is_implied_by_length(DigestFunction::Sha256, all));
        assert!(is_implied_by_length(DigestFunction::Sha1, all));
        assert!(!is_implied_by_length(DigestFunction::Blake3, all));
        assert!(is_implied_by_length(
            DigestFunction::Blake3,
            &[DigestFunction::Blake3, DigestFunction::Sha1]
        ));
    }
}
