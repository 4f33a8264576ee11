//! Sizes in the notation of the configuration: `50`, `0.5`, `"200 MB"`, `"1.5 TB"`, `"64 GiB"`.
//! Pure.
//!
//! A bare number is in GB of 10^9 bytes, as the names of the keys say. A text is a number with an SI unit (`kB`, `MB`,
//! `GB`, `TB`, `PB`) or an IEC unit (`KiB`, `MiB`, `GiB`, `TiB`, `PiB`), in any capitalisation. A [`Size`] is a whole
//! number of bytes up to [`Size::MAX`]; whether it is valid for its key is checked in [`config`](crate::config). The
//! output of [`Display`](fmt::Display) and serde parses to the same size.

use serde::{Deserialize, Deserializer, Serialize, Serializer, de};
use std::{fmt, str::FromStr};

/// Number of bytes in a GB.
const GB: u64 = 1_000_000_000;

/// Units, largest first. A size is displayed in the first unit of which it is a multiple.
const UNITS: &[(&str, u64)] = &[
    ("PiB", 1 << 50),
    ("PB", 1_000_000 * GB),
    ("TiB", 1 << 40),
    ("TB", 1_000 * GB),
    ("GiB", 1 << 30),
    ("GB", GB),
    ("MiB", 1 << 20),
    ("MB", 1_000_000),
    ("KiB", 1 << 10),
    ("kB", 1_000),
    ("B", 1),
];

/// A number of bytes, at most [`Size::MAX`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Size(u64);

impl Size {
    /// The largest size in a configuration: far above any disk, far below the overflow of a signed number on the wire.
    pub const MAX: Self = Self(1_000_000_000 * GB);

    /// This many bytes, or [`Size::MAX`] if that is less.
    pub const fn from_bytes(bytes: u64) -> Self {
        if bytes > Self::MAX.0 { Self::MAX } else { Self(bytes) }
    }

    /// This many GB of 10^9 bytes, or [`Size::MAX`] if that is less.
    pub const fn from_gb(gb: u64) -> Self {
        Self::from_bytes(gb.saturating_mul(GB))
    }

    /// The size as a number of bytes.
    pub const fn bytes(self) -> u64 {
        self.0
    }

    /// The size for display: in the largest SI unit that fits, with one decimal below 100 units. Loses precision, so it
    /// must not be written to files.
    pub fn rounded(self) -> String {
        let si = UNITS.iter().filter(|(name, _)| !name.contains('i'));
        let Some((name, unit)) = si.into_iter().find(|(_, unit)| self.0 >= *unit) else {
            return "0 B".into();
        };
        let tenths = u128::from(self.0) * 10 / u128::from(*unit);
        match (tenths / 10, tenths % 10) {
            (whole @ ..100, decimal @ 1..) => format!("{whole}.{decimal} {name}"),
            (whole, _) => format!("{whole} {name}"),
        }
    }

    /// Parses the text of a flag or environment variable: a number of GB, or a number with a unit.
    ///
    /// # Errors
    /// What is wrong, and what to write instead.
    pub fn from_words(text: &str) -> Result<Self, String> {
        let text = text.trim();
        match is_number(text) {
            true => from_decimal(text, GB),
            false => text.parse(),
        }
    }
}

/// The end of every error: what to write instead.
const EXAMPLES: &str =
    "write a number of GB such as 50 or 0.5, or a number and a unit such as \"200 MB\" or \"64 GiB\"";

fn is_number(text: &str) -> bool {
    let unsigned = text.strip_prefix(['-', '+']).unwrap_or(text);
    unsigned.starts_with(|first: char| first.is_ascii_digit() || first == '.')
        && unsigned.chars().all(|each| each.is_ascii_digit() || matches!(each, '.' | '_'))
}

/// Whether the text after a number is the rest of its scientific notation.
fn is_exponent(unit: &str) -> bool {
    let digits = unit.strip_prefix(['e', 'E']).map(|rest| rest.strip_prefix(['-', '+']).unwrap_or(rest));
    digits.is_some_and(|digits| digits.starts_with(|first: char| first.is_ascii_digit()))
}

fn too_large() -> String {
    format!("a size may be at most {}", Size::MAX)
}

/// Parses a decimal number of units. Fractions of a byte are dropped.
fn from_decimal(number: &str, unit: u64) -> Result<Size, String> {
    let malformed = || format!("\"{}\" is not a number; {EXAMPLES}", number.escape_debug());
    if number.starts_with('-') {
        return Err("a size cannot be negative".into());
    }
    let digits = number.strip_prefix('+').unwrap_or(number).replace('_', "");
    let (whole, fraction) = digits.split_once('.').unwrap_or((&digits, ""));
    let all_digits = |text: &str| text.bytes().all(|byte| byte.is_ascii_digit());
    if whole.len() + fraction.len() == 0 || !all_digits(whole) || !all_digits(fraction) {
        return Err(malformed());
    }
    let whole = whole.trim_start_matches('0');
    // Longer numbers exceed the largest size in the smallest unit.
    if whole.len() > 19 {
        return Err(too_large());
    }
    let whole: u128 = if whole.is_empty() { 0 } else { whole.parse().map_err(|_| malformed())? };
    // Digits after the 18th are below one byte, even in the largest unit.
    let kept = fraction.get(..fraction.len().min(18)).unwrap_or_default();
    let part: u128 = if kept.is_empty() { 0 } else { kept.parse().map_err(|_| malformed())? };
    let scale = kept.bytes().fold(1_u128, |scale, _| scale * 10);
    let bytes = whole * u128::from(unit) + part * u128::from(unit) / scale;
    u64::try_from(bytes).ok().filter(|bytes| *bytes <= Size::MAX.0).map(Size).ok_or_else(too_large)
}

impl FromStr for Size {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let shown = text.escape_debug();
        let text = text.trim();
        let end = text.find(|each: char| each.is_alphabetic()).unwrap_or(text.len());
        let (number, unit) = text.split_at(end);
        let number = number.trim_end();
        if !is_number(number) {
            return Err(format!("\"{shown}\" is not a size; {EXAMPLES}"));
        }
        if is_exponent(unit) {
            return Err(format!(
                "\"{shown}\" is a number with an exponent; write it out, such as \"1500 GB\" instead of 1.5e3"
            ));
        }
        if unit.is_empty() {
            return Err(format!(
                "\"{shown}\" has no unit; write \"{number} GB\", or {number} without quotes"
            ));
        }
        let known = UNITS.iter().find(|(name, _)| name.eq_ignore_ascii_case(unit));
        let (_, bytes) = known.ok_or_else(|| {
            let names: Vec<&str> = UNITS.iter().rev().map(|(name, _)| *name).collect();
            format!("\"{}\" is not a unit; there are {}", unit.escape_debug(), names.join(", "))
        })?;
        from_decimal(number, *bytes)
    }
}

impl fmt::Display for Size {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let fits = |(_, unit): &&(&str, u64)| self.0 >= *unit && self.0.is_multiple_of(*unit);
        match UNITS.iter().find(fits) {
            Some((name, unit)) => write!(f, "{} {name}", self.0 / unit),
            None => f.write_str("0 B"),
        }
    }
}

impl Serialize for Size {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match self.0.is_multiple_of(GB) {
            true => serializer.serialize_u64(self.0 / GB),
            false => serializer.collect_str(self),
        }
    }
}

impl<'de> Deserialize<'de> for Size {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(Visitor)
    }
}

struct Visitor;

impl de::Visitor<'_> for Visitor {
    type Value = Size;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a size: a number of GB, or a number and a unit such as \"200 MB\"")
    }

    fn visit_u64<E: de::Error>(self, gb: u64) -> Result<Size, E> {
        let bytes = gb.checked_mul(GB).filter(|bytes| *bytes <= Size::MAX.0);
        bytes.map(Size).ok_or_else(|| E::custom(format!("{gb}: {}", too_large())))
    }

    fn visit_i64<E: de::Error>(self, gb: i64) -> Result<Size, E> {
        match u64::try_from(gb) {
            Ok(gb) => self.visit_u64(gb),
            Err(_) => Err(E::custom(format!("{gb}: a size cannot be negative"))),
        }
    }

    fn visit_f64<E: de::Error>(self, gb: f64) -> Result<Size, E> {
        let refuse = |problem: &str| Err(E::custom(format!("{gb}: {problem}")));
        if gb.is_nan() {
            return refuse("a size must be a number");
        }
        if gb.is_sign_negative() && gb != 0.0 {
            return refuse("a size cannot be negative");
        }
        // The shortest decimal representation of this number is the text of the file.
        if gb.is_finite() {
            from_decimal(&format!("{gb}"), GB).map_err(E::custom)
        } else {
            refuse(&too_large())
        }
    }

    fn visit_str<E: de::Error>(self, text: &str) -> Result<Size, E> {
        text.parse().map_err(E::custom)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[derive(Debug, PartialEq, Serialize, Deserialize)]
    struct Holder {
        size: Size,
    }

    fn read(value: &str) -> Result<u64, String> {
        let holder = toml::from_str::<Holder>(&format!("size = {value}"));
        holder.map(|holder| holder.size.bytes()).map_err(|error| error.message().to_owned())
    }

    #[test]
    fn numbers_are_gb_and_texts_have_a_unit() {
        for (text, bytes) in [
            ("50", 50 * GB),
            ("0", 0),
            ("0.5", 500_000_000),
            ("0.1", 100_000_000),
            ("1e3", 1_000 * GB),
            ("\"200 MB\"", 200_000_000),
            ("\"1.5 TB\"", 1_500 * GB),
            ("\"64GiB\"", 64 << 30),
            ("\" 2  gib \"", 2 << 30),
            ("\"1_000 B\"", 1_000),
            ("\".5 kB\"", 500),
            ("\"0.0000000001 GB\"", 0),
            ("1000000000", Size::MAX.bytes()),
        ] {
            assert_eq!(read(text), Ok(bytes), "{text}");
        }
        for (words, bytes) in [("0.5", 500_000_000), ("7", 7 * GB), ("200 MB", 200_000_000)] {
            assert_eq!(Size::from_words(words), Ok(Size(bytes)), "{words}");
        }
    }

    #[test]
    fn people_are_shown_few_digits() {
        for (bytes, shown) in [
            (0, "0 B"),
            (999, "999 B"),
            (1_500_000_000, "1.5 GB"),
            (1_049_999_999, "1 GB"),
            (64 << 30, "68.7 GB"),
            (123_456_789, "123 MB"),
            (Size::MAX.bytes(), "1000 PB"),
        ] {
            assert_eq!(Size(bytes).rounded(), shown);
        }
    }

    #[test]
    fn what_is_no_size_is_refused_with_what_is_wrong() {
        for (text, problem) in [
            ("-1", "-1: a size cannot be negative"),
            ("-0.5", "-0.5: a size cannot be negative"),
            ("\"-2 GB\"", "a size cannot be negative"),
            ("nan", "NaN: a size must be a number"),
            ("inf", "inf: a size may be at most 1000 PB"),
            ("1000000001", "1000000001: a size may be at most 1000 PB"),
            ("\"1001 PB\"", "a size may be at most 1000 PB"),
            ("\"99999999999999999999999999 B\"", "a size may be at most 1000 PB"),
            ("\"0.5\"", "\"0.5\" has no unit; write \"0.5 GB\", or 0.5 without quotes"),
            ("\"5 XB\"", "\"XB\" is not a unit; there are B, kB, KiB, MB, MiB, GB, GiB, TB, TiB, PB, PiB"),
            ("\"5 Gb/s\"", "\"Gb/s\" is not a unit"),
            ("\"1e3\"", "\"1e3\" is a number with an exponent; write it out"),
            ("\"1.5E-3 GB\"", "with an exponent"),
            ("\"fifty\"", "\"fifty\" is not a size; write a number of GB such as 50 or 0.5"),
            ("\"\"", "\"\" is not a size"),
            ("\"1.2.3 GB\"", "\"1.2.3\" is not a number"),
            ("true", "expected a size: a number of GB, or a number and a unit"),
        ] {
            let error = read(text).unwrap_err();
            assert!(error.contains(problem), "{text}: {error}");
        }
    }

    proptest! {
        #[test]
        fn what_is_shown_is_read_as_the_same_size(bytes in 0..=Size::MAX.bytes(), round in 0..4_u32) {
            let size = Size(bytes / 1_000_u64.pow(round * 2) * 1_000_u64.pow(round * 2));
            prop_assert_eq!(size.to_string().parse(), Ok(size));
            let holder = Holder { size };
            let text = toml::to_string(&holder).unwrap();
            prop_assert_eq!(toml::from_str::<Holder>(&text).unwrap(), holder);
        }

        #[test]
        fn no_text_is_a_panic(text in "\\PC{0,30}") {
            let _ = text.parse::<Size>();
            let _ = Size::from_words(&text);
        }
    }
}
