//! Generates the server side of each service in `proto/`. The messages come from `gorego-reapi`.

#[path = "proto/services.rs"]
mod services;

use services::SERVICES;
use std::error::Error;

const PROTO: &str = "proto";
/// Messages for which the server has its own types instead of the generated ones.
const FIND_MISSING: [&str; 2] = ["FindMissingBlobsRequest", "FindMissingBlobsResponse"];

fn main() -> Result<(), Box<dyn Error>> {
    println!("cargo::rerun-if-changed={PROTO}");
    let mut descriptors = protox::compile(SERVICES.iter().map(|(file, ..)| file), [PROTO])?;
    descriptors.file.retain(|file| !file.service.is_empty());
    let mut services =
        tonic_prost_build::configure().build_client(false).codec_path("crate::grpc::codec::Codec");
    for (_, package, module) in SERVICES {
        services = services.extern_path(*package, format!("::gorego_reapi::proto::{module}"));
    }
    for message in FIND_MISSING {
        services = services.extern_path(
            format!(".build.bazel.remote.execution.v2.{message}"),
            format!("::gorego_reapi::find_missing::{message}"),
        );
    }
    services.compile_fds(descriptors)?;
    Ok(())
}
