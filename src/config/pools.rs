//! `[execution.pools.NAME]`: the settings of pools.
//!
//! A property is written in the shortest form that shows how it is compared: a string means exactly that value, a list
//! means any one of its values, `{ minimum = 8 }` means at most 8, `{ size = "8 GB" }` means at most that size, and `{
//! ignore = true }` means any value. This file parses and prints these forms. [`crate::platform`] defines their
//! meaning, and [`super::settings`] checks the result.

use super::{
    ExecutionConfig, Machine,
    checker::Checker,
    limits::{MAX_CONCURRENCY, PoolLimitsConfig, limits, pool_limits},
    sandbox::PoolSandboxConfig,
};
use crate::{
    limits::{LimitSettings, Room},
    platform::{self, Offer, Offers, UnknownProperties},
    sandbox::{
        kind::CellNetwork,
        settings::{SandboxMode, SandboxSettings},
    },
    size::Size,
};
use serde::{
    Deserialize, Deserializer, Serialize, Serializer,
    de::{self, MapAccess, SeqAccess, Visitor},
    ser::SerializeMap as _,
};
use std::fmt;

/// Maximum number of pools. A task is in the queue of each pool that can run it.
const MAX_POOLS: usize = 64;
/// Maximum length of a pool's name in bytes. It is a part of the names of workers.
const MAX_POOL_NAME: usize = 64;
/// Minimum memory of a pool. A smaller value indicates a wrong unit.
const MIN_POOL_MEMORY: Size = Size::from_bytes(16_000_000);
/// The name of the pool that exists if none is configured.
pub(super) const DEFAULT_POOL: &str = "local";

/// An `[execution.pools.NAME]` section: one pool of slots.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PoolConfig {
    /// Number of actions that run in the pool at the same time.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub slots: Option<usize>,
    /// CPUs and memory that the actions of the pool share, instead of a number of slots.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cores: Option<usize>,
    /// The memory for these CPUs.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub memory_gb: Option<Size>,
    /// The offered values, by property name.
    #[serde(default)]
    pub properties: Offers,
    /// The limits of one action, where they differ from `[execution.limits]`.
    #[serde(default)]
    pub limits: PoolLimitsConfig,
    /// Keys of `[execution.sandbox]` with another value in this pool.
    #[serde(default, skip_serializing_if = "is_default")]
    pub sandbox: PoolSandboxConfig,
}

fn is_default(sandbox: &PoolSandboxConfig) -> bool {
    *sandbox == PoolSandboxConfig::default()
}

impl Serialize for Offer {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match self {
            Self::Exact(value) => value.serialize(serializer),
            Self::Set(values) => values.serialize(serializer),
            Self::Minimum(most) => {
                let mut map = serializer.serialize_map(Some(1))?;
                map.serialize_entry("minimum", most)?;
                map.end()
            }
            Self::Size(most) => {
                let mut map = serializer.serialize_map(Some(1))?;
                map.serialize_entry("size", &Size::from_bytes(*most))?;
                map.end()
            }
            Self::Ignore => {
                let mut map = serializer.serialize_map(Some(1))?;
                map.serialize_entry("ignore", &true)?;
                map.end()
            }
        }
    }
}

impl<'de> Deserialize<'de> for Offer {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(OfferVisitor)
    }
}

struct OfferVisitor;

impl<'de> Visitor<'de> for OfferVisitor {
    type Value = Offer;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(
            "\"value\", [\"value\", \"other\"], { minimum = 8 }, { size = \"8 GB\" } or { ignore = true }",
        )
    }

    fn visit_str<E: de::Error>(self, value: &str) -> Result<Offer, E> {
        Ok(Offer::Exact(value.to_owned()))
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<Offer, A::Error> {
        let mut values = Vec::new();
        while let Some(value) = list.next_element()? {
            values.push(value);
        }
        if values.is_empty() {
            return Err(de::Error::custom("an empty list offers nothing; omit the property"));
        }
        Ok(Offer::Set(values))
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Offer, A::Error> {
        let key: Option<String> = map.next_key()?;
        let offer = match key.as_deref() {
            Some("minimum") => Offer::Minimum(map.next_value()?),
            Some("size") => Offer::Size(map.next_value::<Size>()?.bytes()),
            Some("ignore") => match map.next_value()? {
                true => Offer::Ignore,
                false => {
                    return Err(de::Error::custom("ignore = false has no effect; omit the property"));
                }
            },
            Some(other) => return Err(de::Error::unknown_field(other, &["minimum", "size", "ignore"])),
            None => return Err(de::Error::custom("expected { minimum = 8 } or { ignore = true }")),
        };
        match map.next_key::<String>()? {
            None => Ok(offer),
            Some(_) => Err(de::Error::custom("a property can have only one form")),
        }
    }

    fn visit_i64<E: de::Error>(self, number: i64) -> Result<Offer, E> {
        Err(E::custom(format!(
            "a number is ambiguous: write {{ minimum = {number} }} for up to {number}, or \"{number}\" for that \
             value and no other"
        )))
    }
}

impl Serialize for UnknownProperties {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(match self {
            Self::Ignore => "ignore",
            Self::Refuse => "refuse",
        })
    }
}

impl<'de> Deserialize<'de> for UnknownProperties {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        match String::deserialize(deserializer)?.as_str() {
            "ignore" => Ok(Self::Ignore),
            "refuse" => Ok(Self::Refuse),
            other => Err(de::Error::unknown_variant(other, &["ignore", "refuse"])),
        }
    }
}

/// The checked settings of one pool.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PoolSettings {
    /// The name; "local" if no pool is configured.
    pub name: String,
    /// Whether the configuration contains the pool. Otherwise it is the default pool.
    pub is_declared: bool,
    /// Number of actions that run in the pool at the same time; at least 1.
    pub slots: usize,
    /// The offered values, by property name, including the values that the limits imply.
    pub offers: Offers,
    /// The limits of one action.
    pub limits: LimitSettings,
    /// The room that all actions share; `None` if the pool only counts slots.
    pub room: Option<Room>,
    /// The sandbox of its actions.
    pub sandbox: SandboxSettings,
}

impl PoolSettings {
    /// Stops offering a network to actions that request one. Values of these properties in the configuration stay.
    pub(crate) fn withdraw_network(&mut self) {
        self.sandbox.network = CellNetwork::Off;
        let has_sandbox = self.sandbox.mode != SandboxMode::Off;
        for (name, offer) in platform::built_in(has_sandbox, true) {
            if self.offers.get(name) == Some(&offer) {
                self.offers.remove(name);
            }
        }
        self.offers = with_built_in(std::mem::take(&mut self.offers), &self.sandbox);
    }
}

/// The configured pools, or else the default pool with the values of `concurrency` and `platform`. `sandbox` is the
/// common sandbox of all pools.
pub(super) fn pools(
    check: &mut Checker<'_>,
    machine: &Machine,
    sandbox: &SandboxSettings,
) -> Vec<PoolSettings> {
    let (config, default) = (&check.loaded.config.execution, ExecutionConfig::default());
    check.require(
        "execution.platform",
        config.platform.keys().all(|name| !name.is_empty()),
        "has a property without a name",
    );
    let common = limits(check);
    if config.pools.is_empty() {
        return vec![default_pool(config, common, machine, sandbox)];
    }
    let own = "has no effect when pools are configured; each pool has its own";
    check.require("execution.concurrency", config.concurrency == 0, &format!("{own} slots"));
    check.require("execution.platform", config.platform == default.platform, &format!("{own} properties"));
    let mut problems = Vec::new();
    let declared = config.pools.iter();
    let mut pools: Vec<_> =
        declared.map(|(name, pool)| declared_pool(check, &mut problems, name, pool, sandbox)).collect();
    let slots = pools.iter().fold(0, |sum: usize, pool| sum.saturating_add(pool.slots));
    if slots > MAX_CONCURRENCY {
        problems
            .push(format!("the pools have {slots} slots together; at most {MAX_CONCURRENCY} are possible"));
    }
    if pools.len() > MAX_POOLS {
        problems.push(format!("there are {} pools; at most {MAX_POOLS} are possible", pools.len()));
    }
    for problem in problems {
        let origin = check.loaded.origin("execution.pools");
        check.problems.push(format!("execution.pools ({origin}): {problem}"));
    }
    pools.sort_by_cached_key(|pool| platform::preference(&pool.name, &pool.offers));
    pools
}

/// The pool of a server without configured pools.
fn default_pool(
    config: &ExecutionConfig,
    limits: LimitSettings,
    machine: &Machine,
    sandbox: &SandboxSettings,
) -> PoolSettings {
    let exact = |(name, value): (&String, &String)| (name.clone(), Offer::Exact(value.clone()));
    PoolSettings {
        name: DEFAULT_POOL.into(),
        is_declared: false,
        slots: if config.concurrency == 0 { machine.cpus.max(1) } else { config.concurrency },
        offers: with_built_in(limits.offers(config.platform.iter().map(exact).collect()), sandbox),
        limits,
        room: None,
        sandbox: sandbox.clone(),
    }
}

/// Checks a configured pool. Its problems are added to `problems`.
fn declared_pool(
    check: &mut Checker<'_>,
    problems: &mut Vec<String>,
    name: &str,
    pool: &PoolConfig,
    sandbox: &SandboxSettings,
) -> PoolSettings {
    let is_plain = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.');
    if name.is_empty() || name.len() > MAX_POOL_NAME || !name.chars().all(is_plain) {
        problems.push(format!(
            "\"{}\" cannot be the name of a pool: use up to {MAX_POOL_NAME} letters, digits, \"-\", \"_\" and \".\"",
            name.escape_debug()
        ));
    }
    let (slots, room) = extent(name, pool).unwrap_or_else(|problem| {
        problems.push(problem);
        (0, None)
    });
    if pool.properties.contains_key("") {
        problems.push(format!("\"{name}\" has a property without a name"));
    }
    let (limits, of_limits) = pool_limits(check, &pool.limits);
    problems.extend(of_limits.into_iter().map(|problem| format!("\"{name}\": {problem}")));
    let limits = room.as_ref().map_or(limits, |room| limits.within(room));
    let sandbox = pool.sandbox.apply(sandbox).unwrap_or_else(|problem| {
        problems.push(format!("sandbox of \"{name}\": {problem}"));
        sandbox.clone()
    });
    PoolSettings {
        name: name.to_owned(),
        is_declared: true,
        slots,
        room,
        offers: with_built_in(limits.offers(pool.properties.clone()), &sandbox),
        limits,
        sandbox,
    }
}

/// Adds the properties that the server itself knows, unless the pool sets them.
fn with_built_in(mut offers: Offers, sandbox: &SandboxSettings) -> Offers {
    let has_sandbox = sandbox.mode != SandboxMode::Off;
    // Without a sandbox, all actions have the network of the host.
    for (name, offer) in platform::built_in(has_sandbox, sandbox.network != CellNetwork::Off || !has_sandbox)
    {
        offers.entry(name.to_owned()).or_insert(offer);
    }
    offers
}

/// The maximum number of concurrent actions of a pool, and the room that they share. An action takes at least one core,
/// so a pool has at most as many slots as cores.
fn extent(name: &str, pool: &PoolConfig) -> Result<(usize, Option<Room>), String> {
    let counts = 1..=MAX_CONCURRENCY;
    match (pool.slots, pool.cores, pool.memory_gb) {
        (Some(slots), None, None) if counts.contains(&slots) => Ok((slots, None)),
        (Some(_), None, None) => Err(format!("slots of \"{name}\" must be between 1 and {MAX_CONCURRENCY}")),
        (None, Some(cores), Some(memory)) if counts.contains(&cores) && memory >= MIN_POOL_MEMORY => {
            Ok((cores, Some(Room { cores: cores as u64, memory: memory.bytes() })))
        }
        (None, Some(_), Some(_)) => Err(format!(
            "\"{name}\" must have between 1 and {MAX_CONCURRENCY} cores, and memory_gb of at least {MIN_POOL_MEMORY}"
        )),
        (None, ..) => Err(format!("\"{name}\" needs slots, or cores and memory_gb")),
        (Some(_), ..) => Err(format!("\"{name}\" has both slots and cores or memory_gb; choose one")),
    }
}
