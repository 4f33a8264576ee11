//! The groups of rules with their checks; one file or directory for each.
//!
//! To add a check, write one async function in the file of its group and name it in the file's `CHECKS`. A rule that
//! cannot be checked over the wire is named in the file's `BEYOND`, with what would be needed.

mod action_cache;
mod asset;
mod byte_stream;
mod capabilities;
mod cas;
mod cross_cutting;
mod execution;
mod log_stream;
mod operations;

use super::{
    check::Check,
    rules::{self, Rule},
};

/// A group of rules.
#[derive(Debug)]
pub struct Group {
    /// The prefix of its rule ids, such as `CAS`.
    pub name: &'static str,
    /// The name of the group in reports.
    pub title: &'static str,
    /// All rules of the group.
    pub rules: &'static [Rule],
    checks: &'static [&'static [Check]],
    beyond: &'static [&'static [Beyond]],
}

/// The id of a rule that cannot be checked from outside, and what would be needed.
pub type Beyond = (&'static str, &'static str);

/// All groups, in the order of `docs/rules.md`.
pub const ALL: &[Group] = &[
    Group {
        name: "GEN",
        title: "Cross-cutting",
        rules: rules::GEN,
        checks: &[
            cross_cutting::digests::CHECKS,
            cross_cutting::instances::CHECKS,
            cross_cutting::errors::CHECKS,
            cross_cutting::transport::CHECKS,
            cross_cutting::credentials::CHECKS,
        ],
        beyond: &[],
    },
    Group {
        name: "CAP",
        title: "Capabilities",
        rules: rules::CAP,
        checks: &[capabilities::CHECKS],
        beyond: &[capabilities::BEYOND],
    },
    Group {
        name: "CAS",
        title: "ContentAddressableStorage",
        rules: rules::CAS,
        checks: &[
            cas::find_missing::CHECKS,
            cas::batch_update::CHECKS,
            cas::batch_read::CHECKS,
            cas::tree::CHECKS,
            cas::chunks::CHECKS,
        ],
        beyond: &[cas::BEYOND],
    },
    Group {
        name: "BS",
        title: "ByteStream",
        rules: rules::BS,
        checks: &[
            byte_stream::names::CHECKS,
            byte_stream::read::CHECKS,
            byte_stream::write::CHECKS,
            byte_stream::compressed::CHECKS,
            byte_stream::query::CHECKS,
        ],
        beyond: &[byte_stream::BEYOND],
    },
    Group {
        name: "AC",
        title: "ActionCache",
        rules: rules::AC,
        checks: &[
            action_cache::completeness::CHECKS,
            action_cache::inlining::CHECKS,
            action_cache::updates::CHECKS,
        ],
        beyond: &[action_cache::BEYOND],
    },
    Group {
        name: "EXE",
        title: "Execution",
        rules: rules::EXE,
        checks: &[
            execution::stream::CHECKS,
            execution::cache::CHECKS,
            execution::refusals::CHECKS,
            execution::inputs::CHECKS,
            execution::running::CHECKS,
            execution::outputs::CHECKS,
            execution::trees::CHECKS,
            execution::logs::CHECKS,
        ],
        beyond: &[execution::BEYOND],
    },
    Group {
        name: "OPS",
        title: "Operations",
        rules: rules::OPS,
        checks: &[operations::CHECKS],
        beyond: &[operations::BEYOND],
    },
    Group {
        name: "AST",
        title: "Remote Asset",
        rules: rules::AST,
        checks: &[asset::CHECKS],
        beyond: &[asset::BEYOND],
    },
    Group {
        name: "LOG",
        title: "LogStream",
        rules: rules::LOG,
        checks: &[log_stream::CHECKS],
        beyond: &[log_stream::BEYOND],
    },
];

impl Group {
    /// The checks of the group.
    pub fn checks(&self) -> impl Iterator<Item = &'static Check> + use<> {
        self.checks.iter().flat_map(|file| file.iter())
    }

    /// The rules of the group that have no check, each with the reason.
    pub fn beyond(&self) -> impl Iterator<Item = (&'static Rule, &'static str)> + use<> {
        let known = self.beyond.iter().flat_map(|file| file.iter());
        known.filter_map(|(id, reason)| Some((rules::find(id)?, *reason)))
    }
}
