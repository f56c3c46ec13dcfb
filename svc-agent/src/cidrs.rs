//! What addresses are by the ranges that they are in: pods', and those that ClusterIPs are taken from.
use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, Ipv4Addr};
use std::str::FromStr;

use ipnet::IpNet;
use svc_common::Addr;
use svc_common::map::{CIDR_PODS, CIDR_SERVICES, CidrFlags, CidrKey, MAX_CIDRS};

use crate::object::Node;
use crate::plan::range;

/// By what pods are told, in kube-proxy's words.
#[derive(clap::ValueEnum, Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum DetectLocalMode {
    /// Their addresses, given by --cluster-cidr.
    #[default]
    #[value(name = "ClusterCIDR")]
    ClusterCidr,
    /// The addresses that the Node object has for its pods.
    #[value(name = "NodeCIDR")]
    NodeCidr,
    /// The interface that they come in by, given by --pod-bridge-interface.
    #[value(name = "BridgeInterface")]
    BridgeInterface,
    /// The interface that they come in by, whose name begins with --pod-interface-name-prefix.
    #[value(name = "InterfaceNamePrefix")]
    InterfaceNamePrefix,
}

impl DetectLocalMode {
    pub const fn label(self) -> &'static str {
        match self {
            DetectLocalMode::ClusterCidr => "ClusterCIDR",
            DetectLocalMode::NodeCidr => "NodeCIDR",
            DetectLocalMode::BridgeInterface => "BridgeInterface",
            DetectLocalMode::InterfaceNamePrefix => "InterfaceNamePrefix",
        }
    }
}

impl FromStr for DetectLocalMode {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        clap::ValueEnum::from_str(text, false)
    }
}

/// How the node's pods are told from everybody else (kube-proxy's detectLocalMode).
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub enum PodDetector {
    /// They are not.
    #[default]
    None,
    /// By the addresses of all pods of the cluster.
    ClusterCidr(Vec<IpNet>),
    /// By the addresses that the Node object has for its pods.
    NodeCidr,
    /// By the bridge that they come in by.
    BridgeInterface(String),
    /// By how the names of the interfaces begin that they come in by.
    InterfaceNamePrefix(String),
}

impl PodDetector {
    /// The pods' ranges. Of a Node's the first of each family counts, as for kube-proxy.
    pub fn ranges(&self, node: Option<&Node>) -> Vec<IpNet> {
        match self {
            PodDetector::None | PodDetector::BridgeInterface(_) | PodDetector::InterfaceNamePrefix(_) => vec![],
            PodDetector::ClusterCidr(ranges) => ranges.clone(),
            PodDetector::NodeCidr => {
                let ranges = node.map(|node| node.pod_cidrs.as_slice()).unwrap_or_default();
                let first = |v4: bool| ranges.iter().copied().find(|range| range.addr().is_ipv4() == v4);
                [true, false].into_iter().filter_map(first).collect()
            }
        }
    }
}

/// The kernel's map of as many of these ranges as it has room for, each with the bits of those that it is inside of, and
/// the ranges that are left out.
pub fn map(pods: &[IpNet], services: &[IpNet]) -> (BTreeMap<CidrKey, CidrFlags>, Vec<IpNet>) {
    let mut ranges: Vec<(IpNet, CidrFlags)> = pods
        .iter()
        .map(|range| (range.trunc(), CIDR_PODS))
        .chain(services.iter().map(|range| (range.trunc(), CIDR_SERVICES)))
        .collect();
    let mut seen = BTreeSet::new();
    ranges.retain(|range| seen.insert(*range));
    // One more is for IPv4 as a whole, below.
    let left_out = ranges.split_off(ranges.len().min(MAX_CIDRS - 1)).into_iter().map(|(range, _)| range).collect();
    let flags_of = |inner: IpNet| -> CidrFlags {
        ranges.iter().filter(|(range, _)| range.contains(&inner)).fold(0, |all, (_, flags)| all | flags)
    };
    let key = |net: IpNet| {
        let (addr, prefix_len) = range(net);
        CidrKey { prefix_len, addr }
    };
    let mut map: BTreeMap<CidrKey, CidrFlags> =
        ranges.iter().map(|(range, _)| (key(*range), flags_of(*range))).collect();
    // To the map IPv4 is a part of IPv6, and a range of IPv6 around it would count for it.
    let around_v4 = |range: &IpNet| range.contains(&IpAddr::V6(Ipv4Addr::UNSPECIFIED.to_ipv6_mapped()));
    if ranges.iter().any(|(range, _)| around_v4(range)) {
        map.entry(CidrKey { prefix_len: 96, addr: Addr::ANY_V4 }).or_insert(0);
    }
    (map, left_out)
}

#[cfg(test)]
mod tests {
    use super::*;
    use rstest::rstest;

    fn nets(texts: &[&str]) -> Vec<IpNet> {
        texts.iter().map(|text| text.parse().unwrap()).collect()
    }

    /// As a longest-prefix match finds it.
    fn look_up(map: &BTreeMap<CidrKey, CidrFlags>, addr: &str) -> CidrFlags {
        let bits = |addr: Addr| -> u128 {
            let [a, b, c, d] = addr.0.map(|word| u128::from(u32::from_be(word)));
            a << 96 | b << 64 | c << 32 | d
        };
        let wanted = bits(addr.parse::<IpAddr>().unwrap().into());
        let matches = |key: &CidrKey| {
            let shift = 128 - key.prefix_len;
            shift == 128 || bits(key.addr) >> shift == wanted >> shift
        };
        map.iter().filter(|(key, _)| matches(key)).max_by_key(|(key, _)| key.prefix_len).map_or(0, |(_, flags)| *flags)
    }

    #[rstest]
    #[case::pod("10.244.1.1", CIDR_PODS)]
    #[case::service("10.96.1.1", CIDR_SERVICES)]
    #[case::services_among_pods("10.244.250.1", CIDR_PODS | CIDR_SERVICES)]
    #[case::elsewhere("192.0.2.1", 0)]
    #[case::pod_v6("fd00:10:244::1", CIDR_PODS)]
    #[case::service_v6("fd00:10:96::1", CIDR_SERVICES)]
    #[case::pods_among_services("fd00:10:96:0:ffff::1", CIDR_PODS | CIDR_SERVICES)]
    fn an_address_is_what_all_its_ranges_say(#[case] addr: &str, #[case] flags: CidrFlags) {
        let (map, _) = map(
            &nets(&["10.244.0.0/16", "fd00:10:244::/48", "fd00:10:96:0:ffff::/80"]),
            &nets(&["10.96.0.0/16", "10.244.250.0/24", "fd00:10:96::/48"]),
        );
        assert_eq!(look_up(&map, addr), flags);
    }

    #[test]
    fn a_range_of_ipv6_says_nothing_of_ipv4() {
        let (map, _) = map(&nets(&["::/0"]), &nets(&["10.96.0.0/16"]));
        assert_eq!(look_up(&map, "192.0.2.1"), 0);
        assert_eq!(look_up(&map, "10.96.0.1"), CIDR_SERVICES);
        assert_eq!(look_up(&map, "2001:db8::1"), CIDR_PODS);
    }

    #[test]
    fn what_there_is_no_room_for_is_left_out_and_told() {
        let many: Vec<IpNet> =
            (0..2000u32).map(|n| format!("10.{}.{}.0/24", n / 256, n % 256).parse().unwrap()).collect();
        let (map, left_out) = map(&many[..1000], &[&many[1000..], &many[1000..]].concat());
        assert_eq!((map.len(), left_out.len()), (MAX_CIDRS - 1, 2000 - (MAX_CIDRS - 1)));
        assert_eq!(left_out[0], many[MAX_CIDRS - 1]);
        let pods = look_up(&map, "10.3.231.1");
        assert_eq!(pods, CIDR_PODS);
    }

    #[test]
    fn a_nodes_first_range_of_each_family_is_its_pods() {
        let node = Node { pod_cidrs: nets(&["10.1.0.0/24", "10.2.0.0/24", "fd00:1::/64"]), ..Node::default() };
        assert_eq!(PodDetector::NodeCidr.ranges(Some(&node)), nets(&["10.1.0.0/24", "fd00:1::/64"]));
        assert_eq!(PodDetector::NodeCidr.ranges(None), []);
    }
}
