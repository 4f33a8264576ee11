//! Compiles the messages of `proto/` into Rust without protoc, and writes the descriptor set that reflection serves.

use prost::Message as _;
use std::{env, error::Error, fs, path::Path};

const PROTO: &str = "../../proto";
const FILES: &[&str] = &[
    "build/bazel/remote/execution/v2/remote_execution.proto",
    "build/bazel/semver/semver.proto",
    "build/bazel/remote/asset/v1/remote_asset.proto",
    "build/bazel/remote/logstream/v1/remote_logstream.proto",
    "google/bytestream/bytestream.proto",
    "google/longrunning/operations.proto",
    "google/rpc/code.proto",
    "google/rpc/error_details.proto",
    "google/rpc/status.proto",
    "gorego/v1/admin.proto",
    "gorego/v1/gorego.proto",
];

fn main() -> Result<(), Box<dyn Error>> {
    println!("cargo::rerun-if-changed={PROTO}");
    let mut compiler = protox::Compiler::new([PROTO])?;
    compiler.include_imports(true).include_source_info(true).open_files(FILES)?;
    let descriptors = compiler.file_descriptor_set();
    fs::write(Path::new(&env::var("OUT_DIR")?).join("descriptors.bin"), descriptors.encode_to_vec())?;
    let mut config = prost_build::Config::new();
    // The decoder's cost check looks up the layout of a message by its type name.
    config.enable_type_names().bytes(["."]).include_file("messages.rs").compile_fds(descriptors)?;
    Ok(())
}
