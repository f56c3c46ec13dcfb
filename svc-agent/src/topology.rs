//! Which of a service port's endpoints traffic may go to, for each traffic policy: the rules of kube-proxy's
//! `CategorizeEndpoints` (KEP-1669 terminating endpoints, KEP-2086 internalTrafficPolicy, KEP-2433 and KEP-3015 hints).
use std::net::IpAddr;
use std::sync::Arc;

use crate::object::Condition;

/// What the choice looks at of an endpoint.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Candidate<'a> {
    pub condition: Condition,
    /// On the agent's own node.
    pub local: bool,
    pub zone_hints: &'a [Arc<str>],
    pub node_hints: &'a [Arc<str>],
}

/// Where the agent runs.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Here<'a> {
    pub node: &'a str,
    /// None where the node has no zone label, or there is no Node object.
    pub zone: Option<&'a str>,
    /// Its primary addresses, at most one a family.
    pub addresses: &'a [IpAddr],
    /// Services' externalIPs count.
    pub external_ips: bool,
}

/// Endpoints by their index among the candidates, ascending.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Choice {
    /// For traffic of policy Cluster. Empty only where no endpoint anywhere is usable, whatever the hints.
    pub cluster: Vec<usize>,
    /// For traffic of policy Local: empty while `cluster` is not means drop, both empty means reject.
    pub local: Vec<usize>,
}

/// Ready endpoints, and where there are none, those that terminate but still serve; apart for Cluster and Local. Hints
/// narrow down the ready endpoints of policy Cluster alone.
pub fn choose(candidates: &[Candidate<'_>], here: Here<'_>) -> Choice {
    let pick = |wanted: &dyn Fn(&Candidate<'_>) -> bool| -> Vec<usize> {
        candidates.iter().enumerate().filter(|(_, candidate)| wanted(candidate)).map(|(index, _)| index).collect()
    };
    let or_terminating = |ready: Vec<usize>, wanted: &dyn Fn(&Candidate<'_>) -> bool| {
        if !ready.is_empty() {
            return ready;
        }
        pick(&|candidate| candidate.condition.serving && candidate.condition.terminating && wanted(candidate))
    };

    let preference = preference(candidates, here);
    let near = |candidate: &Candidate<'_>| match preference {
        Preference::None => true,
        Preference::Node => hinted(candidate.node_hints, here.node),
        Preference::Zone(zone) => hinted(candidate.zone_hints, zone),
    };
    Choice {
        cluster: or_terminating(pick(&|candidate| candidate.condition.ready && near(candidate)), &|_| true),
        local: or_terminating(pick(&|candidate| candidate.condition.ready && candidate.local), &|candidate| {
            candidate.local
        }),
    }
}

#[derive(Clone, Copy)]
enum Preference<'a> {
    None,
    Node,
    Zone(&'a str),
}

/// Hints count all or nothing: every ready endpoint must have one, and one of them must be for this node, or else for
/// this zone.
fn preference<'a>(candidates: &[Candidate<'_>], here: Here<'a>) -> Preference<'a> {
    let ready = || candidates.iter().filter(|candidate| candidate.condition.ready);
    if ready().all(|candidate| !candidate.node_hints.is_empty())
        && ready().any(|candidate| hinted(candidate.node_hints, here.node))
    {
        return Preference::Node;
    }
    match here.zone {
        Some(zone)
            if ready().all(|candidate| !candidate.zone_hints.is_empty())
                && ready().any(|candidate| hinted(candidate.zone_hints, zone)) =>
        {
            Preference::Zone(zone)
        }
        _ => Preference::None,
    }
}

fn hinted(hints: &[Arc<str>], name: &str) -> bool {
    hints.iter().any(|hint| **hint == *name)
}

#[cfg(test)]
mod tests {
    use super::*;
    use rstest::rstest;

    const TERMINATING: Condition = Condition { ready: false, serving: true, terminating: true };
    const GONE: Condition = Condition { ready: false, serving: false, terminating: true };
    const UNREADY: Condition = Condition { ready: false, serving: false, terminating: false };

    fn at(local: bool, condition: Condition) -> Candidate<'static> {
        Candidate { condition, local, zone_hints: &[], node_hints: &[] }
    }

    const HERE: bool = true;
    const AWAY: bool = false;

    #[rstest]
    #[case::none(&[], &[], &[])]
    #[case::ready(&[(HERE, Condition::READY), (AWAY, Condition::READY)], &[0, 1], &[0])]
    #[case::unready(&[(HERE, UNREADY), (AWAY, UNREADY)], &[], &[])]
    #[case::ready_before_terminating(&[(HERE, Condition::READY), (HERE, TERMINATING)], &[0], &[0])]
    #[case::terminating_where_none_is_ready(&[(HERE, TERMINATING), (AWAY, TERMINATING)], &[0, 1], &[0])]
    #[case::local_falls_back_by_itself(&[(HERE, TERMINATING), (AWAY, Condition::READY)], &[1], &[0])]
    #[case::terminating_without_serving_is_gone(&[(HERE, GONE), (AWAY, GONE)], &[], &[])]
    #[case::all_elsewhere(&[(AWAY, Condition::READY)], &[0], &[])]
    fn ready_else_terminating_apart_for_each_policy(
        #[case] endpoints: &[(bool, Condition)],
        #[case] cluster: &[usize],
        #[case] local: &[usize],
    ) {
        let candidates: Vec<_> = endpoints.iter().map(|(local, condition)| at(*local, *condition)).collect();
        assert_eq!(choose(&candidates, Here::default()), Choice { cluster: cluster.into(), local: local.into() });
    }

    #[rstest]
    #[case::all_true((None, None, None), Condition::READY)]
    #[case::not_ready((Some(false), None, None), Condition { ready: false, serving: true, terminating: false })]
    #[case::terminating((Some(false), Some(true), Some(true)), TERMINATING)]
    fn nil_conditions_mean_what_the_api_says(
        #[case] given: (Option<bool>, Option<bool>, Option<bool>),
        #[case] meant: Condition,
    ) {
        assert_eq!(Condition::new(given.0, given.1, given.2), meant);
    }

    #[rstest]
    #[case::zone(&[("", "z1"), ("", "z2")], Some("z1"), &[0])]
    #[case::no_endpoint_for_this_zone(&[("", "z1"), ("", "z2")], Some("z3"), &[0, 1])]
    #[case::one_without_hint(&[("", "z1"), ("", "")], Some("z1"), &[0, 1])]
    #[case::node_without_zone(&[("", "z1"), ("", "z2")], None, &[0, 1])]
    #[case::node(&[("a", "z1"), ("b", "z1")], Some("z1"), &[0])]
    #[case::other_nodes_then_zone(&[("b", "z1"), ("c", "z2")], Some("z1"), &[0])]
    #[case::one_without_node_hint_then_zone(&[("a", "z1"), ("", "z1")], Some("z1"), &[0, 1])]
    fn hints_count_all_or_nothing_by_node_then_by_zone(
        #[case] hints: &[(&str, &str)],
        #[case] zone: Option<&str>,
        #[case] cluster: &[usize],
    ) {
        let list = |text: &str| -> Vec<Arc<str>> { if text.is_empty() { vec![] } else { vec![text.into()] } };
        let hints: Vec<_> = hints.iter().map(|(node, zone)| (list(node), list(zone))).collect();
        let candidates: Vec<_> = hints
            .iter()
            .map(|(node_hints, zone_hints)| Candidate { node_hints, zone_hints, ..at(AWAY, Condition::READY) })
            .collect();
        assert_eq!(choose(&candidates, Here { node: "a", zone, ..Here::default() }).cluster, cluster);
    }

    #[test]
    fn hints_of_endpoints_that_are_not_ready_do_not_count() {
        let zone: [Arc<str>; 1] = ["z1".into()];
        let hinted = Candidate { zone_hints: &zone, ..at(AWAY, Condition::READY) };
        let choice = choose(&[hinted, at(AWAY, TERMINATING)], Here { node: "a", zone: Some("z1"), ..Here::default() });
        assert_eq!(choice.cluster, [0]);
    }

    #[test]
    fn hints_do_not_touch_policy_local() {
        let zone: [Arc<str>; 1] = ["z1".into()];
        let there = Candidate { zone_hints: &zone, ..at(AWAY, Condition::READY) };
        let other: [Arc<str>; 1] = ["z2".into()];
        let here = Candidate { zone_hints: &other, ..at(HERE, Condition::READY) };
        let choice = choose(&[there, here], Here { node: "a", zone: Some("z1"), ..Here::default() });
        assert_eq!(choice, Choice { cluster: vec![0], local: vec![1] });
    }
}
