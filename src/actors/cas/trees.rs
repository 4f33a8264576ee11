//! Directories and trees.
//!
//! [`inputs`] reads input roots for actions: every directory and file has to be stored, and all of them are leased and copied
//! out. The memory of large trees is bounded by one budget. [`walk`] lists the directories below a root for clients (GetTree).

pub(crate) mod inputs;
mod room;
pub(crate) mod walk;

pub use inputs::StagedInputs;
pub(super) use room::TreeRoom;
