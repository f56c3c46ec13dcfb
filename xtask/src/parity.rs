//! svc beside the real kube-proxy: the rows in which their verdicts differ.
use std::os::unix::process::CommandExt;

use anyhow::{Context, Result};

use crate::step::{cargo, program, shown};
use crate::{host, setup};

/// Compare svc with the real kube-proxy: the same objects, the same nodes, the same probes.
#[derive(clap::Args)]
pub(crate) struct Options {
    /// Only scenarios whose name holds one of these.
    #[arg(long, value_name = "SCENARIO")]
    only: Vec<String>,
    /// kube-proxy's mode: nftables or iptables.
    #[arg(long)]
    mode: Option<String>,
    /// Compare with kube-proxy's recorded verdicts, without kube-proxy and without an API server.
    #[arg(long)]
    recorded: bool,
    /// Record kube-proxy's verdicts, in all its modes, first.
    #[arg(long)]
    record: bool,
    /// Show every verdict of kube-proxy, and leave svc out.
    #[arg(long)]
    proxy_only: bool,
}

pub(crate) fn run(options: &Options) -> Result<()> {
    host::require_lab()?;
    if !options.recorded {
        setup::require_go()?;
        setup::ensure_kube_proxy_tools()?;
    }
    setup::ensure()?;
    setup::ensure_lab_tools()?;
    shown(cargo().arg("build"))?;

    let mut parity = program("svc-parity")?;
    for scenario in &options.only {
        parity.args(["--only", scenario]);
    }
    if let Some(mode) = &options.mode {
        parity.args(["--mode", mode]);
    }
    parity.args(options.recorded.then_some("--recorded"));
    parity.args(options.record.then_some("--record"));
    parity.args(options.proxy_only.then_some("--proxy-only"));
    // In place of this process, so that Ctrl-C and the exit status are the comparison's.
    Err(parity.exec()).context("cannot start svc-parity")
}
