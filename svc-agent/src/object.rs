//! The few fields of the API's objects that decide where traffic goes, checked and in types of their own: what sources
//! send and the store keeps.
use std::fmt;
use std::net::IpAddr;
use std::sync::Arc;
use std::time::SystemTime;

use ipnet::IpNet;
use svc_common::map::{SCTP, TCP, UDP};

/// A namespaced object's name.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct ObjectName {
    pub namespace: Arc<str>,
    pub name: Arc<str>,
}

impl ObjectName {
    pub fn new(namespace: &str, name: &str) -> Self {
        ObjectName { namespace: namespace.into(), name: name.into() }
    }

    /// That name in the same namespace.
    pub fn sibling(&self, name: &Arc<str>) -> Self {
        ObjectName { namespace: Arc::clone(&self.namespace), name: Arc::clone(name) }
    }
}

impl fmt::Display for ObjectName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.namespace, self.name)
    }
}

#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub enum Family {
    V4 = 4,
    V6 = 6,
}

impl Family {
    pub const BOTH: [Family; 2] = [Family::V4, Family::V6];

    /// A v4-mapped IPv6 address counts as IPv6, as it does for the API server.
    pub fn of(addr: IpAddr) -> Self {
        if addr.is_ipv4() { Family::V4 } else { Family::V6 }
    }
}

impl fmt::Display for Family {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "IPv{}", *self as u8)
    }
}

#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub enum Protocol {
    Tcp,
    Udp,
    Sctp,
}

impl Protocol {
    /// The API's name for it, where it is one that a Service can have.
    pub fn parse(text: &str) -> Option<Self> {
        match text {
            "TCP" => Some(Protocol::Tcp),
            "UDP" => Some(Protocol::Udp),
            "SCTP" => Some(Protocol::Sctp),
            _ => None,
        }
    }

    pub fn from_number(number: u8) -> Option<Self> {
        match number {
            TCP => Some(Protocol::Tcp),
            UDP => Some(Protocol::Udp),
            SCTP => Some(Protocol::Sctp),
            _ => None,
        }
    }

    /// IANA protocol number.
    pub fn number(self) -> u8 {
        match self {
            Protocol::Tcp => TCP,
            Protocol::Udp => UDP,
            Protocol::Sctp => SCTP,
        }
    }
}

impl fmt::Display for Protocol {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Protocol::Tcp => "TCP",
            Protocol::Udp => "UDP",
            Protocol::Sctp => "SCTP",
        })
    }
}

#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum ServiceKind {
    #[default]
    Proxied,
    /// `clusterIP: None`: DNS alone serves it.
    Headless,
    /// A CNAME: DNS alone serves it.
    ExternalName,
}

/// Which endpoints a traffic policy leaves.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum Policy {
    #[default]
    Cluster,
    Local,
}

#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Service {
    pub name: ObjectName,
    /// metadata.uid; empty where it has none.
    pub uid: Box<str>,
    /// creationTimestamp in seconds of Unix time; 0 where it has none.
    pub created: i64,
    pub kind: ServiceKind,
    /// spec.ipFamilies: those of its node ports.
    pub families: Vec<Family>,
    pub cluster_ips: Vec<IpAddr>,
    pub external_ips: Vec<IpAddr>,
    /// status.loadBalancer.ingress of ipMode VIP (KEP-1860).
    pub load_balancer_ips: Vec<IpAddr>,
    /// spec.loadBalancerSourceRanges.
    pub source_ranges: Vec<IpNet>,
    pub ports: Vec<ServicePort>,
    /// KEP-2086.
    pub internal_policy: Policy,
    pub external_policy: Policy,
    /// ClientIP session affinity's timeout; 0 where there is none.
    pub affinity_seconds: u32,
    /// spec.healthCheckNodePort, host byte order; 0 where load balancers have nothing to ask.
    pub health_check_port: u16,
    /// What could not be understood of the object, one sentence each.
    pub faults: Vec<Box<str>>,
}

impl Service {
    /// There may be tens of thousands.
    pub fn shrink_to_fit(&mut self) {
        self.families.shrink_to_fit();
        self.cluster_ips.shrink_to_fit();
        self.external_ips.shrink_to_fit();
        self.load_balancer_ips.shrink_to_fit();
        self.source_ranges.shrink_to_fit();
        self.ports.shrink_to_fit();
    }
}

#[derive(Clone, PartialEq, Eq, Debug)]
pub struct ServicePort {
    /// Empty where it has none.
    pub name: Arc<str>,
    /// Host byte order.
    pub port: u16,
    pub protocol: Protocol,
    /// Host byte order; 0 where it has none.
    pub node_port: u16,
}

/// An EndpointSlice, or what a legacy Endpoints object says.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Slice {
    pub name: ObjectName,
    /// When what led to this version of it happened (annotation endpoints.kubernetes.io/last-change-trigger-time); no part
    /// of what it says.
    pub triggered: Option<SystemTime>,
    /// The name of the Service that it belongs to, in the same namespace.
    pub service: Arc<str>,
    pub ports: Vec<SlicePort>,
    pub endpoints: Vec<Endpoint>,
    /// What could not be understood of the object, one sentence each.
    pub faults: Vec<Box<str>>,
}

impl Slice {
    /// Names of ports, nodes and zones.
    pub fn names_of_many(&mut self) -> impl Iterator<Item = &mut Arc<str>> {
        let of_endpoints = self.endpoints.iter_mut().flat_map(|endpoint| {
            let hints = endpoint.hints.iter_mut().flat_map(|hints| hints.zones.iter_mut().chain(&mut hints.nodes));
            endpoint.node.iter_mut().chain(hints)
        });
        self.ports.iter_mut().map(|port| &mut port.name).chain(of_endpoints)
    }

    /// Whatever the time of its change.
    pub fn says_the_same(&self, other: &Slice) -> bool {
        let Slice { name, triggered: _, service, ports, endpoints, faults } = self;
        (name, service, ports, endpoints, faults)
            == (&other.name, &other.service, &other.ports, &other.endpoints, &other.faults)
    }
}

#[derive(Clone, PartialEq, Eq, Debug)]
pub struct SlicePort {
    /// Empty where it has none.
    pub name: Arc<str>,
    /// Host byte order.
    pub port: u16,
    pub protocol: Protocol,
}

#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Endpoint {
    pub address: IpAddr,
    pub node: Option<Arc<str>>,
    pub condition: Condition,
    /// None where there is no hint.
    pub hints: Option<Box<Hints>>,
}

/// Who should use an endpoint.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Hints {
    pub zones: Box<[Arc<str>]>,
    pub nodes: Box<[Arc<str>]>,
}

impl Hints {
    pub fn new(zones: Box<[Arc<str>]>, nodes: Box<[Arc<str>]>) -> Option<Box<Self>> {
        (!zones.is_empty() || !nodes.is_empty()).then(|| Box::new(Hints { zones, nodes }))
    }
}

impl Endpoint {
    /// Zones that should use this endpoint; empty where there is no hint.
    pub fn zone_hints(&self) -> &[Arc<str>] {
        self.hints.as_ref().map_or(&[], |hints| &hints.zones)
    }

    /// Nodes that should use this endpoint; empty where there is no hint.
    pub fn node_hints(&self) -> &[Arc<str>] {
        self.hints.as_ref().map_or(&[], |hints| &hints.nodes)
    }
}

/// An endpoint's three conditions (KEP-1672), as the API defines them where they are nil.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Condition {
    pub ready: bool,
    pub serving: bool,
    pub terminating: bool,
}

impl Condition {
    pub const READY: Condition = Condition { ready: true, serving: true, terminating: false };

    /// Nil means ready, serving, and not terminating (discovery/v1, EndpointConditions).
    pub fn new(ready: Option<bool>, serving: Option<bool>, terminating: Option<bool>) -> Self {
        Condition {
            ready: ready.unwrap_or(true),
            serving: serving.unwrap_or(true),
            terminating: terminating.unwrap_or(false),
        }
    }
}

#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Node {
    pub name: Box<str>,
    /// Label topology.kubernetes.io/zone.
    pub zone: Option<Box<str>>,
    /// The first InternalIP of each family, else its first ExternalIP.
    pub primary: Vec<IpAddr>,
    /// spec.podCIDRs.
    pub pod_cidrs: Vec<IpNet>,
    /// Neither being deleted nor tainted by the cluster autoscaler for deletion: load balancers may send traffic here.
    pub eligible: bool,
}

/// A ServiceCIDR (KEP-1880).
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct ServiceCidr {
    pub name: Arc<str>,
    pub cidrs: Vec<IpNet>,
    /// What could not be understood of the object, one sentence each.
    pub faults: Vec<Box<str>>,
}
