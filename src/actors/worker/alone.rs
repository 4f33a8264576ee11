//! Runs one action without a scheduler, for `gorego replay`. It uses the steps, the staging and the sandbox of a
//! worker.

use super::{
    WorkerSettings,
    cancel::CancelToken,
    launcher::Launcher,
    messages::{RunAction, RunControl, RunOrder, RunReport, StageReached},
    run::ActionRun,
    store::BlobStore,
};
use actix::{Actor, AsyncContext as _, Context, Handler};

/// An actor type whose recipient discards all progress messages.
struct ProgressDiscarded;

impl Actor for ProgressDiscarded {
    type Context = Context<Self>;
}

impl Handler<StageReached> for ProgressDiscarded {
    type Result = ();

    fn handle(&mut self, _: StageReached, _: &mut Self::Context) {}
}

/// Runs an action to its end. This blocks the calling thread.
pub(crate) fn run_alone(
    settings: &WorkerSettings,
    store: &dyn BlobStore,
    launcher: &mut dyn Launcher,
    order: RunOrder,
    cancel: CancelToken,
) -> RunReport {
    // The actor is never started, so messages to it are dropped.
    let progress = Context::<ProgressDiscarded>::new().address().recipient();
    let run = RunAction { order, control: RunControl { cancel, progress } };
    ActionRun::new(settings, store, launcher, &run).execute()
}
