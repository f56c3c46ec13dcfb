//! What the agent would have written, as plain data.
use std::collections::BTreeMap;
use std::net::IpAddr;

use svc_common::Addr;
use svc_common::flow::IdleLimits;
use svc_common::map::{
    ADDRESS_CLUSTER_IP, ADDRESS_EXTERNAL, ADDRESS_LOCAL, ADDRESS_NODE, AddressFlags, BACKEND_LOCAL, Backend,
    BackendSlot, CIDR_PODS, CIDR_SERVICES, CONFIG_DETECT_PODS_V4, CONFIG_DETECT_PODS_V6, CONFIG_MASQUERADE_ALL,
    CidrFlags, CidrKey, Config, FRONTEND_CLUSTER_IP, FRONTEND_EXTERNAL_IP, FRONTEND_EXTERNAL_LOCAL,
    FRONTEND_INTERNAL_LOCAL, FRONTEND_KIND, FRONTEND_LOAD_BALANCER, FRONTEND_NODE_PORT, FRONTEND_SOURCE_RANGES,
    Frontend, FrontendKey, SourceRangeKey, Uplink, cluster_set, local_set,
};

use crate::net::{INTERFACES, UPLINK};

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Kind {
    ClusterIp,
    NodePort,
    ExternalIp,
    LoadBalancer,
}

impl Kind {
    pub const ALL: [Kind; 4] = [Kind::ClusterIp, Kind::NodePort, Kind::ExternalIp, Kind::LoadBalancer];
}

/// One port of a Service, at one address. Ports in host byte order.
#[derive(Clone, PartialEq, Debug)]
pub struct Service {
    /// Of the service port, from 1 on; frontends that share it share its backends.
    pub id: u32,
    pub kind: Kind,
    /// What clients send to; of a NodePort the unspecified address of its family.
    pub address: IpAddr,
    pub port: u16,
    pub protocol: u8,
    pub backends: Vec<(IpAddr, u16, bool)>,
    /// Traffic policies.
    pub internal_local: bool,
    pub external_local: bool,
    /// Address and length in bits, as its family counts; `None`: everybody is admitted.
    pub source_ranges: Option<Vec<(IpAddr, u8)>>,
    /// Of ClientIP affinity; 0: none.
    pub affinity_seconds: u32,
}

impl Service {
    /// `backends`: addresses, and whether they are on this node; all on port 9376.
    pub fn new(id: u32, kind: Kind, address: IpAddr, port: u16, protocol: u8, backends: &[(IpAddr, bool)]) -> Self {
        Service {
            id,
            kind,
            address,
            port,
            protocol,
            backends: backends.iter().map(|(address, local)| (*address, 9376, *local)).collect(),
            internal_local: false,
            external_local: false,
            source_ranges: None,
            affinity_seconds: 0,
        }
    }
}

/// What the agent was told about the node.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Settings {
    /// kube-proxy's masqueradeAll.
    pub masquerade_all: bool,
    /// Whether detectLocalMode tells pods by [`POD_RANGES`], for each family.
    pub detect_pods_v4: bool,
    pub detect_pods_v6: bool,
    /// Source ports for flows, first and last, host byte order.
    pub source_ports: (u16, u16),
    /// The flow table's size, a power of two; four cells each.
    pub flow_sets: u32,
}

impl Default for Settings {
    fn default() -> Self {
        Settings {
            masquerade_all: false,
            detect_pods_v4: false,
            detect_pods_v6: false,
            source_ports: (1024, 29_999),
            flow_sets: 256,
        }
    }
}

#[derive(Clone, PartialEq, Debug)]
pub struct Tables {
    pub frontends: BTreeMap<FrontendKey, Frontend>,
    pub sets: BTreeMap<u32, Vec<BackendSlot>>,
    pub backends: BTreeMap<u32, Backend>,
    pub addresses: BTreeMap<Addr, AddressFlags>,
    pub source_ranges: Vec<SourceRangeKey>,
    pub cidrs: BTreeMap<CidrKey, CidrFlags>,
    pub uplinks: BTreeMap<u32, Uplink>,
    pub config: Config,
}

/// ServiceCIDRs, and the pods of this cluster.
pub const SERVICE_RANGES: [(&str, u8); 2] = [("10.96.0.0", 16), ("fd00:96::", 64)];
pub const POD_RANGES: [(&str, u8); 2] = [("10.244.0.0", 16), ("fd00:244::", 32)];

impl Default for Tables {
    /// Of a node without Services.
    fn default() -> Self {
        let mut tables = Tables {
            frontends: BTreeMap::new(),
            sets: BTreeMap::new(),
            backends: BTreeMap::new(),
            addresses: BTreeMap::new(),
            source_ranges: Vec::new(),
            cidrs: BTreeMap::new(),
            uplinks: BTreeMap::new(),
            config: Config {
                host_netns: 1,
                flow_seed: 0x1234_5678_9abc_def1,
                flow_sets: 0,
                snat_first: 0,
                snat_last: 0,
                flags: 0,
                uplink: UPLINK,
                uplink_mac: link_words(INTERFACES[0].mac),
                pad: 0,
                idle_limits: IdleLimits::default(),
            },
        };
        for interface in &INTERFACES {
            let mut uplink = Uplink { v4: Addr::ANY_V4, v6: Addr::ANY_V6 };
            for text in interface.addresses {
                let address: IpAddr = text.split('/').next().and_then(|text| text.parse().ok()).expect("an address");
                match address {
                    IpAddr::V4(_) => uplink.v4 = address.into(),
                    IpAddr::V6(_) => uplink.v6 = address.into(),
                }
                tables.addresses.insert(address.into(), ADDRESS_NODE | ADDRESS_LOCAL);
            }
            if !interface.addresses.is_empty() {
                tables.uplinks.insert(interface.index, uplink);
            }
        }
        let node = tables.uplinks[&UPLINK];
        tables.uplinks.insert(0, node);
        for (ranges, flags) in [(SERVICE_RANGES, CIDR_SERVICES), (POD_RANGES, CIDR_PODS)] {
            for (text, length) in ranges {
                let address: IpAddr = text.parse().expect("an address");
                tables.cidrs.insert(cidr_key(address, length), flags);
            }
        }
        tables.set(&Settings::default());
        tables
    }
}

fn link_words(mac: [u8; 6]) -> [u16; 3] {
    [0, 2, 4].map(|at| u16::from_ne_bytes([mac[at], mac[at + 1]]))
}

/// `length` as the address's family counts.
pub fn cidr_key(address: IpAddr, length: u8) -> CidrKey {
    CidrKey { prefix_len: mapped(address, length), addr: address.into() }
}

fn mapped(address: IpAddr, length: u8) -> u32 {
    u32::from(length) + if address.is_ipv4() { 96 } else { 0 }
}

impl Tables {
    pub fn with(services: &[Service]) -> Self {
        let mut tables = Tables::default();
        for service in services {
            tables.put(service);
        }
        tables
    }

    pub fn set(&mut self, settings: &Settings) {
        let Settings { masquerade_all, detect_pods_v4, detect_pods_v6, source_ports, flow_sets } = *settings;
        self.config.flow_sets = flow_sets;
        (self.config.snat_first, self.config.snat_last) = source_ports;
        self.config.flags = [
            (masquerade_all, CONFIG_MASQUERADE_ALL),
            (detect_pods_v4, CONFIG_DETECT_PODS_V4),
            (detect_pods_v6, CONFIG_DETECT_PODS_V6),
        ]
        .iter()
        .filter(|(is_set, _)| *is_set)
        .fold(0, |flags, (_, flag)| flags | flag);
    }

    /// Adds the service, or replaces the one with the same frontend.
    pub fn put(&mut self, service: &Service) {
        let address = Addr::from(service.address);
        let (kind, flags) = match service.kind {
            Kind::ClusterIp => (FRONTEND_CLUSTER_IP, ADDRESS_CLUSTER_IP),
            Kind::NodePort => (FRONTEND_NODE_PORT, 0),
            Kind::ExternalIp => (FRONTEND_EXTERNAL_IP, ADDRESS_EXTERNAL),
            Kind::LoadBalancer => (FRONTEND_LOAD_BALANCER, ADDRESS_EXTERNAL),
        };
        if flags != 0 {
            *self.addresses.entry(address).or_default() |= flags;
        }
        let mut flags = kind;
        if service.internal_local {
            flags |= FRONTEND_INTERNAL_LOCAL;
        }
        if service.external_local {
            flags |= FRONTEND_EXTERNAL_LOCAL;
        }
        if let Some(ranges) = &service.source_ranges {
            // Other frontends of the service may have no ranges, or the same.
            self.source_ranges.retain(|range| range.service != service.id);
            flags |= FRONTEND_SOURCE_RANGES;
            for (range, length) in ranges {
                self.source_ranges.push(SourceRangeKey::new(service.id, (*range).into(), mapped(*range, *length)));
            }
        }
        let frontend = Frontend { service: service.id, flags, affinity_seconds: service.affinity_seconds };
        self.frontends.insert(FrontendKey::new(address, service.port.to_be(), service.protocol), frontend);
        self.put_backends(service);
    }

    /// Takes a service away that was put.
    pub fn remove(&mut self, service: &Service) {
        let address = Addr::from(service.address);
        self.frontends.remove(&FrontendKey::new(address, service.port.to_be(), service.protocol));
        let is_external = |frontend: &Frontend| frontend.flags & FRONTEND_KIND != FRONTEND_CLUSTER_IP;
        let here = self.frontends.iter().filter(|(key, _)| key.addr == address);
        let kinds: Vec<_> = here.map(|(_, frontend)| is_external(frontend)).collect();
        if let Some(flags) = self.addresses.get_mut(&address) {
            for (flag, external) in [(ADDRESS_EXTERNAL, true), (ADDRESS_CLUSTER_IP, false)] {
                if !kinds.contains(&external) {
                    *flags &= !flag;
                }
            }
            if *flags == 0 {
                self.addresses.remove(&address);
            }
        }
        if self.frontends.values().all(|frontend| frontend.service != service.id) {
            self.source_ranges.retain(|range| range.service != service.id);
            self.put_backends(&Service { backends: Vec::new(), ..service.clone() });
        }
    }

    /// An id names one address, port and protocol of one service as long as it lives; what the sets no longer hold is not
    /// live any more.
    fn put_backends(&mut self, service: &Service) {
        for backend in self.backends.values_mut().filter(|backend| backend.service == service.id) {
            backend.live = 0;
        }
        let mut slots: Vec<_> = service
            .backends
            .iter()
            .map(|(address, port, local)| {
                let wanted = Backend {
                    addr: (*address).into(),
                    port: port.to_be(),
                    protocol: service.protocol,
                    live: 0,
                    service: service.id,
                };
                let known = self.backends.iter().find(|(_, backend)| **backend == wanted).map(|(id, _)| *id);
                let id = known.unwrap_or(self.backends.len() as u32 + 1);
                self.backends.insert(id, wanted);
                let flags = if *local { BACKEND_LOCAL } else { 0 };
                BackendSlot { addr: wanted.addr, port: wanted.port, flags, id }
            })
            .collect();
        slots.sort_by_key(|slot| slot.id);
        for slot in &slots {
            self.backends.entry(slot.id).and_modify(|backend| backend.live = 1);
        }
        let local = slots.iter().copied().filter(|slot| slot.flags & BACKEND_LOCAL != 0).collect();
        self.sets.insert(cluster_set(service.id), slots);
        self.sets.insert(local_set(service.id), local);
    }
}
