//! One Service and its slices to what the kernel should have of them: a pure function.
use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::net::IpAddr;
use std::str::FromStr;

use ipnet::IpNet;
use svc_common::Addr;
use svc_common::map::{
    FRONTEND_CLUSTER_IP, FRONTEND_EXTERNAL_IP, FRONTEND_EXTERNAL_LOCAL, FRONTEND_INTERNAL_LOCAL,
    FRONTEND_LOAD_BALANCER, FRONTEND_NODE_PORT, FrontendKey, ServiceName,
};

use crate::object::{Family, Node, ObjectName, Policy, Protocol, Service, ServiceKind, ServicePort, Slice};
use crate::topology::{self, Candidate, Here};

/// What one service id stands for. The port's number is no part of it: a port that is renumbered keeps its id.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct PortName {
    pub service: ObjectName,
    /// Empty where it has none.
    pub port: Box<str>,
    pub protocol: Protocol,
    pub family: Family,
}

impl fmt::Display for PortName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.service)?;
        if self.port.is_empty() { Ok(()) } else { write!(f, ":{}", self.port) }
    }
}

/// A name is longer than the 64 bytes that the kernel's map has for it.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
#[error("the name {0:?} is longer than 64 bytes")]
pub struct NameTooLong(Box<str>);

impl PortName {
    /// `port` is the Service port's number, host byte order.
    ///
    /// # Errors
    /// Where a name does not fit; the API server's limits do.
    pub fn to_map(&self, port: u16) -> Result<ServiceName, NameTooLong> {
        let field = |text: &str| {
            let mut bytes = [0; 64];
            bytes.get_mut(..text.len()).ok_or_else(|| NameTooLong(text.into()))?.copy_from_slice(text.as_bytes());
            Ok(bytes)
        };
        Ok(ServiceName {
            namespace: field(&self.service.namespace)?,
            name: field(&self.service.name)?,
            port_name: field(&self.port)?,
            port,
            protocol: self.protocol.number(),
            family: self.family as u8,
        })
    }

    /// None where the entry is none that [`PortName::to_map`] makes.
    pub fn from_map(name: &ServiceName) -> Option<Self> {
        let field = |bytes: &[u8; 64]| {
            let end = bytes.iter().position(|byte| *byte == 0).unwrap_or(bytes.len());
            str::from_utf8(&bytes[..end]).ok().map(Box::<str>::from)
        };
        Some(PortName {
            service: ObjectName { namespace: field(&name.namespace)?, name: field(&name.name)? },
            port: field(&name.port_name)?,
            protocol: Protocol::from_number(name.protocol)?,
            family: match name.family {
                4 => Family::V4,
                6 => Family::V6,
                _ => return None,
            },
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

/// One Service's share of the kernel's maps.
#[derive(Clone, PartialEq, Debug, Default)]
pub struct Plan {
    pub created: i64,
    pub ports: Vec<PortPlan>,
    pub cluster_ips: Vec<Addr>,
    /// A sentence for each thing in the objects that does not count.
    pub warnings: Vec<Box<str>>,
}

/// Slices' order does not matter.
pub fn plan<'a>(service: &Service, slices: impl Iterator<Item = &'a Slice> + Clone, here: Here<'_>) -> Plan {
    let mut plan = Plan { created: service.created, ..Plan::default() };
    if service.kind != ServiceKind::Proxied {
        return plan;
    }
    plan.warnings.extend(service.faults.iter().cloned());
    for slice in slices.clone() {
        plan.warnings.extend(slice.faults.iter().map(|fault| format!("slice {}: {fault}", slice.name.name).into()));
        for endpoint in &slice.endpoints {
            if let Err(refusal) = usable(endpoint.address) {
                plan.warnings.push(
                    format!("slice {}: endpoint {} is {refusal}: not used", slice.name.name, endpoint.address).into(),
                );
            }
        }
    }
    if service.cluster_ips.is_empty() {
        plan.warnings.push("it has no clusterIP: not served".into());
        return plan;
    }
    let mut seen = BTreeSet::new();
    plan.cluster_ips = frontend_addresses("clusterIP", &service.cluster_ips, &mut plan.warnings);
    let external_ips = frontend_addresses("externalIP", &service.external_ips, &mut plan.warnings);
    let balancer_ips = frontend_addresses("load balancer address", &service.load_balancer_ips, &mut plan.warnings);

    for port in &service.ports {
        for family in Family::BOTH {
            let name =
                PortName { service: service.name.clone(), port: port.name.clone(), protocol: port.protocol, family };
            let of_family = |addr: &&Addr| addr.is_v4() == (family == Family::V4);
            let mut frontends = Vec::new();
            let mut add = |addr: Addr, number: u16, flags: u32| {
                let key = FrontendKey::new(addr, number.to_be(), port.protocol.number());
                frontends.push(FrontendPlan { key, flags, affinity_seconds: service.affinity_seconds });
            };
            // Whoever uses a ClusterIP is in the cluster, wherever the packet comes from.
            let cluster_ip = match service.internal_policy {
                Policy::Cluster => FRONTEND_CLUSTER_IP,
                Policy::Local => FRONTEND_CLUSTER_IP | FRONTEND_INTERNAL_LOCAL | FRONTEND_EXTERNAL_LOCAL,
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
            for addr in external_ips.iter().filter(of_family) {
                add(*addr, port.port, FRONTEND_EXTERNAL_IP | external);
            }
            for addr in balancer_ips.iter().filter(of_family) {
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
            let (cluster, local) = targets(port, family, slices.clone(), here);
            let wants_local = frontends
                .iter()
                .any(|frontend| frontend.flags & (FRONTEND_INTERNAL_LOCAL | FRONTEND_EXTERNAL_LOCAL) != 0);
            plan.ports.push(PortPlan {
                name,
                port: port.port,
                frontends,
                cluster,
                local: wants_local.then_some(local),
            });
        }
    }
    plan
}

/// The targets of policy Cluster and those of policy Local.
fn targets<'a>(
    port: &ServicePort,
    family: Family,
    slices: impl Iterator<Item = &'a Slice>,
    here: Here<'_>,
) -> (Vec<Target>, Vec<Target>) {
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
                    zone_hints: &endpoint.zone_hints,
                    node_hints: &endpoint.node_hints,
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
fn frontend_addresses(what: &str, addresses: &[IpAddr], warnings: &mut Vec<Box<str>>) -> Vec<Addr> {
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
