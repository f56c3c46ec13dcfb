//! What the engine looks things up in.
use svc_common::flow::{Hit, Key};
use svc_common::map::{
    AddressFlags, Affinity, AffinityKey, BackendSlot, CidrFlags, Config, FragmentKey, FragmentPorts, Frontend,
    FrontendKey, SocketKey, SocketPeer, Uplink,
};
use svc_common::{Addr, Reason, flow};

use crate::negative;
use crate::open::{Opened, SourcePort, Trial, open, open_by, source_port, try_port};
use crate::parse::Headers;
use crate::socket::Request;
use crate::visit::{Visit, visit};

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
    /// What the narrowest known range with this address is; 0 where none has it.
    fn cidr(&self, addr: Addr) -> CidrFlags;
    /// Whether the Service's source ranges admit this address.
    fn is_admitted(&self, service: u32, addr: Addr) -> bool;
    fn affinity(&self, key: &AffinityKey) -> Option<Affinity>;
    fn set_affinity(&self, key: &AffinityKey, affinity: Affinity);
    fn fragment(&self, key: &FragmentKey) -> Option<FragmentPorts>;
    fn set_fragment(&self, key: &FragmentKey, ports: FragmentPorts);
    fn uplink(&self, ifindex: u32) -> Option<Uplink>;
    fn config(&self) -> Config;
    fn flows(&self) -> &Self::Flows;
    fn count(&self, reason: Reason, bytes: u32);
    /// Ticks of [`flow::TICK_SHIFT`], which wrap.
    fn now(&self) -> u16;
    /// Of CLOCK_MONOTONIC.
    fn seconds(&self) -> u32;
    fn random(&self) -> u32;
    /// 0, 1, 2 and so on, on all cores together, and round again.
    fn turn(&self) -> u32;

    /// A flow was opened, of which `hit` is the client's cell, by a packet of `bytes` at the interface `ifindex`: for those who
    /// count and watch.
    fn opened(&self, _headers: &Headers, _hit: &Hit, _bytes: u32, _ifindex: u32) {}

    /// The number of the epoch at one of [`negative::EPOCHS`] places; 0 where nothing holds.
    fn epoch(&self, _place: u32) -> u64 {
        0
    }

    /// Begins another epoch there.
    fn end_epoch(&self, _place: u32) {}

    /// The negative cache's place for what has this hash, which this CPU alone writes; null where there is none.
    fn negative(&self, _hash: u32) -> *mut negative::Entry {
        core::ptr::null_mut()
    }

    /// A packet of `bytes` was translated, as the cell in `hit` says: for those who count.
    fn carried(&self, _hit: &Hit, _bytes: u32) {}

    /// [`visit`], or a kernel function that is verified by itself and calls it.
    fn visit(&self, key: &Key, headers: &Headers, hit: &mut Hit, now: u16) -> Visit
    where
        Self: Sized,
    {
        visit(self, key, headers, hit, now)
    }

    /// [`open`], or a kernel function that is verified by itself and calls it.
    ///
    /// # Errors
    /// As [`open`].
    fn open(&self, headers: &Headers, key: &Key, hit: &mut Hit) -> Result<(), Reason>
    where
        Self: Sized,
    {
        open(self, headers, key, hit)
    }

    /// [`source_port`], or a kernel function that is verified by itself and calls it.
    fn source_port(&self, headers: &Headers, backend: &BackendSlot) -> SourcePort
    where
        Self: Sized,
    {
        source_port(self, headers, backend)
    }

    /// [`open_by`], or a kernel function that is verified by itself and calls it.
    fn open_by(&self, headers: &Headers, key: &Key, backend: &BackendSlot, hit: &mut Hit, source: SourcePort) -> Opened
    where
        Self: Sized,
    {
        open_by(self, headers, key, backend, hit, source)
    }

    /// [`try_port`], or a kernel function that is verified by itself and calls it.
    fn try_port(&self, headers: &Headers, backend: &BackendSlot, attempt: u32, half_open: bool) -> Trial
    where
        Self: Sized,
    {
        try_port(self, headers, backend, attempt, half_open)
    }
}

/// What the socket hooks remember.
pub trait Sockets {
    fn peer(&self, key: &SocketKey) -> Option<SocketPeer>;
    fn set_peer(&self, key: &SocketKey, peer: &SocketPeer);
    /// A backend was chosen for a socket, which `reason` says how: for those who count and watch.
    fn pointed(&self, _request: &Request, _peer: &SocketPeer, _reason: Reason) {}
}
