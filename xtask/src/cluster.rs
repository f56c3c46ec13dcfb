//! A Kubernetes cluster on this machine, and upstream's tests on it: `svc-cluster`, with all that it needs.
use std::os::unix::process::CommandExt;

use anyhow::{Context, Result};

use crate::step::{cargo, program, shown};
use crate::{build, host, setup};

/// Run a Kubernetes cluster on this machine, with svc for kube-proxy: `cargo xtask cluster help` says how.
#[derive(clap::Args)]
#[command(disable_help_flag = true)]
pub(crate) struct Options {
    #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
    arguments: Vec<String>,
}

pub(crate) fn run(options: &Options) -> Result<()> {
    hand_over(&options.arguments)
}

/// Run Kubernetes' own end-to-end tests on such a cluster, which is started where there is none.
#[derive(clap::Args)]
#[command(disable_help_flag = true)]
pub(crate) struct EndToEnd {
    #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
    arguments: Vec<String>,
}

pub(crate) fn run_e2e(options: &EndToEnd) -> Result<()> {
    let arguments = [&["e2e".to_owned()], &options.arguments[..]].concat();
    hand_over(&arguments)
}

/// To svc-cluster, once all is built. Of a cluster that is there, nothing is needed but that program.
fn hand_over(arguments: &[String]) -> Result<()> {
    if arguments.iter().any(|word| ["up", "e2e", "test", "build", "conformance"].contains(&word.as_str())) {
        prepare()?;
    } else {
        shown(cargo().args(["build", "--quiet"]))?;
    }
    let mut cluster = program("svc-cluster")?;
    // Optimised, as in deploy/Dockerfile.
    cluster.args(arguments).env("SVC_AGENT", build::released());
    // In place of this process, so that Ctrl-C and the exit status are the cluster's.
    Err(cluster.exec()).context("cannot start svc-cluster")
}

/// Whatever the cluster is made of, but for the Go programs, which svc-cluster builds.
fn prepare() -> Result<()> {
    host::require_lab()?;
    setup::require_go()?;
    setup::ensure()?;
    setup::ensure_lab_tools()?;
    setup::ensure_kube_proxy_tools()?;
    setup::ensure_cluster_tools()?;
    shown(cargo().arg("build"))?;
    shown(cargo().args(["build", "--release", "--package", "svc-agent"]))
}
