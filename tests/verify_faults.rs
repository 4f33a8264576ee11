//! The conformance suite against servers that are wrong on purpose.
#![allow(clippy::unwrap_used, missing_docs)]

mod faults;

#[test]
fn faults_have_names_of_their_own() {
    let mut names = std::collections::HashSet::new();
    for fault in faults::all() {
        assert!(names.insert(fault.name), "{}", fault.name);
    }
}
