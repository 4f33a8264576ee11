//! [`Usage`]: the resource usage of all processes of one command together.

use gorego_reapi::proto::gorego;
use std::time::Duration;

/// Sums up rusage values. The rusage of a child includes the children that it has reaped itself, so nothing is counted
/// twice. The maximum resident set size is at least the few MiB of the runner, whose memory the child shares until it
/// calls exec.
#[derive(Default)]
pub(super) struct Usage {
    user: Duration,
    system: Duration,
    wire: gorego::ResourceUsage,
}

impl Usage {
    /// Adds the usage of a child that has ended.
    pub(super) fn add(&mut self, usage: &libc::rusage) {
        let time = |time: libc::timeval| {
            Duration::from_secs(time.tv_sec.try_into().unwrap_or(0))
                + Duration::from_micros(time.tv_usec.try_into().unwrap_or(0))
        };
        self.user += time(usage.ru_utime);
        self.system += time(usage.ru_stime);
        let wire = &mut self.wire;
        wire.max_resident_bytes = wire.max_resident_bytes.max(usage.ru_maxrss.saturating_mul(1024));
        for (sum, part) in [
            (&mut wire.minor_page_faults, usage.ru_minflt),
            (&mut wire.major_page_faults, usage.ru_majflt),
            (&mut wire.blocks_read, usage.ru_inblock),
            (&mut wire.blocks_written, usage.ru_oublock),
            (&mut wire.voluntary_context_switches, usage.ru_nvcsw),
            (&mut wire.involuntary_context_switches, usage.ru_nivcsw),
        ] {
            *sum = sum.saturating_add(part);
        }
    }

    pub(super) fn into_wire(self) -> gorego::ResourceUsage {
        gorego::ResourceUsage {
            user_time: self.user.try_into().ok(),
            system_time: self.system.try_into().ok(),
            ..self.wire
        }
    }
}
