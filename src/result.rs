//! [`SharedResult`]: an action result in memory, and the memory that it takes.
//!
//! A result is immutable and is measured once, when it is made. So its holders know its size without a walk over it. A
//! result with many short parts takes a multiple of its encoded length.

use crate::{budget::Share, memory};
use gorego_reapi::{
    proto::reapi::ActionResult,
    wire::{self, Limits},
};
use prost::Message as _;
use std::{ops::Deref, sync::Arc};

/// A result that many holders share. Cheap to clone.
#[derive(Debug, Clone)]
pub struct SharedResult {
    measured: Arc<Measured>,
    /// The room of a result that is not small, unless its holder accounts for it.
    room: Option<Arc<ResultRoom>>,
}

#[derive(Debug)]
struct Measured {
    result: ActionResult,
    memory: usize,
}

impl SharedResult {
    /// Measures a result, which takes about as long as encoding it.
    pub fn new(result: ActionResult) -> Self {
        let cost = wire::cost::<ActionResult>(&result.encode_to_vec(), Limits::memory(u64::MAX));
        let memory = cost.map_or(usize::MAX, |cost| usize::try_from(cost.memory).unwrap_or(usize::MAX));
        Self { measured: Arc::new(Measured { result, memory }), room: None }
    }

    /// The approximate memory that it takes, in bytes.
    pub fn memory(&self) -> usize {
        self.measured.memory
    }

    /// The same result, which returns this room when its last clone is dropped.
    pub(crate) fn holding(self, room: Option<ResultRoom>) -> Self {
        Self { room: room.map(Arc::new), ..self }
    }

    /// Separates the room from the result, for a holder that accounts for the result by itself.
    pub(crate) fn take_room(&mut self) -> Option<Arc<ResultRoom>> {
        self.room.take()
    }

    /// The result itself, without a copy if this is the only holder.
    pub fn into_inner(self) -> ActionResult {
        match Arc::try_unwrap(self.measured) {
            Ok(measured) => measured.result,
            Err(shared) => shared.result.clone(),
        }
    }
}

impl Deref for SharedResult {
    type Target = ActionResult;

    fn deref(&self) -> &ActionResult {
        &self.measured.result
    }
}

impl PartialEq for SharedResult {
    fn eq(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.measured, &other.measured) || **self == **other
    }
}

impl Default for SharedResult {
    fn default() -> Self {
        Self::new(ActionResult::default())
    }
}

impl From<ActionResult> for SharedResult {
    fn from(result: ActionResult) -> Self {
        Self::new(result)
    }
}

/// Room for a result that one request holds.
#[derive(Debug)]
pub(crate) struct ResultRoom(Share);

impl ResultRoom {
    pub(crate) fn new(share: Share) -> Self {
        Self(share)
    }

    /// Returns what exceeds the memory of the result, which is known now.
    pub(crate) fn shrink_to(&mut self, memory: usize) {
        self.0.shrink_to(memory as u64);
    }
}

impl Drop for ResultRoom {
    fn drop(&mut self) {
        memory::freed(self.0.amount());
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use gorego_reapi::proto::reapi::{ExecutedActionMetadata, OutputSymlink};

    #[test]
    fn a_result_of_many_small_parts_weighs_what_it_takes_in_memory() {
        let metadata = ExecutedActionMetadata {
            auxiliary_metadata: vec![Default::default(); 10_000],
            ..Default::default()
        };
        let tiny = ActionResult { execution_metadata: Some(metadata), ..Default::default() };
        let any = size_of::<prost_types::Any>();
        assert!(tiny.encoded_len() < 21_000 && SharedResult::new(tiny).memory() >= 10_000 * any);
        let link = OutputSymlink { path: "l".into(), target: "t".into(), ..Default::default() };
        let links = ActionResult { output_symlinks: vec![link; 10_000], ..Default::default() };
        let memory = 10_000 * (size_of::<OutputSymlink>() + 2 * 32);
        assert!(SharedResult::new(links).memory() >= memory);
    }

    #[test]
    fn nothing_is_copied_for_the_only_holder() {
        let path = "o".to_owned();
        let at = path.as_ptr();
        let link = OutputSymlink { path, ..Default::default() };
        let result = SharedResult::new(ActionResult { output_symlinks: vec![link], ..Default::default() });
        let other = result.clone();
        assert_ne!(other.into_inner().output_symlinks[0].path.as_ptr(), at);
        assert_eq!(result.into_inner().output_symlinks[0].path.as_ptr(), at);
    }
}
