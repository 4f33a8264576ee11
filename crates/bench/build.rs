//! Generates the server side of the services that the no-op benchmark server implements. The message types come from
//! `gorego-reapi`.

#[path = "../../proto/services.rs"]
mod services;

use services::SERVICES;
use std::error::Error;

const PROTO: &str = "../../proto";
/// The modules of `gorego_reapi::proto` with the messages of these services.
const MODULES: [&str; 3] = ["bytestream", "longrunning", "reapi"];

fn main() -> Result<(), Box<dyn Error>> {
    println!("cargo::rerun-if-changed={PROTO}");
    let served = SERVICES.iter().filter(|(_, _, module)| MODULES.contains(module));
    let mut descriptors = protox::compile(served.clone().map(|(file, ..)| file), [PROTO])?;
    descriptors.file.retain(|file| !file.service.is_empty());
    let mut services = tonic_prost_build::configure().build_client(false);
    for (_, package, module) in served {
        services = services.extern_path(*package, format!("::gorego_reapi::proto::{module}"));
    }
    services.compile_fds(descriptors)?;
    Ok(())
}
