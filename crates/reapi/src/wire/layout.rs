//! [`Layout`]: what the fields of a message are and what they take in memory, from the descriptors that the messages were
//! generated from.
//!
//! Sizes are those that Rust gives the generated structs, rounded up where its layout is not known; a test holds them against
//! `size_of`.

use prost::Message as _;
use prost_types::{
    DescriptorProto, FieldDescriptorProto, FileDescriptorSet,
    field_descriptor_proto::{Label, Type},
};
use std::collections::HashMap;

/// `String` and `Vec`.
const LIST_BYTES: u32 = 24;
/// `bytes::Bytes`.
const BYTES_BYTES: u32 = 32;
/// `std::collections::HashMap`.
const MAP_BYTES: u32 = 48;
/// What tells the variants of an enum apart, or a message from its absence.
const TAG_BYTES: u32 = 8;
const POINTER_BYTES: u32 = 8;

/// One message type.
#[derive(Debug, Default)]
pub struct Layout {
    /// What the struct takes, without what it points to.
    pub size: u32,
    /// By number, rising.
    fields: Vec<Field>,
    /// Whether there are bytes in it, at whatever depth.
    pub has_bytes: bool,
}

/// One field of a message type.
#[derive(Debug, Clone, Copy)]
pub struct Field {
    number: u32,
    /// Its place among the fields of the message.
    pub place: u32,
    /// Whether each occurrence adds an element.
    pub repeated: bool,
    /// What one element takes in a list, or the entry of a map.
    pub element: u32,
    /// Of what kind it is.
    pub kind: Kind,
}

/// What is behind the length or in the place of the number.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// A number of this many bytes on the wire, or of at least one.
    Number(u32),
    /// Text.
    Text,
    /// Bytes, which refer to those that were decoded.
    Bytes,
    /// A message of this layout.
    Message(usize),
    /// A message of this layout behind a pointer of its own.
    Boxed(usize),
    /// An entry of a map, as a message of this layout.
    Entry(usize),
}

impl Layout {
    /// The field of this number.
    pub fn field(&self, number: u64) -> Option<&Field> {
        // Most messages number their fields from one on, without gaps.
        let guess = usize::try_from(number).ok()?.checked_sub(1)?;
        if let Some(field) = self.fields.get(guess).filter(|field| u64::from(field.number) == number) {
            return Some(field);
        }
        let at = self.fields.binary_search_by_key(&number, |field| field.number.into()).ok()?;
        self.fields.get(at)
    }
}

/// The layouts of all message types in a descriptor set.
#[derive(Debug, Default)]
pub struct Layouts {
    layouts: Vec<Layout>,
    names: HashMap<String, usize>,
    /// Whether the requests of a method have lists, by the path of the method.
    methods: HashMap<String, bool>,
}

impl Layouts {
    /// Reads an encoded `FileDescriptorSet`.
    ///
    /// # Errors
    /// When it does not parse.
    pub fn read(descriptors: &[u8]) -> Result<Self, prost::DecodeError> {
        let files = FileDescriptorSet::decode(descriptors)?.file;
        let mut types = Types::default();
        for file in &files {
            for message in &file.message_type {
                types.add(&format!(".{}", file.package()), message);
            }
        }
        let mut sizes = vec![Size::Unknown; types.messages.len()];
        let layouts: Vec<_> = (0..types.messages.len()).map(|at| types.layout(at, &mut sizes)).collect();
        // Names begin with a dot.
        let names = types.names.into_iter().map(|(name, at)| (name[1..].to_owned(), at)).collect();
        let mut read = Self { layouts, names, methods: HashMap::new() };
        for at in 0..read.layouts.len() {
            let has_bytes = read.any_field(&read.layouts[at], |field| field.kind == Kind::Bytes);
            read.layouts[at].has_bytes = has_bytes;
        }
        for (file, service) in files.iter().flat_map(|file| file.service.iter().map(move |s| (file, s))) {
            for method in &service.method {
                let path = format!("/{}.{}/{}", file.package(), service.name(), method.name());
                let has_lists = read.by_name(&method.input_type()[1..]).is_none_or(|l| read.has_lists(l));
                read.methods.insert(path, has_lists);
            }
        }
        Ok(read)
    }

    /// Whether the requests of a method have lists in them; `None` for a method that is not known.
    pub fn request_has_lists(&self, path: &str) -> Option<bool> {
        self.methods.get(path).copied()
    }

    /// The layout of a message type.
    pub fn by_name(&self, full_name: &str) -> Option<&Layout> {
        self.names.get(full_name).and_then(|at| self.layouts.get(*at))
    }

    /// A layout that a field refers to.
    pub fn at(&self, at: usize) -> Option<&Layout> {
        self.layouts.get(at)
    }

    /// Whether there are lists in a message of this layout, so that it may take many times its wire size in memory.
    fn has_lists(&self, layout: &Layout) -> bool {
        self.any_field(layout, |field| field.repeated)
    }

    /// Whether a message of this layout may have a field like this, at whatever depth.
    fn any_field(&self, layout: &Layout, is_it: impl Fn(&Field) -> bool) -> bool {
        let mut seen = vec![false; self.layouts.len()];
        let mut stack = vec![layout];
        while let Some(layout) = stack.pop() {
            for field in &layout.fields {
                if is_it(field) {
                    return true;
                }
                if let Kind::Message(at) | Kind::Boxed(at) | Kind::Entry(at) = field.kind
                    && let Some(seen) = seen.get_mut(at)
                    && !std::mem::replace(seen, true)
                {
                    stack.extend(self.layouts.get(at));
                }
            }
        }
        false
    }
}

#[derive(Debug, Clone, Copy)]
enum Size {
    Unknown,
    /// Its size is being computed; a field that refers back to it is boxed.
    Open,
    Known(u32),
}

/// The message types by their full names, which begin with a dot.
#[derive(Default)]
struct Types<'a> {
    messages: Vec<&'a DescriptorProto>,
    names: HashMap<String, usize>,
}

impl<'a> Types<'a> {
    fn add(&mut self, scope: &str, message: &'a DescriptorProto) {
        let name = format!("{scope}.{}", message.name());
        for nested in &message.nested_type {
            self.add(&name, nested);
        }
        self.names.insert(name, self.messages.len());
        self.messages.push(message);
    }

    fn layout(&self, at: usize, sizes: &mut [Size]) -> Layout {
        let size = self.size(at, sizes);
        let mut fields: Vec<Field> = self.messages.get(at).map_or_else(Vec::new, |message| {
            message
                .field
                .iter()
                .enumerate()
                .map(|(place, field)| self.field(at, place, field, sizes))
                .collect()
        });
        fields.sort_unstable_by_key(|field| field.number);
        Layout { size, fields, has_bytes: false }
    }

    fn field(&self, of: usize, place: usize, field: &FieldDescriptorProto, sizes: &mut [Size]) -> Field {
        let repeated = field.label() == Label::Repeated;
        let (kind, element) = match field.r#type() {
            Type::Message | Type::Group => {
                let at = self.target(field);
                let size = self.size(at, sizes);
                match () {
                    () if self.is_entry(at) => (Kind::Entry(at), size),
                    () if !repeated && self.contains(at, of) => (Kind::Boxed(at), size),
                    () => (Kind::Message(at), size),
                }
            }
            Type::String => (Kind::Text, LIST_BYTES),
            Type::Bytes => (Kind::Bytes, BYTES_BYTES),
            Type::Fixed32 | Type::Sfixed32 | Type::Float => (Kind::Number(4), 4),
            Type::Fixed64 | Type::Sfixed64 | Type::Double => (Kind::Number(8), 8),
            number => (Kind::Number(1), number_bytes(number)),
        };
        let number = u32::try_from(field.number()).unwrap_or_default();
        Field { number, place: u32::try_from(place).unwrap_or(u32::MAX), repeated, element, kind }
    }

    /// What the struct of a message type takes.
    fn size(&self, at: usize, sizes: &mut [Size]) -> u32 {
        match sizes.get(at) {
            Some(Size::Known(size)) => return *size,
            Some(Size::Unknown) => {}
            Some(Size::Open) | None => return POINTER_BYTES,
        }
        sizes[at] = Size::Open;
        let message = self.messages[at];
        // All fields of a oneof share one place, unless it is the one that stands for `optional`.
        let mut oneofs = vec![0; message.oneof_decl.len()];
        let mut sum = 0;
        for field in &message.field {
            let size = self.slot(field, sizes);
            let oneof = field.oneof_index.and_then(|index| oneofs.get_mut(usize::try_from(index).ok()?));
            match oneof.filter(|_| !field.proto3_optional()) {
                Some(largest) => *largest = size.max(*largest),
                None => sum += size,
            }
        }
        sum +=
            oneofs.into_iter().filter(|largest| *largest > 0).map(|largest| largest + TAG_BYTES).sum::<u32>();
        let size = sum.next_multiple_of(8);
        sizes[at] = Size::Known(size);
        size
    }

    /// What a field takes in the struct.
    fn slot(&self, field: &FieldDescriptorProto, sizes: &mut [Size]) -> u32 {
        if field.label() == Label::Repeated {
            let is_map = field.r#type() == Type::Message && self.is_entry(self.target(field));
            return if is_map { MAP_BYTES } else { LIST_BYTES };
        }
        match field.r#type() {
            Type::Message | Type::Group => self.size(self.target(field), sizes) + TAG_BYTES,
            Type::String => LIST_BYTES,
            Type::Bytes => BYTES_BYTES,
            number if field.proto3_optional() => 2 * number_bytes(number),
            number => number_bytes(number),
        }
    }

    fn target(&self, field: &FieldDescriptorProto) -> usize {
        // A set that protox has made names only types that are in it.
        self.names.get(field.type_name()).copied().unwrap_or(usize::MAX)
    }

    fn is_entry(&self, at: usize) -> bool {
        let options = self.messages.get(at).and_then(|message| message.options.as_ref());
        options.is_some_and(|options| options.map_entry())
    }

    /// Whether a message type holds another one in itself, through fields that are not lists.
    fn contains(&self, outer: usize, inner: usize) -> bool {
        let (mut seen, mut stack) = (vec![false; self.messages.len()], vec![outer]);
        while let Some(at) = stack.pop() {
            if at == inner {
                return true;
            }
            if seen.get_mut(at).is_some_and(|seen| !std::mem::replace(seen, true)) {
                let singular = |field: &&FieldDescriptorProto| field.label() != Label::Repeated;
                let fields = self.messages[at].field.iter().filter(singular);
                stack
                    .extend(fields.filter(|field| field.type_name.is_some()).map(|field| self.target(field)));
            }
        }
        false
    }
}

fn number_bytes(number: Type) -> u32 {
    match number {
        Type::Bool => 1,
        Type::Double | Type::Int64 | Type::Uint64 | Type::Sint64 | Type::Fixed64 | Type::Sfixed64 => 8,
        _ => 4,
    }
}
