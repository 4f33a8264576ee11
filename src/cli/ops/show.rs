//! `gorego ops show`.

use super::{
    super::{complain, output::print},
    ShowArgs, code, connect, names, view,
};
use gorego_reapi::{error::Result, escape::escaped};
use serde_json::{Value, json};
use std::{fmt::Write as _, time::SystemTime};

pub(super) async fn show(args: &ShowArgs) -> Result<u8> {
    let client = connect(&args.server).await?;
    let (mut shown, mut objects, mut all_done) = (String::new(), Vec::new(), true);
    for written in &args.operations {
        let found = async { client.described_operation(&names::resolve(&client, written).await?).await };
        let operation = match found.await {
            Ok(operation) => operation,
            Err(error) => {
                complain(&error);
                all_done = false;
                continue;
            }
        };
        let now = SystemTime::now();
        if args.json {
            objects.push(view::json(&operation, now));
            continue;
        }
        if !shown.is_empty() {
            shown.push('\n');
        }
        for (label, value) in view::lines(&operation, now) {
            // Writing to a String cannot fail.
            let _ = writeln!(shown, "{label:<13} {}", escaped(&value));
        }
    }
    if args.json {
        shown = format!("{:#}\n", json!({ "operations": Value::Array(objects) }));
    }
    print(&shown)?;
    Ok(code(all_done))
}
