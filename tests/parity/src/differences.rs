//! The differences that are accepted. Each stands in docs/parity.md, with its reason.
use std::collections::BTreeSet;

use svc_lab::kube_proxy::Mode;

use crate::probe::To;
use crate::report::Row;

pub struct Difference {
    /// The row of docs/parity.md that gives the reason.
    pub what: &'static str,
    /// kube-proxy's modes that differ so.
    pub modes: &'static [Mode],
    pub accepts: fn(&Row<'_>) -> bool,
}

const BOTH: &[Mode] = &[Mode::Nftables, Mode::Iptables];

/// The first that accepts a row explains it.
pub const ALL: &[Difference] = &[
    Difference {
        what: "a refusal or drop of the node's own UDP",
        modes: BOTH,
        accepts: |row| row.probe.is_from_node() && row.kube_proxy.failed.contains("not-permitted"),
    },
    Difference { what: "localhost : nodePort", modes: BOTH, accepts: |row| row.probe.to == To::Localhost },
    Difference {
        what: "node ports on every address of the node",
        modes: &[Mode::Nftables],
        accepts: |row| matches!(row.probe.to, To::Gateway(_)) && row.kube_proxy.failed.contains("refused"),
    },
    Difference {
        what: "externalTrafficPolicy Local, a pod of another node",
        modes: BOTH,
        accepts: |row| {
            let To::NodePort(node) = row.probe.to else { return false };
            !row.probe.is_from_outside()
                && row.kube_proxy.failed.contains("timeout")
                && row.svc.failed.is_empty()
                && row.svc.is_answered_by_pods_of(node)
                && row.svc.answered.values().all(shows_only_the_client)
        },
    },
    Difference {
        what: "externalTrafficPolicy Local, a pod that is sent to itself by another node",
        modes: &[Mode::Iptables],
        accepts: |row| {
            matches!(row.probe.to, To::NodePort(_))
                && row.svc.is_silence()
                && row.kube_proxy.answered.keys().eq([row.probe.from])
        },
    },
    Difference {
        what: "a UDP flow whose Service has no backend any more",
        modes: BOTH,
        accepts: |row| {
            let backendless = ["udp-backend-changes.3:", "udp-service-comes.3:"];
            backendless.iter().any(|step| row.name.starts_with(step))
                && row.svc.answered.is_empty()
                && !row.kube_proxy.answered.is_empty()
        },
    },
    Difference {
        what: "a refusal in iptables mode",
        modes: &[Mode::Iptables],
        accepts: |row| {
            let unrefused = row.probe.to == To::UnknownPort || row.probe.is_from_node();
            unrefused && row.kube_proxy.is_silence() && row.svc.is_refusal()
        },
    },
    Difference {
        what: "two Services that claim one external address and port",
        modes: BOTH,
        // a1 is the older one's.
        accepts: |row| row.probe.by_chance && row.kube_proxy.is_answered_by("either") && row.svc.is_answered_by("a1"),
    },
    Difference {
        what: "an address that the backend sees",
        modes: BOTH,
        accepts: |row| {
            let mut pairs = row.svc.answered.values().zip(row.kube_proxy.answered.values());
            row.svc.same_outcome(row.kube_proxy) && pairs.all(|(svc, other)| svc == other || shows_only_the_client(svc))
        },
    },
];

fn shows_only_the_client(sources: &BTreeSet<String>) -> bool {
    sources.iter().eq(["client"])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_difference_stands_in_the_document() {
        let document = include_str!("../../../docs/parity.md");
        for Difference { what, .. } in ALL {
            assert!(document.contains(&format!("| {what} |")), "docs/parity.md has no row called {what:?}");
        }
    }
}
