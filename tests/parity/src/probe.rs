//! One row of the comparison: who asks, over what, which of a Service's addresses.
use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use svc_lab::probe::Question;
use svc_lab::topology::{NODES, OUTSIDE};

use crate::objects::{SERVICE_PORT, cluster_ips, external_ips, load_balancer_ips, node_port};

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Over {
    Tcp4,
    Tcp6,
    Udp4,
    Udp6,
}

pub const ALL: &[Over] = &[Over::Tcp4, Over::Tcp6, Over::Udp4, Over::Udp6];
/// Enough where neither family nor protocol is what a row is about.
pub const MIXED: &[Over] = &[Over::Tcp4, Over::Udp6];

impl Over {
    fn family(self) -> usize {
        usize::from(matches!(self, Over::Tcp6 | Over::Udp6))
    }

    fn is_tcp(self) -> bool {
        matches!(self, Over::Tcp4 | Over::Tcp6)
    }
}

/// An address of a Service.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum To {
    ClusterIp,
    /// A port that the Service does not have.
    UnknownPort,
    /// Of the node of this name.
    NodePort(&'static str),
    /// At the asking node's loopback address.
    Localhost,
    /// At the node's address towards its pods.
    Gateway(&'static str),
    /// Behind the node of this name.
    LoadBalancer(&'static str),
    ExternalIp,
}

#[derive(Clone, Debug)]
pub struct Probe {
    pub from: &'static str,
    pub over: Over,
    pub to: To,
    /// Of the Service that is asked.
    pub number: u8,
    /// One of the backends answers always, no matter which: affinity, or one flow.
    pub sticky: bool,
    /// The Service is the scenario's second one.
    pub second: bool,
    pub source_port: Option<u16>,
    /// Which of two Services kube-proxy sends it to is a matter of chance.
    pub by_chance: bool,
}

/// Everyone asks everything.
pub fn probes(number: u8, from: &[&'static str], over: &[Over], to: &[To]) -> Vec<Probe> {
    let mut probes = Vec::new();
    for &from in from {
        for &over in over {
            for &to in to {
                probes.push(Probe {
                    from,
                    over,
                    to,
                    number,
                    sticky: false,
                    second: false,
                    source_port: None,
                    by_chance: false,
                });
            }
        }
    }
    probes
}

impl Probe {
    /// It always lands at one backend, and it does not matter which.
    pub fn sticky(self) -> Self {
        Probe { sticky: true, ..self }
    }

    /// All datagrams are one flow, across the steps of a scenario too.
    pub fn one_flow(self, port: u16) -> Self {
        Probe { source_port: Some(port), ..self }
    }

    /// Two Services claim the address.
    pub fn by_chance(self) -> Self {
        Probe { by_chance: true, ..self }
    }

    /// For a scenario that has two Services, so that the rows' names differ.
    pub fn of_second(self) -> Self {
        Probe { second: true, ..self }
    }

    /// As it is asked at a step. What a kernel remembers of one step's flows is no matter at the next, unless the probe
    /// is one flow.
    pub fn question(&self, step: usize) -> Question {
        const PORTS_OF_A_STEP: u16 = 7000;
        let first = 32_768 + PORTS_OF_A_STEP * u16::try_from(step).expect("a few steps");
        let source_ports = self.source_port.map_or(first..=first + PORTS_OF_A_STEP - 1, |port| port..=port);
        let scheme = if self.over.is_tcp() { "http" } else { "udp" };
        let path = if self.over.is_tcp() { "/" } else { "" };
        Question { target: format!("{scheme}://{}{path}", self.address()), source_ports }
    }

    fn address(&self) -> SocketAddr {
        let (number, family) = (self.number, self.over.family());
        let parse = |text: &str| text.parse::<IpAddr>().expect("the catalogue's addresses are addresses");
        let node = |name: &str| NODES.iter().find(|node| node.name == name).expect("the lab has this node");
        match self.to {
            To::ClusterIp => (parse(&cluster_ips(number)[family]), SERVICE_PORT).into(),
            To::UnknownPort => (parse(&cluster_ips(number)[family]), SERVICE_PORT + 1).into(),
            To::NodePort(name) => {
                let addresses: [IpAddr; 2] = [node(name).v4().into(), node(name).v6().into()];
                (addresses[family], node_port(number)).into()
            }
            To::Localhost => {
                let addresses: [IpAddr; 2] = [Ipv4Addr::LOCALHOST.into(), Ipv6Addr::LOCALHOST.into()];
                (addresses[family], node_port(number)).into()
            }
            To::Gateway(name) => (node(name).gateways()[family], node_port(number)).into(),
            To::LoadBalancer(name) => (parse(&load_balancer_ips(name, number)[family]), SERVICE_PORT).into(),
            To::ExternalIp => (parse(&external_ips(number)[family]), SERVICE_PORT).into(),
        }
    }
}

impl Probe {
    pub fn is_from_node(&self) -> bool {
        NODES.iter().any(|node| node.name == self.from)
    }

    pub fn is_from_outside(&self) -> bool {
        self.from == OUTSIDE
    }
}

impl fmt::Display for Probe {
    /// As rows are called: `client tcp4 node-port:node-a`.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let over = match self.over {
            Over::Tcp4 => "tcp4",
            Over::Tcp6 => "tcp6",
            Over::Udp4 => "udp4",
            Over::Udp6 => "udp6",
        };
        write!(f, "{} {over} ", self.from)?;
        match self.to {
            To::ClusterIp => write!(f, "cluster-ip"),
            To::UnknownPort => write!(f, "unknown-port"),
            To::NodePort(node) => write!(f, "node-port:{node}"),
            To::Localhost => write!(f, "localhost"),
            To::Gateway(node) => write!(f, "gateway:{node}"),
            To::LoadBalancer(node) => write!(f, "load-balancer:{node}"),
            To::ExternalIp => write!(f, "external-ip"),
        }?;
        f.write_str(if self.second { " of the second" } else { "" })
    }
}
