//! Kube-proxy, and what it has left: both translate, and what svc passes on meets the other's rules.
use std::path::Path;

use super::{Finding, iptables, nftables};
use crate::host;

/// Takes away what any mode has left.
const CLEANUP: &str = "kube-proxy --cleanup";
/// Of its IPVS mode: an interface with the addresses of all Services.
const IPVS_INTERFACE: &str = "kube-ipvs0";

/// `proc`: where procfs is mounted.
pub fn process(proc: &Path) -> Finding {
    const CHECK: &str = "kube_proxy";
    let processes = std::fs::read_dir(proc).into_iter().flatten().flatten();
    let numbers = processes.filter_map(|entry| Some((entry.file_name().to_str()?.parse::<u32>().ok()?, entry.path())));
    let is_it = |path: &Path| std::fs::read_to_string(path.join("comm")).is_ok_and(|name| name.trim() == "kube-proxy");
    match numbers.filter(|(_, path)| is_it(path)).map(|(pid, _)| pid).min() {
        Some(pid) => Finding::warning(
            CHECK,
            format!("kube-proxy runs as process {pid}"),
            format!("take its DaemonSet away once svc-agent is ready, then {CLEANUP}"),
        ),
        None => Finding::ok(CHECK, "none is seen to run"),
    }
}

/// `proc`: where procfs is mounted.
pub fn rules(proc: &Path) -> Finding {
    const CHECK: &str = "kube_proxy_rules";
    let mut found = Vec::new();
    // A kernel without nftables has none of its rules.
    let chains = nftables::chains().unwrap_or_default();
    if chains.iter().any(|(table, _)| table == "kube-proxy") {
        found.push("the nftables table kube-proxy");
    }
    if chains.iter().any(|(_, chain)| is_of_iptables_mode(chain))
        || iptables::nat_has(proc, "KUBE-SERVICES").unwrap_or(false)
    {
        found.push("iptables chains KUBE-*");
    }
    if std::fs::read_to_string(proc.join("net/ip_vs")).is_ok_and(|table| has_ipvs_services(&table)) {
        found.push("IPVS services");
    }
    if host::exists(IPVS_INTERFACE) {
        found.push("the interface kube-ipvs0");
    }
    if found.is_empty() {
        return Finding::ok(CHECK, "none");
    }
    Finding::warning(
        CHECK,
        format!(
            "{}: what svc leaves alone, such as a Service that it does not have, is translated there",
            found.join(", ")
        ),
        format!("{CLEANUP}, once no kube-proxy runs"),
    )
}

/// The kubelet and others have chains that begin with KUBE as well.
fn is_of_iptables_mode(chain: &str) -> bool {
    ["KUBE-SERVICES", "KUBE-NODEPORTS", "KUBE-SVC-", "KUBE-SEP-", "KUBE-EXT-"].iter().any(|own| chain.starts_with(own))
}

/// Behind three lines of headings, a line for each.
fn has_ipvs_services(table: &str) -> bool {
    table.lines().skip(3).any(|line| ["TCP", "UDP", "SCTP"].iter().any(|protocol| line.starts_with(protocol)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::check::Grade;
    use rstest::rstest;

    #[rstest]
    #[case("KUBE-SERVICES", true)]
    #[case("KUBE-SVC-ERIFXISQEP7F7OF4", true)]
    #[case("KUBE-KUBELET-CANARY", false)]
    #[case("KUBE-FIREWALL", false)]
    #[case("DOCKER", false)]
    fn the_kubelets_chains_are_not_kube_proxys(#[case] chain: &str, #[case] expected: bool) {
        assert_eq!(is_of_iptables_mode(chain), expected);
    }

    #[rstest]
    #[case("", false)]
    #[case("IP Virtual Server version 1.2.1\nProt LocalAddress:Port\n  -> RemoteAddress:Port\n", false)]
    #[case(
        "IP Virtual Server version 1.2.1\nProt LocalAddress:Port\n  -> RemoteAddress:Port\nTCP  0A600001:01BB rr\n",
        true
    )]
    fn an_empty_table_of_ipvs_is_none(#[case] table: &str, #[case] expected: bool) {
        assert_eq!(has_ipvs_services(table), expected);
    }

    #[test]
    fn a_running_kube_proxy_is_named_by_its_number() {
        let proc = tempfile::tempdir().unwrap();
        for (pid, name) in [("1", "systemd"), ("77", "kube-proxy"), ("self", "kube-proxy")] {
            std::fs::create_dir(proc.path().join(pid)).unwrap();
            std::fs::write(proc.path().join(pid).join("comm"), format!("{name}\n")).unwrap();
        }
        let finding = process(proc.path());
        assert_eq!((finding.result, finding.found.as_str()), (Grade::Warning, "kube-proxy runs as process 77"));
    }
}
