//! Names in text: digests, resource names, operation names, log streams, instance names, paths. An accepted name has
//! one meaning, and is found again under its canonical form.

#![no_main]

use gorego::{grpc::convert, instance::Instances, log_streams::name::LogName};
use gorego_reapi::{
    digest::{Digest, DigestFunction},
    error::Error,
    instance_name::check_instance_name,
    path::{RootPath, check_node_name},
    resource_name::ResourceName,
};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|text: &str| {
    for &function in DigestFunction::ALL {
        if let Ok(digest) = Digest::parse(function, text, 7) {
            assert_eq!(digest.hash_hex(), text);
        }
    }
    for name in [ResourceName::parse_read(text), ResourceName::parse_write(text)] {
        match name {
            Ok(name) => {
                assert!(check_instance_name(&name.instance_name).is_ok());
                let instances = Instances::new([&name.instance_name]).expect("a name that was just checked");
                let instance = instances.get(&name.instance_name).expect("the only one");
                let again = instance.qualify(&name.digest.blob_name());
                let again = ResourceName::parse_read(&again).expect("the name that we give");
                assert_eq!((again.digest, again.instance_name), (name.digest, name.instance_name));
            }
            Err(error) => assert!(matches!(error, Error::Invalid(_)), "{error:?}"),
        }
    }
    match convert::operation_name(text) {
        Ok(("", id)) => assert_eq!(format!("operations/{id}"), text),
        Ok((instance_name, id)) => assert_eq!(format!("{instance_name}/operations/{id}"), text),
        Err(error) => assert!(matches!(error, Error::NotFound(_)), "{error:?}"),
    }
    match LogName::parse(text) {
        Some(Ok(name)) => {
            assert_eq!(name.to_string(), text);
            let reading = name.for_reading();
            assert_eq!(LogName::parse(&reading.to_string()), Some(Ok(reading)));
            assert!(ResourceName::parse_read(text).is_err(), "one name for two things");
        }
        Some(Err(error)) => assert!(matches!(error, Error::Invalid(_) | Error::NotFound(_)), "{error:?}"),
        None => {}
    }
    if let Ok(path) = RootPath::root().join(text) {
        assert!(path.segments().all(|segment| check_node_name(segment).is_ok()));
        assert!(path.as_path().is_relative());
    }
});
