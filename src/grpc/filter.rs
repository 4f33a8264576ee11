//! The filter of ListOperations: `stage=QUEUED AND done=false invocation=...`.
//!
//! Terms are `key=value`, joined by `AND` or spaces. All of them must match. A value may be quoted to contain spaces.
//! Unknown terms are refused with the grammar and never ignored, because a filter that silently matches everything is
//! worse than none.

use crate::actors::scheduler::{messages::OperationFilter, operation::Stage};
use gorego_reapi::{
    error::{Error, Result},
    escape::shown,
};

/// Longest filter, in bytes.
pub const FILTER_MAX_BYTES: usize = 4 * 1024;

/// The grammar, for error messages.
const GRAMMAR: &str = "terms are stage=QUEUED|EXECUTING|COMPLETED, done=true|false, invocation=ID, target=LABEL, \
     pool=NAME, worker=NAME, operation=ID and instance=NAME, each at most once, joined by AND or spaces";

/// The parsed filter of a ListOperations request.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Filter {
    /// The instance whose operations are requested.
    pub instance: Option<String>,
    /// The conditions on operations of that instance.
    pub operations: OperationFilter,
}

/// Parses a filter. The empty filter matches everything.
///
/// # Errors
/// [`Error::Invalid`] that shows the term and the grammar.
pub fn parse(text: &str) -> Result<Filter> {
    if text.len() > FILTER_MAX_BYTES {
        return Err(Error::Invalid(format!("filter is longer than {FILTER_MAX_BYTES} bytes")));
    }
    let mut filter = Filter::default();
    let mut rest = text.trim_start();
    let mut joined = false;
    while !rest.is_empty() {
        let (word, after) = next_word(rest).ok_or_else(|| refuse(rest))?;
        rest = after.trim_start();
        if word == "AND" {
            // `AND` must be between two terms.
            if joined || rest.is_empty() || filter == Filter::default() {
                return Err(refuse(word));
            }
            joined = true;
            continue;
        }
        joined = false;
        term(&mut filter, word).ok_or_else(|| refuse(word))?;
    }
    Ok(filter)
}

/// Adds one term; `None` when it is unknown, malformed or repeated.
fn term(filter: &mut Filter, word: &str) -> Option<()> {
    let (key, value) = word.split_once('=')?;
    let quoted = value.starts_with('"');
    let value = value.strip_prefix('"').map_or(Some(value), |quoted| quoted.strip_suffix('"'))?;
    if value.contains('"') {
        return None;
    }
    let Filter { instance, operations: filter } = filter;
    match key {
        "stage" => set(
            &mut filter.stage,
            match value {
                "QUEUED" => Stage::Queued,
                "EXECUTING" => Stage::Executing,
                "COMPLETED" => Stage::Completed,
                _ => return None,
            },
        ),
        "done" => set(&mut filter.done, value.parse().ok()?),
        "invocation" if !value.is_empty() => set(&mut filter.invocation, value.to_owned()),
        "target" if !value.is_empty() => set(&mut filter.target, value.to_owned()),
        "pool" if !value.is_empty() => set(&mut filter.pool, value.to_owned()),
        "worker" if !value.is_empty() => set(&mut filter.worker, value.to_owned()),
        "operation" => set(&mut filter.operation, value.parse().ok()?),
        // The empty name of the default instance must be quoted, so that it is not confused with a forgotten value.
        "instance" if !value.is_empty() || quoted => set(instance, value.to_owned()),
        _ => None,
    }
}

fn set<T>(condition: &mut Option<T>, value: T) -> Option<()> {
    condition.replace(value).is_none().then_some(())
}

/// The text up to the next space outside quotes, and the rest; `None` when a quote stays open.
fn next_word(text: &str) -> Option<(&str, &str)> {
    let mut quoted = false;
    for (at, character) in text.char_indices() {
        match character {
            '"' => quoted = !quoted,
            _ if character.is_whitespace() && !quoted => return Some(text.split_at(at)),
            _ => {}
        }
    }
    (!quoted).then_some((text, ""))
}

fn refuse(word: &str) -> Error {
    Error::Invalid(format!("filter: \"{}\" is not understood; {GRAMMAR}", shown(word)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn terms_are_joined_by_and_or_by_spaces() {
        let operations = OperationFilter {
            stage: Some(Stage::Queued),
            done: Some(false),
            invocation: Some("a b".into()),
            target: Some("//pkg:name".into()),
            pool: Some("linux".into()),
            worker: Some("host/linux/0".into()),
            operation: None,
            owner: None,
        };
        let expected = Filter { instance: Some("".into()), operations };
        for text in [
            "stage=QUEUED AND done=false AND invocation=\"a b\" AND target=//pkg:name \
             pool=linux AND worker=host/linux/0 AND instance=\"\"",
            "  target=//pkg:name done=false\tstage=\"QUEUED\" AND invocation=\"a b\" \
             instance=\"\" worker=host/linux/0 pool=\"linux\" ",
        ] {
            assert_eq!(parse(text), Ok(expected.clone()), "{text}");
        }
        assert_eq!(parse("  "), Ok(Filter::default()));
    }

    #[test]
    fn what_is_not_in_the_grammar_is_refused_with_the_grammar() {
        for text in [
            "stage=RUNNING",
            "stage=queued",
            "done=yes",
            "state=QUEUED",
            "QUEUED",
            "stage = QUEUED",
            "invocation=",
            "target=\"\"",
            "pool=",
            "worker=",
            "instance=",
            "target=\"x",
            "target=x\"",
            "target=\"x\"y\"\"",
            "target=x\"y z\"",
            "done=true done=true",
            "AND done=true",
            "done=true AND",
            "done=true AND AND stage=QUEUED",
            "done=true OR stage=QUEUED",
            &"x".repeat(FILTER_MAX_BYTES + 1),
        ] {
            let error = parse(text).unwrap_err().to_string();
            assert!(error.contains("filter"), "{text}: {error}");
        }
        assert!(parse("x=1").unwrap_err().to_string().contains("stage=QUEUED|EXECUTING|COMPLETED"));
    }

    proptest! {
        #[test]
        fn no_text_makes_it_panic(text in "[a-z= \"AND\u{e9}]{0,40}") {
            let _ = parse(&text);
        }
    }
}
