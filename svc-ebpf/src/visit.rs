//! Finding a packet's flow, and noting what the packet says of it.
use svc_common::flow::{CONFIRMED, FIN_BACKEND, FIN_CLIENT, Hit, Key, REPLIED, RESET, State, find, is_outlived, touch};
use svc_common::map::{NO_BACKEND, UDP};

use crate::parse::{Headers, TCP_FIN, TCP_RST, TCP_SYN};
use crate::tables::Tables;

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(u32)]
pub enum Visit {
    None,
    /// Found, but not to be gone on with: a new connection on a flow that has ended or towards a backend that has left; so
    /// for any datagram.
    Over,
    Found,
    /// Found, and the flow's other cell is to be told of it.
    Told,
}

/// What is known of the packet stands in `hit`.
#[inline(always)]
pub fn visit<T: Tables>(tables: &T, key: &Key, headers: &Headers, hit: &mut Hit, now: u16) -> Visit {
    let cell = find(tables.flows(), key, hit);
    if cell.is_null() {
        return Visit::None;
    }
    if headers.is_icmp_error() {
        return Visit::Found;
    }
    if !hit.is_reverse() {
        let new_connection = headers.is_syn() || headers.protocol == UDP;
        let closed = headers.is_syn() && State::of(hit.state) == State::Closed;
        let over = closed || new_connection && is_outlived(tables.flows(), key, hit, now);
        if over || (new_connection && hit.backend != NO_BACKEND && !tables.is_live(hit.backend)) {
            return Visit::Over;
        }
    }
    // SAFETY: `cell` was just found in the table.
    if unsafe { touch(cell, hit, learned(headers, hit), now) } { Visit::Told } else { Visit::Found }
}

/// The state bits that this packet adds to its flow's.
#[inline(always)]
const fn learned(headers: &Headers, hit: &Hit) -> u8 {
    let reverse = hit.is_reverse();
    let mut bits = if reverse {
        REPLIED
    } else if headers.flags & TCP_SYN == 0 && hit.state & REPLIED != 0 {
        CONFIRMED
    } else {
        0
    };
    if headers.flags & TCP_FIN != 0 {
        bits |= if reverse { FIN_BACKEND } else { FIN_CLIENT };
    }
    if headers.flags & TCP_RST != 0 {
        bits |= RESET;
    }
    bits
}
