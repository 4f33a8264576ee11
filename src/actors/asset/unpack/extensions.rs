//! [`Extensions`]: the extension headers of tar archives (GNU and PAX), as far as an unpacked tree depends on them.
//! Pure.

use tar::EntryType;

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
        let mut rest = bytes;
        while !rest.is_empty() {
            let (record, behind) =
                next_record(rest).map_err(|problem| format!("a record of an extension header {problem}"))?;
            rest = behind;
            match record.key {
                // Global headers normally hold only a comment of git. A global path is ignored.
                b"path" if kind.is_pax_local_extensions() => self.path = Some(record.value.to_vec()),
                b"linkpath" if kind.is_pax_local_extensions() => self.link = Some(record.value.to_vec()),
                // Its content would not have the size that its own header says.
                b"size" => return Err("it has a file of more than 8 GiB, or a false size".into()),
                key if key.starts_with(b"GNU.sparse.") => return Err("it has a sparse file".into()),
                _ => {}
            }
        }
        Ok(())
    }
}

/// A record of a PAX header.
#[derive(Debug, PartialEq, Eq)]
struct PaxRecord<'a> {
    key: &'a [u8],
    value: &'a [u8],
}

/// Splits the first record off a PAX header: "LENGTH KEY=VALUE\n". The length counts the whole record, so the value,
/// which may be an extended attribute, may have newlines and any other bytes.
///
/// # Errors
/// What is wrong with the record.
fn next_record(bytes: &[u8]) -> Result<(PaxRecord<'_>, &[u8]), &'static str> {
    const NO_LENGTH: &str = "does not begin with its length";
    const TOO_SHORT: &str = "is longer than its length says";
    let digits = bytes.iter().take_while(|byte| byte.is_ascii_digit()).count();
    let (length, text) = bytes.split_at_checked(digits).ok_or(NO_LENGTH)?;
    let length = str::from_utf8(length).ok().and_then(|length| length.parse::<usize>().ok());
    let length = length.filter(|_| text.starts_with(b" ")).ok_or(NO_LENGTH)?;
    let (record, rest) = bytes.split_at_checked(length).ok_or("ends too early")?;
    let record = record.get(digits.saturating_add(1)..).ok_or(TOO_SHORT)?;
    let record = record.strip_suffix(b"\n").ok_or("does not end with a newline")?;
    let equals = record.iter().position(|byte| *byte == b'=').ok_or("has no key")?;
    let (key, value) = record.split_at_checked(equals).ok_or("has no key")?;
    Ok((PaxRecord { key, value: value.get(1..).unwrap_or_default() }, rest))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(header: &[u8]) -> Result<Extensions, String> {
        let mut extensions = Extensions::default();
        extensions.read(EntryType::XHeader, header).map(|()| extensions)
    }

    #[test]
    fn the_length_of_a_record_says_where_it_ends() {
        // A value with a newline, and one that looks like another record.
        let attribute = b"33 SCHILY.xattr.a=\n12 path=no\n\0\xff\n";
        assert_eq!(attribute.len(), 33);
        let header = [&attribute[..], b"12 path=a=b\n", b"15 linkpath=c\n\n"].concat();
        let Extensions { path, link } = read(&header).unwrap();
        assert_eq!((path, link), (Some(b"a=b".to_vec()), Some(b"c\n".to_vec())));
        assert!(read(b"").unwrap().path.is_none());
        assert_eq!(read(b"8 path=\n").unwrap().path, Some(Vec::new()));
    }

    #[test]
    fn a_damaged_record_is_refused_with_the_reason() {
        let cases: [(&[u8], &str); 14] = [
            (b"\n", "its length"),
            (b" path=a\n", "its length"),
            (b"+9 path=a\n", "its length"),
            (b"-1 path=a\n", "its length"),
            (b"x path=a\n", "its length"),
            (b"9", "its length"),
            (b"99999999999999999999999 path=a\n", "its length"),
            (b"0 path=a\n", "longer"),
            (b"1 path=a\n", "longer"),
            (b"9 path=a", "ends too early"),
            (b"18446744073709551615 path=a\n", "ends too early"),
            (b"8 path=a\n", "newline"),
            (b"7 path\n", "no key"),
            (b"9 path=a\n\0\0", "its length"),
        ];
        for (header, reason) in cases {
            let problem = read(header).unwrap_err();
            assert!(problem.contains(reason), "{}: {problem}", header.escape_ascii());
        }
    }
}
