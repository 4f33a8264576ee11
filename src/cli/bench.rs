//! `gorego bench`: measures a server, or this machine, and prints the results.

use super::{
    BenchArgs,
    output::{Printout, finish},
    progress::ProgressLine,
};
use gorego_bench::{self as bench, Limits, Options, Pace, Progress, Target};
use gorego_client::{Client, Identity};
use gorego_reapi::error::{Error, Result};
use std::{fmt::Write as _, fs, path::Path};

/// The word in place of an endpoint that asks for the limits of this machine.
const LIMITS: &str = "limits";

/// Measures, and returns the exit code.
pub(super) fn run(args: &BenchArgs) -> u8 {
    let measured = if args.list {
        Ok((list(), true))
    } else if args.endpoint == LIMITS {
        in_runtime(limits(args))
    } else {
        in_runtime(server(args))
    };
    finish(measured)
}

fn in_runtime(work: impl Future<Output = Result<Printout>>) -> Result<Printout> {
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build();
    runtime.map_err(|error| Error::io("start the threads of a client", &error))?.block_on(work)
}

fn list() -> String {
    let mut text = String::new();
    for scenario in bench::scenarios() {
        let limit = scenario.limit().map(|limit| format!(", limit {limit}")).unwrap_or_default();
        let _ =
            writeln!(text, "{:<22}{} ({} callers{limit})", scenario.name, scenario.about, scenario.callers);
    }
    let _ = writeln!(text, "{LIMITS:<22}in place of a server: what this machine can do without one");
    text
}

async fn limits(args: &BenchArgs) -> Result<Printout> {
    if !args.scenarios.is_empty() || args.compare.is_some() || args.limits {
        return Err(Error::Invalid("`gorego bench limits` takes no scenarios, --compare or --limits".into()));
    }
    let line = ProgressLine::new();
    let say = |progress: Progress| line.say(&progress.to_string());
    let limits = Limits::measure(&args.directory, &options(args), &say).await?;
    line.clear();
    Ok((if args.json { limits.json() + "\n" } else { limits.table() }, true))
}

async fn server(args: &BenchArgs) -> Result<Printout> {
    if bench::scenarios().any(|scenario| scenario.name == args.endpoint) {
        return Err(Error::Invalid(format!(
            "\"{}\" is a scenario; name the server before it, as in `gorego bench grpc://127.0.0.1:50051 {}`",
            args.endpoint, args.endpoint
        )));
    }
    if let Some(pid) = args.pid.filter(|pid| !Path::new(&format!("/proc/{pid}")).exists()) {
        return Err(Error::Invalid(format!("there is no process {pid} on this machine (--pid)")));
    }
    let chosen = bench::find(&args.scenarios)?;
    // This file is read before the run, so that an unusable file is reported at once.
    let before = args.compare.as_deref().map(read).transpose()?;
    let identity = Identity {
        tool: "gorego-bench".into(),
        invocation_id: uuid::Uuid::new_v4().to_string(),
        ..Identity::default()
    };
    let server = args.connect.options(&args.endpoint)?;
    let client = Client::connect(server, &args.instance, &identity).await?;
    let line = ProgressLine::new();
    let say = |progress: Progress| line.say(&progress.to_string());
    let report = bench::run(&Target::new(&client), &chosen, &options(args), &say).await?;
    line.clear();
    let text = match before {
        Some(before) => bench::compare(&before, &report)?,
        None if args.json => report.json() + "\n",
        None => report.table(),
    };
    Ok((text, report.is_clean()))
}

fn options(args: &BenchArgs) -> Options {
    Options {
        callers: args.callers.map(usize::from),
        pace: args.rate.map_or(Pace::Closed, Pace::Open),
        warm_up: args.warm_up,
        duration: args.duration,
        pid: args.pid,
        limits: args.limits.then(|| args.directory.clone()),
    }
}

fn read(path: &Path) -> Result<String> {
    fs::read_to_string(path)
        .map_err(|error| Error::Invalid(format!("could not read {}: {error}", path.display())))
}
