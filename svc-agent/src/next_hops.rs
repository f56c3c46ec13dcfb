//! Says when the kernel part may keep next hops instead of asking for each packet's way: while every packet to one address goes
//! one way, and nothing of it has changed.
use std::net::{Ipv4Addr, Ipv6Addr};
use std::os::fd::{AsFd as _, OwnedFd};
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::Context as _;
use futures::{StreamExt as _, TryStreamExt as _};
use netlink_packet_route::RouteNetlinkMessage;
use netlink_packet_route::route::{RouteAttribute, RouteMessage};
use netlink_packet_route::rule::{RuleAction, RuleAttribute, RuleMessage};
use rtnetlink::packet_core::NetlinkPayload;
use rtnetlink::{Handle, IpVersion, MulticastGroup, RouteMessageBuilder};
use svc_common::map::{HopLease, pin};
use tokio::time::{Instant, sleep, timeout_at};
use tracing::{info, warn};

use crate::{host, sys};

/// Of a lease, so that nothing is kept for longer than this where the agent has ended.
const LEASE: Duration = Duration::from_secs(3);
const RENEW: Duration = Duration::from_secs(1);
/// Between two looks at all rules and routes, which may be many.
const REREAD: Duration = Duration::from_secs(60);
/// After a failure.
const RETRY: Duration = Duration::from_secs(5);

/// Never returns. `maps`: where they are pinned. Where the kernel's notices cannot be had no next hop is kept.
pub async fn run(maps: PathBuf) {
    loop {
        if let Err(error) = follow(&maps).await {
            warn!("next hops are asked for packet by packet: {error:#}");
        }
        sleep(RETRY).await;
    }
}

async fn follow(maps: &Path) -> anyhow::Result<()> {
    let map = sys::open_pin(&maps.join(pin::HOP_LEASE)).context("cannot open the map hop_lease")?;
    let groups = [
        MulticastGroup::Link,
        MulticastGroup::Neigh,
        MulticastGroup::Ipv4Ifaddr,
        MulticastGroup::Ipv6Ifaddr,
        MulticastGroup::Ipv4Route,
        MulticastGroup::Ipv6Route,
        MulticastGroup::Ipv4Rule,
        MulticastGroup::Ipv6Rule,
        MulticastGroup::Ipv4Netconf,
        MulticastGroup::Ipv6Netconf,
    ];
    let (connection, handle, mut notices) =
        rtnetlink::new_multicast_connection(&groups).context("cannot open a netlink socket to follow the routes")?;
    let connection = tokio::spawn(connection);
    let old: HopLease = sys::lookup(map.as_fd(), &0u32).context("cannot read the map hop_lease")?;
    let mut lender = Lender { map, generation: old.generation };
    let mut told = None;
    let result = 'notices: loop {
        // What changes from here on is noticed.
        if let Err(error) = lender.take_back() {
            break Err(error);
        }
        let obstacle = match obstacle(&handle).await {
            Ok(obstacle) => obstacle,
            Err(error) => break Err(error).context("cannot read the rules and routes"),
        };
        if told != Some(obstacle) {
            match obstacle {
                None => info!("next hops are kept while routes and neighbours stay as they are"),
                Some(obstacle) => info!("next hops are asked for packet by packet: {obstacle}"),
            }
            told = Some(obstacle);
        }
        let reread = Instant::now() + REREAD;
        while Instant::now() < reread {
            if obstacle.is_none()
                && let Err(error) = lender.lend()
            {
                break 'notices Err(error);
            }
            let Ok(notice) = timeout_at(reread.min(Instant::now() + RENEW), notices.next()).await else { continue };
            let Some((mut notice, _)) = notice else {
                break 'notices Err(anyhow::anyhow!("the netlink socket that follows the routes was closed"));
            };
            if let Err(error) = lender.take_back() {
                break 'notices Err(error);
            }
            let mut in_doubt = false;
            loop {
                in_doubt |= puts_in_doubt(&notice.payload);
                match notices.try_recv() {
                    Ok((next, _)) => notice = next,
                    Err(_) => break,
                }
            }
            if in_doubt {
                // Many may follow, and reading all routes takes a while where there are many.
                sleep(RENEW).await;
                while notices.try_recv().is_ok() {}
                continue 'notices;
            }
        }
    };
    connection.abort();
    // The next lease is given by who has read all anew.
    lender.take_back().and(result)
}

/// Writes the lease.
struct Lender {
    map: OwnedFd,
    generation: u32,
}

impl Lender {
    /// What is known is out of date, and what is learned from here on is not kept.
    fn take_back(&mut self) -> anyhow::Result<()> {
        self.generation = self.generation.wrapping_add(1).max(1);
        self.write(0)
    }

    fn lend(&self) -> anyhow::Result<()> {
        self.write(host::monotonic_nanoseconds() + LEASE.as_nanos() as u64)
    }

    fn write(&self, until: u64) -> anyhow::Result<()> {
        let lease = HopLease { until, generation: self.generation, pad: 0 };
        sys::update(self.map.as_fd(), &0u32, &lease).context("cannot write the map hop_lease")
    }
}

/// What makes packets to one address go different ways; None where nothing does.
async fn obstacle(handle: &Handle) -> Result<Option<&'static str>, rtnetlink::Error> {
    for family in [IpVersion::V4, IpVersion::V6] {
        let mut rules = handle.rule().get(family).execute();
        loop {
            match rules.try_next().await {
                Ok(Some(rule)) if selects(&rule) => return Ok(Some("there are rules beside those of every node")),
                Ok(Some(_)) => {}
                Ok(None) => break,
                // A kernel without policy routing.
                Err(rtnetlink::Error::NetlinkError(error))
                    if [-libc::EOPNOTSUPP, -libc::EAFNOSUPPORT].contains(&error.raw_code()) =>
                {
                    break;
                }
                Err(error) => return Err(error),
            }
        }
    }
    let v4 = RouteMessageBuilder::<Ipv4Addr>::new().build();
    let v6 = RouteMessageBuilder::<Ipv6Addr>::new().build();
    let mut routes = handle.route().get(v4).execute().chain(handle.route().get(v6).execute());
    while let Some(route) = routes.try_next().await? {
        if is_choice(&route) {
            return Ok(Some("a route has several next hops, or asks for the source"));
        }
    }
    Ok(None)
}

/// Whether rules or routes have to be read again after this notice.
fn puts_in_doubt(notice: &NetlinkPayload<RouteNetlinkMessage>) -> bool {
    match notice {
        NetlinkPayload::InnerMessage(message) => match message {
            RouteNetlinkMessage::NewRule(_) | RouteNetlinkMessage::DelRule(_) => true,
            RouteNetlinkMessage::NewRoute(route) | RouteNetlinkMessage::DelRoute(route) => is_choice(route),
            _ => false,
        },
        // The kernel had more notices than room for them.
        _ => true,
    }
}

/// Whether the rule treats packets to one address differently, or asks a table that not all ask.
fn selects(rule: &RuleMessage) -> bool {
    const TABLES: [u8; 3] = [libc::RT_TABLE_LOCAL, libc::RT_TABLE_MAIN, libc::RT_TABLE_DEFAULT];
    let is_plain = |attribute: &RuleAttribute| match attribute {
        RuleAttribute::Table(_) | RuleAttribute::Priority(_) | RuleAttribute::Protocol(_) => true,
        // Said of none.
        RuleAttribute::SuppressPrefixLen(length) => *length == u32::MAX,
        _ => false,
    };
    let header = &rule.header;
    header.action != RuleAction::ToTable
        || !TABLES.contains(&header.table)
        || header.src_len != 0
        || header.dst_len != 0
        || header.tos != 0
        || !rule.attributes.iter().all(is_plain)
}

/// Whether the route leads two packets to one address different ways. An object that it refers to may have several next hops.
fn is_choice(route: &RouteMessage) -> bool {
    route.header.source_prefix_length != 0
        || route.attributes.iter().any(|attribute| {
            matches!(attribute, RouteAttribute::MultiPath(_) | RouteAttribute::NhId(_) | RouteAttribute::Source(_))
        })
}

#[cfg(test)]
mod tests {
    use super::*;
    use rstest::rstest;

    fn rule(table: u8, attributes: &[RuleAttribute]) -> RuleMessage {
        let mut rule = RuleMessage::default();
        rule.header.action = RuleAction::ToTable;
        rule.header.table = table;
        rule.attributes = attributes.to_vec();
        rule
    }

    #[rstest]
    #[case::every_nodes(&[RuleAttribute::Table(254), RuleAttribute::SuppressPrefixLen(u32::MAX)], false)]
    #[case::marked(&[RuleAttribute::FwMark(1)], true)]
    #[case::of_an_interface(&[RuleAttribute::Iifname("eth1".to_owned())], true)]
    #[case::vrf(&[RuleAttribute::L3MDev(true)], true)]
    #[case::wireguards(&[RuleAttribute::SuppressPrefixLen(0)], true)]
    fn a_rule_that_selects_packets(#[case] attributes: &[RuleAttribute], #[case] expected: bool) {
        assert_eq!(selects(&rule(libc::RT_TABLE_MAIN, attributes)), expected);
    }

    #[test]
    fn a_rule_with_a_table_of_its_own_selects() {
        assert!(selects(&rule(100, &[])));
    }

    #[test]
    fn a_rule_of_a_source_selects() {
        let mut rule = rule(libc::RT_TABLE_MAIN, &[]);
        rule.header.src_len = 32;
        assert!(selects(&rule));
    }

    #[rstest]
    #[case::by_a_gateway(RouteAttribute::Oif(1), false)]
    #[case::several(RouteAttribute::MultiPath(Vec::new()), true)]
    #[case::an_object(RouteAttribute::NhId(7), true)]
    fn a_route_that_leads_several_ways(#[case] attribute: RouteAttribute, #[case] expected: bool) {
        let mut route = RouteMessage::default();
        route.attributes.push(attribute);
        assert_eq!(is_choice(&route), expected);
    }

    #[test]
    fn a_source_specific_route_is_a_choice() {
        let mut route = RouteMessage::default();
        route.header.source_prefix_length = 64;
        assert!(is_choice(&route));
    }
}
