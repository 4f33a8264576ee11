//! [`StrictObject`]: the strict form of JSON objects that tokens and key sets must have. Pure.
//!
//! Parsers treat repeated names differently, so two programs could read different claims in one token. Here a repeated
//! name is an error. So is an object that is nested deeper than [`MAX_DEPTH`].

use serde::{
    Deserialize, Deserializer,
    de::{DeserializeSeed, Error, MapAccess, SeqAccess, Visitor},
};
use serde_json::{Map, Number, Value};
use std::fmt;

/// Maximum nesting of objects and lists. Key sets need three levels, and the claims of known issuers four.
pub(super) const MAX_DEPTH: usize = 8;

/// An object in which each name occurs once, at every level.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct StrictObject(pub(super) Map<String, Value>);

impl StrictObject {
    /// Parses a whole text as one object.
    ///
    /// # Errors
    /// What is wrong with it, without its values.
    pub(super) fn parse(bytes: &[u8]) -> Result<Map<String, Value>, String> {
        let parsed: Self = serde_json::from_slice(bytes).map_err(|error| error.to_string())?;
        Ok(parsed.0)
    }
}

impl<'de> Deserialize<'de> for StrictObject {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        match StrictValue(MAX_DEPTH).deserialize(deserializer)? {
            Value::Object(members) => Ok(Self(members)),
            _ => Err(D::Error::custom("it is not an object")),
        }
    }
}

/// Parses a value with at most this many levels.
struct StrictValue(usize);

impl StrictValue {
    fn below<E: Error>(&self) -> Result<Self, E> {
        let left = self.0.checked_sub(1);
        left.map(Self).ok_or_else(|| E::custom(format!("it has more than {MAX_DEPTH} levels")))
    }
}

impl<'de> DeserializeSeed<'de> for StrictValue {
    type Value = Value;

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<Value, D::Error> {
        deserializer.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for StrictValue {
    type Value = Value;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("JSON")
    }

    fn visit_unit<E>(self) -> Result<Value, E> {
        Ok(Value::Null)
    }

    fn visit_bool<E>(self, flag: bool) -> Result<Value, E> {
        Ok(Value::Bool(flag))
    }

    fn visit_i64<E>(self, number: i64) -> Result<Value, E> {
        Ok(Value::Number(number.into()))
    }

    fn visit_u64<E>(self, number: u64) -> Result<Value, E> {
        Ok(Value::Number(number.into()))
    }

    fn visit_f64<E: Error>(self, number: f64) -> Result<Value, E> {
        Number::from_f64(number).map(Value::Number).ok_or_else(|| E::custom("it has a number out of range"))
    }

    fn visit_str<E>(self, text: &str) -> Result<Value, E> {
        Ok(Value::String(text.to_owned()))
    }

    fn visit_string<E>(self, text: String) -> Result<Value, E> {
        Ok(Value::String(text))
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<Value, A::Error> {
        let mut values = Vec::new();
        while let Some(value) = list.next_element_seed(self.below()?)? {
            values.push(value);
        }
        Ok(Value::Array(values))
    }

    fn visit_map<A: MapAccess<'de>>(self, mut object: A) -> Result<Value, A::Error> {
        let mut members = Map::new();
        while let Some(name) = object.next_key::<String>()? {
            let value = object.next_value_seed(self.below()?)?;
            if members.insert(name, value).is_some() {
                return Err(A::Error::custom("it has a name twice"));
            }
        }
        Ok(Value::Object(members))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn an_object_is_read_as_it_is() {
        let text = r#"{"a":[1,-2,0.5,null,true,{"b":"\u00e9"}],"c":{}}"#;
        let expected = json!({"a": [1, -2, 0.5, null, true, {"b": "é"}], "c": {}});
        assert_eq!(Value::Object(StrictObject::parse(text.as_bytes()).unwrap()), expected);
    }

    #[test]
    fn ambiguous_json_and_values_that_are_no_objects_are_refused() {
        for (text, problem) in [
            (r#"{"a":1,"a":1}"#, "a name twice"),
            (r#"{"a":1,"\u0061":2}"#, "a name twice"),
            (r#"{"x":[{"a":1,"b":2,"a":3}]}"#, "a name twice"),
            ("[]", "not an object"),
            ("\"text\"", "not an object"),
            (r#"{"a":1} {}"#, "trailing"),
            (r#"{"a":1e999}"#, "out of range"),
            (r#"{"a":"\ud800"}"#, ""),
            ("{", ""),
            ("", ""),
        ] {
            let refused = StrictObject::parse(text.as_bytes()).unwrap_err();
            assert!(refused.contains(problem), "{text}: {refused}");
        }
        assert!(StrictObject::parse(b"{\"a\":\"\xff\"}").is_err());
    }

    #[test]
    fn the_depth_is_bounded() {
        let nested = |levels: usize| format!("{}1{}", r#"{"a":"#.repeat(levels), "}".repeat(levels));
        assert!(StrictObject::parse(nested(MAX_DEPTH).as_bytes()).is_ok());
        assert!(StrictObject::parse(nested(MAX_DEPTH + 1).as_bytes()).unwrap_err().contains("levels"));
        let lists = format!(r#"{{"a":{}"#, "[".repeat(100_000));
        assert!(StrictObject::parse(lists.as_bytes()).unwrap_err().contains("levels"));
    }
}
