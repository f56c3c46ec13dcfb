//! The Services that there are, and what the agent was told about the node.
use std::net::IpAddr;

use svc_dataplane::net;
use svc_dataplane::socket::Socket;
use svc_dataplane::tables::{Kind, POD_RANGES, SERVICE_RANGES, Service, Settings, Tables};

/// A backend: an address, a port, and the Service that it is one of.
pub(crate) type Backend = (IpAddr, u16, u32);

#[derive(Clone, PartialEq, Debug, Default)]
pub struct World {
    /// One for each frontend; those of one id have the same backends.
    pub services: Vec<Service>,
    pub settings: Settings,
    /// Of the node.
    pub sockets: Vec<Socket>,
}

/// What a destination is.
pub(crate) enum Destination<'a> {
    Frontend(&'a Service),
    /// A ClusterIP without such a port.
    UnknownPort,
    /// Set aside for ClusterIPs, and no Service's.
    Unallocated,
    Other,
}

fn is_in(ranges: &[(&str, u8)], address: IpAddr) -> bool {
    ranges.iter().any(|(base, length)| net::contains(&format!("{base}/{length}"), address))
}

pub(crate) fn is_pod(address: IpAddr) -> bool {
    is_in(&POD_RANGES, address)
}

pub(crate) fn is_nodes(address: IpAddr) -> bool {
    net::INTERFACES.iter().any(|interface| address_of(interface, address.is_ipv4()) == Some(address))
}

fn address_of(interface: &net::Interface, v4: bool) -> Option<IpAddr> {
    let addresses = interface.addresses.iter().filter_map(|text| text.split('/').next()?.parse::<IpAddr>().ok());
    addresses.into_iter().find(|address| address.is_ipv4() == v4)
}

/// What traffic takes as its source that leaves by this interface with an address of the node.
pub(crate) fn source(interface: u32, v4: bool) -> Option<IpAddr> {
    let of = |index: u32| address_of(net::interface(index), v4);
    of(interface).or_else(|| of(net::UPLINK))
}

impl World {
    pub(crate) fn destination(&self, address: IpAddr, port: u16, protocol: u8) -> Destination<'_> {
        let with_port = |service: &&Service| service.port == port && service.protocol == protocol;
        let mut here = self.services.iter().filter(|service| service.address == address);
        if let Some(service) = here.clone().find(with_port) {
            return Destination::Frontend(service);
        }
        if is_nodes(address) {
            let mut node_ports = self.services.iter().filter(|service| service.kind == Kind::NodePort);
            let same_family = |service: &&Service| service.address.is_ipv4() == address.is_ipv4();
            if let Some(service) = node_ports.find(|service| same_family(service) && with_port(service)) {
                return Destination::Frontend(service);
            }
        }
        let is_known = here.clone().next().is_some() || is_nodes(address);
        if here.any(|service| service.kind == Kind::ClusterIp) {
            Destination::UnknownPort
        } else if !is_known && is_in(&SERVICE_RANGES, address) {
            Destination::Unallocated
        } else {
            Destination::Other
        }
    }

    /// Whether anything is to be had at this address: pieces of datagrams to others are not kept.
    pub(crate) fn is_known(&self, address: IpAddr) -> bool {
        is_nodes(address)
            || self.services.iter().any(|service| service.address == address && service.kind != Kind::NodePort)
    }

    pub(crate) fn has_backend(&self, backend: Backend) -> bool {
        let (address, port, id) = backend;
        let mut services = self.services.iter().filter(|service| service.id == id);
        services.any(|service| service.backends.iter().any(|(to, at, _)| (*to, *at) == (address, port)))
    }

    pub fn tables(&self) -> Tables {
        let mut tables = Tables::with(&self.services);
        tables.set(&self.settings);
        tables
    }
}
