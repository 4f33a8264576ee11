//! Configuration files: any content leads to settings, or to an error that says where.

#![no_main]

use gorego::config::{Config, Machine, Settings, load};
use libfuzzer_sys::fuzz_target;
use std::path::{Path, PathBuf};

fuzz_target!(|text: &str| {
    let Ok(loaded) = load::from_text(Path::new("gorego.toml"), text) else { return };
    let machine =
        Machine { cpus: 2, cache_home: Some(PathBuf::from("/cache")), current_dir: PathBuf::from("/") };
    if let Ok(settings) = Settings::new(&loaded, &machine) {
        assert!(settings.cache_dir.is_absolute() && settings.max_blob_bytes <= settings.max_size_bytes);
        assert!(settings.execution.is_none_or(|execution| execution.slots > 0));
        assert_ne!(settings.instances.all().len(), 0);
    }
    // The effective value of every key can be shown.
    assert_eq!(load::keys(&loaded.config).len(), load::keys(&Config::default()).len());
});
