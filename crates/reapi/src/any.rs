//! `google.protobuf.Any`: a message together with the name of its type.

use prost::Message;
use prost_types::Any;

/// Every `Any` names its type under this authority; one client compares the whole string (GEN-18).
const TYPE_URL_PREFIX: &str = "type.googleapis.com/";

/// Packs a message of the given full name.
pub fn pack(full_name: &str, message: &impl Message) -> Any {
    Any { type_url: format!("{TYPE_URL_PREFIX}{full_name}"), value: message.encode_to_vec() }
}
