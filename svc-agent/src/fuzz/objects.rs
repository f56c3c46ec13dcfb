//! Objects, as files of manifests and as the API's JSON have them.
use std::collections::BTreeSet;
use std::sync::{Arc, LazyLock};

use proptest::prelude::*;
use serde_json::{Value, json};
use svc_common::map::{cluster_set, local_set};

use super::campaign;
use super::mutation::{mutations, names, texts};
use crate::cidrs::PodDetector;
use crate::dataplane::State;
use crate::dataplane::dump::{dump, key_text};
use crate::dataplane::fake::Fake;
use crate::desired::Limits;
use crate::object::ObjectName;
use crate::plan::NodePortAddresses;
use crate::reconcile::{Config, Pace, Reconciler};
use crate::source::manifests::{Fault, Objects, parse};
use crate::source::{Event, Interfaces};
use crate::status::Status;

/// Of every kind, with every field that counts.
const OBJECTS: &str = "
apiVersion: v1
kind: Service
metadata: {name: web, namespace: default, uid: u-1, creationTimestamp: '2024-01-01T00:00:00Z', labels: {app: web}}
spec:
  type: LoadBalancer
  clusterIP: 10.96.0.10
  clusterIPs: [10.96.0.10, 'fd00:96::10']
  ipFamilies: [IPv4, IPv6]
  ipFamilyPolicy: RequireDualStack
  externalIPs: [192.0.2.1, '2001:db8::1']
  loadBalancerSourceRanges: [198.51.100.0/24, '2001:db8:1::/48']
  externalTrafficPolicy: Local
  internalTrafficPolicy: Cluster
  healthCheckNodePort: 32100
  sessionAffinity: ClientIP
  sessionAffinityConfig: {clientIP: {timeoutSeconds: 600}}
  publishNotReadyAddresses: false
  ports:
    - {name: http, protocol: TCP, port: 80, targetPort: 8080, nodePort: 30080}
    - {name: dns, protocol: UDP, port: 53, targetPort: dns, nodePort: 30053}
status: {loadBalancer: {ingress: [{ip: 192.0.2.2, ipMode: VIP}, {ip: '2001:db8::2', ipMode: Proxy}]}}
---
apiVersion: discovery.k8s.io/v1
kind: EndpointSlice
metadata:
  name: web-v4
  namespace: default
  labels: {kubernetes.io/service-name: web}
  annotations: {endpoints.kubernetes.io/last-change-trigger-time: '2024-01-01T00:00:00Z'}
addressType: IPv4
ports: [{name: http, protocol: TCP, port: 8080}, {name: dns, protocol: UDP, port: 5353}]
endpoints:
  - addresses: [10.244.1.5]
    conditions: {ready: true, serving: true, terminating: false}
    nodeName: node-a
    zone: z1
    hints: {forZones: [{name: z1}], forNodes: [{name: node-a}]}
  - {addresses: [10.244.2.5], conditions: {ready: false, serving: true, terminating: true}, nodeName: node-b}
---
apiVersion: discovery.k8s.io/v1
kind: EndpointSlice
metadata: {name: web-v6, namespace: default, labels: {kubernetes.io/service-name: web}}
addressType: IPv6
ports: [{name: http, protocol: TCP, port: 8080}]
endpoints: [{addresses: ['fd00:244::5'], nodeName: node-a}]
---
apiVersion: v1
kind: Endpoints
metadata: {name: legacy, namespace: default}
subsets:
  - addresses: [{ip: 10.244.1.7, nodeName: node-a}]
    notReadyAddresses: [{ip: 10.244.1.8}]
    ports: [{name: http, port: 8080, protocol: TCP}]
---
apiVersion: v1
kind: Node
metadata: {name: node-a, labels: {topology.kubernetes.io/zone: z1}}
spec: {podCIDR: 10.244.1.0/24, podCIDRs: [10.244.1.0/24, 'fd00:244:1::/64'], taints: [{key: x, effect: NoSchedule}]}
status: {addresses: [{type: InternalIP, address: 192.0.2.11}, {type: Hostname, address: node-a}]}
---
apiVersion: networking.k8s.io/v1
kind: ServiceCIDR
metadata: {name: kubernetes}
spec: {cidrs: [10.96.0.0/16, 'fd00:96::/112']}
";

/// A Service that has nothing in common with the others.
const WITNESS: &str = "
apiVersion: v1
kind: Service
metadata: {name: witness, namespace: other, creationTimestamp: '2025-06-01T00:00:00Z'}
spec:
  type: NodePort
  clusterIPs: [10.97.7.7, 'fd00:97::7']
  ipFamilies: [IPv4, IPv6]
  externalIPs: [203.0.113.7]
  externalTrafficPolicy: Local
  ports: [{name: http, port: 8088, nodePort: 31777}]
---
apiVersion: discovery.k8s.io/v1
kind: EndpointSlice
metadata: {name: witness-1, namespace: other, labels: {kubernetes.io/service-name: witness}}
addressType: IPv4
ports: [{name: http, port: 9090}]
endpoints: [{addresses: [10.250.1.7], nodeName: node-a}, {addresses: [10.250.2.7], nodeName: node-b}]
---
apiVersion: discovery.k8s.io/v1
kind: EndpointSlice
metadata: {name: witness-2, namespace: other, labels: {kubernetes.io/service-name: witness}}
addressType: IPv6
ports: [{name: http, port: 9090}]
endpoints: [{addresses: ['fd00:250::7'], nodeName: node-a}]
";

fn documents() -> Value {
    serde_saphyr::from_multiple::<Value>(OBJECTS).unwrap().into()
}

/// As a file of several documents, and as one List, which is read in the way of the API's JSON.
fn texts_of(documents: &Value) -> [String; 2] {
    let all: Vec<&Value> = documents.as_array().into_iter().flatten().collect();
    // JSON is YAML, and whatever a text holds, it is read as what it is.
    let separate: Vec<String> = all.iter().map(ToString::to_string).collect();
    [separate.join("\n---\n"), json!({ "apiVersion": "v1", "kind": "List", "items": all }).to_string()]
}

fn reconciler() -> Reconciler<Fake> {
    const ROOM: u32 = 10_000;
    let config = Config {
        node_name: "node-a".to_owned(),
        nodeport_addresses: NodePortAddresses::All,
        pods: PodDetector::NodeCidr,
        masquerade_all: false,
        external_ips: true,
        take_over: false,
        limits: Limits { services: ROOM, backends: ROOM, source_ranges: ROOM, frontends: ROOM, addresses: ROOM },
        pace: Pace::default(),
    };
    Reconciler::new(config, Fake::default(), Arc::new(Status::default()))
}

fn give(reconciler: &mut Reconciler<Fake>, objects: Objects) {
    for event in [
        Event::Services(objects.services),
        Event::Slices(objects.slices),
        Event::Node(objects.nodes.into_iter().next()),
        Event::ServiceCidrs(objects.service_cidrs),
        Event::Interfaces(Interfaces { addresses: vec!["192.0.2.11".parse().unwrap()], ..Interfaces::default() }),
    ] {
        reconciler.take(event);
    }
    reconciler.reconcile().unwrap();
}

fn with_witness(mut objects: Objects) -> Objects {
    let (witness, _) = parse(WITNESS).unwrap();
    objects.services.extend(witness.services);
    objects.slices.extend(witness.slices);
    objects
}

/// Each of the witness's addresses with all that its clients get there.
fn witness(state: &State) -> BTreeSet<String> {
    let is_its =
        |id: &u32| state.port_name(*id).is_some_and(|name| name.service == ObjectName::new("other", "witness"));
    let mut rows = BTreeSet::new();
    for (key, frontend) in state.frontends.iter().filter(|(_, frontend)| is_its(&frontend.service)) {
        let sets = [cluster_set(frontend.service), local_set(frontend.service)].map(|set| {
            state
                .backend_set(set)
                .iter()
                .map(|slot| format!("{}:{}", slot.addr, u16::from_be(slot.port)))
                .collect::<BTreeSet<_>>()
        });
        rows.insert(format!("{} {:x} {} {sets:?}", key_text(key), frontend.flags, frontend.affinity_seconds));
    }
    rows
}

/// What the witness gets alone, and all maps then.
static ALONE: LazyLock<(BTreeSet<String>, String)> = LazyLock::new(|| {
    let mut alone = reconciler();
    give(&mut alone, with_witness(Objects::default()));
    let state = &alone.dataplane().state;
    assert_eq!(witness(state).len(), 5, "{:?}", witness(state));
    (witness(state), dump(state))
});

/// All that the agent makes of a file: the witness beside it gets what it would get alone, and nothing stays behind.
fn take(text: &str) -> Result<(), Fault> {
    let (objects, ignored) = parse(text)?;
    assert!(ignored.iter().all(|fault| fault.line > 0), "{ignored:?}");
    let (expected, maps) = &*ALONE;
    let mut together = reconciler();
    give(&mut together, objects.clone());
    give(&mut together, with_witness(objects));
    assert_eq!(witness(&together.dataplane().state), *expected);
    give(&mut together, with_witness(Objects::default()));
    assert_eq!(dump(&together.dataplane().state), *maps);
    Ok(())
}

#[test]
fn the_objects_that_are_changed_are_right_ones() {
    for text in texts_of(&documents()) {
        let (objects, ignored) = parse(&text).unwrap();
        assert_eq!((objects.services.len(), objects.slices.len(), ignored.len()), (1, 3, 0));
        assert!(objects.services[0].faults.is_empty() && objects.slices.iter().all(|slice| slice.faults.is_empty()));
        take(&text).unwrap();
    }
}

#[test]
fn objects_with_one_change_cost_no_other_service_and_the_error_names_the_field() {
    campaign("--objects", &mutations(), |mutation| {
        let mut documents = documents();
        let ways = mutation.apply(&mut documents);
        for text in texts_of(&documents) {
            let Err(fault) = take(&text) else { continue };
            prop_assert!(fault.line > 0, "{fault}");
            let fault = fault.to_string();
            prop_assert!(!fault.contains('\n'), "more than a line: {fault}");
            let fields = ways.iter().flatten().filter(|name| name.parse::<usize>().is_err());
            // With none of them it is a document as a whole that has changed.
            let named = fields.clone().count() == 0 || fields.into_iter().any(|field| names(&fault, field));
            prop_assert!(named, "{ways:?} is not named: {fault}");
        }
        Ok(())
    });
}

#[test]
fn objects_with_many_changes_cost_no_other_service() {
    campaign("--objects", &prop::collection::vec(mutations(), 2..10), |mutations| {
        let mut documents = documents();
        mutations.iter().for_each(|mutation| drop(mutation.apply(&mut documents)));
        for text in texts_of(&documents) {
            let _ = take(&text);
        }
        Ok(())
    });
}

#[test]
fn objects_of_any_bytes_cost_no_other_service() {
    campaign("--objects", &texts(OBJECTS.to_owned()), |text| {
        let _ = take(&text);
        Ok(())
    });
}
