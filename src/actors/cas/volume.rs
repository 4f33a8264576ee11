//! How stored bytes lie on disk: names and directories of files, temporary files, the stamps by which a changed file is noticed, and
//! what a start finds.

pub(crate) mod files;
pub(crate) mod scan;
pub(crate) mod stamps;
