//! The modules at the top of each crate, and the actors, which count as such modules. Their imports form no cycles
//! except the listed ones, and each module is on the map of `ARCHITECTURE.md`.

use crate::tree::Source;
use std::collections::{BTreeMap, BTreeSet};

/// The document with the map.
pub(crate) const MAP: &str = "ARCHITECTURE.md";

/// Imports that close a cycle today, each with what would remove it. The list may only get shorter: an entry that
/// closes no cycle any more must be removed.
pub(crate) const CYCLES: &[(&str, &str, &str)] = &[(
    "error",
    "digest",
    "an error names the digests that are missing, and a digest that cannot be parsed is an error",
)];

/// The store is large enough to have rules of its own for its modules: those that are listed here, and the base, which
/// is all of its other files. `src/actors/cas.rs` puts them together, as `src/lib.rs` does with the modules of the
/// server, and belongs to none of them.
pub(crate) const STORE: &str = "src/actors/cas";

/// The modules of the store.
const STORE_MODULES: &[&str] =
    &["index", "volume", "results", "trees", "forms", "resolve", "outputs", "scrub"];

/// The name of the other files of the store.
const BASE: &str = "base";

/// Which modules of the store a module may import, the base included. Nothing leads back, so there are no cycles.
pub(crate) const STORE_ARROWS: &[(&str, &[&str])] = &[
    ("index", &[]),
    ("volume", &["index"]),
    (BASE, &["index", "volume"]),
    ("trees", &[BASE, "index", "volume"]),
    ("forms", &[BASE, "index", "volume"]),
    ("results", &["trees", BASE, "index", "volume"]),
    ("resolve", &["results", "trees", BASE]),
    ("outputs", &["results", BASE, "index", "volume"]),
    ("scrub", &["results", BASE, "index", "volume"]),
];

/// The one file above the modules of the store that fills the index from what the volume and the results say.
const STORE_START: &str = "src/actors/cas/recovery.rs";

/// The parts of the store that may name the file system.
const STORE_ON_DISK: &[&str] = &["src/actors/cas/volume", "src/actors/cas/settings"];

/// The modules that the configuration may import: checked values without state, and the settings of access and logging.
/// Every other module declares the settings that it needs, and `src/server/fill.rs` fills them from the configuration.
pub(crate) const CONFIG_MAY: &[&str] = &[
    "access", "action", "host", "instance", "limits", "logging", "node", "platform", "quotas", "sandbox",
    "size",
];

/// The files and directories that the rules of this file name.
pub(crate) fn places_of_rules() -> impl Iterator<Item = String> {
    let store = STORE_MODULES.iter().map(|module| format!("{STORE}/{module}"));
    let configured = CONFIG_MAY.iter().map(|module| format!("src/{module}"));
    let others = [STORE, STORE_START].iter().chain(STORE_ON_DISK).map(ToString::to_string);
    store.chain(configured).chain(others)
}

/// The imports between the modules of one crate, each with a file that contains it.
pub(crate) type Imports = BTreeMap<String, BTreeMap<String, String>>;

/// The crate and the module of a file: `src/actors/cas/index.rs` is `actors::cas` of `src`.
pub(crate) fn module(path: &str) -> Option<(&str, String)> {
    let end = path.find("src/")? + "src".len();
    let (home, inner) = (&path[..end], path[end + 1..].strip_suffix(".rs")?);
    let known_home = home == "src" || (home.starts_with("crates/") && home.matches('/').count() == 2);
    let mut segments = inner.split('/');
    let first = segments.next()?;
    let module = match (first, segments.next()) {
        ("actors", Some(actor)) => format!("actors::{actor}"),
        _ => first.to_owned(),
    };
    (known_home && !matches!(inner, "lib" | "main")).then_some((home, module))
}

/// The imports between the modules of each crate.
pub(crate) fn imports(files: &[Source]) -> BTreeMap<&str, Imports> {
    let homes: BTreeSet<_> = files.iter().filter_map(|file| module(&file.path)).collect();
    let mut crates: BTreeMap<&str, Imports> = BTreeMap::new();
    for file in files {
        let Some((home, own)) = module(&file.path) else { continue };
        let of_own = crates.entry(home).or_default().entry(own.clone()).or_default();
        for target in paths_from_root(file.code()).iter().map(|path| target(path)) {
            if target != own && homes.contains(&(home, target.clone())) {
                of_own.entry(target).or_insert_with(|| file.path.clone());
            }
        }
    }
    crates
}

/// Modules that the configuration imports and may not.
pub(crate) fn config_strays(imports: &Imports) -> Vec<String> {
    let targets = imports.get("config").into_iter().flatten();
    let strays = targets.filter(|(target, _)| !CONFIG_MAY.contains(&target.as_str()));
    strays
        .map(|(target, file)| {
            format!(
                "{file} imports `{target}`: a module declares its settings, and src/server/fill.rs fills them from the configuration"
            )
        })
        .collect()
}

/// Imports between the modules of the store that are not among the arrows.
pub(crate) fn store_strays(files: &[Source], arrows: &[(&str, &[&str])]) -> Vec<String> {
    let mut strays = Vec::new();
    for file in files.iter().filter(|file| file.path != STORE_START) {
        let Some(own) = store_module(&file.path) else { continue };
        let may = arrows.iter().find(|(module, _)| *module == own).map_or(&[][..], |(_, may)| may);
        for target in store_imports(file) {
            if target != own && !may.contains(&target) {
                strays.push(format!("{} imports `{target}` of the store into `{own}`", file.path));
            }
        }
    }
    strays
}

/// The module of the store that a file belongs to.
fn store_module(path: &str) -> Option<&str> {
    let inner = path.strip_prefix(STORE)?.strip_prefix('/')?.strip_suffix(".rs")?;
    let module = inner.split('/').next()?;
    Some(if STORE_MODULES.contains(&module) { module } else { BASE })
}

/// The modules of the store that a file names. Names of types and constants lead to `cas.rs` itself and are left out.
fn store_imports(file: &Source) -> BTreeSet<&'static str> {
    let code = file.code();
    let depth = file.path.matches('/').count() - STORE.matches('/').count();
    let up = "super::".repeat(depth);
    let mut targets = BTreeSet::new();
    let from_root = paths_from_root(code);
    let from_root = from_root.iter().filter_map(|path| path.strip_prefix("actors::cas::"));
    for path in from_root.map(str::to_owned).chain(paths_from(code, &up)) {
        let module = path.split("::").next().unwrap_or_default();
        match STORE_MODULES.iter().find(|known| **known == module) {
            Some(known) => _ = targets.insert(*known),
            None if module.starts_with(char::is_lowercase) && path.contains("::") => {
                targets.insert(BASE);
            }
            None => {}
        }
    }
    targets
}

/// Files of the store outside the volume that name the file system. A handle that a worker hands over (`fs::File`) is
/// no file of the store, and the settings name the directory that the volume gets.
pub(crate) fn store_disk(files: &[Source]) -> Vec<String> {
    const DISK: &[&str] =
        &["fs", "Path", "PathBuf", "OpenOptions", "FileExt", "MetadataExt", "Metadata", "regular_file"];
    let others = files.iter().filter(|file| {
        file.is_rust() && !file.is_test() && file.lies_in(&[STORE]) && !file.lies_in(STORE_ON_DISK)
    });
    let mut found = Vec::new();
    for file in others {
        let code = file.code().replace("fs::File", "");
        let named = DISK.iter().filter(|word| crate::tree::names(&code, word));
        found.extend(named.map(|word| {
            format!("{} names `{word}`: only {} knows how bytes lie on disk", file.path, STORE_ON_DISK[0])
        }));
    }
    found
}

/// The module that contains a path such as `actors::cas::Cas`.
fn target(path: &str) -> String {
    let mut segments = path.split("::");
    match (segments.next(), segments.next()) {
        (Some("actors"), Some(actor)) => format!("actors::{actor}"),
        (first, _) => first.unwrap_or_default().to_owned(),
    }
}

/// All paths that start with `crate::`, with groups in braces expanded, without `crate::` itself.
fn paths_from_root(code: &str) -> Vec<String> {
    paths_from(code, "crate::")
}

/// The same for another beginning, such as `super::`.
pub(crate) fn paths_from(code: &str, start: &str) -> Vec<String> {
    let compact: String = code.split_whitespace().collect::<Vec<_>>().join(" ");
    let mut found = Vec::new();
    for (at, start) in compact.match_indices(start) {
        if !compact[..at].ends_with(|c: char| c.is_alphanumeric() || matches!(c, '_' | '$' | ':')) {
            expand(&compact[at + start.len()..], "", &mut found);
        }
    }
    found
}

/// Parses one path or group of paths at the start of `rest` and returns what follows it.
fn expand<'a>(rest: &'a str, prefix: &str, found: &mut Vec<String>) -> &'a str {
    let rest = rest.trim_start();
    let Some(mut group) = rest.strip_prefix('{') else {
        let end = rest.find(|c: char| !(c.is_alphanumeric() || c == '_')).unwrap_or(rest.len());
        let path = format!("{prefix}{}", &rest[..end]);
        return match rest[end..].strip_prefix("::") {
            Some(deeper) if end > 0 => expand(deeper, &format!("{path}::"), found),
            _ => {
                found.push(path);
                &rest[end..]
            }
        };
    };
    loop {
        group = group.trim_start_matches([' ', ',']);
        if let Some(after) = group.strip_prefix('}') {
            return after;
        }
        let after = expand(group, prefix, found);
        // Skips `as name` and anything else that is not a path.
        let next = after.find([',', '}']).unwrap_or(after.len());
        group = &after[next..];
        if group.is_empty() {
            return group;
        }
    }
}

/// Cycles among the imports of one crate, except for the listed ones.
pub(crate) fn cycles(imports: &Imports, listed: &[(&str, &str, &str)]) -> Vec<String> {
    let is_listed = |from: &str, to: &str| listed.iter().any(|(a, b, _)| (*a, *b) == (from, to));
    let mut found = Vec::new();
    for (from, targets) in imports {
        for (to, file) in targets.iter().filter(|(to, _)| !is_listed(from, to)) {
            if reaches(imports, to, from, &is_listed) {
                found.push(format!("{file} imports `{to}` into `{from}`, which `{to}` needs in turn"));
            }
        }
    }
    found
}

/// Listed imports that close no cycle in any crate.
pub(crate) fn stale<'a>(
    crates: impl Iterator<Item = &'a Imports> + Clone,
    listed: &[(&str, &str, &str)],
) -> Vec<String> {
    let closes = |from: &str, to: &str| {
        let mut having =
            crates.clone().filter(|imports| imports.get(from).is_some_and(|t| t.contains_key(to)));
        having.any(|imports| reaches(imports, to, from, &|_, _| false))
    };
    let stale = listed.iter().filter(|(from, to, _)| !closes(from, to));
    stale
        .map(|(from, to, _)| format!("`{from}` to `{to}` closes no cycle any more: take it off the list"))
        .collect()
}

/// Whether imports lead from one module to another without the given ones.
fn reaches(imports: &Imports, from: &str, to: &str, without: &dyn Fn(&str, &str) -> bool) -> bool {
    let (mut seen, mut open) = (BTreeSet::new(), vec![from]);
    while let Some(module) = open.pop() {
        if module == to {
            return true;
        }
        if seen.insert(module) {
            let targets = imports.get(module).into_iter().flat_map(BTreeMap::keys);
            open.extend(targets.map(String::as_str).filter(|target| !without(module, target)));
        }
    }
    false
}

/// Modules, crates and directories of tests that are missing on the map, and paths on the map that do not exist.
pub(crate) fn map(files: &[Source], document: &str) -> Vec<String> {
    let named: BTreeSet<_> = entries(document, files).into_iter().flat_map(|entry| entry.places).collect();
    let missing = places(files).into_iter().filter(|place| !named.contains(place.as_str()));
    let missing = missing.map(|place| format!("{place} is not on the map of {MAP}"));
    let exists = |path: &str| files.iter().any(|file| file.lies_in(&[path]) || file.path == path);
    let gone = named
        .iter()
        .filter(|path| !exists(path))
        .map(|path| format!("{MAP} has {path}, which does not exist"));
    missing.chain(gone).collect()
}

/// What must be on the map: the modules of the server, the crates, and the directories of tests.
fn places(files: &[Source]) -> BTreeSet<String> {
    let mut places = BTreeSet::new();
    for file in files {
        let segments: Vec<_> = file.path.split('/').collect();
        match segments.as_slice() {
            ["src", "lib.rs" | "actors.rs"] => {}
            ["src", "actors", name, ..] => {
                _ = places.insert(format!("src/actors/{}", name.trim_end_matches(".rs")))
            }
            ["src", name, ..] => _ = places.insert(format!("src/{}", name.trim_end_matches(".rs"))),
            ["crates" | "tests", name, _, ..] => _ = places.insert(format!("{}/{name}", segments[0])),
            _ => {}
        }
    }
    places
}

/// One entry of the map.
#[derive(Debug)]
pub(crate) struct Entry {
    /// The paths at its start, without `.rs` and the last slash.
    pub(crate) places: Vec<String>,
    /// What the map says about them, on one line.
    pub(crate) text: String,
}

/// The entries of the map. The first path of an entry is relative to the root of the repository; the others are
/// relative to the directory of the previous one or to the root.
pub(crate) fn entries(document: &str, files: &[Source]) -> Vec<Entry> {
    let block = document.split("## Map").nth(1).and_then(|rest| rest.split("```").nth(1)).unwrap_or_default();
    let mut entries: Vec<Entry> = Vec::new();
    for line in block.lines().filter(|line| !line.is_empty()) {
        let mut words = line.split_whitespace().peekable();
        if !line.starts_with(' ') {
            let (mut places, mut beside) = (Vec::new(), String::new());
            while let Some(word) = words.next_if(|word| is_path(word.trim_end_matches(','))) {
                let plain = word.trim_end_matches(',').trim_end_matches('/').trim_end_matches(".rs");
                let path = [format!("{beside}{plain}"), plain.to_owned()];
                let path = path.iter().find(|path| exists(files, path)).unwrap_or(&path[0]).clone();
                beside = path.rfind('/').map_or_else(String::new, |slash| path[..=slash].to_owned());
                places.push(path);
            }
            entries.push(Entry { places, text: String::new() });
        }
        if let Some(entry) = entries.last_mut() {
            for word in words {
                entry.text.push_str(word);
                entry.text.push(' ');
            }
        }
    }
    entries
}

fn is_path(word: &str) -> bool {
    word.ends_with('/') || word.ends_with(".rs")
}

fn exists(files: &[Source], path: &str) -> bool {
    files.iter().any(|file| file.lies_in(&[path]))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn graph(files: &[(&str, &str)]) -> Imports {
        let files: Vec<_> = files.iter().map(|(path, text)| Source::new(path, text)).collect();
        imports(&files).remove("src").unwrap_or_default()
    }

    #[test]
    fn a_file_belongs_to_a_module() {
        assert_eq!(module("src/actors/cas/index.rs"), Some(("src", "actors::cas".into())));
        assert_eq!(module("src/grpc.rs"), Some(("src", "grpc".into())));
        assert_eq!(module("crates/reapi/src/digest/tests.rs"), Some(("crates/reapi/src", "digest".into())));
        assert_eq!(module("src/lib.rs"), None);
        assert_eq!(module("tests/wire/main.rs"), None);
    }

    #[test]
    fn groups_of_imports_are_taken_apart() {
        let paths = paths_from_root(
            "use crate::{\n a::{b, c as d},\n actors::{cas::Cas, worker},\n e,\n}; crate::f::g(); my_crate::h",
        );
        assert_eq!(paths, ["a::b", "a::c", "actors::cas::Cas", "actors::worker", "e", "f::g"]);
    }

    #[test]
    fn a_cycle_is_found_unless_it_is_listed() {
        let files = [
            ("src/a.rs", "use crate::{b::X, b::Y};"),
            ("src/b/c.rs", "crate::c::f()"),
            ("src/c.rs", "use crate::a;"),
        ];
        assert_eq!(cycles(&graph(&files), &[]).len(), 3);
        assert!(cycles(&graph(&files), &[("c", "a", "")]).is_empty());
        assert!(cycles(&graph(&files[..2]), &[]).is_empty());
        let in_tests = [files[0], files[1], ("src/c.rs", "#[cfg(test)]\nuse crate::a;")];
        assert!(cycles(&graph(&in_tests), &[]).is_empty());
    }

    #[test]
    fn an_import_against_the_arrows_of_the_store_is_found() {
        let stray = |path: &str, code: &str| store_strays(&[Source::new(path, code)], STORE_ARROWS).len();
        assert_eq!(stray("src/actors/cas/index.rs", "use super::client::Cas;"), 1);
        assert_eq!(
            stray("src/actors/cas/volume/files.rs", "use crate::{actors::cas::{index::Key, results}};"),
            1
        );
        assert_eq!(stray("src/actors/cas/trees/walk.rs", "use super::super::results::LoadedResult;"), 1);
        assert_eq!(stray("src/actors/cas/client.rs", "use super::{CasActor, forms::chunks::ChunkWork};"), 1);
        let good =
            "use crate::actors::cas::{CasActor, LOG, client::Cas, index::FoundEntry, trees::TreeRoom};";
        assert_eq!(stray("src/actors/cas/results/lookup.rs", good), 0);
        assert_eq!(stray("src/actors/cas.rs", "use results::X; use super::cas::forms::Y;"), 0);
    }

    #[test]
    fn the_arrows_of_the_store_make_no_cycle_and_a_cycle_among_them_is_found() {
        let as_imports = |arrows: &[(&str, &[&str])]| -> Imports {
            let targets = |may: &[&str]| may.iter().map(|to| ((*to).into(), String::new())).collect();
            arrows.iter().map(|(from, may)| ((*from).into(), targets(may))).collect()
        };
        assert_eq!(cycles(&as_imports(STORE_ARROWS), &[]), [""; 0]);
        assert_eq!(cycles(&as_imports(&[("index", &["volume"]), ("volume", &["index"])]), &[]).len(), 2);
    }

    #[test]
    fn a_path_in_the_store_outside_its_volume_is_found() {
        let found = |path: &str, code: &str| store_disk(&[Source::new(path, code)]).len();
        assert_eq!(found("src/actors/cas/blob.rs", "use std::{fs::{self, File}, path::Path};"), 2);
        assert_eq!(found("src/actors/cas/forms/x.rs", "rustix::fs::openat()"), 1);
        assert_eq!(found("src/actors/cas/trees/inputs.rs", "use std::fs::File;"), 0);
        assert_eq!(found("src/actors/cas/volume/files.rs", "use std::fs;"), 0);
        assert_eq!(found("src/actors/worker/dir.rs", "use std::fs;"), 0);
    }

    #[test]
    fn a_module_that_the_configuration_imports_is_found() {
        let files = [
            ("src/config/settings.rs", "use crate::{actors::cas::StoreSettings, grpc::Edge, size::Size};"),
            ("src/actors/cas.rs", ""),
            ("src/grpc.rs", "use crate::config::Config;"),
            ("src/size.rs", ""),
        ];
        assert_eq!(config_strays(&graph(&files)).len(), 2);
        assert_eq!(config_strays(&graph(&files[2..])), [""; 0]);
    }

    #[test]
    fn an_actor_is_a_module_of_its_own() {
        let files =
            [("src/actors/a.rs", "use crate::actors::b;"), ("src/actors/b.rs", "use crate::actors::{a::X};")];
        assert_eq!(cycles(&graph(&files), &[]).len(), 2);
    }

    #[test]
    fn a_listed_cycle_that_is_gone_has_to_go() {
        let one_way = graph(&[("src/a.rs", "use crate::b;"), ("src/b.rs", "")]);
        assert_eq!(stale([&one_way].into_iter(), &[("a", "b", "")]).len(), 1);
        let both = graph(&[("src/a.rs", "use crate::b;"), ("src/b.rs", "use crate::a;")]);
        assert!(stale([&one_way, &both].into_iter(), &[("a", "b", "")]).is_empty());
    }

    #[test]
    fn the_map_has_every_module_and_nothing_else() {
        let files: Vec<_> = [
            "src/a.rs",
            "src/a/x.rs",
            "src/b.rs",
            "src/actors/cas.rs",
            "tests/wire/main.rs",
            "src/lib.rs",
            "build.rs",
        ]
        .iter()
        .map(|path| Source::new(path, ""))
        .collect();
        let document = |lines: &str| format!("## Map\n\n```\n{lines}\n```\n");
        let whole = "src/a.rs, a/ first; b.rs\n             more of b/\nsrc/b.rs  x\nsrc/actors/cas/, build.rs  y\ntests/wire/  z";
        assert_eq!(map(&files, &document(whole)), [""; 0]);
        assert_eq!(map(&files, &document(&whole.replace("src/b.rs", ""))).len(), 1);
        assert_eq!(map(&files, &document(&format!("{whole}\nsrc/gone.rs  w"))).len(), 1);
        assert_eq!(map(&files, "").len(), 4);
    }
}
