//! The performance of the server, as ratios to the limits of this machine. Both sides of a ratio are measured in one
//! run.
//!
//! `cargo bench --bench server` prints one table; `cargo bench --bench server -- spawn cached` only those groups. The
//! server under test and the bare tonic server for comparison run in separate processes, and this program is the client
//! of both, so that both sides of a ratio include the same network cost. The benchmark never fails; its results are for
//! reading.

mod bare;
mod calls;
mod groups;
mod hash;
mod image;
mod machine;
mod report;
mod staging;
mod target;
mod tls;
mod zstd;

use report::Report;

/// A group of measurements and its name on the command line.
type Group = (&'static str, fn(&mut Report));

const GROUPS: &[Group] = &[
    ("spawn", groups::noop_execute),
    ("results", calls::action_results),
    ("reads", calls::small_reads),
    ("find", calls::find_missing),
    ("cached", calls::cached_execute),
    ("enqueue", groups::enqueue_burst),
    ("stream", groups::streams),
    ("tls", tls::transfers),
    ("zstd", zstd::transfers),
    ("hash", hash::large_blobs),
    ("staging", staging::staging),
    ("image", image::unpacked),
    ("memory", groups::memory),
    ("index", groups::million_blobs),
];

fn main() {
    let arguments: Vec<String> = std::env::args().skip(1).filter(|a| a != "--bench").collect();
    if arguments.first().is_some_and(|a| a == bare::SUBCOMMAND) {
        return bare::serve();
    }
    let mut report = Report::default();
    for (name, run) in GROUPS {
        if arguments.is_empty() || arguments.iter().any(|wanted| wanted == name) {
            run(&mut report);
        }
    }
    report.print();
}
