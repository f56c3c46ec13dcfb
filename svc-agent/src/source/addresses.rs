//! The node's own addresses, from the kernel of the network namespace that the agent runs in.
use std::collections::BTreeSet;
use std::net::IpAddr;
use std::time::Duration;

use anyhow::Context as _;
use futures::{StreamExt as _, TryStreamExt as _};
use netlink_packet_route::address::{AddressAttribute, AddressMessage};
use rtnetlink::{Handle, MulticastGroup};
use tokio::time::{sleep, timeout};
use tracing::warn;

use super::{Event, Sender, send};

/// Changes come in twos and threes; an address that is there for less than this is none.
const SETTLE: Duration = Duration::from_millis(20);
/// A socket whose buffer overflows loses notices.
const REREAD: Duration = Duration::from_secs(60);

/// Sends the list at once, and again whenever it has changed, until nobody listens any more.
///
/// # Errors
/// Where no netlink socket can be opened.
pub async fn run(events: Sender) -> anyhow::Result<()> {
    let groups = [MulticastGroup::Ipv4Ifaddr, MulticastGroup::Ipv6Ifaddr];
    let (connection, handle, mut notices) =
        rtnetlink::new_multicast_connection(&groups).context("cannot open a netlink socket to follow the addresses")?;
    let connection = tokio::spawn(connection);
    let mut sent: Option<Vec<IpAddr>> = None;
    loop {
        match read(&handle).await {
            Ok(addresses) => {
                let addresses: Vec<IpAddr> = addresses.into_iter().collect();
                if sent.as_ref() != Some(&addresses) {
                    sent = Some(addresses.clone());
                    if send(&events, Event::Addresses(addresses)).await.is_err() {
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
                // The list about to be read has all that was noticed until now.
                while notices.try_recv().is_ok() {}
            }
        }
    }
}

async fn read(handle: &Handle) -> Result<BTreeSet<IpAddr>, rtnetlink::Error> {
    handle
        .address()
        .get()
        .execute()
        .try_filter_map(|message| async move { Ok(address(&message).filter(|address| is_the_nodes(*address))) })
        .try_collect()
        .await
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
