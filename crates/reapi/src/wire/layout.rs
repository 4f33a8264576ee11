//! [`Layout`]: the fields of a message and the memory that they take, computed from the descriptors from which the
//! messages were generated.
//!
//! Sizes are the sizes of the generated Rust structs, rounded up where the layout is not known; a test compares them
//! with `size_of`.

use prost::Message as _;
use prost_types::{
    DescriptorProto, FieldDescriptorProto, FileDescriptorSet,
    field_descriptor_proto::{Label, Type},
};
use std::collections::HashMap;

/// Size of a `String` or `Vec`.
const LIST_BYTES: u32 = 24;
/// Size of a `bytes::Bytes`.
const BYTES_BYTES: u32 = 32;
/// Size of a `std::collections::HashMap`.
const MAP_BYTES: u32 = 48;
/// Most bytes that an enum or an `Option` adds for its discriminant.
const TAG_BYTES: u32 = 8;
const POINTER_BYTES: u32 = 8;

/// The memory layout of one message type.
#[derive(Debug, Default)]
pub(super) struct Layout {
    /// Size of the struct without what it points to.
    pub size: u32,
    /// The fields of the message, sorted by field number.
    fields: Vec<Field>,
    /// Whether a field at any depth is of the type `bytes`.
    pub has_bytes: bool,
}

/// One field of a message type.
#[derive(Debug, Clone, Copy)]
pub(super) struct Field {
    number: u32,
    /// Index among the fields of the message.
    pub place: u32,
    /// Whether each occurrence adds an element.
    pub repeated: bool,
    /// Size of one element of a list, or of one entry of a map.
    pub element: u32,
    /// How the content of the field is interpreted.
    pub kind: Kind,
}

/// The content of a field.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    /// A number of this many bytes on the wire, or of at least one.
    Number(u32),
    /// Text, without an inner structure.
    Text,
    /// Bytes, which refer to the bytes of the encoded message.
    Bytes,
    /// A message with this layout.
    Message(usize),
    /// A boxed message with this layout.
    Boxed(usize),
    /// A map entry, encoded as a message with this layout.
    Entry(usize),
}

impl Layout {
    /// Looks up a field by its number.
    pub(super) fn field(&self, number: u64) -> Option<&Field> {
        // Most messages number their fields from 1 without gaps.
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
pub(super) struct Layouts {
    layouts: Vec<Layout>,
    names: HashMap<String, usize>,
    /// Whether the requests of a method contain lists, by method path.
    methods: HashMap<String, bool>,
}

impl Layouts {
    /// Reads an encoded `FileDescriptorSet`.
    ///
    /// # Errors
    /// When the descriptor set does not parse.
    pub(super) fn read(descriptors: &[u8]) -> Result<Self, prost::DecodeError> {
        let files = FileDescriptorSet::decode(descriptors)?.file;
        let mut types = Types::default();
        for file in &files {
            for message in &file.message_type {
                types.add(&format!(".{}", file.package()), message);
            }
        }
        let mut sizes = vec![SizeState::Unknown; types.messages.len()];
        let layouts: Vec<_> = (0..types.messages.len()).map(|at| types.layout(at, &mut sizes)).collect();
        // These names start with a dot.
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

    /// Whether the requests of a method contain lists; `None` for an unknown method.
    pub(super) fn request_has_lists(&self, path: &str) -> Option<bool> {
        self.methods.get(path).copied()
    }

    /// Looks up the layout of a message type by its full name.
    pub(super) fn by_name(&self, full_name: &str) -> Option<&Layout> {
        self.names.get(full_name).and_then(|at| self.layouts.get(*at))
    }

    /// Looks up a layout by the index that a field holds.
    pub(super) fn at(&self, at: usize) -> Option<&Layout> {
        self.layouts.get(at)
    }

    /// Whether a message with this layout contains lists, so that it may take many times its wire size in memory.
    fn has_lists(&self, layout: &Layout) -> bool {
        self.any_field(layout, |field| field.repeated)
    }

    /// Whether a message of this layout may have a field like this, at any depth.
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
enum SizeState {
    Unknown,
    /// The size is being computed. A field that refers back to it is boxed.
    Open,
    Known(u32),
}

/// The message types by full name. The names start with a dot.
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

    fn layout(&self, at: usize, sizes: &mut [SizeState]) -> Layout {
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

    fn field(&self, of: usize, place: usize, field: &FieldDescriptorProto, sizes: &mut [SizeState]) -> Field {
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

    /// Size of the struct of a message type.
    fn size(&self, at: usize, sizes: &mut [SizeState]) -> u32 {
        match sizes.get(at) {
            Some(SizeState::Known(size)) => return *size,
            Some(SizeState::Unknown) => {}
            Some(SizeState::Open) | None => return POINTER_BYTES,
        }
        sizes[at] = SizeState::Open;
        let message = self.messages[at];
        // All fields of a oneof share one place, except for the synthetic oneof of an `optional` field.
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
        sizes[at] = SizeState::Known(size);
        size
    }

    /// Size that a field takes within the struct.
    fn slot(&self, field: &FieldDescriptorProto, sizes: &mut [SizeState]) -> u32 {
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
        // The set is complete: protox resolves every type name.
        self.names.get(field.type_name()).copied().unwrap_or(usize::MAX)
    }

    fn is_entry(&self, at: usize) -> bool {
        let options = self.messages.get(at).and_then(|message| message.options.as_ref());
        options.is_some_and(|options| options.map_entry())
    }

    /// Whether a message type contains another one by value, through fields that are not lists.
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
