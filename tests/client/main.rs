//! The client and `gorego exec` with a small server that misbehaves on purpose.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing, missing_docs)]

mod exec;
mod fake;
mod library;
