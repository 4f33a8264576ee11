//! [`NonDeterminismReports`]: the actions that were seen with different outputs.
//!
//! The later result replaces the earlier one in the action cache. The API demands that: a client replaces a bad entry
//! by an execution with `skip_cache_lookup`, and an update replaces the entry (AC-08). If the earlier result stayed,
//! only an administrator could repair the cache. So that nothing is overwritten silently, each such action gets a
//! report and a warning in the log.
//!
//! Bounds: at most [`MAX_REPORTS`] reports of one action each, the latest ones, with at most [`compare::MAX_OUTPUTS`]
//! outputs each. An action is logged the first time, the second, the fourth and so on. The reports are saved every few
//! seconds and at the end, so a killed server loses the last ones; the log has them. [`compare()`] and [`ReportList`]
//! do no IO.

mod compare;

pub(crate) use compare::{OutputDifferences, compare};

use crate::{logging::Event, state_file};
use gorego_reapi::{
    digest::Digest,
    proto::gorego::{NonDeterminism, ResultOrigin, StoredNonDeterminism},
    wire,
};
use prost::Message as _;
use std::{
    collections::{BTreeMap, HashMap},
    path::PathBuf,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, SystemTime},
};

/// Most reports that are kept.
pub(crate) const MAX_REPORTS: usize = 1_000;
/// How often changed reports are saved.
const SAVE_INTERVAL: Duration = Duration::from_secs(10);
/// The largest file that is read. Files that this server writes are smaller.
const MAX_FILE_BYTES: u64 = 64 * 1024 * 1024;
/// A bound on the memory of the decoded file.
const MAX_FILE_MEMORY: u64 = 256 * 1024 * 1024;
/// Target of this module's log lines.
const LOG: &str = "gorego::nondeterminism";
/// Event of an action with different outputs.
const OUTPUTS_DIFFER: &str = "outputs_differ";

/// What a new result replaces.
#[derive(Debug)]
pub(crate) struct Replacement {
    /// The name of the instance.
    pub(crate) instance: String,
    /// The action of both results.
    pub(crate) action: Digest,
    /// Where the earlier result came from.
    pub(crate) earlier: ResultOrigin,
    /// Where the later one comes from.
    pub(crate) later: ResultOrigin,
    /// The differences between the outputs of the two results.
    pub(crate) differences: OutputDifferences,
}

/// The reports of actions that were seen with different outputs. Cheap to clone.
#[derive(Debug, Clone, Default)]
pub(crate) struct NonDeterminismReports(Arc<ReportsState>);

#[derive(Debug, Default)]
struct ReportsState {
    list: Mutex<ReportList>,
    /// The file in which they are saved; `None` for tests.
    file: Option<PathBuf>,
    /// The number of the last report in the file. The lock is held while the file is written.
    saved: Mutex<u64>,
}

/// The reports in the order in which they were seen last, by ascending numbers.
#[derive(Debug, Default)]
struct ReportList {
    reports: BTreeMap<u64, Arc<NonDeterminism>>,
    /// The number of the report of an action.
    numbers: HashMap<(String, Digest), u64>,
    last: u64,
}

#[derive(Debug, Default)]
pub(crate) struct ReportPage {
    /// The reports of the page, the latest first.
    pub(crate) reports: Vec<Arc<NonDeterminism>>,
    /// The value of `before` for the next page; `None` on the last page.
    pub(crate) next: Option<u64>,
}

impl NonDeterminismReports {
    /// Reads the reports of an earlier run. An unreadable file is logged and ignored. Blocks.
    pub(crate) fn open(file: PathBuf) -> Self {
        let list = match read(&file) {
            Ok(list) => list,
            Err(problem) => {
                Event::warn(LOG, "reports_lost").with("error", &*problem).log(format_args!(
                    "the reports of actions with different outputs could not be read from {}: {problem}",
                    file.display()
                ));
                ReportList::default()
            }
        };
        let saved = Mutex::new(list.last);
        Self(Arc::new(ReportsState { list: Mutex::new(list), file: Some(file), saved }))
    }

    /// Takes a report of a result that is about to be replaced by a different one.
    pub(crate) fn add(&self, replacement: Replacement, now: SystemTime) {
        let report = self.list().add(replacement, now);
        if !report.times.unsigned_abs().is_power_of_two() {
            return;
        }
        let shown = shown_action(&report);
        let later = report.later.as_ref();
        let earlier = report.earlier.as_ref();
        let text = |origin: Option<&ResultOrigin>| origin.map(source).unwrap_or_default();
        Event::warn(LOG, OUTPUTS_DIFFER)
            .with("action_digest", &*shown)
            .with("instance", &*report.instance_name)
            .with("outputs", report.differing_outputs.unsigned_abs())
            .with("times", report.times.unsigned_abs())
            .with("earlier", &*text(earlier))
            .with("later", &*text(later))
            .log(format_args!(
                "an action had other outputs than before; the later result is the one in the action cache"
            ));
    }

    /// A page of the reports of an instance, from this number downwards.
    pub(crate) fn page(&self, instance: &str, before: u64, max: usize) -> ReportPage {
        self.list().page(instance, before, max)
    }

    /// Saves changed reports every [`SAVE_INTERVAL`]. Does not end.
    pub(crate) async fn keep_saved(self) {
        let mut ticks = tokio::time::interval(SAVE_INTERVAL);
        loop {
            ticks.tick().await;
            let reports = self.clone();
            // A failed save is logged, and the next one follows soon.
            let _ = tokio::task::spawn_blocking(move || reports.save()).await;
        }
    }

    /// Saves the reports if they have changed since the last time. Blocks.
    pub(crate) fn save(&self) {
        let Some(file) = &self.0.file else { return };
        let mut saved = self.0.saved.lock().unwrap_or_else(PoisonError::into_inner);
        let (reports, last) = {
            let list = self.list();
            (list.reports.values().cloned().collect::<Vec<_>>(), list.last)
        };
        if *saved == last {
            return;
        }
        let reports = reports.iter().map(|report| (**report).clone()).collect();
        let bytes = StoredNonDeterminism { reports }.encode_to_vec();
        match state_file::replace(file, &bytes) {
            Ok(()) => *saved = last,
            Err(error) => {
                Event::warn(LOG, "reports_not_saved").with_shown("error", &error).log(format_args!(
                    "the reports of actions with different outputs could not be written to {}: {error}",
                    file.display()
                ))
            }
        }
    }

    fn list(&self) -> MutexGuard<'_, ReportList> {
        self.0.list.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl ReportList {
    fn add(&mut self, replacement: Replacement, now: SystemTime) -> Arc<NonDeterminism> {
        let Replacement { instance, action, earlier, later, differences } = replacement;
        let OutputDifferences { outputs, count } = differences;
        let key = (instance.clone(), action);
        let former = self.numbers.remove(&key).and_then(|number| self.reports.remove(&number));
        let report = Arc::new(NonDeterminism {
            earlier: Some(earlier),
            later: Some(later),
            outputs,
            differing_outputs: i64::try_from(count).unwrap_or(i64::MAX),
            times: former.as_ref().map_or(0, |former| former.times).saturating_add(1),
            first_seen: former.and_then(|former| former.first_seen).or(Some(now.into())),
            last_seen: Some(now.into()),
            instance_name: instance,
        });
        self.insert(key, report.clone());
        report
    }

    fn insert(&mut self, key: (String, Digest), report: Arc<NonDeterminism>) {
        self.last += 1;
        self.numbers.insert(key, self.last);
        self.reports.insert(self.last, report);
        if self.reports.len() > MAX_REPORTS
            && let Some((oldest, _)) = self.reports.pop_first()
        {
            self.numbers.retain(|_, number| *number != oldest);
        }
    }

    fn page(&self, instance: &str, before: u64, max: usize) -> ReportPage {
        let mut page = ReportPage::default();
        let of_instance = self.reports.range(..before).rev();
        for (number, report) in of_instance.filter(|(_, report)| report.instance_name == instance) {
            if page.reports.len() == max {
                page.next = Some(number + 1);
                break;
            }
            page.reports.push(report.clone());
        }
        page
    }
}

fn read(file: &std::path::Path) -> Result<ReportList, String> {
    let mut list = ReportList::default();
    let read = state_file::read(file, MAX_FILE_BYTES).map_err(|error| error.to_string())?;
    let Some(bytes) = read else { return Ok(list) };
    let stored: StoredNonDeterminism =
        wire::decode(&bytes[..], MAX_FILE_MEMORY, "list of reports").map_err(|error| error.to_string())?;
    for report in stored.reports {
        let Some(action) = report.later.as_ref().and_then(action_of) else { continue };
        list.insert((report.instance_name.clone(), action), Arc::new(report));
    }
    Ok(list)
}

fn action_of(origin: &ResultOrigin) -> Option<Digest> {
    let function = gorego_reapi::digest::DigestFunction::from_wire(origin.digest_function).ok()?;
    Digest::from_wire(function, origin.action_digest.as_ref(), "action_digest").ok()
}

fn shown_action(report: &NonDeterminism) -> String {
    let digest = report.later.as_ref().and_then(|later| later.action_digest.as_ref());
    digest.map(|digest| format!("{}/{}", digest.hash, digest.size_bytes)).unwrap_or_default()
}

/// A short description of the origin of a result.
fn source(origin: &ResultOrigin) -> String {
    let place = if origin.worker.is_empty() { &origin.peer } else { &origin.worker };
    format!("{place} ({})", origin.principal)
}

#[cfg(test)]
mod tests {
    use super::*;
    use gorego_reapi::{digest::DigestFunction, proto::gorego::OutputDifference};

    fn replacement(instance: &str, name: u32) -> Replacement {
        let action = DigestFunction::Sha256.digest(&name.to_le_bytes());
        let origin = |worker: &str| ResultOrigin {
            action_digest: Some(action.to_wire()),
            digest_function: action.function().wire().into(),
            worker: worker.into(),
            ..Default::default()
        };
        let output = OutputDifference { path: "a".into(), earlier: "1".into(), later: "2".into() };
        Replacement {
            instance: instance.into(),
            action,
            earlier: origin("host/0"),
            later: origin("host/1"),
            differences: OutputDifferences { outputs: vec![output], count: 1 },
        }
    }

    fn times(page: &ReportPage) -> Vec<i64> {
        page.reports.iter().map(|report| report.times).collect()
    }

    #[test]
    fn an_action_has_one_report_that_counts_and_the_latest_come_first() {
        let mut list = ReportList::default();
        let start = SystemTime::UNIX_EPOCH;
        for (name, seconds) in [(1, 1), (2, 2), (1, 3)] {
            list.add(replacement("", name), start + Duration::from_secs(seconds));
        }
        list.add(replacement("other", 1), start);
        let first = list.page("", u64::MAX, 1);
        assert_eq!(times(&first), [2]);
        let seen = |time: &Option<prost_types::Timestamp>| time.as_ref().unwrap().seconds;
        assert_eq!((seen(&first.reports[0].first_seen), seen(&first.reports[0].last_seen)), (1, 3));
        let second = list.page("", first.next.unwrap(), 1);
        assert_eq!((times(&second), second.next), (vec![1], None));
    }

    #[test]
    fn the_oldest_reports_go_when_there_are_too_many() {
        let mut list = ReportList::default();
        for name in 0..MAX_REPORTS as u32 + 10 {
            list.add(replacement("", name), SystemTime::UNIX_EPOCH);
        }
        assert_eq!((list.reports.len(), list.numbers.len()), (MAX_REPORTS, MAX_REPORTS));
        let oldest = list.reports.first_key_value().unwrap().1.clone();
        assert_eq!(action_of(oldest.later.as_ref().unwrap()), Some(replacement("", 10).action));
    }

    #[test]
    fn reports_survive_a_restart_and_a_damaged_file_is_forgotten() {
        let directory = tempfile::tempdir().unwrap();
        let file = directory.path().join("reports");
        let reports = NonDeterminismReports::open(file.clone());
        reports.add(replacement("", 1), SystemTime::UNIX_EPOCH);
        reports.add(replacement("", 2), SystemTime::UNIX_EPOCH);
        reports.save();
        let again = NonDeterminismReports::open(file.clone());
        assert_eq!(times(&again.page("", u64::MAX, 9)), [1, 1]);
        again.add(replacement("", 1), SystemTime::UNIX_EPOCH);
        assert_eq!(times(&again.page("", u64::MAX, 9)), [2, 1]);
        // The damaged file still decodes, to a report with another worker.
        let mut bytes = std::fs::read(&file).unwrap();
        let at = bytes.windows(6).position(|part| part == b"host/1").unwrap();
        bytes[at] ^= 1;
        std::fs::write(&file, bytes).unwrap();
        assert_eq!(times(&NonDeterminismReports::open(file).page("", u64::MAX, 9)), [0; 0]);
    }
}
