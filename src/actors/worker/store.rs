//! [`BlobStore`]: the part of the store that a worker needs, as a trait, so that a run can be tested without one.

use crate::{
    actors::cas::client::{Cas, Provenance, StagedInputs},
    instance::Instance,
};
use gorego_reapi::{
    digest::{Digest, DigestFunction},
    error::Result,
    proto::reapi,
    tree::InputTree,
};
use std::fs::File;

/// Where inputs come from and results go. Every method blocks; see [`Cas`] for what each promises.
pub trait BlobStore: Send + Sync {
    /// [`Cas::stage_inputs`].
    ///
    /// # Errors
    /// See [`Cas::stage_inputs`].
    fn stage_inputs(&self, instance: &Instance, root: Digest) -> Result<Box<dyn Inputs>>;

    /// [`Cas::store_output`].
    ///
    /// # Errors
    /// See [`Cas::store_output`].
    fn store_output(
        &self,
        instance: &Instance,
        function: DigestFunction,
        parent: &File,
        name: &str,
        file: File,
    ) -> Result<Digest>;

    /// [`Cas::store_bytes`].
    ///
    /// # Errors
    /// See [`Cas::store_bytes`].
    fn store_bytes(&self, instance: &Instance, function: DigestFunction, bytes: Vec<u8>) -> Result<Digest>;

    /// [`Cas::record_result`].
    ///
    /// # Errors
    /// See [`Cas::record_result`].
    fn record_result(
        &self,
        instance: &Instance,
        action: Digest,
        result: reapi::ActionResult,
        provenance: Provenance,
    ) -> Result<()>;

    /// [`Cas::relieve_disk`].
    fn relieve_disk(&self, is_cancelled: &dyn Fn() -> bool);
}

/// An input root that is kept from eviction while this is held.
pub trait Inputs {
    /// Its directories.
    fn tree(&self) -> &InputTree;

    /// [`StagedInputs::materialise`].
    ///
    /// # Errors
    /// See [`StagedInputs::materialise`].
    fn materialise(&self, digest: &Digest, parent: &File, name: &str, mode: u32) -> Result<()>;
}

impl BlobStore for Cas {
    fn stage_inputs(&self, instance: &Instance, root: Digest) -> Result<Box<dyn Inputs>> {
        Ok(Box::new(Cas::stage_inputs(self, instance, root)?))
    }

    fn store_output(
        &self,
        instance: &Instance,
        function: DigestFunction,
        parent: &File,
        name: &str,
        file: File,
    ) -> Result<Digest> {
        Cas::store_output(self, instance, function, parent, name, file)
    }

    fn store_bytes(&self, instance: &Instance, function: DigestFunction, bytes: Vec<u8>) -> Result<Digest> {
        Cas::store_bytes(self, instance, function, bytes)
    }

    fn record_result(
        &self,
        instance: &Instance,
        action: Digest,
        result: reapi::ActionResult,
        provenance: Provenance,
    ) -> Result<()> {
        Cas::record_result(self, instance, action, result, provenance)
    }

    fn relieve_disk(&self, is_cancelled: &dyn Fn() -> bool) {
        Cas::relieve_disk(self, is_cancelled);
    }
}

impl Inputs for StagedInputs {
    fn tree(&self) -> &InputTree {
        &self.tree
    }

    fn materialise(&self, digest: &Digest, parent: &File, name: &str, mode: u32) -> Result<()> {
        StagedInputs::materialise(self, digest, parent, name, mode)
    }
}
