//! What svc costs, as ratios within one run.
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::Command;

use anyhow::{Context, Result};

use crate::step::{cargo, root, shown};
use crate::{host, setup};

/// Measure what svc costs, beside kube-proxy and beside the floor; docs/benchmarks.md says how.
#[derive(clap::Args)]
pub(crate) struct Options {
    /// Fewer rounds, and not the largest sizes: a few minutes.
    #[arg(long)]
    quick: bool,
    /// Only these rows, and those that are measured along with them: P1, P12, ...
    #[arg(long, value_name = "ROW", value_delimiter = ',')]
    only: Vec<String>,
    /// The raw figures of an earlier run, to compare with.
    #[arg(long, value_name = "FILE")]
    compare: Option<PathBuf>,
}

/// The rows without kube-proxy and an API server.
const ALONE: [&str; 4] = ["P1p", "P3", "P3p", "P13"];

pub(crate) fn run(options: &Options) -> Result<()> {
    host::require_lab()?;
    setup::ensure()?;
    setup::ensure_lab_tools()?;
    let alone = !options.only.is_empty() && options.only.iter().all(|row| ALONE.contains(&row.as_str()));
    if !alone {
        setup::require_go()?;
        setup::ensure_kube_proxy_tools()?;
    }
    shown(cargo().args([
        "build",
        "--release",
        "--package",
        "svc-agent",
        "--package",
        "svc-lab",
        "--package",
        "svc-bench",
    ]))?;

    if !alone {
        shown(Command::new(root().join("target/release/svc-lab")).arg("control-plane"))?;
    }

    let mut bench = Command::new(root().join("target/release/svc-bench"));
    bench.current_dir(root()).args(options.quick.then_some("--quick"));
    for row in &options.only {
        bench.args(["--only", row]);
    }
    if let Some(file) = &options.compare {
        bench.arg("--compare").arg(std::path::absolute(file)?);
    }
    // In place of this process, so that Ctrl-C and the exit status are the benchmark's.
    Err(bench.exec()).context("cannot start svc-bench")
}
