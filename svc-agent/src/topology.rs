//! Which of a service port's endpoints traffic may go to, for each traffic policy: the rules of kube-proxy's
//! `CategorizeEndpoints` (KEP-1669 terminating endpoints, KEP-2086 internalTrafficPolicy, KEP-2433 and KEP-3015 hints).
use crate::object::Condition;

/// What the choice looks at of an endpoint.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Candidate<'a> {
    pub condition: Condition,
    /// On the agent's own node.
    pub local: bool,
    pub zone_hints: &'a [Box<str>],
    pub node_hints: &'a [Box<str>],
}

/// Where the agent runs.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Here<'a> {
    pub node: &'a str,
    /// None where the node has no zone label, or there is no Node object.
    pub zone: Option<&'a str>,
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

fn hinted(hints: &[Box<str>], name: &str) -> bool {
    hints.iter().any(|hint| **hint == *name)
}
