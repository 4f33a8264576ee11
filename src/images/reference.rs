//! [`ImageReference`]: the name of an image in an action, parsed. Pure.
//!
//! ```text
//! docker://registry.example.com:5000/team/tools@sha256:ab12...    a digest: always the same image
//! docker://registry.example.com:5000/team/tools:2024.1            a tag: the image that the registry has for it
//! oci:/srv/images/tools            a layout directory of the server with one image
//! oci:/srv/images/tools:2024.1     the image of this name in it; also @sha256:...
//! ```
//!
//! The registry must be named, because there is no default registry. In a reference with a tag and a digest, the digest
//! counts.

use super::digest::ImageDigest;
use crate::host::is_host_and_port;
use std::{
    fmt,
    path::{Component, Path, PathBuf},
};

/// Maximum length of a reference. The longest names that registries allow are shorter.
const MAX_BYTES: usize = 4096;
/// Maximum lengths of a repository and of a tag, from the distribution specification.
const MAX_REPOSITORY_BYTES: usize = 255;
const MAX_TAG_BYTES: usize = 128;

/// A parsed reference to an image.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct ImageReference {
    /// The origin of the image.
    pub origin: ImageOrigin,
    /// The version of the image.
    pub version: ImageVersion,
}

/// The origin of an image.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum ImageOrigin {
    /// A repository in a registry.
    Registry {
        /// Host and, if it was named, port; in lower case.
        registry: String,
        /// The path of the repository.
        repository: String,
    },
    /// A layout directory on this machine.
    Layout(PathBuf),
}

/// The version of an image at its origin.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum ImageVersion {
    /// The image with this digest.
    Digest(ImageDigest),
    /// The image that has this tag now.
    Tag(String),
    /// The only image of a layout directory.
    Only,
}

impl ImageReference {
    /// Parses a reference.
    ///
    /// # Errors
    /// What is wrong with it.
    pub fn parse(text: &str) -> Result<Self, String> {
        let refuse = |problem: &str| {
            let shown: String = text.escape_debug().take(200).collect();
            format!(
                "\"{shown}\" is not the name of an image: {problem}; names are docker://REGISTRY/NAME@sha256:DIGEST or \
                 oci:/DIRECTORY"
            )
        };
        if text.len() > MAX_BYTES {
            return Err(refuse("it is too long"));
        }
        if let Some(rest) = text.strip_prefix("docker://") {
            return registry(rest).map_err(|problem| refuse(&problem));
        }
        if let Some(rest) = text.strip_prefix("oci:") {
            return layout(rest).map_err(|problem| refuse(&problem));
        }
        Err(refuse("it starts with neither docker:// nor oci:"))
    }
}

impl fmt::Display for ImageReference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.origin {
            ImageOrigin::Registry { registry, repository } => write!(f, "docker://{registry}/{repository}")?,
            ImageOrigin::Layout(path) => write!(f, "oci:{}", path.display())?,
        }
        match &self.version {
            ImageVersion::Digest(digest) => write!(f, "@{digest}"),
            ImageVersion::Tag(tag) => write!(f, ":{tag}"),
            ImageVersion::Only => Ok(()),
        }
    }
}

fn registry(rest: &str) -> Result<ImageReference, String> {
    let (name, version) = split_version(rest)?;
    let (host, repository) = name.split_once('/').ok_or("it names no registry")?;
    let is_host = host.contains(['.', ':']) || host == "localhost";
    if !is_host || !is_host_and_port(host) {
        return Err(format!("\"{}\" is not the host of a registry", host.escape_debug()));
    }
    let is_segment = |segment: &str| {
        let plain = |byte: u8| matches!(byte, b'a'..=b'z' | b'0'..=b'9' | b'.' | b'_' | b'-');
        let edge = |byte: Option<&u8>| byte.is_some_and(u8::is_ascii_alphanumeric);
        let bytes = segment.as_bytes();
        bytes.iter().copied().all(plain) && edge(bytes.first()) && edge(bytes.last())
    };
    if repository.len() > MAX_REPOSITORY_BYTES || !repository.split('/').all(is_segment) {
        return Err(format!("\"{}\" is not the name of a repository", repository.escape_debug()));
    }
    let origin =
        ImageOrigin::Registry { registry: host.to_ascii_lowercase(), repository: repository.to_owned() };
    match version {
        ImageVersion::Only => Err("it has neither a digest nor a tag".into()),
        version => Ok(ImageReference { origin, version }),
    }
}

fn layout(rest: &str) -> Result<ImageReference, String> {
    let (name, version) = split_version(rest)?;
    let path = Path::new(name);
    let is_plain = path.components().all(|part| matches!(part, Component::RootDir | Component::Normal(_)));
    if !path.is_absolute() || !is_plain || name.contains('\0') {
        return Err("the directory is not an absolute path without \"..\"".into());
    }
    // What follows the colon would be a tag, if the slash behind it were left out.
    if path.file_name().is_some_and(|last| last.as_encoded_bytes().contains(&b':')) {
        return Err("the name of the directory contains a colon".into());
    }
    Ok(ImageReference { origin: ImageOrigin::Layout(path.components().collect()), version })
}

/// Splits a name and the digest or tag that follows it. If both follow, the digest counts.
fn split_version(text: &str) -> Result<(&str, ImageVersion), String> {
    let (rest, digest) = match text.split_once('@') {
        Some((rest, digest)) => (rest, Some(digest.parse()?)),
        None => (text, None),
    };
    let last = rest.rfind('/').map_or(0, |slash| slash + 1);
    let (name, tag) = match rest[last..].split_once(':') {
        Some((name, tag)) => (&rest[..last + name.len()], Some(tag)),
        None => (rest, None),
    };
    if let Some(tag) = tag {
        let plain = |c: char| c.is_ascii_alphanumeric() || matches!(c, '_' | '.' | '-');
        let starts = |c: char| c.is_ascii_alphanumeric() || c == '_';
        if tag.len() > MAX_TAG_BYTES || !tag.chars().all(plain) || !tag.starts_with(starts) {
            return Err(format!("\"{}\" is not a tag", tag.escape_debug()));
        }
    }
    Ok(match (digest, tag) {
        (Some(digest), _) => (name, ImageVersion::Digest(digest)),
        (None, Some(tag)) => (name, ImageVersion::Tag(tag.to_owned())),
        (None, None) => (name, ImageVersion::Only),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn digest() -> ImageDigest {
        ImageDigest::of(b"manifest")
    }

    fn parsed(text: &str) -> (ImageOrigin, ImageVersion) {
        let reference = ImageReference::parse(text).unwrap();
        let again = ImageReference::parse(&reference.to_string()).unwrap();
        assert_eq!(again, reference);
        (reference.origin, reference.version)
    }

    fn registry(registry: &str, repository: &str) -> ImageOrigin {
        ImageOrigin::Registry { registry: registry.into(), repository: repository.into() }
    }

    #[test]
    fn images_are_named_by_registry_or_directory_and_by_digest_or_tag() {
        let tools = registry("r.example.com", "team/tools");
        let by_digest = (tools.clone(), ImageVersion::Digest(digest()));
        assert_eq!(parsed(&format!("docker://r.example.com/team/tools@{}", digest())), by_digest);
        assert_eq!(parsed(&format!("docker://R.Example.com/team/tools:v1@{}", digest())), by_digest);
        assert_eq!(
            parsed("docker://r.example.com/team/tools:v1.2_x"),
            (tools, ImageVersion::Tag("v1.2_x".into()))
        );
        assert_eq!(
            parsed("docker://localhost:5000/a:b"),
            (registry("localhost:5000", "a"), ImageVersion::Tag("b".into()))
        );
        assert_eq!(parsed("docker://[::1]:80/a:b").0, registry("[::1]:80", "a"));
        let layout = ImageOrigin::Layout("/srv/images/tools".into());
        assert_eq!(parsed("oci:/srv/images/tools"), (layout.clone(), ImageVersion::Only));
        assert_eq!(parsed("oci:/srv//images/tools/:x").0, layout);
        assert_eq!(parsed("oci:/srv/images/tools:v1"), (layout.clone(), ImageVersion::Tag("v1".into())));
        assert_eq!(
            parsed(&format!("oci:/srv/images/tools@{}", digest())),
            (layout, ImageVersion::Digest(digest()))
        );
    }

    #[test]
    fn names_that_are_unclear_or_mean_more_in_a_url_or_path_are_refused() {
        let long = "a/".repeat(3000);
        for text in [
            "",
            "docker://",
            "r.example.com/tools:v1",
            "docker://tools:v1",
            "docker://library/tools:v1",
            "docker://r.example.com/tools",
            "docker://r.example.com/:v1",
            "docker://r.example.com/a//b:v1",
            "docker://r.example.com/../b:v1",
            "docker://r.example.com/a?b:v1",
            "docker://r.example.com/Tools:v1",
            "docker://user@r.example.com/tools:v1",
            "docker://r.example.com:port/tools:v1",
            "docker://r.example.com/tools:v/1",
            "docker://r.example.com/tools:-1",
            "docker://r.example.com/tools@sha256:12",
            "oci:srv/images",
            "oci:/srv/../etc",
            "oci:/srv/\0",
            "oci:/srv/images/tools:/:v2",
            "oci:/srv/images/tools:/.",
            &format!("docker://r.example.com/{long}a:v1"),
        ] {
            let problem = ImageReference::parse(text).unwrap_err();
            assert!(problem.contains("is not the name of an image") && problem.len() < 600, "{problem}");
        }
    }
}
