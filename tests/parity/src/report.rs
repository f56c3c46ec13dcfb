//! The rows that differ, sorted into those that stand in docs/parity.md and those that nobody explained.
use std::collections::BTreeMap;
use std::fmt;

use svc_lab::kube_proxy::Mode;

use crate::catalogue::Scenario;
use crate::differences::{ALL, Difference};
use crate::probe::Probe;
use crate::run::Verdicts;
use crate::verdict::Verdict;

pub struct Row<'a> {
    pub name: String,
    pub scenario: &'a str,
    pub probe: &'a Probe,
    pub kube_proxy: &'a Verdict,
    pub svc: &'a Verdict,
}

/// What both said of the same rows.
pub struct Report<'a> {
    mode: Mode,
    rows: usize,
    accepted: BTreeMap<&'static str, Vec<Row<'a>>>,
    unexplained: Vec<Row<'a>>,
    missing: Vec<String>,
}

impl<'a> Report<'a> {
    pub fn new(mode: Mode, scenarios: &'a [Scenario], kube_proxy: &'a Verdicts, svc: &'a Verdicts) -> Self {
        let mut report =
            Report { mode, rows: 0, accepted: BTreeMap::new(), unexplained: Vec::new(), missing: Vec::new() };
        for scenario in scenarios {
            for (name, probe) in (0..scenario.steps.len()).flat_map(|step| scenario.rows(step)) {
                report.rows += 1;
                let (Some(kube_proxy), Some(svc)) = (kube_proxy.get(&name), svc.get(&name)) else {
                    report.missing.push(name);
                    continue;
                };
                if kube_proxy != svc {
                    report.add(Row { name, scenario: scenario.name, probe, kube_proxy, svc });
                }
            }
        }
        report
    }

    fn add(&mut self, row: Row<'a>) {
        match self.differences().find(|difference| (difference.accepts)(&row)) {
            Some(Difference { what, .. }) => self.accepted.entry(what).or_default().push(row),
            None => self.unexplained.push(row),
        }
    }

    fn differences(&self) -> impl Iterator<Item = &'static Difference> + use<> {
        let mode = self.mode;
        ALL.iter().filter(move |difference| difference.modes.contains(&mode))
    }

    /// No row differs but as docs/parity.md says.
    pub fn is_right(&self) -> bool {
        self.unexplained.is_empty() && self.missing.is_empty()
    }

    /// Differences that no row of the whole catalogue shows any more.
    pub fn outlived(&self) -> Vec<&'static str> {
        self.differences().map(|difference| difference.what).filter(|what| !self.accepted.contains_key(what)).collect()
    }
}

impl fmt::Display for Report<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let row = |f: &mut fmt::Formatter<'_>, row: &Row<'_>| {
            writeln!(f, "  {:<60} kube-proxy: {:<36} svc: {}", row.name, row.kube_proxy.to_string(), row.svc)
        };
        for (what, rows) in &self.accepted {
            writeln!(f, "as docs/parity.md says, {what}: {} rows", rows.len())?;
            rows.iter().try_for_each(|each| row(f, each))?;
        }
        if !self.unexplained.is_empty() {
            writeln!(f, "unexplained: {} rows", self.unexplained.len())?;
            self.unexplained.iter().try_for_each(|each| row(f, each))?;
        }
        for name in &self.missing {
            writeln!(f, "no verdict to compare: {name}")?;
        }
        let accepted: usize = self.accepted.values().map(Vec::len).sum();
        let same = self.rows - accepted - self.unexplained.len() - self.missing.len();
        writeln!(f, "{same} of {} the same, {accepted} differ as docs/parity.md says", self.rows)
    }
}
