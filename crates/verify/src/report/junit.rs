//! Writes a report as JUnit XML: one suite per group, one case per check.
//!
//! JUnit has no warnings. A warning is written as a skipped case with a message, and as a failure in a strict run. An
//! inconclusive check is an `error`, which JUnit distinguishes from a failure. If no check was performed, one more case
//! has an error, because a report with skipped cases alone counts as a success.

use super::{CheckOutcome, Judgement, NOTHING_VERIFIED, Report, Row};
use crate::groups;
use gorego_reapi::error::{Error, Result};
use quick_junit::{NonSuccessKind, Report as Xml, TestCase, TestCaseStatus, TestSuite};

impl Report {
    /// The report as JUnit XML.
    ///
    /// # Errors
    /// `Internal` when it cannot be written as XML.
    pub fn junit(&self, strict: bool) -> Result<String> {
        let mut xml = Xml::new("gorego verify");
        xml.set_time(self.elapsed);
        for group in groups::ALL {
            let rows = self.group(group.name);
            if rows.is_empty() {
                continue;
            }
            let mut suite = TestSuite::new(group.name);
            suite.add_property(("endpoint", self.endpoint.as_str()));
            suite.add_test_cases(rows.into_iter().map(|row| case(row, strict)));
            xml.add_test_suite(suite);
        }
        if !self.has_verified() {
            let mut status = TestCaseStatus::non_success(NonSuccessKind::Error);
            status.set_message(NOTHING_VERIFIED);
            let mut suite = TestSuite::new("run");
            suite.add_test_case(TestCase::new("a check is performed", status));
            xml.add_test_suite(suite);
        }
        xml.to_string().map_err(Error::internal)
    }
}

fn case(row: &Row, strict: bool) -> TestCase {
    let judgement = row.judgement(strict);
    let (mut status, message) = match &row.outcome {
        CheckOutcome::Pass => (TestCaseStatus::success(), String::new()),
        CheckOutcome::Fail { expected, observed } => {
            let status = match judgement {
                Judgement::Fail => TestCaseStatus::non_success(NonSuccessKind::Failure),
                _ => TestCaseStatus::skipped(),
            };
            (status, format!("{judgement} ({}): expected {expected}; observed {observed}", row.level))
        }
        CheckOutcome::Inconclusive { needs, expected, observed } => {
            let needs = needs.map(|rule| format!(" (needs {rule})")).unwrap_or_default();
            let message =
                format!("a preparatory step failed{needs}: expected {expected}; observed {observed}");
            (TestCaseStatus::non_success(NonSuccessKind::Error), message)
        }
        CheckOutcome::Absent(why) | CheckOutcome::Skipped(why) => {
            (TestCaseStatus::skipped(), format!("{judgement}: {why}"))
        }
    };
    if !message.is_empty() {
        status.set_message(message);
    }
    let mut case = TestCase::new(format!("{} {}", row.rules.join(" "), row.title), status);
    case.set_classname(format!("gorego.verify.{}", row.group()));
    case.set_time(row.elapsed);
    case
}
