//! The generated messages of `proto/`, under short names.
//!
//! They are the messages on the wire and the stored form of blobs such as `Action` and `Directory`. The services are
//! generated where they are used: clients in `gorego-client`, servers in `gorego`.

#[allow(missing_docs, unreachable_pub, clippy::all, clippy::pedantic, rustdoc::all)]
mod generated {
    include!(concat!(env!("OUT_DIR"), "/messages.rs"));
}

pub use generated::build::bazel::remote::asset::v1 as asset;
pub use generated::build::bazel::remote::execution::v2 as reapi;
pub use generated::build::bazel::remote::logstream::v1 as logstream;
pub use generated::build::bazel::semver;
pub use generated::google::{bytestream, longrunning, rpc};
pub use generated::gorego::v1 as gorego;

/// The encoded `FileDescriptorSet` of all messages and services, for server reflection and tests.
pub const DESCRIPTORS: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/descriptors.bin"));
