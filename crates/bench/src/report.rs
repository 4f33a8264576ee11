//! [`Report`]: the results of a run, as a table for people and as JSON.

use crate::{Figures, Limit, Options, Pace, Scenario, ServerUse, Target, drive::Measured};
use serde::{Deserialize, Serialize};
use std::fmt::Write as _;

/// The results of a run. Its JSON form is stable: fields are only added.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Report {
    /// URL of the measured server.
    pub endpoint: String,
    /// The instance in which the calls were made.
    pub instance: String,
    /// Calls per second in an open loop; `None` for a closed loop.
    pub rate: Option<f64>,
    /// The scenarios, in the order in which they ran.
    pub scenarios: Vec<ScenarioReport>,
}

/// The result of one scenario.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct ScenarioReport {
    /// Name of the scenario.
    pub name: String,
    /// The unit that `units_per_second` counts.
    pub unit: String,
    /// Number of concurrent callers.
    pub callers: usize,
    /// The figures of the measured calls.
    pub figures: Figures,
    /// The resources that the server used, if its process id was given.
    pub server: Option<ServerUse>,
    /// The limit of the machine that belongs to the scenario, if it was measured in the same run.
    pub limit: Option<Limit>,
    /// The share of the limit that the scenario reached: 1 is all of it.
    pub share: Option<f64>,
}

impl ScenarioReport {
    pub(crate) fn new(scenario: &Scenario, callers: usize, measured: Measured, limit: Option<Limit>) -> Self {
        let Measured { figures, server } = measured;
        let share = limit.as_ref().zip(scenario.bound.as_ref());
        let share = share.and_then(|(limit, bound)| bound.share(&figures, limit));
        let (name, unit) = (scenario.name.to_owned(), scenario.unit.to_owned());
        Self { name, unit, callers, figures, server, limit, share }
    }
}

impl Report {
    pub(crate) fn new(target: &Target, options: &Options) -> Self {
        Self {
            endpoint: target.endpoint.clone(),
            instance: target.instance.clone(),
            rate: match options.pace {
                Pace::Closed => None,
                Pace::Open(rate) => Some(rate),
            },
            scenarios: Vec::new(),
        }
    }

    /// Whether every call succeeded.
    pub fn is_clean(&self) -> bool {
        self.scenarios.iter().all(|scenario| scenario.figures.failed == 0 && scenario.figures.calls > 0)
    }

    /// The results as JSON.
    pub fn json(&self) -> String {
        serde_json::to_string_pretty(self).unwrap_or_default()
    }

    /// The results as a table, with the errors below.
    pub fn table(&self) -> String {
        let mut rows = vec![row(&[
            "scenario", "callers", "calls/s", "units/s", "MB/s", "p50", "p90", "p99", "p99.9", "max",
            "failed", "CPU/call", "RSS",
        ])];
        rows.extend(self.scenarios.iter().map(ScenarioReport::row));
        if self.scenarios.iter().any(|scenario| scenario.limit.is_some()) {
            let cells = self.scenarios.iter().map(ScenarioReport::limit_cells);
            let cells = std::iter::once(["share", "of the limit"].map(str::to_owned)).chain(cells);
            rows.iter_mut().zip(cells).for_each(|(row, cells)| row.extend(cells));
        }
        let mut text = aligned(&rows);
        for scenario in &self.scenarios {
            for (message, count) in &scenario.figures.errors {
                let _ =
                    writeln!(text, "{}: {count} x {}", scenario.name, gorego_reapi::escape::escaped(message));
            }
        }
        text
    }
}

impl ScenarioReport {
    fn row(&self) -> Vec<String> {
        let figures = &self.figures;
        let latency = figures.latency_us;
        let mut cells = vec![self.name.clone(), self.callers.to_string()];
        cells.push(rounded(figures.calls_per_second));
        cells.push(format!("{} {}", rounded(figures.units_per_second), self.unit));
        cells.push(rounded(figures.megabytes_per_second));
        cells.extend([latency.p50, latency.p90, latency.p99, latency.p999, latency.max].map(time));
        cells.push(figures.failed.to_string());
        cells.push(self.server.map_or_else(|| "-".into(), |server| time(server.cpu_us_per_call)));
        cells.push(
            self.server
                .map_or_else(|| "-".into(), |server| format!("{} MB", server.resident_bytes / 1_000_000)),
        );
        cells
    }

    /// The share, and the limit with its name.
    fn limit_cells(&self) -> [String; 2] {
        let limit = self.limit.as_ref().map(|limit| format!("{} {}", limit.name, limit.rate()));
        [self.share.map_or_else(|| "-".into(), percent), limit.unwrap_or_else(|| "-".into())]
    }
}

/// A share, in percent.
pub(crate) fn percent(share: f64) -> String {
    format!("{} %", rounded(share * 100.0))
}

fn row(cells: &[&str]) -> Vec<String> {
    cells.iter().map(|cell| (*cell).to_owned()).collect()
}

/// A table. The first column is aligned to the left, the others to the right.
pub(crate) fn aligned(rows: &[Vec<String>]) -> String {
    let columns = rows.iter().map(Vec::len).max().unwrap_or(0);
    let width = |at: usize| {
        rows.iter().filter_map(|row| row.get(at)).map(|cell| cell.chars().count()).max().unwrap_or(0)
    };
    let widths: Vec<usize> = (0..columns).map(width).collect();
    let mut text = String::new();
    for cells in rows {
        let mut line = String::new();
        for (at, (cell, width)) in cells.iter().zip(&widths).enumerate() {
            let _ = if at == 0 { write!(line, "{cell:<width$}") } else { write!(line, "  {cell:>width$}") };
        }
        text.push_str(line.trim_end());
        text.push('\n');
    }
    text
}

/// A number with three significant digits or no decimals.
pub(crate) fn rounded(number: f64) -> String {
    match number {
        _ if number >= 100.0 => format!("{number:.0}"),
        _ if number >= 10.0 => format!("{number:.1}"),
        _ => format!("{number:.2}"),
    }
}

/// A time that is given in microseconds.
pub(crate) fn time(micros: f64) -> String {
    match micros {
        _ if micros >= 1e6 => format!("{} s", rounded(micros / 1e6)),
        _ if micros >= 1e3 => format!("{} ms", rounded(micros / 1e3)),
        _ => format!("{} us", rounded(micros)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_short() {
        assert_eq!([1234.5, 99.95, 9.876, 0.0].map(rounded), ["1234", "100.0", "9.88", "0.00"]);
        assert_eq!([2_500_000.0, 1_500.0, 17.4].map(time), ["2.50 s", "1.50 ms", "17.4 us"]);
    }

    #[test]
    fn columns_line_up() {
        let rows = [row(&["a", "b"]), row(&["long", "1"]), row(&["c", "1000"])];
        assert_eq!(aligned(&rows), "a        b\nlong     1\nc     1000\n");
    }
}
