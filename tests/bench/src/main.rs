//! `cargo xtask bench`: what svc costs, beside the floor, as ratios within one run.
mod chaos;
mod figure;
mod packets;
mod report;
mod scale;
#[path = "../kernel/src/template.rs"]
mod template;

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::{Context as _, Result, bail};
use clap::Parser;
use figure::Figure;

/// Measure what svc costs, beside the floor. It needs root.
#[derive(Parser)]
#[command(name = "svc-bench")]
struct Options {
    /// Fewer rounds, and not the largest sizes: a few minutes.
    #[arg(long)]
    quick: bool,
    /// Only rows whose name begins with one of these: R1, E1, ...
    #[arg(long, value_name = "ROW")]
    only: Vec<String>,
    /// Where the raw figures go.
    #[arg(long, value_name = "FILE", default_value = "target/bench/latest.json")]
    json: PathBuf,
    /// The raw figures of an earlier run, to compare with.
    #[arg(long, value_name = "FILE")]
    compare: Option<PathBuf>,
}

/// How long to measure.
#[derive(Clone, Copy, Debug)]
struct Effort {
    quick: bool,
}

/// Measures, and hands over each figure as soon as it is there.
type Row = fn(Effort, &mut dyn FnMut(Figure)) -> Result<()>;
const ROWS: [(&str, &str, Row); 4] = [
    ("R1", "a NodePort's packet of a known flow, by the program alone", packets::hits),
    ("R2", "a NodePort's packet of a new flow, by the program alone", packets::opens),
    ("E1", "many Services: start, one endpoint change, restart, memory, beside kube-proxy (nftables)", scale::rows),
    ("E2", "bad days under steady requests: what failed", chaos::rows),
];

fn main() -> ExitCode {
    match run(&Options::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("{error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(options: &Options) -> Result<()> {
    let before = options.compare.as_deref().map(report::read).transpose()?;
    let wanted = |name: &str| options.only.is_empty() || options.only.iter().any(|part| name.starts_with(part));
    let rows: Vec<_> = ROWS.iter().filter(|(name, ..)| wanted(name)).collect();
    if rows.is_empty() {
        let names = ROWS.map(|(name, ..)| name).join(", ");
        bail!("--only {}: the rows are {names}", options.only.join(" --only "));
    }
    let effort = Effort { quick: options.quick };
    let machine = report::Machine::this()?;
    println!("{machine}");
    let mut figures = Vec::new();
    for (name, what, row) in rows {
        println!("\n{name}: {what}");
        let mut show = |figure: Figure| {
            report::print(&figure, before.as_ref());
            figures.push(figure);
        };
        row(effort, &mut show).with_context(|| format!("row {name}"))?;
    }
    report::write(&options.json, machine, figures)?;
    println!("\nraw figures: {}", options.json.display());
    Ok(())
}
