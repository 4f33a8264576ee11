//! The tables of `docs/securing.md`, for the tests that compare them with the code.

const DOCUMENT: &str = include_str!("../../docs/securing.md");

/// The rows of the table below a heading: the texts in backquotes in the first two cells. "any" also counts as a text.
pub(crate) fn table(heading: &str) -> Vec<(Vec<&'static str>, Vec<&'static str>)> {
    let section = DOCUMENT.split(&format!("\n{heading}\n")).nth(1).unwrap();
    let rows = section.lines().skip_while(|line| !line.starts_with("| `"));
    let quoted = |cell: &'static str| cell.split('`').skip(1).step_by(2).collect::<Vec<_>>();
    let rows = rows.take_while(|line| line.starts_with('|')).map(|row| {
        let cells: Vec<&str> = row.trim_matches('|').split('|').collect();
        let needs = if cells[1].trim() == "any" { vec!["any"] } else { quoted(cells[1]) };
        (quoted(cells[0]), needs)
    });
    rows.collect()
}

/// The permissions of a method in the notation of the documentation.
pub(crate) fn written(permissions: super::permission::Permissions) -> Vec<&'static str> {
    if permissions == super::permission::ANY {
        return vec!["any"];
    }
    permissions.iter().map(|permission| permission.name()).collect()
}
