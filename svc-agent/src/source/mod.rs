//! Where the wanted state comes from. Sources only send events; they decide nothing and keep nothing that the store keeps.
pub mod addresses;
pub mod decode;
pub mod encoding;
pub mod kubernetes;
pub mod list_watch;
pub mod manifests;
pub mod servers;
pub mod wire;

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::sync::Arc;

use svc_common::map::Uplink;
use tokio::sync::mpsc;

use crate::object::{Node, ObjectName, Service, ServiceCidr, Slice};

/// One kind of input. The agent touches nothing in the kernel before it has a whole list of each.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub enum Kind {
    Service,
    EndpointSlice,
    Node,
    ServiceCidr,
    Interface,
}

impl Kind {
    pub const ALL: [Kind; 5] = [Kind::Service, Kind::EndpointSlice, Kind::Node, Kind::ServiceCidr, Kind::Interface];

    pub const fn label(self) -> &'static str {
        match self {
            Kind::Service => "services",
            Kind::EndpointSlice => "endpointslices",
            Kind::Node => "node",
            Kind::ServiceCidr => "servicecidrs",
            Kind::Interface => "interfaces",
        }
    }
}

/// A change of the input. A whole list replaces all that was known of its kind, so what vanished while nobody was watching
/// is seen to be gone; a half-read list is never sent.
#[derive(Clone, PartialEq, Debug)]
pub enum Event {
    Services(Vec<Service>),
    PutService(Service),
    DeleteService(ObjectName),
    Slices(Vec<Slice>),
    PutSlice(Slice),
    DeleteSlice(ObjectName),
    /// The agent's own Node; none while there is no such object.
    Node(Option<Node>),
    ServiceCidrs(Vec<ServiceCidr>),
    PutServiceCidr(ServiceCidr),
    /// By name.
    DeleteServiceCidr(Arc<str>),
    Interfaces(Interfaces),
}

/// The node's interfaces, as far as Services are concerned.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Interfaces {
    /// All addresses that other machines could use, each once, those of the first interfaces first.
    pub addresses: Vec<IpAddr>,
    /// What traffic that leaves by an interface takes as its source: its first addresses, by the interface's index.
    pub sources: BTreeMap<u32, Uplink>,
    /// The first uplink; none while it is not there.
    pub uplink: Option<Link>,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Link {
    pub index: u32,
    /// Its link address as it stands in a packet; zeros where it has none.
    pub address: [u16; 3],
}

/// The way to the task that owns the state. Bounded: while the kernel is being written, a flood of events waits in the
/// API server's buffers, not in ours.
pub type Sender = mpsc::Sender<Event>;

/// The owner of the state is gone: the agent is stopping.
#[derive(Debug, thiserror::Error)]
#[error("nobody listens to events any more")]
pub struct Closed;

/// # Errors
/// When the agent is stopping.
pub async fn send(events: &Sender, event: Event) -> Result<(), Closed> {
    events.send(event).await.map_err(|_| Closed)
}
