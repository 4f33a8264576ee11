//! The rules of `docs/rules.md`: every cited id exists there, and a test or a check cites every rule.

use crate::tree::Source;
use std::collections::{BTreeMap, BTreeSet};

/// The list of the rules.
pub(crate) const LIST: &str = "docs/rules.md";
/// The conformance suite's table of rules.
pub(crate) const TABLE: &str = "crates/verify/src/rules.rs";
/// The directory with the checks of the conformance suite.
pub(crate) const CHECKS: &str = "crates/verify/src/groups";
/// The prefixes of ids.
const GROUPS: &[&str] = &["GEN", "CAP", "CAS", "BS", "AC", "EXE", "OPS", "AST", "LOG"];
/// The levels of rules.
const LEVELS: &[&str] = &["must", "should", "may"];

/// Rules that no test and no check can cover, each with the reason. Empty today. The rules that cannot be checked from
/// outside (`BEYOND` in the conformance suite) have separate tests.
pub(crate) const UNTESTABLE: &[(&str, &str)] = &[];

/// Every id in a text, such as `CAS-12`.
pub(crate) fn cited(text: &str) -> BTreeSet<&str> {
    let mut found = BTreeSet::new();
    for (at, _) in text.match_indices('-') {
        let begin = text[..at]
            .rfind(|c: char| !c.is_ascii_uppercase())
            .map_or(0, |before| before + text[before..].chars().next().map_or(1, char::len_utf8));
        let digits = text[at + 1..].bytes().take_while(u8::is_ascii_digit).count();
        let preceded = text[..begin].ends_with(|c: char| c.is_alphanumeric() || matches!(c, '_' | '-'));
        let followed = text[at + 1 + digits..].starts_with(|c: char| c.is_alphanumeric() || c == '_');
        if GROUPS.contains(&&text[begin..at]) && digits == 2 && !preceded && !followed {
            found.insert(&text[begin..=at + digits]);
        }
    }
    found
}

/// The rules of the list with their levels: lines that start with `- **CAS-12** (must) `.
///
/// # Errors
/// The fault in a line.
pub(crate) fn listed(list: &str) -> Result<BTreeMap<&str, &str>, String> {
    let mut rules = BTreeMap::new();
    for line in list.lines().filter(|line| line.starts_with("- **")) {
        let rule = line.strip_prefix("- **").and_then(|rest| rest.split_once("** ("));
        let rule = rule.and_then(|(id, rest)| Some((id, rest.split_once(") ")?)));
        let Some((id, (level, text))) = rule else {
            return Err(format!("{LIST}: no rule can be read from {line:?}"));
        };
        if cited(id).first() != Some(&id) || !LEVELS.contains(&level) || text.trim().is_empty() {
            return Err(format!("{LIST}: the id, the level or the text is wrong in {line:?}"));
        }
        if rules.insert(id, level).is_some() {
            return Err(format!("{LIST}: {id} is listed twice"));
        }
    }
    Ok(rules)
}

/// The rules of the conformance suite's table with their levels: `must("CAS-12", "title", "clients"),`.
pub(crate) fn tabled(table: &str) -> BTreeMap<&str, &str> {
    let mut rules = BTreeMap::new();
    for level in LEVELS {
        for (at, call) in table.match_indices(&format!("{level}(")) {
            let arguments = table[at + call.len()..].trim_start();
            if let Some((id, _)) = arguments.strip_prefix('"').and_then(|rest| rest.split_once('"')) {
                rules.insert(id, *level);
            }
        }
    }
    rules
}

/// Differences between the list and the table, in ids and levels.
pub(crate) fn differences(list: &BTreeMap<&str, &str>, table: &BTreeMap<&str, &str>) -> Vec<String> {
    let ids: BTreeSet<_> = list.keys().chain(table.keys()).collect();
    let different = ids.into_iter().filter(|id| list.get(*id) != table.get(*id));
    different
        .map(|id| {
            let show = |level: Option<&&str>| level.map_or("nothing".to_owned(), ToString::to_string);
            format!(
                "{id} is {} in {LIST}, and {} in the table of the suite",
                show(list.get(id)),
                show(table.get(id))
            )
        })
        .collect()
}

/// Ids that are cited but not listed.
pub(crate) fn unknown(files: &[Source], list: &BTreeMap<&str, &str>) -> Vec<String> {
    let cite = |file: &Source| {
        let unknown = cited(&file.text).into_iter().filter(|id| !list.contains_key(id));
        unknown.map(|id| format!("{} cites {id}, which is not in {LIST}", file.path)).collect::<Vec<_>>()
    };
    files.iter().flat_map(cite).collect()
}

/// Rules that neither a test nor a check cites, and exceptions that are not needed.
pub(crate) fn untested(
    files: &[Source],
    list: &BTreeMap<&str, &str>,
    exceptions: &[(&str, &str)],
) -> Vec<String> {
    let mut tested = BTreeSet::new();
    for file in files.iter().filter(|file| file.is_rust() && !file.lies_in(&["tests/tidy"])) {
        let text = if file.lies_in(&[CHECKS]) { registered(&file.text).to_owned() } else { file.tests() };
        tested.extend(cited(&text).into_iter().map(str::to_owned));
    }
    let excepted = |id: &str| exceptions.iter().any(|(except, _)| *except == id);
    let untested = list.keys().filter(|id| !tested.contains(**id) && !excepted(id));
    let untested = untested.map(|id| format!("{id} is cited by no test and no check"));
    let stale = exceptions.iter().filter(|(id, _)| tested.contains(*id) || !list.contains_key(id));
    untested
        .chain(stale.map(|(id, _)| format!("{id} is no exception any more: take it off the list")))
        .collect()
}

/// The registered checks of a file, with the rules that they cover.
fn registered(text: &str) -> &str {
    text.split_once("checks![").and_then(|(_, rest)| rest.split_once("];")).map_or("", |(checks, _)| checks)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn list() -> BTreeMap<&'static str, &'static str> {
        listed("# Rules\n- **CAS-01** (must) One.\n- **CAS-02** (may) Two.\n").unwrap()
    }

    #[test]
    fn ids_are_found_in_prose_and_code() {
        let text = "CAS-01, (EXE-22) \"BS-03\" AC-04..05 xCAS-05 CAS-6 CAS-007 UTF-08 ÄAC-09 é AC-10";
        assert_eq!(
            cited(text).into_iter().collect::<Vec<_>>(),
            ["AC-04", "AC-10", "BS-03", "CAS-01", "EXE-22"]
        );
    }

    #[test]
    fn a_malformed_list_is_refused() {
        assert_eq!(list(), BTreeMap::from([("CAS-01", "must"), ("CAS-02", "may")]));
        for line in [
            "- **CAS-01** One.",
            "- **CAS-01** (shall) One.",
            "- **CAS-1** (must) One.",
            "- **CAS-01** (must) ",
        ] {
            assert!(listed(line).is_err(), "{line}");
        }
        assert!(listed("- **CAS-01** (must) One.\n- **CAS-01** (must) One.").is_err());
    }

    #[test]
    fn the_list_and_the_table_are_compared() {
        let table = tabled("must(\"CAS-01\", \"title\", \"\"),\nmay(\n  \"CAS-02\", \"title\", \"\"),");
        assert!(differences(&list(), &table).is_empty());
        assert_eq!(
            differences(&list(), &tabled("should(\"CAS-01\", \"\", \"\"), may(\"CAS-02\", \"\", \"\")"))
                .len(),
            1
        );
        assert_eq!(differences(&list(), &tabled("must(\"CAS-01\", \"\", \"\"),")).len(), 1);
    }

    #[test]
    fn an_id_that_is_not_listed_is_found() {
        assert!(unknown(&[Source::new("src/a.rs", "// CAS-02")], &list()).is_empty());
        let found = unknown(&[Source::new("src/a.rs", concat!("// CAS", "-77"))], &list());
        assert_eq!(found.len(), 1);
    }

    #[test]
    fn a_rule_without_a_test_is_found() {
        let files = [
            Source::new("src/a.rs", "// CAS-02\n#[cfg(test)] // CAS-01"),
            Source::new("crates/verify/src/groups/cas.rs", "//! CAS-02\nchecks![a => \"CAS-01\"];"),
        ];
        assert_eq!(untested(&files, &list(), &[]), ["CAS-02 is cited by no test and no check"]);
        assert!(untested(&files, &list(), &[("CAS-02", "needs a moon")]).is_empty());
        assert_eq!(
            untested(&files, &list(), &[("CAS-02", ""), ("CAS-01", "")]).len(),
            1,
            "CAS-01 has a test"
        );
        assert!(untested(&[Source::new("tests/a.rs", "CAS-01 CAS-02")], &list(), &[]).is_empty());
    }
}
