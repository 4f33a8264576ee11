//! `[execution.pools.NAME]`: how pools are written down.
//!
//! What a pool offers is said in the shortest form that shows how it is compared: a string is that value and no other, a list
//! is any one of its values, `{ minimum = 8 }` is as much as 8, `{ ignore = true }` is whatever is asked for. The forms are
//! read and written here; what they mean is in [`crate::platform`], and whether the whole makes sense in
//! [`super::settings`].

use crate::platform::{Offer, Offers, UnknownProperties};
use serde::{
    Deserialize, Deserializer, Serialize, Serializer,
    de::{self, MapAccess, SeqAccess, Visitor},
    ser::SerializeMap as _,
};
use std::fmt;

/// Keys of a pool, for suggestions.
pub const KEYS: &[&str] = &["slots", "properties"];

/// `[execution.pools.NAME]`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PoolConfig {
    /// Actions that run in it at the same time.
    pub slots: usize,
    /// What it offers, by the name of the property.
    #[serde(default)]
    pub properties: Offers,
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
        f.write_str("\"value\", [\"value\", \"other\"], { minimum = 8 } or { ignore = true }")
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
            return Err(de::Error::custom("an empty list offers nothing; leave the property out"));
        }
        Ok(Offer::Set(values))
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Offer, A::Error> {
        let key: Option<String> = map.next_key()?;
        let offer = match key.as_deref() {
            Some("minimum") => Offer::Minimum(map.next_value()?),
            Some("ignore") => match map.next_value()? {
                true => Offer::Ignore,
                false => {
                    return Err(de::Error::custom("ignore = false says nothing; leave the property out"));
                }
            },
            Some(other) => return Err(de::Error::unknown_field(other, &["minimum", "ignore"])),
            None => return Err(de::Error::custom("expected { minimum = 8 } or { ignore = true }")),
        };
        match map.next_key::<String>()? {
            None => Ok(offer),
            Some(_) => Err(de::Error::custom("a property is compared in one way only")),
        }
    }

    fn visit_i64<E: de::Error>(self, number: i64) -> Result<Offer, E> {
        Err(E::custom(format!(
            "a number can mean two things: write {{ minimum = {number} }} for as much as {number}, or \"{number}\" for that \
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
