//! What is compared: scenarios, each some objects and the probes sent while they are in force.
mod backends;
mod changes;
mod conflicts;
mod frontends;
mod odd;
mod policies;
mod topology;

use serde_json::Value;
use svc_lab::topology::{CLIENT, NODES, OUTSIDE};

use crate::probe::{Probe, To};

/// How the proxies are set.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub enum Setting {
    /// As they are by default.
    Default,
    /// NodePorts on the pod networks' side of the nodes only.
    NodePortsOnGateways,
}

impl Setting {
    pub const ALL: [Setting; 2] = [Setting::Default, Setting::NodePortsOnGateways];

    pub fn node_port_addresses(self) -> &'static [&'static str] {
        match self {
            Setting::Default => &[],
            Setting::NodePortsOnGateways => &["10.244.0.0/16", "fd00:10:244::/56"],
        }
    }
}

pub struct Scenario {
    pub name: &'static str,
    pub setting: Setting,
    /// In force one after the other; the last one's objects stay while other scenarios go on.
    pub steps: Vec<Step>,
}

pub struct Step {
    pub objects: Vec<Value>,
    pub probes: Vec<Probe>,
}

impl Scenario {
    fn new(name: &'static str, objects: impl IntoIterator<Item = Value>, probes: Vec<Probe>) -> Self {
        Scenario { name, setting: Setting::Default, steps: Vec::new() }.then(objects, probes)
    }

    fn then(mut self, objects: impl IntoIterator<Item = Value>, probes: Vec<Probe>) -> Self {
        self.steps.push(Step { objects: objects.into_iter().collect(), probes });
        self
    }

    fn with(self, setting: Setting) -> Self {
        Scenario { setting, ..self }
    }

    /// The rows' names, and their probes, of one step.
    pub fn rows(&self, step: usize) -> Vec<(String, &Probe)> {
        let place = if self.steps.len() == 1 { self.name.to_owned() } else { format!("{}.{}", self.name, step + 1) };
        let probes = self.steps.get(step).map(|step| step.probes.as_slice()).unwrap_or_default();
        probes.iter().map(|probe| (format!("{place}: {probe}"), probe)).collect()
    }

    /// What is in force at a step of the run.
    pub fn objects(&self, step: usize) -> &[Value] {
        &self.steps[step.min(self.steps.len() - 1)].objects
    }
}

/// Takes the number that its Service gets, and where it has another one, the number after [`SECOND`].
type Build = fn(u8) -> Scenario;

/// What the number of a scenario's second Service is more than the first one's.
const SECOND: u8 = 120;

pub fn all() -> Vec<Scenario> {
    let lists: [&[Build]; 7] = [
        backends::SCENARIOS,
        frontends::SCENARIOS,
        policies::SCENARIOS,
        topology::SCENARIOS,
        odd::SCENARIOS,
        changes::SCENARIOS,
        conflicts::SCENARIOS,
    ];
    lists.concat().into_iter().zip(1..SECOND).map(|(build, number)| build(number)).collect()
}

const A: &str = NODES[0].name;
const B: &str = NODES[1].name;
/// A pod of each node, of which a1 is a backend in most scenarios; the nodes; and a client outside.
const EVERYONE: &[&str] = &[CLIENT, "a1", "b1", A, B, OUTSIDE];
const NODE_PORTS: &[To] = &[To::NodePort(A), To::NodePort(B)];
const LOAD_BALANCERS: &[To] = &[To::LoadBalancer(A), To::LoadBalancer(B)];

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn every_row_has_a_name_of_its_own() {
        let mut names = BTreeSet::new();
        for scenario in all() {
            for step in 0..scenario.steps.len() {
                for (name, _) in scenario.rows(step) {
                    assert!(names.insert(name.clone()), "{name} stands there twice");
                }
            }
        }
        assert!(names.len() >= 250, "{} rows", names.len());
    }

    #[test]
    fn no_object_belongs_to_two_scenarios() {
        let mut owners = BTreeSet::new();
        for scenario in all() {
            let objects = scenario.steps.iter().flat_map(|step| &step.objects);
            let own: BTreeSet<_> = objects.map(svc_lab::manifests::identity).collect();
            for object in own {
                assert!(owners.insert(object.clone()), "{object:?} is in two scenarios");
            }
        }
    }
}
