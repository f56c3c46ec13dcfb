//! Laws of the way from events to the kernel, over random objects, kernels and faults.
use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::sync::{Arc, Mutex};

use ipnet::IpNet;
use proptest::prelude::*;
use proptest::sample::{Index, select, subsequence};
use svc_agent::cidrs::PodDetector;
use svc_agent::dataplane::State;
use svc_agent::dataplane::dump::dump;
use svc_agent::dataplane::fake::Fake;
use svc_agent::desired::Limits;
use svc_agent::object::{
    Condition, Endpoint, Family, Hints, Node, ObjectName, Policy, Protocol, Service, ServiceCidr, ServiceKind,
    ServicePort, Slice, SlicePort,
};
use svc_agent::plan::{NodePortAddresses, PortName};
use svc_agent::reconcile::{Config, Pace, Reconciler};
use svc_agent::source::{Event, Interfaces};
use svc_agent::status::Status;
use svc_common::Addr;
use svc_common::map::{
    FRONTEND_EXTERNAL_LOCAL, FRONTEND_INTERNAL_LOCAL, FRONTEND_KIND, FRONTEND_SOURCE_RANGES, SourceRangeKey,
    cluster_set, local_set,
};

const ROOM: Limits =
    Limits { services: 1_000, backends: 1_000, source_ranges: 1_000, frontends: 1_000, addresses: 1_000 };

fn config(limits: Limits) -> Config {
    Config {
        node_name: "a".to_owned(),
        nodeport_addresses: NodePortAddresses::All,
        pods: PodDetector::NodeCidr,
        masquerade_all: false,
        external_ips: true,
        take_over: false,
        limits,
        pace: Pace::default(),
    }
}

/// No source has spoken yet.
fn silent(kernel: Fake, limits: Limits) -> Reconciler<Fake> {
    Reconciler::new(config(limits), kernel, Arc::new(Status::default()))
}

/// Every source says that there is nothing.
fn nothing() -> [Event; 5] {
    [
        Event::Services(vec![]),
        Event::Slices(vec![]),
        Event::Node(None),
        Event::ServiceCidrs(vec![]),
        Event::Interfaces(Interfaces::default()),
    ]
}

fn reconciler(kernel: Fake, limits: Limits) -> Reconciler<Fake> {
    let mut reconciler = silent(kernel, limits);
    nothing().into_iter().for_each(|event| reconciler.take(event));
    reconciler
}

/// Tries until it goes through; the number of faults is finite.
fn settle(reconciler: &mut Reconciler<Fake>) {
    for _ in 0..100 {
        // A second time gives out the ids that the first one set free.
        if reconciler.reconcile().is_ok() && reconciler.reconcile().is_ok() {
            return;
        }
    }
    panic!("the fake never stopped failing");
}

fn ips(v4: &'static str, v6: &'static str) -> impl Strategy<Value = IpAddr> {
    (0..4u8, any::<bool>()).prop_map(move |(last, is_v4)| {
        let prefix = if is_v4 { v4 } else { v6 };
        format!("{prefix}{last}").parse().unwrap()
    })
}

fn names() -> impl Strategy<Value = ObjectName> {
    select(&["a", "b", "c", "d"][..]).prop_map(|name| ObjectName::new("default", name))
}

fn nets() -> impl Strategy<Value = IpNet> {
    select(&["192.0.2.0/24", "198.51.100.0/25", "10.0.0.0/8", "2001:db8::/32", "fd00::/8"][..])
        .prop_map(|text| text.parse().unwrap())
}

fn protocols() -> impl Strategy<Value = Protocol> {
    select(&[Protocol::Tcp, Protocol::Udp][..])
}

fn policies() -> impl Strategy<Value = Policy> {
    select(&[Policy::Cluster, Policy::Local][..])
}

prop_compose! {
    /// Few names, addresses and ports, so that Services get in each other's way.
    fn services()(
        name in names(),
        created in 0..3i64,
        kind in select(&[ServiceKind::Proxied, ServiceKind::Proxied, ServiceKind::Proxied, ServiceKind::Headless][..]),
        families in subsequence(Family::BOTH.to_vec(), 1..=2),
        cluster_ips in prop::collection::vec(ips("10.96.0.", "fd00:96::"), 0..3),
        external_ips in prop::collection::vec(ips("10.96.0.", "2001:db8::"), 0..3),
        load_balancer_ips in prop::collection::vec(ips("192.0.2.", "2001:db8::"), 0..2),
        source_ranges in prop::collection::vec(nets(), 0..3),
        ports in prop::collection::vec((select(&["", "x", "y"][..]), 1..4u16, protocols(), 0..3u16), 0..3),
        internal_policy in policies(),
        external_policy in policies(),
        affinity_seconds in select(&[0, 60][..]),
    ) -> Service {
        let ports = ports.into_iter().map(|(name, port, protocol, node_port)| {
            ServicePort { name: name.into(), port, protocol, node_port }
        });
        Service {
            name, uid: "".into(), created, kind, families, cluster_ips, external_ips, load_balancer_ips, source_ranges, ports: ports.collect(),
            internal_policy, external_policy, affinity_seconds, health_check_port: 0, faults: vec![],
        }
    }
}

prop_compose! {
    fn endpoints()(
        address in ips("10.1.0.", "fd00::"),
        node in select(&["a", "b"][..]),
        ready: bool,
        serving: bool,
        terminating: bool,
        zone in select(&["", "z1", "z2"][..]),
    ) -> Endpoint {
        let zone_hints = if zone.is_empty() { Box::default() } else { Box::from([zone.into()]) };
        let condition = Condition { ready, serving, terminating };
        Endpoint { address, node: Some(node.into()), condition, hints: Hints::new(zone_hints, Box::default()) }
    }
}

prop_compose! {
    fn slices()(
        name in select(&["s1", "s2", "s3", "s4", "s5"][..]),
        service in names(),
        ports in prop::collection::vec((select(&["", "x", "y"][..]), 1..3u16, protocols()), 0..3),
        endpoints in prop::collection::vec(endpoints(), 0..5),
    ) -> Slice {
        let ports =
            ports.into_iter().map(|(name, port, protocol)| SlicePort { name: name.into(), port, protocol }).collect();
        Slice { name: ObjectName::new("default", name), triggered: None, service: service.name, ports, endpoints, faults: vec![] }
    }
}

prop_compose! {
    fn nodes()(
        zone in select(&["z1", "z2"][..]),
        primary in prop::collection::vec(ips("10.96.0.", "fd00:96::"), 0..2),
        pod_cidrs in prop::collection::vec(nets(), 0..2),
    ) -> Node {
        Node { zone: Some(zone.into()), primary, pod_cidrs, eligible: true, ..Node::default() }
    }
}

prop_compose! {
    fn service_cidrs()(
        name in select(&["one", "two"][..]),
        cidrs in prop::collection::vec(nets(), 0..3),
    ) -> ServiceCidr {
        ServiceCidr { name: name.into(), cidrs, faults: vec![] }
    }
}

fn events() -> impl Strategy<Value = Event> {
    prop_oneof![
        6 => services().prop_map(Event::PutService),
        2 => names().prop_map(Event::DeleteService),
        6 => slices().prop_map(Event::PutSlice),
        2 => slices().prop_map(|slice| Event::DeleteSlice(slice.name)),
        1 => prop::collection::vec(services(), 0..4).prop_map(Event::Services),
        1 => prop::collection::vec(slices(), 0..4).prop_map(Event::Slices),
        1 => prop::option::of(nodes()).prop_map(Event::Node),
        1 => prop::collection::vec(service_cidrs(), 0..2).prop_map(Event::ServiceCidrs),
        1 => service_cidrs().prop_map(Event::PutServiceCidr),
        1 => service_cidrs().prop_map(|cidr| Event::DeleteServiceCidr(cidr.name)),
        1 => prop::collection::vec(ips("10.96.0.", "fd00:96::"), 0..3).prop_map(|addresses| Event::Interfaces(Interfaces { addresses, ..Interfaces::default() })),
    ]
}

/// Bursts of events, each followed by a reconciliation.
fn histories() -> impl Strategy<Value = Vec<Vec<Event>>> {
    prop::collection::vec(prop::collection::vec(events(), 1..6), 1..8)
}

/// Runs a history to its end, faults and all.
fn play(reconciler: &mut Reconciler<Fake>, history: &[Vec<Event>]) {
    for burst in history {
        for event in burst {
            reconciler.take(event.clone());
        }
        settle(reconciler);
    }
}

/// The state that the same objects lead to on an empty kernel.
fn from_scratch(history: &[Vec<Event>]) -> State {
    let mut reconciler = reconciler(Fake::default(), ROOM);
    for event in history.iter().flatten() {
        reconciler.take(event.clone());
    }
    settle(&mut reconciler);
    reconciler.dataplane().state.clone()
}

/// What a packet that arrives now relies on.
fn assert_whole(state: &State, when: &str) {
    for (key, frontend) in &state.frontends {
        assert!(state.services.contains_key(&frontend.service), "{when}: {key:?} has no service");
        assert!(state.sets.contains_key(&cluster_set(frontend.service)), "{when}: {key:?} has no set");
        if frontend.flags & (FRONTEND_INTERNAL_LOCAL | FRONTEND_EXTERNAL_LOCAL) != 0 {
            assert!(state.sets.contains_key(&local_set(frontend.service)), "{when}: {key:?} has no local set");
        }
        if frontend.flags & FRONTEND_SOURCE_RANGES != 0 {
            let mut ranges = state.source_ranges.iter().map(|range| range.service);
            assert!(ranges.any(|service| service == frontend.service), "{when}: {key:?} admits nobody");
        }
        if frontend.flags & FRONTEND_KIND == 0 {
            assert!(state.addresses.contains_key(&key.addr), "{when}: {key:?} is no known ClusterIP");
        }
    }
    for (id, set) in &state.sets {
        assert!(set.is_sorted_by(|one, other| one.id < other.id), "{when}: set {id} is not in the order of its ids");
        for slot in &**set {
            let backend = state.backends.get(&slot.id).unwrap_or_else(|| panic!("{when}: set {id} has {slot:?}"));
            assert_eq!((backend.addr, backend.port, backend.live), (slot.addr, slot.port, 1), "{when}: set {id}");
        }
    }
}

fn name(state: &State, service: u32) -> Option<PortName> {
    state.port_name(service)
}

fn ranges(state: &State, service: u32) -> BTreeSet<SourceRangeKey> {
    state.source_ranges.iter().filter(|range| range.service == service).copied().collect()
}

/// Takes one entry out of a table.
fn break_one(kernel: &mut State, table: u8, index: Index) {
    fn lose<K: Ord + Clone, V>(map: &mut BTreeMap<K, V>, index: Index) {
        if !map.is_empty() {
            let key = map.keys().nth(index.index(map.len())).cloned().unwrap();
            map.remove(&key);
        }
    }
    match table {
        0 => lose(&mut kernel.frontends, index),
        1 => lose(&mut kernel.sets, index),
        2 => lose(&mut kernel.backends, index),
        3 => lose(&mut kernel.addresses, index),
        4 => lose(&mut kernel.cidrs, index),
        5 if !kernel.source_ranges.is_empty() => {
            let key = *index.get(&kernel.source_ranges.iter().copied().collect::<Vec<_>>());
            kernel.source_ranges.remove(&key);
        }
        6 => lose(&mut kernel.uplinks, index),
        7 => kernel.config.flags ^= 2,
        _ => lose(&mut kernel.services, index),
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(512))]

    #[test]
    fn the_kernel_ends_up_with_the_plan_made_from_scratch_whatever_fails(
        history in histories(),
        faults in prop::collection::vec(0..40usize, 0..6),
        read_faults in 0..3usize,
    ) {
        let mut reconciler = reconciler(Fake { faults, read_faults, ..Fake::default() }, ROOM);
        play(&mut reconciler, &history);
        let kernel = &reconciler.dataplane().state;
        prop_assert_eq!(Some(kernel), reconciler.wanted());
        prop_assert_eq!(dump(kernel), dump(&from_scratch(&history)));
    }

    #[test]
    fn at_no_moment_does_anything_point_at_what_is_not_there(
        history in histories(),
        faults in prop::collection::vec(0..40usize, 0..6),
    ) {
        let mut reconciler = reconciler(Fake { faults, ..Fake::default() }, ROOM);
        play(&mut reconciler, &history);
        let mut state = State::default();
        for (step, op) in reconciler.dataplane().log.iter().enumerate() {
            state.carry_out(op);
            assert_whole(&state, &format!("after step {step}, {op:?}"));
        }
    }

    #[test]
    fn no_source_is_admitted_that_neither_the_old_nor_the_new_ranges_admit(history in histories()) {
        let mut reconciler = reconciler(Fake::default(), ROOM);
        let mut state = State::default();
        for burst in &history {
            let begin = reconciler.dataplane().log.len();
            for event in burst {
                reconciler.take(event.clone());
            }
            settle(&mut reconciler);
            let (old, new) = (state.clone(), reconciler.dataplane().state.clone());
            for op in &reconciler.dataplane().log[begin..] {
                state.carry_out(op);
                for (key, frontend) in &state.frontends {
                    let open = |state: &State| {
                        state.frontends.get(key).is_some_and(|frontend| frontend.flags & FRONTEND_SOURCE_RANGES == 0)
                    };
                    prop_assert!(!open(&state) || open(&old) || open(&new), "{:?} admits all after {:?}", key, op);
                    let known: BTreeSet<SourceRangeKey> = [&old, &new]
                        .into_iter()
                        .filter(|other| name(other, frontend.service) == name(&state, frontend.service))
                        .flat_map(|other| ranges(other, frontend.service))
                        .collect();
                    let now = ranges(&state, frontend.service);
                    prop_assert!(now.is_subset(&known), "{:?} admits {:?} after {:?}", key, now, op);
                }
            }
        }
    }

    #[test]
    fn a_restart_over_the_same_objects_writes_nothing(history in histories()) {
        let mut first = reconciler(Fake::default(), ROOM);
        play(&mut first, &history);
        let kernel = first.dataplane().state.clone();
        let mut second = reconciler(Fake::with_state(kernel.clone()), ROOM);
        for event in history.iter().flatten() {
            second.take(event.clone());
        }
        settle(&mut second);
        prop_assert_eq!(&second.dataplane().log, &[]);
    }

    #[test]
    fn service_ports_without_local_endpoints_are_counted_as_from_scratch(history in histories()) {
        let count = |bursts: &[Vec<Event>]| {
            let status = Arc::new(Status::default());
            let mut reconciler = Reconciler::new(config(ROOM), Fake::default(), Arc::clone(&status));
            nothing().into_iter().for_each(|event| reconciler.take(event));
            for burst in bursts {
                burst.iter().for_each(|event| reconciler.take(event.clone()));
                reconciler.reconcile().unwrap();
            }
            status.progress().last.unwrap().1.without_local
        };
        let at_once: Vec<Event> = history.iter().flatten().cloned().collect();
        prop_assert_eq!(count(&history), count(&[at_once]));
    }

    #[test]
    fn a_resync_repairs_exactly_what_was_broken_and_the_next_one_finds_nothing(
        history in histories(),
        damage in prop::collection::vec((0..9u8, any::<Index>()), 0..10),
        foreign in 1..4u32,
    ) {
        let kernel = Arc::new(Mutex::new(Fake::default()));
        let mut reconciler = Reconciler::new(config(ROOM), Arc::clone(&kernel), Arc::new(Status::default()));
        nothing().into_iter().chain(history.into_iter().flatten()).for_each(|event| reconciler.take(event));
        reconciler.reconcile().unwrap();
        let right = kernel.lock().unwrap().state.clone();
        {
            let mut kernel = kernel.lock().unwrap();
            for (table, index) in damage {
                break_one(&mut kernel.state, table, index);
            }
            kernel.state.addresses.insert(Addr::v4(foreign), foreign);
        }
        prop_assert!(reconciler.resync().unwrap() >= 1);
        prop_assert_eq!(&kernel.lock().unwrap().state, &right);
        let written = kernel.lock().unwrap().log.len();
        prop_assert_eq!(reconciler.resync().unwrap(), 0);
        prop_assert_eq!(kernel.lock().unwrap().log.len(), written);
    }

    #[test]
    fn a_resync_that_may_not_read_backend_sets_leaves_them_alone_and_looks_after_the_rest(history in histories()) {
        let kernel = Arc::new(Mutex::new(Fake { hides_sets: true, ..Fake::default() }));
        let mut reconciler = Reconciler::new(config(ROOM), Arc::clone(&kernel), Arc::new(Status::default()));
        nothing().into_iter().chain(history.into_iter().flatten()).for_each(|event| reconciler.take(event));
        reconciler.reconcile().unwrap();
        let right = kernel.lock().unwrap().state.clone();
        kernel.lock().unwrap().state.addresses.insert(Addr::v4(1), 1);
        prop_assert_eq!(reconciler.resync().unwrap(), 1);
        prop_assert_eq!(&kernel.lock().unwrap().state, &right);
    }

    #[test]
    fn a_restart_leads_any_kernel_to_the_plan(
        before in histories(),
        after in histories(),
        damage in prop::collection::vec((0..9u8, any::<Index>()), 0..10),
    ) {
        let mut first = reconciler(Fake::default(), ROOM);
        play(&mut first, &before);
        let mut kernel = first.dataplane().state.clone();
        for (table, index) in damage {
            break_one(&mut kernel, table, index);
        }
        let mut second = reconciler(Fake::with_state(kernel), ROOM);
        play(&mut second, &after);
        let kernel = &second.dataplane().state;
        prop_assert_eq!(Some(kernel), second.wanted());
        prop_assert_eq!(dump(kernel), dump(&from_scratch(&after)));
    }

    #[test]
    fn no_map_overflows_and_no_id_leaks_where_room_is_scarce(
        history in histories(),
        services in 1..6u32,
        backends in 1..6u32,
        frontends in 1..8u32,
        addresses in 1..6u32,
    ) {
        let limits = Limits { services, backends, source_ranges: 1_000, frontends, addresses };
        let mut reconciler = reconciler(Fake::default(), limits);
        play(&mut reconciler, &history);
        let mut state = State::default();
        for (step, op) in reconciler.dataplane().log.iter().enumerate() {
            state.carry_out(op);
            assert_whole(&state, &format!("after step {step}, {op:?}"));
            prop_assert!(state.frontends.len() <= frontends as usize, "after step {}", step);
            // The node's own have room beside them.
            prop_assert!(state.addresses.len() <= addresses as usize + 4, "after step {}", step);
        }
        prop_assert!(state.services.keys().all(|id| (1..=services).contains(id)));
        prop_assert!(state.backends.keys().all(|id| (1..=backends).contains(id)));

        reconciler.take(Event::Services(vec![]));
        settle(&mut reconciler);
        let empty = &reconciler.dataplane().state;
        prop_assert!(empty.frontends.is_empty() && empty.sets.is_empty() && empty.services.is_empty());
        prop_assert!(empty.backends.values().all(|backend| backend.live == 0));

        // Every id can be had again.
        let ip = |text: &str| -> IpAddr { text.parse().unwrap() };
        let service = Service {
            name: ObjectName::new("default", "last"),
            uid: "".into(),
            created: 0,
            kind: ServiceKind::Proxied,
            families: vec![Family::V4],
            cluster_ips: vec![ip("10.96.9.9")],
            external_ips: vec![],
            load_balancer_ips: vec![],
            source_ranges: vec![],
            ports: vec![ServicePort { name: "".into(), port: 80, protocol: Protocol::Tcp, node_port: 0 }],
            internal_policy: Policy::Cluster,
            external_policy: Policy::Cluster,
            affinity_seconds: 0,
            health_check_port: 0,
            faults: vec![],
        };
        let endpoint = |last: u32| Endpoint {
            address: ip(&format!("10.9.9.{last}")),
            node: None,
            condition: Condition::READY,
            hints: None,
        };
        reconciler.take(Event::PutSlice(Slice {
            name: ObjectName::new("default", "last"),
            triggered: None,
            service: "last".into(),
            ports: vec![SlicePort { name: "".into(), port: 80, protocol: Protocol::Tcp }],
            endpoints: (1..=backends).map(endpoint).collect(),
            faults: vec![],
        }));
        reconciler.take(Event::PutService(service));
        settle(&mut reconciler);
        let sets: Vec<usize> = reconciler.dataplane().state.sets.values().map(|set| set.len()).collect();
        prop_assert_eq!(sets, [backends as usize]);
    }

    #[test]
    fn an_endpoint_change_touches_only_its_own_services_entries(history in histories(), slice in slices()) {
        let mut reconciler = reconciler(Fake::default(), ROOM);
        play(&mut reconciler, &history);
        let before = reconciler.dataplane().log.len();
        let listed = |event: &Event| match event {
            Event::PutSlice(slice) => vec![slice.clone()],
            Event::Slices(list) => list.clone(),
            _ => vec![],
        };
        let old = history.iter().flatten().flat_map(listed).filter(|old| old.name == slice.name);
        let old: Vec<_> = old.map(|old| old.service).collect();
        let service = Arc::clone(&slice.service);
        reconciler.take(Event::PutSlice(slice));
        settle(&mut reconciler);
        let kernel = reconciler.dataplane();
        for op in &kernel.log[before..] {
            match op {
                svc_agent::dataplane::Op::PutSet(id, _) => {
                    let name = kernel.state.port_name(id / 2).unwrap().service;
                    prop_assert!(name.name == service || old.contains(&name.name));
                }
                svc_agent::dataplane::Op::PutBackend(..) => {}
                other => prop_assert!(false, "{:?}", other),
            }
        }
    }
}

#[test]
fn nothing_is_written_before_every_source_has_spoken() {
    let mut kernel = Fake::default();
    kernel.state.addresses.insert(Addr::v4(1), 1);
    let mut reconciler = silent(kernel, ROOM);
    for event in [
        Event::Services(vec![]),
        Event::Slices(vec![]),
        Event::ServiceCidrs(vec![]),
        Event::Interfaces(Interfaces::default()),
    ] {
        reconciler.take(event);
        assert_eq!(reconciler.reconcile().unwrap(), 0);
        assert_eq!(reconciler.dataplane().log, []);
    }
    reconciler.take(Event::Node(None));
    assert_eq!(reconciler.reconcile().unwrap(), 2, "the address goes, and the node has none of its own");
}
