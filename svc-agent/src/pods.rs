//! The interfaces that lead to this node's pods: traffic that a socket hook does not see, or may not judge, is translated
//! there. They are followed as they come and go, and so are interfaces to the network, where none is named: a network plugin
//! makes its tunnel when the agent has long started.
use std::collections::BTreeSet;
use std::str::FromStr;
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context as _;
use futures::channel::mpsc::UnboundedReceiver;
use futures::{StreamExt as _, TryStreamExt as _};
use netlink_packet_route::RouteNetlinkMessage;
use netlink_packet_route::link::{InfoKind, LinkAttribute, LinkInfo, LinkMessage};
use rtnetlink::packet_core::NetlinkMessage;
use rtnetlink::sys::SocketAddr;
use rtnetlink::{Handle, MulticastGroup};
use tokio::task::JoinHandle;
use tokio::time::{Instant, sleep, timeout_at};
use tracing::{debug, info, warn};

use crate::attach::Programs;
use crate::host;
use crate::status::Status;

/// A pod's interface is made in several steps, each of which is a notice.
const SETTLE: Duration = Duration::from_millis(5);

/// `--pod-interfaces`.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub enum PodInterfaces {
    /// Every veth and netkit whose other end is in another network namespace, uplinks left out.
    #[default]
    Auto,
    None,
    /// Those whose name is like one of these (shell patterns).
    Like(Vec<glob::Pattern>),
}

impl FromStr for PodInterfaces {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text.trim() {
            "auto" => Ok(PodInterfaces::Auto),
            "none" => Ok(PodInterfaces::None),
            "" => Err("it is empty: say auto, none, or a pattern such as veth*".to_owned()),
            list => list
                .split(',')
                .map(|pattern| {
                    glob::Pattern::new(pattern.trim())
                        .map_err(|error| format!("{:?} is no pattern: {error}", pattern.trim()))
                })
                .collect::<Result<_, _>>()
                .map(PodInterfaces::Like),
        }
    }
}

impl PodInterfaces {
    fn has(&self, interface: &Interface, uplinks: &[String]) -> bool {
        !uplinks.contains(&interface.name)
            && match self {
                PodInterfaces::Auto => interface.leads_elsewhere,
                PodInterfaces::None => false,
                PodInterfaces::Like(patterns) => patterns.iter().any(|pattern| pattern.matches(&interface.name)),
            }
    }
}

#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Debug)]
struct Interface {
    index: u32,
    name: String,
    /// One end of a pair whose other end is in another network namespace.
    leads_elsewhere: bool,
}

/// Keeps the programs attached to the pods' interfaces, and to uplinks that appear.
pub struct Pods {
    which: PodInterfaces,
    /// Whether uplinks that appear are served.
    more_uplinks: bool,
    programs: Programs,
    sync_period: Duration,
    status: Arc<Status>,
    handle: Handle,
    notices: UnboundedReceiver<(NetlinkMessage<RouteNetlinkMessage>, SocketAddr)>,
    connection: JoinHandle<()>,
    attached: BTreeSet<Interface>,
    /// Told of already.
    refused: BTreeSet<Interface>,
    /// Told of already.
    refused_uplinks: BTreeSet<String>,
    /// Pins of links that could not be repaired, told of already.
    broken: BTreeSet<String>,
}

impl Pods {
    /// Attaches to the interfaces that there are. `more_uplinks`: whether uplinks that appear are served beside those that
    /// `programs` has.
    ///
    /// # Errors
    /// Where the interfaces cannot be read. One that cannot be attached to is told in the log.
    pub async fn start(
        which: PodInterfaces,
        more_uplinks: bool,
        programs: Programs,
        sync_period: Duration,
        status: Arc<Status>,
    ) -> anyhow::Result<Self> {
        let (connection, handle, notices) = rtnetlink::new_multicast_connection(&[MulticastGroup::Link])
            .context("cannot open a netlink socket to follow the interfaces")?;
        let connection = tokio::spawn(connection);
        let mut pods = Pods {
            which,
            more_uplinks,
            programs,
            sync_period,
            status,
            handle,
            notices,
            connection,
            attached: BTreeSet::new(),
            refused: BTreeSet::new(),
            refused_uplinks: BTreeSet::new(),
            broken: BTreeSet::new(),
        };
        pods.attach().await.context("cannot read the node's interfaces")?;
        Ok(pods)
    }

    /// Follows the interfaces for good, and attaches again what somebody else detaches.
    ///
    /// # Errors
    /// Where the netlink socket breaks.
    pub async fn follow(mut self) -> anyhow::Result<()> {
        let mut next = Instant::now() + self.sync_period;
        loop {
            match timeout_at(next, self.notices.next()).await {
                Ok(None) => anyhow::bail!("the netlink socket that follows the interfaces was closed"),
                Ok(Some(_)) => {
                    sleep(SETTLE).await;
                    // The list about to be read has all that was noticed until now.
                    while self.notices.try_recv().is_ok() {}
                }
                Err(_elapsed) => {}
            }
            if self.more_uplinks {
                self.attach_uplinks();
            }
            // Of a socket whose buffer overflowed notices are lost.
            if let Err(error) = self.attach().await {
                warn!("cannot read the node's interfaces, trying again: {error}");
                sleep(Duration::from_secs(1)).await;
                continue;
            }
            let is_due = next <= Instant::now();
            if is_due {
                next = Instant::now() + self.sync_period;
            }
            self.repair(is_due);
        }
    }

    /// Looks after the links of the uplinks and of the cgroup, where `pods` is set after those of pods' interfaces as well.
    fn repair(&mut self, pods: bool) {
        let mut results = self.programs.repair();
        for interface in self.attached.iter().filter(|_| pods) {
            results.extend(self.programs.repair_pod(&interface.name));
        }
        let mut repaired = Vec::new();
        for (pin, result) in results {
            match result {
                Ok(()) => {
                    self.broken.remove(&pin);
                    repaired.push(pin);
                }
                Err(error) => {
                    if self.broken.insert(pin.clone()) {
                        warn!(link = pin, "cannot attach again: {error:#}");
                    }
                }
            }
        }
        if !repaired.is_empty() {
            warn!(links = repaired.join(" "), "somebody else detached programs: attached again");
            self.status.links_repaired(repaired.len());
        }
    }

    /// To those that have appeared.
    fn attach_uplinks(&mut self) {
        // None with an address, as while one is set up anew, is no news here.
        let found = host::uplinks(&[]).unwrap_or_default();
        self.refused_uplinks.retain(|uplink| found.contains(uplink));
        for uplink in found {
            if self.programs.uplinks().contains(&uplink) {
                continue;
            }
            match self.programs.attach_uplink(&uplink) {
                Ok(()) => {
                    info!(uplink, "an interface to the network has appeared: served");
                    self.refused_uplinks.remove(&uplink);
                }
                Err(error) => {
                    if self.refused_uplinks.insert(uplink.clone()) {
                        warn!(uplink, "cannot serve the new interface to the network: {error:#}");
                    }
                }
            }
        }
    }

    async fn attach(&mut self) -> Result<(), rtnetlink::Error> {
        let all: Vec<Interface> = self
            .handle
            .link()
            .get()
            .execute()
            .try_filter_map(|link| async move { Ok(interface(&link)) })
            .try_collect()
            .await?;
        let wanted: BTreeSet<Interface> =
            all.into_iter().filter(|interface| self.which.has(interface, self.programs.uplinks())).collect();
        let names: BTreeSet<&str> = wanted.iter().map(|interface| interface.name.as_str()).collect();
        if let Err(error) = self.programs.forget_all_but(&names) {
            warn!("cannot remove the links of interfaces that are gone: {error:#}");
        }
        let before = self.attached.len();
        self.attached.retain(|interface| wanted.contains(interface));
        self.refused.retain(|interface| wanted.contains(interface));
        let gone = before - self.attached.len();
        let mut new = 0;
        for interface in &wanted {
            if self.attached.contains(interface) {
                continue;
            }
            match self.programs.attach_pod(&interface.name) {
                Ok(()) => {
                    debug!(interface = interface.name, "attached to a pod's interface");
                    self.attached.insert(interface.clone());
                    self.refused.remove(interface);
                    new += 1;
                }
                // It may have gone meanwhile, of which there will be a notice.
                Err(error) => {
                    if self.refused.insert(interface.clone()) {
                        warn!(interface = interface.name, "cannot attach to a pod's interface: {error:#}");
                    }
                }
            }
        }
        if new + gone > 0 {
            info!(new, gone, all = self.attached.len(), "pods' interfaces");
        }
        Ok(())
    }
}

impl Drop for Pods {
    fn drop(&mut self) {
        self.connection.abort();
    }
}

fn interface(link: &LinkMessage) -> Option<Interface> {
    let mut name = None;
    let (mut pair, mut elsewhere) = (false, false);
    for attribute in &link.attributes {
        match attribute {
            LinkAttribute::IfName(text) => name = Some(text.clone()),
            LinkAttribute::LinkNetNsId(_) => elsewhere = true,
            LinkAttribute::LinkInfo(infos) => {
                pair = infos.iter().any(|info| match info {
                    LinkInfo::Kind(InfoKind::Veth) => true,
                    LinkInfo::Kind(InfoKind::Other(kind)) => kind == "netkit",
                    _ => false,
                });
            }
            _ => {}
        }
    }
    Some(Interface { index: link.header.index, name: name?, leads_elsewhere: pair && elsewhere })
}

#[cfg(test)]
mod tests {
    use super::*;
    use rstest::rstest;

    #[rstest]
    #[case::auto_takes_a_pair_that_leads_elsewhere("auto", "veth0", true, true)]
    #[case::auto_leaves_all_others("auto", "cni0", false, false)]
    #[case::auto_leaves_uplinks("auto", "eth0", true, false)]
    #[case::none("none", "veth0", true, false)]
    #[case::a_pattern("cali*", "cali1234", false, true)]
    #[case::a_pattern_alone_decides("cali*", "veth0", true, false)]
    #[case::one_of_several("tap?, lxc*", "lxc9", false, true)]
    fn which_interfaces_lead_to_pods(
        #[case] which: &str,
        #[case] name: &str,
        #[case] leads_elsewhere: bool,
        #[case] expected: bool,
    ) {
        let which: PodInterfaces = which.parse().unwrap();
        let interface = Interface { index: 1, name: name.to_owned(), leads_elsewhere };
        assert_eq!(which.has(&interface, &["eth0".to_owned()]), expected);
    }

    #[test]
    fn a_bad_pattern_is_told() {
        assert!("veth[".parse::<PodInterfaces>().unwrap_err().contains("veth["));
        assert!("".parse::<PodInterfaces>().is_err());
    }
}
