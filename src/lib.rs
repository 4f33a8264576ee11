//! goREgo.
pub mod proto;
