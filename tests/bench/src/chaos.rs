//! Bad days under steady requests, from a pod to a ClusterIP and from outside to a NodePort: new connections all the time, and
//! a few that stay.
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result};
use kube::api::{DeleteParams, ListParams, Patch, PatchParams};
use serde_json::{Value, json};
use svc_lab::agent::Agent;
use svc_lab::client::Options;
use svc_lab::control_plane::api;
use svc_lab::load::Load;
use svc_lab::manifests::Manifests;
use svc_lab::source::Source;
use svc_lab::topology::{BACKENDS, CLIENT, Lab, NODES, OUTSIDE};
use svc_tests::cluster::endpoint;

use crate::Effort;
use crate::figure::Figure;
use crate::scale::others;

/// Of examples/hostnames.
const CLUSTER_IP: &str = "http://10.96.0.80/";
/// The first node's.
const NODE_PORT: &str = "http://172.31.0.11:30080/";
const SLICES: [&str; 2] = ["hostnames-ipv4", "hostnames-nodeport-ipv4"];
/// Of those that make new connections, a second.
const RATE: u32 = 150;
const STAYING: usize = 4;

struct World {
    source: Source,
    agents: Vec<Option<Agent>>,
    /// Those that make a connection for each request.
    new: Vec<Load>,
    staying: Vec<Load>,
    lab: Lab,
}

pub(crate) fn rows(effort: Effort, show: &mut dyn FnMut(Figure)) -> Result<()> {
    let (changes, seconds, services) = if effort.quick { (1_000, 10, 500) } else { (10_000, 60, 5_000) };
    let mut world = World::start(services)?;
    world.settle(show, &format!("{changes} endpoint changes"), |world| world.change(changes))?;
    world.settle(show, &format!("an agent killed every second, {seconds} s"), |world| world.kill(seconds))?;
    world.settle(show, &format!("the API server away, {seconds} s"), |world| {
        let Source::ControlPlane(control_plane) = &mut world.source else { unreachable!("it is started with one") };
        control_plane.kill_api_server();
        thread::sleep(Duration::from_secs(seconds));
        control_plane.start_api_server(&world.lab)
    })?;
    world.settle(show, &format!("{services} other Services deleted at once"), World::delete_others)
}

impl World {
    fn start(services: u32) -> Result<Self> {
        let mut lab = Lab::new()?;
        let mut source = Source::control_plane(&mut lab)?;
        source.publish(&lab, &Manifests::hostnames()?)?;
        let objects: Vec<Value> = (0..services).flat_map(|number| others(number, 4)).collect();
        source.api_server()?.create(&lab, &objects)?;
        let start = |node| Agent::start(&lab, node, &source, &[]).map(Some);
        let agents = NODES.iter().map(start).collect::<Result<_>>()?;
        let mut world = World { source, agents, new: Vec::new(), staying: Vec::new(), lab };
        for (host, target) in [(CLIENT, CLUSTER_IP), (OUTSIDE, NODE_PORT)] {
            let options = Options { rate: Some(RATE), concurrency: 2, ..Options::to(target) };
            world.new.push(Load::start(&world.lab, host, &options)?);
            let options = Options { rate: Some(20), keep_alive: true, ..Options::to(target) };
            for _ in 0..STAYING {
                world.staying.push(Load::start(&world.lab, host, &options)?);
            }
        }
        thread::sleep(Duration::from_secs(1));
        Ok(world)
    }

    /// What became of the requests meanwhile, and in the second after.
    fn settle(
        &mut self,
        show: &mut dyn FnMut(Figure),
        what: &str,
        happen: impl FnOnce(&mut Self) -> Result<()>,
    ) -> Result<()> {
        println!("  {what} ...");
        let begin = Instant::now();
        happen(self).with_context(|| what.to_owned())?;
        thread::sleep(Duration::from_secs(1));
        let mut figure = Figure::new("P12", what.to_owned(), "");
        figure.add("seconds", begin.elapsed().as_secs_f64());
        for (name, loads) in [("new connections", &self.new), ("requests on old ones", &self.staying)] {
            let tallies: Vec<_> = loads.iter().map(Load::tally).collect();
            let failed = tallies.iter().map(|tally| tally.failed()).sum::<u32>();
            let answered = tallies.iter().map(|tally| tally.answered()).sum::<u32>();
            tallies.iter().filter(|tally| tally.failed() > 0).for_each(|tally| println!("    {tally}"));
            figure.add(name, answered.into());
            figure.add(&format!("{name}: failed"), failed.into());
        }
        show(figure);
        Ok(())
    }

    /// Of both Services, as fast as the API server takes them; one backend is always ready.
    fn change(&mut self, count: u32) -> Result<()> {
        let control_plane = self.source.api_server()?;
        control_plane.with_client(&self.lab, async |client| {
            for number in 0..count {
                // Each of the sets in turn, the empty one left out.
                let set = 1 + number / 2 % 15;
                let chosen = BACKENDS.iter().enumerate().filter(|(index, _)| set >> index & 1 == 1);
                let endpoints: Vec<Value> =
                    chosen.map(|(_, pod)| endpoint(&pod.v4().to_string(), pod.node())).collect();
                let name = SLICES[number as usize % SLICES.len()];
                let slice = json!({
                    "apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice", "metadata": { "namespace": "default" },
                });
                let patch = Patch::Merge(json!({ "endpoints": endpoints }));
                api(&client, &slice)?.patch(name, &PatchParams::default(), &patch).await?;
            }
            Ok(())
        })
    }

    fn kill(&mut self, seconds: u64) -> Result<()> {
        for second in 0..seconds {
            let index = second as usize % NODES.len();
            let begin = Instant::now();
            self.agents[index].take().context("an agent runs there")?.kill();
            self.agents[index] = Some(Agent::start(&self.lab, &NODES[index], &self.source, &[])?);
            thread::sleep(Duration::from_secs(1).saturating_sub(begin.elapsed()));
        }
        Ok(())
    }

    fn delete_others(&mut self) -> Result<()> {
        let control_plane = self.source.api_server()?;
        control_plane.with_client(&self.lab, async |client| {
            for (version, kind) in [("v1", "Service"), ("discovery.k8s.io/v1", "EndpointSlice")] {
                let object = json!({ "apiVersion": version, "kind": kind, "metadata": { "namespace": "default" } });
                let which = ListParams::default().labels("bench=other");
                api(&client, &object)?.delete_collection(&DeleteParams::default(), &which).await?;
            }
            Ok(())
        })
    }
}
