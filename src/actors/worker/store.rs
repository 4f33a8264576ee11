//! [`BlobStore`]: the part of the store that a worker needs, as a trait, so that runs can be tested without a store.

use crate::{
    actors::cas::{
        OutputBatch, StagedInputs,
        client::{Cas, Provenance},
    },
    caller::Peer,
    instance::Instance,
};
use gorego_reapi::{
    digest::{Digest, DigestFunction},
    error::Result,
    proto::reapi,
    tree::InputTree,
};
use std::{fs::File, sync::Arc};

/// The source of inputs and the destination of results. Every method blocks; [`Cas`] documents each.
pub trait BlobStore: Send + Sync {
    /// See [`Cas::stage_inputs`].
    ///
    /// # Errors
    /// Those of [`Cas::stage_inputs`].
    fn stage_inputs(&self, instance: &Instance, root: Digest, peer: Peer) -> Result<Box<dyn Inputs>>;

    /// See [`Cas::begin_outputs`].
    fn begin_outputs(&self, instance: &Instance, function: DigestFunction) -> Box<dyn Outputs + '_>;

    /// See [`Cas::relieve_disk`].
    fn relieve_disk(&self, is_cancelled: &dyn Fn() -> bool);
}

/// The outputs of one action, which are stored together.
pub trait Outputs {
    /// See [`OutputBatch::file`].
    ///
    /// # Errors
    /// Those of [`OutputBatch::file`].
    fn file(&mut self, parent: &File, name: &str, file: File) -> Result<Digest>;

    /// See [`OutputBatch::bytes`].
    ///
    /// # Errors
    /// Those of [`OutputBatch::bytes`].
    fn bytes(&mut self, bytes: Vec<u8>) -> Result<Digest>;

    /// See [`OutputBatch::expect`].
    fn expect(&mut self, bytes: u64);

    /// See [`OutputBatch::publish`].
    ///
    /// # Errors
    /// Those of [`OutputBatch::publish`].
    fn publish(&mut self) -> Result<()>;

    /// See [`OutputBatch::result`].
    ///
    /// # Errors
    /// Those of [`OutputBatch::result`].
    fn result(&mut self, action: Digest, result: reapi::ActionResult, provenance: Provenance) -> Result<()>;

    /// See [`OutputBatch::commit`].
    ///
    /// # Errors
    /// Those of [`OutputBatch::commit`].
    fn commit(self: Box<Self>) -> Result<()>;
}

/// A leased input root, which is not evicted while this is held.
pub trait Inputs {
    /// The expanded tree of directories.
    fn tree(&self) -> &Arc<InputTree>;

    /// See [`StagedInputs::materialise`].
    ///
    /// # Errors
    /// Those of [`StagedInputs::materialise`].
    fn materialise(&self, digest: &Digest, parent: &File, name: &str, mode: u32) -> Result<()>;
}

impl BlobStore for Cas {
    fn stage_inputs(&self, instance: &Instance, root: Digest, peer: Peer) -> Result<Box<dyn Inputs>> {
        Ok(Box::new(Cas::stage_inputs(self, instance, root, peer)?))
    }

    fn begin_outputs(&self, instance: &Instance, function: DigestFunction) -> Box<dyn Outputs + '_> {
        Box::new(Cas::begin_outputs(self, instance, function, 0))
    }

    fn relieve_disk(&self, is_cancelled: &dyn Fn() -> bool) {
        Cas::relieve_disk(self, is_cancelled);
    }
}

impl Outputs for OutputBatch {
    fn file(&mut self, parent: &File, name: &str, file: File) -> Result<Digest> {
        OutputBatch::file(self, parent, name, file)
    }

    fn bytes(&mut self, bytes: Vec<u8>) -> Result<Digest> {
        OutputBatch::bytes(self, bytes)
    }

    fn expect(&mut self, bytes: u64) {
        OutputBatch::expect(self, bytes);
    }

    fn publish(&mut self) -> Result<()> {
        OutputBatch::publish(self)
    }

    fn result(&mut self, action: Digest, result: reapi::ActionResult, provenance: Provenance) -> Result<()> {
        OutputBatch::result(self, action, result, provenance)
    }

    fn commit(self: Box<Self>) -> Result<()> {
        OutputBatch::commit(*self)
    }
}

impl Inputs for StagedInputs {
    fn tree(&self) -> &Arc<InputTree> {
        StagedInputs::tree(self)
    }

    fn materialise(&self, digest: &Digest, parent: &File, name: &str, mode: u32) -> Result<()> {
        StagedInputs::materialise(self, digest, parent, name, mode)
    }
}
