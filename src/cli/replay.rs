//! `gorego replay`: runs an action of a server again on this machine, in the sandbox that a server here would give it,
//! and compares the outcome with the recorded one.
//!
//! There are three steps: [`fetch`] reads everything from the server, [`mod@run`] stages and runs the action with the
//! code of a worker, and [`compare`] determines the differences. Ctrl-C, SIGTERM and SIGHUP end each step. All files
//! are in one directory ([`Scratch`]), which is removed at the end unless `--keep` is given. The report is printed
//! last, after the clean-up.

mod compare;
mod fetch;
mod launcher;
mod report;
mod run;
mod scratch;
mod store;
mod terminal;

use super::{
    EXIT_OK, EXIT_SIGNALLED, EXIT_USAGE, ReplayArgs, complain, output::print, progress::ProgressLine,
};
use crate::{actors::worker::cancel::CancelToken, signals::StopSignals};
use fetch::Subject;
use gorego_client::blocking;
use gorego_reapi::error::{Error, Result};
use run::{ReplayPlace, Replayed};
use scratch::Scratch;
use std::{
    future::Future,
    io::{self, Write as _},
    pin::pin,
    sync::Arc,
};
use terminal::Terminal;
use tokio::runtime::Handle;

/// The outcome differs from the recorded one. Same code as diff(1).
const EXIT_DIFFERS: u8 = 1;
/// The action could not be replayed or compared. Same code as diff(1).
const EXIT_TROUBLE: u8 = EXIT_USAGE;

/// The text for standard output, and the exit code.
type Conclusion = (String, u8);

/// Why a step ended early.
enum ReplayStop {
    Failed(Error),
    /// A signal with this number.
    Signal(u8),
}

impl From<Error> for ReplayStop {
    fn from(error: Error) -> Self {
        Self::Failed(error)
    }
}

/// Runs `gorego replay` and returns the exit code of the process.
pub(super) fn run(args: ReplayArgs) -> u8 {
    let runtime = match tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build() {
        Ok(runtime) => runtime,
        Err(error) => {
            complain(&Error::Internal(format!("could not start threads: {error}")));
            return EXIT_TROUBLE;
        }
    };
    let line = ProgressLine::new();
    let outcome = runtime.block_on(in_scratch(args, &line));
    line.clear();
    // Do not wait for threads that are blocked by a disk or a closed pipe.
    runtime.shutdown_background();
    let printed = match outcome {
        Ok((text, code)) => print(&text).map(|()| code),
        Err(ReplayStop::Signal(number)) => Ok(EXIT_SIGNALLED + number),
        Err(ReplayStop::Failed(error)) => Err(error),
    };
    printed.unwrap_or_else(|error| {
        complain(&error);
        EXIT_TROUBLE
    })
}

async fn in_scratch(args: ReplayArgs, line: &ProgressLine) -> Result<Conclusion, ReplayStop> {
    let mut signals = StopSignals::of_client()?;
    if args.shell {
        Terminal::check()?;
    }
    let subject = Subject::parse(&args.subject, args.digest_function)?;
    let scratch = Arc::new(Scratch::new()?);
    let outcome = replay(args, subject, &scratch, &mut signals, line).await;
    line.say("removing what was staged");
    // Threads that were stopped by a signal may still hold it.
    scratch.clear();
    outcome
}

async fn replay(
    args: ReplayArgs,
    subject: Subject,
    scratch: &Arc<Scratch>,
    signals: &mut StopSignals,
    line: &ProgressLine,
) -> Result<Conclusion, ReplayStop> {
    let stage = {
        let (config, scratch) = (args.config.clone(), scratch.clone());
        let (runtime, no_sandbox) = (Handle::current(), args.no_sandbox);
        // This comes first, because nothing needs to be fetched if the action cannot be run.
        or_signal(signals, blocking(move || ReplayPlace::open(config, &scratch, &runtime, no_sandbox)))
            .await?
    };
    let fetching = fetch::fetch(&args, subject, stage.default_timeout(), scratch, line);
    let fetched = Arc::new(or_signal(signals, fetching).await?);
    line.clear();
    report::introduce(&fetched, &stage, args.shell);
    line.say("running");
    let ran = run_here(&args, fetched.clone(), stage, scratch, signals).await?;
    line.clear();
    let conclusion = match ran {
        Replayed::ShellEnded => (String::new(), EXIT_OK),
        Replayed::Command(here) => {
            or_signal(signals, report::conclude(&fetched, &here, scratch, args.keep, line)).await?
        }
    };
    if args.keep {
        scratch.keep();
        let kept = format!("gorego: kept {}: {}\n", scratch.path().display(), scratch::CONTENTS);
        let _ = io::stderr().write_all(kept.as_bytes());
    }
    Ok(conclusion)
}

/// Runs the action on a separate thread, which ends the command before this returns.
async fn run_here(
    args: &ReplayArgs,
    fetched: Arc<fetch::FetchedAction>,
    stage: ReplayPlace,
    scratch: &Arc<Scratch>,
    signals: &mut StopSignals,
) -> Result<Replayed, ReplayStop> {
    let (cancel, shell, scratch) = (CancelToken::new(), args.shell, scratch.clone());
    let token = cancel.clone();
    let mut running = pin!(blocking(move || stage.run(&fetched, &scratch, shell, token)));
    tokio::select! {
        ran = &mut running => Ok(ran?),
        stop = signals.next() => {
            cancel.cancel();
            tokio::select! {
                _ = running => {}
                // The runner ends the command when this process has exited.
                _ = signals.next() => {}
            }
            Err(ReplayStop::Signal(stop.number()))
        }
    }
}

/// Waits for some work, or for a signal that ends it.
async fn or_signal<T>(
    signals: &mut StopSignals,
    work: impl Future<Output = Result<T>>,
) -> Result<T, ReplayStop> {
    tokio::select! {
        done = work => Ok(done?),
        stop = signals.next() => Err(ReplayStop::Signal(stop.number())),
    }
}
