//! Builds the agent, the kernel part inside it.
use std::path::PathBuf;

use anyhow::Result;

use crate::setup;
use crate::step::{cargo, root, shown};

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

/// Where the optimised agent is.
pub(crate) fn released() -> PathBuf {
    std::env::var_os("CARGO_TARGET_DIR").map_or_else(|| root().join("target"), PathBuf::from).join("release/svc-agent")
}
