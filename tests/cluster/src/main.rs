//! `cargo xtask cluster`: a Kubernetes cluster of three nodes on this machine, of real parts, and what is tried on it.
mod attached;
mod chart;
mod clients;
mod control_plane;
mod e2e;
mod hierarchies;
mod image;
mod life;
mod network;
mod node;
mod parts;
mod programs;
mod proxy;
mod sockets;
mod state;
mod step;
mod up;

use std::process::ExitCode;

use anyhow::{Context, Result};
use clap::{Parser, Subcommand};

use crate::image::Purpose;
use crate::programs::Programs;
use crate::proxy::Proxy;
use crate::state::Cluster;

/// A Kubernetes cluster in namespaces of this machine. It needs root.
#[derive(Parser)]
#[command(name = "svc-cluster", bin_name = "cargo xtask cluster")]
struct Options {
    /// Which cluster, where there are several.
    #[arg(long, global = true, default_value = "svc")]
    name: String,
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Start it, and wait until its nodes and its DNS are ready.
    Up {
        /// What serves Services.
        #[arg(long, value_enum, default_value_t = Proxy::Svc)]
        proxy: Proxy,
    },
    /// End it, and remove everything but what was built.
    Down,
    /// Its nodes and pods.
    Status,
    /// Run a command on a node, a shell if left out.
    Shell {
        /// n1, n2 or n3.
        node: String,
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        command: Vec<String>,
    },
    /// Run kubectl, as the administrator.
    Kubectl {
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        arguments: Vec<String>,
    },
    E2e(e2e::Options),
    Test(parts::Options),
    /// Build the programs that are missing: half an hour where nothing is there.
    Build,
    /// Why there can be no cluster here without building for long; nothing where there can be one.
    #[command(hide = true)]
    Missing,
    /// Those of Kubernetes' tests that CI runs, on a cluster of its own.
    Conformance,
    /// Be a node's first process.
    #[command(hide = true)]
    Init {
        node: String,
    },
}

fn main() -> ExitCode {
    match dispatch(&Options::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("{error:#}");
            ExitCode::FAILURE
        }
    }
}

fn dispatch(options: &Options) -> Result<()> {
    let cluster = Cluster::named(&options.name)?;
    match &options.command {
        Command::Up { proxy } => up::up(&cluster, *proxy, Purpose::Any),
        Command::Down => cluster.down(),
        Command::Status => {
            cluster.require_up()?;
            up::status(&cluster)
        }
        Command::Shell { node, command } => node::shell(&cluster, node, command),
        Command::Kubectl { arguments } => {
            use std::os::unix::process::CommandExt as _;
            let mut kubectl = cluster.kubectl()?;
            Err(kubectl.args(arguments).exec()).context("cannot start kubectl")
        }
        Command::E2e(options) => e2e::run(&cluster, options),
        Command::Test(options) => parts::run(&cluster, options),
        Command::Build => image::ensure(&Programs::ensure()?, Proxy::Svc, Purpose::Any).map(drop),
        Command::Missing => {
            let missing = programs::missing()?;
            if let Err(error) = hierarchies::all() {
                println!("{error:#}");
            } else if !missing.is_empty() {
                println!("not built: {}", missing.join(" "));
            }
            Ok(())
        }
        Command::Conformance => e2e::run_conformance(&cluster),
        Command::Init { node } => node::init(&cluster, node),
    }
}
