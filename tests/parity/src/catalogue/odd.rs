//! Services that are no business of a Service proxy.
use serde_json::{Value, json};
use svc_lab::topology::{CLIENT, OUTSIDE};

use super::{A, Build, Scenario};
use crate::objects::{cluster_ip, external_ips, lay, ready, slices, with_node_port};
use crate::probe::{MIXED, To, probes};

const ASKING: &[&str] = &[CLIENT, A, OUTSIDE];

pub(super) const SCENARIOS: &[Build] = &[
    |n| {
        let spec = json!({ "clusterIP": "None", "clusterIPs": ["None"], "externalIPs": external_ips(n) });
        let objects = [vec![cluster_ip("headless", n, spec)], slices("headless", &[ready("a1")])].concat();
        Scenario::new("headless", objects, probes(n, ASKING, MIXED, &[To::ExternalIp]))
    },
    |n| {
        let mut service = cluster_ip("external-name", n, json!({ "externalIPs": external_ips(n) }));
        let fields = json!({
            "type": "ExternalName", "externalName": "example.org", "clusterIP": Value::Null, "clusterIPs": Value::Null,
            "ipFamilies": Value::Null, "ipFamilyPolicy": Value::Null,
        });
        lay(&mut service["spec"], fields);
        let objects = [vec![service], slices("external-name", &[ready("a1")])].concat();
        Scenario::new("external-name", objects, probes(n, ASKING, MIXED, &[To::ExternalIp]))
    },
    |n| {
        let mut service = with_node_port("other-proxy", n, json!({}));
        service["metadata"]["labels"] = json!({ "service.kubernetes.io/service-proxy-name": "other" });
        let objects = [vec![service], slices("other-proxy", &[ready("a1")])].concat();
        Scenario::new("other-proxy", objects, probes(n, ASKING, MIXED, &[To::ClusterIp, To::NodePort(A)]))
    },
    // The label on the slices alone.
    |n| {
        let mut slices = slices("other-proxy-slices", &[ready("a1")]);
        for slice in &mut slices {
            slice["metadata"]["labels"]["service.kubernetes.io/service-proxy-name"] = "other".into();
        }
        let objects = [vec![with_node_port("other-proxy-slices", n, json!({}))], slices].concat();
        Scenario::new(
            "other-proxy-slices",
            objects,
            probes(n, &[CLIENT, OUTSIDE], MIXED, &[To::ClusterIp, To::NodePort(A)]),
        )
    },
    |n| {
        let mut slices = slices("headless-slices", &[ready("a1")]);
        for slice in &mut slices {
            slice["metadata"]["labels"]["service.kubernetes.io/headless"] = "".into();
        }
        let objects = [vec![with_node_port("headless-slices", n, json!({}))], slices].concat();
        Scenario::new(
            "headless-slices",
            objects,
            probes(n, &[CLIENT, OUTSIDE], MIXED, &[To::ClusterIp, To::NodePort(A)]),
        )
    },
    // Of another Service, whatever their names say.
    |n| {
        let mut slices = slices("misnamed", &[ready("a1")]);
        for slice in &mut slices {
            slice["metadata"]["labels"]["kubernetes.io/service-name"] = "nobodys".into();
        }
        let objects = [vec![with_node_port("misnamed", n, json!({}))], slices].concat();
        Scenario::new("misnamed", objects, probes(n, &[CLIENT, OUTSIDE], MIXED, &[To::ClusterIp, To::NodePort(A)]))
    },
];
