//! `gorego ops list`.

use super::{
    super::{
        EXIT_OK,
        output::print,
        print_note,
        table::{Column, short_duration, table, terminal_width},
    },
    ListArgs, connect, names, view,
};
use gorego_client::OperationState;
use gorego_reapi::error::Result;
use serde_json::json;
use std::time::SystemTime;

const COLUMNS: [Column; 9] = [
    Column::word("OPERATION"),
    Column::word("STATE"),
    Column::text("POOL"),
    Column::word("AGE"),
    Column::text("MNEMONIC"),
    Column::text("TARGET"),
    Column::text("WHO"),
    Column::text("BUILD"),
    Column::text("END"),
];

pub(super) async fn list(args: &ListArgs) -> Result<u8> {
    let client = connect(&args.server).await?;
    let mut operations = Vec::new();
    let limit = args.limit as usize;
    let is_cut = names::list_each(&client, &args.filter, args.all, |operation| {
        if operations.len() == limit {
            return false;
        }
        operations.push(operation);
        true
    })
    .await?;
    let now = SystemTime::now();
    if args.json {
        let listed: Vec<_> = operations.iter().map(|operation| view::json(operation, now)).collect();
        print(&format!("{:#}\n", json!({ "operations": listed, "truncated": is_cut })))?;
        return Ok(EXIT_OK);
    }
    print(&rows(&operations, now, terminal_width()))?;
    if is_cut {
        print_note("there are more; raise --limit or narrow the list with a filter");
    }
    Ok(EXIT_OK)
}

/// The operations as a table.
pub(super) fn rows(operations: &[OperationState], now: SystemTime, width: Option<usize>) -> String {
    let short = names::short_ids(operations.iter().map(|operation| operation.name.as_str()));
    let row = |operation: &OperationState| {
        let request = &operation.request;
        vec![
            short.get(operation.name.as_str()).copied().unwrap_or_default().to_owned(),
            view::state(operation).to_owned(),
            view::pool(operation).to_owned(),
            view::age(operation, now).map(short_duration).unwrap_or_default(),
            request.action_mnemonic.clone(),
            request.target_id.clone(),
            client_name(operation),
            request.tool_invocation_id.clone(),
            view::end(operation),
        ]
    };
    table(&COLUMNS, &operations.iter().map(row).collect::<Vec<_>>(), width)
}

/// The principal; for an anonymous one, the address.
fn client_name(operation: &OperationState) -> String {
    let request = &operation.request;
    match request.principal.as_str() {
        "" | "anonymous" => request.peer.clone(),
        principal => principal.to_owned(),
    }
}
