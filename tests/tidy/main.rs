//! Checks that the source tree follows the rules of `ARCHITECTURE.md`, `CONTRIBUTING.md` and `docs/rules.md`.
//!
//! Each rule is a small function from the files to a list of problems, with its own test on a bad sample. This crate
//! uses only the standard library and reads the tree as text, so `.ci/run` can build and run it alone in a few seconds,
//! before anything else is compiled.
#![allow(clippy::unwrap_used)]

mod faults;
mod files;
mod ids;
mod modules;
mod pure;
mod siblings;
mod tree;
mod types;
mod words;

use std::{path::Path, sync::LazyLock};
use tree::Source;

/// The repository. Tests run in the directory of their package, which is the root.
static FILES: LazyLock<Vec<Source>> = LazyLock::new(|| tree::read(Path::new(".")));

fn none(problems: &[String]) {
    assert!(problems.is_empty(), "\n  {}\n", problems.join("\n  "));
}

fn text(path: &str) -> &'static str {
    &FILES.iter().find(|file| file.path == path).unwrap_or_else(|| panic!("{path} is missing")).text
}

#[test]
fn every_rule_that_is_cited_is_listed() {
    none(&ids::unknown(&FILES, &ids::listed(text(ids::LIST)).unwrap()));
}

#[test]
fn every_rule_is_cited_by_a_test_or_a_check() {
    none(&ids::untested(&FILES, &ids::listed(text(ids::LIST)).unwrap(), ids::UNTESTABLE));
}

#[test]
fn the_list_of_rules_and_the_table_of_the_conformance_suite_agree() {
    none(&ids::differences(&ids::listed(text(ids::LIST)).unwrap(), &ids::tabled(text(ids::TABLE))));
}

#[test]
fn nothing_refers_to_documents_that_are_not_here() {
    none(&words::elsewhere(&FILES));
}

#[test]
fn libraries_are_named_only_where_they_belong() {
    none(&words::strays(&FILES, words::WORDS));
}

#[test]
fn the_table_of_restricted_words_is_that_of_the_rules() {
    none(&words::table(text(modules::MAP), words::WORDS));
}

#[test]
fn handlers_do_not_name_what_only_the_store_knows() {
    none(&words::banned(&FILES, words::BANS));
}

#[test]
fn the_places_that_rules_name_exist() {
    none(&words::unused(&FILES, words::WORDS));
    let of_modules: Vec<_> = modules::places_of_rules().collect();
    let others = [ids::LIST, ids::TABLE, ids::CHECKS, faults::LIST, faults::SUITE, files::MESSAGES];
    let banned = words::BANS.iter().flat_map(|ban| ban.places).copied();
    none(&words::gone(&FILES, others.into_iter().chain(banned).chain(of_modules.iter().map(String::as_str))));
}

#[test]
fn pure_code_has_no_clock_and_no_disk() {
    none(&pure::impure(&FILES));
}

#[test]
fn modules_that_call_themselves_pure_are_checked() {
    none(&pure::unclear(&FILES));
}

#[test]
fn the_map_calls_pure_what_is_checked() {
    none(&pure::map(&FILES, text(modules::MAP)));
}

#[test]
fn no_registry_is_named() {
    none(&words::registries(&FILES));
}

#[test]
fn modules_import_each_other_without_cycles() {
    let crates = modules::imports(&FILES);
    let cycles: Vec<_> =
        crates.values().flat_map(|imports| modules::cycles(imports, modules::CYCLES)).collect();
    none(&cycles);
    none(&modules::stale(crates.values(), modules::CYCLES));
}

#[test]
fn modules_beside_each_other_import_each_other_without_cycles() {
    let crates = siblings::imports(&FILES);
    none(&crates.values().flat_map(|imports| modules::cycles(imports, &[])).collect::<Vec<_>>());
}

#[test]
fn the_configuration_imports_no_module_that_it_configures() {
    none(&modules::config_strays(&modules::imports(&FILES)["src"]));
}

#[test]
fn modules_of_the_store_import_each_other_along_the_arrows() {
    none(&modules::store_strays(&FILES, modules::STORE_ARROWS));
}

#[test]
fn only_the_volume_of_the_store_knows_how_bytes_lie_on_disk() {
    none(&modules::store_disk(&FILES));
}

#[test]
fn the_map_is_complete_and_true() {
    none(&modules::map(&FILES, text(modules::MAP)));
}

#[test]
fn every_file_says_what_it_is() {
    none(&files::silent(&FILES));
}

#[test]
fn each_type_of_a_crate_has_its_own_name() {
    none(&types::homonyms(&FILES));
}

#[test]
fn no_file_is_too_long() {
    none(&files::long(&FILES, files::LONGER));
}

#[test]
fn no_comment_is_too_wide() {
    none(&files::wide(&FILES));
}

#[test]
fn documentation_says_more_than_a_name() {
    none(&files::terse(&FILES));
}

#[test]
fn links_between_documents_lead_somewhere() {
    none(&files::dead_links(&FILES));
}

#[test]
fn documents_name_paths_that_exist() {
    none(&files::dead_paths(&FILES));
}

#[test]
fn every_fault_of_the_list_has_a_test() {
    let list = FILES.iter().find(|file| file.path == faults::LIST).expect("the list of faults exists");
    assert!(faults::rows(&list.text).count() >= faults::LEAST);
    none(&faults::untested(&FILES, list));
}

#[test]
fn messages_that_users_look_up_are_those_of_the_program() {
    none(&files::dead_messages(&FILES, text(files::MESSAGES)));
}
