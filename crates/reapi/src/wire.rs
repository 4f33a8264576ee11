//! Decoding of untrusted messages within a memory bound.
//!
//! An empty element of a list takes two bytes on the wire and over a hundred in memory, at any depth. So every received
//! or stored message is measured before it is decoded: [`cost`] walks the wire format with the [`Layout`] of the
//! message type and adds up the allocations of the decoded form. The walk itself allocates nothing. It interprets
//! fields as the decoder does and refuses what the decoder would refuse, so everything that is decoded was counted.
//! Groups are refused too; no version of these APIs uses them.
//!
//! Messages below [`UNCOUNTED_BYTES`] are decoded without measuring.

mod layout;

use crate::{
    error::{Error, Result},
    proto,
};
use bytes::Buf;
use layout::{Field, Kind, Layout, Layouts};
use prost::{Message, Name};
use std::{fmt, sync::LazyLock};

/// Messages up to this size are decoded without being measured: the worst of them takes two megabytes. Nearly all
/// requests are smaller.
pub const UNCOUNTED_BYTES: usize = 16 * 1024;
/// A decoded message takes at most this many times its wire size; a test verifies it.
pub const EXPANSION_MAX: u64 = 384;
/// Deepest nesting that is decoded. This is the decoder's own limit.
const DEPTH_MAX: u32 = 100;
/// Overhead of one allocation, and the unit to which the allocator rounds.
const ALLOCATION_BYTES: u64 = 8;
const ALLOCATION_UNIT: u64 = 16;

static LAYOUTS: LazyLock<Layouts> = LazyLock::new(|| {
    // The descriptors are part of the binary, and a test decodes them.
    Layouts::read(proto::DESCRIPTORS).unwrap_or_default()
});

/// The cost of decoding a message.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Cost {
    /// Bytes of memory, rounded up.
    pub memory: u64,
    /// Number of fields at all depths, which determines the decoding time.
    pub fields: u64,
}

/// The most that decoding a message may cost.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// Largest number of bytes in memory.
    pub memory: u64,
    /// Number of fields at all depths.
    pub fields: u64,
}

impl Limits {
    /// Limits the memory, but not the number of fields.
    pub const fn memory(memory: u64) -> Self {
        Self { memory, fields: u64::MAX }
    }
}

/// The reason why a message is not decoded.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Refusal {
    /// The message does not parse.
    Malformed(&'static str),
    /// The message needs more memory than the limit.
    Memory {
        /// The limit in bytes.
        most: u64,
        /// Number of fields that were counted before the limit was reached.
        fields: u64,
    },
    /// The message has more fields than this limit.
    Fields(u64),
}

impl fmt::Display for Refusal {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Malformed(problem) => write!(formatter, "it does not parse: {problem}"),
            Self::Memory { most, fields } => write!(
                formatter,
                "decoded it would take more than the {most} bytes of memory that one message may take ({fields} \
                 fields were counted before the limit)"
            ),
            Self::Fields(most) => write!(formatter, "it has more than {most} fields"),
        }
    }
}

/// Measures the cost of decoding this message.
///
/// # Errors
/// When it does not parse or exceeds the limits.
pub fn cost<M: Name>(bytes: &[u8], limits: Limits) -> std::result::Result<Cost, Refusal> {
    let unknown = Refusal::Malformed("its type is not described");
    let layout = LAYOUTS.by_name(&M::full_name()).ok_or(unknown)?;
    let mut walk = Walk { limits, cost: Cost { memory: layout.size.into(), fields: 0 } };
    walk.message(bytes, layout, 0)?;
    Ok(walk.cost)
}

/// Decodes a message that takes at most `most` bytes of memory. `what` names the message in errors, as in "Directory".
///
/// # Errors
/// [`Error::Invalid`] when it takes more memory or does not parse.
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

/// Whether decoded messages of this type refer to the bytes that they were decoded from. True for unknown types.
pub fn has_bytes<M: Name>() -> bool {
    LAYOUTS.by_name(&M::full_name()).is_none_or(|layout| layout.has_bytes)
}

/// Whether the request message of a method (`/package.Service/Method`) contains lists at any depth. Other messages
/// never take much more memory than bytes on the wire. Unknown methods count as having lists.
pub fn request_has_lists(method: &str) -> bool {
    LAYOUTS.request_has_lists(method).unwrap_or(true)
}

/// The most memory that a message of this many bytes can take, but no more than `most`.
pub fn worst_case(bytes: u64, most: u64) -> u64 {
    bytes.saturating_mul(EXPANSION_MAX).min(most)
}

/// A walk over the wire format that adds up costs.
struct Walk {
    limits: Limits,
    cost: Cost,
}

impl Walk {
    fn message(&mut self, mut bytes: &[u8], layout: &Layout, depth: u32) -> std::result::Result<(), Refusal> {
        if depth > DEPTH_MAX {
            return Err(Refusal::Malformed("it is nested too deeply"));
        }
        // Bit set of the lists that have an element.
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
                _ => return Err(Refusal::Malformed("a field has an unknown wire type")),
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
                // A table has up to 16/7 places per entry, and at least four.
                let place = element + 1;
                self.charge(if is_first { 8 * place } else { 3 * place })?;
                self.inside(at, content, depth)
            }
        }
    }

    fn inside(&mut self, at: usize, content: Option<&[u8]>, depth: u32) -> std::result::Result<(), Refusal> {
        match (content, LAYOUTS.at(at)) {
            (Some(content), Some(layout)) => self.message(content, layout, depth + 1),
            // A number in the place of a message; the decoder fails here.
            _ => Err(Refusal::Malformed("a field has the wrong wire type for its number")),
        }
    }

    /// Counts elements of a list. A list has capacity for four when it is created, and for up to twice its length when
    /// it grows.
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

/// The memory that the allocator uses for this many bytes.
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
    Err(Refusal::Malformed("a varint is incomplete"))
}

#[cfg(test)]
mod tests;
