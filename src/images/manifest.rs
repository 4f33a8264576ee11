//! The documents of an image: index, manifest and configuration, and the choice of a platform. Pure.
//!
//! The documents are untrusted. The size of each is checked before it is parsed ([`MAX_DOCUMENT_BYTES`]), and unused
//! parts are ignored.

use super::digest::ImageDigest;
use serde::Deserialize;

/// Maximum size of an index, manifest or configuration. The distribution specification requires registries to accept
/// this size.
pub const MAX_DOCUMENT_BYTES: u64 = 4 * 1024 * 1024;
/// Maximum number of layers of an image. Other implementations allow at most 127.
const MAX_LAYERS: usize = 512;
/// Maximum number of environment variables of an image, and their maximum total length.
const MAX_VARIABLES: usize = 1_000;
const MAX_VARIABLE_BYTES: usize = 256 * 1024;

/// The media types that are requested from a registry.
pub const ACCEPTED: &str = "application/vnd.oci.image.index.v1+json, \
     application/vnd.oci.image.manifest.v1+json, application/vnd.docker.distribution.manifest.list.v2+json, \
     application/vnd.docker.distribution.manifest.v2+json";

/// Media types of layers that are tar archives. The first bytes show the compression.
const LAYERS: &[&str] = &[
    "application/vnd.oci.image.layer.v1.tar",
    "application/vnd.oci.image.layer.nondistributable.v1.tar",
    "application/vnd.docker.image.rootfs.diff.tar",
    "application/vnd.docker.image.rootfs.foreign.diff.tar",
];

/// A blob of an image.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BlobName {
    /// The digest that the content must have.
    pub digest: ImageDigest,
    /// The declared length in bytes.
    pub size: u64,
}

/// A document that the digest of an image can refer to.
#[derive(Debug, PartialEq, Eq)]
pub enum Document {
    /// Images for several platforms.
    Index(PlatformIndex),
    /// The image for one platform.
    Manifest(Manifest),
}

/// The images of an index.
#[derive(Debug, PartialEq, Eq)]
pub struct PlatformIndex {
    entries: Vec<IndexEntry>,
}

#[derive(Debug, PartialEq, Eq)]
struct IndexEntry {
    blob: BlobName,
    platform: Option<Platform>,
    tag: Option<String>,
}

/// A platform, in the notation of image indexes.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
pub struct Platform {
    #[serde(default)]
    architecture: String,
    #[serde(default)]
    os: String,
    #[serde(default)]
    variant: Option<String>,
}

/// The configuration and the layers of one image.
#[derive(Debug, PartialEq, Eq)]
pub struct Manifest {
    /// The configuration document of the image.
    pub config: BlobName,
    /// Its layers, the lowest first.
    pub layers: Vec<BlobName>,
}

/// The settings of an image for its processes.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct ImageConfig {
    /// Environment variables for commands that do not set them.
    pub environment: Vec<(String, String)>,
    /// The user of the command, by name or number; empty for the default user.
    pub user: String,
}

impl Platform {
    /// Linux on this architecture, in Rust's notation.
    pub fn linux(architecture: &str) -> Self {
        let architecture = match architecture {
            "x86_64" => "amd64",
            "x86" => "386",
            "aarch64" => "arm64",
            "powerpc64" => "ppc64le",
            other => other,
        };
        Self { architecture: architecture.into(), os: "linux".into(), variant: None }
    }

    fn runs(&self, image: &Self) -> bool {
        image.os == self.os && image.architecture == self.architecture
    }

    /// The rank of an image for this platform; the lowest rank is the best: without a variant, or with the lowest
    /// variant.
    fn rank(image: &Self) -> (bool, &str) {
        (image.variant.is_some(), image.variant.as_deref().unwrap_or_default())
    }

    fn name(&self) -> String {
        let parts = [Some(&self.os), Some(&self.architecture), self.variant.as_ref()];
        let name = parts.into_iter().flatten().map(String::as_str).collect::<Vec<_>>().join("/");
        name.escape_debug().take(40).collect()
    }
}

impl Document {
    /// Parses an index or a manifest.
    pub fn decode(bytes: &[u8]) -> Result<Self, String> {
        let wire: WireDocument = json(bytes)?;
        if let Some(manifests) = wire.manifests {
            let entries = manifests.into_iter().map(|entry| {
                Ok(IndexEntry {
                    tag: entry.annotations.and_then(|annotations| annotations.tag),
                    platform: entry.platform,
                    blob: BlobName { digest: entry.digest.parse()?, size: entry.size },
                })
            });
            return Ok(Self::Index(PlatformIndex { entries: entries.collect::<Result<_, String>>()? }));
        }
        let (Some(config), Some(layers)) = (wire.config, wire.layers) else {
            return Err("it is neither an index nor a manifest of an image".into());
        };
        if layers.len() > MAX_LAYERS {
            return Err(format!("it has {} layers; at most {MAX_LAYERS} are supported", layers.len()));
        }
        let layers = layers.into_iter().map(|layer| {
            check_layer(&layer.media_type)?;
            Ok(BlobName { digest: layer.digest.parse()?, size: layer.size })
        });
        Ok(Self::Manifest(Manifest {
            config: BlobName { digest: config.digest.parse()?, size: config.size },
            layers: layers.collect::<Result<_, String>>()?,
        }))
    }
}

impl PlatformIndex {
    /// The image for this machine.
    pub fn choose(&self, machine: &Platform) -> Result<&BlobName, String> {
        let suits = |entry: &&IndexEntry| match &entry.platform {
            Some(platform) => machine.runs(platform),
            // The image is for one platform only. Its configuration says for which one.
            None => self.entries.len() == 1,
        };
        let rank = |entry: &&IndexEntry| {
            entry.platform.clone().map(|platform| {
                let (has_variant, variant) = Platform::rank(&platform);
                (has_variant, variant.to_owned())
            })
        };
        let best = self.entries.iter().filter(suits).min_by_key(rank);
        best.map(|entry| &entry.blob).ok_or_else(|| {
            let platforms = self.entries.iter().filter_map(|entry| entry.platform.as_ref());
            let names: Vec<_> = platforms.take(16).map(Platform::name).collect();
            format!("it is not for {}, but for {}", machine.name(), names.join(", "))
        })
    }

    /// The images of a layout directory that have this tag; all images if `tag` is `None`.
    pub fn tagged(&self, tag: Option<&str>) -> Vec<&BlobName> {
        let has_tag = |entry: &&IndexEntry| tag.is_none() || entry.tag.as_deref() == tag;
        self.entries.iter().filter(has_tag).map(|entry| &entry.blob).collect()
    }

    /// The tags of a layout directory, for messages.
    pub fn tags(&self) -> String {
        let tags = self.entries.iter().filter_map(|entry| entry.tag.as_deref()).take(16);
        let tags: Vec<String> = tags.map(|tag| tag.escape_debug().take(60).collect()).collect();
        if tags.is_empty() { "none".into() } else { tags.join(", ") }
    }
}

impl ImageConfig {
    /// Parses the configuration of an image that should run on this machine.
    pub fn decode(bytes: &[u8], machine: &Platform) -> Result<Self, String> {
        let wire: WireConfig = json(bytes)?;
        if !machine.runs(&wire.platform) {
            return Err(format!("it is for {}, not for {}", wire.platform.name(), machine.name()));
        }
        let asked = wire.config.unwrap_or_default();
        let variables = asked.variables.unwrap_or_default();
        let bytes: usize = variables.iter().map(String::len).sum();
        if variables.len() > MAX_VARIABLES || bytes > MAX_VARIABLE_BYTES {
            return Err("its environment is too large".into());
        }
        let environment = variables.into_iter().filter_map(|variable| {
            let (name, value) = variable.split_once('=')?;
            let is_usable = !name.is_empty() && !variable.contains('\0');
            is_usable.then(|| (name.to_owned(), value.to_owned()))
        });
        Ok(Self { environment: environment.collect(), user: asked.user.unwrap_or_default() })
    }
}

fn check_layer(media_type: &str) -> Result<(), String> {
    let is_known = |known: &&str| {
        let rest = media_type.strip_prefix(known);
        rest.is_some_and(|rest| matches!(rest, "" | "+gzip" | "+zstd" | ".gzip" | ".zstd"))
    };
    match LAYERS.iter().any(is_known) {
        true => Ok(()),
        false => {
            let shown: String = media_type.escape_debug().take(100).collect();
            Err(format!("it has a layer of the media type \"{shown}\", which is not supported"))
        }
    }
}

fn json<'a, T: Deserialize<'a>>(bytes: &'a [u8]) -> Result<T, String> {
    // The error's text could quote the document, which a registry may have fetched from anywhere.
    serde_json::from_slice(bytes).map_err(|error| {
        format!("it is not JSON of the right form (line {}, column {})", error.line(), error.column())
    })
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct WireDocument {
    manifests: Option<Vec<WireDescriptor>>,
    config: Option<WireDescriptor>,
    layers: Option<Vec<WireDescriptor>>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct WireDescriptor {
    #[serde(default)]
    media_type: String,
    digest: String,
    size: u64,
    platform: Option<Platform>,
    annotations: Option<WireAnnotations>,
}

#[derive(Deserialize)]
struct WireAnnotations {
    #[serde(rename = "org.opencontainers.image.ref.name")]
    tag: Option<String>,
}

#[derive(Deserialize)]
struct WireConfig {
    #[serde(flatten)]
    platform: Platform,
    config: Option<WireRunConfig>,
}

#[derive(Default, Deserialize)]
struct WireRunConfig {
    #[serde(rename = "User")]
    user: Option<String>,
    #[serde(rename = "Env")]
    variables: Option<Vec<String>>,
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::{Value, json};

    fn machine() -> Platform {
        Platform { architecture: "amd64".into(), os: "linux".into(), variant: None }
    }

    fn blob(name: &str) -> BlobName {
        BlobName { digest: ImageDigest::of(name.as_bytes()), size: name.len() as u64 }
    }

    fn descriptor(name: &str, more: Value) -> Value {
        let BlobName { digest, size } = blob(name);
        let mut all = json!({ "digest": digest.to_string(), "size": size });
        all.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        all
    }

    fn index(entries: &[Value]) -> PlatformIndex {
        match Document::decode(json!({ "schemaVersion": 2, "manifests": entries }).to_string().as_bytes()) {
            Ok(Document::Index(index)) => index,
            other => panic!("{other:?}"),
        }
    }

    fn platform(os: &str, architecture: &str, variant: Option<&str>) -> Value {
        json!({ "platform": { "os": os, "architecture": architecture, "variant": variant } })
    }

    #[test]
    fn of_several_platforms_the_plainest_that_runs_here_is_taken() {
        let all = index(&[
            descriptor("attestation", platform("unknown", "unknown", None)),
            descriptor("windows", platform("windows", "amd64", None)),
            descriptor("v3", platform("linux", "amd64", Some("v3"))),
            descriptor("plain", platform("linux", "amd64", None)),
            descriptor("arm", platform("linux", "arm64", Some("v8"))),
        ]);
        assert_eq!(all.choose(&machine()), Ok(&blob("plain")));
        let arm = Platform { architecture: "arm64".into(), ..machine() };
        assert_eq!(all.choose(&arm), Ok(&blob("arm")));
        let risc = Platform { architecture: "riscv64".into(), ..machine() };
        let problem = all.choose(&risc).unwrap_err();
        assert!(problem.contains("not for linux/riscv64") && problem.contains("linux/arm64/v8"), "{problem}");
        let only = index(&[descriptor("one", json!({}))]);
        assert_eq!(only.choose(&machine()), Ok(&blob("one")));
    }

    #[test]
    fn a_manifest_has_layers_of_known_kinds_in_order() {
        let manifest = |kinds: &[&str]| {
            let layers: Vec<_> =
                kinds.iter().map(|kind| descriptor(kind, json!({ "mediaType": kind }))).collect();
            let manifest = json!({ "config": descriptor("config", json!({})), "layers": layers });
            Document::decode(manifest.to_string().as_bytes())
        };
        let kinds = [
            "application/vnd.oci.image.layer.v1.tar+zstd",
            "application/vnd.docker.image.rootfs.diff.tar.gzip",
            "application/vnd.oci.image.layer.v1.tar",
        ];
        let layers = kinds.map(blob).to_vec();
        assert_eq!(manifest(&kinds), Ok(Document::Manifest(Manifest { config: blob("config"), layers })));
        let problem = manifest(&["application/vnd.oci.image.layer.v1.tar+gzip+encrypted"]).unwrap_err();
        assert!(problem.contains("+encrypted"), "{problem}");
        assert!(manifest(&[kinds[2]; MAX_LAYERS + 1]).unwrap_err().contains("layers"));
    }

    #[test]
    fn documents_that_are_something_else_are_refused() {
        for text in
            ["", "[]", "{}", "{\"manifests\": 1}", "{\"manifests\": [{\"digest\": \"x\", \"size\": 1}]}"]
        {
            assert!(Document::decode(text.as_bytes()).is_err(), "{text}");
        }
        let negative =
            json!({ "config": { "digest": blob("x").digest.to_string(), "size": -1 }, "layers": [] });
        assert!(Document::decode(negative.to_string().as_bytes()).is_err());
    }

    #[test]
    fn a_configuration_has_variables_and_must_be_for_this_machine() {
        let config = json!({
            "architecture": "amd64", "os": "linux",
            "config": { "Env": ["PATH=/usr/bin", "EMPTY=", "A=b=c", "=x", "nothing"], "User": "0" },
        });
        let decoded = ImageConfig::decode(config.to_string().as_bytes(), &machine()).unwrap();
        let expected = [("PATH", "/usr/bin"), ("EMPTY", ""), ("A", "b=c")];
        assert_eq!(decoded.user, "0");
        assert_eq!(decoded.environment, expected.map(|(name, value)| (name.to_owned(), value.to_owned())));
        let arm = Platform { architecture: "arm64".into(), ..machine() };
        let problem = ImageConfig::decode(config.to_string().as_bytes(), &arm).unwrap_err();
        assert!(problem.contains("for linux/amd64, not for linux/arm64"), "{problem}");
        let bare = json!({ "architecture": "amd64", "os": "linux" });
        assert_eq!(ImageConfig::decode(bare.to_string().as_bytes(), &machine()), Ok(ImageConfig::default()));
    }
}
