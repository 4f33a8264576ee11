//! Directories and trees.
//!
//! [`inputs`] reads input roots for actions: every directory and file has to be stored, and workers hold the blobs that
//! they need and copy them out. [`known_roots`] remembers the roots. The memory of large trees is bounded by one
//! budget. [`walk`] lists the directories below a root for clients (GetTree).

pub(crate) mod inputs;
pub(crate) mod known_roots;
mod room;
pub(crate) mod walk;

pub use inputs::ActionInputs;
pub(super) use room::TreeRoom;
