//! Connections under way.
use std::net::IpAddr;

use svc_dataplane::check::Ends;
use svc_dataplane::packet::{TCP, UDP};

use crate::seen::Seen;
use crate::world::Backend;

/// What was chosen for a flow. Where no packet has shown it yet, a flow has several.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) struct Choice {
    pub(crate) to: (IpAddr, u16),
    /// `None`: the flow is no Service's.
    pub(crate) backend: Option<Backend>,
    /// The backend sees an address of this node.
    pub(crate) masqueraded: bool,
    /// The source port that the backend sees, once it was seen.
    pub(crate) port: Option<u16>,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum From {
    Network,
    Pod,
    Host,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Phase {
    /// One direction only.
    New,
    Established,
    /// One side has sent its FIN.
    Closing,
    Closed,
}

#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
pub(crate) struct Life {
    replied: bool,
    /// The client went on after the reply.
    confirmed: bool,
    client_fin: bool,
    backend_fin: bool,
    reset: bool,
}

/// One direction of a flow, which is found for itself.
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
pub(crate) struct Side {
    pub(crate) is_here: bool,
    /// When it was last used or told of the other one's use, in seconds.
    pub(crate) since: u32,
}

#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) struct Flow {
    pub(crate) protocol: u8,
    /// Client to frontend.
    pub(crate) request: Ends,
    /// Where its first packet was met.
    pub(crate) from: From,
    pub(crate) life: Life,
    /// When the last packet came, in seconds.
    pub(crate) last: u32,
    /// At least one.
    pub(crate) choices: Vec<Choice>,
    /// By [`Direction`].
    pub(crate) sides: [Side; 2],
    /// It may have been given up.
    pub(crate) is_doubtful: bool,
}

/// Of a packet.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Direction {
    Request,
    Reply,
}

impl Direction {
    pub(crate) const BOTH: [Direction; 2] = [Direction::Request, Direction::Reply];

    pub(crate) fn other(self) -> Direction {
        match self {
            Direction::Request => Direction::Reply,
            Direction::Reply => Direction::Request,
        }
    }
}

/// How far from its limit a flow's age has to be, in seconds, for it to be over or not beyond doubt: a flow's two directions
/// are told of each other every eight ticks of 2.1 s.
const OVER: u32 = 8;
const ALIVE: u32 = 22;

impl Flow {
    /// The packet's direction, if the packet is this flow's. `by_port`: as a reply to this node's own address.
    pub(crate) fn direction(&self, protocol: u8, ends: Ends, by_port: bool) -> Option<Direction> {
        if self.protocol != protocol {
            return None;
        }
        if !by_port && self.has(Direction::Request) && self.request == ends {
            return Some(Direction::Request);
        }
        let is_reply = |choice: &Choice| {
            choice.to == (ends.src, ends.sport)
                && choice.port == Some(ends.dport)
                && choice.masqueraded == by_port
                && (by_port || ends.dst == self.request.src)
        };
        (self.has(Direction::Reply) && self.choices.iter().any(is_reply)).then_some(Direction::Reply)
    }

    pub(crate) fn has(&self, direction: Direction) -> bool {
        self.sides[direction as usize].is_here
    }

    pub(crate) fn phase(&self) -> Phase {
        let Life { replied, confirmed, client_fin, backend_fin, reset } = self.life;
        if reset || client_fin && backend_fin {
            Phase::Closed
        } else if client_fin || backend_fin {
            Phase::Closing
        } else if replied && confirmed {
            Phase::Established
        } else {
            Phase::New
        }
    }

    /// After how many seconds without a packet it is over: the kernel's and kube-proxy's defaults.
    fn limit(&self) -> u32 {
        match (self.protocol, self.phase()) {
            (_, Phase::Closed) => 10,
            (TCP, Phase::New) => 60,
            (TCP, Phase::Established) => 86_400,
            (TCP, Phase::Closing) => 3600,
            (UDP, Phase::Established) => 120,
            (UDP, _) => 30,
            (_, Phase::Established) => 210,
            _ => 60,
        }
    }

    pub(crate) fn is_outlived(&self, now: u32) -> bool {
        now - self.last > self.limit()
    }

    /// Whether nobody can tell at this time if it is over.
    pub(crate) fn is_in_doubt(&self, now: u32) -> bool {
        let age = now - self.last;
        age > 0 && age + ALIVE > self.limit() && age < self.limit() + OVER
    }

    /// Whether that was news.
    pub(crate) fn learn(&mut self, seen: &Seen, direction: Direction, now: u32) -> bool {
        self.last = now;
        self.sides[direction as usize].since = now;
        let before = self.life;
        let life = &mut self.life;
        match direction {
            Direction::Reply => {
                life.replied = true;
                life.backend_fin |= seen.flags.fin;
            }
            Direction::Request => {
                life.confirmed |= life.replied && !seen.flags.syn;
                life.client_fin |= seen.flags.fin;
            }
        }
        life.reset |= seen.flags.rst;
        self.life != before
    }
}
