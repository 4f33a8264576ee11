//! Compiles `proto/` into Rust without protoc, and writes the descriptor set that reflection serves.

use prost::Message as _;
use std::{env, error::Error, fs, path::Path};

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
    "gorego/v1/gorego.proto",
];

fn main() -> Result<(), Box<dyn Error>> {
    println!("cargo::rerun-if-changed=proto");
    let mut compiler = protox::Compiler::new(["proto"])?;
    compiler.include_imports(true).include_source_info(true).open_files(FILES)?;
    let out = env::var("OUT_DIR")?;
    let descriptors = compiler.file_descriptor_set();
    fs::write(Path::new(&out).join("descriptors.bin"), descriptors.encode_to_vec())?;
    // The counted decoder finds the layout of a message by its name.
    let mut config = prost_build::Config::new();
    config.enable_type_names();
    tonic_prost_build::configure()
        .bytes(".")
        .codec_path("crate::grpc::codec::Codec")
        .include_file("protos.rs")
        .compile_fds_with_config(descriptors, config)?;
    Ok(())
}
