//! Nodes with a wire each: bare ones, ones with svc, and ones with what kube-proxy leaves in the kernel.
use std::fs;
use std::net::Ipv4Addr;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Result, bail};
use serde_json::{Value, json};
use svc_lab::agent::Agent;
use svc_lab::kube_proxy::{KubeProxy, Mode};
use svc_lab::netns::Netns;
use svc_lab::source::Source;
use svc_lab::topology::{Lab, NODES};
use svc_tests::cluster::{endpoint, service_of};

use crate::conntrack;
use crate::scale::publish_nodes;
use crate::template;
use crate::wire::{Far, Hook, Traffic, Wire};

pub(crate) const NODE_PORT: u16 = 30_080;
pub(crate) const BACKEND_PORT: u16 = 9376;
/// With fewer, kube-proxy's masquerading runs out of ports at a million flows.
const BACKENDS: u8 = 64;
/// For rules to be in force.
const PATIENCE: Duration = Duration::from_secs(600);
/// Objects in a file.
const AT_ONCE: usize = 2000;

/// What a node does with a packet.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Kind {
    /// Sends it back at once.
    XdpTx,
    /// The same, after one look-up in the kernel's own table.
    Lookup,
    /// Sends it back by tc, with a socket buffer.
    Redirect,
    /// Routes it, and nothing else.
    Plain,
    SvcXdp,
    SvcTcx,
    /// With each backend's bytes counted; so the one below.
    SvcXdpCounting,
    SvcTcxCounting,
    Nftables,
    Iptables,
}

impl Kind {
    fn name(self) -> &'static str {
        match self {
            Kind::XdpTx => "XDP_TX",
            Kind::Lookup => "XDP look-up",
            Kind::Redirect => "tcx redirect",
            Kind::Plain => "plain routing",
            Kind::SvcXdp => "svc XDP",
            Kind::SvcTcx => "svc tcx",
            Kind::SvcXdpCounting => "svc XDP, counting bytes",
            Kind::SvcTcxCounting => "svc tcx, counting bytes",
            Kind::Nftables => "kube-proxy nftables",
            Kind::Iptables => "kube-proxy iptables",
        }
    }

    /// As it is without being asked for anything.
    pub(crate) fn is_plain_svc(self) -> bool {
        matches!(self, Kind::SvcXdp | Kind::SvcTcx)
    }

    fn counts_bytes(self) -> bool {
        matches!(self, Kind::SvcXdpCounting | Kind::SvcTcxCounting)
    }

    fn is_svc(self) -> bool {
        self.is_plain_svc() || self.counts_bytes()
    }

    pub(crate) fn is_kube_proxy(self) -> bool {
        matches!(self, Kind::Nftables | Kind::Iptables)
    }

    /// Whether it remembers flows.
    pub(crate) fn has_flows(self) -> bool {
        self.is_svc() || self.is_kube_proxy() || self == Kind::Lookup
    }

    /// Whether packets to a NodePort go to backends.
    pub(crate) fn forwards(self) -> bool {
        self.is_svc() || self.is_kube_proxy()
    }

    /// More time than it needs for a flow's first packet.
    pub(crate) fn pause(self) -> Duration {
        Duration::from_micros(if self.is_kube_proxy() { 15 } else { 3 })
    }

    /// Packets that a sample takes, in thousands.
    pub(crate) fn thousands(self) -> u64 {
        match self {
            Kind::XdpTx | Kind::Lookup | Kind::SvcXdp | Kind::SvcXdpCounting => 1000,
            Kind::Redirect | Kind::Plain | Kind::SvcTcx | Kind::SvcTcxCounting => 400,
            Kind::Nftables | Kind::Iptables => 150,
        }
    }
}

/// A node that packets are sent through.
pub(crate) struct Contestant {
    pub(crate) name: String,
    pub(crate) kind: Kind,
    pub(crate) wire: Wire,
    /// The node's address.
    pub(crate) node: Ipv4Addr,
}

/// All of them at once, so that they can be measured in turn.
pub(crate) struct Nodes {
    pub(crate) contestants: Vec<Contestant>,
    _agents: Vec<Agent>,
    pub(crate) far: Far,
    labs: Vec<Lab>,
}

impl Nodes {
    /// Each kind, with so many Services, one of them with the NodePort. `flows`: at the most.
    pub(crate) fn new(wanted: &[(Kind, u32)], flows: u32) -> Result<Self> {
        Self::with_far_end(wanted, flows, true)
    }

    /// `seldom`: whether the far end looks for what has arrived every now and then, else at once.
    pub(crate) fn with_far_end(wanted: &[(Kind, u32)], flows: u32, seldom: bool) -> Result<Self> {
        let first = Lab::new()?;
        let prefix = first.namespace(NODES[0].name)?.name().strip_suffix(NODES[0].name).unwrap_or_default().to_owned();
        let far = Far::new(&prefix, seldom)?;
        let mut nodes = Nodes { contestants: Vec::new(), _agents: Vec::new(), far, labs: Vec::new() };
        nodes.add_bare(&prefix, wanted)?;
        // The first lab is there for whoever comes first.
        let mut spare = Some(first);
        let mut sizes: Vec<u32> = wanted.iter().map(|(_, services)| *services).collect();
        sizes.sort_unstable();
        sizes.dedup();
        for services in sizes {
            let of_size = |is: fn(Kind) -> bool| {
                wanted.iter().filter(move |wanted| is(wanted.0) && wanted.1 == services).map(|wanted| wanted.0)
            };
            let svc: Vec<Kind> = of_size(Kind::is_svc).collect();
            let kube_proxy: Vec<Kind> = of_size(Kind::is_kube_proxy).collect();
            for svc in svc.chunks(NODES.len()) {
                let lab = spare.take().map_or_else(Lab::new, Ok)?;
                nodes.add_svc(lab, svc, services, flows)?;
            }
            if !kube_proxy.is_empty() {
                let lab = spare.take().map_or_else(Lab::new, Ok)?;
                nodes.add_kube_proxy(lab, &kube_proxy, services, flows)?;
            }
        }
        nodes.labs.extend(spare);
        for contestant in nodes.contestants.iter().filter(|contestant| contestant.kind.forwards()) {
            nodes.wait_until_in_force(contestant)?;
        }
        Ok(nodes)
    }

    /// Of the first contestants that are svc's.
    pub(crate) fn first_lab(&self) -> &Lab {
        &self.labs[0]
    }

    fn number(&self) -> u8 {
        1 + self.contestants.len() as u8
    }

    fn add_bare(&mut self, prefix: &str, wanted: &[(Kind, u32)]) -> Result<()> {
        for (kind, _) in wanted.iter().filter(|(kind, _)| !kind.forwards()) {
            let number = self.number();
            let node = Netns::create(format!("{prefix}bare{number}"))?;
            let mut wire = self.far.plug(&node, number)?;
            match kind {
                Kind::XdpTx => self.far.attach(&node, &mut wire, "empty_xdp", Hook::Xdp)?,
                Kind::Lookup => self.far.attach(&node, &mut wire, "lookup_live", Hook::Xdp)?,
                Kind::Redirect => self.far.attach(&node, &mut wire, "redirect_tc", Hook::TcxIngress)?,
                _ => (),
            }
            let address = wire.address();
            self.contestants.push(Contestant { name: kind.name().to_owned(), kind: *kind, wire, node: address });
        }
        Ok(())
    }

    fn add_svc(&mut self, lab: Lab, kinds: &[Kind], services: u32, flows: u32) -> Result<()> {
        println!("  svc, {services} Services ...");
        write_manifests(&lab, &objects(services))?;
        let source = Source::directory(&lab);
        let (flows, room) = (flows.max(1 << 18).to_string(), (services + 1024).max(1 << 16).to_string());
        for (kind, node) in kinds.iter().zip(&NODES) {
            let wire = self.far.plug(lab.namespace(node.name)?, self.number())?;
            let is_xdp = matches!(kind, Kind::SvcXdp | Kind::SvcXdpCounting);
            let xdp = if is_xdp { "native" } else { "off" };
            let arguments = vec![
                ["--uplink", &wire.name],
                ["--xdp", xdp],
                ["--flow-table-size", &flows],
                ["--max-services", &room],
                // All flows live as long as a row takes.
                ["--conntrack-udp-timeout", "30m"],
            ];
            let mut arguments = arguments.into_flattened();
            if kind.counts_bytes() {
                arguments.push("--count-bytes");
            }
            self._agents.push(Agent::start(&lab, node, &source, &arguments)?);
            let name = named(*kind, services);
            self.contestants.push(Contestant { name, kind: *kind, wire, node: node.v4() });
        }
        self.labs.push(lab);
        Ok(())
    }

    /// Its rules stay when it ends, and so it does: neither it nor the API server is in the way of what is measured.
    fn add_kube_proxy(&mut self, mut lab: Lab, kinds: &[Kind], services: u32, flows: u32) -> Result<()> {
        println!("  kube-proxy, {services} Services ...");
        conntrack::make_room(flows)?;
        let mut source = Source::control_plane(&mut lab)?;
        publish_nodes(&mut source, &lab)?;
        source.api_server()?.create(&lab, &objects(services))?;
        for kind in kinds {
            let (mode, node) =
                if *kind == Kind::Nftables { (Mode::Nftables, &NODES[0]) } else { (Mode::Iptables, &NODES[1]) };
            let namespace = lab.namespace(node.name)?;
            namespace.sysctl(&[
                ("netfilter/nf_conntrack_udp_timeout", "1800"),
                ("netfilter/nf_conntrack_udp_timeout_stream", "1800"),
            ])?;
            let wire = self.far.plug(namespace, self.number())?;
            let proxy = KubeProxy::start(&lab, node, source.api_server()?, mode, &[])?;
            let contestant = Contestant { name: named(*kind, services), kind: *kind, wire, node: node.v4() };
            self.wait_until_in_force(&contestant)?;
            drop(proxy);
            self.contestants.push(contestant);
        }
        self.labs.push(lab);
        Ok(())
    }

    /// kube-proxy says that it is healthy before it has gone through its rules. While the kernel looks through tens of thousands
    /// of them, the node's thread may not have its core for minutes.
    fn wait_until_in_force(&self, contestant: &Contestant) -> Result<()> {
        let deadline = Instant::now() + PATIENCE;
        let traffic = Traffic::udp(contestant.node, NODE_PORT, 1);
        while !self.far.measure(&contestant.wire, &traffic, 1).is_ok_and(|sample| sample.forwarded > 0) {
            if Instant::now() > deadline {
                bail!("{} forwards nothing to the NodePort's backends after {PATIENCE:?}", contestant.name);
            }
            thread::sleep(Duration::from_millis(100));
        }
        Ok(())
    }
}

/// As a contestant is called.
pub(crate) fn named(kind: Kind, services: u32) -> String {
    if services > 1 { format!("{}, {services} Services", kind.name()) } else { kind.name().to_owned() }
}

/// One Service with a NodePort for TCP and UDP and backends behind the wire, and ClusterIPs.
fn objects(services: u32) -> Vec<Value> {
    let [a, b] = template::BACKENDS;
    let address = |number: u8| Ipv4Addr::new(a, b, 0, number).to_string();
    let endpoints: Vec<Value> = (1..=BACKENDS)
        .map(|number| json!({ "addresses": [address(number)], "conditions": { "ready": true }, "nodeName": "elsewhere" }))
        .collect();
    let [mut service, mut slice] = service_of("wire", "10.96.8.1", &endpoints);
    let ports = |field: &str, value: u16| {
        let port = |name: &str, protocol: &str| json!({ "name": name, "protocol": protocol, "port": if field == "nodePort" { 80 } else { value } });
        [port("http", "TCP"), port("echo", "UDP")].map(|mut port| {
            if field == "nodePort" {
                port[field] = value.into();
                port["targetPort"] = BACKEND_PORT.into();
            }
            port
        })
    };
    service["spec"]["type"] = "NodePort".into();
    service["spec"]["ports"] = json!(ports("nodePort", NODE_PORT));
    slice["ports"] = json!(ports("port", BACKEND_PORT));
    let mut objects = vec![service, slice];
    objects.extend(other_services(services));
    objects
}

/// Without pods behind them; one less than `services`, of which one is asked.
pub(crate) fn other_services(services: u32) -> impl Iterator<Item = Value> {
    (1..services).flat_map(|number| {
        let cluster_ip = Ipv4Addr::from(0x0a60_1000 + number).to_string();
        let pod = Ipv4Addr::from(0x0a14_0000 + number).to_string();
        service_of(&format!("other-{number}"), &cluster_ip, &[endpoint(&pod, &NODES[0])])
    })
}

/// For agents of this lab that take their objects from a directory.
pub(crate) fn write_manifests(lab: &Lab, objects: &[Value]) -> Result<()> {
    let directory = lab.directory().join("manifests");
    fs::create_dir_all(&directory)?;
    for (number, objects) in objects.chunks(AT_ONCE).enumerate() {
        let documents: Vec<String> = objects.iter().map(Value::to_string).collect();
        fs::write(directory.join(format!("objects-{number}.yaml")), documents.join("\n---\n"))?;
    }
    Ok(())
}
