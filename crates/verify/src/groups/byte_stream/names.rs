//! BS-01 to BS-06: resource names.

use crate::{
    blob::Blob,
    check::{Answer as _, Check, Verdict, absent, ensure, equal},
    checks,
    session::Session,
    store::pieces,
};
use gorego_reapi::digest::DigestFunction;
use tonic::Code;

pub(crate) const CHECKS: &[Check] = checks![
    write_names_may_go_on_after_the_size => "BS-02";
    functions_with_a_segment_are_read_and_written_with_it => "BS-03";
    unknown_and_upper_case_functions_are_refused => "BS-03";
    an_unknown_compressor_is_no_missing_blob => "BS-04";
    malformed_names_are_refused_by_read => "BS-05";
    malformed_names_are_refused_by_write => "BS-05";
    malformed_names_are_refused_by_query_write_status => "BS-05";
    two_uploads_may_share_a_uuid => "BS-06";
];

const INVALID: &[Code] = &[Code::InvalidArgument];

async fn write_names_may_go_on_after_the_size(s: Session) -> Verdict {
    for rest in ["some/path/123/x.o", "x", "uploads/blobs/7"] {
        s.case(format!("an upload to .../hash/size/{rest}"), async {
            let blob = s.blob(1000);
            let name = format!("{}/{rest}", s.write_name(&blob));
            let committed = s.write_messages(pieces(&name, &blob.data, 0, 300)).await;
            let committed = committed.wanted("it is accepted")?;
            equal("committed_size", &committed, &1000)?;
            let read = s.read(&blob.digest).await.needs("BS-07", "the blob is read")?;
            ensure(read == blob.data, "its bytes", "others")
        })
        .await?;
    }
    Ok(())
}

/// The digest functions of the server that have a segment in names.
fn with_segment(s: &Session) -> Verdict<Vec<DigestFunction>> {
    s.cache()?;
    let mut functions = s.functions();
    functions.retain(|function| function.resource_segment().is_some());
    let none = functions.is_empty();
    if none { Err(absent("the server lists no function that has a segment in names")) } else { Ok(functions) }
}

async fn functions_with_a_segment_are_read_and_written_with_it(s: Session) -> Verdict {
    for function in with_segment(&s)? {
        s.case(function.name(), async {
            let s = s.with_function(function);
            let blob = s.blob(3000);
            let what = format!("an upload to {} is accepted", blob.name());
            equal("committed_size", &s.write(&blob).await.wanted(&what)?, &3000)?;
            let read = s.read(&blob.digest).await.wanted(&format!("{} is read", blob.name()))?;
            ensure(read == blob.data, "its bytes", "others")?;
            // Without the segment, the hash belongs to the legacy function with this length. If the server has none, it
            // may infer the only function that matches, as in requests (GEN-08); buck2 never writes the segment.
            let rival = |other: &DigestFunction| {
                other.resource_segment().is_none() && other.hash_bytes() == function.hash_bytes()
            };
            if !s.functions().iter().any(rival) {
                return Ok(());
            }
            let bare = s.qualify(&format!("blobs/{}/{}", blob.digest.hash, blob.digest.size_bytes));
            let codes = [Code::NotFound, Code::InvalidArgument];
            s.read_named(&bare).await.refused("Read of it without the segment", &codes)?;
            Ok(())
        })
        .await?;
    }
    Ok(())
}

async fn unknown_and_upper_case_functions_are_refused(s: Session) -> Verdict {
    let blob = s.stored(100).await?;
    s.read(&blob.digest).await.needs("BS-07", "the blob is read")?;
    let tail = format!("{}/{}", blob.digest.hash, blob.digest.size_bytes);
    for segment in ["BLAKE3", "Sha256Tree", "whirlpool", "unknown", "9"] {
        let name = s.qualify(&format!("blobs/{segment}/{tail}"));
        s.read_named(&name).await.refused(&format!("Read of blobs/{segment}/hash/size"), INVALID)?;
        let name = s.qualify(&format!("uploads/{}/blobs/{segment}/{tail}", uuid::Uuid::new_v4()));
        let answer = s.write_messages(pieces(&name, &blob.data, 0, 100)).await;
        answer.refused(&format!("Write to blobs/{segment}/hash/size"), INVALID)?;
    }
    Ok(())
}

async fn an_unknown_compressor_is_no_missing_blob(s: Session) -> Verdict {
    let (stored, missing) = (s.stored(100).await?, s.blob(100));
    s.read(&stored.digest).await.needs("BS-07", "the blob is read")?;
    s.read(&missing.digest).await.refused("Read of an unknown blob", &[Code::NotFound])?;
    for compressor in ["identity", "lz4", "ZSTD", ""] {
        for (what, blob) in [("a stored blob", &stored), ("an unknown blob", &missing)] {
            s.case(what, async {
                let name = s.qualify(&blob.compressed_name(compressor));
                let codes = [Code::InvalidArgument, Code::Unimplemented];
                s.read_named(&name)
                    .await
                    .refused(&format!("Read with the compressor \"{compressor}\""), &codes)?;
                Ok(())
            })
            .await?;
        }
    }
    Ok(())
}

/// Names that are invalid for Read and, below `uploads/{uuid}/`, for the other two calls; each with a description.
fn invalid_suffixes(blob: &Blob) -> Vec<(&'static str, String)> {
    let (name, hash, size) = (blob.name(), &blob.digest.hash, blob.digest.size_bytes);
    let stem = name.trim_end_matches(&format!("/{size}")).to_owned();
    vec![
        ("no size", stem.clone()),
        ("an empty size", format!("{stem}/")),
        ("a size that is not a number", format!("{stem}/many")),
        ("a negative size", format!("{stem}/-1")),
        ("a size with a sign", format!("{stem}/+{size}")),
        ("a size in hexadecimal", format!("{stem}/0x10")),
        ("a size beyond 63 bits", format!("{stem}/9223372036854775808")),
        ("no keyword", format!("{hash}/{size}")),
        ("another keyword", format!("blob/{hash}/{size}")),
        ("an upper-case keyword", format!("BLOBS/{hash}/{size}")),
        ("no hash", "blobs/".into()),
        ("an empty hash", format!("blobs//{size}")),
        ("a short hash", format!("blobs/{}/{size}", hash.get(1..).unwrap_or_default())),
        ("size before hash", format!("blobs/{size}/{hash}")),
    ]
}

async fn malformed_names_are_refused_by_read(s: Session) -> Verdict {
    let blob = s.stored(100).await?;
    s.read(&blob.digest).await.needs("BS-07", "the blob is read by its good name")?;
    let mut names = invalid_suffixes(&blob);
    names.push(("segments after the size", format!("{}/x", blob.name())));
    names.push(("the name of an upload", format!("uploads/{}/{}", uuid::Uuid::new_v4(), blob.name())));
    for (what, tail) in names {
        let answer = s.read_named(&s.qualify(&tail)).await;
        answer.refused(&format!("Read of a name with {what} ({tail})"), INVALID)?;
    }
    s.read_named("").await.refused("Read of the empty name", INVALID)?;
    Ok(())
}

/// Names that Write and QueryWriteStatus must refuse.
fn bad_write_names(s: &Session, blob: &Blob) -> Vec<(&'static str, String)> {
    let uuid = uuid::Uuid::new_v4();
    let tails = invalid_suffixes(blob).into_iter();
    let mut names: Vec<_> = tails.map(|(what, tail)| (what, format!("uploads/{uuid}/{tail}"))).collect();
    names.push(("no uploads", blob.name()));
    names.push(("no uuid", format!("uploads/{}", blob.name())));
    names.push(("nothing after the uuid", format!("uploads/{uuid}")));
    for (_, name) in &mut names {
        *name = s.qualify(name);
    }
    names.push(("nothing in it", String::new()));
    names
}

async fn malformed_names_are_refused_by_write(s: Session) -> Verdict {
    let blob = s.blob(100);
    s.write(&s.blob(100)).await.needs("BS-23", "an upload to a good name is accepted")?;
    for (what, name) in bad_write_names(&s, &blob) {
        let answer = s.write_messages(pieces(&name, &blob.data, 0, 100)).await;
        answer.refused(&format!("Write to a name with {what} ({name})"), INVALID)?;
    }
    let missing =
        s.missing(std::slice::from_ref(&blob.digest)).await.needs("CAS-01", "FindMissingBlobs answers")?;
    equal("missing_blob_digests", &missing, &vec![blob.digest])
}

async fn malformed_names_are_refused_by_query_write_status(s: Session) -> Verdict {
    let blob = s.stored(100).await?;
    s.query(&s.write_name(&blob)).await.offered("QueryWriteStatus of a good name answers")?;
    for (what, name) in bad_write_names(&s, &blob) {
        s.query(&name).await.refused(&format!("QueryWriteStatus of a name with {what} ({name})"), INVALID)?;
    }
    Ok(())
}

async fn two_uploads_may_share_a_uuid(s: Session) -> Verdict {
    let uuid = uuid::Uuid::new_v4();
    let blobs = [s.blob(1000), s.blob(1200)];
    let mut uploads = Vec::new();
    for blob in &blobs {
        let name = s.qualify(&format!("uploads/{uuid}/{}", blob.name()));
        let (send, messages) = tokio::sync::mpsc::channel(1);
        let s = s.clone();
        s.count_written(blob.data.len());
        let stream = tokio_stream::wrappers::ReceiverStream::new(messages);
        let upload = tokio::spawn(async move { s.byte_stream().write(stream).await });
        uploads.push((send, pieces(&name, &blob.data, 0, 400).into_iter(), upload));
    }
    // The messages of both uploads alternate.
    for _ in 0..3 {
        for (send, messages, _) in &mut uploads {
            if let Some(message) = messages.next() {
                // If a server ends the call early, its response says why.
                let _ = send.send(message).await;
            }
        }
    }
    for ((send, _, upload), blob) in uploads.into_iter().zip(&blobs) {
        s.case(format!("the upload of {} bytes", blob.digest.size_bytes), async {
            drop(send);
            let answer = upload.await.map_err(|error| crate::check::fail("an answer", error))?;
            let committed = answer.wanted("it is accepted")?.into_inner().committed_size;
            equal("committed_size", &committed, &blob.digest.size_bytes)?;
            let read = s.read(&blob.digest).await.needs("BS-07", "it is read")?;
            ensure(read == blob.data, "its bytes", "others")
        })
        .await?;
    }
    Ok(())
}
