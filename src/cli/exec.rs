//! `gorego exec`: runs one command on a server as if it ran locally.
//!
//! Builds the Action, uploads its blobs, follows the operation, prints standard output and error unmodified while the
//! command runs, downloads the outputs and exits with the exit code of the command. Ctrl-C, SIGTERM, SIGHUP and
//! unwritable output (its reader has exited, its disk is full) cancel the operation on the server before the process
//! exits.

use super::{
    EXIT_INFRASTRUCTURE, EXIT_SIGNALLED, EXIT_TIMEOUT, ExecArgs, complain,
    live::Live,
    output::{Lost, Readers, end_by_sigpipe},
    progress::{self, ProgressLine},
};
use crate::signals::StopSignals;
use gorego_client::{BlobSet, Client, ExecutionEvent, Finished, Identity, Job, Progress, blocking, scan};
use gorego_reapi::{
    digest::Digest,
    error::{Error, Result},
    proto::reapi,
};
use std::{
    collections::BTreeMap,
    io::{self, Write as _},
    path::Path,
    pin::pin,
    sync::Arc,
    time::Duration,
};
use tokio::sync::watch;

/// PATH of the command unless `--env PATH=` is given. Without PATH, a server could not find `sh`.
const DEFAULT_PATH: &str = "/usr/local/bin:/usr/bin:/bin";
/// Time limit for a cancellation before the process exits without its result.
const CANCEL_TIMEOUT: Duration = Duration::from_secs(5);

/// How this process ends.
#[derive(Debug, Clone, PartialEq, Eq)]
enum ExecEnd {
    /// With this exit code.
    Code(u8),
    /// By SIGPIPE, because the reader of the output is gone.
    NobodyReads,
    /// With this error message.
    Failed(Error),
}

/// The operation that must be cancelled on the server if the process exits now.
#[derive(Debug, Clone)]
enum Current {
    Nothing,
    /// An operation whose name is not yet known. The server sends it soon (EXE-01).
    Asked,
    /// The operation with this name.
    Named(Client, String),
}

/// Runs `gorego exec` and returns the exit code of the process.
pub(super) fn run(args: ExecArgs) -> u8 {
    let runtime = match tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build() {
        Ok(runtime) => runtime,
        Err(error) => {
            complain(&Error::Internal(format!("could not start threads: {error}")));
            return EXIT_INFRASTRUCTURE;
        }
    };
    let line = ProgressLine::new();
    let outcome = runtime.block_on(until_stopped(args, &line));
    line.clear();
    // Do not wait for threads that are blocked by a disk or a closed pipe.
    runtime.shutdown_background();
    match outcome {
        Ok(ExecEnd::Code(code)) => code,
        Ok(ExecEnd::NobodyReads) => end_by_sigpipe(),
        Ok(ExecEnd::Failed(error)) | Err(error) => {
            complain(&error);
            EXIT_INFRASTRUCTURE
        }
    }
}

/// Runs the command until it finishes, a signal arrives, or its output cannot be printed.
async fn until_stopped(args: ExecArgs, line: &ProgressLine) -> Result<ExecEnd> {
    let mut signals = StopSignals::of_client()?;
    let (current, watching) = watch::channel(Current::Nothing);
    let readers = Readers::default();
    let mut work = pin!(exec(args, line, &current, readers.clone()));
    let end = tokio::select! {
        // A lost reader takes precedence over the result.
        outcome = &mut work => {
            return if readers.have_left() { Ok(ExecEnd::NobodyReads) } else { outcome.map(ExecEnd::Code) };
        }
        stop = signals.next() => ExecEnd::Code(EXIT_SIGNALLED + stop.number()),
        lost = readers.lost() => match lost {
            Lost::Reader => ExecEnd::NobodyReads,
            Lost::Output(error) => ExecEnd::Failed(error),
        },
    };
    line.say("cancelling");
    tokio::select! {
        // The work continues meanwhile, because it has to learn the name of an operation that was just started.
        _ = work => {}
        () = cancel(watching) => {}
        _ = signals.next() => {}
    }
    Ok(end)
}

async fn exec(
    args: ExecArgs,
    line: &ProgressLine,
    operation: &watch::Sender<Current>,
    readers: Readers,
) -> Result<u8> {
    let identity = Identity {
        tool: "gorego".into(),
        invocation_id: uuid::Uuid::new_v4().to_string(),
        mnemonic: "Exec".into(),
        target_id: String::new(),
    };
    line.say(&format!("connecting to {}", args.endpoint));
    let options = args.connect.options(&args.endpoint)?;
    let client = Client::connect(options, &args.instance, &identity).await?;
    let (output_dir, args) = (args.output_dir.clone(), Arc::new(args));
    line.say("reading the inputs");
    let for_scan = args.clone();
    let (action, blobs) = blocking(move || build(&for_scan)).await?;
    let mut job = Job { action, skip_cache_lookup: args.no_cache, priority: args.priority };
    upload(&client, &blobs, line).await?;
    let mut live = Live::new(readers);
    let destination =
        OutputDestination { client: &client, requested: &args.output, directory: &output_dir, line };
    let mut uploaded_again = false;
    // Each remedy is used once. If it is needed again, the store is too small or its disk is failing.
    let (finished, fetched) = loop {
        let finished = follow(&client, job.clone(), line, operation, &mut live).await;
        if is_missing(&finished) && !uploaded_again {
            // A blob was evicted between upload and start, or is damaged.
            uploaded_again = true;
            upload(&client, &blobs, line).await?;
            continue;
        }
        let finished = finished?;
        if !finished.cached {
            break (finished, None);
        }
        line.say("the result was cached");
        // This is done before printing: if a stored output is damaged, the result is invalid.
        let fetched = destination.fetch(&finished).await;
        if matches!(fetched, Err(Error::NotFound(_))) && !job.skip_cache_lookup {
            job.skip_cache_lookup = true;
            continue;
        }
        break (finished, Some(fetched));
    };
    let code = conclude(&client, &finished, live, line).await?;
    match fetched {
        Some(fetched) => fetched?,
        None => destination.fetch(&finished).await?,
    }
    if let Some(result) = &finished.result {
        warn_of_missing(&args.output, result);
    }
    Ok(code)
}

/// Builds the Action for these arguments, with everything that must be uploaded.
fn build(args: &ExecArgs) -> Result<(Digest, BlobSet)> {
    let mut blobs = BlobSet::default();
    let root = match &args.input {
        Some(directory) => scan(directory, &mut blobs)?,
        None => blobs.add_message(&reapi::Directory::default()),
    };
    // Sorted and unique (the last value wins), so that equal commands have equal digests (EXE-30).
    let mut env: BTreeMap<String, String> = [("PATH".to_owned(), DEFAULT_PATH.to_owned())].into();
    env.extend(args.env.iter().cloned());
    let mut output_paths = args.output.clone();
    output_paths.sort_unstable();
    output_paths.dedup();
    let mut properties = args.platform.clone();
    properties.sort_unstable();
    let platform = (!properties.is_empty()).then(|| reapi::Platform {
        properties: properties
            .into_iter()
            .map(|(name, value)| reapi::platform::Property { name, value })
            .collect(),
    });
    // Servers older than 2.2 read the platform of the Command (EXE-31).
    #[allow(deprecated)]
    let command = reapi::Command {
        arguments: args.command.clone(),
        environment_variables: env
            .into_iter()
            .map(|(name, value)| reapi::command::EnvironmentVariable { name, value })
            .collect(),
        working_directory: args.workdir.clone(),
        output_paths,
        platform: platform.clone(),
        ..Default::default()
    };
    let timeout = args.timeout.map(prost_types::Duration::try_from).transpose();
    let action = reapi::Action {
        command_digest: Some(blobs.add_message(&command).to_wire()),
        input_root_digest: Some(root.to_wire()),
        timeout: timeout.map_err(|_| Error::invalid("--timeout is too long"))?,
        do_not_cache: args.no_cache,
        platform,
        ..Default::default()
    };
    Ok((blobs.add_message(&action), blobs))
}

async fn upload(client: &Client, blobs: &BlobSet, line: &ProgressLine) -> Result<()> {
    let progress = Arc::new(Progress::default());
    line.during("uploading", &progress, client.upload(blobs, &progress)).await.map(|_| ())
}

async fn follow(
    client: &Client,
    job: Job,
    line: &ProgressLine,
    operation: &watch::Sender<Current>,
    live: &mut Live,
) -> Result<Finished> {
    use reapi::execution_stage::Value as Stage;
    line.say("waiting for the server");
    let mut execution = client.execute(job);
    operation.send_replace(Current::Asked);
    let outcome = loop {
        let event = execution.next().await;
        if let Some(name) = execution.name() {
            operation.send_replace(Current::Named(client.clone(), name.to_owned()));
        }
        match event {
            Ok(Some(ExecutionEvent::Stage(stage))) => line.say(match stage {
                Stage::CacheCheck => "looking into the cache",
                Stage::Queued => "queued",
                Stage::Executing => "running",
                Stage::Completed | Stage::Unknown => "done",
            }),
            Ok(Some(ExecutionEvent::Logs(names))) => live.follow(client, &names, line),
            Ok(Some(ExecutionEvent::Waiting(status))) => line.say(&progress::waiting(&status)),
            Ok(Some(ExecutionEvent::Finished(finished))) => break Ok(*finished),
            Ok(None) => break Err(Error::internal("the operation ended without a result")),
            Err(error) => break Err(error),
        }
    };
    // A finished operation need not be cancelled.
    operation.send_replace(Current::Nothing);
    outcome
}

fn is_missing(finished: &Result<Finished>) -> bool {
    let error = match finished {
        Ok(finished) => finished.error.as_ref(),
        Err(error) => Some(error),
    };
    matches!(error, Some(Error::MissingBlobs(_)))
}

/// Prints the output that was not shown yet, and determines the exit code.
async fn conclude(client: &Client, finished: &Finished, live: Live, line: &ProgressLine) -> Result<u8> {
    line.clear();
    live.finish(client, finished.result.as_ref()).await?;
    // For a timeout the error message is sufficient.
    let timed_out = matches!(finished.error, Some(Error::DeadlineExceeded(_)));
    if !finished.message.is_empty() && !timed_out {
        let _ = writeln!(io::stderr(), "gorego: {}", gorego_reapi::escape::escaped(&finished.message));
    }
    match (&finished.error, &finished.result) {
        (None, Some(result)) => Ok(exit_code(result.exit_code)),
        (Some(error @ Error::DeadlineExceeded(_)), _) => {
            complain(error);
            Ok(EXIT_TIMEOUT)
        }
        (Some(error), _) => Err(error.clone()),
        (None, None) => Err(Error::internal("the server sent neither a result nor an error")),
    }
}

/// The exit code of the command as one byte. A value that does not fit becomes a failure, never 0.
fn exit_code(code: i32) -> u8 {
    match code {
        0 => 0,
        code => u8::try_from(code).unwrap_or_else(|_| u8::try_from(code & 0xff).unwrap_or(0).max(1)),
    }
}

/// The destination of downloaded outputs.
struct OutputDestination<'a> {
    client: &'a Client,
    requested: &'a [String],
    directory: &'a Path,
    line: &'a ProgressLine,
}

impl OutputDestination<'_> {
    /// Downloads the requested outputs, if there are any.
    async fn fetch(&self, finished: &Finished) -> Result<()> {
        let (Some(result), false) = (&finished.result, self.requested.is_empty()) else { return Ok(()) };
        let progress = Arc::new(Progress::default());
        let fetching = self.client.download_outputs(result, self.directory, &progress);
        let fetched = self.line.during("downloading", &progress, fetching).await;
        self.line.clear();
        fetched
    }
}

/// The protocol does not treat a missing output as an error (EXE-50), but the user is informed.
#[allow(deprecated)]
fn warn_of_missing(requested: &[String], result: &reapi::ActionResult) {
    let links = result.output_symlinks.iter().chain(&result.output_file_symlinks);
    let links = links.chain(&result.output_directory_symlinks).map(|link| &link.path);
    let files = result.output_files.iter().map(|file| &file.path);
    let directories = result.output_directories.iter().map(|directory| &directory.path);
    let found: Vec<&String> = links.chain(files).chain(directories).collect();
    for path in requested.iter().filter(|path| !found.contains(path)) {
        let _ = writeln!(
            io::stderr(),
            "gorego: the command did not create {}",
            gorego_reapi::escape::escaped(path)
        );
    }
}

/// Cancels the running or starting operation, if there is one, within [`CANCEL_TIMEOUT`].
async fn cancel(mut current: watch::Receiver<Current>) {
    let work = async {
        let known = current.wait_for(|current| !matches!(current, Current::Asked)).await;
        match known.map(|known| known.clone()) {
            Ok(Current::Named(client, name)) => client.cancel(&name).await,
            _ => Ok(()),
        }
    };
    match tokio::time::timeout(CANCEL_TIMEOUT, work).await {
        Ok(Ok(())) => {}
        Ok(Err(error)) => complain(&error),
        Err(_) => complain(&Error::Unavailable("the server is silent; the command may still run".into())),
    }
}
