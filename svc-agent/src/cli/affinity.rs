//! `svc-agent affinity`: which clients stay with which backends (ClientIP session affinity).
use std::collections::BTreeMap;

use serde::Serialize;
use svc_common::Addr;
use svc_common::map::{Affinity, AffinityKey};

use super::namespaces::Namespaces;
use super::print::{self, Inspect, Row, yes_no};
use crate::dataplane::State;
use crate::dataplane::dump::address_and_port;
use crate::host;
use crate::inspect::Pins;

#[derive(clap::Args, Debug)]
pub struct Args {
    #[command(flatten)]
    namespaces: Namespaces,

    #[command(flatten)]
    inspect: Inspect,
}

/// One client of one Service port.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct AffinityRow {
    pub namespace: String,
    pub service: String,
    /// None where the Service's only port has no name.
    pub port_name: Option<String>,
    pub family: String,
    /// An address, or for sockets of this node and its pods the network namespace that they are in.
    pub client: String,
    pub backend: String,
    /// Since its last new connection.
    pub age_seconds: u32,
    pub timeout_seconds: u32,
    /// The client stays; not where the time is over or the backend has left.
    pub holds: bool,
}

impl Row for AffinityRow {
    const HEADER: &'static [&'static str] =
        &["NAMESPACE", "SERVICE", "PORT", "FAMILY", "CLIENT", "BACKEND", "AGE", "TIMEOUT", "HOLDS"];

    fn cells(&self) -> Vec<String> {
        vec![
            self.namespace.clone(),
            self.service.clone(),
            print::or_dash(self.port_name.as_ref()),
            self.family.clone(),
            self.client.clone(),
            self.backend.clone(),
            format!("{}s", self.age_seconds),
            format!("{}s", self.timeout_seconds),
            yes_no(self.holds),
        ]
    }
}

/// # Errors
/// Where the pins cannot be read.
pub fn run(args: &Args) -> anyhow::Result<()> {
    let pins = Pins::open(&args.inspect.bpffs)?;
    let mut rows = rows(&pins.state()?, &pins.affinity()?, host::monotonic_seconds());
    rows.retain(|row| args.namespaces.has(&row.namespace));
    print::rows(args.inspect.output, &rows)
}

/// By Service, then by client. What is of no Service any more is left out.
pub fn rows(state: &State, entries: &[(AffinityKey, Affinity)], now: u32) -> Vec<AffinityRow> {
    let mut timeouts: BTreeMap<u32, u32> = BTreeMap::new();
    for frontend in state.frontends.values() {
        let timeout = timeouts.entry(frontend.service).or_default();
        *timeout = frontend.affinity_seconds.max(*timeout);
    }
    let row = |(key, last): &(AffinityKey, Affinity)| {
        let name = state.port_name(key.service)?;
        let backend = state.backends.get(&last.backend);
        let age_seconds = now.wrapping_sub(last.last);
        let timeout_seconds = timeouts.get(&key.service).copied().unwrap_or(0);
        Some(AffinityRow {
            namespace: name.service.namespace.to_string(),
            service: name.service.name.to_string(),
            port_name: Some(name.port.to_string()).filter(|port| !port.is_empty()),
            family: name.family.to_string(),
            client: client(key.client, state.config.host_netns),
            backend: backend.map_or_else(|| "gone".to_owned(), |known| address_and_port(known.addr, known.port)),
            age_seconds,
            timeout_seconds,
            holds: age_seconds <= timeout_seconds && backend.is_some_and(|backend| backend.live != 0),
        })
    };
    let mut rows: Vec<AffinityRow> = entries.iter().filter_map(row).collect();
    rows.sort();
    rows
}

fn client(addr: Addr, host_netns: u64) -> String {
    match addr.netns() {
        Some(cookie) if cookie == host_netns => "this node's sockets".to_owned(),
        Some(cookie) => format!("sockets of network namespace {cookie}"),
        None => addr.to_string(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cli::example::state;
    use std::net::IpAddr;

    #[test]
    fn a_client_is_told_with_its_backend_and_whether_it_still_stays() {
        let mut state = state();
        state.config.host_netns = 7;
        state.frontends.values_mut().for_each(|frontend| frontend.affinity_seconds = 100);
        state.backends.get_mut(&5).unwrap().live = 0;
        let entry = |service, client: Addr, backend, last| {
            (AffinityKey { service, pad: 0, client }, Affinity { backend, last })
        };
        let addr = |text: &str| Addr::from(text.parse::<IpAddr>().unwrap());
        let entries = [
            entry(1, addr("192.0.2.9"), 9, 950),
            entry(1, addr("192.0.2.8"), 9, 100),
            entry(1, Addr::of_netns(7), 5, 990),
            entry(1, Addr::of_netns(1 << 40), 77, 990),
            entry(99, addr("192.0.2.9"), 9, 950),
        ];
        insta::assert_snapshot!(print::table(&rows(&state, &entries, 1000)), @"
        NAMESPACE   SERVICE   PORT   FAMILY   CLIENT                                       BACKEND         AGE    TIMEOUT   HOLDS
        default     web       http   IPv4     192.0.2.8                                    10.1.0.1:8080   900s   100s      no
        default     web       http   IPv4     192.0.2.9                                    10.1.0.1:8080   50s    100s      yes
        default     web       http   IPv4     sockets of network namespace 1099511627776   gone            10s    100s      no
        default     web       http   IPv4     this node's sockets                          10.1.0.2:8080   10s    100s      no
        ");
    }
}
