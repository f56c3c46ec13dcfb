//! What the engine looks things up in.
use svc_common::map::{AddressFlags, BackendSlot, Config, Frontend, FrontendKey, SocketKey, SocketPeer, Uplink};
use svc_common::{Addr, Reason, flow};

/// One backend set, all of whose slots are of the same version.
pub trait BackendSet {
    /// Slot 0 is the header.
    fn slot(&self, index: u32) -> Option<BackendSlot>;
}

pub trait Tables {
    type Set: BackendSet;
    type Flows: flow::Memory;

    fn frontend(&self, key: &FrontendKey) -> Option<Frontend>;
    fn backend_set(&self, id: u32) -> Option<&Self::Set>;
    /// Whether any set still holds the backend with this id.
    fn is_live(&self, backend: u32) -> bool;
    fn address(&self, addr: &Addr) -> AddressFlags;
    fn uplink(&self, ifindex: u32) -> Option<Uplink>;
    fn config(&self) -> Config;
    fn flows(&self) -> &Self::Flows;
    fn count(&self, reason: Reason, bytes: u32);
    /// Ticks of [`flow::TICK_SHIFT`], which wrap.
    fn now(&self) -> u16;
    fn random(&self) -> u32;
}

/// What the socket hooks remember.
pub trait Sockets {
    fn peer(&self, key: &SocketKey) -> Option<SocketPeer>;
    fn set_peer(&self, key: &SocketKey, peer: &SocketPeer);
}
