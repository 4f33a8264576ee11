//! `gorego store stats`.

use super::{
    super::{
        EXIT_OK,
        ops::rfc3339,
        output::print,
        table::{Column, short_duration, table, terminal_width},
    },
    StatsArgs, connect,
};
use crate::size::Size;
use gorego_reapi::{duration::time_from_wire, error::Result, proto::gorego};
use serde_json::{Value, json};
use std::time::SystemTime;

const COLUMNS: [Column; 5] = [
    Column::word(""),
    Column::number("COUNT"),
    Column::number("USED"),
    Column::number("LIMIT"),
    Column::number("FULL"),
];

pub(super) async fn stats(args: &StatsArgs) -> Result<u8> {
    let stats = connect(&args.server).await?.store_stats().await?;
    let text = if args.json {
        format!("{:#}\n", json(&stats))
    } else {
        description(&stats, SystemTime::now(), terminal_width())
    };
    print(&text)?;
    Ok(EXIT_OK)
}

/// The numbers as a table, and the rest in sentences.
fn description(stats: &gorego::StoreStats, now: SystemTime, width: Option<usize>) -> String {
    let entries = stats.blobs + stats.results + stats.zstd_forms;
    let mut rows = vec![
        row("store", entries, stats.used_bytes, stats.max_bytes),
        vec!["  blobs".into(), stats.blobs.to_string()],
        vec!["  results".into(), stats.results.to_string()],
        vec!["  zstd forms".into(), stats.zstd_forms.to_string()],
    ];
    let bounded = [("staged trees", &stats.staged_trees), ("images", &stats.images)];
    for (name, stats) in bounded {
        let stats = stats.as_ref();
        rows.extend(stats.map(|stats| row(name, stats.count, stats.bytes, stats.max_bytes)));
    }
    let mut text = table(&COLUMNS, &rows, width);
    let since = |timestamp: Option<&prost_types::Timestamp>| {
        let passed = timestamp.and_then(time_from_wire)?;
        Some(short_duration(now.duration_since(passed).ok()?))
    };
    let mut say = |line: String| {
        text.push_str(&line);
        text.push('\n');
    };
    say(String::new());
    if let Some(age) = since(stats.oldest_use.as_ref()) {
        say(format!("oldest use     {age} ago"));
    }
    let evicted = stats.evicted_entries;
    let uptime = since(stats.started_at.as_ref()).unwrap_or_else(|| "?".into());
    say(format!(
        "evicted        {evicted} entries ({}) in {uptime} since the start",
        size(stats.evicted_bytes)
    ));
    say(format!("in use         {} by actions and readers", size(stats.held_bytes)));
    let lost = match stats.broken_promises {
        0 => String::new(),
        lost => format!("; {lost} leased entries were lost"),
    };
    if stats.compressed_blobs > 0 {
        let saved = stats.compressed_content_bytes.saturating_sub(stats.compressed_used_bytes);
        say(format!(
            "compressed     {} blobs of {} in {}; saves {}",
            stats.compressed_blobs,
            size(stats.compressed_content_bytes),
            size(stats.compressed_used_bytes),
            size(saved)
        ));
    }
    say(format!("leased         {} to builds{lost}", size(stats.leased_bytes)));
    say(format!(
        "uploads        {} running, {} broken; {} reserved",
        stats.running_uploads,
        stats.partial_uploads,
        size(stats.reserved_bytes)
    ));
    if let Some(free) = stats.disk_free_bytes {
        say(format!("disk           {} free", size(free)));
    }
    text
}

fn row(name: &str, count: i64, bytes: i64, max_bytes: i64) -> Vec<String> {
    let percent = bytes.saturating_mul(100).checked_div(max_bytes).map(|percent| format!("{percent}%"));
    vec![name.to_owned(), count.to_string(), size(bytes), size(max_bytes), percent.unwrap_or_default()]
}

fn size(bytes: i64) -> String {
    Size::from_bytes(u64::try_from(bytes).unwrap_or(0)).rounded().to_string()
}

fn json(stats: &gorego::StoreStats) -> Value {
    let bounded = |stats: &Option<gorego::BoundedStats>| {
        let stats = stats.as_ref();
        stats.map(|stats| json!({ "count": stats.count, "bytes": stats.bytes, "max_bytes": stats.max_bytes }))
    };
    json!({
        "max_bytes": stats.max_bytes,
        "used_bytes": stats.used_bytes,
        "held_bytes": stats.held_bytes,
        "leased_bytes": stats.leased_bytes,
        "broken_promises": stats.broken_promises,
        "reserved_bytes": stats.reserved_bytes,
        "deleting_bytes": stats.deleting_bytes,
        "overhead_bytes": stats.overhead_bytes,
        "blobs": stats.blobs,
        "results": stats.results,
        "zstd_forms": stats.zstd_forms,
        "compressed_blobs": stats.compressed_blobs,
        "compressed_content_bytes": stats.compressed_content_bytes,
        "compressed_used_bytes": stats.compressed_used_bytes,
        "evicted_entries": stats.evicted_entries,
        "evicted_bytes": stats.evicted_bytes,
        "oldest_use": rfc3339(stats.oldest_use.as_ref()),
        "running_uploads": stats.running_uploads,
        "partial_uploads": stats.partial_uploads,
        "disk_free_bytes": stats.disk_free_bytes,
        "staged_trees": bounded(&stats.staged_trees),
        "images": bounded(&stats.images),
        "started_at": rfc3339(stats.started_at.as_ref()),
    })
}
