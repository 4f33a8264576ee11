//! The conformance suite against servers that are wrong on purpose.
#![allow(clippy::unwrap_used, missing_docs)]

mod faults;
