//! Names of types: within a crate, one name stands for one type.

use crate::tree::Source;
use std::collections::BTreeMap;

/// Names that stand for several types of the product code of a crate.
pub(crate) fn homonyms(files: &[Source]) -> Vec<String> {
    let paths = paths_by_name(files);
    let several = paths.iter().filter(|(_, paths)| paths.len() > 1);
    let several = several
        .map(|((_, name), paths)| format!("`{name}` is the name of a type in each of {}", paths.join(", ")));
    several.collect()
}

/// The files that declare a type of each name, by the directory of the crate and the name.
fn paths_by_name(files: &[Source]) -> BTreeMap<(&str, String), Vec<&str>> {
    let mut paths: BTreeMap<_, Vec<&str>> = BTreeMap::new();
    for file in files.iter().filter(|file| file.is_rust() && !file.is_test()) {
        let home = match file.path.split_once("src/") {
            Some((home, _)) if home.is_empty() || home.starts_with("crates/") => home,
            _ => continue,
        };
        for name in declared(file.code()) {
            paths.entry((home, name)).or_default().push(&file.path);
        }
    }
    paths
}

/// The names of structs, enums, traits and aliases that are declared in a file. Associated types, which are indented,
/// are left out.
fn declared(code: &str) -> Vec<String> {
    let declaration = |full: &str| {
        let line = full.trim_start();
        let line = line.strip_prefix("pub").map_or(line, |rest| {
            let rest = rest.trim_start();
            rest.strip_prefix('(').and_then(|rest| rest.split_once(')')).map_or(rest, |(_, rest)| rest)
        });
        let (keyword, rest) = line.trim_start().split_once(' ')?;
        let name: String = rest.chars().take_while(|c| c.is_alphanumeric() || *c == '_').collect();
        let is_alias = keyword == "type" && !full.starts_with(' ');
        let is_type = is_alias || matches!(keyword, "struct" | "enum" | "trait" | "union");
        (is_type && !name.is_empty()).then_some(name)
    };
    code.lines().filter_map(declaration).collect()
}

#[test]
fn two_types_of_one_name_are_found_in_one_crate() {
    let files = [
        Source::new(
            "src/a.rs",
            "pub(crate) struct Found {}\nenum One {}\n    type Next = u8;\n#[cfg(test)]\nmod tests {\nstruct Two;",
        ),
        Source::new("src/b.rs", "type Found<T> = T;\nstruct Two;\nlet x = One::new();\ntype Next = u8;"),
        Source::new("crates/c/src/lib.rs", "pub struct One;"),
    ];
    assert_eq!(homonyms(&files), ["`Found` is the name of a type in each of src/a.rs, src/b.rs"]);
}
