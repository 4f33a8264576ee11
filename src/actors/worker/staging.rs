//! [`StagingActor`]: stages the inputs of waiting actions, so that their runs find them on disk.
//!
//! A pool whose actions see their inputs through overlays has one such actor, with a thread of its own. The scheduler
//! sends it one action at a time. Nothing depends on it: errors are logged at level debug, and the run stages what is
//! not staged.

use super::{
    WorkerSettings, checkpoint::Checkpoint, messages::StageAhead, panic_message, store::BlobStore, tools,
};
use crate::{
    actors::mail::{Mail, Receive, counted},
    logging::{Event, Field},
    telemetry::SandboxFailure,
};
use actix::{Actor, SyncContext};
use gorego_reapi::error::{Error, Result};
use std::{
    panic::{AssertUnwindSafe, catch_unwind},
    sync::Arc,
    time::Instant,
};

const STAGED_AHEAD: &str = "staged_ahead";
const STAGING_PANICKED: &str = "staging_panicked";

/// Stages the inputs of one waiting action at a time.
pub struct StagingActor {
    mail: Mail,
    settings: Arc<WorkerSettings>,
    store: Arc<dyn BlobStore>,
}

impl StagingActor {
    /// An actor for the pool with these settings that reads inputs from `store`.
    pub fn new(settings: Arc<WorkerSettings>, store: Arc<dyn BlobStore>) -> Self {
        Self { mail: Mail::default(), settings, store }
    }

    /// Stages the inputs of an action as its run would. Returns whether there is a new tree.
    fn stage(&self, request: &StageAhead) -> Result<bool> {
        let StageAhead { action, owner, cancel, .. } = request;
        let settings = &self.settings;
        // A tool has an input root of its own.
        let has_tool = settings.tools.is_some() && tools::wants_tool(action);
        if has_tool || cancel.is_stopped() {
            return Ok(false);
        }
        let checkpoint = Checkpoint::new(cancel, "staging the inputs", settings.transfer_timeout);
        checkpoint.check()?;
        let mut inputs = self.store.open_inputs(&action.instance, action.input_root, *owner)?;
        let tree = inputs.tree().clone();
        if !settings.can_stage(&tree) {
            return Ok(false);
        }
        let instance = action.instance.blobs();
        let build_root = &settings.build_root;
        build_root.stage_ahead(&mut *inputs, &tree, instance, || build_root.disk().look(), &checkpoint)
    }

    fn log(&self, request: &StageAhead, staged: &Result<bool>, begun: Instant) {
        if matches!(staged, Ok(false) | Err(Error::Cancelled(_))) {
            return;
        }
        let outcome = match staged {
            Ok(_) => "the inputs of a waiting action were staged",
            Err(_) => "the inputs of a waiting action could not be staged; its run stages them itself",
        };
        Event::debug("gorego::worker", STAGED_AHEAD)
            .with("task", request.task.0)
            .with("pool", &*self.settings.pool)
            .with_shown("action_digest", &request.action.digest)
            .with("elapsed_ms", begun.elapsed().as_millis() as u64)
            .with_some("error", staged.as_ref().err().map(|error| Field::Shown(error)))
            .log(format_args!("{outcome}"));
    }
}

counted!(StagingActor);

impl Actor for StagingActor {
    type Context = SyncContext<Self>;
}

impl Receive<StageAhead> for StagingActor {
    type Answer = ();

    fn receive(&mut self, request: StageAhead, _: &mut Self::Context) {
        let begun = Instant::now();
        match catch_unwind(AssertUnwindSafe(|| self.stage(&request))) {
            Ok(staged) => self.log(&request, &staged, begun),
            // A panic would end the thread for good.
            Err(panic) => {
                self.settings.metrics.failed(SandboxFailure::Panic);
                Event::error("gorego::worker", STAGING_PANICKED)
                    .with("task", request.task.0)
                    .with("pool", &*self.settings.pool)
                    .with_shown("action_digest", &request.action.digest)
                    .with("error", panic_message(&*panic))
                    .log(format_args!(
                        "staging the inputs of a waiting action panicked; its run stages them itself"
                    ));
            }
        }
    }
}
