//! Names of types: within the server, one name stands for one type.

use crate::tree::Source;
use std::collections::BTreeMap;

/// Names that several types of the server have. New ones need a reason: each type should say in its name what it is.
pub(crate) const SHARED: &[&str] = &["Command", "End", "Fields", "Inner", "Place", "Runner"];

/// Names that stand for several types of the server's product code.
pub(crate) fn homonyms(files: &[Source], shared: &[&str]) -> Vec<String> {
    let paths = paths_by_name(files);
    let is_shared = |name: &str| shared.contains(&name);
    let several = paths.iter().filter(|(name, paths)| paths.len() > 1 && !is_shared(name));
    let several = several
        .map(|(name, paths)| format!("`{name}` is the name of a type in each of {}", paths.join(", ")));
    several.collect()
}

/// Listed names that do not stand for several types any more.
pub(crate) fn stale(files: &[Source], shared: &[&str]) -> Vec<String> {
    let paths = paths_by_name(files);
    let is_stale = |name: &&&str| paths.get(**name).is_none_or(|paths| paths.len() < 2);
    shared
        .iter()
        .filter(is_stale)
        .map(|name| format!("`{name}` is listed, but stands for no two types"))
        .collect()
}

/// The files that declare a type of each name.
fn paths_by_name(files: &[Source]) -> BTreeMap<String, Vec<&str>> {
    let mut paths: BTreeMap<String, Vec<&str>> = BTreeMap::new();
    for file in files.iter().filter(|file| file.is_rust() && file.lies_in(&["src"]) && !file.is_test()) {
        for name in declared(file.code()) {
            paths.entry(name).or_default().push(&file.path);
        }
    }
    paths
}

/// The names of structs, enums and traits that are declared in a file.
fn declared(code: &str) -> Vec<String> {
    let declaration = |line: &str| {
        let line = line.trim_start();
        let line = line.strip_prefix("pub").map_or(line, |rest| {
            let rest = rest.trim_start();
            rest.strip_prefix('(').and_then(|rest| rest.split_once(')')).map_or(rest, |(_, rest)| rest)
        });
        let (keyword, rest) = line.trim_start().split_once(' ')?;
        let name: String = rest.chars().take_while(|c| c.is_alphanumeric() || *c == '_').collect();
        (matches!(keyword, "struct" | "enum" | "trait" | "union") && !name.is_empty()).then_some(name)
    };
    code.lines().filter_map(declaration).collect()
}

#[test]
fn two_types_of_one_name_are_found_unless_the_name_is_listed() {
    let files = [
        Source::new(
            "src/a.rs",
            "pub(crate) struct Found {}\nenum One {}\n#[cfg(test)]\nmod tests {\nstruct Two;",
        ),
        Source::new("src/b.rs", "trait Found<T> {}\nstruct Two;\nlet x = One::new();"),
        Source::new("crates/c/src/lib.rs", "pub struct One;"),
    ];
    assert_eq!(homonyms(&files, &[]), ["`Found` is the name of a type in each of src/a.rs, src/b.rs"]);
    assert!(homonyms(&files, &["Found"]).is_empty());
    assert!(stale(&files, &["Found"]).is_empty());
    assert_eq!(stale(&files, &["One", "Gone"]).len(), 2);
}
