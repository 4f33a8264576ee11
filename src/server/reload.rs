//! The reloadable parts of the server, except the pools ([`super::pools`]) and TLS ([`super::tls`]).
//!
//! A new part implements [`Reloadable`] and is added to the list in `server.rs`.

use super::execution_setup::tag_policy;
use crate::{
    access::AccessLoader,
    actors::asset::origins::Origins,
    config::{AssetsSettings, LogConfig, Settings},
    host::HostRule,
    http::hosts::Hosts,
    images::Images,
    logging,
    quotas::{Quotas, limits::QuotaRules},
    reload::{PreparedChange, Reloadable},
};
use gorego_reapi::error::{Error, Result};
use std::{
    fmt::Debug,
    sync::{Arc, Mutex, PoisonError},
};

/// The value of a reloadable setting that is in effect.
#[derive(Debug, Clone)]
struct InEffect<T>(Arc<Mutex<T>>);

impl<T: Clone + PartialEq + Send + 'static> InEffect<T> {
    fn new(value: T) -> Self {
        Self(Arc::new(Mutex::new(value)))
    }

    /// The change to another value; `None` if the value is the same.
    fn change(
        &self,
        key: &str,
        next: T,
        describe: impl FnOnce(&T, &T) -> String,
        set: impl FnOnce(T) + Send + 'static,
    ) -> Option<PreparedChange> {
        let before = self.0.lock().unwrap_or_else(PoisonError::into_inner).clone();
        if before == next {
            return None;
        }
        let (description, current) = (describe(&before, &next), self.clone());
        let apply = async move {
            *current.0.lock().unwrap_or_else(PoisonError::into_inner) = next.clone();
            set(next);
            Ok(())
        };
        Some(PreparedChange { key: key.into(), description, apply: Some(Box::pin(apply)) })
    }
}

/// Describes the change from one value to another.
fn from_to(before: &impl Debug, after: &impl Debug) -> String {
    format!("{before:?} -> {after:?}")
}

/// Describes the change of a list's length.
fn counts<T>(before: &[T], after: &[T]) -> String {
    format!("{} -> {} entries", before.len(), after.len())
}

/// Applies `[log] filter` of a new configuration.
pub(super) struct ReloadLogFilter(InEffect<LogConfig>);

impl ReloadLogFilter {
    pub(super) fn new(log: &LogConfig) -> Self {
        Self(InEffect::new(log.clone()))
    }
}

impl Reloadable for ReloadLogFilter {
    fn keys(&self) -> &'static [&'static str] {
        &["log.filter"]
    }

    fn prepare(&self, next: &Settings) -> Result<Vec<PreparedChange>> {
        // A reload does not change the format.
        let format = self.0.0.lock().unwrap_or_else(PoisonError::into_inner).format;
        let next = LogConfig { format, ..next.log.clone() };
        let describe = |before: &LogConfig, after: &LogConfig| from_to(&before.filter, &after.filter);
        let set = |next: LogConfig| logging::set_filter(&next);
        Ok(self.0.change("log.filter", next, describe, set).into_iter().collect())
    }
}

/// The hosts under which HTTP is served.
pub(super) struct ReloadHosts {
    hosts: Hosts,
    current: InEffect<Vec<HostRule>>,
}

impl ReloadHosts {
    pub(super) fn new(hosts: Hosts, settings: &Settings) -> Self {
        Self { hosts, current: InEffect::new(settings.http_hosts.clone()) }
    }
}

impl Reloadable for ReloadHosts {
    fn keys(&self) -> &'static [&'static str] {
        &["http.allowed_hosts"]
    }

    fn prepare(&self, next: &Settings) -> Result<Vec<PreparedChange>> {
        let hosts = self.hosts.clone();
        let describe = |before: &Vec<HostRule>, after: &Vec<HostRule>| counts(before, after);
        let set = move |next| hosts.replace(next);
        let change = self.current.change("http.allowed_hosts", next.http_hosts.clone(), describe, set);
        Ok(change.into_iter().collect())
    }
}

/// The quotas of principals.
pub(super) struct ReloadQuotas {
    quotas: Quotas,
    current: InEffect<QuotaRules>,
}

impl ReloadQuotas {
    pub(super) fn new(quotas: Quotas, settings: &Settings) -> Self {
        Self { quotas, current: InEffect::new(settings.quotas.clone()) }
    }
}

impl Reloadable for ReloadQuotas {
    fn keys(&self) -> &'static [&'static str] {
        &["quotas"]
    }

    fn prepare(&self, next: &Settings) -> Result<Vec<PreparedChange>> {
        let quotas = self.quotas.clone();
        let describe = |before: &QuotaRules, after: &QuotaRules| {
            let principals = counts(&before.principals, &after.principals);
            format!("{}; principals: {principals}", from_to(&before.default, &after.default))
        };
        let set = move |next| quotas.replace(next);
        Ok(self.current.change("quotas", next.quotas.clone(), describe, set).into_iter().collect())
    }
}

/// The hosts and networks from which assets may be downloaded.
pub(super) struct ReloadOrigins {
    origins: Origins,
    current: InEffect<Origins>,
}

impl ReloadOrigins {
    pub(super) fn new(origins: Origins, settings: &AssetsSettings) -> Self {
        Self { origins, current: InEffect::new(rules(settings)) }
    }
}

fn rules(settings: &AssetsSettings) -> Origins {
    Origins::new(settings.hosts.clone(), settings.networks.clone())
}

impl Reloadable for ReloadOrigins {
    fn keys(&self) -> &'static [&'static str] {
        &["assets.allowed_hosts", "assets.allowed_networks"]
    }

    fn prepare(&self, next: &Settings) -> Result<Vec<PreparedChange>> {
        let (origins, assets) = (self.origins.clone(), next.assets.clone());
        let describe = |_: &Origins, _: &Origins| {
            format!("{} hosts and {} networks", assets.hosts.len(), assets.networks.len())
        };
        let (hosts, networks) = (assets.hosts.clone(), assets.networks.clone());
        let set = move |_| origins.replace(hosts, networks);
        let change = self.current.change("assets.allowed_hosts", rules(&next.assets), describe, set);
        Ok(change.into_iter().collect())
    }
}

/// The container images that actions may name.
pub(super) struct ReloadImages {
    images: Images,
    current: InEffect<AllowedImages>,
}

/// The reloadable part of the image settings.
#[derive(Debug, Clone, PartialEq)]
struct AllowedImages {
    registries: Vec<crate::host::ImageRegistry>,
    layouts: Vec<std::path::PathBuf>,
    tags: crate::config::Tags,
}

impl AllowedImages {
    fn of(settings: &Settings) -> Option<Self> {
        let images = settings.execution.as_ref()?.images.clone()?;
        Some(Self { registries: images.registries, layouts: images.layouts, tags: images.tags })
    }
}

impl ReloadImages {
    /// `None` if actions cannot name images.
    pub(super) fn new(images: Option<&Images>, settings: &Settings) -> Option<Self> {
        let current = InEffect::new(AllowedImages::of(settings)?);
        Some(Self { images: images?.clone(), current })
    }
}

impl Reloadable for ReloadImages {
    fn keys(&self) -> &'static [&'static str] {
        &["execution.images.registries", "execution.images.layouts", "execution.images.tags"]
    }

    fn prepare(&self, next: &Settings) -> Result<Vec<PreparedChange>> {
        let (images, key) = (self.images.clone(), "execution.images");
        let Some(next) = AllowedImages::of(next) else {
            // The pools would have to stop offering images.
            let description = "actions can no longer name images".to_owned();
            return Ok(vec![PreparedChange { key: key.into(), description, apply: None }]);
        };
        let describe = |_: &AllowedImages, next: &AllowedImages| {
            format!(
                "{} registries, {} layouts, tags = {:?}",
                next.registries.len(),
                next.layouts.len(),
                next.tags
            )
        };
        let set = move |next: AllowedImages| {
            images.allow(next.registries, next.layouts, tag_policy(next.tags));
        };
        Ok(self.current.change(key, next, describe, set).into_iter().collect())
    }
}

/// Roles and credentials, with the files that the configuration names.
pub(super) struct ReloadAccess(pub(super) Arc<AccessLoader>);

impl Reloadable for ReloadAccess {
    fn keys(&self) -> &'static [&'static str] {
        &["access"]
    }

    fn prepare(&self, next: &Settings) -> Result<Vec<PreparedChange>> {
        let Some(prepared) = self.0.prepare(next.access.clone())? else { return Ok(Vec::new()) };
        let loader = self.0.clone();
        let description = prepared.description();
        let apply = async move {
            let applied = tokio::task::spawn_blocking(move || loader.apply(prepared)).await;
            applied.map_err(|_| Error::internal("the rules of access could not be applied"))
        };
        Ok(vec![PreparedChange { key: "access".into(), description, apply: Some(Box::pin(apply)) }])
    }
}
