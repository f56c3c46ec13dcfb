//! One Service and its slices to what the kernel should have of them: a pure function.
use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::str::FromStr;
use std::sync::Arc;

use ipnet::IpNet;
use serde::{Serialize, Serializer};
use svc_common::Addr;
use svc_common::map::{
    FRONTEND_CLUSTER_IP, FRONTEND_EXTERNAL_IP, FRONTEND_EXTERNAL_LOCAL, FRONTEND_INTERNAL_LOCAL,
    FRONTEND_LOAD_BALANCER, FRONTEND_NODE_PORT, FRONTEND_SOURCE_RANGES, FrontendKey, MAX_NAME, SERVICE_V6, ServiceName,
};

use crate::notes::Reason;
use crate::object::{Family, Node, ObjectName, Policy, Protocol, Service, ServiceKind, ServicePort, Slice};
use crate::service_health::Check;
use crate::topology::{self, Candidate, Here};

/// What one service id stands for. The port's number is no part of it: a port that is renumbered keeps its id.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct PortName {
    pub service: ObjectName,
    /// Empty where it has none.
    pub port: Arc<str>,
    pub protocol: Protocol,
    pub family: Family,
}

impl fmt::Display for PortName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.service)?;
        if self.port.is_empty() { Ok(()) } else { write!(f, ":{}", self.port) }
    }
}

/// A name is longer than the [`MAX_NAME`] bytes that the kernel's map has for it.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
#[error("the name {0:?} is longer than {MAX_NAME} bytes")]
pub struct NameTooLong(Box<str>);

impl PortName {
    /// `port` is the Service port's number, host byte order.
    ///
    /// # Errors
    /// Where a name does not fit; the API server's limits do.
    pub fn to_map(&self, port: u16) -> Result<ServiceName, NameTooLong> {
        let field = |text: &str| {
            let mut bytes = [0; MAX_NAME];
            bytes.get_mut(..text.len()).ok_or_else(|| NameTooLong(text.into()))?.copy_from_slice(text.as_bytes());
            Ok(bytes)
        };
        Ok(ServiceName {
            namespace: field(&self.service.namespace)?,
            name: field(&self.service.name)?,
            port_name: field(&self.port)?,
            kind: self.protocol.number() | if self.family == Family::V6 { SERVICE_V6 } else { 0 },
            port,
        })
    }

    /// None where the entry is none that [`PortName::to_map`] makes.
    pub fn from_map(name: &ServiceName) -> Option<Self> {
        let field = |bytes: &[u8; MAX_NAME]| {
            let end = bytes.iter().position(|byte| *byte == 0).unwrap_or(bytes.len());
            str::from_utf8(&bytes[..end]).ok().map(Arc::<str>::from)
        };
        Some(PortName {
            service: ObjectName { namespace: field(&name.namespace)?, name: field(&name.name)? },
            port: field(&name.port_name)?,
            protocol: Protocol::from_number(name.protocol())?,
            family: if name.kind & SERVICE_V6 == 0 { Family::V4 } else { Family::V6 },
        })
    }
}

/// A place that traffic can be sent to.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct Target {
    pub addr: Addr,
    /// Network byte order.
    pub port: u16,
    /// On the agent's own node.
    pub local: bool,
}

#[derive(Clone, PartialEq, Debug)]
pub struct PortPlan {
    pub name: PortName,
    /// The Service port's own number, host byte order.
    pub port: u16,
    pub frontends: Vec<FrontendPlan>,
    /// What frontends with FRONTEND_SOURCE_RANGES admit; empty where there are none.
    pub source_ranges: BTreeSet<Range>,
    /// Ascending and without duplicates.
    pub cluster: Vec<Target>,
    /// Ascending and without duplicates; none where no frontend asks for local backends.
    pub local: Option<Vec<Target>>,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct FrontendPlan {
    pub key: FrontendKey,
    /// `FRONTEND_*`.
    pub flags: u32,
    pub affinity_seconds: u32,
}

/// An address and how many of its first bits count, as the kernel's maps have it: an IPv4 prefix counts the 96 bits before
/// it.
pub type Range = (Addr, u32);

/// A CIDR as the kernel's maps have it.
pub fn range(net: IpNet) -> Range {
    let len = u32::from(net.prefix_len());
    (net.network().into(), if net.addr().is_ipv4() { 96 + len } else { len })
}

/// One Service's share of the kernel's maps.
#[derive(Clone, PartialEq, Debug, Default)]
pub struct Plan {
    pub created: i64,
    pub ports: Vec<PortPlan>,
    pub cluster_ips: Vec<Addr>,
    pub health_check: Option<Check>,
    /// For each thing in the objects that does not count.
    pub warnings: Vec<Warning>,
}

/// What is wrong with a Service, in a sentence.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub struct Warning {
    /// None where it is for the log alone.
    pub reason: Option<Reason>,
    pub text: Box<str>,
}

impl From<String> for Warning {
    fn from(text: String) -> Self {
        Warning { reason: None, text: text.into() }
    }
}

/// Slices' order does not matter.
pub fn plan(service: &Service, slices: &[&Slice], here: Here<'_>) -> Plan {
    let mut plan = Plan { created: service.created, ..Plan::default() };
    if service.kind != ServiceKind::Proxied {
        return plan;
    }
    let of_log = |text: Box<str>| Warning { reason: None, text };
    plan.warnings.extend(service.faults.iter().cloned().map(of_log));
    for slice in slices {
        plan.warnings.extend(slice.faults.iter().map(|fault| format!("slice {}: {fault}", slice.name.name).into()));
        for endpoint in &slice.endpoints {
            if let Err(refusal) = usable(endpoint.address) {
                let (slice, address) = (&slice.name.name, endpoint.address);
                let text = format!("slice {slice}: endpoint {address} is {refusal}: not used").into();
                plan.warnings.push(Warning { reason: Some(Reason::EndpointRefused), text });
            }
        }
    }
    if service.cluster_ips.is_empty() {
        plan.warnings.push("it has no clusterIP: not served".to_owned().into());
        return plan;
    }
    let mut seen = BTreeSet::new();
    plan.cluster_ips = frontend_addresses("clusterIP", &service.cluster_ips, &mut plan.warnings);
    let external_ips = if here.external_ips { service.external_ips.as_slice() } else { &[] };
    let external_ips = frontend_addresses("externalIP", external_ips, &mut plan.warnings);
    let balancer_ips = frontend_addresses("load balancer address", &service.load_balancer_ips, &mut plan.warnings);

    for port in &service.ports {
        for family in Family::BOTH {
            let name = PortName {
                service: service.name.clone(),
                port: Arc::clone(&port.name),
                protocol: port.protocol,
                family,
            };
            let of_family = |addr: &&Addr| addr.is_v4() == (family == Family::V4);
            let vips: Vec<Addr> = balancer_ips.iter().filter(of_family).copied().collect();
            let source_ranges = source_ranges(&service.source_ranges, family, &vips, here);
            let mut frontends = Vec::new();
            let mut add = |addr: Addr, number: u16, flags: u32| {
                let key = FrontendKey::new(addr, number.to_be(), port.protocol.number());
                let flags = if !source_ranges.is_empty() && vips.contains(&addr) {
                    flags | FRONTEND_SOURCE_RANGES
                } else {
                    flags
                };
                frontends.push(FrontendPlan { key, flags, affinity_seconds: service.affinity_seconds });
            };
            // Whoever uses a ClusterIP is in the cluster, wherever the packet comes from.
            let cluster_ip = match service.internal_policy {
                Policy::Cluster => FRONTEND_CLUSTER_IP,
                Policy::Local => FRONTEND_CLUSTER_IP | FRONTEND_INTERNAL_LOCAL,
            };
            let external = match service.external_policy {
                Policy::Cluster => 0,
                Policy::Local => FRONTEND_EXTERNAL_LOCAL,
            };
            for addr in plan.cluster_ips.iter().filter(of_family) {
                add(*addr, port.port, cluster_ip);
            }
            if port.node_port != 0 && service.families.contains(&family) {
                let any = if family == Family::V4 { Addr::ANY_V4 } else { Addr::ANY_V6 };
                add(any, port.node_port, FRONTEND_NODE_PORT | external);
            }
            // An external address counts only where the Service has its family.
            let has_family = |addr: &&Addr| of_family(addr) && service.families.contains(&family);
            for addr in external_ips.iter().filter(has_family) {
                add(*addr, port.port, FRONTEND_EXTERNAL_IP | external);
            }
            for addr in balancer_ips.iter().filter(has_family) {
                add(*addr, port.port, FRONTEND_LOAD_BALANCER | external);
            }
            frontends.retain(|frontend| seen.insert(frontend.key));
            if frontends.is_empty() {
                continue;
            }
            if let Err(too_long) = name.to_map(port.port) {
                plan.warnings.push(too_long.to_string().into());
                continue;
            }
            if plan.ports.iter().any(|other| other.name == name) {
                plan.warnings.push(format!("two ports are called {:?}: only the first is served", port.name).into());
                continue;
            }
            let (cluster, local) = targets(port, family, slices, here);
            let wants_local = frontends
                .iter()
                .any(|frontend| frontend.flags & (FRONTEND_INTERNAL_LOCAL | FRONTEND_EXTERNAL_LOCAL) != 0);
            plan.ports.push(PortPlan {
                name,
                port: port.port,
                frontends,
                source_ranges,
                cluster,
                local: wants_local.then_some(local),
            });
        }
    }
    plan.health_check = health_check(service, slices, &plan, here);
    plan
}

/// Kube-proxy counts ready endpoints of this node by address, whatever their port, in each family for itself.
fn health_check(service: &Service, slices: &[&Slice], plan: &Plan, here: Here<'_>) -> Option<Check> {
    if service.health_check_port == 0 || here.node.is_empty() {
        return None;
    }
    let families = plan.cluster_ips.iter().map(|addr| if addr.is_v4() { Family::V4 } else { Family::V6 });
    let endpoints = slices.iter().filter(|slice| !slice.ports.is_empty()).flat_map(|slice| &slice.endpoints);
    let ready: BTreeSet<IpAddr> = endpoints
        .filter(|endpoint| endpoint.condition.ready && endpoint.node.as_deref() == Some(here.node))
        .map(|endpoint| endpoint.address)
        .filter(|address| usable(*address).is_ok())
        .collect();
    let count = |family: Family| ready.iter().filter(|address| Family::of(**address) == family).count();
    let endpoints: BTreeMap<Family, usize> = families.map(|family| (family, count(family))).collect();
    (!endpoints.is_empty() && !service.ports.is_empty()).then(|| Check {
        uid: service.uid.clone(),
        port: service.health_check_port,
        endpoints,
    })
}

/// The sources that may use a load balancer's addresses; empty means all. Kube-proxy's rules: ranges of the other family
/// do not count, one that holds everything admits everything, and one that holds the node's address admits what comes
/// from a load balancer's, since a node that has it as its own uses it as a source.
fn source_ranges(ranges: &[IpNet], family: Family, vips: &[Addr], here: Here<'_>) -> BTreeSet<Range> {
    let ranges: Vec<&IpNet> = ranges.iter().filter(|range| Family::of(range.addr()) == family).collect();
    if vips.is_empty() || ranges.iter().any(|range| range.prefix_len() == 0) {
        return BTreeSet::new();
    }
    let node = here.addresses.iter().copied().find(|address| Family::of(*address) == family).unwrap_or(match family {
        Family::V4 => Ipv4Addr::LOCALHOST.into(),
        Family::V6 => Ipv6Addr::LOCALHOST.into(),
    });
    let mut admitted: BTreeSet<Range> = ranges.iter().map(|net| range(**net)).collect();
    if ranges.iter().any(|net| net.contains(&node)) {
        admitted.extend(vips.iter().map(|vip| (*vip, 128)));
    }
    admitted
}

/// The targets of policy Cluster and those of policy Local.
fn targets<'a>(port: &ServicePort, family: Family, slices: &[&'a Slice], here: Here<'_>) -> (Vec<Target>, Vec<Target>) {
    let mut found: BTreeMap<(Addr, u16), Candidate<'a>> = BTreeMap::new();
    for slice in slices {
        let matching = slice.ports.iter().filter(|other| other.name == port.name && other.protocol == port.protocol);
        for number in matching.map(|other| other.port) {
            for endpoint in &slice.endpoints {
                if Family::of(endpoint.address) != family || usable(endpoint.address).is_err() {
                    continue;
                }
                let candidate = Candidate {
                    condition: endpoint.condition,
                    local: !here.node.is_empty() && endpoint.node.as_deref() == Some(here.node),
                    zone_hints: endpoint.zone_hints(),
                    node_hints: endpoint.node_hints(),
                };
                // An endpoint that moves from one slice to another stands in both for a while.
                let better = |old: &Candidate<'_>| rank(&candidate) > rank(old);
                let entry = found.entry((endpoint.address.into(), number.to_be())).or_insert(candidate);
                if better(entry) {
                    *entry = candidate;
                }
            }
        }
    }
    let candidates: Vec<_> = found.values().copied().collect();
    let keys: Vec<_> = found.into_keys().collect();
    let choice = topology::choose(&candidates, here);
    let target = |index: &usize| {
        let (addr, port) = keys[*index];
        Target { addr, port, local: candidates[*index].local }
    };
    (choice.cluster.iter().map(target).collect(), choice.local.iter().map(target).collect())
}

fn rank(candidate: &Candidate<'_>) -> (bool, bool, bool) {
    (candidate.local, candidate.condition.ready, candidate.condition.serving)
}

/// Why an endpoint's address cannot be sent to (the API server's own rules for endpoint addresses).
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
pub enum Unusable {
    #[error("a loopback address")]
    Loopback,
    #[error("a link-local address")]
    LinkLocal,
    #[error("the unspecified address")]
    Unspecified,
    #[error("a multicast or broadcast address")]
    Multicast,
    #[error("an IPv4 address in IPv6 clothes")]
    Mapped,
}

fn usable(addr: IpAddr) -> Result<(), Unusable> {
    let link_local = match addr {
        IpAddr::V4(v4) => v4.is_link_local(),
        IpAddr::V6(v6) => v6.is_unicast_link_local(),
    };
    if addr.is_loopback() {
        Err(Unusable::Loopback)
    } else if link_local {
        Err(Unusable::LinkLocal)
    } else if addr.is_unspecified() {
        Err(Unusable::Unspecified)
    } else if addr.is_multicast() || matches!(addr, IpAddr::V4(v4) if v4.is_broadcast()) {
        Err(Unusable::Multicast)
    } else if matches!(addr, IpAddr::V6(v6) if v6.to_ipv4_mapped().is_some()) {
        Err(Unusable::Mapped)
    } else {
        Ok(())
    }
}

/// A frontend's address may be link-local (a node-local resolver's is), but nothing that the kernel's tables give a
/// meaning of its own.
fn frontend_addresses(what: &str, addresses: &[IpAddr], warnings: &mut Vec<Warning>) -> Vec<Addr> {
    let mut good = Vec::new();
    for address in addresses {
        match usable(*address) {
            Ok(()) | Err(Unusable::LinkLocal) => {
                if !good.contains(&Addr::from(*address)) {
                    good.push(Addr::from(*address));
                }
            }
            Err(refusal) => warnings.push(format!("{what} {address} is {refusal}: not served").into()),
        }
    }
    good
}

/// `--nodeport-addresses`: on which of the node's addresses NodePorts answer.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub enum NodePortAddresses {
    #[default]
    All,
    /// The node's primary addresses, as its Node object lists them.
    Primary,
    In(Vec<IpNet>),
}

/// As kube-proxy's configuration has it: a list.
impl Serialize for NodePortAddresses {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match self {
            NodePortAddresses::All => serializer.collect_seq(std::iter::empty::<&str>()),
            NodePortAddresses::Primary => serializer.collect_seq(["primary"]),
            NodePortAddresses::In(nets) => serializer.collect_seq(nets.iter().map(ToString::to_string)),
        }
    }
}

impl FromStr for NodePortAddresses {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text.trim() {
            "" => Ok(NodePortAddresses::All),
            "primary" => Ok(NodePortAddresses::Primary),
            list => list
                .split(',')
                .map(|cidr| {
                    cidr.trim()
                        .parse::<IpNet>()
                        .map_err(|_| format!("{cidr:?} is neither a CIDR such as 192.168.0.0/16 nor `primary`"))
                })
                .collect::<Result<_, _>>()
                .map(NodePortAddresses::In),
        }
    }
}

/// The addresses on which NodePorts answer. Without a Node object `primary` means none.
pub fn node_addresses(local: &[IpAddr], node: Option<&Node>, filter: &NodePortAddresses) -> BTreeSet<Addr> {
    local
        .iter()
        .filter(|address| match filter {
            NodePortAddresses::All => true,
            NodePortAddresses::Primary => node.is_some_and(|node| node.primary.contains(address)),
            NodePortAddresses::In(nets) => nets.iter().any(|net| net.contains(*address)),
        })
        .map(|address| Addr::from(*address))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::object::{Condition, Endpoint, SlicePort};
    use rstest::rstest;
    use svc_common::map::FRONTEND_KIND;

    fn ip(text: &str) -> IpAddr {
        text.parse().unwrap()
    }

    fn service() -> Service {
        Service {
            name: ObjectName::new("default", "web"),
            uid: "u1".into(),
            created: 0,
            kind: ServiceKind::Proxied,
            families: vec![Family::V4, Family::V6],
            cluster_ips: vec![ip("10.96.0.10"), ip("fd00:96::10")],
            external_ips: vec![],
            load_balancer_ips: vec![],
            source_ranges: vec![],
            ports: vec![ServicePort { name: "http".into(), port: 80, protocol: Protocol::Tcp, node_port: 0 }],
            internal_policy: Policy::Cluster,
            external_policy: Policy::Cluster,
            affinity_seconds: 0,
            health_check_port: 0,
            faults: vec![],
        }
    }

    fn endpoint(address: &str, node: &str) -> Endpoint {
        Endpoint { address: ip(address), node: Some(node.into()), condition: Condition::READY, hints: None }
    }

    fn slice(name: &str, port: &str, protocol: Protocol, endpoints: Vec<Endpoint>) -> Slice {
        Slice {
            name: ObjectName::new("default", name),
            triggered: None,
            service: "web".into(),
            ports: vec![SlicePort { name: port.into(), port: 8080, protocol }],
            endpoints,
            faults: vec![],
        }
    }

    const HERE: Here<'_> = Here { node: "a", zone: None, addresses: &[], external_ips: true };

    fn addresses(targets: &[Target]) -> Vec<String> {
        targets.iter().map(|target| target.addr.to_string()).collect()
    }

    fn frontends(plan: &Plan) -> Vec<String> {
        let all = plan.ports.iter().flat_map(|port| &port.frontends);
        all.map(|frontend| crate::dataplane::dump::key_text(&frontend.key)).collect()
    }

    #[test]
    fn a_frontend_has_backends_of_its_own_family_only() {
        let v4 = slice("v4", "http", Protocol::Tcp, vec![endpoint("10.1.0.1", "b")]);
        let v6 = slice("v6", "http", Protocol::Tcp, vec![endpoint("fd00::1", "b")]);
        let plan = plan(&service(), &[&v4, &v6], HERE);
        let found: Vec<_> = plan.ports.iter().map(|port| (port.name.family, addresses(&port.cluster))).collect();
        assert_eq!(found, [(Family::V4, vec!["10.1.0.1".to_owned()]), (Family::V6, vec!["fd00::1".to_owned()])]);
    }

    #[rstest]
    #[case::name("other", Protocol::Tcp)]
    #[case::protocol("http", Protocol::Udp)]
    fn a_slice_port_counts_by_name_and_protocol(#[case] name: &str, #[case] protocol: Protocol) {
        let other = slice("s", name, protocol, vec![endpoint("10.1.0.1", "b")]);
        let plan = plan(&service(), &[&other], HERE);
        assert!(plan.ports.iter().all(|port| port.cluster.is_empty()));
        assert_eq!(frontends(&plan), ["10.96.0.10:80/TCP", "[fd00:96::10]:80/TCP"]);
    }

    #[test]
    fn an_endpoint_in_two_slices_counts_once_and_as_local_where_either_says_so() {
        let one = slice("one", "http", Protocol::Tcp, vec![endpoint("10.1.0.1", "b")]);
        let two = slice("two", "http", Protocol::Tcp, vec![endpoint("10.1.0.1", "a")]);
        for slices in [[&one, &two], [&two, &one]] {
            let plan = plan(&service(), &slices, HERE);
            assert_eq!(plan.ports[0].cluster.len(), 1);
            assert!(plan.ports[0].cluster[0].local);
        }
    }

    #[rstest]
    #[case::headless(ServiceKind::Headless)]
    #[case::external_name(ServiceKind::ExternalName)]
    fn what_dns_serves_is_not_planned(#[case] kind: ServiceKind) {
        assert_eq!(plan(&Service { kind, ..service() }, &[], HERE), Plan::default());
    }

    #[rstest]
    #[case::loopback("127.0.0.1")]
    #[case::loopback_v6("::1")]
    #[case::link_local("169.254.1.1")]
    #[case::link_local_v6("fe80::1")]
    #[case::unspecified("0.0.0.0")]
    #[case::multicast("224.0.0.5")]
    #[case::multicast_v6("ff02::1")]
    #[case::broadcast("255.255.255.255")]
    #[case::mapped("::ffff:10.0.0.1")]
    fn an_endpoint_that_cannot_be_sent_to_is_refused_and_its_slice_named(#[case] address: &str) {
        let bad = slice("web-x7", "http", Protocol::Tcp, vec![endpoint(address, "a"), endpoint("10.1.0.1", "a")]);
        let plan = plan(&service(), &[&bad], HERE);
        assert_eq!(addresses(&plan.ports[0].cluster), ["10.1.0.1"]);
        assert_eq!(plan.ports[1].cluster, []);
        assert_eq!(plan.warnings.len(), 1);
        assert!(plan.warnings[0].text.contains("slice web-x7") && plan.warnings[0].text.contains("not used"));
        assert_eq!(plan.warnings[0].reason, Some(Reason::EndpointRefused));
    }

    #[test]
    fn every_kind_of_frontend_is_planned_with_its_policy() {
        let mut service = service();
        service.ports[0].node_port = 30_080;
        service.external_ips = vec![ip("192.0.2.1")];
        service.load_balancer_ips = vec![ip("192.0.2.2"), ip("2001:db8::2")];
        service.external_policy = Policy::Local;
        let plan = plan(&service, &[], HERE);
        let found: Vec<_> = plan
            .ports
            .iter()
            .flat_map(|port| &port.frontends)
            .map(|frontend| (crate::dataplane::dump::key_text(&frontend.key), frontend.flags))
            .collect();
        let local = FRONTEND_EXTERNAL_LOCAL;
        let expected = [
            ("10.96.0.10:80/TCP", FRONTEND_CLUSTER_IP),
            ("0.0.0.0:30080/TCP", FRONTEND_NODE_PORT | local),
            ("192.0.2.1:80/TCP", FRONTEND_EXTERNAL_IP | local),
            ("192.0.2.2:80/TCP", FRONTEND_LOAD_BALANCER | local),
            ("[fd00:96::10]:80/TCP", FRONTEND_CLUSTER_IP),
            ("[::]:30080/TCP", FRONTEND_NODE_PORT | local),
            ("[2001:db8::2]:80/TCP", FRONTEND_LOAD_BALANCER | local),
        ];
        assert_eq!(found, expected.map(|(text, flags)| (text.to_owned(), flags)));
    }

    #[test]
    fn external_ips_are_no_frontends_where_they_are_not_to_count_and_a_balancers_addresses_are() {
        let mut service = service();
        service.external_ips = vec![ip("192.0.2.1"), ip("192.0.2.2")];
        service.load_balancer_ips = vec![ip("192.0.2.2")];
        let plan = plan(&service, &[], Here { external_ips: false, ..HERE });
        assert_eq!(frontends(&plan), ["10.96.0.10:80/TCP", "192.0.2.2:80/TCP", "[fd00:96::10]:80/TCP"]);
    }

    #[rstest]
    #[case::cluster(Policy::Cluster, Policy::Cluster, None)]
    #[case::internal(Policy::Local, Policy::Cluster, Some(1))]
    #[case::external_without_external_frontends(Policy::Cluster, Policy::Local, None)]
    fn local_backends_are_planned_where_a_frontend_asks_for_them(
        #[case] internal_policy: Policy,
        #[case] external_policy: Policy,
        #[case] local: Option<usize>,
    ) {
        let here_and_there =
            slice("s", "http", Protocol::Tcp, vec![endpoint("10.1.0.1", "a"), endpoint("10.1.0.2", "b")]);
        let plan = plan(&Service { internal_policy, external_policy, ..service() }, &[&here_and_there], HERE);
        assert_eq!(plan.ports[0].cluster.len(), 2);
        assert_eq!(plan.ports[0].local.as_ref().map(Vec::len), local);
    }

    #[test]
    fn a_single_stack_service_has_its_node_port_in_that_family_alone() {
        let mut service = service();
        service.families = vec![Family::V6];
        service.cluster_ips = vec![ip("fd00:96::10")];
        service.ports[0].node_port = 30_080;
        assert_eq!(frontends(&plan(&service, &[], HERE)), ["[fd00:96::10]:80/TCP", "[::]:30080/TCP"]);
    }

    #[test]
    fn a_name_that_the_kernel_cannot_hold_costs_only_its_own_service() {
        let mut service = service();
        service.name.name = "x".repeat(64).into();
        let plan = plan(&service, &[], HERE);
        assert!(plan.ports.is_empty());
        assert!(plan.warnings[0].text.contains("longer than 63 bytes"));
    }

    #[test]
    fn a_port_name_survives_the_map() {
        for family in Family::BOTH {
            let name = PortName {
                service: ObjectName::new("default", &"x".repeat(MAX_NAME)),
                port: "".into(),
                protocol: Protocol::Sctp,
                family,
            };
            assert_eq!(PortName::from_map(&name.to_map(1).unwrap()), Some(name));
        }
    }

    #[rstest]
    #[case::all("", &["10.0.0.1", "192.168.0.1", "fd00::1"])]
    #[case::primary("primary", &["192.168.0.1", "fd00::1"])]
    #[case::nets("10.0.0.0/8,fd00::/8", &["10.0.0.1", "fd00::1"])]
    #[case::none("172.16.0.0/12", &[])]
    fn node_ports_answer_where_the_flag_says(#[case] flag: &str, #[case] expected: &[&str]) {
        let node = Node { primary: vec![ip("192.168.0.1"), ip("fd00::1")], ..Node::default() };
        let local = [ip("10.0.0.1"), ip("192.168.0.1"), ip("fd00::1")];
        let found = node_addresses(&local, Some(&node), &flag.parse().unwrap());
        assert_eq!(found, expected.iter().map(|text| Addr::from(ip(text))).collect());
    }

    /// The ranges that one of a Service's load balancer frontends admits, and whether all its frontends agree.
    fn admitted(plan: &Plan, family: Family) -> Vec<String> {
        let port = plan.ports.iter().find(|port| port.name.family == family).unwrap();
        for frontend in &port.frontends {
            let is_balancer = frontend.flags & FRONTEND_KIND == FRONTEND_LOAD_BALANCER;
            let restricted = frontend.flags & FRONTEND_SOURCE_RANGES != 0;
            assert_eq!(restricted, is_balancer && !port.source_ranges.is_empty(), "{frontend:?}");
        }
        let ranges = port.source_ranges.iter().map(|(addr, len)| crate::dataplane::dump::range_text(*addr, *len));
        let sorted: BTreeSet<String> = ranges.collect();
        sorted.into_iter().collect()
    }

    #[rstest]
    #[case::none(&[], &[], &[])]
    #[case::each_family_its_own(&["192.0.2.0/24", "2001:db8::/32"], &["192.0.2.0/24"], &["2001:db8::/32"])]
    #[case::no_range_of_a_family_admits_all_of_it(&["192.0.2.0/24"], &["192.0.2.0/24"], &[])]
    #[case::everything_admits_all(&["192.0.2.0/24", "0.0.0.0/0", "2001:db8::/32"], &[], &["2001:db8::/32"])]
    #[case::with_the_node_the_balancer(
        &["172.16.0.0/12", "fd00:31::/64"], &["172.16.0.0/12", "198.51.100.2/32"], &["2001:db8::2/128", "fd00:31::/64"]
    )]
    fn source_ranges_hold_for_the_balancers_addresses_alone(
        #[case] ranges: &[&str],
        #[case] v4: &[&str],
        #[case] v6: &[&str],
    ) {
        let mut service = service();
        service.ports[0].node_port = 30_080;
        service.external_ips = vec![ip("198.51.100.1"), ip("2001:db8::1")];
        service.load_balancer_ips = vec![ip("198.51.100.2"), ip("2001:db8::2")];
        service.source_ranges = ranges.iter().map(|text| text.parse().unwrap()).collect();
        let node = [ip("172.31.0.11"), ip("fd00:31::11")];
        let plan = plan(&service, &[], Here { addresses: &node, ..HERE });
        assert_eq!((admitted(&plan, Family::V4), admitted(&plan, Family::V6)), (texts(v4), texts(v6)));
    }

    fn texts(list: &[&str]) -> Vec<String> {
        list.iter().map(|text| (*text).to_owned()).collect()
    }

    #[test]
    fn a_node_without_addresses_counts_as_its_loopback_address() {
        let mut service = service();
        service.load_balancer_ips = vec![ip("198.51.100.2")];
        service.source_ranges = vec!["127.0.0.0/8".parse().unwrap()];
        assert_eq!(admitted(&plan(&service, &[], HERE), Family::V4), ["127.0.0.0/8", "198.51.100.2/32"]);
    }

    #[test]
    fn an_external_address_that_is_the_balancers_too_is_restricted() {
        let mut service = service();
        service.external_ips = vec![ip("198.51.100.2")];
        service.load_balancer_ips = vec![ip("198.51.100.2")];
        service.source_ranges = vec!["192.0.2.0/24".parse().unwrap()];
        let plan = plan(&service, &[], HERE);
        let external = plan.ports[0].frontends.last().unwrap();
        assert_eq!(external.flags, FRONTEND_EXTERNAL_IP | FRONTEND_SOURCE_RANGES);
    }

    #[rstest]
    #[case::by_address_whatever_the_port(&[("10.1.0.1", "a", true), ("10.1.0.1", "a", true), ("10.1.0.2", "a", true)], [2, 0])]
    #[case::each_family_its_own(&[("10.1.0.1", "a", true), ("fd00::1", "a", true), ("fd00::2", "a", true)], [1, 2])]
    #[case::of_this_node(&[("10.1.0.1", "b", true), ("fd00::1", "a", true)], [0, 1])]
    #[case::ready_ones(&[("10.1.0.1", "a", false)], [0, 0])]
    #[case::usable_ones(&[("127.0.0.1", "a", true)], [0, 0])]
    fn a_health_check_counts_local_ready_endpoints(
        #[case] endpoints: &[(&str, &str, bool)],
        #[case] expected: [usize; 2],
    ) {
        let service = Service { health_check_port: 32_000, ..service() };
        let slices: Vec<_> = endpoints
            .iter()
            .enumerate()
            .map(|(index, (address, node, ready))| {
                // Terminating ones serve, but a balancer should go elsewhere.
                let condition = Condition { ready: *ready, serving: true, terminating: !ready };
                let endpoint = Endpoint { condition, ..endpoint(address, node) };
                slice("s", if index == 0 { "http" } else { "other" }, Protocol::Tcp, vec![endpoint])
            })
            .collect();
        let check = plan(&service, &slices.iter().collect::<Vec<_>>(), HERE).health_check.unwrap();
        assert_eq!((check.port, check.endpoints.into_values().collect()), (32_000, expected.to_vec()));
    }
}
