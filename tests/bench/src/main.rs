//! `cargo xtask bench`: what svc costs, beside the floor, as ratios within one run.
mod chaos;
mod conntrack;
mod figure;
mod forward;
mod load;
mod nodes;
mod packets;
mod plot;
mod report;
mod scale;
mod streams;
mod supervise;
#[path = "../kernel/src/template.rs"]
mod template;
mod watched;
mod wire;

use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Instant;

use anyhow::{Result, bail, ensure};
use clap::Parser;
use figure::Figure;

/// Measure what svc costs, beside the floor. It needs root.
#[derive(Parser)]
#[command(name = "svc-bench")]
struct Options {
    /// Fewer rounds, and not the largest sizes: a few minutes.
    #[arg(long)]
    quick: bool,
    /// Only these rows, and those that are measured along with them: P1, P12, ...
    #[arg(long, value_name = "ROW", value_delimiter = ',')]
    only: Vec<String>,
    /// Where the raw figures go.
    #[arg(long, value_name = "FILE", default_value = "target/bench/latest.json")]
    json: PathBuf,
    /// The raw figures of an earlier run, to compare with.
    #[arg(long, value_name = "FILE")]
    compare: Option<PathBuf>,
    /// Where the plots go.
    #[arg(long, value_name = "DIR", default_value = "target/bench")]
    plots: PathBuf,
    /// Measure nothing, but draw the plots of these raw figures; of several files each figure's last one counts.
    #[arg(long, value_name = "FILE")]
    plot: Vec<PathBuf>,
    /// Measure in this very process.
    #[arg(long, hide = true)]
    worker: bool,
    #[command(subcommand)]
    command: Option<load::Command>,
}

/// How long to measure.
#[derive(Clone, Copy, Debug)]
struct Effort {
    quick: bool,
}

/// Measures, and hands over each figure as soon as it is there.
type Row = fn(Effort, &mut dyn FnMut(Figure)) -> Result<()>;
/// What is measured together, by the names of its rows.
const ROWS: [(&[&str], &str, Row); 10] = [
    (&["P1", "P1t", "P2"], "a NodePort's packet of a known flow", forward::hits),
    (&["P1p"], "the same, by the program alone", packets::hits),
    (&["P3"], "beside many Services, and with a new flow in each packet", forward::services),
    (&["P3p"], "a NodePort's packet of a new flow, by the program alone", packets::opens),
    (&["P4"], "how much later a flow's first packet arrives than by plain routing", forward::first_packets),
    (&["P5", "P6", "P7", "P8"], "connections of pods, to a ClusterIP and straight to a pod", streams::rows),
    (&["P8"], "traffic that is no Service's", forward::others),
    (&["P9", "P10", "P11"], "many Services: one endpoint change, start, restart, memory", scale::rows),
    (&["P12"], "bad days under steady requests: what failed", chaos::rows),
    (&["P13"], "a NodePort's packet, counted and watched", watched::rows),
];

fn main() -> ExitCode {
    let options = Options::parse();
    let result = match &options.command {
        Some(command) => load::run(command).map(|()| ExitCode::SUCCESS),
        None if !options.plot.is_empty() => draw(&options).map(|()| ExitCode::SUCCESS),
        None if options.worker => run(&options).map(|()| ExitCode::SUCCESS),
        None => supervise::run(),
    };
    match result {
        Ok(code) => code,
        Err(error) => {
            eprintln!("{error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(options: &Options) -> Result<()> {
    let before = options.compare.as_deref().map(report::read).transpose()?;
    let mut known: Vec<&str> = ROWS.iter().flat_map(|(names, ..)| *names).copied().collect();
    // A row that is measured in two parts stands there twice.
    known.dedup();
    if let Some(unknown) = options.only.iter().find(|name| !known.contains(&name.as_str())) {
        bail!("--only {unknown}: the rows are {}", known.join(", "));
    }
    let wanted = |names: &[&str]| {
        options.only.is_empty() || names.iter().any(|name| options.only.iter().any(|only| only == name))
    };
    let effort = Effort { quick: options.quick };
    let machine = report::Machine::this()?;
    println!("{machine}");
    let (mut figures, mut failed) = (Vec::new(), Vec::new());
    let begin = Instant::now();
    for (names, what, row) in ROWS.iter().filter(|(names, ..)| wanted(names)) {
        let name = names.join(", ");
        println!("\n[{} s] {name}: {what}", begin.elapsed().as_secs());
        let mut show = |figure: Figure| {
            report::print(&figure, before.as_ref());
            figures.push(figure);
        };
        if let Err(error) = row(effort, &mut show) {
            println!("  {error:#}");
            failed.push(name);
        }
        plot::draw(&options.plots, &figures)?;
        report::write(&options.json, &machine, &figures)?;
    }
    println!("\n{} s; raw figures: {}", begin.elapsed().as_secs(), options.json.display());
    ensure!(failed.is_empty(), "not measured as a whole: {}", failed.join(", "));
    Ok(())
}

fn draw(options: &Options) -> Result<()> {
    let mut figures = Vec::new();
    for file in &options.plot {
        figures.extend(report::read(file)?.figures);
    }
    plot::draw(&options.plots, &figures)
}
