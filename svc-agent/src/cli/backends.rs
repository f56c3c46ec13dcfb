//! `svc-agent backends`: where a Service's traffic goes.
use std::net::IpAddr;

use anyhow::ensure;
use serde::Serialize;
use svc_common::map::{BACKEND_LOCAL, BackendSlot, cluster_set, local_set};

use super::namespaces::Namespaces;
use super::print::{self, Inspect, Row, yes_no};
use super::selector::Selector;
use crate::dataplane::State;
use crate::dataplane::dump::address_and_port;
use crate::inspect::Pins;
use crate::plan::PortName;

#[derive(clap::Args, Debug)]
pub struct Args {
    /// Of this Service only: NAME or NAMESPACE/NAME.
    service: Option<Selector>,

    #[command(flatten)]
    namespaces: Namespaces,

    #[command(flatten)]
    inspect: Inspect,
}

/// One backend of one Service port.
#[derive(Clone, PartialEq, Eq, Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct BackendRow {
    pub namespace: String,
    pub service: String,
    /// None where the Service's only port has no name.
    pub port_name: Option<String>,
    pub port: u16,
    pub protocol: String,
    pub address: String,
    /// On this node.
    pub local: bool,
    pub id: u32,
    /// New connections may go there.
    pub live: bool,
}

impl Row for BackendRow {
    const HEADER: &'static [&'static str] =
        &["NAMESPACE", "SERVICE", "PORT", "PROTOCOL", "ADDRESS", "LOCAL", "ID", "LIVE"];

    fn cells(&self) -> Vec<String> {
        vec![
            self.namespace.clone(),
            self.service.clone(),
            self.port_name.clone().unwrap_or_else(|| self.port.to_string()),
            self.protocol.clone(),
            self.address.clone(),
            yes_no(self.local),
            self.id.to_string(),
            yes_no(self.live),
        ]
    }
}

/// # Errors
/// Where the pins cannot be read, or there is no such Service.
pub fn run(args: &Args) -> anyhow::Result<()> {
    let state = Pins::open(&args.inspect.bpffs)?.state()?;
    let mut rows = rows(&state);
    if let Some(selector) = &args.service {
        ensure!(
            state.port_names().any(|(_, name)| selector.matches(&name.service.namespace, &name.service.name)),
            "no such Service is served here: `svc-agent services` lists those that are"
        );
        rows.retain(|row| selector.matches(&row.namespace, &row.service));
    }
    rows.retain(|row| args.namespaces.has(&row.namespace));
    print::rows(args.inspect.output, &rows)
}

/// By Service, port and family, then by address.
pub fn rows(state: &State) -> Vec<BackendRow> {
    let names = state.services.iter().map(|(id, name)| (*id, name.unpack()));
    let mut ports: Vec<(PortName, u32, u16)> =
        names.filter_map(|(id, name)| Some((PortName::from_map(&name)?, id, name.port))).collect();
    ports.sort();
    ports
        .iter()
        .flat_map(|(name, id, port)| slots(state, *id).into_iter().map(|slot| row(state, name, *port, &slot)))
        .collect()
}

/// A Local policy may have backends that no other client gets: terminating ones that still serve.
fn slots(state: &State, service: u32) -> Vec<BackendSlot> {
    let mut slots = [cluster_set(service), local_set(service)].map(|set| state.backend_set(set)).concat();
    slots.sort_by_key(|slot| (IpAddr::from(slot.addr), u16::from_be(slot.port)));
    slots.dedup_by_key(|slot| slot.id);
    slots
}

fn row(state: &State, name: &PortName, port: u16, slot: &BackendSlot) -> BackendRow {
    BackendRow {
        namespace: name.service.namespace.to_string(),
        service: name.service.name.to_string(),
        port_name: Some(name.port.to_string()).filter(|port| !port.is_empty()),
        port,
        protocol: name.protocol.to_string(),
        address: address_and_port(slot.addr, slot.port),
        local: slot.flags & BACKEND_LOCAL != 0,
        id: slot.id,
        live: state.backends.get(&slot.id).is_some_and(|backend| backend.live != 0),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cli::example::state;

    #[test]
    fn every_backend_of_every_port_is_a_line() {
        insta::assert_snapshot!(print::table(&rows(&state())), @"
        NAMESPACE   SERVICE   PORT   PROTOCOL   ADDRESS         LOCAL   ID   LIVE
        default     web       http   TCP        10.1.0.1:8080   yes     9    yes
        default     web       http   TCP        10.1.0.2:8080   no      5    yes
        ");
    }
}
