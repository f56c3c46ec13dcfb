//! svc at work, readable at a glance.
use std::process::ExitCode;

use anyhow::Result;

/// Show Services being balanced in the lab.
#[derive(clap::Args)]
pub(crate) struct Options {}

pub(crate) fn run(_: &Options) -> Result<ExitCode> {
    Ok(ExitCode::SUCCESS)
}
