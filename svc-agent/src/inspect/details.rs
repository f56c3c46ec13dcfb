//! What is loaded and how it is set up, for those who look closer.
use std::collections::BTreeMap;
use std::time::UNIX_EPOCH;

use aya::programs::loaded_programs;
use serde::Serialize;
use svc_common::Reason;
use svc_common::map::{
    CONFIG_DETECT_PODS_V4, CONFIG_DETECT_PODS_V6, CONFIG_HOST_SOCKETS_ONLY, CONFIG_MASQUERADE_ALL, Config, Counter,
};

use super::agent::Agent;
use super::{FlowTable, Hook, Size};
use crate::dataplane::aya::check_pins;
use crate::inspect::Pins;

#[derive(Clone, PartialEq, Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Details {
    /// Of the program that prints this.
    pub version: &'static str,
    pub kernel: String,
    /// Whether the pinned maps are such as this version has.
    pub pins_are_current: bool,
    pub modes: Modes,
    pub programs: Vec<Program>,
    pub agent: Agent,
}

/// How the kernel part is set up.
#[derive(Clone, PartialEq, Eq, Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Modes {
    /// As `--socket-lb`: `on`, `host` or `off`.
    pub socket_lb: &'static str,
    /// `tcx`, `clsact`, or none where nothing is attached to interfaces.
    pub tc: Option<&'static str>,
    /// The interfaces with XDP.
    pub xdp: Vec<String>,
    pub masquerade_all: bool,
    /// The families in which pods are told from other clients.
    pub pods_detected: Vec<&'static str>,
    /// For forwarded traffic, first and last.
    pub source_ports: [u16; 2],
}

/// A program that is attached, once whatever the number of places.
#[derive(Clone, PartialEq, Eq, Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Program {
    pub id: u32,
    pub name: String,
    /// The kernel's digest of its instructions: the same for the same program.
    pub tag: String,
    pub verified_instructions: Option<u32>,
    /// Seconds since 1970.
    pub loaded_at: Option<u64>,
    pub hooks: Vec<String>,
}

impl Details {
    /// # Errors
    /// Where the kernel does not tell of its programs.
    pub fn new(pins: &Pins, config: &Config, hooks: &[Hook], agent: Agent) -> anyhow::Result<Self> {
        let kernel = std::fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
        Ok(Details {
            version: env!("CARGO_PKG_VERSION"),
            kernel: kernel.trim().to_owned(),
            pins_are_current: check_pins(&pins.maps()).is_ok(),
            modes: modes(config, hooks),
            programs: programs(hooks)?,
            agent,
        })
    }
}

fn modes(config: &Config, hooks: &[Hook]) -> Modes {
    let has = |flag: u32| config.flags & flag != 0;
    let by = |kind: &str| hooks.iter().any(|hook| hook.attached && hook.by == kind);
    let connects = hooks.iter().any(|hook| hook.attached && hook.name == "connect4");
    let families = [(CONFIG_DETECT_PODS_V4, "IPv4"), (CONFIG_DETECT_PODS_V6, "IPv6")];
    Modes {
        socket_lb: match (connects, has(CONFIG_HOST_SOCKETS_ONLY)) {
            (false, _) => "off",
            (true, true) => "host",
            (true, false) => "on",
        },
        tc: if by("tcx") { Some("tcx") } else { by("clsact").then_some("clsact") },
        xdp: hooks.iter().filter_map(|hook| Some(hook.name.strip_prefix("xdp-")?.replace(':', "."))).collect(),
        masquerade_all: has(CONFIG_MASQUERADE_ALL),
        pods_detected: families.into_iter().filter(|(flag, _)| has(*flag)).map(|(_, family)| family).collect(),
        source_ports: [config.snat_first, config.snat_last],
    }
}

fn programs(hooks: &[Hook]) -> anyhow::Result<Vec<Program>> {
    let mut places: BTreeMap<u32, Vec<String>> = BTreeMap::new();
    for hook in hooks {
        if let Some(id) = hook.program_id {
            places.entry(id).or_default().push(hook.name.clone());
        }
    }
    let mut programs = Vec::new();
    // One that goes meanwhile is none of ours.
    for info in loaded_programs().flatten() {
        let Some(hooks) = places.remove(&info.id()) else { continue };
        programs.push(Program {
            id: info.id(),
            name: info.name_as_str().unwrap_or_default().to_owned(),
            tag: format!("{:016x}", info.tag()),
            verified_instructions: info.verified_instruction_count(),
            loaded_at: info.loaded_at().and_then(|time| Some(time.duration_since(UNIX_EPOCH).ok()?.as_secs())),
            hooks,
        });
    }
    programs.sort_by(|one, other| one.hooks.cmp(&other.hooks));
    Ok(programs)
}

/// What does not work, or soon will not, and why; `agent`: none where it was not asked.
pub fn degraded(
    hooks: &[Hook],
    sizes: &[Size],
    flows: FlowTable,
    counters: &[(Reason, Counter)],
    agent: Option<&Agent>,
) -> Vec<String> {
    /// From here on there may be no room for the next one.
    const NEARLY_FULL: usize = 90;
    /// These make room by themselves.
    const LRU: [&str; 3] = ["sockets", "affinity", "fragments"];
    let mut why = Vec::new();
    let wants_sockets = hooks.iter().any(|hook| hook.attached && hook.by == "cgroup" && !hook.name.starts_with("bind"));
    for hook in hooks.iter().filter(|hook| !hook.attached && (hook.by != "cgroup" || wants_sockets)) {
        why.push(format!("{} is not attached: a running agent repairs it within its --sync-period", hook.name));
    }
    let is_nearly_full = |used: usize, size: usize| size > 0 && used * 100 >= size * NEARLY_FULL;
    for Size { map, entries, max_entries } in sizes.iter().filter(|size| !LRU.contains(&size.map)) {
        if is_nearly_full(*entries, *max_entries) {
            why.push(format!("the map {map} has {entries} of {max_entries} entries: see `svc-agent maps`"));
        }
    }
    if is_nearly_full(flows.used, flows.cells) {
        why.push(format!("the flow table has {} of {} cells in use: --flow-table-size", flows.used, flows.cells));
    }
    for reason in [Reason::FlowTableFull, Reason::NoSourcePort, Reason::HelperFailed] {
        let packets =
            counters.iter().filter(|(counted, _)| *counted == reason).map(|(_, counter)| counter.packets).sum();
        let packets: u64 = packets;
        if packets > 0 {
            why.push(format!("{packets} packets were dropped for {} so far: docs/dataplane.md", reason.label()));
        }
    }
    let Some(agent) = agent else { return why };
    if !agent.running {
        why.push("no agent answers: what is in the kernel stays in force, changes wait for its start".to_owned());
    }
    if agent.healthz.is_some_and(|status| status != 200) {
        why.push(format!("/healthz answers {}", agent.healthz.unwrap_or_default()));
    }
    if agent.source_connected == Some(false) {
        why.push("the source of Services cannot be reached: what was last known is in force".to_owned());
    }
    why
}

#[cfg(test)]
mod tests {
    use super::*;

    fn hook(name: &str, by: &'static str, attached: bool) -> Hook {
        Hook { name: name.to_owned(), attached, by, link_id: None, program_id: None }
    }

    const FLOWS: FlowTable = FlowTable { cells: 100, used: 10, expired: 0 };

    #[test]
    fn all_that_is_as_it_should_be_is_not_degraded() {
        let hooks = [hook("connect4", "cgroup", true), hook("ingress-eth0", "tcx", true)];
        let sizes = [Size { map: "affinity", entries: 100, max_entries: 100 }];
        let agent = Agent { running: true, healthz: Some(200), source_connected: Some(true), ..Agent::default() };
        let counters = [(Reason::NoBackend, Counter { packets: 9, bytes: 9 })];
        assert_eq!(degraded(&hooks, &sizes, FLOWS, &counters, Some(&agent)), Vec::<String>::new());
    }

    #[test]
    fn socket_hooks_that_nobody_wants_are_not_missed() {
        let hooks = [hook("connect4", "cgroup", false), hook("bind4", "cgroup", true)];
        assert_eq!(degraded(&hooks, &[], FLOWS, &[], None), Vec::<String>::new());
    }

    #[test]
    fn what_is_degraded_is_told_with_why() {
        let hooks = [hook("connect4", "cgroup", true), hook("ingress-eth0", "tcx", false)];
        let sizes = [Size { map: "frontends", entries: 90, max_entries: 100 }];
        let counters = [(Reason::FlowTableFull, Counter { packets: 9, bytes: 9 })];
        let flows = FlowTable { used: 95, ..FLOWS };
        insta::assert_snapshot!(degraded(&hooks, &sizes, flows, &counters, Some(&Agent::default())).join("\n"), @"
        ingress-eth0 is not attached: a running agent repairs it within its --sync-period
        the map frontends has 90 of 100 entries: see `svc-agent maps`
        the flow table has 95 of 100 cells in use: --flow-table-size
        9 packets were dropped for flow_table_full so far: docs/dataplane.md
        no agent answers: what is in the kernel stays in force, changes wait for its start
        ");
    }
}
