//! Which addresses a Service has.
use serde_json::json;
use svc_lab::topology::{CLIENT, OUTSIDE};

use super::{A, B, Build, EVERYONE, LOAD_BALANCERS, SECOND, Scenario, Setting};
use crate::objects::{cluster_ip, cluster_ips, external_ips, load_balancer, ready, slices, with_node_port};
use crate::probe::{ALL, MIXED, Over, To, probes};

pub(super) const SCENARIOS: &[Build] = &[
    |n| {
        let objects = [vec![cluster_ip("unknown-port", n, json!({}))], slices("unknown-port", &[ready("a1")])].concat();
        Scenario::new("unknown-port", objects, probes(n, EVERYONE, ALL, &[To::UnknownPort]))
    },
    |n| Scenario::new("unallocated", [], probes(n, &[CLIENT, A, OUTSIDE], ALL, &[To::ClusterIp])),
    |n| {
        let objects =
            [vec![with_node_port("localhost", n, json!({}))], slices("localhost", &[ready("a1"), ready("b1")])];
        Scenario::new("localhost", objects.concat(), probes(n, &[A, B], ALL, &[To::Localhost]))
    },
    |n| {
        let objects = [vec![load_balancer("vip", n, "VIP", json!({}))], slices("vip", &[ready("a1"), ready("b1")])];
        Scenario::new("vip", objects.concat(), probes(n, EVERYONE, ALL, LOAD_BALANCERS))
    },
    |n| {
        let objects =
            [vec![load_balancer("vip-port", n, "VIP", json!({}))], slices("vip-port", &[ready("a1")])].concat();
        Scenario::new(
            "vip-port",
            objects,
            probes(n, &[CLIENT, A], MIXED, &[To::ClusterIp, To::NodePort(A), To::NodePort(B)]),
        )
    },
    // Its addresses lead to a real load balancer, and are none of the nodes' business.
    |n| {
        let objects =
            [vec![load_balancer("proxy-mode", n, "Proxy", json!({}))], slices("proxy-mode", &[ready("a1")])].concat();
        let to = [To::LoadBalancer(A), To::ClusterIp, To::NodePort(A)];
        Scenario::new("proxy-mode", objects, probes(n, &[CLIENT, A, OUTSIDE], MIXED, &to))
    },
    |n| {
        let objects = [vec![load_balancer("vip-empty", n, "VIP", json!({}))], slices("vip-empty", &[])].concat();
        Scenario::new("vip-empty", objects, probes(n, &[CLIENT, A, OUTSIDE], ALL, LOAD_BALANCERS))
    },
    |n| {
        let spec = json!({ "externalIPs": external_ips(n) });
        let objects = [vec![cluster_ip("external", n, spec)], slices("external", &[ready("a1"), ready("b1")])].concat();
        Scenario::new("external", objects, probes(n, EVERYONE, ALL, &[To::ExternalIp]))
    },
    |n| {
        let spec = json!({ "externalIPs": external_ips(n) });
        let objects = [vec![cluster_ip("external-empty", n, spec)], slices("external-empty", &[])].concat();
        Scenario::new("external-empty", objects, probes(n, &[CLIENT, A, OUTSIDE], MIXED, &[To::ExternalIp]))
    },
    |n| {
        let spec = json!({
            "ipFamilyPolicy": "SingleStack", "ipFamilies": ["IPv4"],
            "clusterIPs": [cluster_ips(n)[0]], "externalIPs": external_ips(n),
        });
        let objects =
            [vec![with_node_port("v4-only", n, spec)], slices("v4-only", &[ready("a1"), ready("b1")])].concat();
        let to = [To::ClusterIp, To::NodePort(A), To::ExternalIp];
        Scenario::new("v4-only", objects, probes(n, &[CLIENT, A, OUTSIDE], &[Over::Tcp4, Over::Tcp6], &to))
    },
    |n| {
        let spec = json!({
            "ipFamilyPolicy": "SingleStack", "ipFamilies": ["IPv6"],
            "clusterIP": cluster_ips(n)[1], "clusterIPs": [cluster_ips(n)[1]],
        });
        let objects =
            [vec![with_node_port("v6-only", n, spec)], slices("v6-only", &[ready("a1"), ready("b1")])].concat();
        let over = [Over::Tcp4, Over::Tcp6, Over::Udp6];
        Scenario::new("v6-only", objects, probes(n, &[CLIENT, A, OUTSIDE], &over, &[To::ClusterIp, To::NodePort(B)]))
    },
    // Where NodePorts answer: by default, and where the proxies are told.
    |n| {
        let objects =
            [vec![with_node_port("gateway", n, json!({}))], slices("gateway", &[ready("a1"), ready("b1")])].concat();
        let to = [To::Gateway(A), To::NodePort(A)];
        Scenario::new("gateway", objects, probes(n, &[CLIENT, A], ALL, &to))
    },
    |n| {
        let name = "node-ports-on-gateways";
        let objects = [vec![with_node_port(name, n, json!({}))], slices(name, &[ready("a1"), ready("b1")])].concat();
        let to = [To::Gateway(A), To::NodePort(A), To::NodePort(B), To::ClusterIp];
        Scenario::new(name, objects, probes(n, &[CLIENT, A, OUTSIDE], MIXED, &to)).with(Setting::NodePortsOnGateways)
    },
    |n| {
        let name = "localhost-excluded";
        let objects = [vec![with_node_port(name, n, json!({}))], slices(name, &[ready("a1")])].concat();
        Scenario::new(name, objects, probes(n, &[A], MIXED, &[To::Localhost])).with(Setting::NodePortsOnGateways)
    },
    // Two Services with one external address, each with ports of its own.
    |n| {
        let other = n + SECOND;
        let shared = |name, number, port: u16, protocol| {
            let ports = json!([{ "name": "http", "protocol": protocol, "port": port, "targetPort": 9376 }]);
            cluster_ip(name, number, json!({ "externalIPs": external_ips(n), "ports": ports }))
        };
        let slice_ports = |protocol| json!([{ "name": "http", "protocol": protocol, "port": 9376 }]);
        let objects = [
            vec![shared("shared-tcp", n, 80, "TCP"), shared("shared-udp", other, 80, "UDP")],
            crate::objects::slices_with_ports("shared-tcp", "", &slice_ports("TCP"), &[ready("a1")]),
            crate::objects::slices_with_ports("shared-udp", "", &slice_ports("UDP"), &[ready("b1")]),
        ];
        Scenario::new("shared-address", objects.concat(), probes(n, &[CLIENT, A, OUTSIDE], ALL, &[To::ExternalIp]))
    },
];
