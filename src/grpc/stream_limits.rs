//! The limits of streams of bytes: of ByteStream and of log streams.

use crate::connections::UNTAKEN_LIMIT;
use std::time::Duration;

/// Bytes in one ReadResponse (BS-14). This is large enough that framing costs little, and small enough to bound the
/// memory of a read.
pub(crate) const READ_WINDOW_BYTES: usize = 128 * 1024;
/// Time limit between two messages of an upload to the store. The bytes that were received are kept for a while.
pub(crate) const WRITE_IDLE_LIMIT: Duration = Duration::from_secs(5 * 60);
/// Time limit for the end of the stream after `finish_write`, which shows that no more data follows (BS-21). Most
/// clients close their half at once, but some wait for the answer first.
pub(super) const CLOSE_WAIT: Duration = Duration::from_secs(1);
/// Time limit for a client to take a message of a download.
pub(crate) const READ_IDLE_LIMIT: Duration = UNTAKEN_LIMIT;
