//! Inlined contents of results: stdout, stderr and output files, if the client asks for them and they fit.
//!
//! A client gets contents only if it asks for them, no matter who stored the result (AC-05), and in addition to their
//! digest (AC-06). Contents that do not fit into one message are left out, but never the result itself (AC-07). So are
//! contents for clients that may not read blobs: a client may upload a result that names any blob.

use crate::{
    access::permission::Permission,
    actors::{
        cas::{client::Cas, results::RESULT_MAX_BYTES},
        scheduler::operation::Inline,
    },
    call::Call,
    instance::Instance,
    result::SharedResult,
};
use bytes::Bytes;
use gorego_reapi::{
    digest::{Digest, DigestFunction},
    error::Result,
    proto::reapi,
};
use prost::Message as _;
use std::collections::HashSet;

/// Largest message that clients with default settings accept (GEN-25).
pub(crate) const MESSAGE_MAX_BYTES: usize = 4 * 1024 * 1024;
/// Tag and length of one inlined field, and the growth of the lengths around it, rounded up.
const FIELD_BYTES: usize = 16;

/// Size of an operation without its result, rounded up.
const ENVELOPE_BYTES: usize = 4 * 1024;

/// A field of a result that can have inlined contents.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum InlinedField {
    Stdout,
    Stderr,
    File(usize),
}

/// Prepares a result for a client. `function` is the digest function of its digests. The result is copied only once the
/// connection of `call` has room for it.
///
/// # Errors
/// `Exhausted` when there is no room for too long.
pub(crate) async fn prepare(
    cas: &Cas,
    instance: &Instance,
    function: DigestFunction,
    want: &Inline,
    result: &SharedResult,
    call: &Call,
) -> Result<reapi::ActionResult> {
    let nothing = Inline::default();
    let may_read = *want != nothing && call.principal().may(instance.name(), Permission::CasRead);
    let want = if may_read { want } else { &nothing };
    let (slots, digests): (Vec<_>, Vec<_>) =
        plan(want, result, function, RESULT_MAX_BYTES).into_iter().unzip();
    let contents = digests.iter().map(|digest| digest.size() as usize + FIELD_BYTES).sum::<usize>();
    call.reserve(answer_bytes(result) + contents).await?;
    // Inlining is optional: the client can read the blobs.
    let contents = if slots.is_empty() {
        Vec::new()
    } else {
        cas.read_many(instance, digests).await.unwrap_or_default()
    };
    let mut copy = strip(reapi::ActionResult::clone(result));
    fill(&mut copy, &slots, contents);
    Ok(copy)
}

/// Room for an answer with this result: for its copy, or for its encoding where that is longer. An operation repeats
/// the metadata.
fn answer_bytes(result: &SharedResult) -> usize {
    let metadata = result.execution_metadata.as_ref().map_or(0, reapi::ExecutedActionMetadata::encoded_len);
    result.memory().max(result.encoded_len() + metadata) + ENVELOPE_BYTES
}

/// Removes contents that also have a digest.
fn strip(mut result: reapi::ActionResult) -> reapi::ActionResult {
    if result.stdout_digest.is_some() {
        result.stdout_raw = Bytes::new();
    }
    if result.stderr_digest.is_some() {
        result.stderr_raw = Bytes::new();
    }
    for file in result.output_files.iter_mut().filter(|file| file.digest.is_some()) {
        file.contents = Bytes::new();
    }
    result
}

/// Selects what to inline: the logs first, then the files in the order of the result, each if it still fits.
fn plan(
    want: &Inline,
    result: &reapi::ActionResult,
    function: DigestFunction,
    max_bytes: usize,
) -> Vec<(InlinedField, Digest)> {
    if *want == Inline::default() {
        return Vec::new();
    }
    let files: HashSet<&str> = want.output_files.iter().map(String::as_str).collect();
    let stdout = want.stdout.then_some((InlinedField::Stdout, result.stdout_digest.as_ref()));
    let stderr = want.stderr.then_some((InlinedField::Stderr, result.stderr_digest.as_ref()));
    let wanted =
        result.output_files.iter().enumerate().filter(|(_, file)| files.contains(file.path.as_str()));
    let wanted = wanted.map(|(index, file)| (InlinedField::File(index), file.digest.as_ref()));
    let mut left = max_bytes.saturating_sub(result.encoded_len());
    let mut plan = Vec::new();
    for (slot, digest) in stdout.into_iter().chain(stderr).chain(wanted) {
        let Ok(digest) = Digest::from_wire(function, digest, "digest") else { continue };
        let cost = usize::try_from(digest.size()).ok().and_then(|size| size.checked_add(FIELD_BYTES));
        let Some(rest) = cost.and_then(|cost| left.checked_sub(cost)) else { continue };
        if digest.size() > 0 {
            left = rest;
            plan.push((slot, digest));
        }
    }
    plan
}

/// Inserts contents. A blob that could not be read is left out.
fn fill(result: &mut reapi::ActionResult, slots: &[InlinedField], contents: Vec<Result<Bytes>>) {
    for (slot, contents) in slots.iter().zip(contents) {
        let Ok(contents) = contents else { continue };
        match slot {
            InlinedField::Stdout => result.stdout_raw = contents,
            InlinedField::Stderr => result.stderr_raw = contents,
            InlinedField::File(index) => {
                if let Some(file) = result.output_files.get_mut(*index) {
                    file.contents = contents;
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use gorego_reapi::error::Error;
    use proptest::prelude::*;

    const SHA256: DigestFunction = DigestFunction::Sha256;

    fn digest(size: i64) -> Option<reapi::Digest> {
        Some(reapi::Digest { hash: format!("{size:064x}"), size_bytes: size })
    }

    fn result(stdout: i64, stderr: i64, files: &[i64]) -> reapi::ActionResult {
        let file = |(index, size): (usize, &i64)| reapi::OutputFile {
            path: format!("f{index}"),
            digest: digest(*size),
            ..Default::default()
        };
        reapi::ActionResult {
            stdout_digest: digest(stdout),
            stderr_digest: digest(stderr),
            output_files: files.iter().enumerate().map(file).collect(),
            ..Default::default()
        }
    }

    fn everything() -> Inline {
        Inline {
            stdout: true,
            stderr: true,
            output_files: (0..50).map(|index| format!("f{index}")).collect(),
        }
    }

    /// AC-05.
    #[test]
    fn contents_that_were_not_asked_for_are_removed_from_results_of_clients_and_workers() {
        let mut stored = result(3, 3, &[3]);
        stored.stdout_raw = Bytes::from_static(b"out");
        stored.stderr_raw = Bytes::from_static(b"err");
        stored.output_files[0].contents = Bytes::from_static(b"abc");
        let stripped = strip(stored);
        assert_eq!(stripped, result(3, 3, &[3]));
        assert!(plan(&Inline::default(), &stripped, SHA256, RESULT_MAX_BYTES).is_empty());
    }

    /// AC-07: unknown paths, empty blobs and digests that are not set do no harm.
    #[test]
    fn only_what_was_asked_for_and_exists_is_read() {
        let want = Inline { output_files: vec!["f1".into(), "nope".into()], ..Inline::default() };
        let slots: Vec<_> =
            plan(&want, &result(5, 5, &[5, 6]), SHA256, RESULT_MAX_BYTES).into_iter().collect();
        assert_eq!(slots.len(), 1);
        assert_eq!((slots[0].0, slots[0].1.size()), (InlinedField::File(1), 6));
        assert!(plan(&everything(), &result(0, 0, &[0]), SHA256, RESULT_MAX_BYTES).is_empty());
        assert!(plan(&everything(), &reapi::ActionResult::default(), SHA256, RESULT_MAX_BYTES).is_empty());
    }

    /// AC-06.
    #[test]
    fn a_blob_that_cannot_be_read_leaves_its_place_empty() {
        let mut filled = result(3, 3, &[3]);
        let contents = vec![
            Ok(Bytes::from_static(b"out")),
            Err(Error::NotFound("gone".into())),
            Ok(Bytes::from_static(b"abc")),
        ];
        fill(&mut filled, &[InlinedField::Stdout, InlinedField::Stderr, InlinedField::File(0)], contents);
        assert_eq!(&filled.stdout_raw[..], b"out");
        assert!(filled.stderr_raw.is_empty());
        assert_eq!(&filled.output_files[0].contents[..], b"abc");
    }

    proptest! {
        /// AC-07, GEN-25.
        #[test]
        fn a_result_never_outgrows_its_budget(
            stdout in 0i64..3000, stderr in 0i64..3000, files in proptest::collection::vec(0i64..3000, 0..20),
            budget in 0usize..20_000,
        ) {
            let mut filled = result(stdout, stderr, &files);
            let bare = filled.encoded_len();
            let (slots, digests): (Vec<_>, Vec<_>) = plan(&everything(), &filled, SHA256, budget).into_iter().unzip();
            let contents = digests.iter().map(|d| Ok(Bytes::from(vec![0; d.size() as usize]))).collect();
            fill(&mut filled, &slots, contents);
            prop_assert!(filled.encoded_len() <= budget.max(bare));
        }
    }
}
