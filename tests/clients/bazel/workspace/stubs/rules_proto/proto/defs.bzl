"""The native proto rules under the names that rules_proto gives them."""

proto_library = native.proto_library
