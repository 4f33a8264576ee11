//! [`BlobStore`]: the part of the store that a worker needs, as a trait, so that runs can be tested without a store.

use crate::{
    actors::cas::{
        ActionInputs, OutputBatch,
        client::{Cas, Provenance},
    },
    caller::Owner,
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
    /// See [`Cas::open_inputs`].
    ///
    /// # Errors
    /// The errors of [`Cas::open_inputs`].
    fn open_inputs(&self, instance: &Instance, root: Digest, build: Owner) -> Result<Box<dyn Inputs>>;

    /// See [`Cas::begin_outputs`].
    fn begin_outputs(
        &self,
        instance: &Instance,
        function: DigestFunction,
        build: Owner,
    ) -> Box<dyn Outputs + '_>;

    /// See [`Cas::relieve_disk`].
    fn relieve_disk(&self, is_cancelled: &dyn Fn() -> bool);
}

/// The outputs of one action, which are stored together.
pub trait Outputs {
    /// See [`OutputBatch::file`].
    ///
    /// # Errors
    /// The errors of [`OutputBatch::file`].
    fn file(&mut self, parent: &File, name: &str, file: File) -> Result<Digest>;

    /// See [`OutputBatch::bytes`].
    ///
    /// # Errors
    /// The errors of [`OutputBatch::bytes`].
    fn bytes(&mut self, bytes: Vec<u8>) -> Result<Digest>;

    /// See [`OutputBatch::hold`].
    ///
    /// # Errors
    /// The errors of [`OutputBatch::hold`].
    fn hold(&mut self, digests: Vec<Digest>) -> Result<()>;

    /// See [`OutputBatch::expect`].
    fn expect(&mut self, bytes: u64);

    /// See [`OutputBatch::publish`].
    ///
    /// # Errors
    /// The errors of [`OutputBatch::publish`].
    fn publish(&mut self) -> Result<()>;

    /// See [`OutputBatch::result`].
    ///
    /// # Errors
    /// The errors of [`OutputBatch::result`].
    fn result(&mut self, action: Digest, result: reapi::ActionResult, provenance: Provenance) -> Result<()>;

    /// See [`OutputBatch::commit`].
    ///
    /// # Errors
    /// The errors of [`OutputBatch::commit`].
    fn commit(self: Box<Self>) -> Result<()>;
}

/// An input root. The blobs that it holds are not evicted until it is dropped.
pub trait Inputs {
    /// The expanded tree of directories.
    fn tree(&self) -> &Arc<InputTree>;

    /// See [`ActionInputs::hold_all`].
    ///
    /// # Errors
    /// The errors of [`ActionInputs::hold_all`].
    fn hold_all(&mut self) -> Result<()>;

    /// See [`ActionInputs::hold`].
    ///
    /// # Errors
    /// The errors of [`ActionInputs::hold`].
    fn hold(&mut self, blobs: Vec<Digest>) -> Result<()>;

    /// See [`ActionInputs::materialise`].
    ///
    /// # Errors
    /// The errors of [`ActionInputs::materialise`].
    fn materialise(&self, digest: &Digest, parent: &File, name: &str, mode: u32) -> Result<()>;
}

impl BlobStore for Cas {
    fn open_inputs(&self, instance: &Instance, root: Digest, build: Owner) -> Result<Box<dyn Inputs>> {
        Ok(Box::new(Cas::open_inputs(self, instance, root, build)?))
    }

    fn begin_outputs(
        &self,
        instance: &Instance,
        function: DigestFunction,
        build: Owner,
    ) -> Box<dyn Outputs + '_> {
        Box::new(Cas::begin_outputs(&self.clone().for_build(build), instance, function, 0))
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

    fn hold(&mut self, digests: Vec<Digest>) -> Result<()> {
        OutputBatch::hold(self, digests)
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

impl Inputs for ActionInputs {
    fn tree(&self) -> &Arc<InputTree> {
        ActionInputs::tree(self)
    }

    fn hold_all(&mut self) -> Result<()> {
        ActionInputs::hold_all(self)
    }

    fn hold(&mut self, blobs: Vec<Digest>) -> Result<()> {
        ActionInputs::hold(self, blobs)
    }

    fn materialise(&self, digest: &Digest, parent: &File, name: &str, mode: u32) -> Result<()> {
        ActionInputs::materialise(self, digest, parent, name, mode)
    }
}
