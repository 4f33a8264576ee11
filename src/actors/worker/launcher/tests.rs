//! Tests of what the end of a command means.

use super::*;

/// EXE-62.
#[test]
fn a_shortage_of_the_server_is_not_the_result_of_a_command() {
    let ended = |errno| Ended { not_started: errno, exit_code: 127, ..Ended::default() };
    for errno in [libc::ENOMEM, libc::EAGAIN, libc::ENFILE, libc::ETXTBSY] {
        assert!(matches!(ran(ended(errno), None), Err(Error::Internal(_))), "{errno}");
        assert_eq!(ran(ended(errno), Some(Ending::TimedOut)).unwrap().ending, Ending::TimedOut);
    }
    for errno in [libc::ENOENT, libc::EACCES, libc::ENOEXEC, libc::E2BIG, libc::EIO] {
        assert_eq!(ran(ended(errno), None).unwrap().ending, Ending::NotStarted(errno));
    }
}
