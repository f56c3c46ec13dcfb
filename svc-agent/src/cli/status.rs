//! `svc-agent status`: what is attached, how full the maps are, what was counted.
use std::collections::BTreeSet;
use std::fmt::Write as _;
use std::net::{Ipv4Addr, SocketAddr};
use std::path::Path;

use k8s_openapi::jiff::Timestamp;
use serde::Serialize;
use svc_common::Reason;
use svc_common::map::Counter;

use super::print::{self, Format, Inspect, Row, or_dash, yes_no};
use crate::dataplane::State;
use crate::inspect::agent;
use crate::inspect::details::{Details, Program, degraded};
use crate::inspect::{FlowTable, Hook, Pins, Size};
use crate::kube_proxy_config::{HEALTHZ_PORT, METRICS_PORT};

#[derive(clap::Args, Debug)]
pub struct Args {
    /// With --verbose: where the running agent serves /healthz.
    #[arg(long, value_name = "ADDRESS", default_value_t = (Ipv4Addr::LOCALHOST, HEALTHZ_PORT).into())]
    healthz_bind_address: SocketAddr,

    /// With --verbose: where the running agent serves /metrics.
    #[arg(long, value_name = "ADDRESS", default_value_t = (Ipv4Addr::LOCALHOST, METRICS_PORT).into())]
    metrics_bind_address: SocketAddr,

    #[command(flatten)]
    inspect: Inspect,
}

impl Args {
    /// Of the agent with these flags of `run`.
    pub(super) fn of(bpffs: &Path, healthz: Option<SocketAddr>, metrics: Option<SocketAddr>) -> Self {
        let local = |port| SocketAddr::from((Ipv4Addr::LOCALHOST, port));
        Args {
            healthz_bind_address: healthz.unwrap_or_else(|| local(HEALTHZ_PORT)),
            metrics_bind_address: metrics.unwrap_or_else(|| local(METRICS_PORT)),
            inspect: Inspect { bpffs: bpffs.to_owned(), output: Format::Json },
        }
    }
}

#[derive(Clone, PartialEq, Debug, Serialize)]
#[serde(rename_all = "camelCase")]
struct Report<'a> {
    bpffs: &'a Path,
    services: usize,
    service_ports: usize,
    backends: usize,
    flow_table: FlowTable,
    hooks: Vec<Hook>,
    maps: Vec<Size>,
    /// Without those that are zero.
    counters: Vec<Count>,
    /// What does not work, or soon will not, and why.
    degraded: Vec<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    details: Option<Details>,
}

#[derive(Clone, PartialEq, Eq, Debug, Serialize)]
#[serde(rename_all = "camelCase")]
struct Count {
    reason: &'static str,
    packets: u64,
    bytes: u64,
    description: &'static str,
}

impl Row for Hook {
    const HEADER: &'static [&'static str] = &["HOOK", "ATTACHED", "BY", "LINK", "PROGRAM"];

    fn cells(&self) -> Vec<String> {
        let attached = yes_no(self.attached);
        vec![self.name.clone(), attached, self.by.to_owned(), or_dash(self.link_id), or_dash(self.program_id)]
    }
}

impl Row for Size {
    const HEADER: &'static [&'static str] = &["MAP", "ENTRIES", "SIZE", "USE"];

    fn cells(&self) -> Vec<String> {
        let used = percent(self.entries, self.max_entries);
        vec![self.map.to_owned(), self.entries.to_string(), self.max_entries.to_string(), used]
    }
}

impl Row for Count {
    const HEADER: &'static [&'static str] = &["REASON", "PACKETS", "BYTES", "DESCRIPTION"];

    fn cells(&self) -> Vec<String> {
        let description = self.description.to_owned();
        vec![self.reason.to_owned(), self.packets.to_string(), self.bytes.to_string(), description]
    }
}

impl Row for Program {
    const HEADER: &'static [&'static str] = &["PROGRAM", "NAME", "TAG", "VERIFIED", "LOADED", "HOOKS"];

    fn cells(&self) -> Vec<String> {
        vec![
            self.id.to_string(),
            self.name.clone(),
            self.tag.clone(),
            or_dash(self.verified_instructions),
            or_dash(self.loaded_at.and_then(|seconds| time(seconds as f64))),
            self.hooks.join(" "),
        ]
    }
}

/// # Errors
/// Where the pins cannot be read.
pub fn run(args: &Args, verbose: bool) -> anyhow::Result<()> {
    let report = gather(args, verbose)?;
    match args.inspect.output {
        Format::Table => print::text(&print::escape(&report.text())),
        format => print::data(format, &report),
    }
}

/// # Errors
/// As [`run`].
pub(super) fn report(args: &Args, verbose: bool) -> anyhow::Result<impl Serialize + '_> {
    gather(args, verbose)
}

fn gather(args: &Args, verbose: bool) -> anyhow::Result<Report<'_>> {
    let pins = Pins::open(&args.inspect.bpffs)?;
    let state = pins.state()?;
    let (hooks, sizes, flows, counters) = (pins.hooks()?, pins.sizes(&state)?, pins.flow_table()?, pins.counters()?);
    let agent = verbose.then(|| agent::ask(args.healthz_bind_address, args.metrics_bind_address));
    let degraded = degraded(&hooks, &sizes, flows, &counters, agent.as_ref());
    let details = agent.map(|agent| Details::new(&pins, &state.config, &hooks, agent)).transpose()?;
    let report = Report::new(&args.inspect.bpffs, &state, flows, hooks, sizes, &counters);
    Ok(Report { degraded, details, ..report })
}

/// As RFC 3339 has it, to the second; none where it is no time.
fn time(seconds: f64) -> Option<String> {
    Some(Timestamp::from_second(seconds as i64).ok()?.to_string())
}

impl<'a> Report<'a> {
    fn new(
        bpffs: &'a Path,
        state: &State,
        flow_table: FlowTable,
        hooks: Vec<Hook>,
        maps: Vec<Size>,
        counters: &[(Reason, Counter)],
    ) -> Self {
        let names: BTreeSet<_> = state.port_names().map(|(_, name)| name.service).collect();
        let counts = counters.iter().filter(|(_, counter)| counter.packets > 0).map(|(reason, counter)| Count {
            reason: reason.label(),
            packets: counter.packets,
            bytes: counter.bytes,
            description: reason.description(),
        });
        Report {
            bpffs,
            services: names.len(),
            service_ports: state.services.len(),
            backends: state.backends.values().filter(|backend| backend.live != 0).count(),
            flow_table,
            hooks,
            maps,
            counters: counts.collect(),
            degraded: Vec::new(),
            details: None,
        }
    }

    fn text(&self) -> String {
        let FlowTable { cells, used, expired } = self.flow_table;
        let attached = self.hooks.iter().filter(|hook| hook.attached).count();
        let mut text = format!(
            "Pins:       {}\nHooks:      {attached} of {} attached\nServices:   {}, {} ports by family, {} backends\n\
             Flow table: {used} of {cells} cells in use ({}), {expired} expired\n\n{}\n{}",
            self.bpffs.display(),
            self.hooks.len(),
            self.services,
            self.service_ports,
            self.backends,
            percent(used, cells),
            print::table(&self.hooks),
            print::table(&self.maps),
        );
        if !self.counters.is_empty() {
            text.push('\n');
            text.push_str(&print::table(&self.counters));
        }
        if let Some(details) = &self.details {
            text.push('\n');
            text.push_str(&details_text(details));
        }
        for why in &self.degraded {
            let _ = write!(text, "\nDegraded: {why}");
        }
        if !self.degraded.is_empty() {
            text.push('\n');
        }
        text
    }
}

fn details_text(details: &Details) -> String {
    let Details { version, kernel, pins_are_current, modes, programs, agent } = details;
    let list = |items: &[String]| if items.is_empty() { "none".to_owned() } else { items.join(", ") };
    let pods: Vec<String> = modes.pods_detected.iter().map(|family| (*family).to_owned()).collect();
    let yes = |value: Option<bool>| or_dash(value.map(yes_no));
    let lines = [
        ("Version", format!("svc-agent {version}, Linux {kernel}")),
        ("Pinned maps", if *pins_are_current { "of this version" } else { "of another version" }.to_owned()),
        ("Sockets", modes.socket_lb.to_owned()),
        ("Interfaces", or_dash(modes.tc)),
        ("XDP", list(&modes.xdp)),
        ("Masquerade all", yes_no(modes.masquerade_all)),
        ("Pods told apart", list(&pods)),
        ("Source ports", format!("{} to {}", modes.source_ports[0], modes.source_ports[1])),
        ("Agent running", yes_no(agent.running)),
        ("Health", or_dash(agent.healthz)),
        ("Last sync", or_dash(agent.last_sync.and_then(time))),
        ("Source reached", yes(agent.source_connected)),
        ("Node eligible", yes(agent.node_eligible)),
        ("Sync errors", or_dash(agent.sync_errors)),
        ("Repairs", or_dash(agent.repairs)),
    ];
    let lines: String = lines.iter().map(|(name, value)| format!("{:17}{value}\n", format!("{name}:"))).collect();
    format!("{lines}\n{}", print::table(programs))
}

/// Whatever is there shows: never 0.0% of something, never 100% of less.
pub(super) fn percent(part: usize, whole: usize) -> String {
    match part as f64 * 100.0 / whole.max(1) as f64 {
        0.0 => "0%".to_owned(),
        small if small < 0.1 => "<0.1%".to_owned(),
        most if most < 100.0 => format!("{:.1}%", most.min(99.9)),
        _ => "100%".to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cli::example::state;
    use rstest::rstest;

    #[rstest]
    #[case(0, 10, "0%")]
    #[case(1, 100_000, "<0.1%")]
    #[case(1, 3, "33.3%")]
    #[case(99_999, 100_000, "99.9%")]
    #[case(5, 5, "100%")]
    #[case(0, 0, "0%")]
    fn percents_do_not_round_to_none_or_all(#[case] part: usize, #[case] whole: usize, #[case] text: &str) {
        assert_eq!(percent(part, whole), text);
    }

    #[test]
    fn a_report_is_a_summary_and_three_tables() {
        let hook = |name: &str, by: &'static str, link: Option<u32>| Hook {
            name: name.to_owned(),
            attached: link.is_some(),
            by,
            link_id: link,
            program_id: link.map(|link| link + 100),
        };
        let report = Report::new(
            Path::new("/sys/fs/bpf/svc"),
            &state(),
            FlowTable { cells: 1024, used: 2, expired: 1 },
            vec![hook("connect4", "cgroup", Some(7)), hook("ingress-eth0", "tcx", None)],
            vec![Size { map: "frontends", entries: 3, max_entries: 65_536 }],
            &[(Reason::FlowHit, Counter { packets: 0, bytes: 0 }), (Reason::Reply, Counter { packets: 2, bytes: 120 })],
        );
        insta::assert_snapshot!(report.text(), @"
        Pins:       /sys/fs/bpf/svc
        Hooks:      1 of 2 attached
        Services:   1, 2 ports by family, 2 backends
        Flow table: 2 of 1024 cells in use (0.2%), 1 expired

        HOOK           ATTACHED   BY       LINK   PROGRAM
        connect4       yes        cgroup   7      107
        ingress-eth0   no         tcx      -      -

        MAP         ENTRIES   SIZE    USE
        frontends   3         65536   <0.1%

        REASON   PACKETS   BYTES   DESCRIPTION
        reply    2         120     A packet of a known flow, back to its client.
        ");
    }
}
