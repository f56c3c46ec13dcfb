//! kube-proxy's verdicts as they were recorded: a row a line, `NAME => VERDICT`, sorted.
use std::fs;
use std::path::PathBuf;

use anyhow::{Context, Result};
use svc_lab::kube_proxy::Mode;

use crate::run::Verdicts;

fn path(mode: Mode) -> PathBuf {
    [env!("CARGO_MANIFEST_DIR"), "verdicts", &format!("{}.txt", mode.name())].iter().collect()
}

pub fn read(mode: Mode) -> Result<Verdicts> {
    let path = path(mode);
    let text = fs::read_to_string(&path).with_context(|| format!("cannot read {}", path.display()))?;
    parse(&text).with_context(|| format!("in {}", path.display()))
}

pub fn write(mode: Mode, version: &str, verdicts: &Verdicts) -> Result<()> {
    let path = path(mode);
    fs::create_dir_all(path.parent().context("no directory")?)?;
    let mut text = format!("# kube-proxy {version}, {}, as `cargo xtask parity --record` found it.\n", mode.name());
    for (name, verdict) in verdicts {
        text.push_str(&format!("{name} => {verdict}\n"));
    }
    fs::write(&path, text).with_context(|| format!("cannot write {}", path.display()))
}

fn parse(text: &str) -> Result<Verdicts> {
    let lines = text.lines().filter(|line| !line.starts_with('#'));
    lines
        .map(|line| {
            let (name, verdict) = line.split_once(" => ").with_context(|| format!("no verdict in {line:?}"))?;
            let Ok(verdict) = verdict.parse();
            Ok((name.to_owned(), verdict))
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_row_of_the_catalogue_is_recorded_and_no_other() {
        let scenarios = crate::catalogue::all();
        let rows = scenarios.iter().flat_map(|scenario| (0..scenario.steps.len()).flat_map(|step| scenario.rows(step)));
        let names: std::collections::BTreeSet<String> = rows.map(|(name, _)| name).collect();
        for mode in [Mode::Nftables, Mode::Iptables] {
            let recorded = read(mode).unwrap().into_keys().collect();
            assert_eq!(names, recorded, "{}: run cargo xtask parity --record", mode.name());
        }
    }
}
