//! What tests of the packet path share: packets made ([`packet`]) and judged ([`check`]) by code that the engine has no part
//! in, its tables as plain data ([`tables`]), a network to stand in ([`net`]) with sockets on its node ([`socket`]), and the engine
//! over memory ([`memory`]).
pub mod check;
pub mod memory;
pub mod net;
pub mod packet;
pub mod socket;
pub mod tables;

use std::collections::BTreeMap;

use svc_common::Reason;

/// Where a packet is met: a program of the kernel part each.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub enum Hook {
    Xdp,
    Ingress,
    Egress,
    PodIngress,
    PodEgress,
}

impl Hook {
    pub const ALL: [Hook; 5] = [Hook::Xdp, Hook::Ingress, Hook::Egress, Hook::PodIngress, Hook::PodEgress];

    /// The program's name in the object.
    pub const fn program(self) -> &'static str {
        match self {
            Hook::Xdp => "svc_xdp",
            Hook::Ingress => "svc_ingress",
            Hook::Egress => "svc_egress",
            Hook::PodIngress => "svc_pod_ingress",
            Hook::PodEgress => "svc_pod_egress",
        }
    }
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Verdict {
    /// On its way by the stack (TC_ACT_UNSPEC, XDP_PASS), changed or not.
    Next,
    Drop,
    /// To an interface (TC_ACT_REDIRECT, XDP_TX).
    Redirect,
}

/// What became of a packet.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Outcome {
    pub verdict: Verdict,
    pub frame: Vec<u8>,
    /// How far each counter moved, in packets; without those that stood still.
    pub moved: BTreeMap<&'static str, u64>,
}

impl Outcome {
    /// Whether exactly the counters of these reasons moved, by one each.
    pub fn moved_only(&self, reasons: &[Reason]) -> bool {
        self.moved == reasons.iter().map(|reason| (reason.label(), 1)).collect()
    }
}
