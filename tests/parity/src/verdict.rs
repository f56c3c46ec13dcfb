//! What became of a probe, in words that do not depend on chance.
use std::collections::{BTreeMap, BTreeSet};
use std::convert::Infallible;
use std::fmt;
use std::net::IpAddr;
use std::str::FromStr;

use svc_lab::probe::Answers;
use svc_lab::topology::{BACKENDS, CLIENT, NODES, OUTSIDE, addresses};

use crate::probe::Probe;
use crate::proxy::Proxy;

/// Written `a1<client b1<node-a refused`: these backends answered, and whom each saw; failures stand by themselves.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Verdict {
    /// `client` is the host that asked, with any of its addresses.
    pub answered: BTreeMap<String, BTreeSet<String>>,
    pub failed: BTreeSet<String>,
}

impl Verdict {
    pub fn of(proxy: Proxy, probe: &Probe, answers: &Answers) -> Self {
        let mut verdict = Verdict::default();
        let one = probe.sticky && answers.answered.len() == 1;
        let either = probe.by_chance && proxy != Proxy::Svc;
        for (backend, peers) in &answers.answered {
            let name = match backend.as_str() {
                "a1" | "b1" if either => "either",
                _ if one => "one",
                other => other,
            };
            let sources = verdict.answered.entry(name.to_owned()).or_default();
            sources.extend(peers.iter().map(|peer| source(probe.from, *peer)));
        }
        verdict.failed = answers.failed.iter().map(|error| failure(error)).collect();
        verdict
    }

    /// The same backends and the same failures, whatever the backends saw.
    pub fn same_outcome(&self, other: &Self) -> bool {
        self.answered.keys().eq(other.answered.keys()) && self.failed == other.failed
    }

    /// This backend answers, and nothing fails.
    pub fn is_answered_by(&self, backend: &str) -> bool {
        self.failed.is_empty() && self.answered.keys().eq([backend])
    }

    /// Nobody answers, and nobody says so.
    pub fn is_silence(&self) -> bool {
        self.is_only("timeout")
    }

    pub fn is_refusal(&self) -> bool {
        self.is_only("refused")
    }

    fn is_only(&self, failure: &str) -> bool {
        self.answered.is_empty() && self.failed.iter().eq([failure])
    }

    /// Some backend answered, and none that is elsewhere.
    pub fn is_answered_by_pods_of(&self, node: &str) -> bool {
        let is_there = |name: &String| BACKENDS.iter().any(|pod| pod.name == name && pod.node().name == node);
        !self.answered.is_empty() && self.answered.keys().all(is_there)
    }
}

fn source(asking: &str, peer: IpAddr) -> String {
    let of = |host: &str| addresses(host).expect("the lab has this host").contains(&peer);
    if of(asking) {
        return "client".to_owned();
    }
    let hosts = NODES.iter().map(|node| node.name).chain(BACKENDS.iter().map(|pod| pod.name)).chain([CLIENT, OUTSIDE]);
    hosts.into_iter().find(|host| of(host)).map_or_else(|| peer.to_string(), str::to_owned)
}

/// TCP's and UDP's ways to be told the same.
fn failure(error: &str) -> String {
    let word = match error {
        "connect: ConnectionRefused" | "send: ConnectionRefused" | "receive: ConnectionRefused" => "refused",
        "connect: HostUnreachable" | "send: HostUnreachable" | "receive: HostUnreachable" => "host-unreachable",
        // By chance a router says so in time.
        "connect: NetworkUnreachable" | "send: NetworkUnreachable" => "timeout",
        "connect: PermissionDenied" | "send: PermissionDenied" => "not-permitted",
        other => other,
    };
    word.replace(' ', "_")
}

impl fmt::Display for Verdict {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let answered = self.answered.iter().map(|(backend, sources)| {
            let sources: Vec<&str> = sources.iter().map(String::as_str).collect();
            format!("{backend}<{}", sources.join("|"))
        });
        f.write_str(&answered.chain(self.failed.iter().cloned()).collect::<Vec<_>>().join(" "))
    }
}

impl FromStr for Verdict {
    type Err = Infallible;

    fn from_str(text: &str) -> Result<Self, Infallible> {
        let mut verdict = Verdict::default();
        for word in text.split_whitespace() {
            match word.split_once('<') {
                Some((backend, sources)) => {
                    verdict.answered.insert(backend.to_owned(), sources.split('|').map(str::to_owned).collect());
                }
                None => {
                    verdict.failed.insert(word.to_owned());
                }
            }
        }
        Ok(verdict)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_verdict_survives_being_written_down() {
        for text in ["a1<client", "a1<client|node-a b1<node-b timeout", "one<out", "refused", ""] {
            assert_eq!(text.parse::<Verdict>().unwrap().to_string(), text);
        }
    }

    #[test]
    fn a_source_is_no_part_of_an_outcome() {
        let verdict = |text: &str| text.parse::<Verdict>().unwrap();
        assert!(verdict("a1<client").same_outcome(&verdict("a1<node-a")));
        assert!(!verdict("a1<client").same_outcome(&verdict("a1<client b1<client")));
        assert!(!verdict("a1<client").same_outcome(&verdict("a1<client timeout")));
    }
}
