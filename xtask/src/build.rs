//! Builds the agent, the kernel part inside it.
use anyhow::Result;

use crate::setup;
use crate::step::{cargo, shown};

/// Build svc-agent, the kernel part inside it.
#[derive(clap::Args)]
pub(crate) struct Options {
    /// Optimised, to target/release/svc-agent.
    #[arg(long)]
    release: bool,
}

pub(crate) fn run(options: &Options) -> Result<()> {
    setup::ensure()?;
    shown(cargo().args(["build", "--package", "svc-agent"]).args(options.release.then_some("--release")))
}
