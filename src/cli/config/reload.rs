//! `gorego config reload`.

use super::super::{EXIT_FAILURE, EXIT_OK, ReloadArgs, block_on, complain, ops::connect, output::print};
use gorego_reapi::{error::Result, escape::escaped, proto::gorego};
use serde_json::{Value, json};
use std::fmt::Write as _;

/// Has a server read its configuration again, and returns the exit code.
pub(super) fn run(args: &ReloadArgs) -> u8 {
    match block_on(reload(args)) {
        Ok(()) => EXIT_OK,
        Err(error) => {
            complain(&error);
            EXIT_FAILURE
        }
    }
}

async fn reload(args: &ReloadArgs) -> Result<()> {
    let answer = connect(&args.server).await?.reload_config(args.dry_run).await?;
    print(&if args.json {
        format!("{:#}\n", json(&answer, args.dry_run))
    } else {
        description(&answer, args.dry_run)
    })
}

fn description(answer: &gorego::ReloadConfigResponse, dry_run: bool) -> String {
    let mut text = String::new();
    let title = if dry_run { "would change" } else { "changed" };
    for (title, changes) in [(title, &answer.applied), ("needs a restart", &answer.needs_restart)] {
        for gorego::ConfigChange { key, description } in changes {
            // Writing to a String cannot fail.
            let _ = writeln!(text, "{title}: {}: {}", escaped(key), escaped(description));
        }
    }
    for warning in &answer.warnings {
        let _ = writeln!(text, "warning: {}", escaped(warning));
    }
    if answer.applied.is_empty() && answer.needs_restart.is_empty() {
        text.push_str("nothing has changed\n");
    }
    text
}

fn json(answer: &gorego::ReloadConfigResponse, dry_run: bool) -> Value {
    let changes = |changes: &[gorego::ConfigChange]| -> Vec<Value> {
        let change =
            |change: &gorego::ConfigChange| json!({ "key": change.key, "description": change.description });
        changes.iter().map(change).collect()
    };
    json!({
        "dry_run": dry_run,
        "applied": changes(&answer.applied),
        "needs_restart": changes(&answer.needs_restart),
        "warnings": answer.warnings,
    })
}
