//! One client creates log streams and never finishes them.

use crate::{
    harness::{Bystander, assert_memory_is_bounded, connect_from},
    support::Server,
};
use gorego_client::stubs::LogStreamServiceClient;
use gorego_reapi::proto::logstream::CreateLogStreamRequest;

#[tokio::test]
async fn unfinished_log_streams_of_one_client_leave_places_for_others() {
    let server = Server::with(&[("INSTANCE_NAMES", "[\"\", \"main\"]")]).await;
    let bystander = Bystander::beside(&server).await;
    let request = || CreateLogStreamRequest { parent: "main".into() };
    let mut greedy = LogStreamServiceClient::new(connect_from("127.0.0.1", &server).await);
    let mut made = 0;
    while made < 5_000 && greedy.create_log_stream(request()).await.is_ok() {
        made += 1;
    }
    assert!(made < 5_000, "there is a bound");
    let mut other = LogStreamServiceClient::new(connect_from("127.0.0.2", &server).await);
    for _ in 0..20 {
        other.create_log_stream(request()).await.unwrap();
    }
    bystander.leave().await;
    assert_memory_is_bounded(&server);
}
