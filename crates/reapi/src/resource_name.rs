//! ByteStream resource names.
//!
//! This module implements the grammar of BS-01 to BS-05. Parsing starts at the keyword, so the instance name may have
//! any number of segments. The caller checks whether the instance exists.
//!
//! Bound: a name has at most [`MAX_RESOURCE_NAME_BYTES`].

use crate::{
    digest::{Digest, DigestFunction},
    error::{Error, Result},
    escape::shown,
    instance_name::check_instance_name,
};

/// Longest name of a resource, in bytes: enough for the longest instance name and for the longest path of a file after
/// the size (BS-02).
pub const MAX_RESOURCE_NAME_BYTES: usize = 16 * 1024;

/// The encoding of a blob's bytes on the wire.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Encoding {
    /// The bytes as they are (`blobs`).
    Identity,
    /// One zstd stream (`compressed-blobs/zstd`).
    Zstd,
}

/// The parsed form of a ByteStream name.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ResourceName {
    /// The instance part: well formed, but not looked up.
    pub instance_name: String,
    /// The blob. If the name does not include a digest function, this digest has the legacy function with hashes of
    /// this length. The instance may replace the function with another one of the same length.
    pub digest: Digest,
    /// Whether the name includes the digest function.
    pub function_is_named: bool,
    /// The encoding of the bytes on the wire.
    pub encoding: Encoding,
}

impl ResourceName {
    /// Parses a name for Read: `[instance/]blobs/[function/]hash/size`, or `compressed-blobs/zstd` instead of `blobs`.
    ///
    /// # Errors
    /// [`Error::Invalid`] that shows the name and the expected form.
    pub fn parse_read(name: &str) -> Result<Self> {
        Self::parse(name, false).map_err(|problem| explain(name, "[instance/]blobs/{hash}/{size}", &problem))
    }

    /// Parses a name for Write or QueryWriteStatus: `[instance/]uploads/{uuid}/blobs/[function/]hash/size[/...]`, or
    /// `compressed-blobs/zstd` instead of `blobs`. Segments after the size are ignored (BS-02).
    ///
    /// # Errors
    /// [`Error::Invalid`] that shows the name and the expected form.
    pub fn parse_write(name: &str) -> Result<Self> {
        Self::parse(name, true)
            .map_err(|problem| explain(name, "[instance/]uploads/{uuid}/blobs/{hash}/{size}", &problem))
    }

    fn parse(name: &str, write: bool) -> std::result::Result<Self, String> {
        if name.len() > MAX_RESOURCE_NAME_BYTES {
            return Err(format!(
                "it has {} bytes, and at most {MAX_RESOURCE_NAME_BYTES} are possible",
                name.len()
            ));
        }
        // moon puts "{instance}/" before every name, and therefore a leading slash if the instance name is empty.
        let keyword_follows =
            |rest: &&str| ["uploads/", "blobs/", "compressed-blobs/"].iter().any(|k| rest.starts_with(k));
        let name = name.strip_prefix('/').filter(keyword_follows).unwrap_or(name);
        let segments: Vec<&str> = name.split('/').collect();
        let is_keyword = |segment: &&str| matches!(*segment, "blobs" | "compressed-blobs" | "uploads");
        let keyword = segments.iter().position(is_keyword).ok_or("it has no \"blobs\" segment")?;
        if name.starts_with('/') {
            return Err("it starts with a slash".into());
        }
        let instance_name = segments[..keyword].join("/");
        check_instance_name(&instance_name).map_err(|error| error.to_string())?;
        let mut rest = segments[keyword..].iter().copied();
        let mut next = |what: &str| rest.next().ok_or_else(|| format!("it ends before the {what}"));

        let mut word = next("keyword")?;
        if write {
            if word != "uploads" {
                return Err("it has no \"uploads\" segment".into());
            }
            if uuid::Uuid::try_parse(next("uuid")?).is_err() {
                return Err("the segment after \"uploads\" is not a UUID".into());
            }
            word = next("\"blobs\" segment")?;
        }
        let encoding = match word {
            "blobs" => Encoding::Identity,
            // Uncompressed bytes have names without a compressor. Accepting "identity" would give them two names
            // (BS-04).
            "compressed-blobs" => match next("compressor")? {
                "zstd" => Encoding::Zstd,
                other => {
                    return Err(format!("compressor \"{}\" is not supported, zstd is", shown(other)));
                }
            },
            _ => return Err(format!("\"{}\" stands where \"blobs\" should", shown(word))),
        };
        let mut hash = next("hash")?;
        let named = DigestFunction::ALL.iter().find(|f| f.resource_segment() == Some(hash));
        let function = match named {
            Some(function) => {
                hash = next("hash")?;
                *function
            }
            None => {
                DigestFunction::infer(DigestFunction::ALL, hash.len()).map_err(|error| error.to_string())?
            }
        };
        let size = next("size")?;
        if size.is_empty() || !size.bytes().all(|b| b.is_ascii_digit()) {
            return Err(format!("the size \"{}\" is not a number", shown(size)));
        }
        let size = size.parse().map_err(|_| format!("the size {} does not fit in 63 bits", shown(size)))?;
        let digest = Digest::parse(function, hash, size).map_err(|error| error.to_string())?;
        if !write && rest.next().is_some() {
            return Err("it continues after the size".into());
        }
        Ok(Self { instance_name, digest, function_is_named: named.is_some(), encoding })
    }
}

fn explain(name: &str, form: &str, problem: &str) -> Error {
    Error::Invalid(format!("resource name \"{}\" is malformed: {problem}; the form is {form}", shown(name)))
}

#[cfg(test)]
mod tests {
    use super::*;

    const HASH: &str = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855";
    const UUID: &str = "6ba7b810-9dad-11d1-80b4-00c04fd430c8";

    /// BS-01, BS-02, GEN-12.
    #[test]
    fn names_are_found_by_their_keyword_under_any_instance() {
        for instance in ["", "main", "a/b/c/d"] {
            let prefix = if instance.is_empty() { String::new() } else { format!("{instance}/") };
            let read = ResourceName::parse_read(&format!("{prefix}blobs/{HASH}/0")).unwrap();
            assert_eq!(read.instance_name, instance);
            assert!(read.digest.is_empty());
            assert_eq!(read.encoding, Encoding::Identity);
            let packed =
                ResourceName::parse_read(&format!("{prefix}compressed-blobs/zstd/{HASH}/0")).unwrap();
            assert_eq!(packed, ResourceName { encoding: Encoding::Zstd, ..read.clone() });
            for tail in ["", "/some/path/123/x.o", "/"] {
                let name = format!("{prefix}uploads/{UUID}/blobs/{HASH}/0{tail}");
                assert_eq!(ResourceName::parse_write(&name).unwrap(), read);
                let name = format!("{prefix}uploads/{UUID}/compressed-blobs/zstd/{HASH}/0{tail}");
                assert_eq!(ResourceName::parse_write(&name).unwrap(), packed);
            }
        }
        assert!(ResourceName::parse_write(&format!("/uploads/{UUID}/blobs/{HASH}/0")).is_ok());
        assert!(ResourceName::parse_read(&format!("/blobs/{HASH}/0")).is_ok());
    }

    /// BS-03, GEN-08.
    #[test]
    fn the_function_is_named_for_the_newer_ones_and_told_by_the_length_for_the_older_ones() {
        for &function in DigestFunction::ALL {
            let digest = function.digest(b"x");
            let read = ResourceName::parse_read(&digest.blob_name()).unwrap();
            assert_eq!(read.digest, digest);
            assert_eq!(read.function_is_named, function.resource_segment().is_some());
            let write = ResourceName::parse_write(&format!("uploads/{UUID}/{}", digest.blob_name())).unwrap();
            assert_eq!(write, read);
        }
    }

    /// BS-03, BS-04, BS-05, GEN-01, GEN-03.
    #[test]
    fn any_other_shape_is_refused() {
        let upper = HASH.to_uppercase();
        for tail in [
            "".into(),
            "blobs".into(),
            format!("{HASH}/0"),
            format!("blobs/{HASH}"),
            format!("blobs/{HASH}/"),
            format!("blobs/{HASH}/x"),
            format!("blobs/{HASH}/-1"),
            format!("blobs/{HASH}/+1"),
            format!("blobs/{HASH}/9223372036854775808"),
            format!("blobs/{upper}/0"),
            format!("blobs/{}/0", &HASH[1..]),
            format!("blobs/blake3/{}/0", &HASH[1..]),
            format!("blobs/gitsha1/{HASH}/0"),
            format!("blobs/BLAKE3/{HASH}/0"),
            format!("blobs/sha256/{HASH}/0"),
            format!("compressed-blobs/identity/{HASH}/0"),
            format!("compressed-blobs/lz4/{HASH}/0"),
            format!("compressed-blobs/deflate/{HASH}/0"),
            format!("compressed-blobs/brotli/{HASH}/0"),
            format!("compressed-blobs/ZSTD/{HASH}/0"),
            format!("compressed-blobs/{HASH}/0"),
            format!("compressed-blobs/zstd/{HASH}"),
            "compressed-blobs/zstd".into(),
            format!("x//blobs/{HASH}/0"),
            format!("operations/blobs/{HASH}/0"),
            "blobs/a/1".into(),
        ] {
            for name in [tail.clone(), format!("i/{tail}")] {
                assert!(ResourceName::parse_read(&name).is_err(), "{name}");
            }
            let name = format!("uploads/{UUID}/{tail}");
            assert!(ResourceName::parse_write(&name).is_err(), "{name}");
        }
        assert!(ResourceName::parse_read(&format!("blobs/{HASH}/0/x")).is_err());
        assert!(ResourceName::parse_read(&format!("//blobs/{HASH}/0")).is_err());
        assert!(ResourceName::parse_read(&format!("/i/blobs/{HASH}/0")).is_err());
        assert!(ResourceName::parse_read(&format!("uploads/{UUID}/blobs/{HASH}/0")).is_err());
        assert!(ResourceName::parse_write(&format!("blobs/{HASH}/0")).is_err());
        assert!(ResourceName::parse_write(&format!("uploads/1/blobs/{HASH}/0")).is_err());
        assert!(ResourceName::parse_write(&format!("uploads/blobs/{HASH}/0")).is_err());
    }

    /// BS-02, BS-05.
    #[test]
    fn a_name_has_room_for_a_path_and_a_longer_one_has_a_short_error() {
        let prefix = format!("{}/uploads/{UUID}/blobs/{HASH}/0/", "i".repeat(4096));
        assert!(ResourceName::parse_write(&format!("{prefix}{}", "p/".repeat(2048))).is_ok());
        for longer in ["/", "\u{7f}", "p"].map(|text| format!("{prefix}{}", text.repeat(16 * 1024 * 1024))) {
            for error in [ResourceName::parse_write(&longer), ResourceName::parse_read(&longer)] {
                let error = error.unwrap_err().to_string();
                assert!(
                    error.contains(&format!("it has {} bytes, and at most 16384", longer.len())),
                    "{error}"
                );
                assert!(error.len() < 4096, "{}", error.len());
            }
        }
        let in_parts =
            ["i/blobs/x", "i/compressed-blobs/x"].map(|start| format!("{start}{}", "\u{7f}".repeat(16_000)));
        for name in in_parts {
            let error = ResourceName::parse_read(&name).unwrap_err().to_string();
            assert!(error.len() < 8 * 1024, "{}", error.len());
        }
    }
}
