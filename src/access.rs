//! Access control: who a client is.

pub mod jwt;
