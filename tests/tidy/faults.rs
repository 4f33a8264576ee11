//! The list of faults in `docs/faults.md`: every fault has a test, and every test that it names exists and runs.

use crate::tree::Source;

/// The list of the faults.
pub(crate) const LIST: &str = "docs/faults.md";
/// How many faults the list has at least, so that a table that cannot be read does not pass.
pub(crate) const LEAST: usize = 30;

/// Runs tests that are otherwise ignored, for a shorter time.
pub(crate) const SUITE: &str = "tests/run";

/// What is wrong with the rows of the tables: a fault without a test, or a test that is not there or does not run.
pub(crate) fn untested(files: &[Source], list: &Source) -> Vec<String> {
    let mut problems = Vec::new();
    let suite = files.iter().find(|file| file.path == SUITE).map_or("", |file| &file.text);
    for row in rows(&list.text) {
        let fault = row.split('|').nth(1).unwrap_or_default().trim();
        let tests = named_tests(row);
        if tests.is_empty() {
            problems.push(format!("{LIST}: no test is named for {fault:?}"));
        }
        for (name, link) in tests {
            let path = link.strip_prefix("../").unwrap_or(link);
            match files.iter().find(|file| file.path == path) {
                Some(file) if runs(&file.text, name, suite.contains(name)) => {}
                Some(_) => problems.push(format!("{LIST}: {path} has no test {name} that runs")),
                None => problems.push(format!("{LIST}: {path} with the test {name} does not exist")),
            }
        }
    }
    problems
}

/// The rows of the tables, without their heads.
pub(crate) fn rows(list: &str) -> impl Iterator<Item = &str> {
    let is_row = |line: &&str| line.starts_with("| ") && !line.starts_with("| Fault ");
    list.lines().filter(is_row)
}

/// The tests in a row, each as ``[`name`](path)``.
fn named_tests(row: &str) -> Vec<(&str, &str)> {
    let links = row.split("[`").skip(1);
    let named = links.filter_map(|link| {
        let (name, rest) = link.split_once("`](")?;
        Some((name, rest.split_once(')')?.0))
    });
    named.filter(|(_, path)| path.ends_with(".rs")).collect()
}

/// Whether a file has a test of this name that is not ignored, or a check of the conformance suite.
fn runs(text: &str, name: &str, may_be_ignored: bool) -> bool {
    let lines: Vec<&str> = text.lines().map(str::trim).collect();
    let is_test = |at: usize| {
        let above = lines.iter().take(at).rev();
        let attributes: Vec<_> =
            above.take_while(|line| line.starts_with('#') || line.starts_with("//")).collect();
        let has = |part: &str| attributes.iter().any(|line| line.starts_with('#') && line.contains(part));
        has("test") && (may_be_ignored || !has("ignore"))
    };
    lines.iter().enumerate().any(|(at, line)| {
        let declares = |prefix: &str| {
            line.strip_prefix(prefix)
                .and_then(|rest| rest.strip_prefix(name))
                .is_some_and(|rest| rest.starts_with('('))
        };
        (declares("fn ") || declares("async fn ")) && is_test(at)
            || line.strip_prefix(name).is_some_and(|rest| rest.starts_with(" => \""))
    })
}

#[test]
fn a_fault_without_a_test_that_runs_is_found() {
    let test = |attributes: &str| format!("{attributes}\n    async fn holds() {{}}\nfn holds_too() {{}}\n");
    let files = [
        Source::new("tests/a.rs", &test("#[tokio::test]")),
        Source::new("tests/b.rs", &test("#[test]\n#[ignore = \"long\"]")),
        Source::new("tests/c.rs", "    holds => \"GEN-01\";"),
        Source::new("tests/e.rs", &test("#[test]\n#[ignore = \"long\"]").replace("holds", "survives")),
        Source::new(SUITE, "cargo test -- --ignored survives"),
    ];
    let problems = |row: &str| {
        let list = format!("| Fault | What | Tests |\n|---|---|---|\n| a fault | nothing | {row} |\n");
        untested(&files, &Source::new(LIST, &list)).len()
    };
    assert_eq!(
        problems("[`holds`](../tests/a.rs), [`survives`](../tests/e.rs), [`holds`](../tests/c.rs)"),
        0
    );
    for row in
        ["by hand", "[`holds`](../tests/b.rs)", "[`holds_too`](../tests/a.rs)", "[`hold`](../tests/a.rs)"]
    {
        assert_eq!(problems(row), 1, "{row}");
    }
    assert_eq!(problems("[`holds`](../tests/d.rs) [`x`](../tests/a.rs)"), 2);
}
