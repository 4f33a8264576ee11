//! `gorego store nondeterminism`: the actions that were seen with different outputs.

use super::{
    super::{EXIT_OK, ops::rfc3339, output::print},
    NonDeterminismArgs, connect,
    purge::origin,
};
use gorego_reapi::{error::Result, escape::escaped, proto::gorego};
use serde_json::{Value, json};
use std::fmt::Write as _;

/// Number of reports in a page.
const PAGE: u32 = 100;

pub(super) async fn list(args: &NonDeterminismArgs) -> Result<u8> {
    let client = connect(&args.server).await?;
    let mut reports = Vec::new();
    let mut request = gorego::ListNonDeterminismRequest {
        instance_name: args.server.instance.clone(),
        ..Default::default()
    };
    let limit = args.limit as usize;
    loop {
        let left = args.limit.saturating_sub(reports.len() as u32);
        request.page_size = i32::try_from(left.min(PAGE)).unwrap_or(1);
        let page = client.list_non_determinism(&request).await?;
        reports.extend(page.reports);
        request.page_token = page.next_page_token;
        if request.page_token.is_empty() || reports.len() >= limit {
            break;
        }
    }
    let is_cut = !request.page_token.is_empty();
    if args.json {
        let reports: Vec<Value> = reports.iter().map(json).collect();
        print(&format!("{:#}\n", json!({ "reports": reports, "truncated": is_cut })))?;
        return Ok(EXIT_OK);
    }
    let mut text = String::new();
    for report in &reports {
        if !text.is_empty() {
            text.push('\n');
        }
        describe(&mut text, report);
    }
    if reports.is_empty() {
        text.push_str("no action was seen with different outputs\n");
    }
    print(&text)?;
    if is_cut {
        super::super::print_note("there are more; raise --limit");
    }
    Ok(EXIT_OK)
}

fn describe(text: &mut String, report: &gorego::NonDeterminism) {
    let earlier = report.earlier.clone().unwrap_or_default();
    let later = report.later.clone().unwrap_or_default();
    // Writing to a String cannot fail.
    let _ = writeln!(
        text,
        "action {}: differing outputs: {}; times seen: {}, since {}",
        super::purge::action(&later),
        report.differing_outputs,
        report.times,
        rfc3339(report.first_seen.as_ref()).unwrap_or_default()
    );
    for (which, origin) in [("earlier", &earlier), ("later, in the cache", &later)] {
        let place = if origin.worker.is_empty() { &origin.peer } else { &origin.worker };
        let _ = writeln!(
            text,
            "  {which}: {} from {} by {} for build {}",
            rfc3339(origin.stored_at.as_ref()).unwrap_or_default(),
            escaped(place),
            escaped(&origin.principal),
            escaped(&origin.invocation_id)
        );
    }
    for gorego::OutputDifference { path, earlier, later } in &report.outputs {
        let shown = |side: &str| if side.is_empty() { "(none)".to_owned() } else { escaped(side) };
        let _ = writeln!(text, "  {}\n    {}\n    {}", escaped(path), shown(earlier), shown(later));
    }
}

fn json(report: &gorego::NonDeterminism) -> Value {
    let output = |output: &gorego::OutputDifference| json!({ "path": output.path, "earlier": output.earlier, "later": output.later });
    json!({
        "earlier": report.earlier.as_ref().map(origin),
        "later": report.later.as_ref().map(origin),
        "outputs": report.outputs.iter().map(output).collect::<Vec<_>>(),
        "differing_outputs": report.differing_outputs,
        "times": report.times,
        "first_seen": rfc3339(report.first_seen.as_ref()),
        "last_seen": rfc3339(report.last_seen.as_ref()),
    })
}
