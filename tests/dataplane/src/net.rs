//! The network that the packets' node stands in. `NODE` has the uplink eth0, a second one, eth1, that takes small packets
//! only, and a pod's interface.
use std::net::IpAddr;

/// Interface indices.
pub const UPLINK: u32 = 10;
pub const NARROW: u32 = 11;
pub const POD: u32 = 20;
/// Of [`NARROW`], in bytes of the network packet; all others have 1500.
pub const NARROW_MTU: u16 = 1300;
pub const MTU: u16 = 1500;

/// An interface of the node: its link address, and its network address for each family, with prefix lengths.
pub struct Interface {
    pub index: u32,
    pub name: &'static str,
    pub mac: [u8; 6],
    pub mtu: u16,
    pub addresses: &'static [&'static str],
}

pub const INTERFACES: [Interface; 3] = [
    Interface {
        index: UPLINK,
        name: "eth0",
        mac: [2, 0, 0, 0, 0, 1],
        mtu: MTU,
        addresses: &["192.0.2.1/24", "2001:db8::1/64"],
    },
    Interface {
        index: NARROW,
        name: "eth1",
        mac: [2, 0, 0, 0, 1, 1],
        mtu: NARROW_MTU,
        addresses: &["198.18.0.1/24", "2001:db8:18::1/64"],
    },
    Interface { index: POD, name: "pod0", mac: [2, 0, 0, 0, 2, 1], mtu: MTU, addresses: &[] },
];

/// A way to a range of addresses: by a gateway, or straight. Only next hops whose neighbour is known have a link address.
pub struct Route {
    pub prefix: &'static str,
    pub gateway: Option<&'static str>,
    pub interface: u32,
    /// The last byte of the next hop's link address, which is else the interface's with a 9 in its fourth byte.
    pub neighbour: Option<u8>,
}

const fn by(prefix: &'static str, gateway: &'static str, interface: u32, neighbour: Option<u8>) -> Route {
    Route { prefix, gateway: Some(gateway), interface, neighbour }
}

pub const ROUTES: [Route; 10] = [
    // Clients.
    by("203.0.113.0/24", "192.0.2.254", UPLINK, Some(0xfe)),
    by("2001:db8:c::/64", "2001:db8::fe", UPLINK, Some(0xfe)),
    // Pods of other nodes: a usual one; one behind the narrow link; one whose neighbour is not known.
    by("10.244.2.0/24", "192.0.2.2", UPLINK, Some(2)),
    by("fd00:244:2::/64", "2001:db8::2", UPLINK, Some(2)),
    by("10.244.3.0/24", "198.18.0.3", NARROW, Some(3)),
    by("fd00:244:3::/64", "2001:db8:18::3", NARROW, Some(3)),
    by("10.244.4.0/24", "192.0.2.4", UPLINK, None),
    by("fd00:244:4::/64", "2001:db8::4", UPLINK, None),
    // This node's pods; the neighbour is the pod itself.
    Route { prefix: "10.244.1.0/24", gateway: None, interface: POD, neighbour: Some(5) },
    Route { prefix: "fd00:244:1::/64", gateway: None, interface: POD, neighbour: Some(5) },
];

/// The pods of this node that have neighbour entries.
pub const PODS: [&str; 6] =
    ["10.244.1.5", "10.244.1.6", "10.244.1.9", "fd00:244:1::5", "fd00:244:1::6", "fd00:244:1::9"];

pub fn interface(index: u32) -> &'static Interface {
    INTERFACES.iter().find(|interface| interface.index == index).expect("an interface of the node")
}

pub fn neighbour_mac(interface_index: u32, last: u8) -> [u8; 6] {
    let [a, b, c, _, e, _] = interface(interface_index).mac;
    [a, b, c, 9, e, last]
}

/// Whether `address` is in the range that `prefix`, as ADDRESS/LENGTH, writes.
pub fn contains(prefix: &str, address: IpAddr) -> bool {
    let (base, length) = prefix.split_once('/').expect("a prefix");
    let length: u32 = length.parse().expect("a prefix length");
    let bits = |address: IpAddr| match address {
        IpAddr::V4(address) => (u128::from(address.to_bits()) << 96, true),
        IpAddr::V6(address) => (address.to_bits(), false),
    };
    let ((a, a4), (b, b4)) = (bits(address), bits(base.parse().expect("an address")));
    a4 == b4 && (length == 0 || (a ^ b) >> (128 - length) == 0)
}

/// The way to `dst`.
pub fn route(dst: IpAddr) -> Option<&'static Route> {
    ROUTES.iter().find(|route| contains(route.prefix, dst))
}

/// Destination and source of a frame sent by this route; `None` where the neighbour is not known.
pub fn macs(route: &Route, dst: IpAddr) -> Option<[u8; 12]> {
    if route.gateway.is_none() && !PODS.iter().any(|pod| pod.parse() == Ok(dst)) {
        return None;
    }
    let to = neighbour_mac(route.interface, route.neighbour?);
    Some([to, interface(route.interface).mac].concat().try_into().expect("two link addresses"))
}
