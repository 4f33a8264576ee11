//! Access: who a client is, and what it may do.

pub(crate) mod certificate;
