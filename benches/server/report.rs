//! The table that a run prints.

/// The rows in the order of measurement.
#[derive(Default)]
pub(crate) struct Report(Vec<Row>);

struct Row {
    what: String,
    measured: String,
    limit: String,
    goal: String,
    reached: bool,
}

impl Report {
    /// Adds a row: the measurement, the result, the limit of the machine, and the goal with its verdict.
    pub(crate) fn add(&mut self, what: &str, measured: String, limit: String, goal: &str, reached: bool) {
        eprintln!("{what}: {measured} (limit {limit}; goal {goal}: {})", verdict(reached));
        self.0.push(Row { what: what.into(), measured, limit, goal: goal.into(), reached });
    }

    /// Prints the rows as a Markdown table.
    pub(crate) fn print(&self) {
        println!("| what | measured | this machine's limit, same run | goal | |");
        println!("|---|---|---|---|---|");
        for Row { what, measured, limit, goal, reached } in &self.0 {
            println!("| {what} | {measured} | {limit} | {goal} | {} |", verdict(*reached));
        }
    }
}

fn verdict(reached: bool) -> &'static str {
    if reached { "reached" } else { "not reached" }
}
