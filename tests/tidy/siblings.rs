//! Cycles among the modules that lie beside each other in a directory, at every level of each crate. The modules of the
//! top level are the subject of [`crate::modules`].
//!
//! A module here is a file with everything below its directory. A module may use what its parent declares, and a parent
//! uses its children, so only imports between siblings count. A name that a module re-exports counts as an import of
//! the module that it comes from.

use crate::{
    modules::{Imports, paths_from},
    tree::Source,
};
use std::collections::{BTreeMap, BTreeSet};

/// The names of a crate: the path of a module or of an item in it.
type Name = Vec<String>;

/// The modules of one crate.
#[derive(Default)]
struct Crate<'a> {
    files: BTreeMap<Name, &'a Source>,
    /// The names that modules re-export, with the names that they stand for.
    exports: BTreeMap<Name, Name>,
}

/// The imports between siblings, below the modules of the top level, by crate.
pub(crate) fn imports(files: &[Source]) -> BTreeMap<&str, Imports> {
    let mut crates: BTreeMap<&str, Crate<'_>> = BTreeMap::new();
    for file in files {
        if let Some((home, module)) = module(&file.path) {
            crates.entry(home).or_default().files.insert(module, file);
        }
    }
    let imports = |mut of: Crate<'_>| {
        of.exports = of.files.iter().flat_map(|(module, file)| of.exports_of(module, file)).collect();
        of.imports()
    };
    crates.into_iter().map(|(home, of)| (home, imports(of))).collect()
}

/// The crate and the module of a file of product code. The root of a crate has no name.
fn module(path: &str) -> Option<(&str, Name)> {
    let (home, inner) = path.split_at(path.find("src/")? + "src".len());
    let inner = inner.strip_prefix('/')?.strip_suffix(".rs")?;
    let is_home = home == "src" || (home.starts_with("crates/") && home.matches('/').count() == 2);
    let name = match inner {
        "lib" | "main" => Name::new(),
        _ => inner.split('/').map(str::to_owned).collect(),
    };
    is_home.then_some((home, name))
}

impl Crate<'_> {
    /// Whether there is a module of this name.
    fn has(&self, name: &[String]) -> bool {
        self.files.range(name.to_vec()..).next().is_some_and(|(first, _)| first.starts_with(name))
    }

    /// The names in a file, from the root of the crate.
    fn names(&self, module: &Name, code: &str) -> BTreeSet<Name> {
        let mut names = BTreeSet::new();
        let mut add = |start: &[String], path: &str| {
            let mut name = start.to_vec();
            name.extend(path.split("::").map(str::to_owned));
            names.insert(name);
        };
        paths_from(code, "crate::").iter().for_each(|path| add(&[], path));
        paths_from(code, "self::").iter().for_each(|path| add(module, path));
        for up in 1..=module.len() {
            let start = &module[..module.len() - up];
            let paths = paths_from(code, &"super::".repeat(up));
            paths.iter().filter(|path| !path.starts_with("super")).for_each(|path| add(start, path));
        }
        let children = self.files.keys().filter(|name| name.len() == module.len() + 1);
        for child in children.filter(|name| name.starts_with(module)) {
            let last = child.last().map(String::as_str).unwrap_or_default();
            paths_from(code, &format!("{last}::")).iter().for_each(|path| add(child, path));
        }
        names
    }

    /// What a module re-exports.
    fn exports_of(&self, module: &Name, file: &Source) -> Vec<(Name, Name)> {
        let code = file.code();
        let uses = code.split("pub").skip(1).filter_map(|rest| {
            let rest = rest.trim_start();
            let rest = match rest.strip_prefix('(') {
                Some(rest) => rest.split_once(')')?.1.trim_start(),
                None => rest,
            };
            Some(rest.strip_prefix("use ")?.split_once(';')?.0)
        });
        let names = uses.flat_map(|used| self.names(module, &format!("use {used};")));
        names
            .filter_map(|target| {
                let last = target.last()?.clone();
                let name: Name = module.iter().cloned().chain([last]).collect();
                (name != target).then_some((name, target))
            })
            .collect()
    }

    /// The name that a name stands for, if a module on its way re-exports it.
    fn origin(&self, name: Name) -> Name {
        let mut name = name;
        // A name is re-exported through a few modules at most.
        for _ in 0..8 {
            let exported = (1..=name.len()).find_map(|end| Some((end, self.exports.get(&name[..end])?)));
            let Some((end, target)) = exported else { break };
            name = target.iter().chain(&name[end..]).cloned().collect();
        }
        name
    }

    fn imports(&self) -> Imports {
        let mut imports = Imports::new();
        for (module, file) in &self.files {
            for target in self.names(module, file.code()) {
                let target = self.origin(target);
                let common = module.iter().zip(&target).take_while(|(one, other)| one == other).count();
                let is_top = common == 0 || (common == 1 && module[0] == "actors");
                if is_top || common >= module.len() || common >= target.len() {
                    continue;
                }
                if self.has(&target[..=common]) {
                    let of = imports.entry(module[..=common].join("::")).or_default();
                    of.entry(target[..=common].join("::")).or_insert_with(|| file.path.clone());
                }
            }
        }
        imports
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::modules::cycles;

    fn found(files: &[(&str, &str)]) -> Vec<String> {
        let files: Vec<_> = files.iter().map(|(path, text)| Source::new(path, text)).collect();
        cycles(&imports(&files).remove("src").unwrap_or_default(), &[])
    }

    #[test]
    fn siblings_that_import_each_other_are_found_at_every_level() {
        let two = |one, other| [("src/a/x.rs", one), ("src/a/y.rs", other)];
        assert_eq!(found(&two("use super::y::Y;", "use crate::a::{x::X, z};")).len(), 2);
        assert_eq!(found(&two("use super::y::Y;", "use super::z;")), [""; 0]);
        assert_eq!(found(&two("use super::y::Y;", "#[cfg(test)]\nuse super::x;")), [""; 0]);
        let deep = [
            ("src/a/b/x/in.rs", "use super::super::y;"),
            ("src/a/b/y.rs", "use super::z::Z;"),
            ("src/a/b/z/in.rs", "fn f() { crate::a::b::x::f() }"),
        ];
        assert_eq!(found(&deep).len(), 3);
    }

    #[test]
    fn a_parent_and_its_child_may_know_each_other() {
        let files = [("src/a/b.rs", "mod x; use x::X; use self::x::Y;"), ("src/a/b/x.rs", "use super::Z;")];
        assert_eq!(found(&files), [""; 0]);
    }

    #[test]
    fn a_name_that_the_parent_exports_counts_as_an_import_of_its_module() {
        let parent = ("src/a.rs", "mod x; mod y; pub(crate) use x::{X, deep::Z as W}; pub use self::y::Y;");
        let files = [parent, ("src/a/x.rs", "use super::Y;"), ("src/a/y.rs", "use crate::a::X;")];
        assert_eq!(found(&files).len(), 2);
        assert_eq!(found(&files[..2]), [""; 0]);
    }
}
