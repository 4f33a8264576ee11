//! LOG: log streams, which can be read while they are written.

use super::{Beyond, execution::stream::unknown_name_like};
use crate::{
    check::{Answer as _, Check, Step as _, Stop, Verdict, absent, ensure, equal, fail, show, skipped},
    checks,
    job::Job,
    session::Session,
};
use bytes::Bytes;
use gorego_reapi::proto::{
    bytestream::WriteRequest,
    logstream::{CreateLogStreamRequest, LogStream},
};
use std::{collections::BTreeSet, time::Duration};
use tonic::{Code, Status};

pub(super) const CHECKS: &[Check] = checks![
    streams_have_a_name_to_read_and_a_secret_one_to_write => "LOG-01";
    streams_without_a_known_parent_are_refused => "LOG-01";
    each_name_serves_one_purpose => "LOG-02";
    readers_follow_a_stream_to_its_end => "LOG-03";
    what_was_written_stays_as_it_is => "LOG-04";
    a_stream_is_written_in_several_calls => "LOG-05";
];

/// Rules that cannot be checked over the wire.
pub(super) const BEYOND: &[Beyond] = &[];

/// Number of base64 characters for 128 bits.
const TOKEN_LETTERS: usize = 22;
/// Time limit for a reader to receive written bytes, or the end.
const PROMPT: Duration = Duration::from_secs(5);

async fn create(s: &Session, parent: &str) -> Result<LogStream, Status> {
    let request = CreateLogStreamRequest { parent: parent.to_owned() };
    Ok(s.log_streams().create_log_stream(request).await?.into_inner())
}

/// A parent that the server accepts: the instance, or an operation of this run.
async fn parent(s: &Session) -> Verdict<String> {
    let mut candidates = vec![s.instance()];
    // Not every server accepts the empty name.
    if s.instance().is_empty()
        && let Ok(operation) = operation(s).await
    {
        candidates.push(operation);
    }
    let mut refusal = String::from("there is no name to try");
    for parent in candidates {
        match create(s, &parent).await {
            Ok(_) => return Ok(parent),
            Err(status) if status.code() == Code::Unimplemented => {
                return Err(absent(format!("CreateLogStream answers {}", show(&status))));
            }
            Err(status) if status.code() == Code::InvalidArgument => refusal = show(&status),
            Err(status) => return Err(fail("CreateLogStream is accepted", show(&status))),
        }
    }
    Err(skipped(format!("no parent is known that the server takes: {refusal}")))
}

/// The name of an operation of this run.
async fn operation(s: &Session) -> Verdict<String> {
    let messages = Job::sh(s, "exit 0").story().await.control()?;
    let name = messages.first().map(|operation| operation.name.clone());
    name.ok_or_else(|| fail("an operation", "an empty stream"))
}

/// The prefix of the names of a parent's streams.
fn below(parent: &str) -> String {
    if parent.is_empty() { "logstreams/".into() } else { format!("{parent}/logstreams/") }
}

async fn stream(s: &Session) -> Verdict<LogStream> {
    create(s, &parent(s).await?).await.needs("LOG-01", "CreateLogStream is accepted")
}

/// Makes one Write call and returns the `committed_size`.
async fn write(s: &Session, name: &str, offset: usize, data: &str, finish: bool) -> Result<i64, Status> {
    let message = WriteRequest {
        resource_name: name.to_owned(),
        write_offset: i64::try_from(offset).unwrap_or(i64::MAX),
        finish_write: finish,
        data: Bytes::copy_from_slice(data.as_bytes()),
    };
    s.write_messages(vec![message]).await
}

/// Reads a stream from an offset to the end.
async fn read(s: &Session, name: &str, offset: i64) -> Verdict<String> {
    let pieces = tokio::time::timeout(2 * PROMPT, s.read_pieces(name, offset, 0)).await;
    let pieces = pieces.map_err(|_| fail("an end of the reader's stream with the log's", "it stays open"))?;
    let bytes = pieces.wanted("a log stream can be read")?.concat();
    Ok(String::from_utf8_lossy(&bytes).into_owned())
}

async fn streams_have_a_name_to_read_and_a_secret_one_to_write(s: Session) -> Verdict {
    const STREAMS: usize = 32;
    let parent = parent(&s).await?;
    let (mut names, mut secrets) = (BTreeSet::new(), BTreeSet::new());
    for at in 0..STREAMS {
        s.case(format!("stream {at} of {STREAMS}"), async {
            let stream = create(&s, &parent).await.wanted("CreateLogStream is accepted")?;
            let prefix = below(&parent);
            let id = stream.name.strip_prefix(&prefix).unwrap_or_default();
            let well_formed = !id.is_empty() && !id.contains('/');
            ensure(well_formed, format!("a name {prefix}{{id}}"), &stream.name)?;
            let token =
                stream.write_resource_name.strip_prefix(&format!("{}/", stream.name)).unwrap_or_default();
            let distinct: BTreeSet<_> = token.chars().collect();
            let unguessable = token.len() >= TOKEN_LETTERS && distinct.len() > 4;
            let what = "a write_resource_name of the name and a token of 128 bits";
            ensure(unguessable, what, &stream.write_resource_name)?;
            names.insert(stream.name.clone());
            secrets.insert(token.to_owned());
            Ok(())
        })
        .await?;
    }
    equal("distinct names and tokens", &(names.len(), secrets.len()), &(STREAMS, STREAMS))
}

async fn streams_without_a_known_parent_are_refused(s: Session) -> Verdict {
    stream(&s).await?;
    // The API does not define the valid parents: the empty instance name may or may not exist.
    match create(&s, "").await {
        Ok(stream) => {
            let named = stream.name.starts_with(&below(""));
            ensure(named, "a name logstreams/{id} below an empty parent", &stream.name)?;
        }
        refusal => refusal.refused("an empty parent", &[Code::InvalidArgument]).map(drop)?,
    }
    // Any name may be an instance, but an operation is either known or unknown.
    let unknown = unknown_name_like(&operation(&s).await?);
    create(&s, &unknown).await.refused("an unknown parent", &[Code::InvalidArgument]).map(drop)
}

async fn each_name_serves_one_purpose(s: Session) -> Verdict {
    let stream = stream(&s).await?;
    write(&s, &stream.write_resource_name, 0, "x", true)
        .await
        .needs("LOG-03", "a log stream can be written")?;
    equal("the log", &read(&s, &stream.name, 0).await?.as_str(), &"x")?;
    let refused = &[Code::InvalidArgument];
    let read = s.read_named(&stream.write_resource_name).await;
    read.refused("Read of a write_resource_name", refused)?;
    write(&s, &stream.name, 0, "x", false).await.refused("Write to a name", refused).map(drop)
}

async fn readers_follow_a_stream_to_its_end(s: Session) -> Verdict {
    let stream = stream(&s).await?;
    let (name, target) = (stream.name.as_str(), stream.write_resource_name.as_str());
    // The pauses let the readers see each write by itself. The verdict does not depend on them.
    let pause = async || tokio::time::sleep(Duration::from_millis(400)).await;
    let writer = async {
        pause().await;
        write(&s, target, 0, "first ", false).await.wanted("a log stream can be written")?;
        pause().await;
        write(&s, target, 6, "second ", false).await.wanted("a log stream can be written")?;
        pause().await;
        write(&s, target, 13, "third", true).await.wanted("a log stream can be finished")?;
        Ok::<_, Stop>(())
    };
    let joining_between = async {
        tokio::time::sleep(Duration::from_millis(600)).await;
        read(&s, name, 3).await
    };
    let (before, between, ()) = tokio::try_join!(read(&s, name, 0), joining_between, writer)?;
    equal("a reader that came before", &before.as_str(), &"first second third")?;
    equal("a reader that came between, from byte 3", &between.as_str(), &"st second third")?;
    equal("a reader that came after", &read(&s, name, 0).await?.as_str(), &"first second third")
}

async fn what_was_written_stays_as_it_is(s: Session) -> Verdict {
    let stream = stream(&s).await?;
    let target = stream.write_resource_name.as_str();
    write(&s, target, 0, "0123456789", false).await.needs("LOG-05", "a log stream can be written")?;
    let refused = &[Code::InvalidArgument, Code::FailedPrecondition];
    let overwritten = write(&s, target, 0, "abcdefghij", false).await;
    overwritten.refused("a Write at offset 0 of a stream of 10 bytes", refused)?;
    write(&s, target, 10, "", true).await.wanted("a log stream can be finished")?;
    write(&s, target, 10, "more", false).await.refused("a Write to a finished stream", refused)?;
    equal("the log", &read(&s, &stream.name, 0).await?.as_str(), &"0123456789")
}

async fn a_stream_is_written_in_several_calls(s: Session) -> Verdict {
    let stream = stream(&s).await?;
    let mut committed = Vec::new();
    for offset in [0, 10, 20] {
        s.case(format!("offset {offset}"), async {
            let answer = write(&s, &stream.write_resource_name, offset, "0123456789", false).await;
            committed.push(answer.wanted("a Write without finish_write is OK")?);
            Ok(())
        })
        .await?;
    }
    equal("committed sizes", &committed, &vec![10, 20, 30])?;
    let end = write(&s, &stream.write_resource_name, 30, "", true).await;
    equal("the last committed size", &end.wanted("a log stream can be finished")?, &30)?;
    equal("bytes of the log", &read(&s, &stream.name, 0).await?.len(), &30)
}
