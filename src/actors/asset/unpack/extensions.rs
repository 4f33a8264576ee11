//! [`Extensions`]: the extension headers of tar archives (GNU and PAX), as far as an unpacked tree depends on them.
//! Pure.

use tar::{EntryType, PaxExtensions};

/// The values of the extension headers before an entry.
#[derive(Debug, Default)]
pub(crate) struct Extensions {
    /// Replaces the path of the entry.
    pub path: Option<Vec<u8>>,
    /// Replaces the target of the link.
    pub link: Option<Vec<u8>>,
}

/// Whether an entry of this kind is a header for the next entry.
pub(crate) fn is_extension(kind: EntryType) -> bool {
    kind.is_gnu_longname()
        || kind.is_gnu_longlink()
        || kind.is_pax_local_extensions()
        || kind.is_pax_global_extensions()
}

impl Extensions {
    /// Adds the values of one header.
    ///
    /// # Errors
    /// Why the archive has to be refused.
    pub(crate) fn read(&mut self, kind: EntryType, bytes: &[u8]) -> Result<(), String> {
        let until_nul = || bytes.split(|byte| *byte == 0).next().unwrap_or_default().to_vec();
        if kind.is_gnu_longname() {
            self.path = Some(until_nul());
            return Ok(());
        }
        if kind.is_gnu_longlink() {
            self.link = Some(until_nul());
            return Ok(());
        }
        for record in PaxExtensions::new(bytes) {
            let record = record.map_err(|error| error.to_string())?;
            match record.key_bytes() {
                // Global headers normally hold only a comment of git. A global path is ignored.
                b"path" if kind.is_pax_local_extensions() => self.path = Some(record.value_bytes().to_vec()),
                b"linkpath" if kind.is_pax_local_extensions() => {
                    self.link = Some(record.value_bytes().to_vec());
                }
                // Its content would not have the size that its own header says.
                b"size" => return Err("it has a file of more than 8 GiB, or a false size".into()),
                key if key.starts_with(b"GNU.sparse.") => return Err("it has a sparse file".into()),
                _ => {}
            }
        }
        Ok(())
    }
}
