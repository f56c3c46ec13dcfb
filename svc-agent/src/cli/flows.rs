//! `svc-agent flows`: the flows that come in from the network. What sockets of this node open is none: it is pointed at
//! its backend once, at connect().
use super::namespaces::Namespaces;
use super::print::{self, Inspect, Row, or_dash};
use super::selector::Selector;
use crate::inspect::{Flow, Pins};

#[derive(clap::Args, Debug)]
pub struct Args {
    /// Of this Service only: NAME or NAMESPACE/NAME.
    #[arg(long, value_name = "SERVICE")]
    service: Option<Selector>,

    #[command(flatten)]
    namespaces: Namespaces,

    #[command(flatten)]
    inspect: Inspect,
}

impl Row for Flow {
    const HEADER: &'static [&'static str] =
        &["SERVICE", "PROTOCOL", "CLIENT", "FRONTEND", "BACKEND", "SOURCE", "STATE", "IDLE"];

    fn cells(&self) -> Vec<String> {
        let service = self.service.as_ref().map(|service| match &self.port_name {
            Some(port) => format!("{service}:{port}"),
            None => service.clone(),
        });
        vec![
            or_dash(service),
            self.protocol.clone(),
            self.client.clone(),
            self.frontend.clone(),
            self.backend.clone(),
            or_dash(self.source.as_ref()),
            self.state.to_owned(),
            format!("{}s", self.idle_seconds),
        ]
    }
}

/// # Errors
/// Where the pins cannot be read.
pub fn run(args: &Args) -> anyhow::Result<()> {
    let mut flows = Pins::open(&args.inspect.bpffs)?.flows()?;
    if let Some(selector) = &args.service {
        flows.retain(|flow| is_of(flow, selector));
    }
    flows.retain(|flow| args.namespaces.has_service(flow.service.as_deref()));
    print::rows(args.inspect.output, &flows)
}

fn is_of(flow: &Flow, selector: &Selector) -> bool {
    let name = flow.service.as_ref().and_then(|service| service.split_once('/'));
    name.is_some_and(|(namespace, name)| selector.matches(namespace, name))
}
