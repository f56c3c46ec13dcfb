//! From two looks at the kernel: how much there is, and how much it was a second in between.
use std::collections::{BTreeMap, HashSet};
use std::time::Duration;

use svc_common::Reason;
use svc_common::map::Counter;

use crate::inspect::Flow;

/// One look.
#[derive(Clone, Debug, Default)]
pub struct Sample {
    pub flows: Vec<Flow>,
    pub counters: Vec<(Reason, Counter)>,
    /// By namespace and name.
    pub services: BTreeMap<String, Counts>,
    /// By backend id; none where bytes are not counted.
    pub carried: Option<BTreeMap<u32, Carried>>,
}

/// What went to a backend and came from it, so far.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Carried {
    /// Namespace and name.
    pub service: String,
    /// Protocol, address and port.
    pub backend: String,
    pub bytes: u64,
}

/// Of a Service's ports together, each family for itself.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Counts {
    pub backends: usize,
    /// Flows opened and sockets pointed at a backend, so far.
    pub connections: u64,
}

/// What a service or a backend has.
#[derive(Clone, Copy, PartialEq, Debug, Default)]
pub struct Load {
    pub flows: usize,
    /// Of these, with packets both ways and no end.
    pub established: usize,
    /// Of a service those of sockets as well, which are no flows.
    pub new_a_second: f64,
    /// Both ways; none where bytes are not counted.
    pub bytes_a_second: Option<f64>,
}

/// What all packets came to, a second.
#[derive(Clone, Copy, PartialEq, Debug, Default)]
pub struct Traffic {
    /// Translated, both ways.
    pub packets: f64,
    pub bytes: f64,
    /// Sockets pointed at backends: none of their packets is counted.
    pub sockets: f64,
    /// Rejected, dropped and refused.
    pub refused: f64,
}

/// What a flow is told by from look to look.
type Key = (String, String, String);

fn key(flow: &Flow) -> Key {
    (flow.protocol.clone(), flow.client.clone(), flow.frontend.clone())
}

/// Which flows were there the last time, and what was counted.
#[derive(Debug, Default)]
pub struct Rates {
    seen: HashSet<Key>,
    counted: Option<(u64, u64, u64, u64)>,
    connections: BTreeMap<String, u64>,
    carried: BTreeMap<u32, u64>,
}

/// A look with what it takes two of.
#[derive(Clone, Debug, Default)]
pub struct Picture {
    pub flows: Vec<(Flow, bool)>,
    /// By namespace and name: how many backends, and how many connections a second.
    pub services: BTreeMap<String, (usize, f64)>,
    /// Of each service and backend of it: bytes a second both ways; none where they are not counted.
    pub carried: Option<BTreeMap<(String, String), f64>>,
    pub traffic: Traffic,
    /// Between this look and the last one; none at the first.
    pub elapsed: Option<Duration>,
}

impl Rates {
    /// `elapsed`: since the last one.
    pub fn next(&mut self, sample: Sample, elapsed: Duration) -> Picture {
        let first = self.counted.is_none();
        let counted = totals(&sample.counters);
        // A counter that has gone back was made anew.
        let rate = |now: u64, before: u64| now.saturating_sub(before) as f64 / elapsed.as_secs_f64().max(0.001);
        let services = sample.services.iter().map(|(name, counts)| {
            let connections = self.connections.get(name).map_or(0.0, |before| rate(counts.connections, *before));
            (name.clone(), (counts.backends, connections))
        });
        let services = services.collect();
        self.connections = sample.services.into_iter().map(|(name, counts)| (name, counts.connections)).collect();
        let carried = sample.carried.map(|carried| {
            let bytes = carried.iter().map(|(id, carried)| (*id, carried.bytes)).collect();
            let before = std::mem::replace(&mut self.carried, bytes);
            let mut rates = BTreeMap::new();
            for (id, Carried { service, backend, bytes }) in carried {
                // What has no count yet begins at 0, but for the first look.
                let before = before.get(&id).copied().unwrap_or(if first { bytes } else { 0 });
                *rates.entry((service, backend)).or_insert(0.0) += rate(bytes, before);
            }
            rates
        });
        let traffic = self.counted.map_or_else(Traffic::default, |before| Traffic {
            packets: rate(counted.0, before.0),
            bytes: rate(counted.1, before.1),
            sockets: rate(counted.2, before.2),
            refused: rate(counted.3, before.3),
        });
        let keys: HashSet<Key> = sample.flows.iter().map(key).collect();
        let flows = sample.flows.into_iter().map(|flow| {
            let is_new = !first && !self.seen.contains(&key(&flow));
            (flow, is_new)
        });
        let flows = flows.collect();
        (self.seen, self.counted) = (keys, Some(counted));
        Picture { flows, services, carried, traffic, elapsed: (!first).then_some(elapsed) }
    }
}

/// Translated packets and bytes, sockets, and refusals.
fn totals(counters: &[(Reason, Counter)]) -> (u64, u64, u64, u64) {
    let mut totals = (0, 0, 0, 0);
    for (reason, counter) in counters {
        match reason {
            Reason::FlowHit | Reason::Reply => {
                totals.0 += counter.packets;
                totals.1 += counter.bytes;
            }
            Reason::SocketConnected | Reason::SocketDatagram => totals.2 += counter.packets,
            // The same as no_backend and unknown_port, which are counted beside it.
            Reason::SocketRefused => {}
            Reason::NotService | Reason::FlowOpened => {}
            Reason::Truncated | Reason::Unsupported | Reason::FragmentUnknown | Reason::FragmentKept => {}
            _ => totals.3 += counter.packets,
        }
    }
    totals
}

impl Picture {
    /// What the flows that `of` picks come to, by the name that it gives them.
    pub fn loads(&self, of: impl Fn(&Flow) -> Option<String>) -> BTreeMap<String, Load> {
        let mut loads: BTreeMap<String, Load> = BTreeMap::new();
        for (flow, is_new) in &self.flows {
            let Some(name) = of(flow) else { continue };
            let load = loads.entry(name).or_default();
            load.flows += 1;
            load.established += usize::from(flow.state == "established");
            if let Some(elapsed) = self.elapsed.filter(|_| *is_new) {
                load.new_a_second += 1.0 / elapsed.as_secs_f64().max(0.001);
            }
        }
        loads
    }
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    pub(in crate::top) fn flow(service: &str, client: &str, backend: &str) -> Flow {
        Flow {
            service: Some(service.to_owned()),
            port_name: None,
            protocol: "TCP".to_owned(),
            client: client.to_owned(),
            frontend: "10.96.0.1:80".to_owned(),
            backend: backend.to_owned(),
            source: None,
            state: "established",
            idle_seconds: 1,
            backend_id: 1,
        }
    }

    fn sample(flows: &[Flow], packets: u64) -> Sample {
        let counters = vec![
            (Reason::FlowHit, Counter { packets, bytes: packets * 100 }),
            (Reason::NoBackend, Counter { packets: 3, bytes: 0 }),
            (Reason::SocketRefused, Counter { packets: 3, bytes: 0 }),
        ];
        let counts = Counts { backends: 2, connections: packets / 10 };
        let services = [("default/web".to_owned(), counts)].into();
        Sample { flows: flows.to_vec(), counters, services, carried: None }
    }

    const TWO_SECONDS: Duration = Duration::from_secs(2);

    #[test]
    fn rates_take_two_looks() {
        let mut rates = Rates::default();
        let old = flow("default/web", "192.0.2.1:1", "10.1.0.1:80");
        let first = rates.next(sample(std::slice::from_ref(&old), 100), TWO_SECONDS);
        assert_eq!((first.traffic, first.elapsed), (Traffic::default(), None));
        let by_service = |picture: &Picture| picture.loads(|flow| flow.service.clone());
        assert_eq!(
            by_service(&first)["default/web"].new_a_second,
            0.0,
            "the first look knows no flow, and none is new"
        );
        let new = flow("default/web", "192.0.2.1:2", "10.1.0.1:80");
        let second = rates.next(sample(&[old, new], 140), TWO_SECONDS);
        assert_eq!(second.traffic, Traffic { packets: 20.0, bytes: 2000.0, sockets: 0.0, refused: 0.0 });
        let load = Load { flows: 2, established: 2, new_a_second: 0.5, bytes_a_second: None };
        assert_eq!(by_service(&second)["default/web"], load);
        assert_eq!((first.services["default/web"], second.services["default/web"]), ((2, 0.0), (2, 2.0)));
    }

    #[test]
    fn bytes_a_second_take_two_looks_and_a_new_backend_begins_at_none() {
        let carried = |id: u32, backend: &str, bytes: u64| {
            (id, Carried { service: "default/web".to_owned(), backend: backend.to_owned(), bytes })
        };
        let look = |carried: &[(u32, Carried)]| Sample {
            carried: Some(carried.iter().cloned().collect()),
            ..Sample::default()
        };
        let of = |backend: &str| ("default/web".to_owned(), backend.to_owned());
        let mut rates = Rates::default();
        let first = rates.next(look(&[carried(1, "TCP 10.1.0.1:80", 5000)]), TWO_SECONDS);
        assert_eq!(first.carried, Some([(of("TCP 10.1.0.1:80"), 0.0)].into()));
        let second = look(&[carried(1, "TCP 10.1.0.1:80", 6000), carried(2, "TCP 10.1.0.2:80", 400)]);
        let second = rates.next(second, TWO_SECONDS);
        assert_eq!(second.carried, Some([(of("TCP 10.1.0.1:80"), 500.0), (of("TCP 10.1.0.2:80"), 200.0)].into()));
        assert_eq!(rates.next(Sample::default(), TWO_SECONDS).carried, None);
    }

    #[test]
    fn counters_that_were_made_anew_are_no_negative_rate() {
        let mut rates = Rates::default();
        rates.next(sample(&[], 100), TWO_SECONDS);
        assert_eq!(rates.next(sample(&[], 10), TWO_SECONDS).traffic.packets, 0.0);
    }
}
