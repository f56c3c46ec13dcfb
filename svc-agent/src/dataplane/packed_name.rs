//! The kernel's names of Services without the zeros that pad them: two thirds of it in memory, tens of thousands of times.
use svc_common::map::{MAX_NAME, ServiceName};

/// A [`ServiceName`], whatever its bytes.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct PackedName(Box<[u8]>);

impl From<&ServiceName> for PackedName {
    fn from(name: &ServiceName) -> Self {
        let ServiceName { namespace, name, port_name, kind, port } = name;
        let [high, low] = port.to_be_bytes();
        let mut bytes = vec![high, low, *kind];
        for field in [namespace, name, port_name] {
            let len = field.iter().rposition(|byte| *byte != 0).map_or(0, |last| last + 1);
            bytes.push(len as u8);
            bytes.extend(&field[..len]);
        }
        PackedName(bytes.into())
    }
}

impl PackedName {
    pub fn unpack(&self) -> ServiceName {
        let [high, low, kind, ref rest @ ..] = *self.0 else { unreachable!("it begins with these three") };
        let mut rest = rest;
        let mut field = || {
            let mut bytes = [0; MAX_NAME];
            if let Some((len, behind)) = rest.split_first() {
                let (text, behind) = behind.split_at(usize::from(*len));
                bytes[..text.len()].copy_from_slice(text);
                rest = behind;
            }
            bytes
        };
        ServiceName {
            namespace: field(),
            name: field(),
            port_name: field(),
            kind,
            port: u16::from_be_bytes([high, low]),
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn field() -> impl Strategy<Value = [u8; MAX_NAME]> {
        proptest::collection::vec(prop_oneof![Just(0), any::<u8>()], 0..=MAX_NAME).prop_map(|mut bytes| {
            bytes.resize(MAX_NAME, 0);
            bytes.try_into().expect("it has that length")
        })
    }

    proptest! {
        #[test]
        fn what_is_packed_is_unpacked_as_it_was(
            namespace in field(), name in field(), port_name in field(),
            kind: u8, port: u16,
        ) {
            let name = ServiceName { namespace, name, port_name, kind, port };
            prop_assert_eq!(PackedName::from(&name).unpack(), name);
        }
    }
}
