//! `[execution.images]`: the settings of container images, and their checks.

use super::{Machine, checker::Checker};
use crate::{host::ImageRegistry, size::Size};
use serde::{Deserialize, Serialize};
use std::{
    path::{Component, Path, PathBuf},
    time::Duration,
};

/// The `[execution.images]` section. Without registries and layouts, actions cannot name images.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct ImagesConfig {
    /// Registries from which images may be pulled.
    pub registries: Vec<String>,
    /// How tags are resolved.
    pub tags: Tags,
    /// A Docker `config.json` with credentials for registries; empty for none.
    pub credentials: PathBuf,
    /// Directories of this machine below which image layout directories may lie.
    pub layouts: Vec<PathBuf>,
    /// Limit on the total size of the unpacked images.
    pub max_size_gb: Size,
    /// Time limit of one pull.
    #[serde(with = "humantime_serde")]
    pub timeout: Duration,
}

/// How the tag of an image in a registry is resolved.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Tags {
    /// Tags are refused: images must be named by their digests.
    Refuse,
    /// A tag stands for the digest that the registry has for it when an action is about to run.
    EachAction,
    /// A tag stands for the digest that the registry had for it when this server first used it.
    Once,
}

impl Default for ImagesConfig {
    fn default() -> Self {
        Self {
            registries: Vec::new(),
            tags: Tags::Refuse,
            credentials: PathBuf::new(),
            layouts: Vec::new(),
            max_size_gb: Size::from_gb(20),
            timeout: Duration::from_secs(10 * 60),
        }
    }
}

/// The checked settings of container images; see [`ImagesConfig`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ImagesSettings {
    /// Registries that may be contacted.
    pub registries: Vec<ImageRegistry>,
    /// How tags are resolved.
    pub tags: Tags,
    /// A file with credentials.
    pub credentials: Option<PathBuf>,
    /// Absolute directories of this machine.
    pub layouts: Vec<PathBuf>,
    /// Limit on the total size of the unpacked images.
    pub max_bytes: u64,
    /// Time limit of one pull.
    pub timeout: Duration,
}

/// The credentials file, which no action may see.
pub(super) fn credentials(check: &mut Checker<'_>, machine: &Machine) -> Option<PathBuf> {
    let path = &check.loaded.config.execution.images.credentials;
    let is_set = !path.as_os_str().is_empty();
    is_set.then(|| check.directory("execution.images.credentials", path, machine))
}

/// Checks the section; `None` if actions cannot name images. `is_sandboxed` says whether a pool has a sandbox.
pub(super) fn images(
    check: &mut Checker<'_>,
    credentials: Option<PathBuf>,
    is_sandboxed: bool,
) -> Option<ImagesSettings> {
    let config = &check.loaded.config.execution.images;
    let form = "a registry, such as \"registry.example.com\", \"registry.example.com:5000\", or \"http://localhost:5000\" for one \
                without TLS";
    let registries =
        check.rules("execution.images.registries", &config.registries, form, ImageRegistry::parse);
    for path in &config.layouts {
        let is_plain = |part| matches!(part, Component::RootDir | Component::Normal(_));
        let is_fine = path.is_absolute() && path.components().all(is_plain) && path != Path::new("/");
        check.require(
            "execution.images.layouts",
            is_fine,
            &format!("\"{}\" is not the absolute path of a directory, without \"..\"", path.display()),
        );
    }
    check.duration("execution.images.timeout", config.timeout, false);
    let max_bytes = check.size("execution.images.max_size_gb", config.max_size_gb);
    if config.registries.is_empty() && config.layouts.is_empty() {
        return None;
    }
    let key = if config.registries.is_empty() { "layouts" } else { "registries" };
    check.require_with(
        &format!("execution.images.{key}"),
        &["execution.sandbox.mode", "execution.pools"],
        is_sandboxed,
        "needs the sandbox, which is off (execution.sandbox.mode)",
    );
    Some(ImagesSettings {
        registries,
        tags: config.tags,
        credentials,
        layouts: config.layouts.clone(),
        max_bytes,
        timeout: config.timeout,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::{Config, Loaded, Settings};
    use gorego_reapi::error::Result;

    fn checked(change: impl FnOnce(&mut Config)) -> Result<Settings> {
        let mut loaded = Loaded::defaults();
        change(&mut loaded.config);
        let machine = Machine { cpus: 1, cache_home: Some("/var/cache".into()), current_dir: "/".into() };
        Settings::new(&loaded, &machine)
    }

    #[test]
    fn without_registries_and_layouts_no_action_can_name_an_image_and_no_pool_knows_the_property() {
        let execution = checked(|_| {}).unwrap().execution.unwrap();
        assert_eq!(execution.images, None);
        assert!(!execution.pools[0].offers.contains_key("container-image"));
    }

    #[test]
    fn every_pool_allows_every_configured_image_unless_it_names_its_own() {
        let listed = |config: &mut Config| {
            config.execution.images.registries = vec!["R.example.com:5000".into(), "http://[::1]:80".into()];
            config.execution.images.credentials = "docker/config.json".into();
        };
        let execution = checked(listed).unwrap().execution.unwrap();
        let images = execution.images.unwrap();
        assert_eq!(
            images.registries[0],
            ImageRegistry { host: "r.example.com:5000".into(), is_plain: false }
        );
        assert!(images.registries[1].is_plain);
        assert_eq!(images.credentials, Some("/docker/config.json".into()));
        assert!(execution.sandbox.own.contains(&"/docker/config.json".into()), "no action may see it");
        assert_eq!(execution.pools[0].offers["container-image"], crate::platform::Offer::Ignore);
        let pools = |config: &mut Config| {
            listed(config);
            config.execution.pools = toml::from_str(
                "a = { slots = 1, properties = { container-image = 'docker://r.example.com:5000/a:b' } }\nb = { slots = 1 }",
            )
            .unwrap();
        };
        let pools = checked(pools).unwrap().execution.unwrap().pools;
        let has = |name: &str| {
            let pool = pools.iter().find(|pool| pool.name == name).unwrap();
            pool.offers.contains_key("container-image")
        };
        assert!(has("a") && !has("b"));
    }

    /// An action with an image would fail in a pool without a sandbox, but only if the other pools are busy.
    #[test]
    fn only_pools_with_a_sandbox_offer_images() {
        let with_pools = |pools: &'static str| {
            checked(move |config| {
                config.execution.images.registries = vec!["r.example.com".into()];
                config.execution.pools = toml::from_str(pools).unwrap();
            })
        };
        let mixed = with_pools("a = { slots = 1 }\nb = { slots = 1, sandbox = { mode = 'off' } }").unwrap();
        let offering: Vec<_> = mixed.execution.unwrap().pools;
        let offering = offering.iter().filter(|pool| pool.offers.contains_key("container-image"));
        assert_eq!(offering.map(|pool| &*pool.name).collect::<Vec<_>>(), ["a"]);
        let error = with_pools("b = { slots = 1, sandbox = { mode = 'off' } }").unwrap_err().to_string();
        assert!(error.contains("execution.images.registries"), "{error}");
    }

    #[test]
    fn invalid_values_are_refused_with_their_key() {
        for (key, change) in [
            (
                "registries",
                (|config| config.execution.images.registries = vec!["https://x/y".into()]) as fn(&mut Config),
            ),
            ("registries", |config| {
                config.execution.images.registries = vec!["r.example.com".into()];
                config.execution.sandbox.mode = crate::config::sandbox::Mode::Off;
            }),
            ("layouts", |config| config.execution.images.layouts = vec!["srv".into()]),
            ("layouts", |config| config.execution.images.layouts = vec!["/srv/../etc".into()]),
            ("timeout", |config| config.execution.images.timeout = Duration::ZERO),
            ("max_size_gb", |config| config.execution.images.max_size_gb = Size::from_bytes(1)),
        ] {
            let error = checked(change).unwrap_err().to_string();
            assert!(error.contains(&format!("execution.images.{key}")), "{error}");
        }
    }
}
