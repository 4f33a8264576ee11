//! The services in this directory, for the build scripts that generate their code.

/// Each file with services, its package, and the module of `gorego_reapi::proto` with its messages.
pub(crate) const SERVICES: &[(&str, &str, &str)] = &[
    ("build/bazel/remote/asset/v1/remote_asset.proto", ".build.bazel.remote.asset.v1", "asset"),
    ("build/bazel/remote/execution/v2/remote_execution.proto", ".build.bazel.remote.execution.v2", "reapi"),
    (
        "build/bazel/remote/logstream/v1/remote_logstream.proto",
        ".build.bazel.remote.logstream.v1",
        "logstream",
    ),
    ("google/bytestream/bytestream.proto", ".google.bytestream", "bytestream"),
    ("google/longrunning/operations.proto", ".google.longrunning", "longrunning"),
    ("gorego/v1/admin.proto", ".gorego.v1", "gorego"),
];
