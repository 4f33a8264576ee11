//! `gorego config show`: prints the effective values as a configuration file with the source of each.

use super::{
    Loaded, Settings,
    load::{keys, variable_of},
};
use std::fmt::Write as _;
use toml::Value;

/// The effective values as TOML that can be loaded again. Values with a special meaning (such as 0 for the number of
/// CPUs) are replaced by the values that they stand for.
pub fn show(loaded: &Loaded, settings: &Settings) -> String {
    let mut config = loaded.config.clone();
    config.local_cache_dir.clone_from(&settings.cache_dir);
    if let Some(execution) = &settings.execution {
        // If pools are configured, this must stay 0 so that the output can be loaded.
        if execution.pools.iter().all(|pool| !pool.is_declared) {
            config.execution.concurrency = execution.slots;
        }
        config.execution.build_root.clone_from(&execution.build_root);
    }
    let configured = keys(&loaded.config);
    let mut text = String::new();
    let mut section = "";
    let shown = keys(&config);
    for (key, value) in &shown {
        let (table, name) = key.rsplit_once('.').unwrap_or(("", key));
        if table != section {
            let _ = write!(text, "\n[{table}]\n");
            section = table;
        }
        let derived = configured.iter().any(|(other, before)| other == key && before != value);
        let note = if derived { ", worked out" } else { "" };
        let _ = writeln!(text, "{name} = {}  # {}{note}", inline(value), loaded.origin(key));
    }
    text
}

/// The environment variables that set keys, with the default values, for `--help` and documentation.
pub fn variables() -> Vec<(String, String)> {
    let defaults = keys(&super::Config::default());
    defaults.into_iter().map(|(key, value)| (variable_of(&key), inline(&value))).collect()
}

/// A value on one line of TOML.
fn inline(value: &Value) -> String {
    match value {
        // A multi-line string would separate the value from its comment.
        Value::String(text) if text.contains(['\n', '\r']) => {
            let escaped = text.replace('\\', "\\\\").replace('"', "\\\"");
            format!("\"{}\"", escaped.replace('\n', "\\n").replace('\r', "\\r"))
        }
        other => other.to_string(),
    }
}
