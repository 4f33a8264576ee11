//! Decoding of messages from outside, within a bound of memory.
//!
//! An empty entry of a list takes two bytes on the wire and a hundred and more in memory, at whatever depth it lies. So every
//! message that was received or stored is measured before it is decoded: [`cost`] walks its wire format by the [`Layout`] of its
//! type and adds up what the decoded form will allocate. The walk allocates nothing. It takes fields for what the decoder takes
//! them for, and refuses what the decoder would refuse, so that nothing that was not counted is ever decoded. Groups are refused
//! too; no version of these APIs has any.
//!
//! What is below [`UNCOUNTED_BYTES`] is decoded at once.

mod layout;

use crate::{
    error::{Error, Result},
    proto,
};
use bytes::Buf;
use layout::{Field, Kind, Layout, Layouts};
use prost::{Message, Name};
use std::{fmt, sync::LazyLock};

/// Messages up to this size are decoded without being measured: the worst of them takes two megabytes. Nearly all requests are
/// smaller.
pub const UNCOUNTED_BYTES: usize = 16 * 1024;
/// Decoded, a message takes at most this many times its bytes; a test holds it.
pub const EXPANSION_MAX: u64 = 384;
/// Deepest nesting that is decoded; the decoder's own bound.
const DEPTH_MAX: u32 = 100;
/// What the allocator takes for its own, and its smallest unit.
const ALLOCATION_BYTES: u64 = 8;
const ALLOCATION_UNIT: u64 = 16;

static LAYOUTS: LazyLock<Layouts> = LazyLock::new(|| {
    // They are part of the binary, and tests decode them.
    Layouts::read(proto::DESCRIPTORS).unwrap_or_default()
});

/// What decoding a message takes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Cost {
    /// Bytes of memory, rounded up.
    pub memory: u64,
    /// Fields at all depths: how long it takes.
    pub fields: u64,
}

/// How much a message may take.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// Bytes of memory.
    pub memory: u64,
    /// Fields at all depths.
    pub fields: u64,
}

impl Limits {
    /// So much memory, in any number of fields.
    pub const fn memory(memory: u64) -> Self {
        Self { memory, fields: u64::MAX }
    }
}

/// Why a message is not decoded.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Refusal {
    /// It does not parse.
    Malformed(&'static str),
    /// It takes more memory than this; so many fields were counted up to there.
    Memory {
        /// The bound.
        most: u64,
        /// What was counted.
        fields: u64,
    },
    /// It has more fields than this.
    Fields(u64),
}

impl fmt::Display for Refusal {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Malformed(problem) => write!(formatter, "it does not parse: {problem}"),
            Self::Memory { most, fields } => write!(
                formatter,
                "decoded it would take more than the {most} bytes of memory that one message may take ({fields} fields were \
                 counted up to there)"
            ),
            Self::Fields(most) => write!(formatter, "it has more than {most} fields"),
        }
    }
}

/// What decoding this message would take.
///
/// # Errors
/// When it does not parse, or takes more than the limits.
pub fn cost<M: Name>(bytes: &[u8], limits: Limits) -> std::result::Result<Cost, Refusal> {
    let unknown = Refusal::Malformed("its type is not described");
    let layout = LAYOUTS.by_name(&M::full_name()).ok_or(unknown)?;
    let mut walk = Walk { limits, cost: Cost { memory: layout.size.into(), fields: 0 } };
    walk.message(bytes, layout, 0)?;
    Ok(walk.cost)
}

/// Decodes a message, unless it takes more than `most` bytes of memory. `what` names it in errors, as in "Directory".
///
/// # Errors
/// [`Error::Invalid`] when it takes more, or does not parse.
pub fn decode<M>(bytes: impl Buf + AsRef<[u8]>, most: u64, what: &str) -> Result<M>
where
    M: Message + Name + Default,
{
    if bytes.remaining() > UNCOUNTED_BYTES {
        cost::<M>(bytes.as_ref(), Limits::memory(most))
            .map_err(|refusal| Error::Invalid(format!("the {what} is refused: {refusal}")))?;
    }
    M::decode(bytes).map_err(|error| Error::Invalid(format!("it does not parse as {what}: {error}")))
}

/// Whether decoded messages of this type refer to the bytes that they were decoded from. What is not known is suspected.
pub fn has_bytes<M: Name>() -> bool {
    LAYOUTS.by_name(&M::full_name()).is_none_or(|layout| layout.has_bytes)
}

/// Whether the request messages of a method, as in `/package.Service/Method`, have lists in them, at whatever depth. Others never
/// take much more memory than bytes on the wire. What is not known is suspected.
pub fn request_has_lists(method: &str) -> bool {
    LAYOUTS.request_has_lists(method).unwrap_or(true)
}

/// The most that a message of this many bytes may take, with a limit.
pub fn worst_case(bytes: u64, most: u64) -> u64 {
    bytes.saturating_mul(EXPANSION_MAX).min(most)
}

/// A walk over the wire format.
struct Walk {
    limits: Limits,
    cost: Cost,
}

impl Walk {
    fn message(&mut self, mut bytes: &[u8], layout: &Layout, depth: u32) -> std::result::Result<(), Refusal> {
        if depth > DEPTH_MAX {
            return Err(Refusal::Malformed("it is nested too deeply"));
        }
        // The lists that have an element, as bits.
        let mut begun = 0u64;
        while !bytes.is_empty() {
            let key = varint(&mut bytes)?;
            self.cost.fields += 1;
            if self.cost.fields > self.limits.fields {
                return Err(Refusal::Fields(self.limits.fields));
            }
            let content = match key & 7 {
                0 => varint(&mut bytes).map(|_| None)?,
                1 => split(&mut bytes, 8).map(|_| None)?,
                2 => {
                    let length = varint(&mut bytes)?;
                    Some(split(&mut bytes, length)?)
                }
                5 => split(&mut bytes, 4).map(|_| None)?,
                3 | 4 => return Err(Refusal::Malformed("it has a group")),
                _ => return Err(Refusal::Malformed("a field is of no known wire type")),
            };
            if let Some(field) = layout.field(key >> 3) {
                let bit = 1u64.checked_shl(field.place).unwrap_or(0);
                // A field beyond the bits counts as a new list each time.
                let is_first = begun & bit == 0;
                begun |= bit;
                self.field(field, content, is_first, depth)?;
            }
        }
        Ok(())
    }

    fn field(
        &mut self,
        field: &Field,
        content: Option<&[u8]>,
        is_first: bool,
        depth: u32,
    ) -> std::result::Result<(), Refusal> {
        let element = u64::from(field.element);
        let length = content.map_or(0, <[u8]>::len) as u64;
        match field.kind {
            Kind::Number(wire) if field.repeated => {
                self.list(content.map_or(1, |_| length / u64::from(wire)), element, is_first)
            }
            Kind::Number(_) => Ok(()),
            Kind::Text | Kind::Bytes => {
                if field.repeated {
                    self.list(1, element, is_first)?;
                }
                self.charge(allocation(length))
            }
            Kind::Message(at) => {
                if field.repeated {
                    self.list(1, element, is_first)?;
                }
                self.inside(at, content, depth)
            }
            Kind::Boxed(at) => {
                self.charge(allocation(element))?;
                self.inside(at, content, depth)
            }
            Kind::Entry(at) => {
                // A table has up to 16/7 places for each entry, and at least four.
                let place = element + 1;
                self.charge(if is_first { 8 * place } else { 3 * place })?;
                self.inside(at, content, depth)
            }
        }
    }

    fn inside(&mut self, at: usize, content: Option<&[u8]>, depth: u32) -> std::result::Result<(), Refusal> {
        match (content, LAYOUTS.at(at)) {
            (Some(content), Some(layout)) => self.message(content, layout, depth + 1),
            // A number where a message should be; the decoder ends here.
            _ => Err(Refusal::Malformed("a field is of another type than its number says")),
        }
    }

    /// Elements of a list: it has room for four when it begins, and for up to twice what is in it when it grows.
    fn list(&mut self, elements: u64, element: u64, is_first: bool) -> std::result::Result<(), Refusal> {
        let doubled = elements.saturating_mul(2);
        self.charge(element.saturating_mul(if is_first { doubled.saturating_add(2) } else { doubled }))
    }

    fn charge(&mut self, memory: u64) -> std::result::Result<(), Refusal> {
        self.cost.memory = self.cost.memory.saturating_add(memory);
        if self.cost.memory > self.limits.memory {
            return Err(Refusal::Memory { most: self.limits.memory, fields: self.cost.fields });
        }
        Ok(())
    }
}

/// What the allocator takes for this many bytes.
fn allocation(bytes: u64) -> u64 {
    if bytes == 0 {
        return 0;
    }
    (bytes + ALLOCATION_BYTES).next_multiple_of(ALLOCATION_UNIT).max(2 * ALLOCATION_UNIT)
}

fn split<'a>(bytes: &mut &'a [u8], length: u64) -> std::result::Result<&'a [u8], Refusal> {
    let parts = usize::try_from(length).ok().and_then(|length| bytes.split_at_checked(length));
    let (content, rest) = parts.ok_or(Refusal::Malformed("it ends in the middle of a field"))?;
    *bytes = rest;
    Ok(content)
}

fn varint(bytes: &mut &[u8]) -> std::result::Result<u64, Refusal> {
    let mut value = 0u64;
    for (at, byte) in bytes.iter().take(10).enumerate() {
        value |= u64::from(byte & 0x7f) << (7 * at);
        if *byte < 0x80 {
            *bytes = bytes.get(at + 1..).unwrap_or_default();
            return Ok(value);
        }
    }
    Err(Refusal::Malformed("a number is not finished"))
}

#[cfg(test)]
mod tests;
