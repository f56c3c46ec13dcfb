//! The node's interfaces and their addresses, from the kernel of the network namespace that the agent runs in.
use std::collections::BTreeSet;
use std::net::IpAddr;
use std::time::Duration;

use anyhow::Context as _;
use futures::{StreamExt as _, TryStreamExt as _};
use netlink_packet_route::address::{AddressAttribute, AddressMessage};
use netlink_packet_route::link::LinkAttribute;
use rtnetlink::{Handle, MulticastGroup};
use svc_common::Addr;
use svc_common::map::Uplink;
use tokio::time::{sleep, timeout};
use tracing::warn;

use super::{Event, Interfaces, Link, Sender, send};

/// Changes come in twos and threes; an address that is there for less than this is none.
const SETTLE: Duration = Duration::from_millis(20);
/// A socket whose buffer overflows loses notices.
const REREAD: Duration = Duration::from_secs(60);

/// Sends what there is at once, and again whenever it has changed, until nobody listens any more. `uplink` is the first
/// one's name.
///
/// # Errors
/// Where no netlink socket can be opened.
pub async fn run(events: Sender, uplink: &str) -> anyhow::Result<()> {
    let groups = [MulticastGroup::Ipv4Ifaddr, MulticastGroup::Ipv6Ifaddr, MulticastGroup::Link];
    let (connection, handle, mut notices) =
        rtnetlink::new_multicast_connection(&groups).context("cannot open a netlink socket to follow the addresses")?;
    let connection = tokio::spawn(connection);
    let mut sent: Option<Interfaces> = None;
    loop {
        match read(&handle, uplink).await {
            Ok(interfaces) => {
                if sent.as_ref() != Some(&interfaces) {
                    sent = Some(interfaces.clone());
                    if send(&events, Event::Interfaces(interfaces)).await.is_err() {
                        connection.abort();
                        return Ok(());
                    }
                }
            }
            Err(error) => {
                warn!("cannot read the node's addresses, trying again: {error}");
                sleep(Duration::from_secs(1)).await;
                continue;
            }
        }
        tokio::select! {
            () = events.closed() => {}
            notice = timeout(REREAD, notices.next()) => {
                if let Ok(None) = notice {
                    anyhow::bail!("the netlink socket that follows the addresses was closed");
                }
                sleep(SETTLE).await;
                // What is about to be read has all that was noticed until now.
                while notices.try_recv().is_ok() {}
            }
        }
    }
}

async fn read(handle: &Handle, uplink: &str) -> Result<Interfaces, rtnetlink::Error> {
    let uplink = link(handle, uplink).await?;
    let mut messages = handle.address().get().execute();
    let mut pairs = Vec::new();
    while let Some(message) = messages.try_next().await? {
        pairs.extend(address(&message).map(|address| (message.header.index, address)));
    }
    Ok(interfaces(pairs, uplink))
}

/// Of addresses by interface index, in the kernel's order.
fn interfaces(pairs: Vec<(u32, IpAddr)>, uplink: Option<Link>) -> Interfaces {
    let mut interfaces = Interfaces { uplink, ..Interfaces::default() };
    for (index, address) in pairs.into_iter().filter(|(_, address)| is_the_nodes(*address)) {
        let sources = interfaces.sources.entry(index).or_insert(Uplink { v4: Addr::ANY_V4, v6: Addr::ANY_V6 });
        let place = if address.is_ipv4() { &mut sources.v4 } else { &mut sources.v6 };
        if *place == place.any() {
            *place = address.into();
        }
        interfaces.addresses.push(address);
    }
    let mut seen = BTreeSet::new();
    interfaces.addresses.retain(|address| seen.insert(*address));
    interfaces
}

/// None where there is no such interface.
async fn link(handle: &Handle, name: &str) -> Result<Option<Link>, rtnetlink::Error> {
    let message = match handle.link().get().match_name(name.to_owned()).execute().try_next().await {
        Err(rtnetlink::Error::NetlinkError(error)) if error.raw_code() == -libc::ENODEV => None,
        result => result?,
    };
    Ok(message.map(|message| {
        let bytes = message.attributes.iter().find_map(|attribute| match attribute {
            LinkAttribute::Address(bytes) => <[u8; 6]>::try_from(bytes.as_slice()).ok(),
            _ => None,
        });
        let [a, b, c, d, e, f] = bytes.unwrap_or_default();
        Link { index: message.header.index, address: [[a, b], [c, d], [e, f]].map(u16::from_ne_bytes) }
    }))
}

/// On a point-to-point link IFA_ADDRESS is the peer's; IFA_LOCAL, where there is one, is ours (rtnetlink(7)).
fn address(message: &AddressMessage) -> Option<IpAddr> {
    let find = |pick: fn(&AddressAttribute) -> Option<IpAddr>| message.attributes.iter().find_map(pick);
    let local = find(|attribute| match attribute {
        AddressAttribute::Local(address) => Some(*address),
        _ => None,
    });
    local.or_else(|| {
        find(|attribute| match attribute {
            AddressAttribute::Address(address) => Some(*address),
            _ => None,
        })
    })
}

/// Another machine could send to it without naming an interface.
fn is_the_nodes(address: IpAddr) -> bool {
    let scoped = match address {
        IpAddr::V4(_) => false,
        IpAddr::V6(v6) => v6.is_unicast_link_local(),
    };
    !(scoped || address.is_loopback() || address.is_multicast() || address.is_unspecified())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_interface_sends_from_its_first_address_of_each_family() {
        let pairs = [
            (1, "127.0.0.1"),
            (2, "192.0.2.1"),
            (2, "192.0.2.2"),
            (3, "192.0.2.1"),
            (2, "fe80::1"),
            (2, "2001:db8::1"),
        ];
        let pairs = pairs.map(|(index, text)| (index, text.parse().unwrap())).to_vec();
        let Interfaces { addresses, sources, .. } = interfaces(pairs, None);
        assert_eq!(addresses, ["192.0.2.1", "192.0.2.2", "2001:db8::1"].map(|text| text.parse::<IpAddr>().unwrap()));
        let addr = |text: &str| Addr::from(text.parse::<IpAddr>().unwrap());
        let expected = [
            (2, Uplink { v4: addr("192.0.2.1"), v6: addr("2001:db8::1") }),
            (3, Uplink { v4: addr("192.0.2.1"), v6: Addr::ANY_V6 }),
        ];
        assert_eq!(sources, expected.into());
    }

    #[test]
    fn only_addresses_that_other_machines_could_use_are_the_nodes() {
        for (text, is) in [
            ("192.168.1.1", true),
            ("169.254.20.10", true),
            ("127.0.0.1", false),
            ("224.0.0.1", false),
            ("2001:db8::1", true),
            ("fd00::1", true),
            ("fe80::1", false),
            ("::1", false),
            ("ff02::1", false),
        ] {
            assert_eq!(is_the_nodes(text.parse().unwrap()), is, "{text}");
        }
    }
}
