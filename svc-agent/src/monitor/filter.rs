//! Which events are shown.
use std::net::IpAddr;

use clap::ValueEnum;
use ipnet::IpNet;
use svc_common::map::{EVENT_FROM_SOCKET, Event};
use svc_common::{Kind, Reason};

/// [`Kind`], as a flag says it.
#[derive(ValueEnum, Clone, Copy, PartialEq, Eq, Debug)]
pub enum KindFlag {
    Drop,
    Reject,
    NewFlow,
}

impl From<KindFlag> for Kind {
    fn from(flag: KindFlag) -> Self {
        match flag {
            KindFlag::Drop => Kind::Drop,
            KindFlag::Reject => Kind::Reject,
            KindFlag::NewFlow => Kind::NewFlow,
        }
    }
}

/// The reasons that an event may have.
pub fn reasons() -> impl Iterator<Item = Reason> {
    Reason::ALL.iter().copied().filter(|reason| reason.kind().is_some())
}

/// The bits of the reasons of these kinds, of which only those in `wanted` count unless it is empty; so for `kinds`.
pub fn bits(kinds: &[Kind], wanted: &[Reason]) -> u32 {
    reasons()
        .filter(|reason| kinds.is_empty() || reason.kind().is_some_and(|kind| kinds.contains(&kind)))
        .filter(|reason| wanted.is_empty() || wanted.contains(reason))
        .fold(0, |bits, reason| bits | reason.bit())
}

/// An address, or a range of them.
///
/// # Errors
/// Where it is neither.
pub fn range(text: &str) -> Result<IpNet, String> {
    let address = || text.parse::<IpAddr>().ok().map(IpNet::from);
    text.parse().ok().or_else(address).ok_or_else(|| "neither an IP address nor a CIDR".to_owned())
}

/// Whether one of the event's addresses, client's, frontend's or backend's, is in one of these ranges.
pub fn is_in(event: &Event, ranges: &[IpNet]) -> bool {
    let client = (event.from != EVENT_FROM_SOCKET).then_some(event.src);
    let backend = (event.to_port != 0).then_some(event.to);
    let mut addresses = [client, Some(event.dst), backend].into_iter().flatten().map(IpAddr::from);
    ranges.is_empty() || addresses.any(|address| ranges.iter().any(|range| range.contains(&address)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use rstest::rstest;
    use svc_common::Addr;

    fn addr(text: &str) -> Addr {
        text.parse::<IpAddr>().unwrap().into()
    }

    fn event() -> Event {
        Event { src: addr("192.0.2.9"), dst: addr("10.96.0.80"), to: addr("fd00::1"), to_port: 80, ..Event::default() }
    }

    #[rstest]
    #[case::none(&[], true)]
    #[case::client(&["192.0.2.9"], true)]
    #[case::range_of_frontends(&["10.96.0.0/16"], true)]
    #[case::backend(&["198.51.100.1", "fd00::/64"], true)]
    #[case::another(&["192.0.2.10"], false)]
    fn an_address_may_be_any_of_the_three(#[case] ranges: &[&str], #[case] shown: bool) {
        let ranges: Vec<IpNet> = ranges.iter().map(|text| range(text).unwrap()).collect();
        assert_eq!(is_in(&event(), &ranges), shown);
    }

    #[test]
    fn what_is_not_known_of_a_socket_is_not_compared() {
        let socket = Event { from: EVENT_FROM_SOCKET, src: Addr::ANY_V4, to_port: 0, ..event() };
        assert!(!is_in(&socket, &[range("0.0.0.0").unwrap()]));
        assert!(!is_in(&socket, &[range("fd00::1").unwrap()]));
    }

    #[test]
    fn a_kind_and_a_reason_together_mean_both() {
        let drops = bits(&[Kind::Drop], &[]);
        assert_eq!(drops & Reason::NoBackend.bit(), 0);
        assert_ne!(drops & Reason::SourceRange.bit(), 0);
        assert_eq!(bits(&[Kind::Drop], &[Reason::SourceRange, Reason::NoBackend]), Reason::SourceRange.bit());
        assert_eq!(bits(&[], &[Reason::NoBackend]), Reason::NoBackend.bit());
        assert_eq!(bits(&[], &[]) & Reason::FlowHit.bit(), 0);
    }

    #[test]
    fn what_is_no_address_is_refused() {
        assert!(range("web").is_err() && range("10.0.0.0/33").is_err() && range("").is_err());
    }
}
