//! Helpers of all attacks: clients with separate addresses, a bystander, and the memory of the server.

use crate::support::Server;
use gorego_client::stubs::CapabilitiesClient;
use gorego_reapi::proto::reapi::GetCapabilitiesRequest;
use std::{
    fs,
    net::IpAddr,
    time::{Duration, Instant},
};
use tokio::{sync::oneshot, task::JoinHandle, time::timeout};
use tonic::transport::{Channel, Endpoint};

/// Largest resident memory that an attack may cause, with default settings.
pub(crate) const MEMORY_MAX_BYTES: u64 = 600_000_000;
/// Largest time that the bystander may wait for an answer.
pub(crate) const BYSTANDER_LIMIT: Duration = Duration::from_secs(5);
/// Interval between the requests of the bystander.
const BYSTANDER_PAUSE: Duration = Duration::from_millis(20);

/// A new connection from this loopback address, such as "127.0.0.2".
pub(crate) async fn connect_from(address: &str, server: &Server) -> Channel {
    let address: IpAddr = address.parse().unwrap();
    Endpoint::from_shared(server.endpoint()).unwrap().local_address(Some(address)).connect().await.unwrap()
}

/// Another peer, which requests the server's capabilities repeatedly.
pub(crate) struct Bystander {
    leave: oneshot::Sender<()>,
    asking: JoinHandle<Verdict>,
}

/// The observations of a bystander.
pub(crate) struct Verdict {
    /// Number of answers that it received.
    pub(crate) answers: u64,
    /// Its longest wait for an answer.
    pub(crate) slowest: Duration,
}

impl Bystander {
    /// A bystander that has received its first answer.
    pub(crate) async fn beside(server: &Server) -> Self {
        let mut client = CapabilitiesClient::new(connect_from("127.0.0.2", server).await);
        client.get_capabilities(GetCapabilitiesRequest::default()).await.unwrap();
        let (leave, mut left) = oneshot::channel();
        let asking = tokio::spawn(async move {
            let mut verdict = Verdict { answers: 0, slowest: Duration::ZERO };
            loop {
                let begin = Instant::now();
                let asked = client.get_capabilities(GetCapabilitiesRequest::default());
                let answer = timeout(BYSTANDER_LIMIT, asked).await;
                answer.expect("the bystander is answered in time").unwrap();
                verdict.answers += 1;
                verdict.slowest = verdict.slowest.max(begin.elapsed());
                if timeout(BYSTANDER_PAUSE, &mut left).await.is_ok() {
                    return verdict;
                }
            }
        });
        Self { leave, asking }
    }

    /// Makes one more request and ends. Panics when an answer took longer than [`BYSTANDER_LIMIT`].
    pub(crate) async fn leave(self) -> Verdict {
        let _ = self.leave.send(());
        self.asking.await.unwrap()
    }
}

/// Panics when the peak resident memory of the server exceeds [`MEMORY_MAX_BYTES`].
pub(crate) fn assert_memory_is_bounded(server: &Server) {
    let peak = peak_memory(server);
    assert!(peak < MEMORY_MAX_BYTES, "the server had {} MB resident", peak / 1_000_000);
}

/// The peak resident memory of the server, in bytes.
pub(crate) fn peak_memory(server: &Server) -> u64 {
    memory(server, "VmHWM")
}

/// The current resident memory of the server, in bytes.
#[allow(dead_code)]
pub(crate) fn resident_memory(server: &Server) -> u64 {
    memory(server, "VmRSS")
}

fn memory(server: &Server, field: &str) -> u64 {
    let status = fs::read_to_string(format!("/proc/{}/status", server.pid())).unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix(field)?.strip_prefix(':')).unwrap();
    let kilobytes: u64 = line.trim().trim_end_matches(" kB").trim().parse().unwrap();
    kilobytes * 1024
}
