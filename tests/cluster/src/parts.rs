//! What is tried with real pods, each part on a cluster of its own.
use std::process::{Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};
use clap::ValueEnum;

use crate::image::Purpose;
use crate::programs::source;
use crate::proxy::Proxy;
use crate::state::Cluster;
use crate::{chart, life, up};

const PATIENCE: Duration = Duration::from_secs(300);

/// Try what takes real pods: failed requests are counted.
#[derive(clap::Args)]
pub(crate) struct Options {
    /// This part only.
    #[arg(long, value_enum)]
    only: Option<Part>,
    /// How often svc takes over from kube-proxy and gives back.
    #[arg(long, default_value_t = 5)]
    take_overs: u32,
}

#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Part {
    /// The life of a node under steady traffic, with kube-proxy and with svc.
    Life,
    /// svc in kube-proxy's place and back, several times.
    TakeOver,
    /// The chart: installed, serving every pod's sockets, uninstalled without a trace.
    Chart,
}

pub(crate) fn run(cluster: &Cluster, options: &Options) -> Result<()> {
    if cluster.mark().exists() {
        bail!(
            "the cluster is up, and this test starts its own: `cargo xtask cluster down` first, or give another --name"
        );
    }
    for part in Part::value_variants().iter().filter(|part| options.only.is_none_or(|only| only == **part)) {
        let proxy = if *part == Part::Chart { Proxy::None } else { Proxy::Kube };
        up::up(cluster, proxy, Purpose::Any)?;
        match part {
            Part::Life => life::run(cluster)?,
            Part::TakeOver => life::take_overs(cluster, options.take_overs)?,
            Part::Chart => chart::run(cluster)?,
        }
        cluster.down()?;
    }
    Ok(())
}

/// The servers that are asked, and their Service.
pub(crate) fn serve(cluster: &Cluster) -> Result<()> {
    cluster.ask(&["apply", "-f", &manifests("life/web.yaml")])?;
    cluster.ask(&["rollout", "status", "deployment/web", "--timeout=300s"]).map(drop)
}

pub(crate) fn in_deploy(name: &str) -> String {
    source("../../deploy").join(name).display().to_string()
}

pub(crate) fn manifests(name: &str) -> String {
    source("manifests").join(name).display().to_string()
}

/// A program's output.
pub(crate) fn said(command: &mut Command) -> Result<String> {
    let output = command.stdin(Stdio::null()).output().with_context(|| format!("cannot start {command:?}"))?;
    if !output.status.success() {
        bail!("{command:?}: {}", String::from_utf8_lossy(&output.stderr).trim());
    }
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

pub(crate) fn wait_for(mut is: impl FnMut() -> Result<bool>) -> Result<()> {
    let deadline = Instant::now() + PATIENCE;
    while !is()? {
        if Instant::now() > deadline {
            bail!("nothing came of it within {} s", PATIENCE.as_secs());
        }
        thread::sleep(Duration::from_millis(100));
    }
    Ok(())
}
