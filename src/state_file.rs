//! Small files in which a module keeps its state across restarts, with a checksum, so that a damaged one is noticed as
//! a whole.
//!
//! A file is written under another name and then renamed. It is not synced: after a power cut, it may be an earlier
//! one, empty or damaged.

use crate::regular_file;
use sha2::{Digest as _, Sha256};
use std::{fs, io, path::Path};

/// Length of the checksum at the start of the file.
const CHECKSUM_BYTES: usize = 32;

/// Reads the state in a file of at most `max` bytes; `None` if there is no file. Blocks.
///
/// # Errors
/// `InvalidData` for a damaged file; the errors of [`regular_file::read_own`].
pub(crate) fn read(path: &Path, max: u64) -> io::Result<Option<Vec<u8>>> {
    let bytes = match regular_file::read_own(path, max) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        read => read?,
    };
    match bytes.split_at_checked(CHECKSUM_BYTES) {
        Some((checksum, state)) if Sha256::digest(state)[..] == *checksum => Ok(Some(state.to_vec())),
        _ => Err(io::Error::new(io::ErrorKind::InvalidData, "its checksum is wrong")),
    }
}

/// Replaces the state in a file. Blocks.
///
/// # Errors
/// The errors of the file system.
pub(crate) fn replace(path: &Path, state: &[u8]) -> io::Result<()> {
    let fresh = path.with_extension("new");
    regular_file::write(&fresh, &[&Sha256::digest(state)[..], state].concat())?;
    fs::rename(&fresh, path)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt as _;

    #[test]
    fn a_file_with_any_bit_flipped_or_any_part_missing_is_rejected_and_a_closed_one_is_read() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("state");
        assert_eq!(read(&path, 100).unwrap(), None);
        for state in [&b""[..], b"state"] {
            replace(&path, state).unwrap();
            assert_eq!(read(&path, 100).unwrap().unwrap(), state);
            let bytes = fs::read(&path).unwrap();
            for at in 0..bytes.len() {
                let mut flipped = bytes.clone();
                flipped[at] ^= 1;
                fs::write(&path, flipped).unwrap();
                assert!(read(&path, 100).is_err(), "bit of byte {at}");
                fs::write(&path, &bytes[..at]).unwrap();
                assert!(read(&path, 100).is_err(), "cut at {at}");
            }
        }
        replace(&path, b"state").unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o0)).unwrap();
        let closed = path.clone();
        let found = regular_file::obeying_permissions(move || read(&closed, 100));
        assert_eq!(found.unwrap().unwrap(), b"state", "its permissions are restored");
        replace(&path, &[0; 69]).unwrap();
        assert_eq!(read(&path, 100).unwrap_err().kind(), io::ErrorKind::FileTooLarge);
    }
}
