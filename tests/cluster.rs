//! A lab with an agent on each node, and what tests ask of it. Everything panics where it does not go as it should.
use std::collections::BTreeMap;
use std::io::{Read as _, Write as _};
use std::net::{SocketAddr, TcpStream};
use std::process::Command;
use std::thread;
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use svc_lab::agent::Agent;
use svc_lab::client::{Options, Outcome};
use svc_lab::control_plane::{ControlPlane, Identity, OTHER_ADDRESS};
use svc_lab::load::{Load, Tally};
use svc_lab::manifests::Manifests;
use svc_lab::source::Source;
use svc_lab::topology::{BACKENDS, Bare, CONTROL_PLANE, Lab, NODES, Network, Node};

/// Of examples/hostnames.
pub const CLUSTER_IP: &str = "http://10.96.0.80/";
pub const NODE_PORT: u16 = 30080;

/// What a refused connection is reported as.
pub const REFUSED: &str = "connect: ConnectionRefused";

pub struct Cluster {
    /// Before the hosts that they run on.
    agents: BTreeMap<&'static str, Agent>,
    source: Source,
    manifests: Manifests,
    /// For the agents that are started from now on.
    pub agent_arguments: &'static [&'static str],
    pub lab: Lab,
}

impl Cluster {
    /// Driven by a folder of manifests.
    pub fn with_manifests() -> Self {
        Self::with_arguments(&[])
    }

    /// Driven by a folder of manifests, with these arguments for the agents.
    pub fn with_arguments(arguments: &'static [&'static str]) -> Self {
        let lab = Lab::new().unwrap();
        let source = Source::directory(&lab);
        Self::start(lab, source, arguments)
    }

    /// Driven by a folder of manifests, with pods behind bridges and VXLAN between the nodes.
    pub fn with_overlay(arguments: &'static [&'static str]) -> Self {
        let lab = Lab::with_network(Network::Overlay).unwrap();
        let source = Source::directory(&lab);
        Self::start(lab, source, arguments)
    }

    /// Driven by a folder of manifests, with links without headers between the nodes and to the outside; none where the kernel
    /// has none of this kind.
    pub fn with_bare_links(kind: Bare, arguments: &'static [&'static str]) -> Option<Self> {
        let lab = lab_with(Network::Bare(kind))?;
        let source = Source::directory(&lab);
        Some(Self::start(lab, source, arguments))
    }

    /// Driven by a folder of manifests, with tunnels between the nodes that come up when the agents have started; none where
    /// the kernel has none of this kind.
    pub fn with_late_tunnels(network: Network) -> Option<Self> {
        let lab = lab_with(network)?;
        lab.tunnels_away().unwrap();
        let source = Source::directory(&lab);
        let cluster = Self::start(lab, source, &[]);
        cluster.lab.tunnels_back().unwrap();
        Some(cluster)
    }

    /// Driven by a folder of manifests, attached by filters as where the kernel has no tcx.
    pub fn with_clsact() -> Self {
        Self::with_arguments(&["--tc", "clsact"])
    }

    /// Driven by a folder of manifests, with XDP in front of tcx.
    pub fn with_generic_xdp() -> Self {
        let lab = Lab::new().unwrap();
        lab.checksum_before_sending().unwrap();
        let source = Source::directory(&lab);
        Self::start(lab, source, &["--xdp", "generic"]).with_xdp_mode("xdpgeneric")
    }

    /// Driven by a folder of manifests, with XDP in the uplink's driver.
    pub fn with_native_xdp() -> Self {
        let mut lab = Lab::new().unwrap();
        lab.checksum_before_sending().unwrap();
        lab.receive_from_xdp().unwrap();
        let source = Source::directory(&lab);
        Self::start(lab, source, &["--xdp", "native"]).with_xdp_mode("xdp")
    }

    /// Driven by a real API server.
    pub fn with_control_plane() -> Self {
        let mut lab = Lab::new().unwrap();
        let source = Source::control_plane(&mut lab).unwrap();
        Self::start(lab, source, &[])
    }

    /// A real API server, and no agents yet.
    pub fn without_agents() -> Self {
        let mut lab = Lab::new().unwrap();
        let source = Source::control_plane(&mut lab).unwrap();
        let manifests = Manifests::hostnames().unwrap();
        let mut cluster = Cluster { agents: BTreeMap::new(), source, manifests, agent_arguments: &[], lab };
        cluster.change(|_| ());
        cluster
    }

    /// Driven by a real API server, which knows the agents by a service account's token, with these arguments for the
    /// agents.
    pub fn with_tokens(identity: Identity, arguments: &'static [&'static str]) -> Self {
        let mut lab = Lab::new().unwrap();
        let mut control_plane = ControlPlane::start(&mut lab).unwrap();
        control_plane.use_tokens(&lab, identity).unwrap();
        Self::start(lab, Source::ControlPlane(control_plane), arguments)
    }

    /// Driven by a real API server that has another address as well, with these arguments for the agents.
    pub fn with_two_addresses(arguments: &'static [&'static str]) -> Self {
        let mut lab = Lab::new().unwrap();
        let source = Source::control_plane(&mut lab).unwrap();
        let other = format!("addr add {OTHER_ADDRESS}/24 dev eth0\n");
        lab.namespace(CONTROL_PLANE).unwrap().ip(&other).unwrap();
        Self::start(lab, source, arguments)
    }

    fn start(lab: Lab, source: Source, agent_arguments: &'static [&'static str]) -> Self {
        let manifests = Manifests::hostnames().unwrap();
        let mut cluster = Cluster { agents: BTreeMap::new(), source, manifests, agent_arguments, lab };
        cluster.change(|_| ());
        for node in &NODES {
            cluster.start_agent(node);
        }
        cluster
    }

    /// As `ip link` shows it.
    fn with_xdp_mode(self, mode: &str) -> Self {
        for node in &NODES {
            let show = ["-n", self.lab.namespace(node.name).unwrap().name(), "link", "show", "eth0"];
            let output = Command::new("ip").args(show).output().unwrap();
            let text = String::from_utf8(output.stdout).unwrap();
            assert!(text.split_whitespace().any(|word| word == mode), "no {mode} on {}: {text}", node.name);
        }
        self
    }

    pub fn start_agent(&mut self, node: &'static Node) {
        let agent = Agent::start(&self.lab, node, &self.source, self.agent_arguments).unwrap();
        self.agents.insert(node.name, agent);
    }

    /// With other arguments than those of the cluster.
    pub fn start_agent_with(&mut self, node: &'static Node, arguments: &[&str]) {
        let agent = Agent::start(&self.lab, node, &self.source, arguments).unwrap();
        self.agents.insert(node.name, agent);
    }

    /// SIGKILL.
    pub fn kill_agent(&mut self, node: &Node) {
        self.agents.remove(node.name).expect("no agent runs there").kill();
    }

    /// SIGTERM.
    pub fn stop_agent(&mut self, node: &Node) {
        self.agents.remove(node.name).expect("no agent runs there").stop().unwrap();
    }

    pub fn agent_pid(&self, node: &Node) -> u32 {
        self.agents[node.name].process().pid()
    }

    /// All that an agent has written of itself.
    pub fn agent_log(&self, node: &Node) -> String {
        self.agents[node.name].log()
    }

    pub fn control_plane(&mut self) -> (&mut ControlPlane, &Lab) {
        match &mut self.source {
            Source::ControlPlane(control_plane) => (control_plane, &self.lab),
            Source::Directory(_) => panic!("this cluster has no control plane"),
        }
    }

    /// Changes the objects, and tells the source.
    pub fn change(&mut self, change: impl FnOnce(&mut Manifests)) {
        change(&mut self.manifests);
        self.source.publish(&self.lab, &self.manifests).unwrap();
    }

    /// Sends requests until it is told to stop.
    pub fn load(&self, host: &str, target: &str) -> Load {
        let options = Options { rate: Some(200), concurrency: 4, ..Options::to(target) };
        Load::start(&self.lab, host, &options).unwrap()
    }

    /// One connection, with a request on it every 20 ms.
    pub fn long_connection(&self, host: &str, target: &str) -> Load {
        let options = Options { rate: Some(50), keep_alive: true, ..Options::to(target) };
        Load::start(&self.lab, host, &options).unwrap()
    }

    /// No request fails, and each of these backends answers some, and no other.
    #[track_caller]
    pub fn expect_balanced(&self, host: &str, request: &Options, backends: &[&str]) {
        let request = Options { requests: Some(120), concurrency: 4, ..request.clone() };
        let tally = self.lab.tally(host, &request).unwrap();
        println!("{host} -> {}", request.target);
        assert_right(&tally, backends);
    }

    /// The request fails for this reason, and at once.
    #[track_caller]
    pub fn expect_failure(&self, host: &str, request: &Options, reason: &str) {
        for outcome in self.lab.request(host, &Options { requests: Some(5), ..request.clone() }).unwrap() {
            let Outcome { error, ms, .. } = outcome;
            assert_eq!(error.as_deref(), Some(reason), "{host} -> {}", request.target);
            // A second is when a client's kernel sends its next SYN.
            assert!(ms < 900.0, "refused, but only after {ms} ms");
        }
    }

    /// [`Cluster::expect_failure`], once the change before it is in force.
    #[track_caller]
    pub fn expect_failure_soon(&self, host: &str, request: &Options, reason: &str) {
        let one = Options { requests: Some(1), ..request.clone() };
        eventually(&format!("{host} -> {} fails", request.target), || {
            (self.lab.tally(host, &one).unwrap().failed() > 0).then_some(())
        });
        self.expect_failure(host, request, reason);
    }

    /// [`Cluster::expect_balanced`], once the change before it is in force.
    #[track_caller]
    pub fn expect_soon(&self, host: &str, target: &str, backends: &[&str]) {
        let request = Options { requests: Some(60), concurrency: 8, timeout_ms: 500, ..Options::to(target) };
        let mut last = None;
        let so = try_eventually(|| {
            let tally = last.insert(self.lab.tally(host, &request).unwrap());
            (tally.failed() == 0 && tally.names() == backends).then_some(())
        });
        assert!(so.is_some(), "{host} -> {target}: not {backends:?} after {PATIENCE:?}: {}", last.unwrap());
    }
}

impl Drop for Cluster {
    fn drop(&mut self) {
        if thread::panicking() {
            for (node, agent) in &self.agents {
                eprintln!("the agent on {node}: {}\n", agent.log_tail());
            }
        }
    }
}

/// None where the kernel has no links of this kind.
fn lab_with(network: Network) -> Option<Lab> {
    match Lab::with_network(network) {
        Err(error) if format!("{error:#}").contains("Unknown device type") => None,
        lab => Some(lab.unwrap()),
    }
}

/// What has to come about is waited for as long as the slowest machine may need. How fast it comes, `cargo xtask bench` tells.
pub const PATIENCE: Duration = Duration::from_secs(30);

/// What `is_so` gives as soon as it gives something.
#[track_caller]
pub fn eventually<T>(what: &str, is_so: impl FnMut() -> Option<T>) -> T {
    try_eventually(is_so).unwrap_or_else(|| panic!("{what}: not so after {PATIENCE:?}"))
}

fn try_eventually<T>(mut is_so: impl FnMut() -> Option<T>) -> Option<T> {
    let deadline = Instant::now() + PATIENCE;
    loop {
        let start = Instant::now();
        if let Some(value) = is_so() {
            return Some(value);
        }
        if start > deadline {
            return None;
        }
        thread::sleep(Duration::from_millis(10));
    }
}

/// No request of a load fails, and some time after the change before this, these backends and no other answer them.
#[track_caller]
pub fn becomes_right(load: &Load, backends: &[&str]) {
    const EACH: Duration = Duration::from_millis(700);
    eventually(&format!("all are answered by {backends:?}"), || {
        thread::sleep(EACH);
        let tally = load.tally();
        assert_eq!(tally.failed(), 0, "{tally}");
        (tally.names() == backends).then_some(())
    });
}

#[track_caller]
pub fn assert_right(tally: &Tally, backends: &[&str]) {
    assert!(tally.failed() == 0 && tally.names() == backends, "expected {backends:?} and no failure: {tally}");
}

pub fn all_backends() -> Vec<&'static str> {
    BACKENDS.iter().map(|pod| pod.name).collect()
}

/// [`http_get_path`] of `/`.
pub fn http_get(lab: &Lab, host: &str, address: &str) -> Option<String> {
    http_get_path(lab, host, address, "/")
}

/// The whole answer of an HTTP server to a GET; none where nobody answers.
pub fn http_get_path(lab: &Lab, host: &str, address: &str, path: &str) -> Option<String> {
    let address: SocketAddr = address.parse().unwrap();
    let get = || -> std::io::Result<String> {
        let mut stream = TcpStream::connect_timeout(&address, Duration::from_secs(1))?;
        stream.set_read_timeout(Some(Duration::from_secs(1)))?;
        stream.write_all(format!("GET {path} HTTP/1.1\r\nHost: node\r\nConnection: close\r\n\r\n").as_bytes())?;
        let mut answer = String::new();
        stream.read_to_string(&mut answer)?;
        Ok(answer)
    };
    lab.namespace(host).unwrap().inside(|| Ok(get().ok())).unwrap()
}

/// A ClusterIP Service, port 80, of these pods.
pub fn service(name: &str, cluster_ip: &str, pods: &[&str]) -> [Value; 2] {
    let endpoints: Vec<Value> = BACKENDS
        .iter()
        .filter(|pod| pods.contains(&pod.name))
        .map(|pod| {
            let mut endpoint = endpoint(&pod.v4().to_string(), pod.node());
            endpoint["targetRef"] = json!({ "kind": "Pod", "name": pod.name, "namespace": "default" });
            endpoint
        })
        .collect();
    service_of(name, cluster_ip, &endpoints)
}

/// One that is ready.
pub fn endpoint(address: &str, node: &Node) -> Value {
    json!({
        "addresses": [address],
        "conditions": { "ready": true, "serving": true, "terminating": false },
        "nodeName": node.name,
    })
}

/// A ClusterIP Service, port 80, of these endpoints.
pub fn service_of(name: &str, cluster_ip: &str, endpoints: &[Value]) -> [Value; 2] {
    let service = json!({
        "apiVersion": "v1", "kind": "Service", "metadata": { "name": name, "namespace": "default" },
        "spec": {
            "type": "ClusterIP", "clusterIP": cluster_ip, "clusterIPs": [cluster_ip],
            "ports": [{ "name": "http", "protocol": "TCP", "port": 80, "targetPort": 9376 }],
        },
    });
    let slice = json!({
        "apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice", "addressType": "IPv4",
        "metadata": {
            "name": format!("{name}-ipv4"), "namespace": "default", "labels": { "kubernetes.io/service-name": name },
        },
        "ports": [{ "name": "http", "protocol": "TCP", "port": 9376 }],
        "endpoints": endpoints,
    });
    [service, slice]
}
