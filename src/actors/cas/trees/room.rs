//! [`TreeRoom`]: memory for the directories of one tree.

use crate::{
    actors::cas::{client::Cas, settings::SMALL_TREE_BYTES},
    budget::Share,
};
use gorego_reapi::error::Result;

/// Permission to hold the directories of one tree in memory. A tree above `SMALL_TREE_BYTES` takes one of
/// `LARGE_TREES_MAX` places, of which one peer gets all but one. A holder never waits for a second place.
#[derive(Debug)]
pub(crate) struct TreeRoom<'a> {
    cas: &'a Cas,
    bytes: usize,
    place: Option<Share>,
}

impl<'a> TreeRoom<'a> {
    pub(crate) fn new(cas: &'a Cas) -> Self {
        Self { cas, bytes: 0, place: None }
    }

    /// Waits for permission to hold this many more bytes.
    pub(crate) async fn grow(&mut self, bytes: usize) -> Result<()> {
        self.bytes = self.bytes.saturating_add(bytes);
        if self.bytes > SMALL_TREE_BYTES && self.place.is_none() {
            self.place = Some(self.cas.shared().large_trees.wait_for(self.cas.caller(), 1).await?);
        }
        Ok(())
    }

    /// The place of a large tree, for a job that outlives the call.
    pub(crate) fn into_place(self) -> Option<Share> {
        self.place
    }
}
