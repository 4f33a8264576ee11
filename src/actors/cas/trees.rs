//! Directories and the trees that they make.
//!
//! [`inputs`] reads input roots for actions: every directory and file has to be there, and all of it is leased and copied out. The
//! memory of the larger ones is bounded for all of them together. [`walk`] gives clients the directories below a root, one after the
//! other (GetTree).

pub mod inputs;
mod room;
pub mod walk;

pub use inputs::StagedInputs;
pub(super) use room::TreeRoom;
