//! `google.protobuf.Any`: a message together with the name of its type.

use prost::Message;
use prost_types::Any;

/// The authority of every type URL. One client compares the whole string (GEN-18).
const TYPE_URL_PREFIX: &str = "type.googleapis.com/";

/// Packs a message whose type has the given full name.
pub fn pack(full_name: &str, message: &impl Message) -> Any {
    Any { type_url: format!("{TYPE_URL_PREFIX}{full_name}"), value: message.encode_to_vec() }
}
