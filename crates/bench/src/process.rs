//! Measures the resources of a server's processes, CPU time and memory, from `/proc`.

use serde::{Deserialize, Serialize};
use std::{collections::HashMap, fs, time::Duration};

/// The resources that a process and its descendants have used.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Usage {
    /// CPU time in user and kernel mode, including children that have ended and were waited for.
    pub(crate) cpu: Duration,
}

impl Usage {
    /// The CPU time of a process and its descendants, including ended descendants that were waited for.
    pub(crate) fn of(pid: u32) -> Self {
        let all = processes();
        let mut open = vec![pid];
        let mut ticks = 0;
        while let Some(pid) = open.pop() {
            ticks += all.get(&pid).map_or(0, |process| process.ticks);
            open.extend(all.iter().filter(|(_, process)| process.parent == pid).map(|(child, _)| *child));
        }
        let per_second = rustix::param::clock_ticks_per_second().max(1);
        Self { cpu: Duration::from_secs_f64(ticks as f64 / per_second as f64) }
    }

    /// The resources that were used since an earlier sample.
    pub(crate) fn since(&self, before: &Self) -> Self {
        Self { cpu: self.cpu.saturating_sub(before.cpu) }
    }

    /// Adds the resources of another sample.
    pub(crate) fn add(&mut self, other: &Self) {
        self.cpu += other.cpu;
    }
}

/// Resident memory of a process now and at its peak, in bytes; `None` if the process is gone.
pub(crate) fn memory(pid: u32) -> Option<(u64, u64)> {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
    let bytes = |name: &str| -> Option<u64> {
        let line = status.lines().find_map(|line| line.strip_prefix(name))?;
        Some(line.split_whitespace().next()?.parse::<u64>().ok()? * 1024)
    };
    Some((bytes("VmRSS:")?, bytes("VmHWM:")?))
}

/// The resources that the processes of the server used.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct ServerUse {
    /// CPU time per call in microseconds, of the server and all processes below it.
    pub cpu_us_per_call: f64,
    /// Resident memory of the server after the run, in bytes.
    pub resident_bytes: u64,
    /// The peak resident memory in bytes.
    pub peak_bytes: u64,
}

impl ServerUse {
    pub(crate) fn new(pid: u32, used: &Usage, calls: u64) -> Self {
        let (resident_bytes, peak_bytes) = memory(pid).unwrap_or_default();
        Self {
            cpu_us_per_call: used.cpu.as_secs_f64() * 1e6 / calls.max(1) as f64,
            resident_bytes,
            peak_bytes,
        }
    }
}

struct Process {
    parent: u32,
    /// Clock ticks of the process and of the children that it has waited for.
    ticks: u64,
}

fn processes() -> HashMap<u32, Process> {
    let entries = fs::read_dir("/proc").into_iter().flatten().flatten();
    let pids = entries.filter_map(|entry| entry.file_name().to_str()?.parse::<u32>().ok());
    pids.filter_map(|pid| Some((pid, parse(&fs::read_to_string(format!("/proc/{pid}/stat")).ok()?)?)))
        .collect()
}

/// Parses the text of `/proc/PID/stat`. Returns `None` if a field is missing.
fn parse(stat: &str) -> Option<Process> {
    // The name of the program is in brackets, and may contain brackets and spaces.
    let fields: Vec<&str> = stat.rsplit_once(')')?.1.split_whitespace().collect();
    let number = |at: usize| fields.get(at)?.parse::<u64>().ok();
    // Fields 14 to 17 of the file: utime, stime, cutime, cstime.
    let ticks = (11..=14).map(number).sum::<Option<u64>>()?;
    Some(Process { parent: fields.get(1)?.parse().ok()?, ticks })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_name_of_a_program_may_contain_anything() {
        let stat = "7 (a) b (c) S 3 7 7 0 -1 4194304 1 2 3 4 10 20 30 40 20 0 1 0";
        let process = parse(stat).unwrap();
        assert_eq!((process.parent, process.ticks), (3, 100));
        assert!(parse("7 (a) S").is_none() && parse("").is_none());
    }

    #[test]
    fn this_process_uses_memory() {
        let (now, peak) = memory(std::process::id()).unwrap();
        assert!(now > 0 && peak >= now / 2);
        assert_eq!(memory(u32::MAX), None);
    }
}
