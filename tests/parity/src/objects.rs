//! The catalogue's objects, as kubectl would send them. Every Service has a number, from which its addresses follow.
use serde_json::{Map, Value, json};
use svc_lab::topology::{BACKENDS, NODES, OUTSIDE, PORT, addresses};

/// The Services' port, for TCP and for UDP.
pub const SERVICE_PORT: u16 = 80;
/// The nodes' zones, in the nodes' order.
pub const ZONES: [&str; 2] = ["zone-a", "zone-b"];

/// The addresses of a Service: IPv4, then IPv6.
pub fn cluster_ips(number: u8) -> [String; 2] {
    [format!("10.96.1.{number}"), format!("fd00:10:96::1{number:02x}")]
}

/// One of a load balancer's addresses, which the network routes to this node.
pub fn load_balancer_ips(node: &str, number: u8) -> [String; 2] {
    if node == NODES[0].name {
        [format!("192.0.2.{number}"), format!("2001:db8:a::{number:x}")]
    } else {
        [format!("198.51.100.{number}"), format!("2001:db8:b::{number:x}")]
    }
}

/// Routed to the first node.
pub fn external_ips(number: u8) -> [String; 2] {
    [format!("203.0.113.{number}"), format!("2001:db8:e::{number:x}")]
}

/// What a client outside needs to find all of these: networks and the node that they are behind.
pub fn routes() -> [(&'static str, usize); 6] {
    [
        ("192.0.2.0/24", 0),
        ("2001:db8:a::/64", 0),
        ("198.51.100.0/24", 1),
        ("2001:db8:b::/64", 1),
        ("203.0.113.0/24", 0),
        ("2001:db8:e::/64", 0),
    ]
}

pub fn node_port(number: u8) -> u16 {
    30_100 + u16::from(number)
}

/// A Service with ClusterIPs of both families, for TCP and UDP; `spec` is laid over it.
pub fn cluster_ip(name: &str, number: u8, spec: Value) -> Value {
    let port = |name: &str, protocol: &str| json!({ "name": name, "protocol": protocol, "port": SERVICE_PORT, "targetPort": PORT });
    let mut service = json!({
        "apiVersion": "v1", "kind": "Service", "metadata": { "name": name, "namespace": "default" },
        "spec": {
            "type": "ClusterIP", "clusterIP": cluster_ips(number)[0], "clusterIPs": cluster_ips(number),
            "ipFamilyPolicy": "PreferDualStack", "ipFamilies": ["IPv4", "IPv6"],
            "ports": [port("http", "TCP"), port("echo", "UDP")],
        },
    });
    lay(&mut service["spec"], spec);
    service
}

/// [`cluster_ip`] with a NodePort, the same number for both protocols.
pub fn with_node_port(name: &str, number: u8, spec: Value) -> Value {
    let mut service = cluster_ip(name, number, json!({ "type": "NodePort" }));
    for port in service["spec"]["ports"].as_array_mut().into_iter().flatten() {
        port["nodePort"] = node_port(number).into();
    }
    lay(&mut service["spec"], spec);
    service
}

/// [`with_node_port`] with an address behind each node; `mode` is the addresses' ipMode.
pub fn load_balancer(name: &str, number: u8, mode: &str, spec: Value) -> Value {
    let mut service = with_node_port(name, number, json!({ "type": "LoadBalancer" }));
    lay(&mut service["spec"], spec);
    // The API server would choose one of the catalogue's node ports.
    if service["spec"]["externalTrafficPolicy"] == "Local" {
        service["spec"]["healthCheckNodePort"] = (node_port(number) + 1000).into();
    }
    let ips = NODES.iter().flat_map(|node| load_balancer_ips(node.name, number));
    let ingress: Vec<Value> = ips.map(|ip| json!({ "ip": ip, "ipMode": mode })).collect();
    service["status"] = json!({ "loadBalancer": { "ingress": ingress } });
    service
}

/// Replaces fields; null takes one away.
pub fn lay(spec: &mut Value, fields: Value) {
    let Value::Object(fields) = fields else { return };
    let Value::Object(spec) = spec else { return };
    for (name, value) in fields {
        match value {
            Value::Null => spec.remove(&name),
            value => spec.insert(name, value),
        };
    }
}

/// A backend in a slice.
#[derive(Clone, Copy)]
pub struct Endpoint {
    host: &'static str,
    /// ready, serving, terminating.
    conditions: (bool, bool, bool),
    zone: &'static str,
    node: &'static str,
}

/// A pod that is ready, or a host outside.
pub fn ready(host: &'static str) -> Endpoint {
    Endpoint { host, conditions: (true, true, false), zone: "", node: "" }
}

impl Endpoint {
    pub fn conditions(self, ready: bool, serving: bool, terminating: bool) -> Self {
        Endpoint { conditions: (ready, serving, terminating), ..self }
    }

    pub fn unready(self) -> Self {
        self.conditions(false, false, false)
    }

    /// On its way out, and still answering.
    pub fn terminating(self) -> Self {
        self.conditions(false, true, true)
    }

    pub fn for_zone(self, zone: &'static str) -> Self {
        Endpoint { zone, ..self }
    }

    pub fn for_node(self, node: &'static str) -> Self {
        Endpoint { node, ..self }
    }

    fn object(&self, family: usize) -> Value {
        let (ready, serving, terminating) = self.conditions;
        let address = addresses(self.host).expect("the lab has this host")[family];
        let mut object = json!({
            "addresses": [address],
            "conditions": { "ready": ready, "serving": serving, "terminating": terminating },
        });
        if self.host != OUTSIDE {
            let pod = BACKENDS.iter().find(|pod| pod.name == self.host).expect("a backend is a pod or outside");
            object["nodeName"] = pod.node().name.into();
        }
        let mut hints = Map::new();
        for (field, name) in [("forZones", self.zone), ("forNodes", self.node)] {
            if !name.is_empty() {
                hints.insert(field.to_owned(), json!([{ "name": name }]));
            }
        }
        if !hints.is_empty() {
            object["hints"] = hints.into();
        }
        object
    }
}

/// The slices of a Service, one a family, with both of its ports.
pub fn slices(service: &str, endpoints: &[Endpoint]) -> Vec<Value> {
    let port = |name: &str, protocol: &str| json!({ "name": name, "protocol": protocol, "port": PORT });
    slices_with_ports(service, "", &json!([port("http", "TCP"), port("echo", "UDP")]), endpoints)
}

/// Slices whose names end in `suffix`, so that a Service may have several.
pub fn slices_with_ports(service: &str, suffix: &str, ports: &Value, endpoints: &[Endpoint]) -> Vec<Value> {
    let slice = |(family, kind): (usize, &str)| {
        let endpoints: Vec<Value> = endpoints.iter().map(|endpoint| endpoint.object(family)).collect();
        json!({
            "apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice", "addressType": kind,
            "metadata": {
                "name": format!("{service}{suffix}-{}", kind.to_lowercase()), "namespace": "default",
                "labels": { "kubernetes.io/service-name": service },
            },
            "ports": ports, "endpoints": endpoints,
        })
    };
    ["IPv4", "IPv6"].into_iter().enumerate().map(slice).collect()
}

/// The lab's nodes, each in a zone of its own.
pub fn nodes() -> Vec<Value> {
    let node = |(node, zone): (&svc_lab::topology::Node, &str)| {
        json!({
            "apiVersion": "v1", "kind": "Node",
            "metadata": { "name": node.name, "labels": { "topology.kubernetes.io/zone": zone } },
            "spec": { "podCIDR": node.pod_cidrs()[0], "podCIDRs": node.pod_cidrs() },
            "status": { "addresses": [
                { "type": "Hostname", "address": node.name },
                { "type": "InternalIP", "address": node.v4() },
                { "type": "InternalIP", "address": node.v6() },
            ] },
        })
    };
    NODES.iter().zip(ZONES).map(node).collect()
}
