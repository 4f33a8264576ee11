//! [`BlobStore`]: the part of the store that a worker needs, as a trait, so that a run can be tested without one.

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

/// Where inputs come from and results go. Every method blocks; see [`Cas`] for what each promises.
pub trait BlobStore: Send + Sync {
    /// [`Cas::stage_inputs`].
    ///
    /// # Errors
    /// See [`Cas::stage_inputs`].
    fn stage_inputs(&self, instance: &Instance, root: Digest, peer: Peer) -> Result<Box<dyn Inputs>>;

    /// [`Cas::begin_outputs`].
    fn begin_outputs(&self, instance: &Instance, function: DigestFunction) -> Box<dyn Outputs + '_>;

    /// [`Cas::relieve_disk`].
    fn relieve_disk(&self, is_cancelled: &dyn Fn() -> bool);
}

/// What is stored for one action, together.
pub trait Outputs {
    /// [`OutputBatch::file`].
    ///
    /// # Errors
    /// See [`OutputBatch::file`].
    fn file(&mut self, parent: &File, name: &str, file: File) -> Result<Digest>;

    /// [`OutputBatch::bytes`].
    ///
    /// # Errors
    /// See [`OutputBatch::bytes`].
    fn bytes(&mut self, bytes: Vec<u8>) -> Result<Digest>;

    /// [`OutputBatch::expect`].
    fn expect(&mut self, bytes: u64);

    /// [`OutputBatch::publish`].
    ///
    /// # Errors
    /// See [`OutputBatch::publish`].
    fn publish(&mut self) -> Result<()>;

    /// [`OutputBatch::result`].
    ///
    /// # Errors
    /// See [`OutputBatch::result`].
    fn result(&mut self, action: Digest, result: reapi::ActionResult, provenance: Provenance) -> Result<()>;

    /// [`OutputBatch::commit`].
    ///
    /// # Errors
    /// See [`OutputBatch::commit`].
    fn commit(self: Box<Self>) -> Result<()>;
}

/// An input root that is kept from eviction while this is held.
pub trait Inputs {
    /// Its directories.
    fn tree(&self) -> &Arc<InputTree>;

    /// [`StagedInputs::materialise`].
    ///
    /// # Errors
    /// See [`StagedInputs::materialise`].
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
