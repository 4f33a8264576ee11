//! Generates a client for each service in `proto/`. The message types come from `gorego-reapi`.

#[path = "../../proto/services.rs"]
mod services;

use services::SERVICES;
use std::error::Error;

const PROTO: &str = "../../proto";

fn main() -> Result<(), Box<dyn Error>> {
    println!("cargo::rerun-if-changed={PROTO}");
    let mut descriptors = protox::compile(SERVICES.iter().map(|(file, ..)| file), [PROTO])?;
    descriptors.file.retain(|file| !file.service.is_empty());
    let mut services = tonic_prost_build::configure().build_server(false).codec_path("crate::codec::Codec");
    for (_, package, module) in SERVICES {
        services = services.extern_path(*package, format!("::gorego_reapi::proto::{module}"));
    }
    services.compile_fds(descriptors)?;
    Ok(())
}
