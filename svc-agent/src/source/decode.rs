//! The API's objects to ours. What cannot be understood of an object is written down in its `faults` and left out; the
//! rest of it counts.
use std::net::{IpAddr, Ipv4Addr};
use std::str::FromStr;
use std::sync::Arc;
use std::time::SystemTime;

use ipnet::IpNet;
use k8s_openapi::jiff::Timestamp;

use super::wire::{self, ObjectMeta};
use crate::object::{
    Condition, Endpoint, Family, Hints, Node, ObjectName, Policy, Protocol, Service, ServiceCidr, ServiceKind,
    ServicePort, Slice, SlicePort,
};

/// Label of an EndpointSlice: the name of its Service.
pub const SERVICE_NAME_LABEL: &str = "kubernetes.io/service-name";
const TRIGGER_TIME_ANNOTATION: &str = "endpoints.kubernetes.io/last-change-trigger-time";
const ZONE_LABEL: &str = "topology.kubernetes.io/zone";
/// The cluster autoscaler's mark on a node that it is about to delete.
const TO_BE_DELETED_TAINT: &str = "ToBeDeletedByClusterAutoscaler";
/// ClientIP affinity's timeout where none is given (core/v1, ClientIPConfig).
const AFFINITY_SECONDS: u32 = 10_800;

/// Label of a Service that another proxy serves.
pub const OTHER_PROXY_LABEL: &str = "service.kubernetes.io/service-proxy-name";
/// Label of a headless Service's slices.
pub const HEADLESS_LABEL: &str = "service.kubernetes.io/headless";

/// kube-proxy asks the API server for Services and slices without these.
pub fn has_label(meta: Option<&ObjectMeta>, label: &str) -> bool {
    meta.is_some_and(|meta| meta.labels.contains_key(label))
}

fn triggered(meta: Option<&ObjectMeta>) -> Option<SystemTime> {
    let text = meta?.annotations.get(TRIGGER_TIME_ANNOTATION)?;
    text.parse::<Timestamp>().ok().map(SystemTime::from)
}

/// Where an object has no namespace, it is in `default`, as for `kubectl apply`.
pub fn object_name(meta: Option<&ObjectMeta>) -> ObjectName {
    let namespace = meta.and_then(|meta| meta.namespace.as_deref()).filter(|namespace| !namespace.is_empty());
    ObjectName::new(namespace.unwrap_or("default"), name(meta))
}

fn name(meta: Option<&ObjectMeta>) -> &str {
    meta.and_then(|meta| meta.name.as_deref()).unwrap_or_default()
}

pub fn service(object: &wire::Service) -> Service {
    let mut faults = Vec::new();
    let meta = object.metadata.as_ref();
    let spec = object.spec.as_ref();
    let text = |field: fn(&wire::ServiceSpec) -> &Option<String>| spec.and_then(|spec| field(spec).as_deref());

    let listed = spec.map(|spec| &spec.cluster_ips[..]).unwrap_or_default();
    let mut cluster_ips: Vec<&str> = listed.iter().map(String::as_str).collect();
    if cluster_ips.is_empty() {
        cluster_ips.extend(text(|spec| &spec.cluster_ip));
    }
    cluster_ips.retain(|ip| !ip.is_empty());

    let kind = match text(|spec| &spec.type_) {
        Some("ExternalName") => ServiceKind::ExternalName,
        _ if cluster_ips.contains(&"None") => ServiceKind::Headless,
        _ => ServiceKind::Proxied,
    };
    if kind != ServiceKind::Proxied {
        cluster_ips.clear();
    }
    let cluster_ips = addresses("spec.clusterIPs", cluster_ips, &mut faults);

    let mut families: Vec<Family> = spec
        .map(|spec| &spec.ip_families[..])
        .unwrap_or_default()
        .iter()
        .filter_map(|family| match family.as_str() {
            "IPv4" => Some(Family::V4),
            "IPv6" => Some(Family::V6),
            other => {
                faults.push(format!("spec.ipFamilies: {other:?} is no address family").into());
                None
            }
        })
        .collect();
    if families.is_empty() {
        families = cluster_ips.iter().copied().map(Family::of).collect();
    }
    families.sort_unstable();
    families.dedup();

    let external_ips = spec.map(|spec| &spec.external_ips[..]).unwrap_or_default();
    let source_ranges = spec.map(|spec| &spec.load_balancer_source_ranges[..]).unwrap_or_default();
    let ingress = object
        .status
        .as_ref()
        .and_then(|status| status.load_balancer.as_ref())
        .map(|balancer| &balancer.ingress[..])
        .unwrap_or_default();
    let vips = ingress
        .iter()
        .filter(|ingress| ingress.ip_mode.as_deref().is_none_or(|mode| mode == "VIP"))
        .filter_map(|ingress| ingress.ip.as_deref().filter(|ip| !ip.is_empty()));

    let policy = |value: Option<&str>| if value == Some("Local") { Policy::Local } else { Policy::Cluster };
    let affinity_seconds = match text(|spec| &spec.session_affinity) {
        Some("ClientIP") => spec
            .and_then(|spec| spec.session_affinity_config.as_ref())
            .and_then(|config| config.client_ip.as_ref())
            .and_then(|client| client.timeout_seconds)
            .and_then(|seconds| u32::try_from(seconds).ok())
            .filter(|seconds| *seconds > 0)
            .unwrap_or(AFFINITY_SECONDS),
        _ => 0,
    };

    let external_policy = policy(text(|spec| &spec.external_traffic_policy));
    let is_checked = text(|spec| &spec.type_) == Some("LoadBalancer") && external_policy == Policy::Local;
    let health_check_port = match spec.and_then(|spec| spec.health_check_node_port).filter(|_| is_checked) {
        None | Some(0) => 0,
        Some(number) => port_number(number).unwrap_or_else(|| {
            faults.push(format!("spec.healthCheckNodePort: {number} is no port number").into());
            0
        }),
    };

    let listed = spec.map(|spec| &spec.ports[..]).unwrap_or_default();
    let mut ports = Vec::with_capacity(listed.len());
    for port in listed {
        let name = port.name.as_deref().unwrap_or_default();
        let number = port.port.unwrap_or_default();
        let Some(number) = port_number(number) else {
            faults.push(format!("port {name:?}: {number} is no port number").into());
            continue;
        };
        let Some(protocol) = protocol(port.protocol.as_deref()) else {
            faults.push(format!("port {name:?}: protocol {:?} is none that a Service can have", port.protocol).into());
            continue;
        };
        let node_port = match port.node_port {
            None | Some(0) => 0,
            Some(number) => port_number(number).unwrap_or_else(|| {
                faults.push(format!("port {name:?}: nodePort {number} is no port number").into());
                0
            }),
        };
        ports.push(ServicePort { name: name.into(), port: number, protocol, node_port });
    }

    Service {
        name: object_name(meta),
        uid: meta.and_then(|meta| meta.uid.as_deref()).unwrap_or_default().into(),
        created: meta.and_then(|meta| meta.creation_timestamp).map_or(0, |time| time.seconds),
        kind,
        families,
        cluster_ips,
        external_ips: addresses("spec.externalIPs", external_ips, &mut faults),
        load_balancer_ips: addresses("status.loadBalancer.ingress", vips, &mut faults),
        source_ranges: cidrs("spec.loadBalancerSourceRanges", source_ranges, &mut faults),
        ports,
        internal_policy: policy(text(|spec| &spec.internal_traffic_policy)),
        external_policy,
        affinity_seconds,
        health_check_port,
        faults,
    }
}

/// None for a slice that names no Service.
pub fn slice(object: &wire::EndpointSlice) -> Option<Slice> {
    let meta = object.metadata.as_ref();
    let service = meta?.labels.get(SERVICE_NAME_LABEL).filter(|name| !name.is_empty())?;
    let mut faults = Vec::new();
    let mut endpoints = Vec::with_capacity(object.endpoints.len());
    let address_type = object.address_type.as_deref().unwrap_or_default();
    let family = match address_type {
        "IPv4" => Some(Family::V4),
        "IPv6" => Some(Family::V6),
        other => {
            faults.push(format!("addressType {other:?} cannot be proxied").into());
            None
        }
    };
    for endpoint in object.endpoints.iter().filter(|_| family.is_some()) {
        // All addresses of an endpoint are the same one; consumers use the first (discovery/v1, Endpoint).
        let Some(text) = endpoint.addresses.first() else { continue };
        let address = match IpAddr::from_str(text) {
            Ok(address) if Some(Family::of(address)) == family => address,
            _ => {
                faults.push(format!("endpoint {text:?} is no {address_type} address").into());
                continue;
            }
        };
        let conditions = endpoint.conditions.as_ref();
        let hints = endpoint.hints.as_ref();
        let zones = hints.map(|hints| &hints.for_zones[..]).unwrap_or_default();
        let nodes = hints.map(|hints| &hints.for_nodes[..]).unwrap_or_default();
        endpoints.push(Endpoint {
            address,
            node: endpoint.node_name.as_deref().map(Into::into),
            condition: Condition::new(
                conditions.and_then(|conditions| conditions.ready),
                conditions.and_then(|conditions| conditions.serving),
                conditions.and_then(|conditions| conditions.terminating),
            ),
            hints: Hints::new(
                zones.iter().map(|zone| zone.name.as_str().into()).collect(),
                nodes.iter().map(|node| node.name.as_str().into()).collect(),
            ),
        });
    }
    let mut ports = Vec::with_capacity(object.ports.len());
    for port in &object.ports {
        let name = port.name.as_deref().unwrap_or_default();
        match slice_port(name, port.port, port.protocol.as_deref()) {
            Ok(port) => ports.push(port),
            Err(fault) => faults.push(fault),
        }
    }
    Some(Slice {
        name: object_name(meta),
        triggered: triggered(meta),
        service: service.as_str().into(),
        ports,
        endpoints,
        faults,
    })
}

/// A legacy Endpoints object as slices, one for each of its subsets, as the EndpointSlice mirroring controller would
/// write them.
pub fn endpoints(object: &wire::Endpoints) -> Vec<Slice> {
    let owner = object_name(object.metadata.as_ref());
    let mut slices = Vec::new();
    for (index, subset) in object.subsets.iter().enumerate() {
        let mut faults = Vec::new();
        let mut endpoints = Vec::new();
        let ready = subset.addresses.iter().map(|address| (address, true));
        let not_ready = subset.not_ready_addresses.iter().map(|address| (address, false));
        for (address, ready) in ready.chain(not_ready) {
            let text = address.ip.as_deref().unwrap_or_default();
            match IpAddr::from_str(text) {
                Ok(ip) => endpoints.push(Endpoint {
                    address: ip,
                    node: address.node_name.as_deref().map(Into::into),
                    condition: Condition::new(Some(ready), None, None),
                    hints: None,
                }),
                Err(_) => faults.push(format!("endpoint {text:?} is no IP address").into()),
            }
        }
        let mut ports = Vec::new();
        for port in &subset.ports {
            let name = port.name.as_deref().unwrap_or_default();
            match slice_port(name, port.port, port.protocol.as_deref()) {
                Ok(port) => ports.push(port),
                Err(fault) => faults.push(fault),
            }
        }
        let name = ObjectName::new(&owner.namespace, &format!("{} (Endpoints, subset {})", owner.name, index + 1));
        slices.push(Slice { name, triggered: None, service: Arc::clone(&owner.name), ports, endpoints, faults });
    }
    slices
}

pub fn node(object: &wire::Node) -> Node {
    let addresses = object.status.as_ref().map(|status| &status.addresses[..]).unwrap_or_default();
    let first = |family: Family| {
        ["InternalIP", "ExternalIP"].into_iter().find_map(|kind| {
            addresses
                .iter()
                .filter(|address| address.type_.as_deref() == Some(kind))
                .filter_map(|address| IpAddr::from_str(address.address.as_deref()?).ok())
                .find(|address| Family::of(*address) == family)
        })
    };
    let meta = object.metadata.as_ref();
    let spec = object.spec.as_ref();
    let taints = spec.map(|spec| &spec.taints[..]).unwrap_or_default();
    let listed = spec.map(|spec| &spec.pod_cidrs[..]).unwrap_or_default();
    let only = spec.and_then(|spec| spec.pod_cidr.as_ref()).filter(|_| listed.is_empty());
    let pod_cidrs = cidrs("spec.podCIDRs", listed.iter().chain(only), &mut Vec::new());
    Node {
        name: name(meta).into(),
        zone: meta.and_then(|meta| meta.labels.get(ZONE_LABEL)).map(|zone| zone.as_str().into()),
        primary: Family::BOTH.into_iter().filter_map(first).collect(),
        pod_cidrs,
        eligible: meta.is_none_or(|meta| meta.deletion_timestamp.is_none())
            && taints.iter().all(|taint| taint.key.as_deref() != Some(TO_BE_DELETED_TAINT)),
    }
}

pub fn service_cidr(object: &wire::ServiceCidr) -> ServiceCidr {
    let listed = object.spec.as_ref().map(|spec| &spec.cidrs[..]).unwrap_or_default();
    let mut faults = Vec::new();
    ServiceCidr { name: name(object.metadata.as_ref()).into(), cidrs: cidrs("spec.cidrs", listed, &mut faults), faults }
}

fn slice_port(name: &str, port: Option<i32>, protocol_name: Option<&str>) -> Result<SlicePort, Box<str>> {
    let number = match port {
        // "All ports", which kube-proxy ignores as well.
        None => return Err(format!("port {name:?} has no number").into()),
        Some(number) => port_number(number).ok_or_else(|| format!("port {name:?}: {number} is no port number"))?,
    };
    let protocol = protocol(protocol_name)
        .ok_or_else(|| format!("port {name:?}: protocol {protocol_name:?} is none that a Service can have"))?;
    Ok(SlicePort { name: name.into(), port: number, protocol })
}

fn port_number(number: i32) -> Option<u16> {
    u16::try_from(number).ok().filter(|number| *number != 0)
}

/// The API's default is TCP.
fn protocol(name: Option<&str>) -> Option<Protocol> {
    Protocol::parse(name.filter(|name| !name.is_empty()).unwrap_or("TCP"))
}

fn addresses<T: AsRef<str>>(
    field: &str,
    texts: impl IntoIterator<Item = T>,
    faults: &mut Vec<Box<str>>,
) -> Vec<IpAddr> {
    let mut addresses = Vec::new();
    for text in texts {
        match address(text.as_ref()) {
            Some(address) => addresses.push(address),
            None => faults.push(format!("{field}: {:?} is no IP address", text.as_ref()).into()),
        }
    }
    addresses
}

/// White space around a CIDR does not count, nor do bits beyond its prefix; an empty one is none.
fn cidrs<T: AsRef<str>>(field: &str, texts: impl IntoIterator<Item = T>, faults: &mut Vec<Box<str>>) -> Vec<IpNet> {
    let mut cidrs = Vec::new();
    for text in texts {
        let text = text.as_ref().trim();
        match cidr(text) {
            Some(cidr) => cidrs.push(cidr),
            None if text.is_empty() => {}
            None => faults.push(format!("{field}: {text:?} is no CIDR").into()),
        }
    }
    cidrs
}

/// None also for IPv4 in IPv6 clothes, which kube-proxy counts to neither family.
fn cidr(text: &str) -> Option<IpNet> {
    let (text, len) = text.split_once('/')?;
    if !len.bytes().all(|byte| byte.is_ascii_digit()) {
        return None;
    }
    let cidr = IpNet::new(address(text)?, len.parse().ok()?).ok()?.trunc();
    let mapped = matches!(cidr.addr(), IpAddr::V6(v6) if v6.to_ipv4_mapped().is_some());
    (!mapped).then_some(cidr)
}

/// Leading zeros of an IPv4 address mean nothing, as they do for Kubernetes (ParseIPSloppy).
fn address(text: &str) -> Option<IpAddr> {
    IpAddr::from_str(text).ok().or_else(|| {
        let strip = |part: &str| {
            let stripped = part.trim_start_matches('0');
            if stripped.is_empty() && !part.is_empty() { "0".to_owned() } else { stripped.to_owned() }
        };
        text.split('.').map(strip).collect::<Vec<_>>().join(".").parse::<Ipv4Addr>().ok().map(IpAddr::V4)
    })
}

#[cfg(test)]
mod tests {
    use ipnet::IpNet;
    use prost::Message;
    use rstest::rstest;
    use serde_json::json;

    use super::{address, cidrs, endpoints, service, slice};
    use crate::object::Condition;
    use crate::source::wire;

    #[rstest]
    #[case::v4("192.0.2.0/24", Some("192.0.2.0/24"))]
    #[case::v6("2001:db8::/32", Some("2001:db8::/32"))]
    #[case::white_space(" \t192.0.2.0/24 ", Some("192.0.2.0/24"))]
    #[case::bits_beyond_the_prefix("192.0.2.77/24", Some("192.0.2.0/24"))]
    #[case::leading_zeros("010.001.000.000/16", Some("10.1.0.0/16"))]
    #[case::no_prefix("192.0.2.1", None)]
    #[case::too_long("192.0.2.0/33", None)]
    #[case::signed("192.0.2.0/+24", None)]
    #[case::mapped("::ffff:192.0.2.0/120", None)]
    #[case::nonsense("all/0", None)]
    fn a_cidr_is_read_as_kubernetes_reads_it(#[case] text: &str, #[case] expected: Option<&str>) {
        let mut faults = Vec::new();
        let found = cidrs("spec.loadBalancerSourceRanges", [text], &mut faults);
        assert_eq!(found, expected.map(|text| text.parse::<IpNet>().unwrap()).into_iter().collect::<Vec<_>>());
        assert_eq!(faults.len(), usize::from(expected.is_none()));
        assert!(faults.iter().all(|fault| fault.starts_with("spec.loadBalancerSourceRanges: ")), "{faults:?}");
    }

    #[test]
    fn an_empty_cidr_is_no_fault() {
        let mut faults = Vec::new();
        assert_eq!(cidrs("spec.cidrs", ["", " "], &mut faults), []);
        assert_eq!(faults, []);
    }

    #[rstest]
    #[case::leading_zeros("010.0.0.01", Some("10.0.0.1"))]
    #[case::zero("0.00.000.0", Some("0.0.0.0"))]
    #[case::missing_part("10..0.1", None)]
    #[case::not_all_digits("10.0.0.x", None)]
    fn an_address_is_read_as_kubernetes_reads_it(#[case] text: &str, #[case] expected: Option<&str>) {
        assert_eq!(address(text), expected.map(|text| text.parse().unwrap()));
    }

    /// Go writes the empty value of a field that is no pointer into protobuf, and leaves it out of JSON.
    #[test]
    fn a_field_that_is_empty_is_one_that_is_absent() {
        let empty = || Some(String::new());
        let spec = wire::ServiceSpec {
            type_: Some("LoadBalancer".to_owned()),
            external_traffic_policy: Some("Local".to_owned()),
            cluster_ip: empty(),
            session_affinity: empty(),
            internal_traffic_policy: empty(),
            health_check_node_port: Some(0),
            ports: vec![wire::ServicePort { name: empty(), protocol: empty(), port: Some(80), node_port: Some(0) }],
            ..wire::ServiceSpec::default()
        };
        let ingress = vec![wire::LoadBalancerIngress { ip: empty(), ip_mode: None }];
        let status = wire::ServiceStatus { load_balancer: Some(wire::LoadBalancerStatus { ingress }) };
        let metadata = wire::ObjectMeta {
            name: Some("a".to_owned()),
            namespace: empty(),
            uid: empty(),
            creation_timestamp: Some(wire::Time::default()),
            ..wire::ObjectMeta::default()
        };
        let full = wire::Service { metadata: Some(metadata), spec: Some(spec), status: Some(status) };
        let full = wire::Service::decode(&full.encode_to_vec()[..]).unwrap();
        let bare = json!({
            "metadata": { "name": "a", "creationTimestamp": null, "labels": null },
            "spec": { "type": "LoadBalancer", "externalTrafficPolicy": "Local", "ports": [{ "port": 80 }] },
            "status": { "loadBalancer": {} },
        });
        let bare: wire::Service = serde_json::from_value(bare).unwrap();
        assert_eq!(service(&full), service(&bare));
        assert_eq!(service(&full).faults, []);
    }

    #[test]
    fn conditions_that_are_nil_are_good() {
        let endpoint = |conditions| wire::Endpoint {
            addresses: vec!["192.0.2.1".to_owned()],
            conditions,
            ..wire::Endpoint::default()
        };
        let ended = wire::EndpointConditions { ready: Some(false), serving: Some(false), terminating: Some(true) };
        let object = wire::EndpointSlice {
            metadata: Some(wire::ObjectMeta {
                labels: [(super::SERVICE_NAME_LABEL.to_owned(), "a".to_owned())].into(),
                ..wire::ObjectMeta::default()
            }),
            address_type: Some("IPv4".to_owned()),
            endpoints: [None, Some(wire::EndpointConditions::default()), Some(ended)].map(endpoint).to_vec(),
            ports: vec![],
        };
        let read = wire::EndpointSlice::decode(&object.encode_to_vec()[..]).unwrap();
        let slice = slice(&read).unwrap();
        let conditions: Vec<_> = slice.endpoints.iter().map(|endpoint| endpoint.condition).collect();
        let ended = Condition { ready: false, serving: false, terminating: true };
        assert_eq!(conditions, [Condition::READY, Condition::READY, ended]);
    }

    #[test]
    fn lists_that_are_null_are_empty() {
        let object = json!({
            "metadata": { "labels": { super::SERVICE_NAME_LABEL: "a" }, "annotations": null },
            "addressType": "IPv6", "endpoints": null, "ports": null,
        });
        let slice = slice(&serde_json::from_value(object).unwrap()).unwrap();
        assert_eq!((slice.endpoints, slice.ports, slice.faults), (vec![], vec![], vec![]));
        let none: wire::Endpoints = serde_json::from_value(json!({ "metadata": null, "subsets": null })).unwrap();
        assert_eq!(endpoints(&none), []);
    }
}
