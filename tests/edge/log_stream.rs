//! Client log streams over the wire: CreateLogStream, and ByteStream calls with their names.

use crate::harness::Server;
use gorego_client::stubs::LogStreamServiceClient;
use gorego_reapi::proto::{
    bytestream::{QueryWriteStatusRequest, ReadRequest, WriteRequest},
    logstream::{CreateLogStreamRequest, LogStream},
    reapi::ExecuteRequest,
};
use std::collections::HashSet;
use tonic::{Code, Status};
use uuid::Uuid;

const PARENT: &str = "a/b/c";

async fn create(server: &Server, parent: &str) -> Result<LogStream, Status> {
    let request = CreateLogStreamRequest { parent: parent.into() };
    let mut client = LogStreamServiceClient::new(server.channel.clone());
    client.create_log_stream(request).await.map(tonic::Response::into_inner)
}

fn message(name: &str, offset: i64, data: &str, finish_write: bool) -> WriteRequest {
    let data = data.to_owned().into();
    WriteRequest { resource_name: name.into(), write_offset: offset, finish_write, data }
}

async fn write(server: &Server, messages: Vec<WriteRequest>) -> Result<i64, Status> {
    let answer = server.bytes.clone().write(futures::stream::iter(messages)).await;
    answer.map(|answer| answer.into_inner().committed_size)
}

async fn read(server: &Server, name: &str, read_offset: i64, read_limit: i64) -> Result<Vec<u8>, Status> {
    let request = ReadRequest { resource_name: name.into(), read_offset, read_limit };
    let mut stream = server.bytes.clone().read(request).await?.into_inner();
    let mut bytes = Vec::new();
    while let Some(message) = stream.message().await? {
        assert!(!message.data.is_empty(), "BS-15");
        bytes.extend_from_slice(&message.data);
    }
    Ok(bytes)
}

async fn query(server: &Server, name: &str) -> Result<(i64, bool), Status> {
    let request = QueryWriteStatusRequest { resource_name: name.into() };
    let status = server.bytes.clone().query_write_status(request).await?.into_inner();
    Ok((status.committed_size, status.complete))
}

fn code<T: std::fmt::Debug>(answer: Result<T, Status>) -> Code {
    answer.unwrap_err().code()
}

/// LOG-01.
#[tokio::test]
async fn each_stream_has_a_name_below_its_parent_and_a_secret_one_for_writing() {
    let server = Server::start().await;
    let mut tokens = HashSet::new();
    let full = loop {
        let LogStream { name, write_resource_name } = match create(&server, PARENT).await {
            Ok(stream) => stream,
            Err(full) => break full,
        };
        let id = name.strip_prefix("a/b/c/logstreams/").unwrap();
        assert!(!id.is_empty() && !id.contains('/'));
        let token = write_resource_name.strip_prefix(&format!("{name}/")).unwrap();
        assert!(token.len() >= 32 && !token.contains('/'), "128 bits take 32 hexadecimal digits");
        assert!(tokens.insert(token.to_owned()), "it is a new one");
    };
    assert!(
        (30..45).contains(&tokens.len()),
        "a connection may have most of the 45 streams: {}",
        tokens.len()
    );
    assert_eq!(full.code(), Code::ResourceExhausted, "GEN-21: {full}");
}

/// LOG-01, GEN-14.
#[tokio::test]
async fn a_parent_is_an_instance_or_an_operation_that_is_known() {
    let server = Server::start().await;
    let unknown = format!("operations/{}", Uuid::new_v4());
    for parent in ["nope", "a/b", "a/b/c//", "operations", "a/b/c/operations/1", &unknown] {
        assert_eq!(code(create(&server, parent).await), Code::InvalidArgument, "{parent:?}");
    }
    // The empty name is the default instance, as in the requests of BuildBox's outputstreamer and BuildGrid's bgd.
    let stream = create(&server, "").await.unwrap();
    assert!(stream.name.starts_with("logstreams/"), "{}", stream.name);
    assert_eq!(write(&server, vec![message(&stream.write_resource_name, 0, "xy", true)]).await.unwrap(), 2);
    assert_eq!(read(&server, &stream.name, 0, 0).await.unwrap(), b"xy");
    // `bgd --instance-name` puts a slash before its empty parent.
    let stream = create(&server, "a/b/c/").await.unwrap();
    assert!(stream.name.starts_with("a/b/c/logstreams/"), "{}", stream.name);
    let action = crate::harness::digest(b"an action");
    let request = ExecuteRequest { action_digest: Some(action), ..Default::default() };
    let mut run = server.execution.clone().execute(request).await.unwrap().into_inner();
    let operation = run.message().await.unwrap().unwrap().name;
    let stream = create(&server, &operation).await.unwrap();
    assert!(stream.name.starts_with(&format!("{operation}/logstreams/")));
    assert_eq!(write(&server, vec![message(&stream.write_resource_name, 0, "x", true)]).await.unwrap(), 1);
    assert_eq!(read(&server, &stream.name, 0, 0).await.unwrap(), b"x");
}

/// LOG-01.
#[tokio::test]
async fn where_clients_may_make_no_streams_the_service_says_so() {
    let server = Server::with(false).await;
    // The error is about the service, for every request.
    for parent in [PARENT, "", "nope", "operations/1"] {
        assert_eq!(code(create(&server, parent).await), Code::Unimplemented, "{parent:?}");
    }
}

/// LOG-02, GEN-15.
#[tokio::test]
async fn a_name_is_for_reading_and_a_write_name_for_writing() {
    let server = Server::start().await;
    let LogStream { name, write_resource_name: secret } = create(&server, PARENT).await.unwrap();
    assert_eq!(code(read(&server, &secret, 0, 0).await), Code::InvalidArgument);
    assert_eq!(code(write(&server, vec![message(&name, 0, "x", true)]).await), Code::InvalidArgument);
    assert_eq!(code(query(&server, &name).await), Code::InvalidArgument);
    let token = Uuid::new_v4().simple().to_string().repeat(2);
    for unknown in
        [format!("{name}/{token}"), format!("{name}/x"), secret.strip_prefix("a/b/c/").unwrap().to_owned()]
    {
        assert_eq!(code(write(&server, vec![message(&unknown, 0, "x", true)]).await), Code::NotFound);
        assert_eq!(code(query(&server, &unknown).await), Code::NotFound);
    }
    let elsewhere = name.strip_prefix("a/b/c/").unwrap();
    for unknown in [elsewhere.to_owned(), format!("a/b/c/logstreams/{}", Uuid::new_v4())] {
        assert_eq!(code(read(&server, &unknown, 0, 0).await), Code::NotFound, "{unknown}");
    }
    let malformed = format!("{name}/{token}/x");
    assert_eq!(code(read(&server, &malformed, 0, 0).await), Code::InvalidArgument);
    assert_eq!(query(&server, &secret).await.unwrap(), (0, false), "nothing of it was written");
}

/// LOG-03, LOG-05: several Writes form one stream, and a reader that was connected all the time gets all of it.
#[tokio::test]
async fn a_stream_grows_write_by_write_until_it_is_finished() {
    let server = Server::start().await;
    let LogStream { name, write_resource_name: secret } = create(&server, PARENT).await.unwrap();
    let request = ReadRequest { resource_name: name.clone(), read_offset: 2, read_limit: 0 };
    let mut reader = server.bytes.clone().read(request).await.unwrap().into_inner();
    let two_messages = vec![message(&secret, 0, "0123", false), message("", 4, "456789", false)];
    assert_eq!(write(&server, two_messages).await.unwrap(), 10);
    assert_eq!(query(&server, &secret).await.unwrap(), (10, false));
    let mut read_so_far = Vec::new();
    while read_so_far.len() < 8 {
        read_so_far.extend_from_slice(&reader.message().await.unwrap().unwrap().data);
    }
    assert_eq!(read_so_far, b"23456789");
    assert_eq!(write(&server, vec![message(&secret, 10, "abc", false)]).await.unwrap(), 13);
    assert_eq!(reader.message().await.unwrap().unwrap().data.as_ref(), b"abc");
    assert_eq!(read(&server, &name, 11, 2).await.unwrap(), b"bc", "a limit ends the Read, not the stream");
    assert_eq!(write(&server, vec![message(&secret, 13, "", true)]).await.unwrap(), 13);
    assert!(reader.message().await.unwrap().is_none());
    assert_eq!(query(&server, &secret).await.unwrap(), (13, true));
    assert_eq!(read(&server, &name, 0, 0).await.unwrap(), b"0123456789abc");
    assert_eq!(read(&server, &name, 13, 0).await.unwrap(), b"");
    assert_eq!(code(read(&server, &name, 14, 0).await), Code::OutOfRange);
    assert_eq!(code(read(&server, &name, -1, 0).await), Code::OutOfRange);
    assert_eq!(code(read(&server, &name, 0, -1).await), Code::InvalidArgument);
}

/// LOG-04.
#[tokio::test]
async fn what_was_written_cannot_be_changed_skipped_or_gone_beyond() {
    let server = Server::start().await;
    let LogStream { name, write_resource_name: secret } = create(&server, PARENT).await.unwrap();
    assert_eq!(write(&server, vec![message(&secret, 0, "0123456789", false)]).await.unwrap(), 10);
    for wrong in [
        vec![message(&secret, 0, "x", false)],
        vec![message(&secret, 9, "x", true)],
        vec![message(&secret, 11, "x", false)],
        vec![message(&secret, -1, "x", false)],
        vec![message(&secret, i64::MAX, "x", false)],
    ] {
        assert_eq!(code(write(&server, wrong).await), Code::InvalidArgument);
        assert_eq!(query(&server, &secret).await.unwrap(), (10, false));
    }
    // The messages before the wrong one are stored.
    let half_wrong = vec![message(&secret, 10, "a", false), message(&secret, 10, "b", false)];
    assert_eq!(code(write(&server, half_wrong).await), Code::InvalidArgument);
    let renamed = vec![message(&secret, 11, "c", false), message(&name, 12, "d", false)];
    assert_eq!(code(write(&server, renamed).await), Code::InvalidArgument);
    let after_the_end = vec![message(&secret, 12, "e", true), message(&secret, 13, "f", false)];
    assert_eq!(code(write(&server, after_the_end).await), Code::InvalidArgument);
    for late in
        [message(&secret, 13, "g", false), message(&secret, 13, "", true), message(&secret, 0, "h", true)]
    {
        assert_eq!(code(write(&server, vec![late]).await), Code::FailedPrecondition);
    }
    assert_eq!(read(&server, &name, 0, 0).await.unwrap(), b"0123456789ace");
}

/// A stream beyond its size limit is refused, and one larger than a message is read in pieces.
#[tokio::test]
async fn a_stream_is_bounded() {
    let server = Server::start().await;
    let LogStream { name, write_resource_name: secret } = create(&server, PARENT).await.unwrap();
    let mib = "x".repeat(1 << 20);
    let pieces = (0..3).map(|n| message(&secret, n << 20, &mib, false)).collect();
    assert_eq!(write(&server, pieces).await.unwrap(), 3 << 20);
    assert_eq!(
        code(write(&server, vec![message(&secret, 3 << 20, &mib, true)]).await),
        Code::OutOfRange,
        "GEN-20"
    );
    assert_eq!(write(&server, vec![message(&secret, 3 << 20, "", true)]).await.unwrap(), 3 << 20);
    assert_eq!(read(&server, &name, 0, 0).await.unwrap().len(), 3 << 20);
}
