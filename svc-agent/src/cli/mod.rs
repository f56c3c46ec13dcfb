//! The command line: a file a subcommand.
pub mod affinity;
pub mod backends;
pub mod bugreport;
pub mod check;
pub mod cleanup;
pub mod completions;
#[cfg(test)]
pub(crate) mod example;
pub mod flows;
mod log;
pub mod man;
pub mod maps;
pub mod monitor;
pub mod mount;
pub mod namespaces;
pub mod print;
pub mod run;
pub mod selector;
pub mod services;
pub mod status;
pub mod timeouts;
pub mod top;
pub mod trace;

use std::process::ExitCode;

use clap::{ArgAction, Parser, Subcommand, ValueEnum};
use tracing_subscriber::EnvFilter;

/// Kubernetes Services in eBPF, in the place of kube-proxy.
#[derive(Parser, Debug)]
#[command(version, about)]
pub struct Cli {
    #[command(subcommand)]
    pub command: Command,

    /// Say more; twice: libraries as well.
    #[arg(short, long, action = ArgAction::Count, global = true)]
    pub verbose: u8,

    /// How log lines look.
    #[arg(long, value_enum, default_value_t = LogFormat::Text, global = true)]
    pub log_format: LogFormat,
}

#[derive(Subcommand, Debug)]
pub enum Command {
    /// Keep this node's Services served.
    Run(Box<run::Args>),
    /// Say whether this machine is fit for the agent, and what to do where it is not.
    ///
    /// It takes the flags of `run`, and judges by them. Nothing is changed, attached or sent. Each line is ok, warning (the
    /// agent starts, but not all is as it should be) or failed (it does not start, or traffic is lost); what to do stands
    /// below. The exit code is 1 where a line says failed.
    Check(Box<check::Args>),
    /// List the addresses that Services answer under.
    Services(services::Args),
    /// List the backends that Services have.
    Backends(backends::Args),
    /// List the flows from outside that are under way.
    Flows(flows::Args),
    /// List which clients stay with which backends (ClientIP affinity).
    Affinity(affinity::Args),
    /// List the kernel's maps, how full each is and what gives it more room.
    Maps(maps::Args),
    /// Show what is attached, how full it is and what was counted.
    ///
    /// With --verbose also programs, modes, versions and what the running agent says of itself.
    Status(status::Args),
    /// Watch services and their backends by flows under way and new ones a second.
    ///
    /// The kernel keeps no packets or bytes for each service: they are shown for all together. Connections that sockets made are no
    /// flows; of a service they count among the new ones.
    Top(top::Args),
    /// Show drops, rejects and new flows as they happen.
    ///
    /// The kernel part writes them for as long as this runs, ten thousand a second and CPU at most; how many were left out is
    /// told. Without it nothing is written. A socket that is pointed at a backend is a new flow, too. The agent need not run.
    Monitor(monitor::Args),
    /// Say what becomes of a connection: trace tcp 10.244.1.5 '->' 10.96.0.10:53
    ///
    /// The program in the kernel is asked, over the tables in use and copies of what it writes: no packet is sent, and nothing
    /// changes. What a socket gets is computed from the same tables.
    Trace(trace::Args),
    /// Write an archive for whoever is to look into a problem; it has no secrets.
    ///
    /// What is checked, status, services, backends, maps, affinity, flows (10,000 of them), kernel settings, interfaces and routes:
    /// no tokens, no kubeconfig, no environment, no packets. What it holds is listed.
    Bugreport(Box<bugreport::Args>),
    /// Print what a shell completes svc-agent's arguments by: completions bash > /etc/bash_completion.d/svc-agent
    Completions(completions::Args),
    /// Write manual pages.
    Man(man::Args),
    /// Take everything out of the kernel; stop the agent first.
    Cleanup(cleanup::Args),
    /// Mount what the agent needs, where the node has not.
    Mount(mount::Args),
}

#[derive(ValueEnum, Clone, Copy, PartialEq, Eq, Debug)]
pub enum LogFormat {
    Text,
    Json,
}

impl Cli {
    /// The process' own arguments. An arrow between two addresses (`trace`) is for the reader only.
    pub fn from_arguments() -> Self {
        Cli::parse_from(std::env::args_os().filter(|argument| argument != "->"))
    }

    /// Runs the subcommand. A failure is one sentence on stderr and exit code 1; clap's own is 2.
    pub fn run(self) -> ExitCode {
        self.start_log();
        let result = match self.command {
            Command::Run(args) => run::run(*args),
            Command::Check(args) => match check::run(&args) {
                Ok(true) => Ok(()),
                Ok(false) => return ExitCode::FAILURE,
                Err(error) => Err(error),
            },
            Command::Services(args) => services::run(&args),
            Command::Backends(args) => backends::run(&args),
            Command::Flows(args) => flows::run(&args),
            Command::Affinity(args) => affinity::run(&args),
            Command::Maps(args) => maps::run(&args),
            Command::Status(args) => status::run(&args, self.verbose > 0),
            Command::Top(args) => top::run(&args),
            Command::Monitor(args) => monitor::run(&args),
            Command::Trace(args) => trace::run(&args),
            Command::Bugreport(args) => bugreport::run(&args),
            Command::Completions(args) => completions::run(&args),
            Command::Man(args) => man::run(&args),
            Command::Cleanup(args) => cleanup::run(&args),
            Command::Mount(args) => mount::run(&args),
        };
        match result {
            Ok(()) => ExitCode::SUCCESS,
            Err(error) => {
                eprintln!("svc-agent: {}", print::escape(&format!("{error:#}")));
                ExitCode::FAILURE
            }
        }
    }

    /// RUST_LOG, where it is set, has the last word.
    fn start_log(&self) {
        // `svc` is the kernel part, where it is built to say anything.
        let default = match self.verbose {
            0 => "error,svc=info,svc_agent=info",
            1 => "warn,svc=info,svc_agent=debug",
            _ => "debug,svc_agent=trace",
        };
        let filter = EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new(default));
        log::start(filter, self.log_format);
    }
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory as _;

    use super::Cli;

    #[test]
    fn no_subcommand_has_the_same_flag_twice() {
        Cli::command().debug_assert();
    }
}
