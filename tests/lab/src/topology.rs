//! The lab's hosts and how they are wired: a LAN with two nodes, pods behind each, and a client outside the cluster.
use std::collections::BTreeMap;
use std::fmt::Write;
use std::fs::{self, File};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpStream};
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

use crate::claim::Claim;
use crate::netns::Netns;
use crate::process::{Place, Process};
use crate::tun::Tunnel;
use crate::{binaries, offload};

pub const CLUSTER_CIDRS: &str = "10.244.0.0/16,fd00:10:244::/56";
pub const SERVICE_CIDRS: &str = "10.96.0.0/16,fd00:10:96::/112";
/// Where the pods' servers listen.
pub const PORT: u16 = 9376;
/// The outside client, with no route to any pod.
pub const OUTSIDE: &str = "out";
/// The host of etcd and kube-apiserver.
pub const CONTROL_PLANE: &str = "cp";
/// The pod that only asks.
pub const CLIENT: &str = "client";

/// Hosts on the LAN; its bridge has host number 1.
const LAN: &str = "lan";
const UPLINK: &str = "eth0";

pub struct Node {
    pub name: &'static str,
    /// Last part of its LAN addresses.
    lan_host: u8,
    /// Which of the cluster's pod networks is its own.
    pod_network: u8,
}

pub const NODES: [Node; 2] =
    [Node { name: "node-a", lan_host: 0x11, pod_network: 1 }, Node { name: "node-b", lan_host: 0x12, pod_network: 2 }];

pub struct Pod {
    pub name: &'static str,
    node: usize,
    /// Last part of its addresses.
    host: u8,
}

const CLIENT_POD: Pod = Pod { name: CLIENT, node: 0, host: 0x10 };

/// The pods with a server.
pub const BACKENDS: [Pod; 4] = [
    Pod { name: "a1", node: 0, host: 0x11 },
    Pod { name: "a2", node: 0, host: 0x12 },
    Pod { name: "b1", node: 1, host: 0x11 },
    Pod { name: "b2", node: 1, host: 0x12 },
];

impl Node {
    pub fn v4(&self) -> Ipv4Addr {
        lan_v4(self.lan_host)
    }

    pub fn v6(&self) -> Ipv6Addr {
        lan_v6(self.lan_host)
    }

    fn pods_v4(&self, host: u8) -> Ipv4Addr {
        Ipv4Addr::new(10, 244, self.pod_network, decimal(host))
    }

    fn pods_v6(&self, host: u8) -> Ipv6Addr {
        Ipv6Addr::new(0xfd00, 0x10, 0x244, self.pod_network.into(), 0, 0, 0, host.into())
    }

    /// Of its pods, IPv4 first.
    pub fn pod_cidrs(&self) -> [String; 2] {
        [format!("{}/24", self.pods_v4(0)), format!("{}/64", self.pods_v6(0))]
    }

    /// Its addresses towards its pods.
    pub fn gateways(&self) -> [IpAddr; 2] {
        [self.pods_v4(GATEWAY_HOST).into(), self.pods_v6(GATEWAY_HOST).into()]
    }
}

impl Pod {
    pub fn node(&self) -> &'static Node {
        &NODES[self.node]
    }

    pub fn v4(&self) -> Ipv4Addr {
        self.node().pods_v4(self.host)
    }

    pub fn v6(&self) -> Ipv6Addr {
        self.node().pods_v6(self.host)
    }
}

pub const fn lan_v4(host: u8) -> Ipv4Addr {
    Ipv4Addr::new(172, 31, 0, decimal(host))
}

pub const fn lan_v6(host: u8) -> Ipv6Addr {
    Ipv6Addr::new(0xfd00, 0x31, 0, 0, 0, 0, 0, host as u16)
}

/// Hosts are numbered so that both families' addresses read alike: ::11 and .11.
const fn decimal(host: u8) -> u8 {
    host / 16 * 10 + host % 16
}

/// A host's addresses, IPv4 first; a node's towards its pods come last.
pub fn addresses(host: &str) -> Result<Vec<IpAddr>> {
    if host == OUTSIDE {
        return Ok(vec![lan_v4(OUTSIDE_HOST).into(), lan_v6(OUTSIDE_HOST).into()]);
    }
    if let Some(node) = NODES.iter().find(|node| node.name == host) {
        return Ok([&[node.v4().into(), node.v6().into()][..], &node.gateways()].concat());
    }
    let pod = BACKENDS.iter().chain([&CLIENT_POD]).find(|pod| pod.name == host);
    let pod = pod.with_context(|| format!("the lab has no host {host}"))?;
    Ok(vec![pod.v4().into(), pod.v6().into()])
}

/// Of a node's pods.
const BRIDGE: &str = "cni0";
const OVERLAY: &str = "vxlan0";
/// 1500 without the outer headers.
const OVERLAY_MTU: u16 = 1450;

/// Of a node's pods.
fn bridge(node: &Node) -> String {
    let (gateway_v4, gateway_v6) = (node.pods_v4(GATEWAY_HOST), node.pods_v6(GATEWAY_HOST));
    format!(
        "link add {BRIDGE} mtu {OVERLAY_MTU} type bridge mcast_snooping 0\n\
         addr add {gateway_v4}/24 dev {BRIDGE}\n\
         addr add {gateway_v6}/64 dev {BRIDGE} nodad\n\
         link set {BRIDGE} up\n"
    )
}

/// A node's way to the other one's pods, by VXLAN.
fn overlay(node: &Node, other: &Node) -> String {
    let end = |node: &Node| (node.pods_v4(0), node.pods_v6(TUNNEL_HOST));
    let ((v4, v6), (other_v4, other_v6)) = (end(node), end(other));
    let (local, remote) = (node.v4(), other.v4());
    format!(
        "link add {OVERLAY} mtu {OVERLAY_MTU} type vxlan id 1 local {local} remote {remote} dstport 8472 dev {UPLINK}\n\
         addr add {v4}/32 dev {OVERLAY}\n\
         addr add {v6}/128 dev {OVERLAY} nodad\n\
         link set {OVERLAY} up\n\
         route add {other_v4}/24 via {other_v4} dev {OVERLAY} onlink\n\
         route add {}/64 via {other_v6} dev {OVERLAY} onlink\n",
        other.pods_v6(0)
    )
}

/// By which links without headers packets go between the nodes, and between the first node and the outside.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Bare {
    /// A process' own.
    Tun,
    /// IPIP with the route as the only word on where a packet goes, as Calico has it, for IPv4; SIT for IPv6; GRE to the outside.
    Kernel,
}

/// What the outside calls the first node in their tunnel, and what the node calls the outside.
pub const TUNNELLED: [(Ipv4Addr, Ipv6Addr); 2] = [
    (Ipv4Addr::new(10, 99, 0, 11), Ipv6Addr::new(0xfd00, 0x99, 0, 0, 0, 0, 0, 0x11)),
    (Ipv4Addr::new(10, 99, 0, 99), Ipv6Addr::new(0xfd00, 0x99, 0, 0, 0, 0, 0, 0x99)),
];
/// Narrower than the LAN, and than the tunnel to the outside.
pub const BARE_MTU: u16 = 1300;
const OUTSIDE_MTU: u16 = 1400;

/// A node's way to the other one's pods.
fn bare(kind: Bare, node: &Node, other: &Node) -> String {
    let (local, remote) = (node.v4(), other.v4());
    let (links, v4, v6) = match kind {
        Bare::Tun => (String::new(), "tun0", "tun0"),
        Bare::Kernel => (
            format!(
                "link add ipip0 type ipip local {local} ttl 64\n\
                 link add sit1 type sit local {local} remote {remote} ttl 64\n"
            ),
            "ipip0",
            "sit1",
        ),
    };
    let (own_v4, own_v6) = (node.pods_v4(0), node.pods_v6(TUNNEL_HOST));
    let via = if kind == Bare::Kernel { format!("via {remote} onlink ") } else { String::new() };
    format!(
        "{links}\
         link set {v4} mtu {BARE_MTU} up\n\
         link set {v6} mtu {BARE_MTU} up\n\
         addr add {own_v4}/32 dev {v4}\n\
         addr add {own_v6}/128 dev {v6} nodad\n\
         route add {}/24 {via}dev {v4}\n\
         route add {}/64 dev {v6}\n",
        other.pods_v4(0),
        other.pods_v6(0)
    )
}

const GATEWAY_HOST: u8 = 0x01;
const TUNNEL_HOST: u8 = 0x02;
const BRIDGE_HOST: u8 = 0x01;
const CONTROL_PLANE_HOST: u8 = 0x02;
const OUTSIDE_HOST: u8 = 0x99;

/// How pods are connected.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Network {
    /// Point-to-point links to the node and plain routes between nodes, as the ptp CNI plugin and kindnet make them.
    Routed,
    /// A bridge on each node and VXLAN between nodes, as flannel makes them.
    Overlay,
    /// As [`Network::Routed`], with links without headers between nodes, and one from the first node to the outside.
    Bare(Bare),
}

/// Removed, with every process in it, when dropped.
pub struct Lab {
    /// Before the namespaces that they are in.
    servers: BTreeMap<&'static str, Process>,
    namespaces: BTreeMap<&'static str, Netns>,
    /// Of XDP programs on the LAN.
    links: Vec<OwnedFd>,
    tunnels: Vec<Tunnel>,
    network: Network,
    claim: Claim,
}

impl Lab {
    /// The network, with a server running in each backend pod.
    pub fn new() -> Result<Self> {
        Self::with_network(Network::Routed)
    }

    /// As [`Lab::new`].
    pub fn with_network(network: Network) -> Result<Self> {
        let mut lab = Lab {
            servers: BTreeMap::new(),
            namespaces: BTreeMap::new(),
            links: Vec::new(),
            tunnels: Vec::new(),
            network,
            claim: Claim::new()?,
        };
        lab.make_lan()?;
        lab.make_outside()?;
        for node in &NODES {
            lab.make_node(node)?;
        }
        if let Network::Bare(kind) = network {
            lab.make_tunnels(kind)?;
        }
        lab.make_pod(&CLIENT_POD)?;
        for pod in &BACKENDS {
            lab.make_pod(pod)?;
        }
        lab.start_servers()?;
        Ok(lab)
    }

    /// What an agent has to be told of the nodes' interfaces to the network: those of an overlay and tunnels it finds by itself.
    pub(crate) fn uplinks(&self) -> &'static [&'static str] {
        match self.network {
            Network::Routed => &[UPLINK],
            Network::Overlay | Network::Bare(_) => &[],
        }
    }

    pub fn namespace(&self, host: &str) -> Result<&Netns> {
        self.namespaces.get(host).with_context(|| format!("the lab has no host {host}"))
    }

    pub fn cgroup(&self, host: &str) -> Result<PathBuf> {
        let pods = || BACKENDS.iter().chain([&CLIENT_POD]);
        let lab = self.claim.cgroup()?;
        Ok(match pods().find(|pod| pod.name == host) {
            Some(pod) => lab.join(pod.node().name).join(pod.name),
            None => lab.join(host),
        })
    }

    pub fn bpffs(&self, node: &str) -> PathBuf {
        self.claim.bpffs().join(node)
    }

    /// For files, gone with the lab.
    pub fn directory(&self) -> PathBuf {
        self.claim.directory()
    }

    /// A new log file of this name.
    pub fn log(&self, name: &str) -> Result<(PathBuf, File)> {
        let path = self.claim.logs().join(format!("{name}.log"));
        let file = File::options().create(true).append(true).open(&path)?;
        Ok((path, file))
    }

    /// Starts a program on a host.
    pub fn spawn(&self, host: &str, command: Command) -> Result<Process> {
        let place = Place { namespace: self.namespace(host)?.open()?, cgroup: self.cgroup(host)? };
        Process::spawn(command, place)
    }

    /// The host for a control plane, which not every lab has.
    pub fn add_control_plane_host(&mut self) -> Result<()> {
        self.add_host(CONTROL_PLANE)?;
        self.plug(CONTROL_PLANE, CONTROL_PLANE_HOST)
    }

    /// See [`offload`]; for labs whose agents use XDP.
    pub fn checksum_before_sending(&self) -> Result<()> {
        self.namespaces.values().try_for_each(offload::checksum_before_sending)
    }

    /// See [`offload`]; for labs whose agents use native XDP. The uplinks' peers are the LAN's.
    pub fn receive_from_xdp(&mut self) -> Result<()> {
        self.links = offload::receive_from_xdp(self.namespace(LAN)?)?;
        Ok(())
    }

    /// Ends a pod's server as a crash would.
    pub fn kill_server(&mut self, pod: &str) {
        self.servers.remove(pod);
    }

    fn add_host(&mut self, host: &'static str) -> Result<&Netns> {
        let namespace = Netns::create(self.claim.namespace(host))?;
        // Duplicate address detection would hold every address back for a second.
        namespace.sysctl(&[
            ("ipv6/conf/all/accept_dad", "0"),
            ("ipv6/conf/default/accept_dad", "0"),
            ("ipv6/conf/default/accept_ra", "0"),
            ("ipv4/ip_forward", "0"),
        ])?;
        fs::create_dir_all(self.cgroup(host)?)?;
        Ok(self.namespaces.entry(host).or_insert(namespace))
    }

    fn make_lan(&mut self) -> Result<()> {
        let (v4, v6) = (lan_v4(BRIDGE_HOST), lan_v6(BRIDGE_HOST));
        self.add_host(LAN)?.ip(&format!(
            "link add br0 type bridge mcast_snooping 0\n\
             addr add {v4}/24 dev br0\n\
             addr add {v6}/64 dev br0 nodad\n\
             link set br0 up\n"
        ))
    }

    /// Connects a host to the LAN.
    fn plug(&self, host: &str, number: u8) -> Result<()> {
        let namespace = self.namespace(host)?;
        self.namespace(LAN)?.ip(&format!(
            "link add {host} type veth peer name {UPLINK} netns {}\n\
             link set {host} master br0 up\n",
            namespace.name()
        ))?;
        let (v4, v6) = (lan_v4(number), lan_v6(number));
        namespace.ip(&format!(
            "addr add {v4}/24 dev {UPLINK}\n\
             addr add {v6}/64 dev {UPLINK} nodad\n\
             link set {UPLINK} up\n"
        ))
    }

    /// Clients outside reach ClusterIPs through the first node, as through a router that knows the cluster.
    fn make_outside(&mut self) -> Result<()> {
        self.add_host(OUTSIDE)?;
        self.plug(OUTSIDE, OUTSIDE_HOST)?;
        let mut routes = String::new();
        for cidr in SERVICE_CIDRS.split(',') {
            let via = if cidr.contains(':') { IpAddr::V6(NODES[0].v6()) } else { IpAddr::V4(NODES[0].v4()) };
            writeln!(routes, "route add {cidr} via {via}")?;
        }
        self.namespace(OUTSIDE)?.ip(&routes)
    }

    fn make_node(&mut self, node: &'static Node) -> Result<()> {
        let namespace = self.add_host(node.name)?;
        namespace.sysctl(&[
            ("ipv4/ip_forward", "1"),
            ("ipv6/conf/all/forwarding", "1"),
            // A client that was once sent elsewhere, by an address that no Service had yet, would not come back.
            ("ipv4/conf/all/send_redirects", "0"),
            ("ipv4/conf/default/send_redirects", "0"),
        ])?;
        self.plug(node.name, node.lan_host)?;
        // The default route leads nowhere; a connection to a ClusterIP only has to find one.
        let mut routes =
            format!("route add default via {}\nroute add default via {}\n", lan_v4(BRIDGE_HOST), lan_v6(BRIDGE_HOST));
        for other in NODES.iter().filter(|other| other.name != node.name) {
            match self.network {
                Network::Routed => {
                    writeln!(routes, "route add {}/24 via {}", other.pods_v4(0), other.v4())?;
                    writeln!(routes, "route add {}/64 via {}", other.pods_v6(0), other.v6())?;
                }
                Network::Overlay => routes.push_str(&(bridge(node) + &overlay(node, other))),
                Network::Bare(_) => {}
            }
        }
        self.namespace(node.name)?.ip(&routes)
    }

    /// Those between the nodes, and the one to the outside, which reaches ClusterIPs by it.
    fn make_tunnels(&mut self, kind: Bare) -> Result<()> {
        let [a, b] = &NODES;
        if kind == Bare::Tun {
            self.tunnels.push(Tunnel::new([self.namespace(a.name)?, self.namespace(b.name)?], "tun0")?);
            self.tunnels.push(Tunnel::new([self.namespace(a.name)?, self.namespace(OUTSIDE)?], "outside")?);
        }
        for (node, other) in [(a, b), (b, a)] {
            self.namespace(node.name)?.ip(&bare(kind, node, other))?;
        }
        let (lan_a, lan_out) = (a.v4(), lan_v4(OUTSIDE_HOST));
        for (host, own, other, local, remote) in [(a.name, 0, 1, lan_a, lan_out), (OUTSIDE, 1, 0, lan_out, lan_a)] {
            let (own, other) = (TUNNELLED[own], TUNNELLED[other]);
            let link = match kind {
                Bare::Tun => String::new(),
                Bare::Kernel => format!("link add outside type gre local {local} remote {remote} ttl 64\n"),
            };
            self.namespace(host)?.ip(&format!(
                "{link}\
                 link set outside mtu {OUTSIDE_MTU} up\n\
                 addr add {}/32 dev outside\n\
                 addr add {}/128 dev outside nodad\n\
                 route add {}/32 dev outside src {}\n\
                 route add {}/128 dev outside\n",
                own.0, own.1, other.0, own.0, other.1
            ))?;
        }
        Ok(())
    }

    /// What leads to other nodes' pods, as before a network plugin has started: an overlay's interface is not there, one without
    /// headers is down.
    pub fn tunnels_away(&self) -> Result<()> {
        let commands = match self.network {
            Network::Routed => String::new(),
            Network::Overlay => format!("link del {OVERLAY}\n"),
            Network::Bare(kind) => {
                let links = if kind == Bare::Tun { ["tun0"].as_slice() } else { &["ipip0", "sit1"] };
                links.iter().map(|link| format!("addr flush dev {link}\nlink set {link} down\n")).collect()
            }
        };
        NODES.iter().try_for_each(|node| self.namespace(node.name)?.ip(&commands))
    }

    /// As when the network plugin has started.
    pub fn tunnels_back(&self) -> Result<()> {
        let [a, b] = &NODES;
        for (node, other) in [(a, b), (b, a)] {
            let commands = match self.network {
                Network::Routed => String::new(),
                Network::Overlay => overlay(node, other),
                Network::Bare(Bare::Tun) => bare(Bare::Tun, node, other),
                Network::Bare(Bare::Kernel) => {
                    let all = bare(Bare::Kernel, node, other);
                    all.lines().filter(|line| !line.starts_with("link add")).map(|line| format!("{line}\n")).collect()
                }
            };
            self.namespace(node.name)?.ip(&commands)?;
        }
        Ok(())
    }

    fn make_pod(&mut self, pod: &'static Pod) -> Result<()> {
        let node = pod.node();
        let name = self.add_host(pod.name)?.name().to_owned();
        let (gateway_v4, gateway_v6) = (node.pods_v4(GATEWAY_HOST), node.pods_v6(GATEWAY_HOST));
        let (v4, v6) = (pod.v4(), pod.v6());
        let link = format!("pod-{}", pod.name);
        if self.network == Network::Overlay {
            self.namespace(node.name)?.ip(&format!(
                "link add {link} mtu {OVERLAY_MTU} type veth peer name eth0 mtu {OVERLAY_MTU} netns {name}\n\
                 link set {link} master {BRIDGE} up\n"
            ))?;
            return self.namespace(pod.name)?.ip(&format!(
                "addr add {v4}/24 dev eth0\n\
                 addr add {v6}/64 dev eth0 nodad\n\
                 link set eth0 up\n\
                 route add default via {gateway_v4}\n\
                 route add default via {gateway_v6}\n"
            ));
        }
        self.namespace(node.name)?.ip(&format!(
            "link add {link} type veth peer name eth0 netns {name}\n\
             addr add {gateway_v4}/32 dev {link}\n\
             addr add {gateway_v6}/128 dev {link} nodad\n\
             link set {link} up\n\
             route add {v4}/32 dev {link} src {gateway_v4}\n\
             route add {v6}/128 dev {link}\n"
        ))?;
        self.namespace(pod.name)?.ip(&format!(
            "addr add {v4}/32 dev eth0\n\
             addr add {v6}/128 dev eth0 nodad\n\
             link set eth0 up\n\
             route add {gateway_v4} dev eth0 scope link\n\
             route add {gateway_v6} dev eth0\n\
             route add default via {gateway_v4}\n\
             route add default via {gateway_v6}\n"
        ))
    }

    fn start_servers(&mut self) -> Result<()> {
        for pod in &BACKENDS {
            self.spawn_server(pod.name)?;
        }
        for pod in &BACKENDS {
            self.wait_for_port(pod.name, PORT)?;
        }
        Ok(())
    }

    /// A server on a host that is no pod, for backends outside the cluster.
    pub fn start_server(&mut self, host: &'static str) -> Result<()> {
        self.spawn_server(host)?;
        self.wait_for_port(host, PORT)
    }

    fn spawn_server(&mut self, host: &'static str) -> Result<()> {
        let mut server = Command::new(binaries::lab()?);
        let (_, log) = self.log(host)?;
        server.args(["serve", "--name", host]).stdin(Stdio::null()).stdout(log.try_clone()?).stderr(log);
        let process = self.spawn(host, server)?;
        self.servers.insert(host, process);
        Ok(())
    }

    /// Waits until a host accepts connections at its own loopback address.
    pub fn wait_for_port(&self, host: &str, port: u16) -> Result<()> {
        let address = SocketAddr::from((Ipv4Addr::LOCALHOST, port));
        self.namespace(host)?.inside(|| {
            let deadline = Instant::now() + Duration::from_secs(30);
            while TcpStream::connect(address).is_err() {
                if Instant::now() > deadline {
                    bail!("nothing listens on port {port} of {host}");
                }
                thread::sleep(Duration::from_millis(10));
            }
            Ok(())
        })
    }
}
