//! Container images made by the test itself: archives of layers, and the documents around them.

#![allow(dead_code, clippy::unwrap_used, missing_docs)]

use serde_json::{Value, json};
use sha2::{Digest as _, Sha256};
use std::{
    collections::BTreeMap,
    fs,
    io::Write as _,
    path::{Path, PathBuf},
    process::Command,
};
use tar::{Builder, EntryType, Header};

/// The archive of a layer. Names are used unchanged, even names that no ordinary program would write.
pub(crate) struct LayerArchive(Builder<Vec<u8>>);

impl LayerArchive {
    pub(crate) fn new() -> Self {
        Self(Builder::new(Vec::new()))
    }

    pub(crate) fn directory(self, path: &str, mode: u32) -> Self {
        self.entry(EntryType::Directory, path.as_bytes(), mode, "", b"")
    }

    pub(crate) fn file(self, path: &str, content: &[u8], mode: u32) -> Self {
        self.entry(EntryType::Regular, path.as_bytes(), mode, "", content)
    }

    pub(crate) fn symlink(self, path: &str, target: &str) -> Self {
        self.entry(EntryType::Symlink, path.as_bytes(), 0o777, target, b"")
    }

    pub(crate) fn hard_link(self, path: &str, target: &str) -> Self {
        self.entry(EntryType::Link, path.as_bytes(), 0o644, target, b"")
    }

    pub(crate) fn entry(
        mut self,
        kind: EntryType,
        path: &[u8],
        mode: u32,
        target: &str,
        content: &[u8],
    ) -> Self {
        let mut header = Header::new_gnu();
        let fields = header.as_gnu_mut().unwrap();
        fields.name[..path.len()].copy_from_slice(path);
        fields.linkname[..target.len()].copy_from_slice(target.as_bytes());
        header.set_entry_type(kind);
        header.set_mode(mode);
        header.set_mtime(1_000_000_000);
        header.set_size(content.len() as u64);
        header.set_cksum();
        self.0.append(&header, content).unwrap();
        self
    }

    pub(crate) fn finish(self) -> Vec<u8> {
        self.0.into_inner().unwrap()
    }
}

/// Adds a file of this machine to a layer.
fn with_file(layer: LayerArchive, at: &str, from: &Path) -> LayerArchive {
    layer.file(at.trim_start_matches('/'), &fs::read(from).unwrap(), 0o755)
}

/// A layer with a shell at `image/sh`, made from a shell of this machine: busybox, or `/bin/sh` with its libraries.
pub(crate) fn shell_layer() -> LayerArchive {
    let needs = |program: &Path| {
        let listed = Command::new("ldd").arg(program).output();
        let text =
            listed.map(|output| String::from_utf8_lossy(&output.stdout).into_owned()).unwrap_or_default();
        let paths = text.split_whitespace().filter(|word| word.starts_with('/')).map(PathBuf::from);
        paths.filter(|path| path.exists()).collect::<Vec<_>>()
    };
    let busybox = ["/bin/busybox", "/usr/bin/busybox"].iter().map(Path::new).find(|path| path.exists());
    let shell = busybox.unwrap_or(Path::new("/bin/sh")).canonicalize().unwrap();
    let name = if busybox.is_some() { "image/busybox" } else { "image/sh" };
    let mut layer = with_file(LayerArchive::new(), name, &shell);
    if busybox.is_some() {
        layer = layer.symlink("image/sh", "busybox");
    }
    for library in needs(&shell) {
        layer = with_file(layer, library.to_str().unwrap(), &library);
    }
    layer
}

pub(crate) fn gzip(bytes: &[u8]) -> Vec<u8> {
    let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    encoder.write_all(bytes).unwrap();
    encoder.finish().unwrap()
}

pub(crate) fn zstd(bytes: &[u8]) -> Vec<u8> {
    zstd::encode_all(bytes, 1).unwrap()
}

pub(crate) fn digest(bytes: &[u8]) -> String {
    format!("sha256:{}", const_hex::encode(Sha256::digest(bytes)))
}

/// The architecture of this machine, in the words of image indexes.
pub(crate) fn architecture() -> &'static str {
    match std::env::consts::ARCH {
        "x86_64" => "amd64",
        "aarch64" => "arm64",
        other => other,
    }
}

/// The blobs of some images, by digest.
#[derive(Clone, Default)]
pub(crate) struct Blobs(pub BTreeMap<String, Vec<u8>>);

impl Blobs {
    pub(crate) fn put(&mut self, bytes: Vec<u8>) -> String {
        let digest = digest(&bytes);
        self.0.insert(digest.clone(), bytes);
        digest
    }

    pub(crate) fn descriptor(&self, digest: &str, media_type: &str) -> Value {
        json!({ "mediaType": media_type, "digest": digest, "size": self.0[digest].len() })
    }

    /// Adds an image for this machine. Returns the digest of its manifest.
    pub(crate) fn image(&mut self, layers: Vec<Vec<u8>>, config: Value) -> String {
        let layers: Vec<_> = layers
            .into_iter()
            .map(|layer| {
                let kind = match &layer[..] {
                    [0x1f, 0x8b, ..] => "+gzip",
                    [0x28, 0xb5, ..] => "+zstd",
                    _ => "",
                };
                let digest = self.put(layer);
                self.descriptor(&digest, &format!("application/vnd.oci.image.layer.v1.tar{kind}"))
            })
            .collect();
        let config = json!({ "architecture": architecture(), "os": "linux", "config": config });
        let config = self.put(config.to_string().into_bytes());
        let config = self.descriptor(&config, "application/vnd.oci.image.config.v1+json");
        let manifest = json!({
            "schemaVersion": 2,
            "mediaType": MANIFEST,
            "config": config,
            "layers": layers,
        });
        self.put(manifest.to_string().into_bytes())
    }

    /// An index of these manifests, as text.
    pub(crate) fn index(&self, entries: &[Value]) -> String {
        json!({ "schemaVersion": 2, "mediaType": INDEX, "manifests": entries }).to_string()
    }

    /// The entry of an index for a manifest.
    pub(crate) fn entry(&self, digest: &str, more: Value) -> Value {
        let mut entry = self.descriptor(digest, MANIFEST);
        entry.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        entry
    }

    /// Writes a layout directory with these entries of its index.
    pub(crate) fn write_layout(&self, directory: &Path, entries: &[Value]) {
        let blobs = directory.join("blobs/sha256");
        fs::create_dir_all(&blobs).unwrap();
        for (digest, bytes) in &self.0 {
            fs::write(blobs.join(digest.strip_prefix("sha256:").unwrap()), bytes).unwrap();
        }
        fs::write(directory.join("oci-layout"), r#"{"imageLayoutVersion": "1.0.0"}"#).unwrap();
        fs::write(directory.join("index.json"), self.index(entries)).unwrap();
    }
}

pub(crate) const MANIFEST: &str = "application/vnd.oci.image.manifest.v1+json";
pub(crate) const INDEX: &str = "application/vnd.oci.image.index.v1+json";

/// Sets the tag of an entry of an index.
pub(crate) fn tagged(tag: &str) -> Value {
    json!({ "annotations": { "org.opencontainers.image.ref.name": tag } })
}
