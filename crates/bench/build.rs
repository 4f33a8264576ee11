//! Generates the server side of the services that the no-op benchmark server implements. The message types come from
//! `gorego-reapi`.

use std::error::Error;

const PROTO: &str = "../../proto";
/// Each proto file, its package, and the module of `gorego_reapi::proto` that contains its messages.
const SERVICES: &[(&str, &str, &str)] = &[
    ("build/bazel/remote/execution/v2/remote_execution.proto", ".build.bazel.remote.execution.v2", "reapi"),
    ("google/bytestream/bytestream.proto", ".google.bytestream", "bytestream"),
    ("google/longrunning/operations.proto", ".google.longrunning", "longrunning"),
];

fn main() -> Result<(), Box<dyn Error>> {
    println!("cargo::rerun-if-changed={PROTO}");
    let mut descriptors = protox::compile(SERVICES.iter().map(|(file, ..)| file), [PROTO])?;
    descriptors.file.retain(|file| !file.service.is_empty());
    let mut services = tonic_prost_build::configure().build_client(false);
    for (_, package, module) in SERVICES {
        services = services.extern_path(*package, format!("::gorego_reapi::proto::{module}"));
    }
    services.compile_fds(descriptors)?;
    Ok(())
}
