//! The kernel's names of Services without the zeros that pad them: two thirds of it in memory, tens of thousands of times.
use svc_common::map::ServiceName;

/// A [`ServiceName`], whatever its bytes.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct PackedName(Box<[u8]>);

impl From<&ServiceName> for PackedName {
    fn from(name: &ServiceName) -> Self {
        let ServiceName { namespace, name, port_name, port, protocol, family } = name;
        let [high, low] = port.to_be_bytes();
        let mut bytes = vec![high, low, *protocol, *family];
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
        let [high, low, protocol, family, ref rest @ ..] = *self.0 else { unreachable!("it begins with these four") };
        let mut rest = rest;
        let mut field = || {
            let mut bytes = [0; 64];
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
            port: u16::from_be_bytes([high, low]),
            protocol,
            family,
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn field() -> impl Strategy<Value = [u8; 64]> {
        proptest::collection::vec(prop_oneof![Just(0), any::<u8>()], 0..=64).prop_map(|mut bytes| {
            bytes.resize(64, 0);
            bytes.try_into().expect("it has that length")
        })
    }

    proptest! {
        #[test]
        fn what_is_packed_is_unpacked_as_it_was(
            namespace in field(), name in field(), port_name in field(),
            port: u16, protocol: u8, family: u8,
        ) {
            let name = ServiceName { namespace, name, port_name, port, protocol, family };
            prop_assert_eq!(PackedName::from(&name).unpack(), name);
        }
    }
}
