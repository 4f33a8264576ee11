//! `[log]`: the notation of the log's settings. It is here, so that logging needs nothing of the configuration.

use serde::{Deserialize, Serialize};

/// The `[log]` section: the log on standard error.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct LogConfig {
    /// Levels by target, in env_logger's syntax.
    pub filter: String,
    /// Format of log lines.
    pub format: LogFormat,
}

/// The format of log lines.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum LogFormat {
    /// Text on a terminal, JSON elsewhere.
    Auto,
    /// One JSON object per line.
    Json,
    /// Human-readable text, one line per record.
    Text,
}

impl Default for LogConfig {
    fn default() -> Self {
        Self { filter: "info,h2=warn,hyper=warn,tonic=warn,tower=warn".into(), format: LogFormat::Auto }
    }
}
