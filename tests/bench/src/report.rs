//! Figures on the terminal, and in a file for a later comparison.
use std::fmt;
use std::fs;
use std::path::Path;

use anyhow::{Context as _, Result};
use serde::{Deserialize, Serialize};

use crate::figure::{Figure, Ratio, Spread};

/// What the figures are of.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub(crate) struct Machine {
    cpu: String,
    cpus: usize,
    kernel: String,
    /// Of the last minute, when the run began.
    load: String,
}

#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct Run {
    machine: Machine,
    pub(crate) figures: Vec<Figure>,
}

impl Machine {
    pub(crate) fn this() -> Result<Self> {
        let read = |path: &str| fs::read_to_string(path).with_context(|| format!("cannot read {path}"));
        let cpuinfo = read("/proc/cpuinfo")?;
        let model = cpuinfo.lines().find_map(|line| line.strip_prefix("model name")?.split_once(": "));
        Ok(Machine {
            cpu: model.map_or("unknown", |(_, model)| model).to_owned(),
            cpus: std::thread::available_parallelism()?.get(),
            kernel: read("/proc/sys/kernel/osrelease")?.trim().to_owned(),
            load: read("/proc/loadavg")?.split(' ').next().unwrap_or_default().to_owned(),
        })
    }
}

impl fmt::Display for Machine {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} CPUs, {}, Linux {}, load {}", self.cpus, self.cpu, self.kernel, self.load)
    }
}

pub(crate) fn read(path: &Path) -> Result<Run> {
    let text = fs::read(path).with_context(|| format!("cannot read {}", path.display()))?;
    serde_json::from_slice(&text).with_context(|| format!("{} is no file that this command wrote", path.display()))
}

pub(crate) fn write(path: &Path, machine: &Machine, figures: &[Figure]) -> Result<()> {
    let directory = path.parent().unwrap_or(Path::new("."));
    fs::create_dir_all(directory).with_context(|| format!("cannot create {}", directory.display()))?;
    let text = serde_json::to_vec_pretty(&Run { machine: machine.clone(), figures: figures.to_vec() })?;
    fs::write(path, text).with_context(|| format!("cannot write {}", path.display()))
}

/// Medians, with the quarters around a ratio's.
pub(crate) fn print(figure: &Figure, before: Option<&Run>) {
    println!("  {}", figure.case);
    let medians =
        figure.samples.iter().map(|(name, samples)| format!("{name} {}", rounded(Spread::of(samples).median)));
    println!("    {} {}", medians.collect::<Vec<_>>().join(", "), figure.unit);
    for ratio in &figure.ratios {
        let Some(Spread { low, median, high }) = figure.spread(ratio) else { continue };
        let Ratio { row, of, to, goal } = ratio;
        let mut line = format!("    {row}: {of} / {to}: {median:.3} ({low:.3} to {high:.3})");
        if let Some(goal) = goal {
            line += &format!(", {goal}: {}", if goal.reached(median) { "reached" } else { "NOT reached" });
        }
        let old = before.and_then(|run| {
            run.figures.iter().find(|old| (&old.row, &old.case) == (&figure.row, &figure.case))?.spread(ratio)
        });
        if let Some(old) = old {
            line += &format!(", before {:.3}", old.median);
        }
        println!("{line}");
    }
}

/// Three significant digits.
fn rounded(value: f64) -> String {
    match value {
        value if value >= 100. => format!("{value:.0}"),
        value if value >= 10. => format!("{value:.1}"),
        value => format!("{value:.2}"),
    }
}
