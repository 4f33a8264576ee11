//! `gorego store purge`: removes results from the action cache by their origin.
//!
//! Without `--yes` it only shows what it would remove. The server works in pages, so a purge can be stopped at any time
//! and started again. If the server restarts meanwhile, the purge starts again automatically.

use super::{
    super::{
        EXIT_FAILURE, EXIT_OK,
        ops::rfc3339,
        output::print,
        print_note,
        progress::ProgressLine,
        table::{Column, table, terminal_width},
    },
    PurgeArgs, connect,
};
use gorego_client::Client;
use gorego_reapi::{
    error::{Error, Result},
    proto::{gorego, reapi},
};
use serde_json::{Value, json};
use std::time::SystemTime;

/// Maximum number of times that a purge starts again because the server was restarted.
const MAX_RESTARTS: usize = 3;

const COLUMNS: [Column; 5] = [
    Column::text("ACTION"),
    Column::word("STORED"),
    Column::text("WHO"),
    Column::text("FROM"),
    Column::text("BUILD"),
];

/// The results that were found so far.
#[derive(Debug, Default)]
struct PurgeTotals {
    found: i64,
    examined: i64,
    unreadable: i64,
}

pub(super) async fn purge(args: &PurgeArgs) -> Result<u8> {
    let client = connect(&args.server).await?;
    let line = ProgressLine::new();
    let purged = run(&client, request(args), args.json, &line).await;
    line.clear();
    let PurgeTotals { found, examined, unreadable } = purged?;
    if args.json {
        print(&format!(
            "{}\n",
            json!({ "summary": {
                "removed": args.yes, "results": found, "examined": examined, "unreadable": unreadable
            } })
        ))?;
    }
    let what = if args.yes { "removed" } else { "would be removed; add --yes to remove them" };
    print_note(&format!("of {examined} results, {found} {what}"));
    if unreadable > 0 {
        print_note(&format!(
            "{unreadable} results could not be read; they are not served, and not removed either"
        ));
        return Ok(EXIT_FAILURE);
    }
    Ok(EXIT_OK)
}

async fn run(
    client: &Client,
    mut request: gorego::PurgeResultsRequest,
    as_json: bool,
    line: &ProgressLine,
) -> Result<PurgeTotals> {
    let (mut sum, mut restarts, mut has_titles) = (PurgeTotals::default(), 0, false);
    loop {
        let page = match client.purge_results(&request).await {
            // The page token belongs to a server that was restarted.
            Err(Error::Invalid(_)) if !request.page_token.is_empty() && restarts < MAX_RESTARTS => {
                restarts += 1;
                request.page_token.clear();
                // All results are looked at again. Those that were removed are gone.
                let found = if request.remove { sum.found } else { 0 };
                sum = PurgeTotals { found, ..PurgeTotals::default() };
                continue;
            }
            page => page?,
        };
        sum.found += page.results.len() as i64;
        sum.examined += page.examined;
        sum.unreadable += page.unreadable;
        if !page.results.is_empty() {
            line.clear();
            print(&if as_json { lines(&page.results) } else { rows(&page.results, !has_titles) })?;
            has_titles = true;
        }
        line.say(&format!("looked at {} results", sum.examined));
        if page.next_page_token.is_empty() {
            return Ok(sum);
        }
        request.page_token = page.next_page_token;
    }
}

fn rows(results: &[gorego::ResultOrigin], with_titles: bool) -> String {
    let row = |result: &gorego::ResultOrigin| {
        let from = if result.worker.is_empty() { &result.peer } else { &result.worker };
        vec![
            action(result),
            rfc3339(result.stored_at.as_ref()).unwrap_or_default(),
            result.principal.clone(),
            from.clone(),
            result.invocation_id.clone(),
        ]
    };
    let text = table(&COLUMNS, &results.iter().map(row).collect::<Vec<_>>(), terminal_width());
    if with_titles { text } else { text.lines().skip(1).map(|line| format!("{line}\n")).collect() }
}

fn lines(results: &[gorego::ResultOrigin]) -> String {
    results.iter().map(|result| format!("{}\n", json!({ "result": origin(result) }))).collect()
}

pub(super) fn action(result: &gorego::ResultOrigin) -> String {
    result
        .action_digest
        .as_ref()
        .map(|digest| format!("{}/{}", digest.hash, digest.size_bytes))
        .unwrap_or_default()
}

/// The origin of a result as JSON.
pub(super) fn origin(result: &gorego::ResultOrigin) -> Value {
    json!({
        "action_digest": action(result),
        "stored_at": rfc3339(result.stored_at.as_ref()),
        "worker": result.worker,
        "invocation_id": result.invocation_id,
        "peer": result.peer,
        "principal": result.principal,
        "private": result.is_private,
    })
}

fn request(args: &PurgeArgs) -> gorego::PurgeResultsRequest {
    let text = |value: &Option<String>| value.clone().unwrap_or_default();
    gorego::PurgeResultsRequest {
        instance_name: args.server.instance.clone(),
        action_digest: args.action.clone(),
        digest_function: args.digest_function.map_or(0, |function| function.wire().into()),
        invocation_id: text(&args.invocation),
        principal: text(&args.principal),
        worker: text(&args.worker),
        since: args.since.map(Into::into),
        remove: args.yes,
        ..Default::default()
    }
}

/// Parses the digest in `--action`, written as HASH/SIZE.
pub(super) fn parse_action(written: &str) -> std::result::Result<reapi::Digest, String> {
    let parts = written.split_once('/').and_then(|(hash, size)| Some((hash, size.parse().ok()?)));
    let (hash, size_bytes) = parts.ok_or("expected HASH/SIZE")?;
    Ok(reapi::Digest { hash: hash.to_owned(), size_bytes })
}

/// Parses `--since`: a duration before now, or a time.
pub(super) fn parse_since(written: &str, now: SystemTime) -> std::result::Result<SystemTime, String> {
    match humantime::parse_duration(written) {
        Ok(ago) => now.checked_sub(ago).ok_or_else(|| "this is too long ago".into()),
        Err(_) => humantime::parse_rfc3339_weak(written)
            .map_err(|_| "expected how long ago, as in 2h, or a time, as in 2026-01-31T12:00:00Z".into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::{Duration, UNIX_EPOCH};

    #[test]
    fn since_accepts_a_duration_or_a_time() {
        let now = UNIX_EPOCH + Duration::from_secs(1_000_000);
        assert_eq!(parse_since("1h 30m", now), Ok(now - Duration::from_secs(5_400)));
        assert_eq!(parse_since("1970-01-01T00:01:00Z", now), Ok(UNIX_EPOCH + Duration::from_secs(60)));
        for bad in ["yesterday", "", "-1h"] {
            assert!(parse_since(bad, now).is_err(), "{bad}");
        }
    }

    #[test]
    fn an_action_is_a_hash_and_a_size() {
        assert_eq!(parse_action("ab/3"), Ok(reapi::Digest { hash: "ab".into(), size_bytes: 3 }));
        for bad in ["ab", "ab/", "ab/x", ""] {
            assert!(parse_action(bad).is_err(), "{bad}");
        }
    }
}
