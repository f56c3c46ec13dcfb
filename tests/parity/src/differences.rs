//! The differences that are accepted. Each stands in docs/parity.md, with its reason.
use crate::probe::To;
use crate::report::Row;

pub struct Difference {
    /// The row of docs/parity.md that gives the reason.
    pub what: &'static str,
    pub accepts: fn(&Row<'_>) -> bool,
}

/// The first that accepts a row explains it.
pub const ALL: &[Difference] = &[
    Difference {
        what: "a refusal or drop of the node's own UDP",
        accepts: |row| row.probe.is_from_node() && row.kube_proxy.failed.contains("not-permitted"),
    },
    Difference { what: "localhost : nodePort", accepts: |row| row.probe.to == To::Localhost },
    Difference {
        what: "node ports on every address of the node",
        accepts: |row| matches!(row.probe.to, To::Gateway(_)) && row.kube_proxy.failed.contains("refused"),
    },
    Difference {
        what: "externalTrafficPolicy Local, a pod of another node",
        accepts: |row| {
            !row.probe.is_from_outside()
                && matches!(row.probe.to, To::NodePort(_) | To::LoadBalancer(_) | To::ExternalIp)
                && row.kube_proxy.failed.contains("timeout")
                && row.svc.failed.is_empty()
        },
    },
    Difference {
        what: "a UDP flow whose Service has no backend any more",
        accepts: |row| {
            row.scenario.starts_with("udp-") && row.svc.answered.is_empty() && !row.kube_proxy.answered.is_empty()
        },
    },
    Difference {
        what: "an address that the backend sees",
        accepts: |row| row.svc.same_outcome(row.kube_proxy) && row.svc.shows_clients(),
    },
];

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
