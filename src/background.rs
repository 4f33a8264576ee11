//! Threads that work in the background.

/// The lowest priority. Such a thread gets at most some hundredths of a core while others want all cores.
const NICE: i32 = 19;

/// Gives the calling thread the lowest priority.
pub(crate) fn lower_priority() {
    // On Linux, this changes only the calling thread, although the name says process.
    let _ = rustix::process::setpriority_process(None, NICE);
}
