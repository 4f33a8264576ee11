//! `gorego ops cancel`: cancels the named operations, or all operations that match a filter.

use super::{
    super::{complain, output::print, print_note, table::terminal_width},
    CancelArgs, FilterArgs, code, connect,
    list::rows,
    names,
};
use gorego_client::Client;
use gorego_reapi::error::{Error, Result};
use std::time::SystemTime;

pub(super) async fn cancel(args: &CancelArgs) -> Result<u8> {
    if !args.operations.is_empty() && args.filter != FilterArgs::default() {
        return Err(Error::invalid("write either names of operations or a filter, not both"));
    }
    let client = connect(&args.server).await?;
    if !args.operations.is_empty() {
        let mut all_done = true;
        for written in &args.operations {
            all_done &= match names::resolve(&client, written).await {
                Ok(name) => cancel_one(&client, &name).await,
                Err(error) => {
                    complain(&error);
                    false
                }
            };
        }
        return Ok(code(all_done));
    }
    let mut found = Vec::new();
    names::list_each(&client, &args.filter, false, |operation| {
        if operation.finished.is_none() {
            found.push(operation);
        }
        true
    })
    .await?;
    if !args.yes {
        print(&rows(&found, SystemTime::now(), terminal_width()))?;
        let what = if found.len() == 1 { "operation" } else { "operations" };
        print_note(&format!("{} {what} would be cancelled; add --yes to cancel", found.len()));
        return Ok(code(true));
    }
    let mut all_done = true;
    for operation in &found {
        all_done &= cancel_one(&client, &operation.name).await;
    }
    Ok(code(all_done))
}

/// Cancels one operation and reports the outcome. Returns whether it is cancelled now.
async fn cancel_one(client: &Client, name: &str) -> bool {
    let cancelled = match client.cancel(name).await {
        Ok(()) if has_ended_otherwise(client, name).await => {
            Err(Error::Precondition(format!("{name} has already ended; `gorego ops show` says how")))
        }
        Ok(()) => print(&format!("cancelled {name}\n")),
        Err(error) => Err(error),
    };
    cancelled.map_err(|error| complain(&error)).is_ok()
}

/// Whether an operation had ended before its cancellation, which servers accept all the same (OPS-03). A server that
/// does not know it any more has probably cancelled it.
async fn has_ended_otherwise(client: &Client, name: &str) -> bool {
    let finished = client.operation_state(name).await.ok().and_then(|state| state.finished);
    finished.is_some_and(|finished| !matches!(finished.error, Some(Error::Cancelled(_))))
}
