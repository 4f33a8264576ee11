//! Measures how long a bystander waits during an attack: `cargo bench --bench attacks`, or with the names of attacks.
//!
//! The hostile client is one thread of a separate process, which runs this program again. The bystander requests the
//! capabilities from another address, one call at a time. Each attack has a fresh server and lasts [`DURATION`]. The
//! output is a Markdown table. The benchmark never fails.

mod hostile;
#[allow(dead_code, missing_docs, clippy::unwrap_used)]
#[path = "../../tests/attacks/raw.rs"]
mod raw;
#[allow(dead_code)]
#[path = "../server/target.rs"]
mod target;

use gorego_client::stubs::CapabilitiesClient;
use gorego_reapi::proto::reapi::GetCapabilitiesRequest;
use std::{
    net::{IpAddr, Ipv4Addr},
    process::Command,
    time::{Duration, Instant},
};
use target::Target;
use tonic::transport::Endpoint;

/// Duration of an attack.
const DURATION: Duration = Duration::from_secs(10);
/// Delay between two calls of the bystander.
const PAUSE: Duration = Duration::from_millis(2);
/// The goal for the wait of the bystander in 99 of 100 calls.
const GOAL: Duration = Duration::from_millis(50);

fn main() {
    let arguments: Vec<String> = std::env::args().skip(1).filter(|argument| argument != "--bench").collect();
    if let [subcommand, name, address] = arguments.as_slice()
        && subcommand == hostile::SUBCOMMAND
    {
        return hostile::attack(name, address);
    }
    println!("| attack | p50 | p99 | longest | server's peak memory | goal: p99 under {GOAL:?} |");
    println!("|---|---|---|---|---|---|");
    for (name, what, _) in hostile::ATTACKS {
        if arguments.is_empty() || arguments.iter().any(|wanted| wanted == name) {
            measure(name, what);
        }
    }
}

fn measure(name: &str, what: &str) {
    let target = Target::start();
    let mut waits = beside(name, &target);
    waits.sort_unstable();
    let at =
        |share: usize| waits.get(waits.len() * share / 100).or(waits.last()).copied().unwrap_or(DURATION);
    let shown = |wait: Duration| format!("{:.1} ms", wait.as_secs_f64() * 1_000.0);
    let verdict = if at(99) <= GOAL { "reached" } else { "not reached" };
    let (half, most, longest) = (shown(at(50)), shown(at(99)), shown(at(100)));
    println!(
        "| {what} | {half} | {most} | {longest} | {} MB | {verdict} |",
        peak_memory(target.pid()) / 1_000_000
    );
}

/// The waiting times of the bystander.
fn beside(name: &str, target: &Target) -> Vec<Duration> {
    let this = std::env::current_exe().expect("this program has a path");
    let address = target.endpoint.trim_start_matches("http://");
    let mut hostile =
        Command::new(this).args([hostile::SUBCOMMAND, name, address]).spawn().expect("the attack starts");
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
    let waits = runtime.block_on(bystander(&target.endpoint));
    let _ = hostile.kill();
    let _ = hostile.wait();
    waits
}

async fn bystander(endpoint: &str) -> Vec<Duration> {
    let endpoint = Endpoint::from_shared(endpoint.to_owned()).expect("an endpoint");
    let endpoint = endpoint.local_address(Some(IpAddr::V4(Ipv4Addr::new(127, 0, 0, 2))));
    let channel = endpoint.connect().await.expect("the server takes a connection");
    let mut client = CapabilitiesClient::new(channel);
    let end = Instant::now() + DURATION;
    let mut waits = Vec::new();
    while Instant::now() < end {
        let asked = Instant::now();
        let call = client.get_capabilities(GetCapabilitiesRequest::default());
        match tokio::time::timeout(DURATION, call).await {
            Ok(Ok(_)) => {}
            Ok(Err(status)) => eprintln!("the bystander was refused: {status}"),
            Err(_) => eprintln!("the bystander had no answer for {DURATION:?}"),
        }
        waits.push(asked.elapsed());
        tokio::time::sleep(PAUSE).await;
    }
    waits
}

fn peak_memory(pid: u32) -> u64 {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).unwrap_or_default();
    line.trim().trim_end_matches(" kB").parse::<u64>().unwrap_or(0) * 1024
}
