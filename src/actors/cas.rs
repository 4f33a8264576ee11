//! The content-addressable store and the action cache: the actor, its index, its files.

pub mod blob;
pub mod client;
pub mod messages;
