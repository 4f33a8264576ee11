//! AC-05 to AC-07: inlined bytes in results.

use crate::{
    blob::Blob,
    check::{Answer as _, Check, Verdict, ensure, equal, fail},
    checks,
    session::Session,
};
use gorego_reapi::proto::reapi::{ActionResult, Digest, GetActionResultRequest, OutputFile};

pub(crate) const CHECKS: &[Check] = checks![
    nothing_is_inlined_unasked => "AC-05";
    raw_logs_are_handed_out_by_digest => "AC-05", "AC-06";
    what_is_inlined_on_request_is_the_blob => "AC-06";
    no_digest_is_a_zero_valued_message => "AC-06";
    inlining_gives_way_to_the_size_of_the_message => "AC-07", "GEN-25";
    unknown_paths_to_inline_are_ignored => "AC-07";
];

/// Stores a result with this stdout, stderr and output file `out`. Returns its action.
async fn recorded(s: &Session, stdout: &Blob, stderr: &Blob, output: &Blob) -> Verdict<Digest> {
    s.updates_results()?;
    s.store(&[stdout, stderr, output]).await?;
    let file = OutputFile { path: "out".into(), digest: Some(output.digest.clone()), ..Default::default() };
    let result = ActionResult {
        output_files: vec![file],
        stdout_digest: Some(stdout.digest.clone()),
        stderr_digest: Some(stderr.digest.clone()),
        ..Default::default()
    };
    let action = s.fresh_action().await?;
    s.update_result(&action, result).await.needs("AC-08", "the result is stored")?;
    Ok(action)
}

fn all_inline(s: &Session, action: &Digest) -> GetActionResultRequest {
    GetActionResultRequest {
        inline_stdout: true,
        inline_stderr: true,
        inline_output_files: vec!["out".into()],
        ..s.result_of(action)
    }
}

/// Checks that inlined bytes match the digest next to them, and that this digest can be read.
async fn agree(s: &Session, what: &str, raw: &[u8], digest: Option<&Digest>, blob: &Blob) -> Verdict {
    let digest = digest.ok_or_else(|| fail(format!("a digest of {what}"), "none"))?;
    equal(&format!("the digest of {what}"), digest, &blob.digest)?;
    ensure(raw.is_empty() || blob.data == raw, format!("{what}: the bytes of its digest"), "other bytes")?;
    let read = s.read(digest).await.wanted(&format!("{what} is read by its digest"))?;
    ensure(read == blob.data, format!("{what}: its bytes"), "others")
}

async fn nothing_is_inlined_unasked(s: Session) -> Verdict {
    let (stdout, stderr, output) = (s.blob(100), s.blob(100), s.blob(100));
    let action = recorded(&s, &stdout, &stderr, &output).await?;
    let hit = s.result(&action).await.needs("AC-08", "the result is a hit")?;
    let raw = hit.stdout_raw.len() + hit.stderr_raw.len();
    let contents: usize = hit.output_files.iter().map(|file| file.contents.len()).sum();
    equal("inlined bytes", &(raw, contents), &(0, 0))?;
    agree(&s, "stdout", b"", hit.stdout_digest.as_ref(), &stdout).await?;
    agree(&s, "stderr", b"", hit.stderr_digest.as_ref(), &stderr).await
}

async fn raw_logs_are_handed_out_by_digest(s: Session) -> Verdict {
    s.updates_results()?;
    let (stdout, stderr) = (s.blob(100), s.blob(100));
    let action = s.fresh_action().await?;
    let result = ActionResult {
        stdout_raw: stdout.data.clone(),
        stderr_raw: stderr.data.clone(),
        ..s.a_result().await?
    };
    s.update_result(&action, result).await.wanted("a result with raw logs is stored")?;
    let hit = s.result(&action).await.needs("AC-08", "the result is a hit")?;
    equal("inlined bytes", &(hit.stdout_raw.len(), hit.stderr_raw.len()), &(0, 0))?;
    agree(&s, "stdout", b"", hit.stdout_digest.as_ref(), &stdout).await?;
    agree(&s, "stderr", b"", hit.stderr_digest.as_ref(), &stderr).await?;
    let hit = s.result_request(all_inline(&s, &action)).await.wanted("the result is a hit")?;
    ensure(hit.stdout_raw.is_empty() || hit.stdout_raw == stdout.data, "stdout as it was sent", "other bytes")
}

async fn what_is_inlined_on_request_is_the_blob(s: Session) -> Verdict {
    let (stdout, stderr, output) = (s.blob(100), s.blob(200), s.blob(300));
    let action = recorded(&s, &stdout, &stderr, &output).await?;
    let hit = s.result_request(all_inline(&s, &action)).await.wanted("the result is a hit")?;
    agree(&s, "stdout", &hit.stdout_raw, hit.stdout_digest.as_ref(), &stdout).await?;
    agree(&s, "stderr", &hit.stderr_raw, hit.stderr_digest.as_ref(), &stderr).await?;
    let file = hit.output_files.first().ok_or_else(|| fail("an output file", "none"))?;
    agree(&s, "the output file", &file.contents, file.digest.as_ref(), &output).await
}

async fn no_digest_is_a_zero_valued_message(s: Session) -> Verdict {
    s.updates_results()?;
    let action = s.fresh_action().await?;
    s.update_result(&action, s.a_result().await?).await.needs("AC-08", "a result without logs is stored")?;
    let hit = s.result_request(all_inline(&s, &action)).await.wanted("the result is a hit")?;
    let files = hit.output_files.iter().map(|file| (file.path.as_str(), &file.digest));
    for (what, digest) in files.chain([("stdout", &hit.stdout_digest), ("stderr", &hit.stderr_digest)]) {
        let hashed = digest.as_ref().is_none_or(|digest| !digest.hash.is_empty());
        ensure(hashed, format!("{what}: a digest with a hash, or none"), "a digest without a hash")?;
    }
    Ok(())
}

async fn inlining_gives_way_to_the_size_of_the_message(s: Session) -> Verdict {
    // Each fits alone, but not all together: the connection refuses messages above 4 MiB.
    let (stdout, stderr, output) = (s.blob(3_000_000), s.blob(3_000_000), s.blob(5_000_000));
    let action = recorded(&s, &stdout, &stderr, &output).await?;
    let hit = s.result_request(all_inline(&s, &action)).await;
    let hit = hit.wanted("a result with 11 MB to inline is a hit, in a message of default size")?;
    agree(&s, "stdout", &hit.stdout_raw, hit.stdout_digest.as_ref(), &stdout).await?;
    agree(&s, "stderr", &hit.stderr_raw, hit.stderr_digest.as_ref(), &stderr).await
}

async fn unknown_paths_to_inline_are_ignored(s: Session) -> Verdict {
    let (stdout, stderr, output) = (s.blob(100), s.blob(100), s.blob(100));
    let action = recorded(&s, &stdout, &stderr, &output).await?;
    let mut request = all_inline(&s, &action);
    request.inline_output_files = vec!["no/such/file".into(), "out".into(), "../x".into()];
    let hit = s.result_request(request).await.wanted("the result is a hit although paths are unknown")?;
    let file = hit.output_files.first().ok_or_else(|| fail("an output file", "none"))?;
    agree(&s, "the output file", &file.contents, file.digest.as_ref(), &output).await
}
