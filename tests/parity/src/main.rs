//! `cargo xtask parity`: svc beside the real kube-proxy.
use std::process::ExitCode;
use std::time::Instant;

use anyhow::{Result, bail};
use clap::{Parser, ValueEnum};
use svc_lab::control_plane::kubernetes_version;
use svc_lab::kube_proxy::Mode;
use svc_parity::catalogue::{self, Scenario};
use svc_parity::proxy::Proxy;
use svc_parity::recorded;
use svc_parity::report::Report;
use svc_parity::run::{Objects, Verdicts, run};

/// Compare svc with the real kube-proxy: the same objects, nodes and probes. It needs root.
#[derive(Parser)]
#[command(name = "svc-parity")]
struct Options {
    /// Only scenarios whose name holds this.
    #[arg(long)]
    only: Vec<String>,
    /// kube-proxy's mode.
    #[arg(long, value_enum, default_value_t = Choice::Nftables)]
    mode: Choice,
    /// Compare with the verdicts that were recorded, without kube-proxy and without an API server.
    #[arg(long, conflicts_with = "record")]
    recorded: bool,
    /// Record kube-proxy's verdicts in all its modes first.
    #[arg(long, conflicts_with = "only")]
    record: bool,
    /// Show every verdict of kube-proxy, and leave svc out.
    #[arg(long, conflicts_with_all = ["recorded", "record"])]
    proxy_only: bool,
}

#[derive(Clone, Copy, ValueEnum)]
enum Choice {
    Nftables,
    Iptables,
}

fn main() -> ExitCode {
    match compare(&Options::parse()) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("{error:#}");
            ExitCode::FAILURE
        }
    }
}

/// Whether all is as docs/parity.md says.
fn compare(options: &Options) -> Result<bool> {
    let mode = match options.mode {
        Choice::Nftables => Mode::Nftables,
        Choice::Iptables => Mode::Iptables,
    };
    let mut scenarios = catalogue::all();
    if !options.only.is_empty() {
        scenarios.retain(|scenario| options.only.iter().any(|part| scenario.name.contains(part)));
        if scenarios.is_empty() {
            bail!("no scenario is called {}", options.only.join(" or "));
        }
    }
    if options.record {
        for mode in [Mode::Nftables, Mode::Iptables] {
            let verdicts = timed(Proxy::KubeProxy(mode), Objects::ApiServer, &scenarios)?;
            recorded::write(mode, &kubernetes_version()?, &verdicts)?;
        }
    }
    if options.recorded || options.record {
        let kube_proxy = recorded::read(mode)?;
        let from = if options.recorded { Objects::Directory } else { Objects::ApiServer };
        let svc = timed(Proxy::Svc, from, &scenarios)?;
        return Ok(conclude(options, &Report::new(mode, &scenarios, &kube_proxy, &svc)));
    }

    let kube_proxy = timed(Proxy::KubeProxy(mode), Objects::ApiServer, &scenarios)?;
    if options.proxy_only {
        kube_proxy.iter().for_each(|(name, verdict)| println!("{name} => {verdict}"));
        return Ok(true);
    }
    let svc = timed(Proxy::Svc, Objects::ApiServer, &scenarios)?;
    let right = conclude(options, &Report::new(mode, &scenarios, &kube_proxy, &svc));
    Ok(is_as_recorded(mode, &kube_proxy)? && right)
}

fn conclude(options: &Options, report: &Report<'_>) -> bool {
    print!("{report}");
    let outlived = if options.only.is_empty() { report.outlived() } else { Vec::new() };
    for what in &outlived {
        println!("no row differs any more in what docs/parity.md calls {what:?}");
    }
    report.is_right() && outlived.is_empty()
}

fn is_as_recorded(mode: Mode, verdicts: &Verdicts) -> Result<bool> {
    let recorded = recorded::read(mode)?;
    let other: Vec<_> = verdicts.iter().filter(|(name, verdict)| recorded.get(*name) != Some(verdict)).collect();
    for (name, verdict) in &other {
        let before = recorded.get(*name).map_or_else(|| "nothing".to_owned(), ToString::to_string);
        println!("kube-proxy's verdict is not the recorded one: {name}: {verdict}, recorded {before}");
    }
    Ok(other.is_empty())
}

fn timed(proxy: Proxy, from: Objects, scenarios: &[Scenario]) -> Result<Verdicts> {
    let start = Instant::now();
    let verdicts = run(proxy, from, scenarios)?;
    eprintln!("  {}: {} probes in {:.0} s", proxy.name(), verdicts.len(), start.elapsed().as_secs_f32());
    Ok(verdicts)
}
