//! The nodes' network: a switch, and on it the control plane, a client that is no part of the cluster, and the nodes.
use std::net::{Ipv4Addr, Ipv6Addr};

use anyhow::Result;
use svc_lab::netns::Netns;

use crate::state::Cluster;

/// The hosts beside the nodes.
pub(crate) const CONTROL_PLANE: &str = "cp";
pub(crate) const CLIENT: &str = "client";
const SWITCH: &str = "switch";

pub(crate) const NODES: [&str; 3] = ["n1", "n2", "n3"];
pub(crate) const POD_CIDRS: &str = "10.244.0.0/16,fd00:10:244::/56";
pub(crate) const SERVICE_CIDRS: &str = "10.96.0.0/16,fd00:10:96::/112";
pub(crate) const DNS: &str = "10.96.0.10";
pub(crate) const API_SERVER: Ipv4Addr = v4(2);

const fn v4(number: u8) -> Ipv4Addr {
    Ipv4Addr::new(172, 30, 0, number)
}

const fn v6(number: u8) -> Ipv6Addr {
    Ipv6Addr::new(0xfd00, 0x30, 0, 0, 0, 0, 0, number as u16)
}

/// A node's number, from 1.
pub(crate) fn number(node: &str) -> u8 {
    NODES.iter().position(|name| *name == node).map_or(0, |index| index as u8 + 1)
}

/// A node's addresses.
pub(crate) fn addresses(node: &str) -> (Ipv4Addr, Ipv6Addr) {
    (v4(10 + number(node)), v6(10 + number(node)))
}

/// Of the pods of a node.
pub(crate) fn pod_cidrs(node: &str) -> [String; 2] {
    let number = number(node);
    [format!("10.244.{number}.0/24"), format!("fd00:10:244:{number}::/64")]
}

/// Makes all namespaces, with links and routes.
pub(crate) fn create(cluster: &Cluster) -> Result<()> {
    let switch = Netns::create(cluster.namespace_name(SWITCH))?;
    switch.ip(&format!(
        "link add br0 type bridge\nlink set br0 up\naddr add {}/24 dev br0\naddr add {}/64 dev br0 nodad\n",
        v4(1),
        v6(1)
    ))?;
    let hosts = [(CONTROL_PLANE, 2), (CLIENT, 3)].into_iter().chain(NODES.map(|node| (node, 10 + number(node))));
    for (host, number) in hosts {
        let namespace = Netns::create(cluster.namespace_name(host))?;
        switch.ip(&format!(
            "link add {host} type veth peer name eth0 netns {}\nlink set {host} master br0 up\n",
            namespace.name()
        ))?;
        // The bridge does not forward: without a default route, a process of a node would find no way to a ClusterIP.
        let mut lines = format!(
            "addr add {}/24 dev eth0\naddr add {}/64 dev eth0 nodad\nlink set eth0 up\n\
             route add default via {}\nroute add default via {}\n",
            v4(number),
            v6(number),
            v4(1),
            v6(1)
        );
        for node in NODES.into_iter().filter(|node| *node != host) {
            let (v4, v6) = addresses(node);
            let [pods_v4, pods_v6] = pod_cidrs(node);
            lines.push_str(&format!("route add {pods_v4} via {v4}\nroute add {pods_v6} via {v6}\n"));
        }
        namespace.ip(&lines)?;
    }
    Ok(())
}
