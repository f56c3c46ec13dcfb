//! The demonstration: a lab of network namespaces in which real requests are balanced.
use std::os::unix::process::CommandExt;

use anyhow::{Context, Result};

use crate::step::{cargo, program, shown};
use crate::{host, setup};

/// Build everything and show it at work, in network namespaces.
#[derive(clap::Args)]
pub(crate) struct Options {
    /// Exit when everything was shown; non-zero if a request failed or a backend was never reached.
    #[arg(long)]
    once: bool,
    /// Take the Services from a real kube-apiserver instead of a folder of manifests.
    #[arg(long)]
    control_plane: bool,
    /// Requests on each path.
    #[arg(long, value_name = "N")]
    requests: Option<u32>,
}

pub(crate) fn run(options: &Options) -> Result<()> {
    host::require_lab()?;
    if options.control_plane {
        setup::require_go()?;
    }
    setup::ensure()?;
    setup::ensure_lab_tools()?;
    shown(cargo().arg("build"))?;

    let mut demo = program("svc-lab")?;
    demo.arg("demo");
    demo.args(options.once.then_some("--once"));
    demo.args(options.control_plane.then_some("--control-plane"));
    if let Some(requests) = options.requests {
        demo.args(["--requests", &requests.to_string()]);
    }
    // In place of this process, so that Ctrl-C and the exit status are the demonstration's.
    Err(demo.exec()).context("cannot start svc-lab")
}
