//! Interfaces, and the kernel's settings for what passes them.
use std::path::Path;

use nix::ifaddrs::getifaddrs;

use super::Finding;
use crate::host;

/// The least that IPv6 asks of a link (RFC 8200).
const LEAST_MTU: u32 = 1280;

/// An interface to the network.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Uplink {
    pub name: String,
    /// None where it is not told.
    pub mtu: Option<u32>,
    /// Whether it has an address that other hosts can use.
    pub v4: bool,
    pub v6: bool,
    /// [`host::tunnel_headers`].
    pub tunnel: Option<u32>,
}

/// The uplinks that an agent with `--uplink wanted` would serve.
pub fn uplinks(wanted: &[String]) -> (Finding, Vec<Uplink>) {
    const CHECK: &str = "uplinks";
    let names = match host::uplinks(wanted) {
        Ok(names) => names,
        Err(error) => {
            let finding = Finding::failed(CHECK, format!("{error:#}"), "name one with --uplink: `ip link` lists them");
            return (finding, Vec::new());
        }
    };
    let uplinks: Vec<Uplink> = names.iter().map(|name| uplink(name)).collect();
    let finding = if uplinks.iter().any(|uplink| uplink.v4 || uplink.v6) {
        Finding::ok(CHECK, names.join(", "))
    } else {
        Finding::failed(
            CHECK,
            format!("{} without an address", names.join(", ")),
            "give one an address, or name another with --uplink",
        )
    };
    (finding, uplinks)
}

fn uplink(name: &str) -> Uplink {
    let addresses = getifaddrs().into_iter().flatten().filter(|entry| entry.interface_name == name);
    let (mut v4, mut v6) = (false, false);
    for address in addresses.filter_map(|entry| entry.address) {
        v4 |= address.as_sockaddr_in().is_some();
        v6 |= address.as_sockaddr_in6().is_some_and(|address| !address.ip().is_unicast_link_local());
    }
    let tunnel = host::tunnel_headers(name);
    Uplink { name: name.to_owned(), mtu: host::mtu(name), v4, v6, tunnel }
}

/// Packets to backends elsewhere leave by an uplink, and through a tunnel they leave by two.
pub fn mtu(uplinks: &[Uplink]) -> Finding {
    const CHECK: &str = "mtu";
    let mtus: Vec<(&Uplink, u32)> = uplinks.iter().filter_map(|uplink| Some((uplink, uplink.mtu?))).collect();
    let found = mtus.iter().map(|(uplink, mtu)| format!("{} {mtu}", uplink.name)).collect::<Vec<_>>().join(", ");
    if let Some((uplink, mtu)) = mtus.iter().find(|(uplink, mtu)| uplink.v6 && *mtu < LEAST_MTU) {
        return Finding::warning(
            CHECK,
            found,
            format!("ip link set {} mtu {LEAST_MTU}, or more: IPv6 does not work with {mtu}", uplink.name),
        );
    }
    let narrowest = mtus.iter().filter(|(uplink, _)| uplink.tunnel.is_none()).map(|(_, mtu)| *mtu).min();
    let too_wide = narrowest.and_then(|narrowest| {
        mtus.iter().find_map(|(uplink, mtu)| {
            let room = narrowest.saturating_sub(uplink.tunnel?);
            (*mtu > room).then_some((uplink, room))
        })
    });
    match too_wide {
        Some((tunnel, room)) => Finding::warning(
            CHECK,
            format!("{found}: what fills {} does not fit the link below it", tunnel.name),
            format!("ip link set {} mtu {room}", tunnel.name),
        ),
        None => Finding::ok(CHECK, found),
    }
}

fn setting(proc: &Path, name: &str) -> Option<String> {
    std::fs::read_to_string(proc.join("sys/net").join(name)).ok().map(|text| text.trim().to_owned())
}

/// What comes in for a pod of this node is handed to the stack to be forwarded. `proc`: where procfs is mounted.
pub fn forwarding(proc: &Path, uplinks: &[Uplink]) -> Finding {
    const CHECK: &str = "forwarding";
    let mut remedies = Vec::new();
    for (family, remedy) in
        [("ipv4", "sysctl -w net.ipv4.ip_forward=1"), ("ipv6", "sysctl -w net.ipv6.conf.all.forwarding=1")]
    {
        let concerned = uplinks.iter().filter(|uplink| if family == "ipv4" { uplink.v4 } else { uplink.v6 });
        let mut off = concerned.filter(|uplink| {
            setting(proc, &format!("{family}/conf/{}/forwarding", uplink.name)).as_deref() == Some("0")
        });
        if let Some(uplink) = off.next() {
            remedies.push((format!("{family} on {}", uplink.name), remedy));
        }
    }
    if remedies.is_empty() {
        return Finding::ok(CHECK, "on");
    }
    let (off, remedies): (Vec<_>, Vec<_>) = remedies.into_iter().unzip();
    Finding::failed(
        CHECK,
        format!("off for {}: pods of this node get nothing from the network", off.join(" and ")),
        remedies.join("; "),
    )
}

/// Strict filtering drops what comes in by another interface than the one that leads back. `proc`: where procfs is
/// mounted.
pub fn rp_filter(proc: &Path, uplinks: &[Uplink]) -> Finding {
    const CHECK: &str = "rp_filter";
    const STRICT: u32 = 1;
    let value = |name: &str| -> u32 {
        setting(proc, &format!("ipv4/conf/{name}/rp_filter")).and_then(|text| text.parse().ok()).unwrap_or(0)
    };
    let all = value("all");
    let strict: Vec<&str> = uplinks
        .iter()
        .filter(|uplink| uplink.v4 && value(&uplink.name).max(all) == STRICT)
        .map(|uplink| uplink.name.as_str())
        .collect();
    match strict[..] {
        [] => Finding::ok(CHECK, "not strict"),
        // With one way in there is one way back.
        [only] if uplinks.len() == 1 => Finding::ok(CHECK, format!("strict on {only}, the only uplink")),
        _ => Finding::warning(
            CHECK,
            format!(
                "strict on {}: connections that come in by one uplink and whose replies would leave by another are dropped",
                strict.join(", ")
            ),
            strict
                .iter()
                .map(|name| format!("sysctl -w net.ipv4.conf.{}.rp_filter=2", name.replace('.', "/")))
                .collect::<Vec<_>>()
                .join("; "),
        ),
    }
}

/// With route_localnet the stack takes packets for 127.0.0.0/8 from other hosts (CVE-2020-8558). kube-proxy's iptables mode
/// turns it on and leaves it on; svc has no use for it. `proc`: where procfs is mounted.
pub fn route_localnet(proc: &Path, uplinks: &[Uplink]) -> Finding {
    const CHECK: &str = "route_localnet";
    let is_on = |name: &str| {
        let text = setting(proc, &format!("ipv4/conf/{name}/route_localnet"));
        text.is_some_and(|text| text != "0")
    };
    let own = uplinks.iter().filter(|uplink| uplink.v4).map(|uplink| uplink.name.as_str());
    let on: Vec<&str> = ["all"].into_iter().chain(own).filter(|name| is_on(name)).collect();
    if on.is_empty() {
        return Finding::ok(CHECK, "off");
    }
    Finding::warning(
        CHECK,
        format!(
            "on for {}: neighbours reach what listens on 127.0.0.1 only, unless a firewall such as the kubelet's is in the way",
            on.join(", ")
        ),
        on.iter()
            .map(|name| format!("sysctl -w net.ipv4.conf.{}.route_localnet=0", name.replace('.', "/")))
            .collect::<Vec<_>>()
            .join("; "),
    )
}

pub fn source_ports() -> Finding {
    const CHECK: &str = "source_ports";
    match host::source_ports() {
        Err(error) => Finding::failed(CHECK, format!("{error:#}"), "mount procfs at /proc"),
        Ok(ports) => match ports.shared_with {
            None => Finding::ok(CHECK, format!("{} to {}", ports.first, ports.last)),
            Some((first, last)) => Finding::warning(
                CHECK,
                format!(
                    "{} to {}, of which the node's sockets take some (net.ipv4.ip_local_port_range is {first} to {last})",
                    ports.first, ports.last
                ),
                format!("sysctl -w net.ipv4.ip_local_reserved_ports={}-{}", ports.first, ports.last),
            ),
        },
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::check::Grade;
    use rstest::rstest;

    fn uplink(name: &str, mtu: u32) -> Uplink {
        let headers = [("vxlan", 50), ("tunl", 20), ("tun", 0)];
        let tunnel = headers.iter().find(|(kind, _)| name.starts_with(kind)).map(|(_, headers)| *headers);
        Uplink { name: name.to_owned(), mtu: Some(mtu), v4: true, v6: false, tunnel }
    }

    fn proc(settings: &[(&str, &str)]) -> tempfile::TempDir {
        let proc = tempfile::tempdir().unwrap();
        for (name, value) in settings {
            let path = proc.path().join("sys/net").join(name);
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(path, format!("{value}\n")).unwrap();
        }
        proc
    }

    #[rstest]
    #[case::one(&[uplink("eth0", 1500)], Grade::Ok)]
    #[case::tunnel_that_fits(&[uplink("eth0", 1500), uplink("vxlan0", 1450)], Grade::Ok)]
    #[case::ipip_that_fits(&[uplink("eth0", 1500), uplink("tunl0", 1480)], Grade::Ok)]
    #[case::ipip_that_does_not(&[uplink("eth0", 1500), uplink("tunl0", 1500)], Grade::Warning)]
    #[case::unknown(&[uplink("eth0", 1500), uplink("tun0", 1500)], Grade::Ok)]
    #[case::tunnel_that_does_not(&[uplink("eth0", 1500), uplink("vxlan0", 1500)], Grade::Warning)]
    #[case::too_narrow_for_ipv6(&[Uplink { v6: true, ..uplink("eth0", 1200) }], Grade::Warning)]
    fn a_tunnel_is_narrower_than_what_it_goes_by(#[case] uplinks: &[Uplink], #[case] expected: Grade) {
        let finding = mtu(uplinks);
        assert_eq!(finding.result, expected, "{finding:?}");
    }

    #[test]
    fn forwarding_matters_in_the_families_that_an_uplink_has() {
        let settings = [("ipv4/conf/eth0/forwarding", "1"), ("ipv6/conf/eth0/forwarding", "0")];
        let proc = proc(&settings);
        assert_eq!(forwarding(proc.path(), &[uplink("eth0", 1500)]).result, Grade::Ok);
        let finding = forwarding(proc.path(), &[Uplink { v6: true, ..uplink("eth0", 1500) }]);
        assert_eq!(finding.result, Grade::Failed);
        assert_eq!(finding.remedy.unwrap(), "sysctl -w net.ipv6.conf.all.forwarding=1");
    }

    #[rstest]
    #[case::off(0, 0, 2, Grade::Ok)]
    #[case::strict_by_all(1, 0, 2, Grade::Warning)]
    #[case::loose_by_all(2, 1, 2, Grade::Ok)]
    #[case::strict_by_itself(0, 1, 2, Grade::Warning)]
    #[case::strict_with_one_way(0, 1, 1, Grade::Ok)]
    fn strict_filters_matter_where_there_are_two_ways(
        #[case] all: u32,
        #[case] own: u32,
        #[case] count: usize,
        #[case] expected: Grade,
    ) {
        let (all, own) = (all.to_string(), own.to_string());
        let proc = proc(&[("ipv4/conf/all/rp_filter", &all), ("ipv4/conf/eth0/rp_filter", &own)]);
        let uplinks = [uplink("eth0", 1500), uplink("eth1", 1500)];
        let finding = rp_filter(proc.path(), &uplinks[..count]);
        assert_eq!(finding.result, expected, "{finding:?}");
    }

    #[rstest]
    #[case::off("0", "0", &[])]
    #[case::everywhere("1", "0", &["all"])]
    #[case::on_an_uplink("0", "1", &["eth0"])]
    #[case::both("1", "1", &["all", "eth0"])]
    fn the_loopback_networks_way_in_is_named_where_it_is_open(
        #[case] all: &str,
        #[case] own: &str,
        #[case] on: &[&str],
    ) {
        let settings = [("ipv4/conf/all/route_localnet", all), ("ipv4/conf/eth0/route_localnet", own)];
        let finding = route_localnet(proc(&settings).path(), &[uplink("eth0", 1500)]);
        let remedies: Vec<String> =
            on.iter().map(|name| format!("sysctl -w net.ipv4.conf.{name}.route_localnet=0")).collect();
        assert_eq!(finding.remedy.unwrap_or_default(), remedies.join("; "));
    }
}
