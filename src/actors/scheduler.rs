//! The scheduler.

pub mod messages;
pub mod operation;
