//! Why a packet or a connection got its verdict: one table for the kernel's counters, for inspection and for metrics.

macro_rules! reasons {
    ($($(#[doc = $doc:literal])+ $name:ident = $label:literal,)+) => {
        /// The discriminant indexes the `counters` map.
        #[repr(u32)]
        #[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
        pub enum Reason { $($(#[doc = $doc])+ $name,)+ }

        impl Reason {
            pub const ALL: &[Reason] = &[$(Reason::$name,)+];

            /// Stable name, for metrics' labels and scripts.
            pub const fn label(self) -> &'static str {
                match self { $(Reason::$name => $label,)+ }
            }

            /// The reason whose discriminant is `index`.
            #[inline(always)]
            pub const fn from_index(index: u32) -> Option<Reason> {
                // SAFETY: the discriminants are the numbers from 0 on.
                if index < Reason::ALL.len() as u32 { Some(unsafe { core::mem::transmute::<u32, Reason>(index) }) } else { None }
            }

            /// A sentence for people.
            pub const fn description(self) -> &'static str {
                match self { $(Reason::$name => concat!($($doc),+).trim_ascii(),)+ }
            }
        }
    };
}

reasons! {
    /// Passed on untouched: none of a Service's. Not counted.
    NotService = "not_service",
    /// A packet of a known flow, towards its backend.
    FlowHit = "flow_hit",
    /// A packet that opened a flow.
    FlowOpened = "flow_opened",
    /// A packet of a known flow, back to its client.
    Reply = "reply",
    /// A socket was pointed at a backend.
    SocketConnected = "socket_connected",
    /// A socket's datagram was pointed at a backend.
    SocketDatagram = "socket_datagram",
    /// A socket's connection was refused: no ready backend.
    SocketRefused = "socket_refused",
    /// A socket was refused a port that is a NodePort.
    BindRefused = "bind_refused",
    /// Rejected: the Service has no ready backend.
    NoBackend = "no_backend",
    /// Rejected: no Service has this port of a ClusterIP.
    UnknownPort = "unknown_port",
    /// Dropped: the traffic policy is Local and all backends are on other nodes.
    NoLocalBackend = "no_local_backend",
    /// Dropped: the source is not in the Service's loadBalancerSourceRanges.
    SourceRange = "source_range",
    /// Dropped: an address of the cluster's Service range that no Service has.
    UnallocatedAddress = "unallocated_address",
    /// Dropped: more rejections a second than are sent.
    RejectLimited = "reject_limited",
    /// Dropped: every cell that this flow could have is taken by a flow that still lives.
    FlowTableFull = "flow_table_full",
    /// Dropped: no source port is free towards this backend.
    NoSourcePort = "no_source_port",
    /// Dropped: no route to the backend or the client.
    NoRoute = "no_route",
    /// Rejected: the packet's hop limit ends here.
    HopLimit = "hop_limit",
    /// Rejected: the packet is larger than the next link takes.
    TooBig = "too_big",
    /// Passed on untouched: the headers are cut short.
    Truncated = "truncated",
    /// Passed on untouched: headers that are not followed.
    Unsupported = "unsupported",
    /// Passed on untouched: a fragment without ports, whose first one was not seen.
    FragmentUnknown = "fragment_unknown",
    /// Kept: a fragment without ports, until the first one comes.
    FragmentKept = "fragment_kept",
    /// Dropped: a kernel helper refused to change the packet.
    HelperFailed = "helper_failed",
}

/// What `svc-agent monitor` tells of.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub enum Kind {
    Drop,
    Reject,
    NewFlow,
}

impl Kind {
    /// Stable name, for scripts.
    pub const fn label(self) -> &'static str {
        match self {
            Kind::Drop => "drop",
            Kind::Reject => "reject",
            Kind::NewFlow => "new-flow",
        }
    }
}

impl Reason {
    /// None where it is what becomes of every packet, or of what is none of a Service's; and of [`Reason::SocketRefused`],
    /// which is told as what it was refused for.
    pub const fn kind(self) -> Option<Kind> {
        match self {
            Reason::NoLocalBackend
            | Reason::SourceRange
            | Reason::UnallocatedAddress
            | Reason::RejectLimited
            | Reason::FlowTableFull
            | Reason::NoSourcePort
            | Reason::NoRoute
            | Reason::HelperFailed => Some(Kind::Drop),
            Reason::BindRefused | Reason::NoBackend | Reason::UnknownPort | Reason::HopLimit | Reason::TooBig => {
                Some(Kind::Reject)
            }
            Reason::FlowOpened | Reason::SocketConnected | Reason::SocketDatagram => Some(Kind::NewFlow),
            Reason::NotService
            | Reason::FlowHit
            | Reason::Reply
            | Reason::SocketRefused
            | Reason::Truncated
            | Reason::Unsupported
            | Reason::FragmentUnknown
            | Reason::FragmentKept => None,
        }
    }

    /// Its bit in a set of reasons.
    #[inline(always)]
    pub const fn bit(self) -> u32 {
        1 << self as u32
    }
}
const _: () = assert!(Reason::ALL.len() <= 32);

#[cfg(test)]
mod tests {
    use super::{Kind, Reason};

    #[test]
    fn a_kind_is_what_the_description_begins_with() {
        for reason in Reason::ALL {
            let description = reason.description();
            match reason.kind() {
                Some(Kind::Drop) => assert!(description.starts_with("Dropped: "), "{reason:?}"),
                Some(Kind::Reject) => {
                    assert!(description.starts_with("Rejected: ") || description.contains("refused"), "{reason:?}");
                }
                Some(Kind::NewFlow) | None => {
                    assert!(!description.starts_with("Dropped") && !description.starts_with("Rejected"), "{reason:?}");
                }
            }
        }
    }

    #[test]
    fn a_discriminant_is_the_index_in_the_table() {
        for (index, reason) in Reason::ALL.iter().enumerate() {
            assert_eq!(*reason as usize, index);
            assert_eq!(Reason::from_index(index as u32), Some(*reason));
            assert!(!reason.description().is_empty());
        }
    }
}
