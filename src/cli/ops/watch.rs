//! `gorego ops watch`: follows an operation until its end.
//!
//! It uses WaitOperation, which answers at the end of the operation or after a second. So the end is seen at once, and
//! other changes within a second. Unlike WaitExecution, this does not keep an abandoned operation alive.

use super::{
    super::{EXIT_FAILURE, EXIT_OK, EXIT_SIGNALLED, output::print},
    WatchArgs, connect, names, view,
};
use crate::signals::StopSignals;
use gorego_client::{Client, OperationState};
use gorego_reapi::{error::Result, escape::escaped};
use std::{
    fmt::Write as _,
    time::{Duration, SystemTime},
};

/// Interval after which the state is read again, unless the operation ends before.
const LOOK_INTERVAL: Duration = Duration::from_secs(1);

pub(super) async fn watch(args: &WatchArgs) -> Result<u8> {
    let mut signals = StopSignals::of_client()?;
    let client = connect(&args.server).await?;
    let name = names::resolve(&client, &args.operation).await?;
    tokio::select! {
        end = follow(&client, &name, args.json) => end,
        stop = signals.next() => Ok(EXIT_SIGNALLED + stop.number()),
    }
}

async fn follow(client: &Client, name: &str, as_json: bool) -> Result<u8> {
    let mut operation = client.described_operation(name).await?;
    if !as_json {
        let mut text = String::new();
        for (label, value) in view::lines(&operation, SystemTime::now()) {
            if ["operation", "action", "mnemonic", "target", "build", "principal", "peer"].contains(&label) {
                let _ = writeln!(text, "{label:<13} {}", escaped(&value));
            }
        }
        print(&text)?;
    }
    let mut printed = String::new();
    loop {
        let line = state_line(&operation);
        if line != printed {
            let now = SystemTime::now();
            print(&if as_json {
                format!("{}\n", view::json(&operation, now))
            } else {
                format!("{} {}\n", humantime::format_rfc3339_seconds(now), escaped(&line))
            })?;
            printed = line;
        }
        if operation.finished.is_some() {
            return Ok(if view::succeeded(&operation) { EXIT_OK } else { EXIT_FAILURE });
        }
        let request = operation.request;
        operation = OperationState { request, ..client.wait_for_operation(name, LOOK_INTERVAL).await? };
    }
}

fn state_line(operation: &OperationState) -> String {
    let mut line = view::state(operation).to_owned();
    let more = match (&operation.finished, &operation.queue) {
        (Some(_), _) => view::end(operation),
        (None, Some(queue)) => queue.reason.clone(),
        (None, None) => operation.metadata.worker.clone(),
    };
    if !more.is_empty() {
        let _ = write!(line, ": {more}");
    }
    line
}
