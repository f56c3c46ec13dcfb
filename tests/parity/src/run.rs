//! The catalogue, run beside one proxy in a lab of its own.
use std::collections::BTreeMap;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use serde_json::{Value, json};
use svc_lab::client::Options;
use svc_lab::manifests::Manifests;
use svc_lab::probe::Question;
use svc_lab::source::Source;
use svc_lab::topology::{Lab, NODES, OUTSIDE};

use crate::catalogue::{Scenario, Setting};
use crate::objects::{SERVICE_PORT, cluster_ip, cluster_ips, nodes, ready, routes, slices};
use crate::probe::Probe;
use crate::proxy::{Proxies, Proxy};
use crate::verdict::Verdict;

/// By the row's name.
pub type Verdicts = BTreeMap<String, Verdict>;

/// For an answer from the last Service that was written.
const PATIENCE: Duration = Duration::from_secs(30);
/// For what a proxy does after its rules are in force: kube-proxy forgets stale UDP flows then.
const SETTLE: Duration = Duration::from_secs(1);
/// No scenario's Service has this number or a higher one.
const CANARIES: u8 = 240;

/// Where the objects come from.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Objects {
    ApiServer,
    /// svc only.
    Directory,
}

struct Run {
    /// Before the hosts that they run on.
    proxies: Option<Proxies>,
    source: Source,
    canaries: std::ops::RangeFrom<u8>,
    lab: Lab,
}

/// Sends every scenario's probes.
///
/// # Errors
/// Where the lab, the API server or the proxy does not work; that a probe is not answered is no error.
pub fn run(proxy: Proxy, from: Objects, scenarios: &[Scenario]) -> Result<Verdicts> {
    let mut lab = Lab::new()?;
    lab.start_server(OUTSIDE)?;
    let mut lines = String::new();
    for (network, node) in routes() {
        let via = if network.contains(':') { NODES[node].v6().to_string() } else { NODES[node].v4().to_string() };
        lines.push_str(&format!("route add {network} via {via}\n"));
    }
    // For a backend outside that a pod talks to.
    for node in &NODES {
        let [v4, v6] = node.pod_cidrs();
        lines.push_str(&format!("route add {v4} via {}\nroute add {v6} via {}\n", node.v4(), node.v6()));
    }
    lab.namespace(OUTSIDE)?.ip(&lines)?;
    // A kernel tells a client only a few times a second that nobody is there, by default.
    for node in &NODES {
        lab.namespace(node.name)?.sysctl(&[
            ("ipv4/icmp_ratelimit", "0"),
            ("ipv6/icmp/ratelimit", "0"),
            ("ipv4/icmp_msgs_per_sec", "1000000"),
            ("ipv4/icmp_msgs_burst", "1000000"),
        ])?;
    }
    let source = match from {
        Objects::ApiServer => Source::control_plane(&mut lab)?,
        Objects::Directory => Source::directory(&lab),
    };
    let mut run = Run { proxies: None, source, canaries: CANARIES.., lab };
    let mut verdicts = Verdicts::new();
    for setting in Setting::ALL {
        let of_setting: Vec<&Scenario> = scenarios.iter().filter(|scenario| scenario.setting == setting).collect();
        run.scenarios(proxy, setting, &of_setting, &mut verdicts)?;
    }
    Ok(verdicts)
}

impl Run {
    fn scenarios(
        &mut self,
        proxy: Proxy,
        setting: Setting,
        scenarios: &[&Scenario],
        verdicts: &mut Verdicts,
    ) -> Result<()> {
        let steps = scenarios.iter().map(|scenario| scenario.steps.len()).max().unwrap_or(0);
        for step in 0..steps {
            let objects = scenarios.iter().flat_map(|scenario| scenario.objects(step));
            let mut manifests = Manifests::default();
            nodes().iter().chain(objects).for_each(|object| manifests.put(object.clone()));
            self.source.publish(&self.lab, &manifests)?;
            if step == 0 {
                self.proxies = None;
                self.proxies = Some(Proxies::start(proxy, &self.lab, &self.source, setting)?);
            }
            self.wait_until_in_force(manifests)?;
            let rows = scenarios.iter().flat_map(|scenario| scenario.rows(step)).collect::<Vec<_>>();
            verdicts.extend(self.probe(proxy, step, &rows)?);
        }
        Ok(())
    }

    /// A Service written after all the others is answered on each node: what came before is known there, too.
    fn wait_until_in_force(&mut self, mut manifests: Manifests) -> Result<()> {
        let number = self.canaries.next().context("too many steps")?;
        let name = format!("canary-{number}");
        let canary: Vec<Value> = [vec![cluster_ip(&name, number, json!({}))], slices(&name, &[ready("a1")])].concat();
        canary.into_iter().for_each(|object| manifests.put(object));
        self.source.publish(&self.lab, &manifests)?;
        let deadline = Instant::now() + PATIENCE;
        let [v4, v6] = cluster_ips(number);
        for node in &NODES {
            for target in [format!("http://{v4}:{SERVICE_PORT}/"), format!("http://[{v6}]:{SERVICE_PORT}/")] {
                let request = Options { requests: Some(1), timeout_ms: 300, ..Options::to(&target) };
                while self.lab.tally(node.name, &request)?.answered() == 0 {
                    if Instant::now() > deadline {
                        let logs = self.proxies.as_ref().map(Proxies::log_tails).unwrap_or_default();
                        bail!("{} does not serve {target} after {} s: {logs}", node.name, PATIENCE.as_secs());
                    }
                    thread::sleep(Duration::from_millis(50));
                }
            }
        }
        thread::sleep(SETTLE);
        Ok(())
    }

    /// All hosts ask at once.
    fn probe(&self, proxy: Proxy, step: usize, rows: &[(String, &Probe)]) -> Result<Verdicts> {
        let mut by_host: BTreeMap<&str, Vec<&(String, &Probe)>> = BTreeMap::new();
        for row in rows {
            by_host.entry(row.1.from).or_default().push(row);
        }
        thread::scope(|scope| {
            let ask = |host: &str, rows: &[&(String, &Probe)]| -> Result<Verdicts> {
                let questions: Vec<Question> = rows.iter().map(|(_, probe)| probe.question(step)).collect();
                let answers = self.lab.probe(host, &questions)?;
                let verdict = |((name, probe), answers): (&(String, &Probe), _)| {
                    (name.clone(), Verdict::of(proxy, probe, answers))
                };
                Ok(rows.iter().copied().zip(&answers).map(verdict).collect())
            };
            let asking: Vec<_> = by_host.iter().map(|(host, rows)| scope.spawn(move || ask(host, rows))).collect();
            let mut verdicts = Verdicts::new();
            for host in asking {
                verdicts.extend(host.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))?);
            }
            Ok(verdicts)
        })
    }
}
