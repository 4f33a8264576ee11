//! Directories and input roots: read level by level, checked, leased, and copied out.

pub(crate) mod inputs;
