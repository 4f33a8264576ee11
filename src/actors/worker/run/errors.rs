//! Classifies the failures of a run, and decides which are worth a retry. Pure, except for [`explained`], which checks
//! the staged inputs.

use crate::{
    actors::worker::{build_root::staged_trees::TreeLease, launcher::is_full},
    disk::Space,
    log_streams::run::LogKind,
    sandbox::layers::MOUNT_STEP,
};
use gorego_reapi::error::Error;

/// Whether a retry may succeed, on another worker or later on this one.
pub(super) fn is_workers_fault(error: &Error) -> bool {
    match error {
        Error::Internal(_) | Error::Unavailable(_) => true,
        Error::Invalid(_)
        | Error::NotFound(_)
        | Error::MissingBlobs(_)
        | Error::Precondition(_)
        | Error::OutOfRange(_)
        | Error::Exhausted { .. }
        | Error::OverQuota { .. }
        | Error::DiskFull(_)
        | Error::Denied(_)
        | Error::Unauthenticated(_)
        | Error::Unimplemented(_)
        | Error::Cancelled(_)
        | Error::DeadlineExceeded(_)
        | Error::DataLoss(_) => false,
    }
}

/// The error of a run whose outputs may be incomplete.
pub(super) fn disk_was_full(space: Space) -> Error {
    Error::DiskFull(format!(
        "the disk of this server was full while the action ran ({space}), so its outputs may be incomplete"
    ))
}

/// The error of a command that could not be run. It is replaced if the staged inputs explain the failure.
pub(super) fn explained(error: Error, base: Option<&TreeLease>) -> Error {
    let Some(base) = base else { return error };
    if let Err(gone) = base.check_in_place() {
        return gone;
    }
    if matches!(&error, Error::Internal(message) if message.contains(MOUNT_STEP)) {
        base.note_mount_failure();
    }
    error
}

/// The error of a run whose log could not be kept. The command is not at fault.
pub(super) fn log_lost(kind: LogKind, errno: i32) -> Error {
    let what = format!("the command was stopped because its {} could not be kept", kind.name());
    if is_full(errno) {
        return Error::DiskFull(format!("{what}: the disk of this server is full (execution.build_root)"));
    }
    Error::Internal(format!("{what}: {}", std::io::Error::from_raw_os_error(errno)))
}
